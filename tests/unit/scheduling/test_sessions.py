"""Requests of one session share what they were served."""

from __future__ import annotations

import pytest
from fixed_costs import Driver, arrived, make_scheduler
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.scheduling.policies.sessions import Sessions
from fastserve_mega.scheduling.request import ClientShare, Request
from fastserve_mega.types import RequestId


def ask(session: str, client: str = "") -> Request:
    return Request(RequestId("r"), 10, 10, 0, 1, 10, session=session, share=ClientShare(client))


def level_of(scheduler, name):
    return scheduler.find(name).queue.level


def served(seconds_of_decoding: int) -> Driver:
    """Serve one request of the session "agent" of the client "one"."""
    scheduler = make_scheduler(starvation_limit_s=None)  # quanta 1, 2, 4, 8, 16, 32 s
    driver = Driver(scheduler, {"before": seconds_of_decoding})
    driver.step([arrived("before", 1, session="agent", client="one")])
    driver.run_until_idle()
    return driver


@pytest.mark.parametrize(("tokens", "level"), [(1, 0), (3, 1), (8, 3), (30, 4)])
def test_a_request_joins_where_one_would_be_that_was_served_as_much_as_its_session(tokens, level):
    driver = served(tokens)
    driver.scheduler.step(driver.now, [arrived("next", 1, session="agent", client="one")])
    assert level_of(driver.scheduler, "next") == level


def test_a_session_is_one_clients_and_without_one_nothing_is_shared():
    driver = served(30)
    others = [
        arrived("theirs", 1, session="agent", client="another"),
        arrived("none", 1, client="one"),
        arrived("other", 1, session="another", client="one"),
    ]
    driver.scheduler.step(driver.now, others)
    assert [level_of(driver.scheduler, each) for each in ("theirs", "none", "other")] == [0, 0, 0]


def test_a_session_begins_anew_after_ten_minutes():
    driver = served(30)
    driver.scheduler.step(driver.now + 601, [arrived("next", 1, session="agent", client="one")])
    assert level_of(driver.scheduler, "next") == 0


def test_requests_of_a_session_at_the_same_time_come_down_together():
    scheduler = make_scheduler()
    driver = Driver(scheduler, {f"a{index}": 50 for index in range(3)} | {"alone": 50})
    driver.step(
        [arrived(f"a{index}", 1, session="agent") for index in range(3)] + [arrived("alone", 1)]
    )
    for _ in range(6):
        driver.step()
    assert level_of(scheduler, "a2") > level_of(scheduler, "alone")


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "b"]), st.floats(0, 9), st.floats(0, 400)), max_size=30
    )
)
def test_what_a_session_attained_is_what_it_was_served_since_it_was_last_forgotten(services):
    sessions = Sessions()
    now = 0.0
    expected: dict[str, tuple[float, float]] = {}
    for name, seconds, later in services:
        now += later
        sessions.serve(ask(name), seconds, now)
        before, last = expected.get(name, (0.0, now))
        expected[name] = (before if now - last <= 600 else 0.0) + seconds, now
    for name in ("a", "b"):
        total, last = expected.get(name, (0.0, now))
        attained = sessions.attained_s(ask(name), now)
        assert attained == pytest.approx(total if now - last <= 600 else 0.0)
    assert sessions.attained_s(ask(""), now) == 0


def test_of_many_sessions_the_last_served_are_remembered():
    sessions = Sessions()
    for number in range(10_100):
        sessions.serve(ask(f"s{number}"), 1.0, float(number) / 1000)
    assert len(sessions) == 10_000
    assert sessions.attained_s(ask("s0"), 11.0) == 0
    assert sessions.attained_s(ask("s10099"), 11.0) == 1.0
