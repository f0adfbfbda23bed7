"""Requests that no data set has: seeded generators of what is hard for a scheduler.

Each takes a source of chance and a number of requests, and returns them in order of arrival, one
per second on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastserve_mega.simulator.lengths import SHAREGPT_LIKE, Lognormal
from fastserve_mega.simulator.workload import RequestSpec

Generator = Callable[[np.random.Generator, int], list[RequestSpec]]

LONGEST_PROMPT = 100_000
LONGEST_ANSWER = 32_768
BURST = 256
"""Requests that arrive together."""
LONGEST_CONVERSATION = (1024, 1024)
"""Tokens of prompt and answer where requests are like ShareGPT's."""


def long_prompts(random: np.random.Generator, count: int) -> list[RequestSpec]:
    """Draw documents of 12,000 tokens on average (lognormal, cv 1.5), answers of 340 (cv 0.6)."""
    prompts = Lognormal(mean=12_000, cv=1.5).draw(random, count)
    outputs = Lognormal(mean=340, cv=0.6).draw(random, count)
    return _specs(_poisson(random, count), np.minimum(prompts, LONGEST_PROMPT), outputs)


def prompt_bursts(random: np.random.Generator, count: int) -> list[RequestSpec]:
    """Draw bursts of 256 prompts of about 2,000 tokens (cv 0.5), each answered with 28.

    There is one burst in each time in which 256 requests come on average, anywhere in it.
    """
    bursts = -(-count // BURST)
    begins = (np.arange(bursts) + random.random(bursts)) * BURST
    times = np.repeat(begins, BURST)[:count]
    prompts = Lognormal(mean=2000, cv=0.5).draw(random, count)
    return _specs(times, prompts, np.full(count, 28))


def bimodal(random: np.random.Generator, count: int) -> list[RequestSpec]:
    """Draw nine answers of about 40 tokens to one of about 1,000, behind prompts of 128."""
    short = Lognormal(mean=40, cv=0.5).draw(random, count)
    long = Lognormal(mean=1000, cv=0.3).draw(random, count)
    outputs = np.where(_one_in(10, random, count), np.minimum(long, 1800), short)
    return _specs(_poisson(random, count), np.full(count, 128), outputs)


def flood(random: np.random.Generator, count: int) -> list[RequestSpec]:
    """Draw one client's 19 short requests (64 in, 16 out) to another's long one (512, 1,000)."""
    is_long = _one_in(20, random, count)
    return _specs(
        _poisson(random, count),
        np.where(is_long, 512, 64),
        np.where(is_long, 1000, 16),
        clients=["writer" if each else "flood" for each in is_long],
    )


def burst_flood(random: np.random.Generator, count: int) -> list[RequestSpec]:
    """Draw a client's conversations, one request in five, beside another's, in bursts of 256.

    The lengths of both are like ShareGPT's.
    """
    is_steady = _one_in(5, random, count)
    bursts = -(-count // BURST)
    begins = (np.arange(bursts) + random.random(bursts)) * BURST
    times = np.where(is_steady, _poisson(random, count), np.repeat(begins, BURST)[:count])
    order = np.argsort(times, kind="stable")
    prompts, outputs = _conversation_lengths(random, count)
    return _specs(
        times[order], prompts, outputs,
        clients=["steady" if each else "flood" for each in is_steady[order]],
    )  # fmt: skip


def one_long_answer(random: np.random.Generator, count: int) -> list[RequestSpec]:
    """Draw one answer of 32,768 tokens, after three tenths of short ones of about 128."""
    outputs = Lognormal(mean=128, cv=0.5).draw(random, count)
    outputs[count * 3 // 10] = LONGEST_ANSWER
    return _specs(_poisson(random, count), np.full(count, 128), outputs)


def conversations(random: np.random.Generator, count: int) -> list[RequestSpec]:
    """Draw lengths like ShareGPT's, at most 1,024 tokens each of prompt and answer."""
    return _specs(_poisson(random, count), *_conversation_lengths(random, count))


def priorities(random: np.random.Generator, count: int) -> list[RequestSpec]:
    """Draw lengths like ShareGPT's: one in four urgent (priority 0), the others of priority 4."""
    is_urgent = _one_in(4, random, count)
    return _specs(
        _poisson(random, count),
        *_conversation_lengths(random, count),
        clients=["urgent" if each else "background" for each in is_urgent],
        priorities=np.where(is_urgent, 0, 4).tolist(),
    )


@dataclass(frozen=True, slots=True)
class OfLengths:
    """Requests with these lengths, in tokens; a `Generator`."""

    prompt: Lognormal
    output: Lognormal
    longest: int = LONGEST_PROMPT
    """Tokens that no prompt and no answer exceeds."""
    burstiness: float = 1.0
    """Coefficient of variation of the times between arrivals (gamma); 1 is Poisson's."""

    def __call__(self, random: np.random.Generator, count: int) -> list[RequestSpec]:
        shape = 1 / self.burstiness**2
        gaps = random.gamma(shape, 1 / shape, count)
        prompts, outputs = self.prompt.draw(random, count), self.output.draw(random, count)
        times = np.cumsum(gaps * count / gaps.sum())
        return _specs(times, *(np.minimum(each, self.longest) for each in (prompts, outputs)))


def rag_and_chat(random: np.random.Generator, count: int) -> list[RequestSpec]:
    """Draw three documents of about 8,000 tokens (200 out) to seven chats (100 in, 300 out)."""
    documents = random.random(count) < 0.3
    prompts = np.where(
        documents,
        Lognormal(mean=8000, cv=0.3).draw(random, count),
        Lognormal(mean=100, cv=1.0).draw(random, count),
    )
    outputs = np.where(
        documents,
        Lognormal(mean=200, cv=0.5).draw(random, count),
        Lognormal(mean=300, cv=0.8).draw(random, count),
    )
    return _specs(_poisson(random, count), prompts, outputs)


def with_hints(
    requests: Sequence[RequestSpec], error: float, random: np.random.Generator
) -> list[RequestSpec]:
    """Return the same requests from clients that say how long each answer will be.

    Args:
        requests: whose answers have lengths.
        error: standard deviation of the logarithm of what they say over the length.
        random: draws the errors.
    """
    factors = np.exp(random.normal(0.0, error, len(requests)))
    return [
        each._replace(expected_output_tokens=max(round(each.output_tokens * factor), 1))
        for each, factor in zip(requests, factors.tolist(), strict=True)
    ]


def _conversation_lengths(
    random: np.random.Generator, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    longest_prompt, longest_answer = LONGEST_CONVERSATION
    prompts = np.minimum(SHAREGPT_LIKE.prompt.draw(random, count), longest_prompt)
    return prompts, np.minimum(SHAREGPT_LIKE.output.draw(random, count), longest_answer)


def _one_in(group: int, random: np.random.Generator, count: int) -> npt.NDArray[np.bool_]:
    """Choose one of each group that follow each other: any of them, but always as many in all."""
    groups = -(-count // group)
    chosen = np.zeros(groups * group, dtype=np.bool_)
    chosen[np.arange(groups) * group + random.integers(0, group, groups)] = True
    return chosen[:count]


def _poisson(random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    return np.cumsum(random.exponential(1.0, count))


def _specs(
    times: npt.NDArray[np.float64],
    prompts: npt.NDArray[np.int64],
    outputs: npt.NDArray[np.int64],
    *,
    clients: Sequence[str] | None = None,
    priorities: Sequence[int] | None = None,
) -> list[RequestSpec]:
    count = len(times)
    rows = zip(
        times.tolist(), prompts.tolist(), outputs.tolist(),
        clients or [""] * count, priorities or [0] * count,
        strict=True,
    )  # fmt: skip
    return [RequestSpec(*row) for row in rows]
