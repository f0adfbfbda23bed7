"""Ask several things at once; each answer comes as soon as it is ready."""

import asyncio

from fastserve_mega import AsyncClient, SamplingParams


async def ask(client: AsyncClient, question: str) -> None:
    params = SamplingParams(max_tokens=64)
    answer = await client.chat([{"role": "user", "content": question}], params)
    print(f"{question}\n{(await answer.wait()).text}\n")


async def main() -> None:
    async with AsyncClient("tcp://127.0.0.1:5570") as client:
        await asyncio.gather(ask(client, "What is a queue?"), ask(client, "Why is the sky blue?"))


asyncio.run(main())
