"""Which new requests may run while it is not known which of them lost the ranks."""

from fastserve_mega.coordinator.admission import Gate
from fastserve_mega.coordinator.live_request import LiveRequest
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.types import SamplingParams


def request(name, failed_attempts=0):
    submit = Submit(name, (1,), SamplingParams(), failed_attempts=failed_attempts)
    return LiveRequest(submit, b"client", 0.0, [])


def test_requests_that_nobody_suspects_pass_at_once():
    gate, lives = Gate(0.0), [request("a"), request("b")]
    for live in lives:
        gate.enter(live, 1.0)
    assert gate.pass_through() == lives
    assert gate.pass_through() == []


def test_suspects_go_first_and_one_at_a_time_until_a_token_or_their_end():
    gate = Gate(0.0)
    other, first, second = request("other"), request("first", 1), request("second", 1)
    for live in (other, first, second):
        gate.enter(live, 1.0)
    assert gate.pass_through() == [first]
    assert gate.pass_through() == []
    gate.clear(other)
    assert gate.pass_through() == []
    gate.clear(first)
    assert gate.pass_through() == [second]
    gate.leave(second)
    assert gate.pass_through() == [other]


def test_what_ends_in_line_does_not_come_up():
    gate = Gate(0.0)
    first, second, other = request("first", 1), request("second", 1), request("other")
    for live in (first, second, other):
        gate.enter(live, 1.0)
    assert gate.pass_through() == [first]
    gate.leave(second)
    gate.leave(other)
    gate.leave(first)
    assert gate.pass_through() == []


def test_nobody_makes_others_wait_long_after_the_start():
    gate, late, other = Gate(100.0), request("late", 1), request("other")
    gate.enter(late, 161.0)
    gate.enter(other, 161.0)
    assert gate.pass_through() == [late, other]
