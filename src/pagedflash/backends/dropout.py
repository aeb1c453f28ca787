"""Which probabilities dropout drops: a counter-based generator, so that forward, backward and every backend agree.

The probability of query ``i`` and key ``j`` of sequence ``b`` and query head ``h`` has one word of 32 random bits: word
``j % 4`` of Philox 4x32-10 with the seed as key and the counter ``(j // 4, i, h, b)``. It is dropped if the word, without
its last bit, is below ``ScoreParams.dropout_threshold``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Scores, fold_scores

ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of each counter. ``seed`` is one int64; counters, which broadcast, and words are int64 below ``2**32``."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    a, b, c, d = counter
    for _ in range(ROUNDS):
        first, second = (word * multiplier for word, multiplier in zip((a, c), _MULTIPLIERS))  # modulo 2^64
        high_first, high_second = ((product >> 32) & _WORD for product in (first, second))
        a, b, c, d = high_second ^ b ^ keys[0], second & _WORD, high_first ^ d ^ keys[1], first & _WORD
        keys = [(key + weyl) & _WORD for key, weyl in zip(keys, _WEYL)]
    return a, b, c, d


def kept(scores: Scores, sequences: Tensor, heads: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a probability is dropped, else ``1 / (1 - dropout_p)``. The int64 tensors broadcast."""
    params = fold_scores(scores)
    assert scores.dropout_seed is not None
    words = philox(scores.dropout_seed, (keys >> 2, queries, heads, sequences))
    which = keys & 3
    word = torch.where(which < 2, torch.where(which == 0, *words[:2]), torch.where(which == 2, *words[2:]))
    return (word >> 1 >= params.dropout_threshold).to(dtype) * params.dropout_scale
