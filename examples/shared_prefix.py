"""One system prompt for many requests: attend to it once for all of them, to the rest of each apart, and merge by LSE.

python examples/shared_prefix.py
"""

import torch

from pagedflash import flash_attn_func, flash_attn_with_kvcache, merge_attention_states

BATCH, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 64
PREFIX, SUFFIX, PAGE_SIZE = 512, 48, 16

torch.manual_seed(0)
q = torch.randn(BATCH, 1, HEADS, HEAD_DIM)
k_prefix, v_prefix = torch.randn(2, 1, PREFIX, KV_HEADS, HEAD_DIM)
pages = BATCH * SUFFIX // PAGE_SIZE
k_cache, v_cache = torch.randn(2, pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
block_table = torch.arange(pages, dtype=torch.int32).view(BATCH, -1)
lengths = torch.full((BATCH,), SUFFIX, dtype=torch.int32)

# The queries of all requests are one sequence of queries to the prefix: its keys are read once, not once a request.
out, lse = flash_attn_func(q.transpose(0, 1), k_prefix, v_prefix, return_softmax_lse=True)
prefix = out.transpose(0, 1), lse[0].T[:, :, None]
suffix = flash_attn_with_kvcache(
    q, k_cache, v_cache, cache_seqlens=lengths, block_table=block_table, causal=True, return_softmax_lse=True
)
merged, _ = merge_attention_states(*prefix, *suffix)

keys, values = (
    torch.cat((shared.expand(BATCH, -1, -1, -1), cache.view(BATCH, SUFFIX, KV_HEADS, HEAD_DIM)), dim=1)
    for shared, cache in ((k_prefix, k_cache), (v_prefix, v_cache))
)
difference = (merged - flash_attn_func(q, keys, values)).abs().max().item()
read, without = PREFIX + BATCH * SUFFIX, BATCH * (PREFIX + SUFFIX)
print(f"keys read: {read} instead of {without}; largest difference: {difference:.1e}")
assert difference < 1e-5
