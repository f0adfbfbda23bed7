from __future__ import annotations

from fastserve_mega.coordinator.timeouts import Timeouts


def test_the_earliest_deadline_comes_first():
    timeouts = Timeouts()
    assert timeouts.next_deadline() is None
    for name, deadline in (("late", 9.0), ("early", 3.0), ("middle", 5.0), ("too", 5.0)):
        timeouts.add(name, deadline)
    assert timeouts.next_deadline() == 3.0
    assert timeouts.take_overdue(2.9) == []
    assert timeouts.take_overdue(5.0) == ["early", "middle", "too"]
    assert timeouts.take_overdue(5.0) == []
    assert timeouts.next_deadline() == 9.0


def test_who_has_ended_is_not_overdue():
    timeouts = Timeouts()
    timeouts.add("a", 1.0)
    timeouts.add("b", 2.0)
    timeouts.remove("a")
    timeouts.remove("a")
    timeouts.remove("without a limit")
    assert timeouts.next_deadline() == 2.0
    timeouts.add("a", 3.0)  # the same id, another request
    assert timeouts.take_overdue(9.0) == ["b", "a"]


def test_ended_requests_with_long_limits_are_forgotten():
    timeouts = Timeouts()
    timeouts.add("first", 1e9)
    for i in range(10_000):
        timeouts.add(f"r{i}", 1e6 + i)
        timeouts.remove(f"r{i}")
    assert len(timeouts._heap) < 100
    assert timeouts.take_overdue(2e9) == ["first"]
