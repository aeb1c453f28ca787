"""Training on documents packed into one row, as trainers pack them: positions that start again say where one ends.

python examples/train_packed.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pagedflash
import pagedflash.transformers

LENGTHS = [70, 25, 130, 31]  # tokens of each document; no padding, no mask
STEPS = 30

pagedflash.transformers.enable()
torch.manual_seed(0)
sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM._from_config(config, attn_implementation="pagedflash").train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# Each document counts up from another token; what is predicted across a border of documents does not count.
documents = [(torch.arange(length) + start) % 96 for start, length in enumerate(LENGTHS)]
labels = [document.clone().index_fill(0, torch.tensor([0]), -100) for document in documents]
batch = dict(
    input_ids=torch.cat(documents)[None],
    position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
    labels=torch.cat(labels)[None],
)

losses = []
with pagedflash.count_calls() as calls:
    for _ in range(STEPS):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

layouts = ", ".join(sorted({kind.layout for kind in calls}))
print(f"{STEPS} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}; {sum(calls.values())} calls, {layouts}")
