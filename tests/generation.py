"""Drives a ModelRunner the way a scheduler would: chunks, mixed batches, recycled blocks."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.history import TokenHistory
from fastserve_mega.worker.model_runner import ModelRunner, SequenceInput, StepOutput

ShareTokens = Callable[[list[int]], list[int]]
"""Gives every rank the tokens of the sampling rank."""
_EMBEDDING = SamplingParams(max_tokens=1, temperature=0.0, embeds=True)
_GREEDY = SamplingParams(max_tokens=3, temperature=0.0)


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


def embed(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]],
    *,
    block_size: int,
    chunk: int,
    share: Callable[[list[Any]], list[Any]] = list,
) -> list[list[float]]:
    """Embedding of each prompt, beside generations of every second one of them."""
    found: dict[RequestId, list[float]] = {}
    execute = runner.execute

    def watched(batch: Sequence[SequenceInput]) -> StepOutput:
        output = execute(batch)
        asking = [sequence.request_id for sequence in batch if sequence.embeds]
        vectors = share([array("f", each).tolist() for each in output.embeddings])
        found.update(zip(asking, vectors, strict=True))
        return output

    runner.execute = watched  # type: ignore[method-assign]
    every = [
        (prompt, params)
        for index, prompt in enumerate(prompts)
        for params in (_EMBEDDING, _GREEDY)[: 1 + index % 2]
    ]
    generate(
        runner,
        [prompt for prompt, _ in every],
        [params for _, params in every],
        block_size=block_size,
        chunk=chunk,
        share_tokens=share,
    )
    runner.execute = execute  # type: ignore[method-assign]
    numbers = [index for index, (_, params) in enumerate(every) if params.embeds]
    return [found[RequestId(f"request-{number}")] for number in numbers]


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
