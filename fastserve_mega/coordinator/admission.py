"""Which requests are taken in: the checks between a well-formed message and the scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastserve_mega.messaging.messages import Submit
from fastserve_mega.scheduling.scheduler import Scheduler

_MAX_ID_LENGTH = 256
_MAX_PRIORITY = 1_000
_MAX_SALT_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Admission:
    """The limits of this server."""

    vocab_size: int
    max_context: int
    max_queued_requests: int
    schedulers: Sequence[Scheduler]
    """Of all replicas: a request must fit into each of them."""

    def refusal(self, submit: Submit) -> str | None:
        """What is wrong with a request, as one sentence with the value and the limit."""
        return self._bad_identity(submit) or self._bad_tokens(submit) or self._bad_length(submit)

    def rejection(self, unfinished: int, *, draining: bool) -> str | None:
        """Why a good request is not taken now, as one sentence; trying again later may do."""
        if draining:
            return "the server is shutting down"
        if unfinished >= self.max_queued_requests:
            return (
                f"{unfinished} requests are unfinished, the limit is {self.max_queued_requests} "
                "(scheduler.max_queued_requests)"
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
        if len(submit.cache_salt) > _MAX_SALT_LENGTH:
            return (
                f"cache_salt must have at most {_MAX_SALT_LENGTH} characters, "
                f"got {len(submit.cache_salt)}"
            )
        timeout_s = submit.timeout_s
        if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s > 0):
            return f"timeout_s must be a positive number, got {timeout_s}"
        return None

    def _bad_tokens(self, submit: Submit) -> str | None:
        if not submit.prompt:
            return "the prompt must have at least 1 token, got 0"
        named = {
            "prompt": submit.prompt,
            "received": submit.received,
            "logit_bias": submit.params.logit_bias,
        }
        for name, tokens in named.items():
            for token in (min(tokens, default=0), max(tokens, default=0)):
                if not 0 <= token < self.vocab_size:
                    return (
                        f"{name} token ids must be between 0 and {self.vocab_size - 1}, got {token}"
                    )
        return None

    def _bad_length(self, submit: Submit) -> str | None:
        prompt, limit = len(submit.prompt), submit.params.max_tokens
        if prompt + limit > self.max_context:
            return (
                f"{prompt} prompt tokens and max_tokens {limit} exceed the context of "
                f"{self.max_context} tokens"
            )
        if len(submit.received) >= limit:
            return f"{len(submit.received)} tokens were received already, max_tokens is {limit}"
        refusals = (scheduler.refusal(prompt, limit) for scheduler in self.schedulers)
        return next((refusal for refusal in refusals if refusal), None)
