"""Several requests at once to ``pagedflash serve MODEL``, streamed as they come.

pagedflash serve HuggingFaceTB/SmolLM2-135M-Instruct &
python examples/serve_client.py [MODEL] [URL]
"""

import asyncio
import sys

from openai import AsyncOpenAI

model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
url = sys.argv[2] if len(sys.argv) > 2 else "http://localhost:8000"
questions = ["What is a page table?", "What does a cache do?", "Why is memory bandwidth scarce?"]


async def ask(client: AsyncOpenAI, question: str) -> None:
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=64, stream=True
    )
    answer = ""
    async for chunk in stream:
        if chunk.choices:
            answer += chunk.choices[0].delta.content or ""
    print(f"{question}\n  {answer}")


async def main() -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        await asyncio.gather(*(ask(client, question) for question in questions))


asyncio.run(main())
