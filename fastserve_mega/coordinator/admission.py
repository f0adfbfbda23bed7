"""Which requests are taken in, and when: what stands between a good message and the scheduler."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain

from fastserve_mega.coordinator.live_request import LiveRequest
from fastserve_mega.messaging.frames import MAX_FRAME_BYTES
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.types import BACKGROUND_PRIORITY, SamplingParams

MAX_FAILED_ATTEMPTS = 2
"""A request is given up after so many losses in a row."""
PASSED_TOO_LONG = "it has waited for scheduler.max_wait_s: others came that went before it"
_PROBATION_S = 60.0
"""Clients submit again what ranks were lost with within this time of the start. Later, nobody can
make others wait by saying so."""
_MAX_ID_LENGTH = 256
_MAX_PRIORITY = BACKGROUND_PRIORITY
_LEAST_WEIGHT, _MOST_WEIGHT = 0.001, 1000.0
_MAX_FINGERPRINT_LENGTH = 128
_MAX_NAME_LENGTH = 256
_TOKEN_BYTES = 5
_NUMBER_BYTES = 9
_CHARACTER_BYTES = 4
_OTHER_BYTES = 4096
"""What else is in a frame that tells a rank of a request, at most."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The limits of this server."""

    vocab_size: int
    eos_token_ids: Collection[int]
    max_context: int
    max_queued_requests: int
    max_queued_tokens: int
    max_wait_s: float = math.inf
    """Longest wait for a first step."""

    def refusal(self, submit: Submit) -> str | None:
        """What is wrong with a request, as one sentence with the value and the limit."""
        return (
            self._bad_identity(submit)
            or self._given_up(submit)
            or self._bad_tokens(submit)
            or self._bad_length(submit)
            or self._nothing_to_sample(submit.params)
            or self._bad_size(submit)
        )

    def rejection(self, unfinished: int, prompt_tokens: int, *, draining: bool) -> str | None:
        """Why a good request is not taken now, as one sentence; trying again later may do.

        Args:
            unfinished: requests that have not ended.
            prompt_tokens: of all of these.
            draining: nothing new is taken.
        """
        if draining:
            return "the server is shutting down"
        if unfinished >= self.max_queued_requests:
            return (
                f"{unfinished} requests are unfinished, the limit is {self.max_queued_requests} "
                "(scheduler.max_queued_requests)"
            )
        if prompt_tokens >= self.max_queued_tokens:
            return (
                f"the prompts of unfinished requests have {prompt_tokens} tokens, the limit is "
                f"{self.max_queued_tokens} (scheduler.max_queued_tokens)"
            )
        return None

    @staticmethod
    def _bad_identity(submit: Submit) -> str | None:
        if not 1 <= len(submit.request_id) <= _MAX_ID_LENGTH:
            return (
                f"request_id must have 1 to {_MAX_ID_LENGTH} characters, "
                f"got {len(submit.request_id)}"
            )
        if abs(submit.priority) > _MAX_PRIORITY:
            return (
                f"priority must be between -{_MAX_PRIORITY} and {_MAX_PRIORITY}, "
                f"got {submit.priority}"
            )
        names = (
            ("cache_salt", submit.cache_salt, _MAX_NAME_LENGTH),
            ("client", submit.client, _MAX_NAME_LENGTH),
            ("session", submit.session, _MAX_NAME_LENGTH),
            ("fingerprint", submit.fingerprint, _MAX_FINGERPRINT_LENGTH),
        )
        for name, text, most in names:
            if len(text) > most:
                return f"{name} must have at most {most} characters, got {len(text)}"
        if not _LEAST_WEIGHT <= submit.weight <= _MOST_WEIGHT:
            return f"weight must be between {_LEAST_WEIGHT} and {_MOST_WEIGHT}, got {submit.weight}"
        timeout_s = submit.timeout_s
        if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s > 0):
            return f"timeout_s must be a positive number, got {timeout_s}"
        return None

    @staticmethod
    def _given_up(submit: Submit) -> str | None:
        if submit.failed_attempts < 0:
            return f"failed_attempts must not be negative, got {submit.failed_attempts}"
        if submit.failed_attempts >= MAX_FAILED_ATTEMPTS:
            return (
                f"the ranks were lost {submit.failed_attempts} times in a row while they computed "
                f"this request; it is given up after {MAX_FAILED_ATTEMPTS}"
            )
        return None

    def _bad_tokens(self, submit: Submit) -> str | None:
        if not submit.prompt:
            return "the prompt must have at least 1 token, got 0"
        named = {
            "prompt": submit.prompt,
            "received": submit.received,
            "logit_bias": submit.params.logit_bias,
            "allowed_token_ids": submit.params.allowed_token_ids,
            "bad_words": [*chain(*submit.params.bad_words)],
        }
        for name, tokens in named.items():
            for token in (min(tokens, default=0), max(tokens, default=0)):
                if not 0 <= token < self.vocab_size:
                    return (
                        f"{name} token ids must be between 0 and {self.vocab_size - 1}, got {token}"
                    )
        return None

    def _bad_length(self, submit: Submit) -> str | None:
        # The one place where max_tokens meets what the server can hold: the context is that of the
        # model, or what the smallest KV pool has room for.
        num_prompt_tokens, max_tokens = len(submit.prompt), submit.params.max_tokens
        if num_prompt_tokens + max_tokens > self.max_context:
            return (
                f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed the context "
                f"of {self.max_context} tokens"
            )
        if len(submit.received) >= max_tokens:
            return (
                f"{len(submit.received)} tokens were received already, max_tokens is {max_tokens}"
            )
        return None

    def _nothing_to_sample(self, params: SamplingParams) -> str | None:
        held_back = {each[0] for each in params.bad_words if len(each) == 1}
        if params.min_tokens:
            held_back |= {*self.eos_token_ids, *params.stop_token_ids}
        allowed = set(params.allowed_token_ids)
        if allowed:
            if allowed - held_back:
                return None
        elif sum(token < self.vocab_size for token in held_back) < self.vocab_size:
            return None
        return (
            f"nothing is left to sample: bad_words, and end-of-sequence and stop tokens, which "
            f"min_tokens {params.min_tokens} holds back, are all "
            f"{len(allowed) or self.vocab_size} tokens "
            f"{'of allowed_token_ids' if allowed else 'of the vocabulary'}"
        )

    @staticmethod
    def _bad_size(submit: Submit) -> str | None:
        """Say when a rank would not take the frame that tells it of the request."""
        size = bytes_to_tell(submit)
        if size > MAX_FRAME_BYTES:
            return (
                f"the request takes up to {size} bytes to tell a rank of it, the limit is "
                f"{MAX_FRAME_BYTES}"
            )
        return None


class Gate:
    """Lets new requests through to the replicas.

    All pass at once, but for suspects: requests that lost ranks were computing, without a token
    since. They go before all others and one at a time, until their next token or end. When ranks
    are lost again it is then known with which of them.

    Args:
        opened: when the coordinator started, seconds.
    """

    def __init__(self, opened: float) -> None:
        self._opened = opened
        self._suspects: deque[LiveRequest] = deque()
        self._others: deque[LiveRequest] = deque()
        self._on_trial: LiveRequest | None = None

    def enter(self, live: LiveRequest, now: float) -> None:
        """Line up."""
        suspected = live.submit.failed_attempts > 0 and now - self._opened < _PROBATION_S
        (self._suspects if suspected else self._others).append(live)

    def pass_through(self) -> list[LiveRequest]:
        """Requests whose turn it is."""
        if self._on_trial is not None:
            return []
        if self._suspects:
            self._on_trial = self._suspects.popleft()
            return [self._on_trial]
        passed = list(self._others)
        self._others.clear()
        return passed

    def clear(self, live: LiveRequest) -> None:
        """A request yielded a token, so it is not suspected any more."""
        if self._on_trial is live:
            self._on_trial = None

    def leave(self, live: LiveRequest) -> None:
        """A request ended, wherever it is."""
        self.clear(live)
        for line in (self._suspects, self._others):
            if live in line:
                line.remove(live)


def bytes_to_tell(submit: Submit) -> int:
    """Largest size of the frame that tells a rank of a request."""
    params = submit.params
    texts: tuple[str, ...] = ()
    if (structured := params.structured) is not None:
        given = (structured.json_schema, structured.regex, *(structured.choice or ()))
        texts = tuple(text for text in given if text is not None)
    return (
        _OTHER_BYTES
        + _TOKEN_BYTES * (len(submit.prompt) + len(submit.received) + len(texts))
        + _NUMBER_BYTES * (len(params.stop_token_ids) + 2 * len(params.logit_bias))
        + _NUMBER_BYTES * (len(params.allowed_token_ids) + len(params.bad_words))
        + _NUMBER_BYTES * sum(map(len, params.bad_words))
        + _CHARACTER_BYTES * (sum(map(len, texts)) + len(submit.request_id))
    )
