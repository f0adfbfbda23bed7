"""Measures step times on the running workers, before any request is let in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from fastserve_mega.coordinator.worker_group import WorkerGroup, WorkersLostError
from fastserve_mega.messaging.messages import SequenceStart, StepCommand, StepResult
from fastserve_mega.plan import Plan, SequenceSlice
from fastserve_mega.scheduling.cost_model import DecodePoint, PrefillPoint, Profile
from fastserve_mega.types import RequestId, SamplingParams

_TOKEN = 1


@dataclass(frozen=True, slots=True)
class ProfileLimits:
    """What the server to be measured can hold."""

    device_blocks: int
    block_size: int
    max_batch_size: int
    max_batch_tokens: int
    max_context: int

    @property
    def max_prefill(self) -> int:
        """Tokens of the longest prefill in one step that leaves room to decode once."""
        room = (self.device_blocks - 1) * self.block_size - 1
        return max(min(self.max_batch_tokens, self.max_context - 1, room), 1)

    def max_decodes(self, context: int) -> int:
        """Requests of `context` tokens that can decode in one step."""
        blocks_each = -(-(context + 1) // self.block_size)
        return min(
            self.max_batch_size, self.max_batch_tokens, (self.device_blocks - 1) // blocks_each
        )


class Profiler:
    """Runs steps of its own on the workers. Its step ids come before the scheduler's."""

    def __init__(self, workers: WorkerGroup, limits: ProfileLimits, timeout_s: float) -> None:
        self._workers = workers
        self._limits = limits
        self._timeout_s = timeout_s
        self._sequences = 0
        self._previous: tuple[RequestId, ...] = ()
        self.steps = 0
        """How many have run; also the next step id."""

    def self_measurement(self) -> Profile:
        """A few steps of each kind: seconds on a CPU, less on a GPU."""
        limits = self._limits
        lengths = sorted({max(limits.max_prefill // divisor, 1) for divisor in (1, 4, 16, 64)})
        contexts = sorted({min(16, limits.max_prefill // 2), limits.max_prefill // 2})
        self.prefill_s(lengths[0])  # the first steps pay for lazy initialization
        self.decode_s(1, contexts[0])
        prefill = tuple(PrefillPoint(length, self.prefill_s(length)) for length in lengths)
        decode = tuple(
            DecodePoint(batch, context, self.decode_s(batch, context))
            for context in contexts
            for batch in sorted(
                {1, -(-limits.max_decodes(context) // 4), limits.max_decodes(context)}
            )
        )
        return Profile(prefill, decode)

    def prefill_s(self, tokens: int, repeats: int = 2) -> float:
        """The fastest of `repeats` prefills of one prompt, seconds."""
        return min(self._run([(0, tokens)]) for _ in range(repeats))

    def decode_s(self, batch: int, context: int, repeats: int = 3) -> float:
        """The fastest of `repeats` decode steps of equal requests, seconds.

        Their KV is whatever the pool holds: the time of a step does not depend on values.
        """
        return min(self._run([(context, 1)] * batch) for _ in range(repeats))

    def _run(self, shapes: list[tuple[int, int]]) -> float:
        """One step of (start, num_tokens) slices, seconds from dispatch to result."""
        names = [RequestId(f"profile-{self._sequences + i}") for i in range(len(shapes))]
        self._sequences += len(shapes)
        params = SamplingParams(max_tokens=1, temperature=0.0)
        blocks = self._block_tables(shapes)
        batch = tuple(
            SequenceSlice(name, start, tokens, True, 0, next(blocks))
            for name, (start, tokens) in zip(names, shapes, strict=True)
        )
        command = StepCommand(
            plan=Plan(step_id=self.steps, batch=batch, released=self._previous),
            token_ids=tuple((_TOKEN,) * tokens for _, tokens in shapes),
            started=tuple(SequenceStart(name, params, 0, 1) for name in names),
        )
        self._previous = tuple(names)
        self.steps += 1
        begin = time.monotonic()
        self._workers.dispatch(command)
        self._await(command.plan.step_id, begin + self._timeout_s)
        return time.monotonic() - begin

    def _block_tables(self, shapes: list[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
        first = 1
        for start, tokens in shapes:
            count = -(-(start + tokens) // self._limits.block_size)
            yield tuple(range(first, first + count))
            first += count

    def _await(self, step_id: int, deadline: float) -> None:
        while (left_s := deadline - time.monotonic()) > 0:
            if self._workers.wait(left_s) and any(
                isinstance(result, StepResult) and result.step_id == step_id
                for result in self._workers.results()
            ):
                return
        raise WorkersLostError(
            f"profiling step {step_id} has not returned within {self._timeout_s:g} s"
        )
