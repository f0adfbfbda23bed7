"""A cost model with round numbers, and helpers to drive a scheduler by hand."""

from __future__ import annotations

from collections.abc import Sequence

from fastserve_mega.plan import Plan
from fastserve_mega.scheduling.events import Arrived, CopyDone, Event, StepDone
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.system.config import MlfqConfig, SchedulerConfig, SwapConfig
from fastserve_mega.types import RequestId


class FixedCosts:
    """A decode step takes 1 s whatever the batch; a prefill takes 1 s per 10 tokens."""

    def __init__(self, decode_s: float = 1.0) -> None:
        """Let a step take `decode_s` seconds, and a prefill that for each 10 tokens."""
        self._decode_s = decode_s

    def prefill_s(self, tokens: int) -> float:
        return self._decode_s * tokens / 10

    def decode_s(self, batch: int, context: int) -> float:
        return self._decode_s

    def observe(self, prefill_tokens: int, decodes: int, context: int, elapsed_s: float) -> None:
        pass


def make_scheduler(
    *,
    policy="skip_join_mlfq",
    device_blocks=1000,
    host_blocks=0,
    block_size=4,
    swap=None,
    window=1,
    grows_ahead=False,
    levels=6,
    starvation_limit_s=None,
    base_quantum_s=None,
    prefill_patience=0.0,
    decode_s=1.0,
    **options,
) -> Scheduler:
    options.setdefault("max_batch_size", 4)
    options.setdefault("max_batch_tokens", 1000)
    options.setdefault("admission", "greedy")  # most tests want memory to run out
    mlfq = MlfqConfig(
        levels=levels,
        starvation_limit_s=starvation_limit_s,
        base_quantum_s=base_quantum_s,
        prefill_patience=prefill_patience,
    )
    return Scheduler(
        SchedulerConfig(policy=policy, mlfq=mlfq, **options),
        FixedCosts(decode_s),
        PoolSizes(device_blocks, host_blocks, block_size, grows_ahead),
        swap=swap or SwapConfig(strategy="recompute"),
        window=window,
    )


def arrived(name: str, prompt: int, max_tokens: int = 100, **rest) -> Arrived:
    return Arrived(RequestId(name), prompt, max_tokens, **rest)


def names(plan: Plan | None) -> list[str]:
    return [] if plan is None else [piece.request_id for piece in plan.batch]


class Driver:
    """Runs one step after the other with the costs above; knows the true output lengths."""

    def __init__(self, scheduler: Scheduler, outputs: dict[str, int]) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self.plans: list[Plan] = []
        self.finished_at: dict[str, float] = {}
        self._left = dict(outputs)

    def step(self, events: Sequence[Event] = ()) -> Plan | None:
        """Plan a step and let its time pass; its StepDone is told with the next call."""
        done = self._done()  # moves the clock
        plan = self.scheduler.step(self.now, [*done, *events])
        self.scheduler.check_integrity()
        if plan:
            self.plans.append(plan)
        self._running = plan
        return plan

    _running: Plan | None = None

    def _done(self) -> list[Event]:
        if self._running is None:
            return []
        prefill = sum(piece.num_tokens for piece in self._running.batch if piece.num_tokens > 1)
        elapsed_s = prefill / 10 if prefill else 1.0
        self.now += elapsed_s
        copied: list[Event] = [CopyDone(copy.copy_id) for copy in self._running.copies]
        if not self._running.batch:
            return copied
        finished = []
        for piece in self._running.batch:
            if piece.samples:
                self._left[piece.request_id] -= 1
                if not self._left[piece.request_id]:
                    finished.append(piece.request_id)
                    self.finished_at[piece.request_id] = self.now
        return [StepDone(self._running.step_id, elapsed_s, tuple(finished)), *copied]

    def run_until_idle(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if self.step() is None and not self.scheduler.unfinished:
                return
        raise AssertionError(f"still {self.scheduler.unfinished} requests after {limit} steps")
