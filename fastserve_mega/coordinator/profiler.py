"""Measures step times on the running workers, before any request is let in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastserve_mega.coordinator.worker_group import WorkerGroup, WorkersLostError
from fastserve_mega.messaging.messages import SequenceStart, StepCommand, StepResult
from fastserve_mega.plan import Plan, SequenceSlice
from fastserve_mega.scheduling.cost_model import DecodePoint, MixedPoint, PrefillPoint, Profile
from fastserve_mega.types import RequestId, SamplingParams

_TOKEN = 1
_GRID_ROUNDS = 7
_GRID_CONTEXTS = (16, 128, 512, 2048, 8192, 32768)
_MIXED_CONTEXTS = (128, 256, 1024)
_MIXED_PREFILLS = (16, 64, 256)


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

    @property
    def max_decode_context(self) -> int:
        """Of the longest request that can decode alone."""
        return min(self.max_context - 1, (self.device_blocks - 1) * self.block_size - 1)

    def prefill_grid(self) -> list[int]:
        """Lengths of prefills."""
        return _powers_of_two(self.max_prefill)

    def decode_grid(self) -> list[tuple[int, int]]:
        """(batch, context) of decode steps of equal requests.

        The same batches at every context, as far as they fit: a batch measured at one context only
        would say nothing of the others.
        """
        room = self.max_decode_context
        contexts = [context for context in _GRID_CONTEXTS if context <= room] or [room]
        batches = _powers_of_two(self.max_decodes(contexts[0]))
        return [
            (batch, context)
            for context in contexts
            for batch in batches
            if batch <= self.max_decodes(context)
        ]

    def mixed_grid(self) -> list[tuple[int, tuple[int, ...]]]:
        """(prefill tokens, contexts) of steps whose requests are of all ages."""
        found = []
        for mean in _MIXED_CONTEXTS:
            longest = 2 * mean
            if longest > self.max_decode_context:
                continue
            for batch in {self.max_decodes(longest), -(-self.max_decodes(longest) // 2)}:
                contexts = tuple(longest * (2 * i + 1) // (2 * batch) for i in range(batch))
                blocks = sum(-(-(context + 1) // self.block_size) for context in contexts)
                room = (self.device_blocks - 1 - blocks) * self.block_size
                limit = min(self.max_batch_tokens - batch, self.max_context - 1, room)
                lengths = (0, *(tokens for tokens in _MIXED_PREFILLS if tokens <= limit))
                found += [(tokens, contexts) for tokens in lengths]
        return sorted(found)


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … and the limit itself."""
    return [*(1 << i for i in range(limit.bit_length()) if 1 << i < limit), limit]


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
        self.warm_up()
        prefill = tuple(PrefillPoint(length, self.prefill_s(length)) for length in lengths)
        decode = tuple(
            DecodePoint(batch, context, self.decode_s(batch, context))
            for context in contexts
            for batch in sorted(
                {1, -(-limits.max_decodes(context) // 4), limits.max_decodes(context)}
            )
        )
        return Profile(prefill, decode)

    def warm_up(self) -> None:
        """Take the first steps, which pay for lazy initialization."""
        self.prefill_s(max(self._limits.max_prefill // 64, 1))
        self.decode_s(1, min(16, self._limits.max_prefill // 2))

    def grid(self, on_progress: Callable[[int, int], None]) -> Profile:
        """Prefills, decodes and mixed steps of many sizes: medians, half a minute on a CPU.

        Args:
            on_progress: called with (steps made, steps in all).
        """
        limits = self._limits
        prefills, decodes, mixed = (
            limits.prefill_grid(), limits.decode_grid(), limits.mixed_grid()
        )  # fmt: skip
        steps: list[list[tuple[int, int]]] = [[(0, tokens)] for tokens in prefills]
        steps += [[(context, 1)] * batch for batch, context in decodes]
        for tokens, contexts in mixed:
            first = [(0, tokens)] if tokens else []
            steps.append([*first, *((context, 1) for context in contexts)])
        self.warm_up()
        medians = iter(self._medians_s(steps, on_progress))
        return Profile(
            tuple(PrefillPoint(tokens, next(medians)) for tokens in prefills),
            tuple(DecodePoint(batch, context, next(medians)) for batch, context in decodes),
            tuple(MixedPoint(tokens, contexts, next(medians)) for tokens, contexts in mixed),
        )

    def _medians_s(
        self, steps: list[list[tuple[int, int]]], on_progress: Callable[[int, int], None]
    ) -> list[float]:
        """What each step takes as a rule, the machine's other work included."""
        times: list[list[float]] = [[] for _ in steps]
        count = _GRID_ROUNDS * len(steps)
        # Round after round, so that a busy moment of the machine spoils no step's median.
        for made in range(count):
            on_progress(made, count)
            times[made % len(steps)].append(self._run(steps[made % len(steps)]))
        on_progress(count, count)
        return [statistics.median(each) for each in times]

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
