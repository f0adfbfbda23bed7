"""How long others have been silent is told by a clock that stands still with its process."""

import pytest

from fastserve_mega.coordinator.main import AwakeClock


def test_a_clock_stands_still_while_its_process_does():
    now = 100.0
    clock = AwakeClock(lambda: now)
    now += 0.5
    clock.look(0.5)
    assert clock() == 100.5
    now += 3600.4  # 0.4 s of waiting, and a lid that was closed
    clock.look(0.5)
    assert clock() == pytest.approx(101.0, abs=0.5)
    now += 1.4  # a busy machine
    clock.look(0.5)
    assert clock() == pytest.approx(102.4, abs=0.5)
