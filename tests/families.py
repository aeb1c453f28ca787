"""Every model family of transformers as a tiny random model, and how it fares on "pagedflash" beside eager attention.

``python tests/families.py`` prints the lists of docs/transformers.md, ``... families.py llama bart`` how those fare.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from tiny_models import LENGTH, TOKENS, NotBuilt, Sample, build, classes_of, family_names, first_line, sample
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import pagedflash
import pagedflash.transformers

NEW_TOKENS = 6


class Outcome(NamedTuple):
    """How one check of one model went."""

    verdict: str  # "equal", "refused", "wrong", "error", or "not run" where eager attention does not run it either
    detail: str = ""


Run = Callable[[Any], list[Tensor]]


def checks_of(model: Any, inputs: dict[str, Tensor]) -> Iterator[tuple[str, Run]]:
    """What there is to compare: a name, and what gives the tensors that must be equal."""
    takes = inspect.signature(model.forward).parameters
    ids = inputs.get("input_ids")
    yield "forward", lambda model: _tensors(model(**inputs))

    if "attention_mask" in takes:
        for side in ("left", "right"):
            if ids is not None:
                mask = torch.ones_like(ids)
                mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
                last = mask * torch.arange(1, LENGTH + 1)  # ends with the end token: some models take what stands there
                padded = torch.where(last == last.amax(-1, keepdim=True), TOKENS["eos_token_id"], ids * mask)
                yield f"{side} padding", partial(_padded, inputs={**inputs, "input_ids": padded}, mask=mask)
            elif side == "right" and (sound := inputs.get("input_values", inputs.get("input_features"))) is not None:
                mask = torch.ones(2, sound.shape[-1], dtype=torch.long)
                mask[0, sound.shape[-1] // 2 :] = 0
                yield "right padding", partial(_padded, inputs=inputs, mask=mask)

    if ids is not None and "position_ids" in takes and "decoder_input_ids" not in inputs:
        packed = {"input_ids": ids[:1], "position_ids": torch.cat((torch.arange(5), torch.arange(LENGTH - 5)))[None]}
        if takes.keys() & {"use_cache", "past_key_values", "cache"}:
            packed["use_cache"] = False
        yield "packed", lambda model: _tensors(model(**packed))

    if ids is not None and model.can_generate():
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        for name, cache in (("generate", None), ("generate, static cache", "static")):
            yield name, partial(_generate, ids=ids * mask, mask=mask, cache=cache)


def _padded(model: Any, inputs: dict[str, Tensor], mask: Tensor) -> list[Tensor]:
    """Of what has a row for each token, the rows that are no padding; of what was made of sound, the part before it."""
    found = _tensors(model(**inputs, attention_mask=mask))
    if "input_ids" in inputs:
        return [value[mask.bool()] if value.shape[:2] == mask.shape else value for value in found]
    rows = [value for value in found if value.dim() > 1 and "decoder_input_ids" not in inputs]
    return [part for value in rows for part in (value[1], value[0, : value.shape[1] // 4])] or found[:1]


def _generate(model: Any, ids: Tensor, mask: Tensor, cache: str | None) -> list[Tensor]:
    model.generation_config.eos_token_id = None
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, cache_implementation=cache)
    return [model.generate(ids, attention_mask=mask, **options)]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    return [value for value in (output.values() if isinstance(output, Mapping) else [output]) if isinstance(value, Tensor)]


def check(family: str, names: list[str]) -> dict[str, Outcome]:
    """Each check of the first model of a family that can be made."""
    classes, problem = classes_of(names), ""
    if not classes:
        return {"forward": Outcome("not run", "its classes do not attend, or cannot be imported")}
    for model_class in classes[:3]:
        if model_class._supports_flash_attn:
            try:
                made = sample(family, model_class)
            except NotBuilt as error:
                problem = problem or str(error)
            else:
                return _check(model_class, made)
    refusal = _refusal(family, classes[0])
    return {"forward": Outcome("not run", problem) if problem and refusal.verdict != "refused" else refusal}


def _check(model_class: Any, made: Sample) -> dict[str, Outcome]:
    config, inputs = made
    eager = build(model_class, config, "eager")
    try:
        model = build(model_class, config, "pagedflash")
    except Exception as error:
        return {"forward": _failed(error)}
    outcomes = {}
    for name, run in checks_of(eager, inputs):
        outcomes[name] = _compare(run, eager, model)
    return outcomes


def _refusal(family: str, model_class: Any) -> Outcome:
    """Of a family that flash attention cannot run, which need not be built for it."""
    try:
        with torch.device("meta"):
            model_class._from_config(CONFIG_MAPPING[family](), attn_implementation="pagedflash")
    except ImportError as error:
        return Outcome("not run", first_line(error))
    except Exception as error:
        return _failed(error)
    return Outcome("wrong", "accepted, though transformers says that flash attention cannot run it")


def _compare(run: Run, eager: Any, model: Any) -> Outcome:
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            expected = run(eager)
    except Exception as error:
        return Outcome("not run", first_line(error))
    try:
        with torch.no_grad(), pagedflash.count_calls() as calls:
            torch.manual_seed(0)
            came = run(model)
    except Exception as error:
        return _failed(error)
    for want, have in zip(expected, came, strict=True):
        if want.shape != have.shape or want.dtype != have.dtype:
            return Outcome("wrong", f"{tuple(have.shape)} for {tuple(want.shape)}")
        if not want.is_floating_point():
            if not torch.equal(want, have):
                return Outcome("wrong", "other tokens")
            continue
        if not torch.isfinite(want).all():
            return Outcome("not run", "eager attention gives no finite numbers")
        error = ((want - have).abs().max() / want.abs().max().clamp(min=1e-6)).item() if want.numel() else 0.0
        if not error < 2e-3:
            return Outcome("wrong", f"off by {error:.1g} of the largest value")
    if not calls:
        return Outcome("wrong", "never calls a kernel")
    return Outcome("equal")


def _failed(error: Exception) -> Outcome:
    sentence = isinstance(error, ValueError) and "pagedflash" in str(error) and "support" in str(error)
    return Outcome("refused" if sentence or "pagedflash:" in str(error) else "error", first_line(error))


def main(families: list[str]) -> None:
    """Print how families fare: all of them as the lists of the documentation, or each of those named."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    pagedflash.transformers.enable()
    outcomes = {}
    for family, names in family_names().items():
        if not families or family in families:
            outcomes[family] = check(family, names)
            if families or any(outcome.verdict in ("wrong", "error") for outcome in outcomes[family].values()):
                print(family, flush=True)
                for name, outcome in outcomes[family].items():
                    print(f"  {name}:", *filter(None, outcome), flush=True)
    if not families:
        print(summary(outcomes))


def summary(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """The lists of the documentation, in Markdown."""
    groups: dict[str, list[str]] = {}
    checks: dict[str, Counter[str]] = {}
    for family, of_family in outcomes.items():
        verdicts = {outcome.verdict for outcome in of_family.values()}
        for name, outcome in of_family.items():
            checks.setdefault(name, Counter())[outcome.verdict] += 1
        if "wrong" in verdicts or "error" in verdicts:
            group = "Wrong"
        elif verdicts == {"not run"}:
            group = "Not run"
        elif "equal" not in verdicts:
            group = "Refused"
        else:
            group = "As eager, some of it refused" if "refused" in verdicts else "As eager"
        groups.setdefault(group, []).append(family)
    lines = [f"transformers {transformers.__version__}, torch {torch.__version__}: {len(outcomes)} families.", ""]
    lines += ["| check | equal | refused | wrong | not run |", "|---|---|---|---|---|"]
    for name, counts in checks.items():
        wrong = counts["wrong"] + counts["error"]
        lines.append(f"| {name} | {counts['equal']} | {counts['refused']} | {wrong} | {counts['not run']} |")
    for group in ("Wrong", "As eager", "As eager, some of it refused", "Refused", "Not run"):
        if group in groups:
            lines += [
                "",
                textwrap.fill(
                    f"**{group}** ({len(groups[group])}): {', '.join(groups[group])}.", 125, break_on_hyphens=False
                ),
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
