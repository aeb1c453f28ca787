"""Greedy decoding by hand: a toy model of one attention layer, its keys and values in pages that a table maps.

python examples/decode_loop.py
"""

import torch

from pagedflash import flash_attn_with_kvcache

BATCH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 3, 8, 2, 64, 1000
PAGE_SIZE, NUM_PAGES, STEPS = 16, 32, 40

torch.manual_seed(0)
embedding = torch.randn(VOCABULARY, HEADS * HEAD_DIM) / HEAD_DIM**0.5
to_q, to_k, to_v = (torch.randn(HEADS * HEAD_DIM, heads * HEAD_DIM) / 16 for heads in (HEADS, KV_HEADS, KV_HEADS))

k_cache = torch.zeros(NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
v_cache = torch.zeros_like(k_cache)
free_pages = list(range(NUM_PAGES))
block_table = torch.full((BATCH, NUM_PAGES // BATCH), -1, dtype=torch.int32)  # -1: no page yet, never read
lengths = torch.zeros(BATCH, dtype=torch.int32)  # tokens in the cache

tokens = torch.tensor([1, 2, 3])
for _ in range(STEPS):
    for b, length in enumerate(lengths.tolist()):  # a page for the new token, where its sequence has filled the last one
        if length % PAGE_SIZE == 0:
            block_table[b, length // PAGE_SIZE] = free_pages.pop()
    x = embedding[tokens]
    q = (x @ to_q).view(BATCH, 1, HEADS, HEAD_DIM)
    k, v = ((x @ weight).view(BATCH, 1, KV_HEADS, HEAD_DIM) for weight in (to_k, to_v))
    # One call writes k and v into their pages and attends to all tokens so far.
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=block_table, causal=True)
    lengths += 1
    tokens = ((x + out.reshape(BATCH, -1)) @ embedding.T).argmax(-1)

print(f"{STEPS} steps, {NUM_PAGES - len(free_pages)} of {NUM_PAGES} pages used")
print("pages of each sequence:", [row[row >= 0].tolist() for row in block_table])
