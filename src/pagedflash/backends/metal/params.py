"""The structs that host and shader share: NamedTuples here, generated for the shader, packed for a dispatch."""

from __future__ import annotations

import struct
from typing import NamedTuple, get_type_hints

from ...problem import ScoreParams

__all__ = ["STRUCTS", "Params", "ScoreParams", "packed", "struct_source"]


class Params(NamedTuple):
    """The integers of a dispatch. Strides count elements."""

    batch_size: int
    num_tokens_q: int  # queries of each sequence; of all together where they are packed
    num_heads: int
    capacity: int  # keys that a sequence can have; all, where they are packed
    num_new_tokens: int  # of each sequence, behind those its length counts; of all together where they are packed
    has_cu_seqlens_new: int
    has_slot_mapping: int
    appends: int  # whether decode writes them to the cache
    decode_limit: (
        int  # in a mixed batch, sequences of up to so many queries are decode's, the others prefill's; 0 = not mixed
    )
    num_splits: int
    tile_bits: int  # of decode over lanes: a tile has 2^tile_bits keys
    max_pages: int  # of a sequence: the width of block_table
    num_pages: int  # of the cache; rows, of a dense one
    has_cu_seqlens_q: int
    has_cu_seqlens_k: int
    has_seqused_q: int
    has_seqused_k: int
    has_cache_batch_idx: int
    has_cache_leftpad: int
    has_alibi_slopes: int
    has_sinks: int
    writes_lse: int
    alibi_batch_stride: int
    rotary_half: int  # 0 = no rotary embedding
    rotary_interleaved: int
    rotary_by_position: int
    rotary_positions: int
    q_batch_stride: int
    q_token_stride: int
    q_head_stride: int
    k_batch_stride: int
    k_page_stride: int
    k_token_stride: int
    k_head_stride: int
    v_batch_stride: int
    v_page_stride: int
    v_token_stride: int
    v_head_stride: int
    k_descale_sequence_stride: int
    k_descale_batch_stride: int
    k_descale_page_stride: int
    k_descale_token_stride: int
    k_descale_head_stride: int
    v_descale_sequence_stride: int
    v_descale_batch_stride: int
    v_descale_page_stride: int
    v_descale_token_stride: int
    v_descale_head_stride: int
    writes_k_descale: int  # there is one scale a token and head
    writes_v_descale: int
    writes_values: int  # not where they are a part of their keys, with one scale a token for both
    k_new_batch_stride: int
    k_new_token_stride: int
    k_new_head_stride: int
    v_new_batch_stride: int
    v_new_token_stride: int
    v_new_head_stride: int


STRUCTS = (Params, ScoreParams)

_MEMBERS = {int: ("long", "q"), float: ("float", "f")}
"""Type of a field -> its type in the shader, and its letter in a format of the module struct."""


def struct_source(fields: type) -> str:
    """A NamedTuple of ints and floats as a struct of the shader."""
    members = " ".join(f"{_MEMBERS[kind][0]} {field};" for field, kind in get_type_hints(fields).items())
    return f"struct {fields.__name__} {{ {members} }};"


def packed(values: tuple[float, ...]) -> list[int]:
    """The bytes of that struct, eight to an int: ``compile_shader`` takes lists of numbers of one type only."""
    letters = "".join(_MEMBERS[kind][1] for kind in get_type_hints(type(values)).values())
    contents = struct.pack(f"@{letters}0q", *values)
    return list(struct.unpack(f"@{len(contents) // 8}q", contents))
