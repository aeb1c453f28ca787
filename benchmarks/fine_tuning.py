"""A model fine-tuned on text that is installed with every PyTorch."""

from __future__ import annotations

import copy
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

import pagedflash.transformers
from pagedflash.cli.generate import Loaded, find_model, load

LEARNING_RATE = 5e-5


def smollm2() -> Loaded:
    return load(find_model(None), torch.device("cpu"), torch.float32, "sdpa")


def batches(tokenizer: Any, steps: int, tokens: int) -> list[Tensor]:
    """``(1, tokens)`` token ids for each step: the description of the package torch, as often as it takes."""
    text = importlib.metadata.metadata("torch").json["description"]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    needed = steps * tokens
    return list(ids.repeat(-(-needed // len(ids)))[:needed].view(steps, 1, tokens))


def losses(model: Any, attention: str, inputs: list[Tensor]) -> list[float]:
    """Before each step of AdamW, of a copy of a model on another attention."""
    pagedflash.transformers.enable()
    model = copy.deepcopy(model).train()
    model.set_attn_implementation(attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    found = []
    for ids in inputs:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found
