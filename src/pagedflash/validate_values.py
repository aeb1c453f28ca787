"""Validation of lengths, offsets and table entries. It reads them, so a device has to be waited for.

On a CPU it runs for every call, on other devices under ``PAGEDFLASH_CHECK=1``, always before anything is written. Only
entries that a call reads or writes are looked at: engines leave -1 in the others.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .errors import reject
from .geometry import queries_rotate_by_position
from .problem import AttentionProblem, CacheWrite, Tensors


def check_values(problem: AttentionProblem) -> None:
    """Raise InvalidValue for a problem that :func:`~pagedflash.validate.validate` accepts if its values are wrong."""
    _, cu_seqlens_q, seqused_q, max_seqlen_q = problem.queries
    cache, batch = problem.cache, problem.batch_size
    if cu_seqlens_q is not None:
        longest = _check_offsets("cu_seqlens_q", cu_seqlens_q, problem.queries.q.shape[0])
        _check_used("seqused_q", seqused_q, cu_seqlens_q, least=0)
        if longest > max_seqlen_q:
            expected = "at least {longest}, the longest sequence in {cu_seqlens_q}"
            reject("max_seqlen_q", "{length}", expected, length=max_seqlen_q, longest=longest)
    if cache.cu_seqlens_k is not None:
        packed = cache.block_table is None
        _check_offsets("cu_seqlens_k", cache.cu_seqlens_k, cache.k.shape[0] if packed else None)
        if packed:
            _check_used("seqused_k", cache.seqused_k, cache.cu_seqlens_k, least=-1)
    if cache.cache_batch_idx is not None:
        _check_rows(cache.cache_batch_idx.tolist(), cache.k.shape[0], distinct=problem.num_new_tokens > 0)

    new_tokens = _checked_new_lengths(problem)
    lengths = key_lengths(problem)
    if cache.cu_seqlens_k is None or cache.block_table is not None:
        _check_fit("cu_seqlens_k" if cache.seqused_k is None else "seqused_k", lengths, new_tokens, problem.capacity)
    firsts = [0] * batch if cache.cache_leftpad is None else cache.cache_leftpad.tolist()
    ends = [length + new for length, new in zip(lengths, new_tokens)]
    for first, length, end in zip(firsts, lengths, ends):
        if length >= 0 and not 0 <= first <= end:
            came = "{first} for a sequence of {keys} tokens"
            reject("cache_leftpad", came, "0 to its length", first=first, keys=end)
    append = problem.append
    if append is not None and append.rotary_cos is not None:
        by_position = queries_rotate_by_position(problem)
        _check_positions(append.rotary_cos.shape[0], lengths, query_lengths(problem), by_position)
    if cache.block_table is not None:
        reads = _first_reads(problem, firsts, ends)
        begins = [min(read, length) if length < end else read for read, length, end in zip(reads, lengths, ends)]
        _check_table(cache.block_table, begins, lengths, ends, cache.k)


def check_write_values(write: CacheWrite) -> None:
    """:func:`check_values` for a write of its own."""
    cache, slot_mapping = write.cache, write.append.slot_mapping
    if slot_mapping is not None:
        _check_slots(slot_mapping.tolist(), cache.k)
        return
    assert cache.seqused_k is not None
    lengths, new_tokens = cache.seqused_k.tolist(), _checked_new_lengths(write)
    _check_fit("seqused_k", lengths, new_tokens, write.capacity)
    if cache.block_table is not None:
        ends = [length + new for length, new in zip(lengths, new_tokens)]
        _check_table(cache.block_table, lengths, lengths, ends, cache.k)


def check_new_tokens(tensors: Tensors) -> None:
    """A NaN has no int8 to be stored as. Takes the tensors of a write, valid but for this."""
    fields = dict(zip((name for name, _ in CacheWrite.TENSOR_FIELDS), tensors))
    offsets, where = fields["cu_seqlens_new"], fields["slot_mapping"]
    if where is None:
        where = fields["seqused_k"]
        assert where is not None
        if offsets is not None:
            where = where.repeat_interleave(offsets.diff())
    for field, cache in (("k_new", fields["k"]), ("v_new", fields["v"])):
        new = fields[field]
        assert new is not None and cache is not None
        if cache.dtype == torch.int8 and new[: len(where)][where >= 0].isnan().any():
            reject(field, "holding NaN", "numbers: an int8 cache has no NaN")


def new_lengths(problem: AttentionProblem | CacheWrite) -> list[int]:
    """New tokens of each sequence, on the host."""
    offsets = None if problem.append is None else problem.append.cu_seqlens_new
    return [problem.num_new_tokens] * problem.batch_size if offsets is None else offsets.diff().tolist()


def key_lengths(problem: AttentionProblem) -> list[int]:
    """Keys of each sequence before the append, on the host; -1 marks a sequence to skip."""
    cache = problem.cache
    if cache.seqused_k is not None:
        return cache.seqused_k.tolist()
    if cache.cu_seqlens_k is not None:
        return cache.cu_seqlens_k.diff().tolist()
    return [problem.capacity] * problem.batch_size


def query_lengths(problem: AttentionProblem) -> list[int]:
    """Queries of each sequence, on the host."""
    q, cu_seqlens_q, seqused_q, _ = problem.queries
    if seqused_q is not None:
        return seqused_q.tolist()
    return [q.shape[1]] * q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.diff().tolist()


def _first_reads(problem: AttentionProblem, firsts: list[int], ends: list[int]) -> list[int]:
    """First slot that each sequence of ``ends`` keys reads: the first query's first, or none without queries."""
    left = problem.scores.window_left
    return [
        end if queries == 0 else first if left < 0 else max(first, end - queries - left)
        for first, end, queries in zip(firsts, ends, query_lengths(problem))
    ]


def _check_offsets(field: str, offsets: Tensor, total: int | None) -> int:
    """Offsets start at 0, never fall, and end within ``total``. Returns the longest sequence."""
    values = offsets.tolist()
    if values[0] != 0:
        reject(field, "starting with {first}", "0 first", first=values[0])
    longest = 0
    for start, end in pairwise(values):
        if end < start:
            reject(field, "falling from {start} to {end}", "offsets that never fall", start=start, end=end)
        longest = max(longest, end - start)
    if total is not None and values[-1] > total:
        reject(field, "ending with {last}", "at most {total}, the tokens there are", last=values[-1], total=total)
    return longest


def _checked_new_lengths(problem: AttentionProblem | CacheWrite) -> list[int]:
    append = problem.append
    if append is not None and append.cu_seqlens_new is not None:
        _check_offsets("cu_seqlens_new", append.cu_seqlens_new, append.k_new.shape[0])
    return new_lengths(problem)


def _check_positions(rows: int, lengths: list[int], queries: list[int], by_position: bool) -> None:
    """The tables of the rotary embedding have a row for each query; there may be more of them than new tokens, or none."""
    for length, count in zip(lengths, queries):
        last = length + count - 1 if by_position else length
        if length >= 0 and count > 0 and last >= rows:
            came = "of {rows} positions, with a query at position {position}"
            reject("rotary_cos", came, "a row for the position of each query", rows=rows, position=last)


def _check_used(field: str, used: Tensor | None, offsets: Tensor, least: int) -> None:
    """Used lengths lie within what the offsets give each sequence; -1 (skip) only for keys."""
    if used is None:
        return
    for count, room in zip(used.tolist(), offsets.diff().tolist()):
        if not least <= count <= room:
            came = "{count} for a sequence of {room} tokens"
            reject(field, came, "{least} to {room}", count=count, room=room, least=least)


def _check_rows(rows: list[int], count: int, distinct: bool) -> None:
    for row in rows:
        if not 0 <= row < count:
            reject("cache_batch_idx", "{row} somewhere", "rows of the cache, 0 to {last}", row=row, last=count - 1)
    if distinct and len(set(rows)) < len(rows):
        reject("cache_batch_idx", "{rows}", "a different row for each sequence that appends", rows=rows)


def _check_slots(slots: list[int], pages: Tensor) -> None:
    """Each names a slot of its own, or is -1."""
    count = pages.shape[0] * pages.shape[1]
    written: set[int] = set()
    for slot in slots:
        if not -1 <= slot < count:
            reject("slot_mapping", "{slot} somewhere", "a slot, 0 to {last}, or -1", slot=slot, last=count - 1)
        if slot in written:
            reject("slot_mapping", "{slot} for two tokens", "a slot for each", slot=slot)
        if slot >= 0:
            written.add(slot)


def _check_fit(field: str, lengths: list[int], new_tokens: list[int], capacity: int) -> None:
    for length, new in zip(lengths, new_tokens):
        if length < -1:
            reject(field, "{length} somewhere", "at least 0, or -1 to skip a sequence", length=length)
        if length >= 0 and length + new > capacity:
            came = "{length} somewhere" + (" and {more} to append" if new else "")
            expected = "at most {capacity} in all, what the cache or table holds"
            reject(field, came, expected, length=length, more=new, capacity=capacity)


def _check_table(table: Tensor, begins: list[int], lengths: list[int], ends: list[int], pages: Tensor) -> None:
    """Entries of slots from ``begin`` to ``end`` must be pages; no two tokens from ``length`` on may share a slot."""
    num_pages, page_size = pages.shape[:2]
    rows = table.tolist()
    written: set[tuple[int, int]] = set()
    for b, (begin, length, end) in enumerate(zip(begins, lengths, ends)):
        if length < 0:
            continue
        for column in range(begin // page_size, -(-end // page_size) if begin < end else 0):
            entry = rows[b][column]
            if not 0 <= entry < num_pages:
                where = "{entry} at [{b}, {column}]"
                reject("block_table", where, "a page, 0 to {last}", entry=entry, b=b, column=column, last=num_pages - 1)
        for token in range(length, end):
            page, slot = rows[b][token // page_size], token % page_size
            if (page, slot) in written:
                came = "sending two new tokens to slot {slot} of page {page}"
                reject("block_table", came, "a slot for each", slot=slot, page=page)
            written.add((page, slot))
