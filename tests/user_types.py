"""What a type checker says of a user's code: checked by ``make lint``, and with the wheel by ``nox -s types``. Never run."""

import torch
from typing_extensions import assert_type

from pagedflash import (
    CallKind,
    count_calls,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_attention_states,
    use_backend,
)

q = torch.randn(1, 5, 8, 64)
offsets = torch.tensor([0, 5], dtype=torch.int32)

assert_type(flash_attn_func(q, q, q, causal=True), torch.Tensor)
out, lse = flash_attn_func(q, q, q, return_softmax_lse=True)
assert_type(lse, torch.Tensor)
assert_type(flash_attn_func(q, q, q, return_attn_probs=True), tuple[torch.Tensor, torch.Tensor, torch.Tensor])
assert_type(flash_attn_varlen_func(q[0], q[0], q[0], offsets, offsets, 5, 5, causal=True), torch.Tensor)
assert_type(flash_attn_with_kvcache(q, q, q, cache_seqlens=3), torch.Tensor)
assert_type(flash_attn_with_kvcache(q, q, q, cache_seqlens=3, return_softmax_lse=True), tuple[torch.Tensor, torch.Tensor])
assert_type(flash_attn_kvpacked_func(q, torch.stack((q, q), 2)), torch.Tensor)
assert_type(merge_attention_states(out, lse, out, lse), tuple[torch.Tensor, torch.Tensor])

with use_backend("cpu"), count_calls() as calls:
    assert_type(calls[CallKind("dense", "cpu", "cpu")], int)

flash_attn_func(q, q, q, causal="yes")  # type: ignore[call-overload]
flash_attn_with_kvcache(q, q, q, cache_length=3)  # type: ignore[call-overload]
