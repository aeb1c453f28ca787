"""A long prompt in chunks, so that other requests need not wait for all of it: the same output as in one call.

python examples/chunked_prefill.py
"""

import torch

from pagedflash import flash_attn_func, flash_attn_varlen_func, kv_paged_write

TOKENS, CHUNK, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 1000, 256, 8, 2, 64, 16

torch.manual_seed(0)
q = torch.randn(TOKENS, HEADS, HEAD_DIM)
k, v = torch.randn(2, TOKENS, KV_HEADS, HEAD_DIM)

num_pages = -(-TOKENS // PAGE_SIZE)
k_cache, v_cache = torch.zeros(2, num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
block_table = torch.randperm(num_pages, dtype=torch.int32)[None]  # pages lie anywhere

outputs = []
for begin in range(0, TOKENS, CHUNK):
    end = min(begin + CHUNK, TOKENS)
    kv_paged_write(k[None, begin:end], v[None, begin:end], k_cache, v_cache, block_table, begin)
    outputs.append(
        flash_attn_varlen_func(
            q[begin:end],
            k_cache,
            v_cache,
            cu_seqlens_q=torch.tensor([0, end - begin], dtype=torch.int32),
            cu_seqlens_k=None,
            max_seqlen_q=end - begin,
            max_seqlen_k=end,
            seqused_k=torch.tensor([end], dtype=torch.int32),
            block_table=block_table,
            causal=True,  # aligned to the last key: the chunk sees the chunks before it, and itself causally
        )
    )

at_once = flash_attn_func(q[None], k[None], v[None], causal=True)[0]
difference = (torch.cat(outputs) - at_once).abs().max().item()
print(f"{len(outputs)} chunks of up to {CHUNK} tokens; largest difference from one call: {difference:.1e}")
assert difference < 1e-4
