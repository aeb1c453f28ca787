"""Training of a whole model."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.suite import Options, Row, suite
from benchmarks.suites.generate import no_model
from pagedflash.cli.bench import OURS

MAX_DIFFERENCE = 1e-3
"""Of losses: rounding differs, and steps carry it on."""


@suite("training-smollm2", needs=no_model)
def smollm2(options: Options) -> Iterator[Row]:
    """SmolLM2-135M fine-tuned on the CPU in float32, 96 tokens a step: the loss of each step, beside sdpa's"""
    from benchmarks import fine_tuning
    from pagedflash.cli.generate import quiet_transformers

    quiet_transformers()
    steps, tokens = options.size((50, 96), (4, 16))
    model, tokenizer = fine_tuning.smollm2()
    inputs = fine_tuning.batches(tokenizer, steps, tokens)
    ours, theirs = (fine_tuning.losses(model, name, inputs) for name in (OURS, "sdpa"))
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    shown = sorted({0, *range(9, steps, 10), steps - 1})
    for step in shown:
        figures = {OURS: f"{ours[step]:.5f}", "sdpa": f"{theirs[step]:.5f}", "difference": f"{differences[step]:.1e}"}
        yield Row(f"step {step + 1}", figures)
    largest = max(differences)
    failures = [f"losses differ by up to {largest:.2g}"] if largest > MAX_DIFFERENCE else []
    yield Row("all steps", {OURS: "", "sdpa": "", "difference": f"{largest:.1e}"}, failures)
