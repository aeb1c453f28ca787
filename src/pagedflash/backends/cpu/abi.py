"""What crosses to the native library: the records that ``native/abi.def`` lists, field by field.

The library tells the fields it was compiled with, and :func:`check` compares them with these when it is loaded: two fields
that have changed places are as wrong as a missing one.
"""

from __future__ import annotations

from itertools import zip_longest
from struct import Struct
from typing import Any, NamedTuple, get_type_hints

from ...geometry import ScoreParams
from ...problem import AttentionProblem, CacheWrite, Queries, Scores


class Strides(NamedTuple):
    batch: int
    token: int
    head: int


class QueryShape(NamedTuple):
    q_stride: Strides
    q_tokens: int
    q_heads: int
    max_seqlen_q: int


class WriteShape(NamedTuple):
    k_stride: Strides
    v_stride: Strides
    k_new_stride: Strides
    v_new_stride: Strides
    rotary_rows: int
    rotary_pairs: int
    rotary_interleaved: int
    dtype: int
    batch_size: int
    num_new_tokens: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    num_pages: int
    page_size: int
    table_width: int


class AttentionShape(NamedTuple):
    queries: QueryShape
    write: WriteShape
    scores: ScoreParams
    alibi_batch_stride: int
    num_splits: int
