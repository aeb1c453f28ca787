"""transformers' own tests of flash attention, with "pagedflash" in the place of "flash_attention_2", on the CPU.

    pip install parameterized; pip download --no-deps --no-binary transformers transformers==5.22.2
    tar xzf transformers-5.22.2.tar.gz
    python tests/upstream_flash.py transformers-5.22.2/tests [FAMILY ...]

They are what its source distribution has of them, `test_modeling_common.py`, and run as there: with gradients tracked,
from_config in training mode. Left out is what they ask of a machine (a GPU, the package flash-attn, bitsandbytes), and
repeating what fails. The models are those of `tiny_models.py`, since that distribution has no tests of models. What fails
with eager attention too says so, and is not counted as failed.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import types
import unittest
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["RUN_SLOW"] = "1"

import torch
import transformers
from test_transformers_sweep import WELL_KNOWN
from tiny_models import NotBuilt, Sample, classes_of, family_names, first_line, sample
from transformers import testing_utils

import pagedflash.transformers

TESTS = (
    "test_flash_attn_2_inference_equivalence",
    "test_flash_attn_2_inference_equivalence_right_padding",
    "test_flash_attn_2_from_config",
    "test_flash_attn_2_fp32_ln",
    "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break",
)
ASKED_OF_THE_MACHINE = ("flash_attn", "torch_accelerator", "bitsandbytes", "torch_gpu")
NOT_DISTRIBUTED = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
PACKAGE = "transformers_tests"


def common_tests(folder: Path, attention: str) -> Any:
    """The module `test_modeling_common` of a folder, with the name of another attention."""
    for name in ASKED_OF_THE_MACHINE:
        setattr(testing_utils, f"require_{name}", lambda test: test)
    testing_utils.is_flaky = lambda *_, **__: lambda test: test
    package = sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    for name, mixin in NOT_DISTRIBUTED.items():
        if not (folder / f"{name.replace('.', '/')}.py").exists():
            parent = name.partition(".")[0]
            sys.modules.setdefault(f"{PACKAGE}.{parent}", types.ModuleType(f"{PACKAGE}.{parent}"))
            module = sys.modules[f"{PACKAGE}.{name}"] = types.ModuleType(f"{PACKAGE}.{name}")
            setattr(module, mixin, type(mixin, (), {}))
    module = types.ModuleType(f"{PACKAGE}.test_modeling_common")
    path = folder / "test_modeling_common.py"
    source = path.read_text().replace('"flash_attention_2"', f'"{attention}"')
    exec(compile(source, str(path), "exec"), vars(module))
    vars(module)["BitsAndBytesConfig"] = lambda **_: None
    return module


def tests_of(common: Any, model_class: Any, made: Sample) -> type[unittest.TestCase]:
    """The tests of one model."""

    class Tester:
        seq_length, batch_size, is_training = 12, 2, True

        def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
            return copy.deepcopy(made.config), copy.deepcopy(made.inputs)

    class Tests(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = all_generative_model_classes = (model_class,)
        model_tester = Tester()
        has_attentions = True

    if "CausalLM" in model_class.__name__:
        Tests._torch_compile_train_cls = model_class
    return Tests


def run(tests: type[unittest.TestCase], name: str) -> tuple[str, str]:
    """``(passed, skipped or failed, why)``"""
    result = unittest.TestResult()
    tests(name).run(result)
    torch.compiler.reset()
    if result.skipped:
        return "skipped", result.skipped[0][1]
    wrong = [*result.failures, *result.errors]
    return ("failed", wrong[0][1].strip().splitlines()[-1]) if wrong else ("passed", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the tests of transformers")
    parser.add_argument("families", nargs="*", default=WELL_KNOWN)
    parser.add_argument("--no-compile", action="store_true", help="without the test of torch.compile, the slowest")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    common, with_eager = (common_tests(options.folder, attention) for attention in ("pagedflash", "eager"))
    names = family_names()
    pagedflash.transformers.enable()
    counts: dict[str, Counter[str]] = {name: Counter() for name in TESTS[: -1 if options.no_compile else None]}
    calls = 0
    for family in options.families:
        try:
            model_class = next(found for found in classes_of(names[family]) if found._supports_flash_attn)
            made = sample(family, model_class)
            tests, eager_tests = (tests_of(module, model_class, made) for module in (common, with_eager))
        except (NotBuilt, StopIteration) as error:
            print(f"{family}: no model: {first_line(error)}", flush=True)
            continue
        for name, count in counts.items():
            with pagedflash.count_calls() as counted:
                verdict, why = run(tests, name)
            calls += counted.total()
            if verdict == "failed" and run(eager_tests, name)[0] == "failed":
                verdict = "failed with eager too"
            count[verdict] += 1
            if why:
                print(f"{family}, {name}: {verdict}: {why}", flush=True)
    for name, count in counts.items():
        print(f"{name}: {', '.join(f'{number} {verdict}' for verdict, number in sorted(count.items()))}")
    print(f"{calls} calls of attention")
    return int(any(count["failed"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
