"""The sizes of a model."""

from __future__ import annotations

from typing import Any

SMOLLM2_SIZES: dict[str, Any] = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    initializer_range=0.05,
)
"""Of a random model in the shape of SmolLM2-135M, for a configuration of transformers."""
