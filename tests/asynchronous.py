"""What tests of the asynchronous client have in common."""

from __future__ import annotations

import asyncio

from fastserve_mega.client.testing import WAIT_S
from fastserve_mega.types import SamplingParams


def run(coroutine):
    """Run a test that must end in time."""
    return asyncio.run(asyncio.wait_for(coroutine, 2 * WAIT_S))


def params(**values):
    return SamplingParams(**{"max_tokens": 100, **values})


async def collect(generation):
    return [chunk async for chunk in generation]


async def wait_for(coordinator, kind, count=1):
    return await asyncio.to_thread(coordinator.wait_for, kind, count)


async def until(condition):
    """Let the loop run until the condition holds; `run` limits it."""
    while not condition():
        await asyncio.sleep(0)
