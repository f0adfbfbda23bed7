"""Unfinished requests as the coordinator holds them: tokens, block hashes, clients, deadlines."""

from __future__ import annotations

import heapq
import itertools
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from fastserve_mega.messaging.frames import Identity
from fastserve_mega.messaging.messages import PromptLogprobs, Submit, Tokens
from fastserve_mega.messaging.rank_messages import SequenceStart
from fastserve_mega.scheduling.events import Arrived
from fastserve_mega.types import (
    BlockHash,
    Interruption,
    RequestId,
    SamplingParams,
    Timings,
    TokenLogprobs,
    Usage,
)

_DIGEST_BYTES = 16
"""128 bits: no two contents with the same hash are ever found."""
_FEW_DEADLINES = 64
_MOST_INTERRUPTIONS = 50


def hash_blocks(tokens: Sequence[int], block_size: int, before: bytes) -> list[bytes]:
    """Hash each full block of some tokens (0 to 2**32 - 1), together with the hash before it.

    The hashes name KV blocks for the prefix cache, since the scheduler sees no tokens: equal ones
    mean equal tokens from the start of the prompt on, and the same salt.

    Args:
        tokens: from the beginning of a block on.
        block_size: tokens of a block.
        before: the hash of the block before; of the salt at the start.
    """
    hashes = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        block = array("I", tokens[start : start + block_size]).tobytes()
        before = blake2b(before + block, digest_size=_DIGEST_BYTES).digest()
        hashes.append(before)
    return hashes


@dataclass(slots=True, eq=False)
class LiveRequest:
    """An unfinished request."""

    submit: Submit
    """As it came, but without its tokens."""
    client: Identity
    arrived_at: float
    """All times are the coordinator's clock's, in seconds."""
    output: list[int]
    """All output tokens, those the client brought along included."""
    block_size: int | None = None
    """Tokens of a block whose hash the scheduler is told; None where it shares no KV."""
    last_hash: bytes = b""
    """Of the last full block of its tokens."""
    replica: int | None = None
    """Where it was placed; None while no replica knows of it."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV existed when it first ran."""
    started_at: float | None = None
    """When its first step was dispatched; from then on the workers know its parameters."""
    first_token_at: float | None = None
    last_token_at: float | None = None
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """One for each output token, None for what the client brought along; empty when not asked
    for."""
    scored: list[PromptLogprobs] = field(default_factory=list)
    """What its client was told of its prompt."""
    embedding: bytes = b""
    """What its prompt is embedded as, once it has its token; empty unless it asks for that."""
    away: tuple[float, bool] | None = None
    """While it is preempted: since when, and whether its KV is in host memory."""
    interruptions: list[Interruption] = field(default_factory=list)
    request_id: RequestId = field(init=False)
    params: SamplingParams = field(init=False)
    prompt: array[int] = field(init=False)
    """4 bytes a token, where a tuple takes 40: thousands of them wait in a full queue."""
    seed: int = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.request_id, self.params = self.submit.request_id, self.submit.params
        # A client that sends no seed cannot rely on one, but resubmits under the same id.
        self.prompt = array("I", self.submit.prompt)
        self.submit = msgspec.structs.replace(self.submit, prompt=(), received=())
        chosen = self.params.seed
        self.seed = zlib.crc32(self.request_id.encode()) if chosen is None else chosen
        self.stop_token_ids = frozenset(self.params.stop_token_ids)
        if self.params.logprobs is not None:
            self.logprobs = [None] * len(self.output)

    def is_same(self, submit: Submit) -> bool:
        """Whether a message is about this very request, sent again."""
        return (
            submit.fingerprint == self.submit.fingerprint
            and submit.params == self.params
            and submit.prompt == tuple(self.prompt)
        )

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), len(self.output), self.num_cached_tokens)

    def arrived(self) -> Arrived:
        """What a scheduler is told of it, once: of lengths, and not of tokens."""
        return Arrived(
            self.request_id,
            num_prompt_tokens=len(self.prompt),
            max_tokens=self.params.max_tokens,
            num_received_tokens=len(self.output),
            priority=self.submit.priority,
            block_hashes=self._hash_all(),
            client=self.submit.client or self.client.hex(),
            weight=self.submit.weight,
            expected_output_tokens=self.submit.expected_output_tokens,
            session=self.submit.session,
        )

    def _hash_all(self) -> tuple[BlockHash, ...]:
        if self.block_size is None:
            return ()
        salt = self.submit.cache_salt.encode()
        self.last_hash = blake2b(salt, digest_size=_DIGEST_BYTES).digest()
        hashes = hash_blocks((*self.prompt, *self.output), self.block_size, self.last_hash)
        self.last_hash = hashes[-1] if hashes else self.last_hash
        return tuple(BlockHash(each.hex()) for each in hashes)

    def hash_of_filled_block(self) -> BlockHash | None:
        """The hash of the block that its newest token fills; None when it fills none."""
        end = len(self.prompt) + len(self.output)
        if self.block_size is None or end % self.block_size:
            return None
        tokens = self.tokens(end - self.block_size, end)
        [self.last_hash] = hash_blocks(tokens, self.block_size, self.last_hash)
        return BlockHash(self.last_hash.hex())

    @property
    def sequence_start(self) -> SequenceStart:
        """What the workers must know before its first slice."""
        prompt, params = self.prompt, self.params
        return SequenceStart(
            self.request_id,
            params,
            self.seed,
            len(prompt),
            tuple(prompt) if params.repetition_penalty != 1.0 or params.prompt_logprobs else (),
            tuple(self.output) if params.needs_history else (),
        )

    def begin(self, num_computed_tokens: int, now: float) -> None:
        """Take part in a first step, with so many tokens computed already."""
        self.started_at = now
        self.num_cached_tokens = min(num_computed_tokens, len(self.prompt))

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens [start, end), from the prompt and the output so far."""
        prompt = self.prompt
        begun = len(prompt)
        if start >= begun:
            return tuple(self.output[start - begun : end - begun])
        return (*prompt[start:end], *self.output[: max(end - begun, 0)])

    def append(self, token: int, logprobs: TokenLogprobs | None, now: float) -> None:
        """Take an output token."""
        self.output.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.first_token_at = self.first_token_at or now
        self.last_token_at = now

    def go_away(self, now: float, *, swapped: bool) -> None:
        """Be preempted; or lose the KV that was swapped then."""
        since = self.away[0] if self.away else now
        self.away = (since, swapped)

    def come_back(self, now: float) -> None:
        """Be in a step again, if it was preempted."""
        if self.away is not None and len(self.interruptions) < _MOST_INTERRUPTIONS:
            since, swapped = self.away
            arrived = self.arrived_at
            self.interruptions.append(Interruption(since - arrived, now - arrived, swapped))
        self.away = None

    def timings(self, now: float) -> Timings:
        """What its client is told at the end."""
        started, first = (
            None if at is None else at - self.arrived_at
            for at in (self.started_at, self.first_token_at)
        )
        return Timings(now - self.arrived_at, started, first, tuple(self.interruptions))

    def score(self, start: int, logprobs: tuple[TokenLogprobs, ...]) -> PromptLogprobs:
        """Take log probabilities of prompt tokens from `start` on; returns what to tell."""
        told = PromptLogprobs(self.request_id, start, logprobs)
        self.scored.append(told)
        return told

    def tokens_from(self, offset: int) -> Tokens:
        """The output from `offset` on, as its client is told."""
        return Tokens(
            self.request_id,
            offset,
            tuple(self.output[offset:]),
            tuple(self.logprobs[offset:]),
            self.embedding,
        )


class LiveRequests:
    """All unfinished requests, found by id, by client, and by when their time runs out.

    Most requests end long before their deadline, so entries of the heap become worthless; they are
    removed when they are more than those that count, which costs nothing on average.
    """

    def __init__(self) -> None:
        self._by_id: dict[RequestId, LiveRequest] = {}
        self._by_client: dict[Identity, dict[RequestId, LiveRequest]] = {}
        self._deadlines: list[tuple[float, int, LiveRequest]] = []
        """A heap; the number makes entries comparable."""
        self._numbers = itertools.count()
        self.num_prompt_tokens = 0
        """How many tokens the prompts of all of them have together."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __getitem__(self, request_id: RequestId) -> LiveRequest:
        return self._by_id[request_id]

    def __contains__(self, live: LiveRequest) -> bool:
        """Whether this very request is unfinished; its id may have been given again."""
        return self._by_id.get(live.request_id) is live

    def get(self, request_id: RequestId) -> LiveRequest | None:
        return self._by_id.get(request_id)

    def all(self) -> list[LiveRequest]:
        return list(self._by_id.values())

    def of_client(self, client: Identity) -> list[LiveRequest]:
        return list(self._by_client.get(client, {}).values())

    def clients(self) -> Iterable[Identity]:
        """The clients that have unfinished requests."""
        return self._by_client.keys()

    def add(self, live: LiveRequest) -> None:
        self._by_id[live.request_id] = live
        self.num_prompt_tokens += len(live.prompt)
        self._by_client.setdefault(live.client, {})[live.request_id] = live
        if (timeout_s := live.submit.timeout_s) is not None:
            deadline = live.arrived_at + timeout_s
            heapq.heappush(self._deadlines, (deadline, next(self._numbers), live))

    def move(self, live: LiveRequest, client: Identity) -> None:
        """Another connection takes a request over."""
        self._leave_client(live)
        live.client = client
        self._by_client.setdefault(client, {})[live.request_id] = live

    def remove(self, live: LiveRequest) -> None:
        """Forget a request that has ended."""
        del self._by_id[live.request_id]
        self.num_prompt_tokens -= len(live.prompt)
        self._leave_client(live)
        if len(self._deadlines) > 2 * len(self._by_id) + _FEW_DEADLINES:
            self._deadlines = sorted(entry for entry in self._deadlines if entry[2] in self)

    def next_deadline(self) -> float | None:
        """When the first of them runs out of its time."""
        while self._deadlines and self._deadlines[0][2] not in self:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def take_overdue(self, now: float) -> Iterator[LiveRequest]:
        """Requests whose deadline has come, the earliest first; each is named once."""
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            yield heapq.heappop(self._deadlines)[2]

    def _leave_client(self, live: LiveRequest) -> None:
        requests = self._by_client[live.client]
        del requests[live.request_id]
        if not requests:
            del self._by_client[live.client]
