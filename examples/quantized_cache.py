"""The same decoding over a cache in float32, int8 and fp8: bytes of a token, and how far the outputs are apart.

python examples/quantized_cache.py
"""

import torch

from pagedflash import flash_attn_with_kvcache

BATCH, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, STEPS = 2, 8, 2, 64, 16, 100
FORMATS = (torch.float32, torch.int8, torch.float8_e4m3fn)

torch.manual_seed(0)
q = torch.randn(STEPS, BATCH, 1, HEADS, HEAD_DIM)
k, v = torch.randn(2, STEPS, BATCH, 1, KV_HEADS, HEAD_DIM)
num_pages = BATCH * -(-STEPS // PAGE_SIZE)
block_table = torch.randperm(num_pages, dtype=torch.int32).view(BATCH, -1)


def decode(dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """(outputs of all steps, bytes of a token's keys and values)"""
    k_cache, v_cache = (torch.zeros(num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in "kv")
    token_bytes = 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
    scales = {}
    if dtype.itemsize == 1:  # one scale a token and head: the append works it out and writes it
        scales = {name: torch.zeros(num_pages, PAGE_SIZE, KV_HEADS) for name in ("k_descale", "v_descale")}
        token_bytes += 2 * KV_HEADS * 4
    outputs = [
        flash_attn_with_kvcache(
            q[i], k_cache, v_cache, k[i], v[i], cache_seqlens=i, block_table=block_table, causal=True, **scales
        )
        for i in range(STEPS)
    ]
    return torch.stack(outputs), token_bytes


exact, _ = decode(torch.float32)
for dtype in FORMATS:
    outputs, token_bytes = decode(dtype)
    difference = ((outputs - exact).norm() / exact.norm()).item()
    print(f"{str(dtype).removeprefix('torch.'):>14}: {token_bytes} bytes a token, outputs differ by {difference:.2%}")
    assert difference < 0.05
