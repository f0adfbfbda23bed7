"""Measures step times on the running workers, before any request is let in."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastserve_mega.coordinator.profile_grid import ProfileLimits
from fastserve_mega.coordinator.worker_group import WorkerGroup, WorkersLostError
from fastserve_mega.messaging.rank_messages import SequenceStart, StepCommand, StepResult
from fastserve_mega.plan import Plan, SequenceSlice
from fastserve_mega.scheduling.cost_model import (
    ChunkPoint,
    DecodePoint,
    FirstPoint,
    MixedPoint,
    PrefillPoint,
    Profile,
)
from fastserve_mega.types import RequestId, SamplingParams

_TOKEN = 1
_GRID_ROUNDS = 5
_QUICK_ROUNDS = 3
_QUICK_S = 2.0
"""A starting server measures no further round when it has taken this long."""

_DIGITS = 6
"""Decimals of seconds in a profile: microseconds."""

Shape = Sequence[tuple[int, int]]
"""(start, num_tokens) of each slice of a step."""


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
        """A few steps of each kind: the fastest of up to three, two seconds on a CPU."""
        lengths, decodes = self._limits.quick_prefills(), self._limits.quick_decodes()
        shapes: list[Shape] = [[(0, tokens)] for tokens in lengths]
        shapes += [[(context, 1)] * batch for batch, context in decodes]
        end = time.monotonic() + _QUICK_S
        self.warm_up()
        fastest = [self._step_s(shape) for shape in shapes]
        for _ in range(_QUICK_ROUNDS - 1):
            if time.monotonic() > end:
                break
            fastest = [
                min(known, self._step_s(shape))
                for known, shape in zip(fastest, shapes, strict=True)
            ]
        seconds = iter(fastest)
        return Profile(
            tuple(PrefillPoint(tokens, next(seconds)) for tokens in lengths),
            tuple(DecodePoint(batch, context, next(seconds)) for batch, context in decodes),
        )

    def warm_up(self) -> None:
        """Take the first steps, which pay for lazy initialization."""
        self._step_s([(0, max(self._limits.max_prefill // 64, 1))])
        self._step_s([(min(16, self._limits.max_prefill // 2), 1)])

    def grid(self, on_progress: Callable[[int, int], None]) -> Profile:
        """Steps of many sizes and kinds: half a minute on a CPU, more with several stages.

        Args:
            on_progress: called with (measurements made, measurements in all).
        """
        limits = self._limits
        sizes = limits.first_grid()
        grid = _Grid(limits)
        flows = limits.stages > 1
        count = len(sizes) + _GRID_ROUNDS * len(grid.shapes) * (2 if flows else 1)
        made = 0

        def measured(seconds: float) -> float:
            nonlocal made
            made += 1
            on_progress(made, count)
            return seconds

        on_progress(0, count)
        self.warm_up()
        alone: list[list[float]] = []
        flowing: list[list[float]] = []
        # Round after round, so that a busy moment of the machine spoils no size's median.
        for _ in range(_GRID_ROUNDS):
            alone.append([measured(self._again_s(shape)) for shape in grid.shapes])
            if flows:
                flowing.append([measured(self._interval_s(shape)) for shape in grid.shapes])
        # The sizes are new to the ranks now, and everything else is not.
        first = tuple(FirstPoint(size, measured(self._first_extra_s(size))) for size in sizes)
        pipelined = grid.profile(_typical_s(flowing)) if flows else None
        return grid.profile(_typical_s(alone), first, pipelined)

    def _first_extra_s(self, tokens: int) -> float:
        """How much longer the first of two equal prefills takes, seconds."""
        first_s = self._step_s([(0, tokens)])
        return round(max(first_s - self._step_s([(0, tokens)]), 0.0), _DIGITS)

    def _step_s(self, shape: Shape) -> float:
        """One step alone, seconds from dispatch to result."""
        begin = time.monotonic()
        self._await(self._dispatch(shape))
        return time.monotonic() - begin

    def _again_s(self, shape: Shape) -> float:
        """One step alone, after another one of its size.

        The ranks keep the kernels of so many sizes only, fewer than are measured here; a run has
        mostly steps of sizes it has just had.
        """
        self._step_s(shape)
        return self._step_s(shape)

    def _interval_s(self, shape: Shape) -> float:
        """Seconds from result to result of equal steps, one in each pipeline stage."""
        flying = deque(self._dispatch(shape) for _ in range(self._limits.stages))
        self._await(flying.popleft())
        begin = time.monotonic()
        flying.append(self._dispatch(shape))
        count = len(flying)
        while flying:
            self._await(flying.popleft())
        return (time.monotonic() - begin) / count

    def _dispatch(self, shape: Shape) -> int:
        """Send a step of new requests; returns its id.

        Their KV is whatever the pool holds: the time of a step does not depend on values.
        """
        names = [RequestId(f"profile-{self._sequences + i}") for i in range(len(shape))]
        self._sequences += len(shape)
        params = SamplingParams(max_tokens=1, temperature=0.0)
        blocks = self._block_tables(shape)
        batch = tuple(
            SequenceSlice(name, start, tokens, True, 0, next(blocks))
            for name, (start, tokens) in zip(names, shape, strict=True)
        )
        command = StepCommand(
            plan=Plan(step_id=self.steps, batch=batch, released=self._previous),
            token_ids=tuple((_TOKEN,) * tokens for _, tokens in shape),
            started=tuple(SequenceStart(name, params, 0, 1) for name in names),
        )
        self._previous = tuple(names)
        self.steps += 1
        self._workers.dispatch(command)
        return command.plan.step_id

    def _block_tables(self, shape: Shape) -> Iterator[tuple[int, ...]]:
        first = 1
        for start, tokens in shape:
            count = -(-(start + tokens) // self._limits.block_size)
            yield tuple(range(first, first + count))
            first += count

    def _await(self, step_id: int) -> None:
        """Wait for the result of a step; the next one's does not come before."""
        deadline = time.monotonic() + self._timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            if self._workers.wait(left_s) and self._has_come(step_id):
                return
        raise WorkersLostError(
            f"profiling step {step_id} has not returned within {self._timeout_s:g} s"
        )

    def _has_come(self, step_id: int) -> bool:
        for result in self._workers.results():
            if isinstance(result, StepResult) and result.step_id == step_id:
                return True  # a later one stays where it is
        return False


def measure(profiler: Profiler, look_around: Callable[[], None]) -> Profile:
    """Measure the whole grid, with a progress bar on stderr.

    Args:
        profiler: of the ranks.
        look_around: called after each step; may raise to end it all.
    """
    columns = (TextColumn("measuring steps"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)

        def show(made: int, count: int) -> None:
            progress.update(task, completed=made, total=count)
            look_around()

        return profiler.grid(show)


class _Grid:
    """The steps of a thorough profile, and its points once they have been measured."""

    def __init__(self, limits: ProfileLimits) -> None:
        self._prefills = limits.prefill_grid()
        self._decodes = limits.decode_grid()
        self._mixed = limits.mixed_grid()
        self._chunks = limits.chunk_grid()
        self.shapes: list[Shape] = [[(0, tokens)] for tokens in self._prefills]
        self.shapes += [[(context, 1)] * batch for batch, context in self._decodes]
        for tokens, contexts in self._mixed:
            prefill = [(0, tokens)] if tokens else []
            self.shapes.append([*prefill, *((context, 1) for context in contexts)])
        self.shapes += [[chunk] for chunk in self._chunks]

    def profile(
        self,
        times: Sequence[float],
        first: tuple[FirstPoint, ...] = (),
        pipelined: Profile | None = None,
    ) -> Profile:
        """Seconds of each of `shapes`, in their order, as a profile."""
        seconds = iter(times)
        return Profile(
            tuple(PrefillPoint(tokens, next(seconds)) for tokens in self._prefills),
            tuple(DecodePoint(batch, context, next(seconds)) for batch, context in self._decodes),
            tuple(MixedPoint(tokens, contexts, next(seconds)) for tokens, contexts in self._mixed),
            tuple(ChunkPoint(start, tokens, next(seconds)) for start, tokens in self._chunks),
            first,
            pipelined,
        )


def _typical_s(rounds: Sequence[Sequence[float]]) -> list[float]:
    """The median of each step, scaled so that together they take what all rounds took.

    The steps that other work disturbs belong to what a run of steps takes. They are shared by all
    sizes, since with a few rounds a size would otherwise owe its time to whether it met one.
    """
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    taken_s = sum(map(sum, rounds))
    disturbed = taken_s / (len(rounds) * sum(medians))
    return [round(disturbed * median, _DIGITS) for median in medians]
