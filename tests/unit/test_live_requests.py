from __future__ import annotations

from fastserve_mega.coordinator.live_request import LiveRequest, LiveRequests
from fastserve_mega.messaging.messages import Submit
from fastserve_mega.types import SamplingParams


def live(name, timeout_s=None, client=b"c"):
    submit = Submit(name, (1,), SamplingParams(), timeout_s=timeout_s)
    return LiveRequest(submit, client, 0.0, [])


def added(requests, name, timeout_s=None, client=b"c"):
    request = live(name, timeout_s, client)
    requests.add(request)
    return request


def test_the_earliest_deadline_comes_first():
    requests = LiveRequests()
    assert requests.next_deadline() is None
    _late, early, middle, too = (
        added(requests, name, timeout_s)
        for name, timeout_s in (("late", 9.0), ("early", 3.0), ("middle", 5.0), ("too", 5.0))
    )
    added(requests, "without a limit")
    assert requests.next_deadline() == 3.0
    assert [*requests.take_overdue(2.9)] == []
    assert [*requests.take_overdue(5.0)] == [early, middle, too]
    assert [*requests.take_overdue(5.0)] == []
    assert requests.next_deadline() == 9.0


def test_what_has_ended_is_not_overdue():
    requests = LiveRequests()
    first, second = added(requests, "a", 1.0), added(requests, "b", 2.0)
    requests.remove(first)
    assert requests.next_deadline() == 2.0
    again = added(requests, "a", 3.0)  # the same id, another request
    assert first not in requests
    assert [*requests.take_overdue(9.0)] == [second, again]


def test_ended_requests_with_long_limits_are_forgotten():
    requests = LiveRequests()
    first = added(requests, "first", 1e9)
    for i in range(10_000):
        requests.remove(added(requests, f"r{i}", 1e6 + i))
    assert len(requests._deadlines) < 100
    assert [*requests.take_overdue(2e9)] == [first]


def test_requests_are_found_by_their_client_until_they_end():
    requests = LiveRequests()
    one, two = added(requests, "one", client=b"x"), added(requests, "two", client=b"x")
    requests.move(one, b"y")
    assert (requests.of_client(b"x"), requests.of_client(b"y")) == ([two], [one])
    assert list(requests.clients()) == [b"x", b"y"]
    requests.remove(two)
    assert list(requests.clients()) == [b"y"]
    assert requests.of_client(b"x") == []
    assert (len(requests), requests.all(), requests.get("two")) == (1, [one], None)


def test_a_waiting_prompt_takes_four_bytes_a_token():
    requests = LiveRequests()
    submit = Submit("long", tuple(range(1000, 5000)), SamplingParams())
    request = LiveRequest(submit, b"c", 0.0, [])
    requests.add(request)
    assert request.prompt.itemsize * len(request.prompt) == 4 * 4000
    assert request.submit.prompt == ()
    assert requests.num_prompt_tokens == 4000
    requests.remove(request)
    assert requests.num_prompt_tokens == 0


def test_resubmissions_from_new_connections_leave_nothing_behind():
    requests = LiveRequests()
    request = added(requests, "moved")
    for number in range(200):
        requests.move(request, f"c{number}".encode())
    assert list(requests.clients()) == [b"c199"]
    assert requests.of_client(b"c0") == []
    requests.remove(request)
    assert list(requests.clients()) == []
