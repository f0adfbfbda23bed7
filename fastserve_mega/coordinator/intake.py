"""Where requests come in: refused, begun, gone on with, or answered again."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from fastserve_mega.coordinator.admission import Admission, Gate
from fastserve_mega.coordinator.live_request import LiveRequest, LiveRequests
from fastserve_mega.messaging.frames import Identity
from fastserve_mega.messaging.messages import Cancel, Finished, Message, Refused, Submit
from fastserve_mega.metrics.requests import RequestMetrics
from fastserve_mega.types import FinishReason, RequestId, Usage

_KEPT_S = 60.0
_MOST_TOKENS = 2_000_000
"""Tokens of all kept answers and their prompts, 4 to 40 bytes each; the oldest make room."""
_LOGPROBS_WEIGHT = 50
"""Log probabilities of a token take the memory of so many tokens."""
_NUMBER_BYTES = 4
_WORTH_TOKENS = 1_000_000
"""A queue is worth the trouble when so many prompt tokens of it have gone: some megabytes."""
_LEFT_SHARE = 0.5
"""The rest of it is less than this."""


class Intake:
    """Answers `Submit`, and `Cancel` of what is not there.

    A request that it takes is among the live ones, and waits at the gate.
    """

    def __init__(
        self,
        *,
        requests: LiveRequests,
        admission: Admission,
        prefix_block_size: int | None,
        metrics: RequestMetrics,
        reply: Callable[[Identity, Message | bytes], None],
        now: float,
    ) -> None:
        """Nothing has come yet.

        Args:
            requests: the live ones, of which it gets more.
            admission: its limits.
            prefix_block_size: tokens of a block; None without prefix cache.
            metrics: count what came, and what was rejected.
            reply: sends a message to a client.
            now: time of the coordinator's clock.
        """
        self._requests = requests
        self._admission = admission
        self._prefix_block_size = prefix_block_size
        self._metrics = metrics
        self._reply = reply
        self.gate = Gate(now)
        """Through which requests go to a replica."""
        self.kept = KeptAnswers()
        """For those who ask again."""
        self._heap = HeapTrimmer()
        self.draining = False
        """Whether nothing new is accepted any more."""

    def submit(self, client: Identity, submit: Submit, now: float) -> None:
        """Take a request, go on with one that is known, or say why not."""
        request_id = submit.request_id
        if live := self._requests.get(request_id):
            self._resume(client, live, submit)
            return
        if kept := self.kept.get(request_id, now):
            self._repeat(client, kept, submit, now)
            return
        self._accept(client, submit, now)

    def find(self, client: Identity, cancel: Cancel) -> LiveRequest | None:
        """The request that a client wants to end, or say that there is none."""
        live = self._requests.get(cancel.request_id)
        if live is not None and live.client == client:
            return live
        # It may have finished while the message travelled: an answer, but no harm done.
        message = f"no unfinished request {cancel.request_id!r} of this client"
        self._reply(client, Refused(message, cancel.request_id))
        return None

    def forget(self, live: LiveRequest, reason: FinishReason, now: float) -> None:
        """Take in that a request has ended, whose answer may be kept."""
        self._requests.remove(live)
        self.gate.leave(live)
        self.kept.keep(live, reason, now)

    def end_turn(self) -> None:
        """Give back the memory of a queue that has gone, of which nobody knows any more."""
        self._heap.observe(self._requests.num_prompt_tokens)

    def _accept(self, client: Identity, submit: Submit, now: float) -> LiveRequest | None:
        """Begin with a request, or answer why not."""
        request_id = submit.request_id
        if refusal := self._admission.refusal(submit):
            self._reply(client, Refused(refusal, request_id))
            return None
        requests = self._requests
        if busy := self._admission.rejection(
            len(requests), requests.num_prompt_tokens, draining=self.draining
        ):
            usage = Usage(len(submit.prompt), len(submit.received))
            self._reply(client, Finished(request_id, FinishReason.REJECTED, usage, busy))
            self._metrics.observe_rejection()
            return None
        # KV that is there already has no logits.
        shares_kv = not submit.params.prompt_logprobs
        block_size = self._prefix_block_size if shares_kv else None
        live = LiveRequest(submit, client, now, list(submit.received), block_size)
        self._requests.add(live)
        self.gate.enter(live, now)
        return live

    def _resume(self, client: Identity, live: LiveRequest, submit: Submit) -> None:
        """Take the same request again: its client lost the connection and holds some tokens."""
        if not live.is_same(submit):
            self._refuse_id(client, submit)
            return
        self._requests.move(live, client)
        for scored in live.scored:
            self._reply(client, scored)
        held = len(submit.received)
        if held < len(live.output):
            self._reply(client, live.tokens_from(held))

    def _repeat(self, client: Identity, kept: KeptAnswer, submit: Submit, now: float) -> None:
        """Send a kept answer again, and go on with it if it is not whole."""
        if not kept.live.is_same(submit):
            self._refuse_id(client, submit)
            return
        held, output = len(submit.received), kept.live.output
        told = kept.live.tokens_from(held)
        if kept.is_whole:
            if held < len(output):
                self._reply(client, told)
            self._reply(client, Finished(submit.request_id, kept.reason, kept.live.usage))
            return
        if held < len(output):
            submit = msgspec.structs.replace(submit, received=tuple(output))
        if (live := self._accept(client, submit, now)) is None:
            return
        self.kept.take(submit.request_id, now)
        if held < len(output):
            live.logprobs = list(kept.live.logprobs)
            self._reply(client, told)

    def _refuse_id(self, client: Identity, submit: Submit) -> None:
        message = f"request id {submit.request_id!r} is in use by another request"
        self._reply(client, Refused(message, submit.request_id, in_use=True))


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


class HeapTrimmer:
    """Has the C library return what is free, once most of a long queue has gone.

    It keeps what is freed for later: what a full queue took would stay with the process for ever.

    Args:
        trim: does that; None takes glibc's, and nothing where there is another library.
    """

    def __init__(self, trim: Callable[[], object] | None = None) -> None:
        self._trim = trim or _find_trim()
        self._most = 0
        """Most tokens since the last time."""

    def observe(self, tokens: int) -> None:
        """Take in how many prompt tokens wait; trim where that is worth it."""
        self._most = max(self._most, tokens)
        if self._most - tokens > _WORTH_TOKENS and tokens < _LEFT_SHARE * self._most:
            self._most = tokens
            self._trim()


def _find_trim() -> Callable[[], object]:
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda: None
    return lambda: malloc_trim(ctypes.c_size_t(0))
