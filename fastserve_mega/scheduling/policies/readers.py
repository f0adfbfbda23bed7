"""What each answer is worth and when its reader wants the next token; for `paced`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from enum import IntEnum

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.policies.lifetimes import (
    EDGES,
    KindsOfAnswers,
    Lifetimes,
    bucket_of,
)
from fastserve_mega.scheduling.policies.sessions import Sessions
from fastserve_mega.scheduling.request import Place, Request
from fastserve_mega.system.config import SchedulerConfig

_GAP_S = 0.3
"""Longest planned pause of an answer whose KV is on the device."""
_TURN_S = 1.25
"""Turn on the device for which an answer is brought back from the host: it costs two copies, so it
should yield many tokens. Nobody pauses on the host for longer."""
RESIDENTS_THAT_RUN = 0.7
"""Share of the residents that take part in steps while KV moves: the others are being copied."""
_WITHIN_TPOT = 0.85
"""The slowest reader takes this share of `tpot_s` for a token: a mean that is just kept is missed
by whoever is a little late."""
_BEHIND = 4 / 3
"""A reader waits when its last token was due so long ago, in times of `tpot_s`."""
_TYPICAL_CONTEXT = 256
_SMOOTHING = 0.05


class Standing(IntEnum):
    """The levels of the queue."""

    URGENT = 0
    """A deadline is near: the first token's, or that of a reader who is about to wait."""
    AHEAD = 1
    """The answer is ahead of its reader."""
    LATE = 2
    """It cannot be in time any more, there is no place for it, or it was given up."""


@dataclass(slots=True, eq=False)
class Reader:
    """Who waits for the tokens of a request."""

    due_s: float
    """When the token after the first `num_tokens` is wanted; those after it follow at the pace."""
    num_tokens: int
    """Tokens of prompt and answer."""
    bucket: int
    """Where the number of tokens so far lies in `EDGES`."""
    lifetimes: Lifetimes
    """How long answers like this one go on."""
    work_s: float = 0.0
    """Expected rest of its service when that was last looked at, seconds of the whole batch."""
    attained_s: float = 0.0
    """What the other requests of its session were served, and itself, likewise."""
    gap_s: float = _GAP_S
    """Longest planned pause where its KV is."""
    has_begun: bool = False
    """The first token is there."""
    is_given_up: bool = False

    @property
    def cost_s(self) -> float:
        """What requests are ordered by: the work that is left, and that of the session so far."""
        return self.work_s + self.attained_s


class Readers:
    """All readers: their deadlines, and what work their requests still make."""

    def __init__(self, config: SchedulerConfig, cost_model: CostModel) -> None:
        self.interval_s = cost_model.decode_s(config.max_batch_size, _TYPICAL_CONTEXT)
        """Time from a step to the next, smoothed."""
        tpot_s = config.paced.tpot_s
        self._pace_s = min(1.0 / config.paced.tokens_per_s, _WITHIN_TPOT * tpot_s)
        self._behind_s = _BEHIND * tpot_s - self._pace_s
        self._ttft_s = config.paced.ttft_s
        self._cost_model = cost_model
        self._batch_size = config.max_batch_size
        self._batch_tokens = config.max_batch_tokens
        self._kinds = KindsOfAnswers()
        self._sessions = Sessions()
        self._readers: dict[Request, Reader] = {}
        self._last_step_s = 0.0
        self._gap_away_s = _GAP_S
        """Longest planned pause of who goes to the host now."""
        self._observe_costs()

    def __getitem__(self, request: Request) -> Reader:
        return self._readers[request]

    def __contains__(self, request: Request) -> bool:
        return request in self._readers

    def add(self, request: Request, now: float) -> Reader:
        """Take in who waits for a request that arrived."""
        answered = request.num_tokens - request.num_prompt_tokens
        kind = self._kinds.of(request)
        reader = Reader(now + self._ttft_s, request.num_tokens, bucket_of(answered), kind)
        self._readers[request] = reader
        reader.work_s = self.work_s(request)
        reader.attained_s = self._sessions.attained_s(request, now)
        return reader

    def remove(self, request: Request) -> Reader:
        """Forget a request that ends, and learn from it."""
        reader = self._readers[request]
        if reader.has_begun:
            tokens = request.num_tokens - request.num_prompt_tokens
            reader.lifetimes.ended(tokens)
            self._serve(request, (tokens - EDGES[reader.bucket]) * self._answer_token_s)
        del self._readers[request]
        return reader

    def observe_step(self, now: float, elapsed_s: float) -> None:
        """Follow the time between steps, which overlap in a pipeline."""
        interval_s = min(elapsed_s, now - self._last_step_s)
        self._last_step_s = now
        self.interval_s += _SMOOTHING * (interval_s - self.interval_s)
        self._observe_costs()

    def _observe_costs(self) -> None:
        """Ask once for each step what tokens cost, seconds of the whole batch."""
        size, tokens = self._batch_size, self._batch_tokens
        self._answer_token_s = self._cost_model.decode_s(size, _TYPICAL_CONTEXT) / size
        self._prompt_token_s = self._cost_model.prefill_s(tokens) / tokens

    def began(self, request: Request, now: float) -> None:
        """Take in the first token of a request."""
        reader = self._readers[request]
        reader.has_begun = True
        reader.due_s, reader.num_tokens = now + self._pace_s, request.num_tokens
        reader.work_s = self.work_s(request)
        read = request.num_tokens - request.kv.num_cached_tokens
        self._serve(request, read * self._prompt_token_s)

    def served(self, request: Request, now: float) -> None:
        """Take in that a reader was given what it waited for: it reads on from now."""
        # Nobody waits for what no batch could give: a machine may be slower than all readers.
        next_s = now + max(self._pace_s, self.interval_s)
        if self.next_s(request) < next_s:
            reader = self._readers[request]
            reader.due_s, reader.num_tokens = next_s, request.num_tokens

    def aged(self, request: Request) -> bool:
        """Estimate the work anew when an answer has come to the next age; whether it has."""
        reader = self._readers[request]
        tokens = request.num_tokens - request.num_prompt_tokens
        if reader.bucket + 1 == len(EDGES) or tokens < EDGES[reader.bucket + 1]:
            return False
        reader.lifetimes.survived(reader.bucket)
        self._serve(
            request, (EDGES[reader.bucket + 1] - EDGES[reader.bucket]) * self._answer_token_s
        )
        reader.bucket += 1
        reader.work_s = self.work_s(request)
        return True

    def ages_at(self, request: Request) -> int:
        """Return how many tokens a request has when its answer comes to the next age."""
        bucket = self._readers[request].bucket + 1
        if bucket == len(EDGES):
            return sys.maxsize
        return request.num_prompt_tokens + math.ceil(EDGES[bucket])

    def placed(self, request: Request, swapped: int, residents: int) -> None:
        """Plan the pauses of a request whose KV has just come somewhere or gone.

        Requests take turns: a pause on the host is to a turn on the device as the number of those
        there is to the number of those that run here. So the turn that pays for the copies says how
        long pauses are, and where few are on the host that is short.
        """
        crowd = min(swapped / max(RESIDENTS_THAT_RUN * residents, 1.0), 1.0)
        self._gap_away_s = max(_TURN_S * crowd, _GAP_S)
        is_away = request.place is Place.SWAPPED
        self._readers[request].gap_s = self._gap_away_s if is_away else _GAP_S

    def next_s(self, request: Request) -> float:
        """Return when the reader wants the next token."""
        reader = self._readers[request]
        return reader.due_s + self._pace_s * (request.num_tokens - reader.num_tokens)

    def is_behind(self, request: Request, now: float) -> bool:
        """Whether the reader of an answer has waited for longer than what was promised allows."""
        return self.next_s(request) + self._behind_s <= now

    def due_s(self, request: Request) -> float:
        """Return when a request has to yield a token: for its reader, or to bound the pause."""
        reader = self._readers[request]
        next_s = reader.due_s + self._pace_s * (request.num_tokens - reader.num_tokens)
        if not reader.has_begun:
            return next_s
        return min(next_s, request.waiting_since + reader.gap_s)

    def pause_ends_s(self, request: Request, now: float) -> float | None:
        """Return when an answer is due, one that is in a step after that; None before it began."""
        if not self._readers[request].has_begun:
            return None
        if request.num_scheduled_tokens:
            return self.next_s(request) + self._pace_s
        # One that was in a step until now makes no pause yet: it need not be looked at again soon.
        return self.next_s(request) if request.waiting_since == now else self.due_s(request)

    def wanted_s(self, request: Request) -> float:
        """Return when a request would have to yield a token if its KV were on the host."""
        gap_s = self._readers[request].gap_s if request.place is Place.SWAPPED else self._gap_away_s
        return min(self.next_s(request), request.waiting_since + gap_s)

    def prefill_s(self, request: Request) -> float:
        """Return the time of what is left of a prefill, among other work."""
        pending = request.num_pending_tokens
        if not request.num_computed_tokens:
            pending -= request.kv.num_cached_tokens
        return pending * self._prompt_token_s if pending > 1 else 0.0

    def work_s(self, request: Request) -> float:
        """Return the expected rest of a request's service, in seconds of the whole batch."""
        answered = request.num_tokens - request.num_prompt_tokens
        effort_tokens = self._readers[request].lifetimes.effort_tokens(answered)
        tokens = min(effort_tokens, max(request.max_tokens - answered, 1))
        return self.prefill_s(request) + tokens * self._answer_token_s

    def _serve(self, request: Request, seconds: float) -> None:
        if request.session:
            now = request.waiting_since
            self._sessions.serve(request, seconds, now)
            self._readers[request].attained_s = self._sessions.attained_s(request, now)
