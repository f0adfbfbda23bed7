"""One request as the coordinator holds it: its tokens, its client, and when it ends."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from fastserve_mega.coordinator.block_hashes import BlockHashChain
from fastserve_mega.messaging.messages import SequenceStart, Submit, Tokens
from fastserve_mega.messaging.router import Identity
from fastserve_mega.metrics import RequestTimes
from fastserve_mega.plan import SequenceSlice
from fastserve_mega.types import (
    FinishReason,
    RequestId,
    SamplingParams,
    TokenLogprobs,
    Usage,
)


@dataclass(slots=True, eq=False)
class LiveRequest:
    """An unfinished request."""

    submit: Submit
    client: Identity
    arrived: float
    deadline: float | None
    """When it ends with `timeout`, on the coordinator's clock."""
    output: list[int]
    """All output tokens, those the client brought along included."""
    block_hashes: BlockHashChain | None = None
    """Of all its tokens; None without prefix cache."""
    replica: int = 0
    """Where it was placed."""
    placed: bool = False
    """Its replica knows of it."""
    started: bool = False
    """The workers know its sampling parameters."""
    cached_tokens: int = 0
    """Prompt tokens whose KV existed when it first ran."""
    started_at: float | None = None
    """Its first step was dispatched."""
    first_token_at: float | None = None
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """Of the output, None for what the client brought along; empty when not asked for."""
    last_token_at: float | None = None
    seed: int = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        # A client that sends no seed cannot rely on one, but resubmits under the same id.
        chosen = self.submit.params.seed
        self.seed = zlib.crc32(self.request_id.encode()) if chosen is None else chosen
        self.stop_token_ids = frozenset(self.params.stop_token_ids)
        if self.params.logprobs is not None:
            self.logprobs = [None] * len(self.output)

    @property
    def request_id(self) -> RequestId:
        return self.submit.request_id

    @property
    def params(self) -> SamplingParams:
        return self.submit.params

    @property
    def usage(self) -> Usage:
        return Usage(len(self.submit.prompt), len(self.output), self.cached_tokens)

    @property
    def sequence_start(self) -> SequenceStart:
        prompt, params = self.submit.prompt, self.params
        return SequenceStart(
            self.request_id,
            params,
            self.seed,
            len(prompt),
            prompt if params.repetition_penalty != 1.0 else (),
            tuple(self.output) if params.needs_history else (),
        )

    def times(self, ended: float) -> RequestTimes:
        """For the metrics, at its end."""
        return RequestTimes(
            self.arrived, self.started_at, self.first_token_at, self.last_token_at, ended
        )

    def begin(self, computed_tokens: int, now: float) -> None:
        """It takes part in its first step, with this many tokens computed already."""
        self.started = True
        self.started_at = now
        self.cached_tokens = min(computed_tokens, len(self.submit.prompt))

    def input_tokens(self, piece: SequenceSlice) -> tuple[int, ...]:
        """The tokens of a slice, from the prompt and the output so far."""
        prompt = self.submit.prompt
        start, end = piece.start, piece.start + piece.num_tokens
        if end <= len(prompt):
            return prompt[start:end]
        tail = self.output[max(start - len(prompt), 0) : end - len(prompt)]
        return (*prompt[start:], *tail)

    def tokens_from(self, offset: int) -> Tokens:
        """The output from `offset` on, as its client is told."""
        return Tokens(
            self.request_id, offset, tuple(self.output[offset:]), tuple(self.logprobs[offset:])
        )

    def accept(
        self, token: int, logprobs: TokenLogprobs | None, eos_token_ids: frozenset[int]
    ) -> FinishReason | None:
        """Append an output token; the reason when it is the last one."""
        self.output.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        params = self.params
        if len(self.output) >= params.min_tokens and (
            token in self.stop_token_ids or (token in eos_token_ids and not params.ignore_eos)
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.output) >= params.max_tokens else None
