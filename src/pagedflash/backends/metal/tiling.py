"""How work is tiled on the GPU: rows, tiles of keys, loads, splits. From shapes, dtypes and the core count alone.

The numbers chosen here go to the shader as definitions, so host and kernel cannot disagree.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from .tuning import Tuning

LANES = 32  # of a simdgroup
MATRIX = 8  # rows and columns of a simdgroup matrix
LOAD_BYTES = 16  # the widest load of a lane
PSEUDO_PAGE = 32  # tokens of a page where keys are not paged: they are then pages that follow each other

DECODE_MAX_QUERIES = 8  # longer sequences of queries fill the tiles of prefill
MIXED_DECODE_QUERIES = 1  # of a sequence in a mixed batch that are decode's; more are prefill's
LANE_DIMS = 8  # of a key in one lane, up to head dim 256; more of larger ones
FEW_ROWS = 2  # whose output leaves registers for twice the loads
KEY_REGISTERS = 32  # of a lane, for keys that are unpacked and multiplied together
OUTPUT_REGISTERS = 64  # of a lane, at most, for the output accumulator of decode
MAX_HEAD_DIM_OF_16_ROWS = 256  # so many queries, of 4 bytes, fit threadgroup memory
MAX_KEY_BLOCKS = 4  # matrices of keys in a tile of decode
REDUCE_BYTES = 8 * 1024  # of threadgroup memory, through which the simdgroups reduce some rows at a time

TEAMS = 2  # times as many simdgroups a threadgroup as usual, at most
MIN_SIMDGROUPS = 512  # to have in flight even on small GPUs
SPLIT_OVERHEAD_KEYS = 128  # what comes before and after the tiles of a split takes as long as so many keys
MIN_KEYS = 32  # of each simdgroup of a split
SPLIT_BYTES = 0.049  # of a split's keys and values, at most, for the queries it loads and the output that combine loads
MAX_SPLITS = 128
LENGTH_BYTES = 32  # of a split: its length, once for each simdgroup
PAGE_BYTES = 0.5  # of a key: an entry of the table for every eighth
TILE_BYTES = 8 * 1024  # of keys and values, at least, that are worth a simdgroup which looks up their length and page

THREADGROUP_BYTES = 32 * 1024
MAX_DIM_SPLIT = 4

BACKWARD_REGISTERS = 80  # of a lane, at most, for keys, values and the accumulators of their gradients
BACKWARD_SIMDGROUPS_PER_CORE = 16  # to plan backward for
MAX_BACKWARD_DIM_SPLIT = 8
MAX_BACKWARD_SPLITS = 4  # each holds the gradients of all queries in float32


class LaneTiling(NamedTuple):
    """Of decode with few rows. Names in capitals in decode.metal and decode_lanes.metal."""

    rows: int  # queries x query heads of a KV head of a threadgroup
    reduce_rows: int  # that the simdgroups reduce together
    simdgroups: int  # of a threadgroup, at most
    chunk: int  # elements of one load
    k_lanes: int  # lanes side by side that hold one key
    k_chunks: int  # loads of one key by each of them
    k_steps: int  # steps whose loads are issued together
    key_block: int  # of them, those multiplied together
    k_run: int  # steps for which the page stays the same
    v_lanes: int
    v_chunks: int
    v_steps: int
    v_run: int
    matrices: int = 0

    @property
    def tile_keys(self) -> int:
        """At most."""
        return LANES

    @property
    def least_keys(self) -> int:
        """Of a tile, and of a simdgroup: those of the steps that are loaded together."""
        return max(LANES * self.k_steps // self.k_lanes, LANES * self.v_steps // self.v_lanes)


class MatrixTiling(NamedTuple):
    """Of decode with many rows. Names in capitals in decode.metal and decode_matrix.metal."""

    row_blocks: int  # matrices of 8 rows of a threadgroup
    key_blocks: int  # matrices of 8 keys of a tile
    chunk: int  # elements of one load
    load_chunks: int  # loads of a key in flight together
    k_tail: int  # of the loads behind the last whole 8 * chunk dims, 0 = none
    v_tail: int
    reduce_rows: int
    simdgroups: int  # at most
    page_run: int  # keys of a tile for which the page stays the same
    matrices: int = 1

    @property
    def rows(self) -> int:
        return MATRIX * self.row_blocks

    @property
    def tile_keys(self) -> int:
        return MATRIX * self.key_blocks

    @property
    def least_keys(self) -> int:
        """Of a simdgroup: those whose pages are looked up together."""
        return LANES


DecodeTiling = LaneTiling | MatrixTiling


def decode_tiling(
    total_rows: int, group: int, head_dim: int, v_head_dim: int, element_bytes: int, page_size: int, tuning: Tuning
) -> DecodeTiling:
    """For ``total_rows`` packed-GQA rows of each sequence and KV head, ``group`` of them for each query.

    Single queries of few heads a KV head multiply over lanes, which costs nothing for rows that are not there. All others
    meet the keys as matrices, 8 rows for the price of one, with one kernel for any number of queries.
    """
    if total_rows <= group <= tuning.lane_rows:
        return _lane_tiling(group, head_dim, v_head_dim, element_bytes, page_size, tuning)
    return _matrix_tiling(total_rows, head_dim, v_head_dim, element_bytes, page_size, tuning)


def _lane_tiling(
    rows: int, head_dim: int, v_head_dim: int, element_bytes: int, page_size: int, tuning: Tuning
) -> LaneTiling:
    chunk = math.gcd(head_dim, v_head_dim, min(LANE_DIMS, LOAD_BYTES // element_bytes))
    k_lanes, v_lanes = _lanes(head_dim), _lanes(v_head_dim)
    k_chunks, v_chunks = -(-head_dim // (k_lanes * chunk)), -(-v_head_dim // (v_lanes * chunk))
    unpacked_wide = element_bytes == 4 and max(head_dim, v_head_dim) > 128  # floats are multiplied as they are loaded
    registers = tuning.load_registers * (2 if rows <= FEW_ROWS or unpacked_wide else 1)
    k_steps, v_steps = (
        min(lanes, _power_of_two(max(1, registers // (chunks * max(1, chunk * element_bytes // 4)))))
        for lanes, chunks in ((k_lanes, k_chunks), (v_lanes, v_chunks))
    )
    return LaneTiling(
        rows=rows,
        reduce_rows=_reduce_rows(rows, v_head_dim, tuning),
        simdgroups=TEAMS * tuning.decode_simdgroups,
        chunk=chunk,
        k_lanes=k_lanes,
        k_chunks=k_chunks,
        k_steps=k_steps,
        key_block=min(k_steps, _power_of_two(max(1, KEY_REGISTERS // (k_chunks * chunk)))),
        k_run=math.gcd(page_size, k_lanes),
        v_lanes=v_lanes,
        v_chunks=v_chunks,
        v_steps=v_steps,
        v_run=math.gcd(page_size, v_lanes),
    )


def _matrix_tiling(
    total_rows: int, head_dim: int, v_head_dim: int, element_bytes: int, page_size: int, tuning: Tuning
) -> MatrixTiling:
    chunk = LOAD_BYTES // element_bytes
    if element_bytes == 1 and head_dim < MATRIX * chunk:
        chunk //= 2
    k_tail, v_tail = _tail(head_dim, chunk), _tail(v_head_dim, chunk)
    v_matrices = v_head_dim // (MATRIX * chunk) * chunk + v_tail
    rows = min(total_rows, tuning.decode_rows)
    fits = 2 * 2 * v_matrices <= OUTPUT_REGISTERS and head_dim <= MAX_HEAD_DIM_OF_16_ROWS
    row_blocks = 2 if rows > MATRIX and fits else 1
    registers = max(4, tuning.load_registers // (2 * row_blocks))  # for each key of a lane, which has two of each matrix
    chunks = -(-head_dim // (MATRIX * chunk))
    load_chunks = min(chunks, registers * 4 // LOAD_BYTES)
    key_blocks = min(MAX_KEY_BLOCKS, _power_of_two(max(1, registers * 4 // (chunks * LOAD_BYTES))))
    return MatrixTiling(
        row_blocks=row_blocks,
        key_blocks=key_blocks,
        chunk=chunk,
        load_chunks=load_chunks,
        k_tail=k_tail,
        v_tail=v_tail,
        reduce_rows=_reduce_rows(MATRIX * row_blocks, v_head_dim, tuning),
        simdgroups=TEAMS * tuning.decode_simdgroups,
        page_run=math.gcd(page_size, MATRIX * key_blocks),
    )


def least_split_keys(rows: int, row_bytes: int, key_bytes: int) -> int:
    """Keys of a split that are worth its ``rows``: each row costs ``row_bytes``, each key with its value ``key_bytes``."""
    return math.ceil((rows * row_bytes + LENGTH_BYTES) / (SPLIT_BYTES * key_bytes - PAGE_BYTES))


def choose_num_splits(threadgroups: int, tiling: DecodeTiling, split_keys: int, max_keys: int, slots: int) -> int:
    """The number of splits of the keys that takes the least time.

    Without splits there are ``threadgroups``; a split has at least ``split_keys``. ``slots`` simdgroups are planned for at
    once: the GPU runs threadgroups in waves, and each wave takes as long as the tiles of one simdgroup.
    """
    simdgroups = tiling.simdgroups // TEAMS
    wave = max(MIN_SIMDGROUPS, slots) // simdgroups
    if threadgroups >= wave:
        return 1
    round_of_tiles = tiling.tile_keys * simdgroups

    def time(splits: int) -> float:
        keys = -(-max_keys // (round_of_tiles * splits)) * tiling.tile_keys
        return -(-threadgroups * splits // wave) * (keys + SPLIT_OVERHEAD_KEYS)

    least_keys = round_of_tiles * -(-max(split_keys, MIN_KEYS * simdgroups) // round_of_tiles)
    most = max(1, min(max_keys // least_keys, MAX_SPLITS))
    return min(range(1, 1 + most), key=time)


class Team(NamedTuple):
    """The simdgroups of a threadgroup, and the keys of their tiles."""

    simdgroups: int
    tile_keys: int


def choose_team(
    threadgroups: int, tiling: DecodeTiling, split_keys: int, key_bytes: int, slots: int, tuning: Tuning
) -> Team:
    """For ``threadgroups`` with up to ``split_keys`` keys each, of ``key_bytes`` with their values.

    Where few simdgroups have few keys, their time is that of one load after another: there are twice as many if the GPU has
    room, and tiles have only as many keys as are left for each.
    """
    simdgroups, tile_keys = tuning.decode_simdgroups, tiling.tile_keys
    least_keys = max(tiling.least_keys, min(tile_keys, TILE_BYTES // key_bytes))
    has_room = TEAMS * simdgroups * threadgroups <= max(MIN_SIMDGROUPS, slots)
    if has_room and split_keys > simdgroups * least_keys:
        simdgroups *= TEAMS
    while tile_keys // 2 >= least_keys and simdgroups * tile_keys // 2 >= split_keys:
        tile_keys //= 2
    return Team(simdgroups, tile_keys)


class PrefillTiling(NamedTuple):
    """Of prefill. Names in capitals in prefill.metal."""

    chunk: int  # elements of one load
    k_chunks: int  # reads of a key by one lane
    k_tail: int
    v_matrices: int  # along the dims of V that a simdgroup has
    dim_split: int  # simdgroups that share rows, each with its part of the dims
    shares_tile: int  # whether values take the threadgroup memory of their keys, once these are multiplied
    key_tile: int
    simdgroups: int

    @property
    def rows(self) -> int:
        return MATRIX * self.simdgroups // self.dim_split


def prefill_tiling(head_dim: int, v_head_dim: int, element_bytes: int, tuning: Tuning) -> PrefillTiling:
    chunk = LOAD_BYTES // element_bytes
    k_chunks, k_tail = head_dim // (MATRIX * chunk), _tail(head_dim, chunk)
    v_matrices = -(-v_head_dim // MATRIX)
    dim_split = 1
    while dim_split < MAX_DIM_SPLIT and (
        (k_chunks * chunk + k_tail) * element_bytes // 2 + v_matrices * 2 > tuning.prefill_registers
    ):
        dim_split *= 2
        k_chunks, k_tail = -(-head_dim // (dim_split * MATRIX * chunk)), 0
        v_matrices = -(-v_head_dim // (dim_split * MATRIX * chunk // 2)) * chunk // 2  # whole reads
    k_row, v_row = (
        dim_split * MATRIX * matrices * element_bytes + LOAD_BYTES for matrices in (k_chunks * chunk + k_tail, v_matrices)
    )
    simdgroups = dim_split * tuning.prefill_simdgroups
    scores = simdgroups * LANES if dim_split > 1 else 0  # bytes a key
    shares_tile = MATRIX * (k_row + v_row + scores) > THREADGROUP_BYTES
    row_bytes = (max(k_row, v_row) if shares_tile else k_row + v_row) + scores
    key_tile = _power_of_two(tuning.prefill_keys if head_dim < 128 else max(1, tuning.prefill_keys // 2))
    key_tile = max(MATRIX, min(LANES, key_tile))  # a lane looks up the page of one key
    while key_tile > MATRIX and key_tile * row_bytes > THREADGROUP_BYTES:
        key_tile //= 2
    return PrefillTiling(chunk, k_chunks, k_tail, v_matrices, dim_split, int(shares_tile), key_tile, simdgroups)


class BackwardTiling(NamedTuple):
    """Of backward. Names in capitals in backward.metal."""

    chunk: int  # elements of one load
    k_chunks: int  # reads of a key by one lane
    k_tail: int
    v_chunks: int
    v_tail: int
    dim_split: int  # simdgroups that share keys, each with its part of the dims
    query_tile: int
    simdgroups: int

    @property
    def key_tile(self) -> int:
        return MATRIX * self.simdgroups // self.dim_split

    @property
    def threadgroup_bytes(self) -> int:
        k_row, v_row = (
            LOAD_BYTES * (self.dim_split * MATRIX * (chunks * self.chunk + tail) // self.chunk + 1)
            for chunks, tail in ((self.k_chunks, self.k_tail), (self.v_chunks, self.v_tail))
        )
        score_row = LOAD_BYTES * (self.key_tile // self.chunk + 1)
        score_parts = 2 * self.simdgroups * self.query_tile // MATRIX * LANES * 8 if self.dim_split > 1 else 0
        return self.query_tile * (k_row + v_row + score_row + 24) + self.key_tile * max(k_row, v_row) + score_parts


@lru_cache(maxsize=256)
def backward_tiling(head_dim: int, v_head_dim: int, element_bytes: int, tuning: Tuning) -> BackwardTiling | None:
    """As many keys as there is room for, which is how seldom gradients of queries are loaded and stored; then rows.

    None where threadgroup memory is too small for 8 of each.
    """
    chunk = LOAD_BYTES // element_bytes

    def part(dims: int, dim_split: int) -> tuple[int, int]:
        dims = -(-dims // (dim_split * MATRIX)) * MATRIX
        return dims // (MATRIX * chunk), _tail(dims, chunk)

    def registers(dim_split: int) -> int:
        matrices = sum(chunks * chunk + tail for chunks, tail in (part(head_dim, dim_split), part(v_head_dim, dim_split)))
        return matrices * (element_bytes // 2 + 2)

    splits = (1, 2, 4, MAX_BACKWARD_DIM_SPLIT)
    dim_split = next(split for split in splits if split == splits[-1] or registers(split) <= BACKWARD_REGISTERS)
    parts = (*part(head_dim, dim_split), *part(v_head_dim, dim_split))
    simdgroups = min(8, tuning.prefill_simdgroups * dim_split)
    tilings = (
        BackwardTiling(chunk, *parts, dim_split, query_tile, number)
        for number in (simdgroups, max(4, dim_split))
        for query_tile in (32, 16, 8)
        if number * MATRIX >= query_tile
    )
    return next((tiling for tiling in tilings if tiling.threadgroup_bytes <= THREADGROUP_BYTES), None)


def choose_backward_parts(threadgroups: int, group: int, key_tiles: int, slots: int) -> tuple[int, int]:
    """Parts of the query heads of a KV head, and splits of its keys, so that there are ``slots`` threadgroups, or about.

    Without either there are ``threadgroups``. Gradients of keys are held once for each part, those of queries once for each
    split.
    """
    parts = next(n for n in range(1, group + 1) if group % n == 0 and (n == group or threadgroups * n >= slots))
    return parts, max(1, min(-(-slots // (threadgroups * parts)), key_tiles, MAX_BACKWARD_SPLITS))


def _reduce_rows(rows: int, v_head_dim: int, tuning: Tuning) -> int:
    return min(rows, max(1, REDUCE_BYTES // (4 * v_head_dim * TEAMS * tuning.decode_simdgroups)))


def _lanes(head_dim: int) -> int:
    """Lanes that hold one key: a power of two."""
    return min(LANES, 1 << (-(-head_dim // LANE_DIMS) - 1).bit_length())


def _tail(head_dim: int, chunk: int) -> int:
    """Elements a load for the dims behind the last whole ``MATRIX * chunk``: a power of two, 0 where there are none."""
    dims = head_dim % (MATRIX * chunk)
    return 1 << (-(-dims // MATRIX) - 1).bit_length() if dims else 0


def _power_of_two(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << (n.bit_length() - 1)
