"""How work is tiled on the GPU: rows, lanes, tiles, splits. From shapes, dtypes and the core count alone.

The numbers chosen here go to the shader as definitions, so host and kernel cannot disagree.
"""

from __future__ import annotations

import math
from typing import NamedTuple

HEAD_DIMS = (32, 64, 72, 80, 96, 112, 128, 192, 256)

LANES = 32  # of a simdgroup
TILE_KEYS = 32  # keys a simdgroup of decode works on at a time: one a lane
LOAD_BYTES = 16  # the widest load of a lane
LINE_BYTES = 128  # of memory, fetched together

DECODE_MAX_QUERIES = 8  # longer sequences of queries fill the tiles of prefill
LANE_DIMS = 8  # elements of a key in one lane, where there are few rows; 32 lanes hold the largest head dim
MIN_LANE_DIMS = 2
MAX_ROWS = 16  # of a threadgroup; the rest go to a threadgroup of their own, which reads the keys again
OUTPUT_REGISTERS = 32  # of a lane for the output accumulator if narrower loads allow it; each halving doubles the shuffles
MAX_OUTPUT_REGISTERS = 64
KEY_REGISTERS = 32  # for keys unpacked and multiplied at once
LOAD_REGISTERS = 32  # for loads in flight; twice that where there are few rows
FEW_ROWS = 2
MANY_ROWS = 4  # with more, a threadgroup has eight simdgroups, not four, so that its queries serve more keys
REDUCE_BYTES = 8 * 1024  # of threadgroup memory, through which the simdgroups reduce some rows at a time

SIMDGROUPS_PER_CORE = 13  # a core has registers for
MIN_SIMDGROUPS = 512  # to have in flight even on small GPUs
SPLIT_OVERHEAD_TILES = 1.5  # what comes before and after the tiles of a split takes as long as so many of them
KEYS_PER_ROW = 48  # of a split, at least: the queries it loads and the partial output it stores stay near 3 % of its keys
MAX_SPLITS = 128

PREFILL_SIMDGROUPS = 4
THREADGROUP_BYTES = 32 * 1024


class DecodeTiling(NamedTuple):
    """Of decode. Names in capitals in decode.metal."""

    rows: int  # rows (queries x query heads of a KV head) of a threadgroup
    chunk: int  # elements of one load
    k_lanes: int  # lanes side by side that hold one key
    k_chunks: int  # chunks of one key in each of them
    v_lanes: int
    v_chunks: int
    k_steps: int  # steps whose loads are issued together
    v_steps: int
    key_block: int  # steps multiplied together
    reduce_rows: int  # rows that the simdgroups reduce together
    simdgroups: int  # of a threadgroup
    k_run: int  # steps for which the page stays the same
    v_run: int


def decode_tiling(
    sequences: int,
    total_rows: int,
    max_keys: int,
    head_dim: int,
    v_head_dim: int,
    element_bytes: int,
    page_size: int,
) -> DecodeTiling:
    """For ``sequences`` (those of each KV head counted) of ``total_rows`` packed-GQA rows each."""
    most_rows = min(MAX_ROWS, MAX_OUTPUT_REGISTERS // _lane_dims(head_dim, total_rows, element_bytes))
    row_tiles = -(-total_rows // most_rows)
    rows = -(-total_rows // row_tiles)
    dims = _lane_dims(head_dim, rows, element_bytes)
    chunk = min(dims, LOAD_BYTES // element_bytes)
    k_lanes, v_lanes = _lanes(head_dim, dims), _lanes(v_head_dim, dims)
    k_chunks, v_chunks = -(-head_dim // (k_lanes * chunk)), -(-v_head_dim // (v_lanes * chunk))
    registers = LOAD_REGISTERS * (2 if rows <= FEW_ROWS else 1)
    k_steps, v_steps = (
        min(lanes, _power_of_two(registers * 4 // (chunks * chunk * element_bytes)))
        for lanes, chunks in ((k_lanes, k_chunks), (v_lanes, v_chunks))
    )
    most_in_flight = sequences * row_tiles * _most_splits(4, rows, max_keys) * 4
    simdgroups = 8 if rows > MANY_ROWS or most_in_flight <= MIN_SIMDGROUPS else 4
    simdgroups = min(simdgroups, _power_of_two(max(1, -(-max_keys // TILE_KEYS))))
    return DecodeTiling(
        rows=rows,
        chunk=chunk,
        k_lanes=k_lanes,
        k_chunks=k_chunks,
        v_lanes=v_lanes,
        v_chunks=v_chunks,
        k_steps=k_steps,
        v_steps=v_steps,
        key_block=min(k_steps, _power_of_two(KEY_REGISTERS // (k_chunks * chunk))),
        reduce_rows=min(rows, max(1, REDUCE_BYTES // (4 * v_head_dim * simdgroups))),
        simdgroups=simdgroups,
        k_run=math.gcd(page_size, k_lanes),
        v_run=math.gcd(page_size, v_lanes),
    )


def choose_num_splits(threadgroups: int, simdgroups: int, rows: int, max_keys: int, cores: int) -> int:
    """The number of splits of the keys that takes the least time.

    ``threadgroups`` is their number without splits. The GPU runs them in waves, as many at once as its cores have registers
    for; each wave takes as long as the tiles of one simdgroup.
    """
    wave = max(MIN_SIMDGROUPS // simdgroups, SIMDGROUPS_PER_CORE // simdgroups * cores)
    if threadgroups >= wave:
        return 1

    def time(splits: int) -> float:
        return -(-threadgroups * splits // wave) * (-(-max_keys // (TILE_KEYS * simdgroups * splits)) + SPLIT_OVERHEAD_TILES)

    return min(range(1, 1 + _most_splits(simdgroups, rows, max_keys)), key=time)


def _most_splits(simdgroups: int, rows: int, max_keys: int) -> int:
    """Splits that are of use: each loads the queries and stores a float32 output for every row."""
    round_of_tiles = TILE_KEYS * simdgroups
    return max(1, min(max_keys // (round_of_tiles * -(-KEYS_PER_ROW * rows // round_of_tiles)), MAX_SPLITS))


class PrefillTiling(NamedTuple):
    """Of prefill. Names in capitals in prefill.metal."""

    chunk: int
    key_tile: int
    simdgroups: int


def prefill_tiling(head_dim: int, v_head_dim: int, element_bytes: int) -> PrefillTiling:
    """The largest tile of keys that fits threadgroup memory, 16 from head dim 128 on."""
    key_tile = 32 if head_dim < 128 else 16
    row_bytes = (head_dim + v_head_dim) * element_bytes + 2 * LOAD_BYTES
    while key_tile * row_bytes > THREADGROUP_BYTES:
        key_tile //= 2
    return PrefillTiling(LOAD_BYTES // element_bytes, key_tile, PREFILL_SIMDGROUPS)


def _lane_dims(head_dim: int, rows: int, element_bytes: int) -> int:
    """Elements of one key that a lane holds: few enough for the registers, together at least a line of memory."""
    dims = LANE_DIMS
    while _lanes(head_dim, dims) < LANES and dims > MIN_LANE_DIMS:
        loads = dims * element_bytes // LOAD_BYTES
        broken_lines = loads > 1 and _lanes(head_dim, dims) * LOAD_BYTES < LINE_BYTES
        if rows * dims <= OUTPUT_REGISTERS and not broken_lines:
            break
        dims //= 2
    return dims


def _lanes(head_dim: int, dims: int) -> int:
    """Lanes that hold one key, ``dims`` elements each: a power of two."""
    return min(LANES, 1 << (-(-head_dim // dims) - 1).bit_length())


def _power_of_two(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << (n.bit_length() - 1)
