"""Answers that may be asked for again.

Those of requests with a fingerprint are kept for a minute, those about the whole server, which cost
more to make than to ask for, for a quarter of a second.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fastserve_mega.coordinator.live_request import LiveRequest
from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.messaging.frames import encode
from fastserve_mega.messaging.messages import Message, Metrics, Snapshot
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.snapshot import Percentiles
from fastserve_mega.types import FinishReason, RequestId

_KEPT_S = 60.0
_MOST_TOKENS = 2_000_000
"""Tokens of all kept answers and their prompts, 4 to 40 bytes each; the oldest make room."""
_LOGPROBS_WEIGHT = 50
"""Log probabilities of a token take the memory of so many tokens."""
_NUMBER_BYTES = 4
_INTERVAL_S = 0.25
_MOST_NEW = 4
"""Made in an interval whoever asks; after that those that have been made are given again."""
_MAX_VIEWS = 1_000
"""Requests of each replica that a snapshot shows, whatever is asked for."""


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """A request as it was when it ended, or when its client went away."""

    live: LiveRequest
    reason: FinishReason
    until: float

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to compute."""
        return self.reason in (FinishReason.STOP, FinishReason.LENGTH)

    @property
    def weight(self) -> int:
        """Memory that it takes, in tokens."""
        logprobs = _LOGPROBS_WEIGHT * len(self.live.logprobs)
        embedding = len(self.live.embedding) // _NUMBER_BYTES
        return len(self.live.prompt) + len(self.live.output) + logprobs + embedding


class KeptAnswers:
    """Remembers what was computed, for clients that lost their connection. Time is an argument."""

    def __init__(self, most_tokens: int = _MOST_TOKENS) -> None:
        """Nothing is kept yet.

        Args:
            most_tokens: of all answers together.
        """
        self._answers: OrderedDict[RequestId, KeptAnswer] = OrderedDict()
        """The oldest first."""
        self._most_tokens = most_tokens
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._answers)

    def keep(self, live: LiveRequest, reason: FinishReason, now: float) -> None:
        """Keep a request that ends, unless it has failed or nobody may ask for it again."""
        if not live.submit.fingerprint or reason in (FinishReason.ERROR, FinishReason.REJECTED):
            return
        self.take(live.request_id, now)
        kept = self._answers[live.request_id] = KeptAnswer(live, reason, now + _KEPT_S)
        self._tokens += kept.weight
        while self._tokens > self._most_tokens:
            self._forget_oldest()

    def get(self, request_id: RequestId, now: float) -> KeptAnswer | None:
        """The answer of a request, if it is kept still."""
        while self._answers and next(iter(self._answers.values())).until <= now:
            self._forget_oldest()
        return self._answers.get(request_id)

    def take(self, request_id: RequestId, now: float) -> None:
        """Forget an answer, since its request goes on."""
        if self.get(request_id, now) is not None:
            self._tokens -= self._answers.pop(request_id).weight

    def _forget_oldest(self) -> None:
        _, kept = self._answers.popitem(last=False)
        self._tokens -= kept.weight


class RecentAnswers:
    """Makes few answers in an interval and gives them to everybody, as frames."""

    def __init__(self) -> None:
        self._frames: dict[str, bytes] = {}
        self._began = 0.0
        self._num_new = 0

    def get(self, question: str, make: Callable[[], Message], now: float) -> bytes:
        """The answer to a question, at most 0.25 s old.

        Args:
            question: names it.
            make: a new answer.
            now: time, seconds.
        """
        if now - self._began >= _INTERVAL_S:
            self._began, self._num_new = now, 0
            self._frames.clear()
        if self._num_new < _MOST_NEW or question not in self._frames:
            self._num_new += 1
            self._frames[question] = encode(make())
        return self._frames[question]


class Reports:
    """The metrics and snapshots of a server, as frames that may be somewhat older than `now`."""

    def __init__(self, replicas: Sequence[Replica], metrics: ServingMetrics) -> None:
        self._replicas = replicas
        self._metrics = metrics
        self._recent = RecentAnswers()

    def metrics(self, now: float) -> bytes:
        return self._recent.get("metrics", lambda: Metrics(self._metrics.render()), now)

    def snapshot(self, max_requests: int, now: float) -> bytes:
        views = min(max_requests, _MAX_VIEWS)
        return self._recent.get(f"snapshot {views}", partial(self._snapshot, views, now), now)

    def _snapshot(self, max_requests: int, now: float) -> Snapshot:
        requests = self._metrics.requests
        return Snapshot(
            clock_s=now,
            replicas=tuple(each.scheduler.view(now, max_requests) for each in self._replicas),
            prompt_tokens=requests.num_prompt_tokens,
            generation_tokens=requests.num_generation_tokens,
            finished_requests=requests.num_finished,
            ttft_s=Percentiles.of(requests.recent_ttft_s),
            jct_s=Percentiles.of(requests.recent_jct_s),
            policy=self._metrics.info.get("policy", ""),
        )
