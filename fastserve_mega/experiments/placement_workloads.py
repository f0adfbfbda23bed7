"""Requests for many replicas: what a rule of placement can do well or badly.

Each generator takes a source of chance, a number of requests and how many come per second, and
returns them in order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastserve_mega.simulator.lengths import Lognormal
from fastserve_mega.simulator.workload import RequestSpec

Generator = Callable[[np.random.Generator, int, float], list[RequestSpec]]

MEAN_TURNS = 4.0
LONGEST_CONVERSATION = 6_000
"""Tokens after which nobody goes on."""
THINK_S = 1.5
"""Mean time from the end of an answer to the next question, exponential."""
READING_S = 0.03
"""The next question comes at the earliest so long after the last one, for each token of the answer:
arrivals do not depend on how fast the answer came, so that all rules are given the same ones."""
PREAMBLES = 48
PREAMBLE_TOKENS = 2_500
ZIPF_EXPONENT = 1.1

_FIRST_QUESTION = Lognormal(mean=900, cv=0.8)
_QUESTION = Lognormal(mean=140, cv=1.39)
_ANSWER = Lognormal(mean=40, cv=0.60)
_DOCUMENT = Lognormal(mean=1_200, cv=1.3)
_LONGEST_DOCUMENT = 7_000


def conversations(random: np.random.Generator, count: int, rate: float) -> list[RequestSpec]:
    """Conversations of four turns on average, each of which repeats all before it.

    They begin at random times, some before the first arrival, so that the mix of first and later
    turns is the same at all times. Questions have the spread of ShareGPT's; the first has a
    document with it.
    """
    requests: list[RequestSpec] = []
    turn_s = THINK_S + READING_S * _ANSWER.mean
    lead_s = MEAN_TURNS * turn_s
    sessions = int((count + rate * lead_s) / MEAN_TURNS * 1.15)
    begins = -lead_s + np.cumsum(random.exponential(MEAN_TURNS / rate, sessions))
    for session, begin_s in enumerate(begins.tolist()):
        requests += _conversation(random, f"s{session}", begin_s)
    requests.sort()
    return [each for each in requests if each.arrival_s >= 0][:count]


def _conversation(random: np.random.Generator, session: str, begin_s: float) -> list[RequestSpec]:
    turns = int(random.geometric(1 / MEAN_TURNS))
    questions = _QUESTION.draw(random, turns).tolist()
    questions[0] = int(_FIRST_QUESTION.draw(random, 1)[0])
    answers = np.minimum(_ANSWER.draw(random, turns), 512).tolist()
    thinking_s = random.exponential(THINK_S, turns).tolist()
    requests, tokens, time_s = [], 0, begin_s
    for question, answer, think_s in zip(questions, answers, thinking_s, strict=True):
        tokens += question
        if tokens > LONGEST_CONVERSATION:
            break
        requests.append(RequestSpec(time_s, tokens, answer, session=session))
        tokens += answer
        time_s += READING_S * answer + think_s
    return requests


def preambles(random: np.random.Generator, count: int, rate: float) -> list[RequestSpec]:
    """48 system prompts of 2,500 tokens, of Zipf's popularity, before a question of about 140."""
    weights = 1.0 / np.arange(1, PREAMBLES + 1) ** ZIPF_EXPONENT
    chosen = random.choice(PREAMBLES, count, p=weights / weights.sum())
    times = np.cumsum(random.exponential(1 / rate, count))
    prompts = PREAMBLE_TOKENS + np.minimum(_QUESTION.draw(random, count), 2_000)
    answers = np.minimum(_ANSWER.draw(random, count), 512)
    rows = zip(times.tolist(), prompts.tolist(), answers.tolist(), chosen.tolist(), strict=True)
    return [
        RequestSpec(time_s, prompt, answer, preamble=f"p{name}", preamble_tokens=PREAMBLE_TOKENS)
        for time_s, prompt, answer, name in rows
    ]


def documents(random: np.random.Generator, count: int, rate: float) -> list[RequestSpec]:
    """Prompts of all lengths, 1,200 on average (cv 1.3), that have nothing in common."""
    times = np.cumsum(random.exponential(1 / rate, count))
    prompts = np.minimum(_DOCUMENT.draw(random, count), _LONGEST_DOCUMENT)
    answers = np.minimum(_ANSWER.draw(random, count), 512)
    rows = zip(times.tolist(), prompts.tolist(), answers.tolist(), strict=True)
    return [RequestSpec(*row) for row in rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementWorkload:
    """Requests of one kind for many replicas."""

    name: str
    about: str
    generate: Generator
    fast_share: float = 0.0
    """Share of the replicas that have a faster device, and more KV blocks."""
    outage: tuple[float, float] | None = None
    """The part of the run in which the first replica is missing."""


WORKLOADS = (
    PlacementWorkload(
        name="documents", about="prompts of all lengths, nothing shared", generate=documents
    ),
    PlacementWorkload(
        name="conversations", about="four turns on average, each repeats those before it",
        generate=conversations,
    ),
    PlacementWorkload(
        name="preambles", about="48 system prompts of 2,500 tokens, Zipf", generate=preambles
    ),
    PlacementWorkload(
        name="uneven", about="conversations; a quarter of the replicas faster and larger",
        generate=conversations, fast_share=0.25,
    ),
    PlacementWorkload(
        name="outage", about="conversations; one replica is lost, and comes back",
        generate=conversations, outage=(0.45, 0.65),
    ),
)  # fmt: skip
