"""Speculative decoding: a draft of several tokens is checked in one call; what is rejected is simply overwritten.

python examples/speculative.py
"""

import torch

from pagedflash import flash_attn_with_kvcache

HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, DRAFT, NEW = 8, 2, 64, 64, 4, 48
CAPACITY = NEW + DRAFT + 1

torch.manual_seed(0)
embedding = torch.randn(VOCABULARY, HEADS * HEAD_DIM) / HEAD_DIM**0.5
to_q, to_k, to_v = (torch.randn(HEADS * HEAD_DIM, heads * HEAD_DIM) / 16 for heads in (HEADS, KV_HEADS, KV_HEADS))


class Model:
    """One attention layer over a cache that is written behind its first ``length`` tokens."""

    def __init__(self) -> None:
        self.k, self.v = torch.zeros(2, 1, CAPACITY, KV_HEADS, HEAD_DIM)
        self.calls = 0

    def next_tokens(self, tokens: list[int], length: int) -> list[int]:
        """What the model says follows each of ``tokens``, the first of which is token number ``length``."""
        self.calls += 1
        x = embedding[tokens]
        q, k, v = (
            (x @ weight).view(1, len(tokens), heads, HEAD_DIM)
            for weight, heads in ((to_q, HEADS), (to_k, KV_HEADS), (to_v, KV_HEADS))
        )
        out = flash_attn_with_kvcache(q, self.k, self.v, k, v, cache_seqlens=length, causal=True)
        return ((x + out.reshape(len(tokens), -1)) @ embedding.T).argmax(-1).tolist()


plain, expected = Model(), [1]
while len(expected) <= NEW:
    expected += plain.next_tokens(expected[-1:], len(expected) - 1)

model, tokens = Model(), [1]
while len(tokens) <= NEW:
    draft = (tokens[1:] + tokens * DRAFT)[-DRAFT:] if len(tokens) < 3 else expected[len(tokens) : len(tokens) + DRAFT - 1]
    draft = [*draft, 0]  # a draft model that is mostly right, and wrong at its end
    answers = model.next_tokens([tokens[-1], *draft], len(tokens) - 1)
    accepted = next(i for i, (guess, answer) in enumerate(zip([*draft, None], answers)) if guess != answer)
    tokens += answers[: accepted + 1]  # what follows was computed behind a wrong token

print(f"{NEW} tokens in {model.calls} calls instead of {plain.calls}; the same: {tokens[: NEW + 1] == expected[: NEW + 1]}")
assert tokens[: NEW + 1] == expected[: NEW + 1]
