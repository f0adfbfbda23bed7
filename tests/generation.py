"""Drives a ModelRunner the way a scheduler would: chunks, mixed batches, recycled blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.model_runner import ModelRunner, SequenceInput

ShareTokens = Callable[[list[int]], list[int]]
"""Gives every rank the tokens of the sampling rank."""


class Generation:
    """One request: its tokens, and how many of them have their KV in the cache."""

    def __init__(self, index: int, prompt: Sequence[int], params: SamplingParams) -> None:
        self.request_id = RequestId(f"request-{index}")
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.params = params
        self.seed = params.seed or 0
        self.cached = 0
        self.blocks: list[int] = []

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def finished(self) -> bool:
        return len(self.output) >= self.params.max_tokens

    @property
    def history(self) -> TokenHistory | None:
        if not self.params.needs_history:
            return None
        return TokenHistory(self.prompt_tokens, self.tokens[: self.prompt_tokens], self.output)

    def next_input(self, chunk: int, block_size: int, free: list[int]) -> SequenceInput:
        start = self.cached
        token_ids = self.tokens[start : start + chunk]
        end = start + len(token_ids)
        while len(self.blocks) * block_size < end:
            self.blocks.append(free.pop())
        return SequenceInput(
            request_id=self.request_id,
            token_ids=token_ids,
            start=start,
            block_table=tuple(self.blocks),
            samples=end == len(self.tokens),
            params=self.params,
            seed=self.seed,
            prompt_tokens=self.prompt_tokens,
            history=self.history,
        )


def generate(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    block_size: int,
    chunk: int = 512,
    concurrent: int = 4,
    share_tokens: ShareTokens = list,
) -> list[list[int]]:
    """Output tokens of each prompt; a new request starts in each step while there is room."""
    all_params = itertools.repeat(params) if isinstance(params, SamplingParams) else params
    waiting = [Generation(i, p, s) for i, (p, s) in enumerate(zip(prompts, all_params))]  # noqa: B905
    everything = list(waiting)
    running: list[Generation] = []
    # Taken from the end: blocks just freed are the next to be used again.
    free = list(range(1, runner.device_blocks))
    while waiting or running:
        if waiting and len(running) < concurrent:
            running.append(waiting.pop(0))
        batch = [generation.next_input(chunk, block_size, free) for generation in running]
        sampled = iter(share_tokens(runner.execute(batch).token_ids))
        for generation, sequence in zip(list(running), batch, strict=True):
            generation.cached = sequence.context
            if sequence.samples:
                generation.tokens.append(next(sampled))
            if generation.finished:
                free.extend(generation.blocks)
                running.remove(generation)
    return [generation.output for generation in everything]
