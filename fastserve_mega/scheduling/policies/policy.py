"""The seam that every scheduling policy fills.

A policy is an order of the unfinished requests. The least one is a sort key:

    class LongestPromptFirst(Policy):
        def key(self, request: Request) -> tuple[Any, ...]:
            return request.priority, -request.num_prompt_tokens, request.arrival_number

and `scheduler.policy: my_package.my_module:LongestPromptFirst` runs it, in the server and in the
simulator. docs/scheduling.md shows a whole one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, ClassVar

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.policies.queues import RequestQueues, SortedQueues
from fastserve_mega.scheduling.request import Place, Request
from fastserve_mega.system.config import SchedulerConfig

HEAD_START_S = 60.0
"""A step of priority is as good as having come so many seconds sooner."""


class Policy(ABC):
    """Orders the unfinished requests; knows nothing of memory, batches or workers.

    A policy defines `key`, and of the other six methods those that its order needs. All must be
    deterministic: time is an argument.
    """

    level_quanta_s: tuple[float, ...] = ()
    """The quantum of each level, for those who watch; none for policies without levels."""
    level_names: ClassVar[tuple[str, ...]] = ()
    """What levels are called, for those who watch; without, they are Q1, Q2, …"""
    key_changes: ClassVar[bool] = True
    """Whether `key` changes when a request runs; without, a step need not sort anything."""
    makes_way: ClassVar[bool] = False
    """Whether residents make way for those on the host though one step could take them all."""

    def __init__(self, config: SchedulerConfig, cost_model: CostModel) -> None:
        self.config = config
        self.cost_model = cost_model
        self.queues: RequestQueues = SortedQueues(self.key)

    @abstractmethod
    def key(self, request: Request) -> tuple[Any, ...]:
        """Sort requests by this, the first to run first; ends in a number unique to the request."""

    def add(self, request: Request, now: float) -> None:
        """Queue a request that arrived."""
        self.queues.add(request)

    def remove(self, request: Request) -> None:
        """Take out a request that ends, for whatever reason."""
        self.queues.remove(request)

    def line_key(self, request: Request) -> tuple[Any, ...]:
        """Sort those in the line of one client by this, before they are added.

        By arrival, with the head start of `priority`, unless a policy says otherwise.
        """
        return head_started(request), request.arrival_number

    def charge(self, batch: Sequence[Request], elapsed_s: float) -> None:
        """Account for a step of this many seconds; these requests took part in it and go on."""
        if self.key_changes:
            for request in batch:
                self.queues.update(request)

    def promote(self, now: float) -> None:
        """Lift the requests that have waited too long."""

    def next_deadline(self, now: float) -> float | None:
        """Return when `promote` next has something to do; None for never."""
        return None

    def enst(self, now: float) -> Callable[[Request], float]:
        """Return a function that estimates the seconds until a request runs next (ENST).

        Paper section 4.2: whose is longest leaves the device first, whose is shortest comes back
        first; equals go by the order of the queues, so 0 for all is that order.
        """
        return _at_once

    def expected_wait_s(self, request: Request, pace_s: float) -> float:
        """Return how long a newcomer will wait for its start, in seconds; 0 for who comes first.

        Args:
            request: waits for its first step.
            pace_s: from one start to the next while requests wait.
        """
        ahead = self.queues.num_waiting_before(request)
        return pace_s * (ahead + 1) if ahead else 0.0

    # --- for the KV planner; no policy has to define these ---------------------------------------

    def soonest_swapped(self, now: float, count: int) -> list[Request]:
        """Return the swapped requests that run next by ENST, the soonest first."""
        first = islice(self.queues.walk(Place.SWAPPED), count)
        return sorted(first, key=self.enst(now))

    def latest_residents(self, now: float, count: int) -> list[Request]:
        """Return about so many residents that run last by ENST, the latest first."""
        last = islice(self.queues.iter_reversed(Place.RESIDENT), count)
        # A sort is stable also in reverse: equals stay in the reverse order of the queue.
        return sorted(last, key=self.enst(now), reverse=True)


def head_started(request: Request) -> float:
    """Return when a request came, as `priority` has it: so its order is strict for a while only."""
    return request.offered_at + HEAD_START_S * request.priority


def _at_once(_: Request) -> float:
    return 0.0
