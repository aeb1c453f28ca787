"""The CPU kernels of every instruction set this processor has: right against the reference, and how fast each is.

    python benchmarks/cpu_isas.py [--cases N]

For a machine that the tests do not run on. Needs nothing but torch; exits with 1 if an answer is wrong.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("src", "tests")]

from cases import assert_matches_reference, random_call  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from pagedflash import flash_attn_func  # noqa: E402
from pagedflash.backends.cpu import launch  # noqa: E402
from pagedflash.cli.bench import (  # noqa: E402
    STREAM_BYTES,
    DecodeShape,
    decode_problem,
    describe_device,
    gather_sdpa,
    interleave,
    pagedflash_decode,
    streaming,
)


def check(isa: str, cases: int) -> int:
    """Wrong answers among so many random calls."""
    wrong = 0
    with launch.use_isa(isa):
        for seed in range(cases):
            try:
                assert_matches_reference(random_call(random.Random(seed), max_keys=600), launch.attention)
            except AssertionError as error:
                wrong += 1
                print(f"{isa}, seed {seed}: {str(error)[:300]}")
    print(f"{isa}: {cases - wrong} of {cases} random calls right", flush=True)
    return wrong


def with_isa(isa: str, run):  # type: ignore[no-untyped-def]
    def chosen() -> object:
        with launch.use_isa(isa):
            return run()

    return chosen


def measure(isas: list[str]) -> None:
    stream = streaming()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shape = DecodeShape(dtype=dtype)
        problem = decode_problem(shape, [4096] * (-(-(256 << 20) // (4096 * shape.token_bytes))))
        contenders = {isa: with_isa(isa, pagedflash_decode(problem)) for isa in isas if isa != "generic"}
        contenders |= {"streaming": stream, "gather + SDPA": gather_sdpa(problem, fold=True)}
        for name, seconds in interleave(contenders, 5).items():
            size = STREAM_BYTES if name == "streaming" else problem.cache_bytes
            print(f"decode 32/8 D=128 {dtype} {name}: {size / statistics.median(seconds) / 1e9:.1f} GB/s", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, 2048, heads, 128).to(dtype) for heads in (32, 8, 8))
        contenders = {
            isa: with_isa(isa, lambda q=q, k=k, v=v: flash_attn_func(q, k, v, causal=True))
            for isa in isas
            if isa != "generic"
        }
        a, b, c = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(4, 1) for x in (k, v))
        contenders["SDPA"] = lambda a=a, b=b, c=c: scaled_dot_product_attention(a, b, c, is_causal=True)
        for name, seconds in interleave(contenders, 5).items():
            print(f"prefill 2048 causal 32/8 {dtype} {name}: {1e3 * statistics.median(seconds):.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=150)
    isas = list(launch.library().isas)
    print(f"{describe_device('cpu')}, torch {torch.__version__}, instruction sets: {', '.join(isas)}", flush=True)
    wrong = sum(check(isa, parser.parse_args().cases) for isa in isas)
    measure(isas)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
