"""How much longer an answer goes on, learned from those before it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from itertools import pairwise

from fastserve_mega.scheduling.request import Request

EDGES = (0.0, *(16.0 * 1.25**step for step in range(42)))
"""Ages, in tokens, at which the buckets begin; the last of them has no end."""
_FORGETTING = 0.98
"""What is left of the evidence after `_REFRESHED` news: some thousand answers count."""
_REFRESHED = 16
"""News after which the tables are made anew."""
_FIRST_GUESS_TOKENS = 128.0
"""Length of an answer before any has ended."""
_DOUBT = 2.0
"""Ends in a bucket below which the mean of all buckets outweighs what was seen there."""
_DOUBT_OF_PART = 8.0
"""Ends in a bucket of a part of the answers below which the whole that it is a part of outweighs
them."""
_PROMPT_KINDS = 20
"""Prompts are told apart by powers of two."""
_HINT_KINDS = 40
"""Hints are told apart by powers of the square root of two."""
_MOST_OF_CLIENTS = 512
"""Kinds of answers of single clients that are remembered."""


class Lifetimes:
    """The hazard of ending, by the tokens so far, constant within a bucket.

    Ends over tokens at risk is right also while most answers are under way (censored lifetimes):
    the mean length of those that ended would be far too low, since the short ones end first. Memory
    is bounded and old evidence fades.

    Args:
        whole: the answers that these are a part of. It learns all that they do, and stands in where
            they have shown little.
    """

    def __init__(self, whole: Lifetimes | None = None) -> None:
        self._whole = whole
        self._ends = [0.0] * len(EDGES)
        self._tokens = [0.0] * len(EDGES)
        self._news = 0
        self._effort: list[float] = []

    def survived(self, bucket: int) -> None:
        """Learn that an answer came to the end of a bucket."""
        self._tokens[bucket] += EDGES[bucket + 1] - EDGES[bucket]
        self._news += 1
        if self._whole is not None:
            self._whole.survived(bucket)

    def ended(self, tokens: int) -> None:
        """Learn that an answer ended with so many tokens."""
        bucket = bucket_of(tokens)
        self._tokens[bucket] += max(tokens - EDGES[bucket], 1.0)
        self._ends[bucket] += 1.0
        self._news += 1
        if self._whole is not None:
            self._whole.ended(tokens)

    def effort_tokens(self, tokens: int) -> float:
        """Return the tokens it takes for an end, at best, from answers of this age (1 / Gittins).

        It is the least expected tokens for each expected end over all ages up to which one might go
        on; at most the expected rest of the answer. Serving the least first gives the least mean
        completion time that is possible without knowing the lengths.
        """
        if not self._effort and not self._news and self._whole is not None:
            return self._whole.effort_tokens(tokens)
        if not self._effort or self._news >= _REFRESHED:
            self._refresh()
        return self._effort[bucket_of(tokens)]

    def _refresh(self) -> None:
        if self._effort:
            self._ends = [each * _FORGETTING for each in self._ends]
            self._tokens = [each * _FORGETTING for each in self._tokens]
        self._news = 0
        self._effort = _efforts(self._hazards())

    def _hazards(self) -> list[float]:
        """Return the ends per token in each bucket."""
        if self._whole is not None:
            doubt = _DOUBT_OF_PART
            expected_tokens = [1.0 / hazard for hazard in self._whole._hazards()]
        else:
            doubt = _DOUBT
            mean = (sum(self._tokens) + _FIRST_GUESS_TOKENS) / (sum(self._ends) + 1.0)
            expected_tokens = [mean] * len(EDGES)
        return [
            (ends + doubt) / (tokens + doubt * expected)
            for ends, tokens, expected in zip(
                self._ends, self._tokens, expected_tokens, strict=True
            )
        ]


class KindsOfAnswers:
    """The lifetimes of answers, by what is known of a request when it comes.

    That is the hint of its length (`expected_output_tokens`), or else the length of its prompt; and
    who asks, since programs repeat themselves. A hint is no promise: what is learned is how long
    answers with such a hint are, and how long those of a client with such a hint. So hints that are
    wrong by a factor serve as well as others, those that mean nothing are found out after some ten
    answers, and whoever says 1 each time tells nothing but that.
    """

    def __init__(self) -> None:
        self._all = Lifetimes()
        self._by_prompt = tuple(Lifetimes(self._all) for _ in range(_PROMPT_KINDS))
        self._by_hint = tuple(Lifetimes(self._all) for _ in range(_HINT_KINDS))
        self._of_clients: OrderedDict[tuple[str, int, bool], Lifetimes] = OrderedDict()
        """By client, kind, and whether that is a kind of hint; those that came last are last."""

    def of(self, request: Request) -> Lifetimes:
        """Return the lifetimes of the answers that are most like a request's."""
        hint = request.expected_output_tokens
        if hint is None:
            kind = min(request.num_prompt_tokens.bit_length(), _PROMPT_KINDS - 1)
            whole = self._by_prompt[kind]
        else:
            kind = min(round(2 * math.log2(max(hint, 1))), _HINT_KINDS - 1)
            whole = self._by_hint[kind]
        if not request.share.name:  # nobody says who asks
            return whole
        key = request.share.name, kind, hint is not None
        if (found := self._of_clients.get(key)) is not None:
            self._of_clients.move_to_end(key)
            return found
        if len(self._of_clients) == _MOST_OF_CLIENTS:
            self._of_clients.popitem(last=False)
        self._of_clients[key] = part = Lifetimes(whole)
        return part


def bucket_of(tokens: int) -> int:
    """Return the bucket of an age."""
    return bisect_right(EDGES, tokens) - 1


def _efforts(hazards: list[float]) -> list[float]:
    """Return the least expected tokens per expected end, from the begin of each bucket.

    From the last bucket to the first: what is best from a bucket on is to pass through it, and
    through each stretch behind it that takes less for an end than all before that.
    """
    efforts = [1.0 / hazards[-1]]
    behind = [(efforts[0], efforts[0], 0.0)]
    """Stretches, the nearest last: tokens for an end, expected tokens, and the share that goes on
    behind it."""
    for (begin, end), hazard in zip(
        reversed(list(pairwise(EDGES))), reversed(hazards[:-1]), strict=True
    ):
        alive = math.exp(-hazard * (end - begin))
        effort = 1.0 / hazard
        tokens = effort * (1.0 - alive)
        while behind and behind[-1][0] < effort:
            _, more, still_alive = behind.pop()
            tokens += alive * more
            alive *= still_alive
            effort = tokens / (1.0 - alive)
        behind.append((effort, tokens, alive))
        efforts.append(effort)
    return efforts[::-1]
