"""The coordinator's clock, which stands still while the process does."""

from __future__ import annotations

import time
from collections.abc import Callable

_NOTICEABLE_S = 1.0
"""No turn takes so long, not even on a busy machine, unless somebody has stopped the process."""


class AwakeClock:
    """Seconds for which this process was awake.

    A laptop that sleeps, or a container that is frozen, stops ranks and clients as well: none of
    them has been silent, and no step has been slow, for as long as the process itself did nothing.

    Args:
        clock: in seconds; does not go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asleep_s = 0.0
        self._looked_at = clock()

    def __call__(self) -> float:
        return self._clock() - self._asleep_s

    def look(self, waited_s: float) -> None:
        """Compare with the time of the last call, between which and this one the process worked.

        Args:
            waited_s: how long it may have waited as well.
        """
        now = self._clock()
        if (missing_s := now - self._looked_at - waited_s) > _NOTICEABLE_S:
            self._asleep_s += missing_s
        self._looked_at = now
