"""What a format of the cache costs in quality, measured on a real model: SmolLM2-135M on English text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.suite import Options, Row, suite
from benchmarks.suites.generate import no_model
from pagedflash import flash_attn_with_kvcache
from pagedflash.problem import QUANTIZED

WINDOWS, WINDOW = 20, 1024
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 64
NAME = "cache-quality"
"""What the suite's attention is called in transformers."""


GROUP = 32
"""Neighbouring elements of a head that share what 4 bits are relative to."""


def symmetric(x: Tensor) -> Tensor:
    """What 4 bits and a float16 scale a group keep: -8 to 7 times the scale (llama.cpp's q4_0)."""
    groups = x.unflatten(-1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (largest / -8).half().float()
    steps = torch.where(scale == 0, 0.0, groups / scale)
    rounded: Tensor = steps.round().clamp(-8, 7) * scale
    return rounded.flatten(-2)


def affine(x: Tensor) -> Tensor:
    """What 4 bits, a float16 scale and a float16 minimum a group keep (llama.cpp's q4_1, MLX's 4 bits)."""
    groups = x.unflatten(-1, (-1, GROUP))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, least = ((most - least) / 15).half().float(), least.half().float()
    steps = torch.where(scale == 0, 0.0, (groups - least) / scale)
    rounded: Tensor = steps.round().clamp(0, 15) * scale + least
    return rounded.flatten(-2)


class Format(NamedTuple):
    dtype: torch.dtype
    scales: str = ""  # "1": one scale of 1; "token and head": written by the append
    four_bits: Callable[[Tensor], Tensor] | None = None  # values are rounded so before; no kernel reads 4 bits

    @property
    def bytes(self) -> int:
        """Of a token and head."""
        if self.four_bits is not None:
            return 64 // 2 + 64 // GROUP * (4 if self.four_bits is affine else 2)
        return self.dtype.itemsize * 64 + (4 if self.scales == "token and head" else 0)

    def __str__(self) -> str:
        if self.four_bits is not None:
            return f"4 bits, {self.four_bits.__name__}, in groups of {GROUP}"
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}, a scale of 1" if self.scales == "1" else f"{name}, a scale a {self.scales}" if self.scales else name


FORMATS = (
    Format(torch.float32),
    Format(torch.float16),
    Format(torch.bfloat16),
    Format(torch.int8, "token and head"),
    Format(torch.float8_e4m3fn, "token and head"),
    Format(torch.float8_e4m3fn, "1"),
    Format(torch.float8_e5m2, "token and head"),
    Format(torch.float32, four_bits=affine),
    Format(torch.float32, four_bits=symmetric),
)


@suite("cache-quality", needs=no_model)
def quality(options: Options) -> Iterator[Row]:
    """SmolLM2-135M in float32 over caches of each format: perplexity on pydoc_data.topics, and tokens that agree"""
    from rich.console import Console
    from rich.progress import track

    windows, tokens = options.size((WINDOWS, WINDOW), (2, 32))
    prompts, new_tokens = options.size((PROMPTS, NEW_TOKENS), (2, 4))
    model, ids = model_and_text(windows * tokens)
    text = ids[: windows * tokens].view(windows, 1, tokens)
    starts = text[:prompts, 0, :PROMPT_TOKENS]
    console = Console(stderr=True)
    expected: Seen | None = None
    for format in FORMATS:
        with attention_over(model, format), torch.inference_mode():
            parts = [predict(model, part) for part in track(text, str(format), console=console, transient=True)]
            answers = greedy(model, starts, new_tokens)
        losses, best = (torch.cat(each) for each in zip(*parts))
        mine = Seen(math.exp(losses.mean()), best, answers)
        expected = expected or mine
        figures = {
            "bytes a head and token": format.bytes,
            "perplexity": f"{mine.perplexity:.4f}",
            "of float32": f"{100 * (mine.perplexity / expected.perplexity - 1):+.3f} %",
            "same next token": f"{100 * (mine.best == expected.best).float().mean():.2f} %",
            "greedy tokens": f"{(mine.answers == expected.answers).sum()} of {mine.answers.numel()}",
        }
        yield Row(str(format), figures)


class Seen(NamedTuple):
    """What a model made of a text."""

    perplexity: float
    best: Tensor  # the most likely next tokens
    answers: Tensor  # (prompts, new tokens), greedy


def model_and_text(tokens: int) -> tuple[Any, Tensor]:
    """SmolLM2-135M, and so many tokens of the help texts in Python's standard library."""
    from pydoc_data.topics import topics

    from pagedflash.cli.generate import find_model, load, quiet_transformers

    quiet_transformers()
    model, tokenizer = load(find_model(None), torch.device("cpu"), torch.float32, "sdpa")
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return model, torch.tensor(tokenizer(text[: 8 * tokens])["input_ids"][:tokens])


def predict(model: Any, part: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, most likely tokens) of each next token of ``part (1, tokens)``."""
    logits = model(part, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none"), logits.argmax(-1)


def greedy(model: Any, starts: Tensor, new_tokens: int) -> Tensor:
    answers: Tensor = model.generate(
        starts, attention_mask=torch.ones_like(starts), max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1
    )
    return answers[:, starts.shape[1] :]


@contextmanager
def attention_over(model: Any, format: Format) -> Iterator[None]:
    """In every layer, keys and values are written to a cache of this format, and attended to there: by our kernels, with the
    queries as they are."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: Any
    ) -> tuple[Any, None]:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if format.four_bits is not None:
            k, v = format.four_bits(k), format.four_bits(v)
        k_cache, v_cache = (torch.empty(each.shape, dtype=format.dtype) for each in (k, v))
        scales: dict[str, Any] = {}
        if format.dtype in QUANTIZED:
            shape = k.shape[:-1] if format.scales == "token and head" else ()
            scales = {name: torch.ones(shape) for name in ("k_descale", "v_descale")}
        options = dict(cache_seqlens=0, softmax_scale=scaling, causal=True, **scales)
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
