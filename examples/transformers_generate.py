"""A model of transformers, in continuous batching: every step reads keys and values through block tables.

python examples/transformers_generate.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import pagedflash.transformers
from pagedflash import count_calls

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
pagedflash.transformers.enable()
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="pagedflash")

texts = ["A page is", "The block table of a sequence maps", "Attention is"]
with count_calls() as calls:
    outputs = model.generate_batch(
        [tokenizer(text)["input_ids"] for text in texts],
        generation_config=GenerationConfig(max_new_tokens=32, do_sample=False),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512),
        progress_bar=False,
    )

for text, output in zip(texts, outputs.values()):
    print(text, "->", tokenizer.decode(output.generated_tokens))
for (layout, backend, device), count in calls.items():
    print(f"{count} calls: {layout} on {backend} ({device})")
