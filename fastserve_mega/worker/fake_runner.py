"""A runner without a model, for tests of everything around it."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import replace

from fastserve_mega.messaging.rank_messages import ScoredPrompt
from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.types import TokenLogprobs
from fastserve_mega.worker.copy_engine import CopyEngine
from fastserve_mega.worker.model_runner import Ask, Launched, SequenceInput, StepOutput, Verdict

_COPY_TIMEOUT_S = 60.0
_TOKEN_BYTES = 4


class FakeModelRunner:
    """Generates tokens that depend on the whole context *as read back through the block table*.

    Its KV pools hold token ids. So a block that is given to two requests, freed too early, copied
    too late, or missing from a table changes the tokens, as it would with a model.
    """

    def __init__(
        self,
        *,
        device_blocks: int,
        block_size: int,
        vocab_size: int,
        host_blocks: int = 0,
        is_sampling_rank: bool = True,
        looks_ahead: bool = False,
        launches_ahead: bool = False,
    ) -> None:
        self._pool = [[-1] * block_size for _ in range(device_blocks)]
        self._host_pool = [[-1] * block_size for _ in range(host_blocks)]
        self._copies = CopyEngine(self.move, timeout_s=_COPY_TIMEOUT_S)
        self._is_sampling_rank = is_sampling_rank
        self.block_size = block_size
        self.looks_ahead = looks_ahead
        self.launches_ahead = launches_ahead
        self._drawn: list[int] = []
        self._vocab_size = vocab_size
        self.steps = 0
        self.abandoned_steps = 0

    @property
    def device_blocks(self) -> int:
        return len(self._pool)

    @property
    def host_blocks(self) -> int:
        return len(self._host_pool)

    @property
    def block_bytes(self) -> int:
        return self.block_size * _TOKEN_BYTES

    @property
    def copies(self) -> CopyEngine:
        return self._copies

    @property
    def is_sampling_rank(self) -> bool:
        return self._is_sampling_rank

    def execute(self, batch: Sequence[SequenceInput]) -> StepOutput:
        self.steps += 1
        for sequence in batch:
            for position, token in enumerate(sequence.token_ids, sequence.start):
                block = sequence.block_table[position // self.block_size]
                self._pool[block][position % self.block_size] = token
        return StepOutput(
            [
                fake_token(self._read(sequence), self._vocab_size)
                for sequence in batch
                if sequence.samples
            ],
            scored=tuple(
                ScoredPrompt(index, sequence.start + 1, _fake_scores(sequence))
                for index, sequence in enumerate(batch)
                if sequence.scored
            ),
            embeddings=tuple(
                fake_embedding(self._read(sequence)) for sequence in batch if sequence.embeds
            ),
        )

    def execute_ahead(self, batch: Sequence[SequenceInput], ask: Ask) -> StepOutput | None:
        verdict = ask()
        output = None if verdict is Verdict.ABANDON else self.execute(batch)
        if verdict is Verdict.UNKNOWN and ask() is Verdict.ABANDON:
            output = None
        self.abandoned_steps += output is None
        return output

    def launch(self, batch: Sequence[SequenceInput]) -> Launched:
        """A device that computes at once; the host looks later."""
        known = [
            replace(each, token_ids=(self._drawn[-1 - each.token_ids[0]],))
            if each.token_ids[0] < 0
            else each
            for each in batch
        ]
        output = self.execute(known)
        self._drawn = list(output.token_ids)
        return lambda: output

    def move(self, copy: BlockCopy) -> None:
        """Execute a copy, in the thread of the copy engine; tests override its moment."""
        source, target = self._pool, self._host_pool
        if copy.direction is CopyDirection.SWAP_IN:
            source, target = target, source
        for here, there in zip(copy.source_ids, copy.target_ids, strict=True):
            target[there][:] = source[here]

    def close(self) -> None:
        self._copies.close()

    def _read(self, sequence: SequenceInput) -> list[int]:
        size = self.block_size
        return [
            self._pool[sequence.block_table[position // size]][position % size]
            for position in range(sequence.context)
        ]


def _fake_scores(sequence: SequenceInput) -> tuple[TokenLogprobs, ...]:
    """A prompt token is as improbable as its id is large."""
    prompt = sequence.history.prompt if sequence.history else ()
    first = sequence.start + 1
    return tuple(TokenLogprobs(-float(t)) for t in prompt[first : first + sequence.scored])


def fake_embedding(context: Sequence[int]) -> bytes:
    """The first and the last token of a context, and its length."""
    return array("f", (context[0], context[-1], len(context))).tobytes()


def fake_token(context: Sequence[int], vocab_size: int) -> int:
    """The token that follows a context; never 0, which tests use as end of sequence."""
    return 1 + zlib.crc32(repr(list(context)).encode()) % (vocab_size - 1)
