"""Random attention calls over all options, and the comparison every backend must pass.

A case is an :class:`AttentionCall` whose caches are poisoned: slots that no sequence owns hold NaN, table entries
that no length reaches hold -1 or garbage, K and V may be interleaved in one allocation as transformers lays them out,
queries may be slices of a fused projection. The oracle is the reference, run in float64 on the same values.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from pagedflash import reference
from pagedflash.call import AttentionCall, check, check_values

HEAD_DIMS = (32, 64, 72, 80, 96, 112, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 7, 8, 16)
PAGE_SIZES = (1, 4, 16, 32, 48, 256)
LAYOUTS = ("dense", "cache", "paged", "varlen", "paged varlen")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Largest difference to float64 on values of about unit size. float16 and bfloat16 round the output (2^-11, 2^-8 of its
# size) and, with rotary, the rotated queries and keys, which moves scores and with them the LSE.
OUT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LSE_TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-5, torch.bfloat16: 5e-5}
ROTARY_LSE_TOLERANCE = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}

Run = Callable[[AttentionCall], tuple[Tensor, Tensor]]


def random_call(
    rng: random.Random,
    *,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    groups: tuple[int, ...] = GROUPS,
    page_sizes: tuple[int, ...] = PAGE_SIZES,
    max_queries: int = 40,
    max_keys: int = 150,
    device: str = "cpu",
) -> AttentionCall:
    """Draw a valid call. Every option is drawn independently of every other."""
    draw = _Draw(rng, dtype or rng.choice(DTYPES), layout or rng.choice(LAYOUTS), device)
    call = draw.call(rng.choice(head_dims), rng.choice(groups), page_sizes, max_queries, max_keys)
    check(call, {})
    if device == "cpu":
        check_values(call)
    return call


def describe(call: AttentionCall) -> str:
    """A case in one line, for messages."""
    words = [call.layout, str(call.q.dtype)]
    for field, value in call._asdict().items():
        if isinstance(value, Tensor):
            words.append(f"{field}{list(value.shape)}")
        elif value not in (None, False):
            words.append(f"{field}={value}")
    return " ".join(words)


def assert_matches_reference(call: AttentionCall, run: Run) -> None:
    """``run`` must give the float64 output and LSE, leave finite numbers everywhere, and write its slots and no others."""
    exact = as_float64(call)
    want_out, want_lse = reference.attention(exact)
    expected = clone_call(call)
    if expected.k_new is not None:
        reference.kv_write(expected.write)
    rotary = call.rotary_cos is not None

    out, lse = run(call)

    message = describe(call)
    assert out.dtype == call.q.dtype and out.shape == call.out_shape, message
    assert lse.dtype == torch.float32 and lse.shape == call.lse_shape, message
    _assert_close("out", out, want_out, OUT_TOLERANCE[call.q.dtype], message)
    lse_tolerance = (ROTARY_LSE_TOLERANCE if rotary else LSE_TOLERANCE)[call.q.dtype]
    _assert_close("lse", lse, want_lse, lse_tolerance, message)
    for name, cache, want in (("k", call.k, expected.k), ("v", call.v, expected.v)):
        # Bit for bit, except that rotated keys may round differently.
        step = torch.finfo(cache.dtype).eps if rotary else 0.0
        torch.testing.assert_close(
            _whole_storage(cache),
            _whole_storage(want),
            rtol=2 * step,
            atol=step,
            equal_nan=True,
            msg=f"{name}: {message}",
        )


def _assert_close(name: str, got: Tensor, want: Tensor, tolerance: float, message: str) -> None:
    assert not got.isnan().any(), f"{name} has NaN: {message}"
    got = got.cpu().double()
    assert torch.equal(got.isinf(), want.isinf()), f"{name} is infinite at other places: {message}"
    error = (got - want).masked_fill(want.isinf(), 0.0).abs()
    allowed = tolerance * want.masked_fill(want.isinf(), 0.0).abs().clamp(min=1.0)
    if error.numel():
        assert (error <= allowed).all(), f"{name} is off by up to {error.max():.3g}: {message}"


def clone_call(call: AttentionCall) -> AttentionCall:
    """A copy whose tensors overlap in memory exactly as the original's do."""
    storages: dict[int, torch.UntypedStorage] = {}

    def clone(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        copy = storages.setdefault(storage._cdata, storage.clone())
        return value.new_empty(0).set_(copy, value.storage_offset(), value.shape, value.stride())

    return AttentionCall(*(clone(value) for value in call))  # type: ignore[arg-type]


def as_float64(call: AttentionCall) -> AttentionCall:
    """The same call on float64 copies of its tensors."""

    def widen(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        # Not .clone(): an oracle for a device must not run on that device.
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    return AttentionCall(*(widen(value) for value in call))  # type: ignore[arg-type]


def _whole_storage(tensor: Tensor) -> Tensor:
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0).cpu()


class _Draw:
    """Draws one call, part by part."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, layout: str, device: str) -> None:
        self.rng, self.dtype, self.layout, self.device = rng, dtype, layout, device
        self.generator = torch.Generator().manual_seed(rng.getrandbits(40))

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype).to(self.device)

    def int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def length(self, most: int) -> int:
        """Lengths cluster where kernels break: 0, 1, page and tile boundaries."""
        return min(most, self.rng.choice((0, 1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 96, 128, self.rng.randint(0, most))))

    def call(self, head_dim: int, group: int, page_sizes: tuple[int, ...], max_queries: int, max_keys: int) -> AttentionCall:
        rng = self.rng
        batch = rng.choice((0, 1, 1, 2, 3, 4))
        kv_heads = rng.choice((1, 2, 3)) if group < 8 else 1
        heads = group * kv_heads
        v_head_dim = (
            rng.choice([d for d in (32, 64, 72, 128) if d < head_dim] or [head_dim]) if self.maybe(0.2) else head_dim
        )
        fields: dict[str, object] = dict.fromkeys(AttentionCall._fields)
        fields |= self.scores(batch, heads, head_dim)

        queries = self.query_lengths(batch, max_queries)
        appends = self.layout in ("cache", "paged") and self.maybe(0.6)
        new_tokens = rng.choice((1, 1, 2, 5, 17)) if appends else 0
        # The queries of a cached call are often the appended tokens themselves; other combinations are legal too.
        if appends and self.maybe(0.7):
            queries = [new_tokens] * batch
        fields |= self.queries(queries, heads, head_dim)
        fields |= self.keys(batch, kv_heads, head_dim, v_head_dim, new_tokens, page_sizes, max_keys)
        if appends:
            fields["k_new"] = self.normal(batch, new_tokens, kv_heads, head_dim)
            fields["v_new"] = self.normal(batch, new_tokens, kv_heads, v_head_dim)
            if self.maybe(0.5):
                fields |= self.rotary(head_dim, fields)
        return AttentionCall(**fields)  # type: ignore[arg-type]

    def scores(self, batch: int, heads: int, head_dim: int) -> dict[str, object]:
        window_left, window_right = -1, -1
        if self.maybe(0.3):
            window_left, window_right = self.rng.choice((-1, 0, 3, 40)), self.rng.choice((-1, 0, 5, 64))
        if self.maybe(0.5):
            window_right = 0
        slopes = sinks = None
        if self.maybe(0.25):
            shape = (batch, heads) if self.maybe(0.5) else (heads,)
            slopes = torch.rand(shape, generator=self.generator).to(self.device) * 0.3
        if self.maybe(0.25):
            sinks = torch.randn(heads, generator=self.generator).to(self.device)
        return dict(
            scale=1 / math.sqrt(head_dim) if self.maybe(0.8) else 0.2,
            window_left=window_left,
            window_right=window_right,
            softcap=self.rng.choice((0.0, 0.0, 0.0, 2.0, 30.0)),
            alibi_slopes=slopes,
            sinks=sinks,
            rotary_interleaved=self.maybe(0.5),
            num_splits=self.rng.choice((0, 0, 0, 1, 2, 5)),
        )

    def query_lengths(self, batch: int, most: int) -> list[int]:
        if self.layout in ("varlen", "paged varlen"):
            return [self.length(most) for _ in range(batch)]
        return [self.rng.choice((1, 1, 1, 2, 3, 8, 16, max(1, self.length(most))))] * batch

    def queries(self, lengths: list[int], heads: int, head_dim: int) -> dict[str, object]:
        """Sometimes a slice of a fused projection, sometimes transposed, as models hand them over."""
        longest = max(lengths, default=0)
        if self.layout not in ("varlen", "paged varlen"):
            batch, tokens = len(lengths), lengths[0] if lengths else 1
            if self.maybe(0.3):
                q = self.normal(batch, tokens, heads + 3, head_dim)[:, :, 1 : heads + 1]
            elif self.maybe(0.3):
                q = self.normal(batch, heads, tokens, head_dim).transpose(1, 2)
            else:
                q = self.normal(batch, tokens, heads, head_dim)
            return dict(q=q, max_seqlen_q=tokens)
        total = sum(lengths) + (self.rng.choice((1, 7)) if self.maybe(0.2) else 0)
        q = self.normal(total, heads + 1, head_dim)[:, :heads] if self.maybe(0.3) else self.normal(total, heads, head_dim)
        used = [self.rng.randint(0, n) for n in lengths] if self.maybe(0.2) else None
        return dict(
            q=q,
            cu_seqlens_q=self.offsets(lengths),
            seqused_q=None if used is None else self.int32(used),
            max_seqlen_q=longest + self.rng.choice((0, 0, 3)),
        )

    def offsets(self, lengths: list[int]) -> Tensor:
        values = [0]
        for length in lengths:
            values.append(values[-1] + length)
        return self.int32(values)

    def keys(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        new_tokens: int,
        page_sizes: tuple[int, ...],
        max_keys: int,
    ) -> dict[str, object]:
        lengths = [self.length(max_keys) for _ in range(batch)]
        fields: dict[str, object] = dict(max_seqlen_k=max(lengths, default=0) + new_tokens)
        if self.layout == "dense":
            count = lengths[0] if lengths else 8
            k, v = self.normal(batch, count, kv_heads, head_dim), self.normal(batch, count, kv_heads, v_head_dim)
            return fields | dict(k=k, v=v, max_seqlen_k=count)
        if self.layout == "varlen":
            total = sum(lengths)
            k, v = self.normal(total, kv_heads, head_dim), self.normal(total, kv_heads, v_head_dim)
            if self.maybe(0.2):
                used = [self.rng.randint(0, n) for n in lengths]
                for start, n, room in zip(self.offsets(lengths).tolist(), used, lengths):
                    k[start + n : start + room], v[start + n : start + room] = math.nan, math.nan
                fields["seqused_k"] = self.int32(used)
            return fields | dict(k=k, v=v, cu_seqlens_k=self.offsets(lengths))

        if self.layout == "cache" or self.layout == "paged":
            lengths = [-1 if self.maybe(0.15) else n for n in lengths]
        firsts = [self.rng.randint(0, max(0, n)) for n in lengths] if self.maybe(0.2) else [0] * batch
        if any(firsts):
            fields["cache_leftpad"] = self.int32(firsts)
        if self.layout == "cache":
            fields |= self.dense_cache(lengths, firsts, kv_heads, head_dim, v_head_dim, new_tokens, max_keys)
        else:
            page_size = self.rng.choice(page_sizes)
            fields |= self.pages(lengths, firsts, kv_heads, head_dim, v_head_dim, new_tokens, page_size)
        if self.layout == "paged varlen" and self.maybe(0.5):
            return fields | dict(cu_seqlens_k=self.offsets(lengths))
        fields |= dict(seqused_k=self.int32(lengths))
        if self.layout in ("cache", "paged"):
            # flash_attn_with_kvcache has no max_seqlen_k argument: the capacity is all it knows.
            keys: Tensor = fields["k"]  # type: ignore[assignment]
            table = fields.get("block_table")
            fields["max_seqlen_k"] = keys.shape[1] * (table.shape[1] if isinstance(table, Tensor) else 1)
        return fields

    def dense_cache(
        self,
        lengths: list[int],
        firsts: list[int],
        kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        new: int,
        most: int,
    ) -> dict[str, object]:
        batch = len(lengths)
        rows = list(range(batch))
        num_rows = batch
        fields: dict[str, object] = {}
        if self.maybe(0.4):
            num_rows = batch + 2
            rows = self.rng.sample(range(num_rows), batch)
            fields["cache_batch_idx"] = self.int32(rows)
        capacity = max(lengths, default=0) + new + self.rng.choice((0, 1, 30))
        k, v = self.poisoned_pair(num_rows, max(capacity, 1), kv_heads, head_dim, v_head_dim)
        for row, first, length in zip(rows, firsts, lengths):
            for cache in (k, v):
                if length > first:
                    cache[row, first:length] = self.normal(length - first, *cache.shape[2:])
        return fields | dict(k=k, v=v)

    def pages(
        self,
        lengths: list[int],
        firsts: list[int],
        kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        new: int,
        page_size: int,
    ) -> dict[str, object]:
        needed = [-(-(max(n, 0) + new) // page_size) if n >= 0 else 0 for n in lengths]
        width = max([*needed, 1]) + self.rng.choice((0, 1, 3))
        num_pages = sum(needed) + 3
        stride = 2 if head_dim == v_head_dim and self.maybe(0.5) else 1
        if stride == 2:  # as transformers: K and V interleaved in one allocation, tables in units of half a block
            base = self.poisoned(2 * num_pages, page_size, kv_heads, head_dim)
            k, v = base[:-1], base[1:]
        else:
            k, v = self.poisoned_pair(num_pages, page_size, kv_heads, head_dim, v_head_dim)
        free = self.rng.sample(range(num_pages), num_pages)
        table = []
        for first, length, count in zip(firsts, lengths, needed):
            pages = [stride * free.pop() for _ in range(count)]
            table.append(pages + [self.rng.choice((-1, 2**30, -(2**31))) for _ in range(width - count)])
            for token in range(first, length):
                for cache in (k, v):
                    cache[pages[token // page_size], token % page_size] = self.normal(*cache.shape[2:])
        table_tensor = self.int32(table) if table else torch.empty(0, width, dtype=torch.int32, device=self.device)
        return dict(k=k, v=v, block_table=table_tensor)

    def poisoned(self, *shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=self.dtype, device=self.device)

    def poisoned_pair(self, rows: int, tokens: int, heads: int, head_dim: int, v_head_dim: int) -> tuple[Tensor, Tensor]:
        """Two caches full of NaN: contiguous, head-major, or fused in one allocation along the head dim."""
        kind = self.rng.choice(("contiguous", "head-major", "fused"))
        if kind == "head-major":
            return (
                self.poisoned(rows, heads, tokens, head_dim).transpose(1, 2),
                self.poisoned(rows, heads, tokens, v_head_dim).transpose(1, 2),
            )
        if kind == "fused":
            both = self.poisoned(rows, tokens, heads, head_dim + v_head_dim)
            return both[..., :head_dim], both[..., head_dim:]
        return self.poisoned(rows, tokens, heads, head_dim), self.poisoned(rows, tokens, heads, v_head_dim)

    def rotary(self, head_dim: int, fields: dict[str, object]) -> dict[str, object]:
        keys: Tensor = fields["k"]  # type: ignore[assignment]
        table = fields.get("block_table")
        capacity = keys.shape[1] * (table.shape[1] if isinstance(table, Tensor) else 1)
        rotary_dim = self.rng.choice((head_dim, head_dim // 2 // 2 * 2, 16))
        angles = torch.rand(capacity + 40, rotary_dim // 2, generator=self.generator) * 2 * math.pi
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return dict(rotary_cos=cos.to(self.device), rotary_sin=sin.to(self.device))
