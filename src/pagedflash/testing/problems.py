"""Random problems over all options, and paged problems of given lengths.

A random problem's caches are poisoned: slots that no sequence owns hold NaN, table entries that no sequence reads hold -1 or
garbage, K and V may be interleaved in one allocation as transformers lays them out, queries may be slices of a fused
projection.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..backends.protocol import Capabilities
from ..geometry import v_is_in_k
from ..problem import QUANTIZED, AttentionProblem
from ..validate import validate
from ..validate_values import check_values, key_lengths, new_lengths, query_lengths

HEAD_DIMS = (32, 64, 72, 80, 96, 112, 128, 192, 256)
UNUSUAL_HEAD_DIMS = (1, 26, 36, 59, 100, 111, 320, 512)
MLA_HEAD_DIMS = (576, 512)
"""Of K, and of V, which is the first part of each key."""
GROUPS = (1, 2, 3, 4, 7, 8, 16)
PAGE_SIZES = (1, 4, 16, 32, 48, 256)
LAYOUTS = ("dense", "cache", "paged", "varlen", "paged varlen")
GARBAGE = (-1, 2**30, -(2**31))
"""Table entries that no kernel may follow."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT8_UNIT = 32
"""What a 1 is in an int8 cache whose scale is near ``1 / INT8_UNIT``."""


def random_problem(
    rng: random.Random,
    *,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    head_dims: tuple[int, ...] | None = None,
    groups: tuple[int, ...] = GROUPS,
    page_sizes: tuple[int, ...] = PAGE_SIZES,
    max_queries: int = 40,
    max_keys: int = 150,
    device: str = "cpu",
    capabilities: Capabilities = Capabilities(),  # noqa: B008 (immutable)
) -> AttentionProblem:
    """Draw a valid problem. Every option is drawn independently of every other.

    Args:
        head_dims: those of K to draw from; by default any that the capabilities allow. V's is often another.
    """
    draw = _Draw(rng, dtype or rng.choice(DTYPES), layout or rng.choice(LAYOUTS), device, capabilities)
    problem = draw.problem(head_dims, rng.choice(groups), page_sizes, max_queries, max_keys)
    validate(problem, capabilities)
    if device == "cpu":
        check_values(problem)
    return problem


class PagedProblem(NamedTuple):
    """Queries of some sequences over shuffled pages: the arguments of ``flash_attn_with_kvcache``."""

    q: Tensor  # (B, Sq, Hq, D)
    k_cache: Tensor  # (num_pages, page_size, Hkv, D)
    v_cache: Tensor
    cache_seqlens: Tensor  # (B,) int32
    block_table: Tensor  # (B, max_pages) int32, -1 where a sequence has no page

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of all sequences; of the keys where values are a part of them."""
        caches = (self.k_cache,) if v_is_in_k(self.k_cache, self.v_cache) else (self.k_cache, self.v_cache)
        return sum(cache[0, 0].nbytes for cache in caches) * int(self.cache_seqlens.sum())


def paged_problem(
    lengths: list[int],
    *,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    page_size: int = 16,
    num_queries: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    mla: bool = False,
) -> PagedProblem:
    """Random queries, keys and values of the given lengths, ``heads = (Hq, Hkv)``, the pages in random order.

    Args:
        mla: the head dims are those of :data:`MLA_HEAD_DIMS`, and values a part of their keys.
    """
    q_heads, kv_heads = heads
    pages = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(pages)).split(pages)
    table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True, padding_value=-1)
    # One random page, repeated: drawing gigabytes of random numbers would take longer than measuring.
    head_dim, v_head_dim = MLA_HEAD_DIMS if mla else (head_dim, head_dim)
    page = (page_size, kv_heads, head_dim)
    caches = [torch.randn(page).to(device, dtype).repeat(sum(pages), 1, 1, 1) for _ in range(1 if mla else 2)]
    return PagedProblem(
        torch.randn(len(lengths), num_queries, q_heads, head_dim).to(device, dtype),
        caches[0],
        caches[-1][..., :v_head_dim],
        torch.tensor(lengths, dtype=torch.int32, device=device),
        table.to(device, torch.int32),
    )


class _Draw:
    """Draws one problem, part by part."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, layout: str, device: str, capabilities: Capabilities) -> None:
        self.rng, self.dtype, self.layout, self.device, self.capabilities = rng, dtype, layout, device, capabilities
        self.formats = [other for other in capabilities.cache_dtypes if other in QUANTIZED or dtype == torch.float32]
        self.has_dropout = capabilities.dropout
        self.takes_mla = capabilities.max_head_dim >= MLA_HEAD_DIMS[0]
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

    def head_dim(self, most: int) -> int:
        dims = self.rng.choice((HEAD_DIMS, HEAD_DIMS, UNUSUAL_HEAD_DIMS, range(1, most + 1)))
        multiple = self.capabilities.head_dim_multiple
        return self.rng.choice([d for d in dims if d <= most and d % multiple == 0] or [multiple])

    def head_dims(self, head_dims: tuple[int, ...] | None) -> tuple[int, int]:
        """Of K and of V."""
        most, v_most = self.capabilities.max_head_dim, self.capabilities.max_v_head_dim
        if head_dims is None and self.takes_mla and self.layout not in ("dense", "varlen") and self.maybe(0.05):
            return MLA_HEAD_DIMS
        k = self.head_dim(min(most, 512)) if head_dims is None else self.rng.choice(head_dims)
        return k, self.head_dim(min(v_most, 512)) if self.maybe(0.3) else min(k, v_most)

    def problem(
        self,
        head_dims: tuple[int, ...] | None,
        group: int,
        page_sizes: tuple[int, ...],
        max_queries: int,
        max_keys: int,
    ) -> AttentionProblem:
        rng = self.rng
        batch = rng.choice((0, 1, 1, 2, 3, 4))
        head_dim, v_head_dim = self.head_dims(head_dims)
        kv_heads = rng.choice((1, 2, 3)) if group < 8 else 1
        heads = group * kv_heads
        fields = self.scores(batch, heads, head_dim)

        queries = self.query_lengths(batch, max_queries)
        appends = self.layout in ("cache", "paged", "paged varlen") and self.maybe(0.6)
        packed = self.layout == "paged varlen"  # then the new tokens are those of the queries
        new_tokens = rng.choice((1, 1, 2, 5, 17)) if appends and not packed else 0
        # The queries of a cached problem are often the appended tokens themselves; other combinations are legal too.
        if appends and not packed and self.maybe(0.7):
            queries = [new_tokens] * batch
        fields |= self.queries(queries, heads, head_dim)
        by_offsets = packed and not appends and self.maybe(0.5)
        new_lengths = queries if packed and appends else [new_tokens] * batch
        fields |= self.keys(batch, kv_heads, head_dim, v_head_dim, new_lengths, by_offsets, page_sizes, max_keys)
        if appends and packed:
            total = cast(Tensor, fields["q"]).shape[0]
            fields["k_new"] = self.normal(total, kv_heads, head_dim)
            fields["v_new"] = self.normal(total, kv_heads, v_head_dim)
            fields["cu_seqlens_new"] = fields["cu_seqlens_q"]
        elif appends:
            fields["k_new"] = self.normal(batch, new_tokens, kv_heads, head_dim)
            fields["v_new"] = self.normal(batch, new_tokens, kv_heads, v_head_dim)
        if appends and v_is_in_k(cast(Tensor, fields["k"]), cast(Tensor, fields["v"])):
            fields["v_new"] = cast(Tensor, fields["k_new"])[..., :v_head_dim]
        elif appends and not packed and self.maybe(0.5) and head_dim > 1:
            fields |= self.rotary(head_dim, fields)
        if self.formats and self.layout not in ("dense", "varlen") and self.maybe(0.5):
            fields |= self.in_formats(fields, batch)
        problem = AttentionProblem.of_fields(**fields)
        if problem.cache.block_table is not None and self.maybe(0.5):
            self.free_left_of_window(problem, problem.cache.block_table)
        return problem

    def free_left_of_window(self, problem: AttentionProblem, table: Tensor) -> None:
        """As engines do: entries of pages that a sliding window has left are no pages any more."""
        window_left = problem.scores.window_left
        if window_left < 0:
            return
        lengths = zip(key_lengths(problem), new_lengths(problem), query_lengths(problem))
        for b, (keys, new, queries) in enumerate(lengths):
            first = keys + new - queries - window_left
            # What is appended is written, seen or not.
            table[b, : max(0, min(first, keys)) // problem.page_size] = self.rng.choice(GARBAGE)

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
        seed, dropout_p = None, 0.0
        if self.has_dropout and self.maybe(0.25):
            dropout_p = self.rng.choice((0.1, 0.3, 0.5))
            seed = torch.tensor(self.rng.getrandbits(63), device=self.device)
        return dict(
            scale=1 / math.sqrt(head_dim) if self.maybe(0.8) else 0.2,
            window_left=window_left,
            window_right=window_right,
            softcap=self.rng.choice((0.0, 0.0, 0.0, 2.0, 30.0)),
            alibi_slopes=slopes,
            sinks=sinks,
            dropout_seed=seed,
            dropout_p=dropout_p,
            rotary_interleaved=self.maybe(0.5),
            num_splits=self.rng.choice((0, 0, 0, 1, 2, 5)),
        )

    def query_lengths(self, batch: int, most: int) -> list[int]:
        if self.layout in ("varlen", "paged varlen"):
            if batch and self.maybe(
                0.3
            ):  # as a server sends them: a chunk of one prompt, and a token of each other sequence
                lengths = [1] * batch
                lengths[self.rng.randrange(batch)] = most
                return lengths
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
        new_lengths: list[int],
        by_offsets: bool,
        page_sizes: tuple[int, ...],
        max_keys: int,
    ) -> dict[str, object]:
        lengths = [self.length(max_keys) for _ in range(batch)]
        most_new = max(new_lengths, default=0)
        fields: dict[str, object] = dict(max_seqlen_k=max(lengths, default=0) + most_new)
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

        if not by_offsets:
            lengths = [-1 if self.maybe(0.15) else n for n in lengths]
        firsts = [self.rng.randint(0, max(0, n)) for n in lengths] if self.maybe(0.2) else [0] * batch
        if any(firsts):
            fields["cache_leftpad"] = self.int32(firsts)
        if self.layout == "cache":
            fields |= self.dense_cache(lengths, firsts, kv_heads, head_dim, v_head_dim, most_new, max_keys)
        else:
            page_size = self.rng.choice(page_sizes)
            fields |= self.pages(lengths, firsts, kv_heads, head_dim, v_head_dim, new_lengths, page_size)
        if by_offsets:
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
            for cache in (v, k):
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
        new_lengths: list[int],
        page_size: int,
    ) -> dict[str, object]:
        needed = [-(-(n + new) // page_size) if n >= 0 else 0 for n, new in zip(lengths, new_lengths)]
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
            table.append(pages + [self.rng.choice(GARBAGE) for _ in range(width - count)])
            for token in range(first, length):
                for cache in (v, k):
                    cache[pages[token // page_size], token % page_size] = self.normal(*cache.shape[2:])
        table_tensor = self.int32(table) if table else torch.empty(0, width, dtype=torch.int32, device=self.device)
        return dict(k=k, v=v, block_table=table_tensor)

    def poisoned(self, *shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=self.dtype, device=self.device)

    def poisoned_pair(self, rows: int, tokens: int, heads: int, head_dim: int, v_head_dim: int) -> tuple[Tensor, Tensor]:
        """Two caches full of NaN: contiguous, head-major, fused in one allocation along the head dim, or, as in MLA, V the
        first part of K."""
        kind = self.rng.choice(("contiguous", "head-major", "fused", "shared"))
        if (head_dim, v_head_dim) == MLA_HEAD_DIMS or (kind == "shared" and self.takes_mla and v_head_dim <= head_dim):
            k = self.poisoned(rows, tokens, heads, head_dim)
            return k, k[..., :v_head_dim]
        if kind == "head-major":
            return (
                self.poisoned(rows, heads, tokens, head_dim).transpose(1, 2),
                self.poisoned(rows, heads, tokens, v_head_dim).transpose(1, 2),
            )
        if kind == "fused":
            both = self.poisoned(rows, tokens, heads, head_dim + v_head_dim)
            return both[..., :head_dim], both[..., head_dim:]
        return self.poisoned(rows, tokens, heads, head_dim), self.poisoned(rows, tokens, heads, v_head_dim)

    def in_formats(self, fields: dict[str, object], batch: int) -> dict[str, object]:
        """The cache in formats of their own. K and V of one allocation share theirs."""
        k, v = cast(Tensor, fields["k"]), cast(Tensor, fields["v"])
        formats = [self.rng.choice([*self.formats, self.dtype]) for _ in "kv"]
        if k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr():
            formats[1] = formats[0]
        storages: dict[int, Tensor] = {}
        changed: dict[str, object] = {}
        for name, keys, dtype in zip("kv", (k, v), formats):
            storage = keys.untyped_storage()
            if storage._cdata not in storages:
                whole = keys.as_strided((storage.nbytes() // keys.element_size(),), (1,), 0)
                storages[storage._cdata] = self.codes(whole, dtype)
            whole = storages[storage._cdata]
            changed[name] = whole.as_strided(keys.shape, keys.stride(), keys.storage_offset())
            changed[f"{name}_descale"] = self.descale(keys, dtype, batch)
        if v_is_in_k(k, v):  # what is written as the one is read as the other
            changed["v_descale"] = changed["k_descale"]
        return changed

    def codes(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers of unit size in a format, spread over its values. The NaN of a poisoned slot is -128 in int8."""
        if dtype != torch.int8:
            return numbers.to(dtype)
        return (numbers.float() * INT8_UNIT).round().clamp(-127, 127).nan_to_num(nan=-128).to(dtype)

    def descale(self, keys: Tensor, dtype: torch.dtype, batch: int) -> Tensor | None:
        """Scales of any shape. Those of poisoned slots are NaN."""
        if dtype not in QUANTIZED:
            return None
        heads = keys.shape[-2]
        shape = self.rng.choice(((), (heads,), (batch, heads), keys.shape[:-1], keys.shape[:-1]))
        scales = 0.5 + torch.rand(shape, generator=self.generator).to(self.device)
        if dtype == torch.int8:
            scales /= INT8_UNIT
        if len(shape) == 3:
            scales[keys.isnan().all(-1)] = math.nan
            if self.maybe(0.5):  # any strides
                scales = scales.transpose(1, 2).contiguous().transpose(1, 2)
        return scales

    def rotary(self, head_dim: int, fields: dict[str, object]) -> dict[str, object]:
        keys: Tensor = fields["k"]  # type: ignore[assignment]
        table = fields.get("block_table")
        capacity = keys.shape[1] * (table.shape[1] if isinstance(table, Tensor) else 1)
        dims = (head_dim // 2 * 2, head_dim // 2 // 2 * 2, 16)
        rotary_dim = self.rng.choice([d for d in dims if 2 <= d <= head_dim])
        num_queries = cast(Tensor, fields["q"]).shape[1]  # each has a position, and they may be more than the new tokens
        angles = torch.rand(capacity + num_queries, rotary_dim // 2, generator=self.generator) * 2 * math.pi
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return dict(rotary_cos=cos.to(self.device), rotary_sin=sin.to(self.device))
