"""The profiler on ranks whose clock stands still unless they compute."""

from collections import Counter, deque
from types import SimpleNamespace

import pytest

from fastserve_mega.coordinator import profiler as module
from fastserve_mega.coordinator.profile_grid import ProfileLimits
from fastserve_mega.coordinator.profiler import Profiler
from fastserve_mega.coordinator.worker_group import WorkersLostError
from fastserve_mega.messaging.rank_messages import StepResult


class Ranks:
    """Pipeline stages that take their time for a step and as much again for each token."""

    first_extra_s = 0.0

    def __init__(self, *stages):
        self.now = 0.0
        self.sizes = []
        self.most_in_flight = 0
        self._stages = stages
        self._free = [0.0] * len(stages)
        self._done = deque()

    def dispatch(self, command):
        assert command.plan.step_id == len(self.sizes)
        tokens = sum(piece.num_tokens for piece in command.plan.batch)
        time_s = self.now
        for index, stage_s in enumerate(self._stages):
            extra_s = 0.0 if tokens in self.sizes else self.first_extra_s / len(self._stages)
            time_s = max(time_s, self._free[index]) + stage_s * (1 + tokens) + extra_s
            self._free[index] = time_s
        self.sizes.append(tokens)
        self._done.append((time_s, command))
        self.most_in_flight = max(self.most_in_flight, len(self._done))

    def wait(self, timeout_s):
        if not self._done or self._done[0][0] > self.now + timeout_s:
            self.now += timeout_s
            return False
        self.now = max(self.now, self._done[0][0])
        return True

    def results(self):
        while self._done and self._done[0][0] <= self.now:
            command = self._done.popleft()[1]
            yield StepResult(command.plan.step_id, (0,) * len(command.plan.batch), 0.0)


@pytest.fixture
def profiler_on(monkeypatch):
    def make(ranks, *, timeout_s=1e6, **limits):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: ranks.now))
        defaults = {"device_blocks": 257, "block_size": 16, "max_batch_size": 8}
        defaults |= {"max_batch_tokens": 100, "max_context": 4096}
        return Profiler(ranks, ProfileLimits(**(defaults | limits)), timeout_s)

    return make


def test_one_stage_is_measured_alone(profiler_on):
    ranks = Ranks(0.5)
    profile = profiler_on(ranks).grid(lambda made, count: None)
    assert ranks.most_in_flight == 1
    assert profile.pipelined is None
    assert all(p.seconds == 0.5 * (1 + p.tokens) for p in profile.prefill)
    assert all(p.seconds == 0.5 * (1 + p.batch) for p in profile.decode)
    assert all(p.seconds == 0.5 * (1 + p.tokens) for p in profile.chunks)
    assert {p.start for p in profile.chunks} == {256, 1024}
    for point in profile.mixed:
        assert point.seconds == 0.5 * (1 + point.prefill_tokens + len(point.contexts))


@pytest.mark.parametrize(("stages", "slowest"), [((0.5, 0.25), 0.5), ((0.25, 0.5, 0.25), 0.5)])
def test_stages_are_measured_alone_and_all_at_once(profiler_on, stages, slowest):
    ranks = Ranks(*stages)
    profile = profiler_on(ranks, stages=len(stages)).grid(lambda made, count: None)
    assert ranks.most_in_flight == len(stages)
    assert all(p.seconds == sum(stages) * (1 + p.tokens) for p in profile.prefill)
    assert profile.pipelined is not None
    assert profile.pipelined.pipelined is None
    assert all(p.seconds == slowest * (1 + p.tokens) for p in profile.pipelined.prefill)
    assert all(p.seconds == slowest * (1 + p.batch) for p in profile.pipelined.decode)
    assert len(profile.pipelined.mixed) == len(profile.mixed)


def test_what_a_new_size_costs(profiler_on):
    ranks = Ranks(0.5)
    ranks.first_extra_s = 8.0
    profile = profiler_on(ranks).grid(lambda made, count: None)
    assert profile.first
    assert {point.extra_s for point in profile.first} == {8.0}
    sizes = {point.tokens for point in profile.first}
    assert {size: Counter(ranks.sizes)[size] for size in sizes} == dict.fromkeys(sizes, 2)
    # One of seven rounds pays for new sizes: hardly more than what the steps take when known.
    assert all(p.seconds < 1.2 * 0.5 * (1 + p.tokens) for p in profile.prefill)


def test_progress_ends_at_its_count(profiler_on):
    shown = []
    profiler_on(Ranks(0.5, 0.5), stages=2).grid(lambda *progress: shown.append(progress))
    count = shown[0][1]
    assert shown == [(made, count) for made in range(count + 1)]


def test_a_starting_server_looks_at_long_contexts(profiler_on):
    ranks = Ranks(0.001)
    profile = profiler_on(ranks).self_measurement()
    assert [point.tokens for point in profile.prefill] == [1, 6, 25, 100]
    assert [(point.batch, point.context) for point in profile.decode] == [
        (1, 16), (2, 16), (8, 16), (1, 512), (2, 512), (1, 2048)
    ]  # fmt: skip


def test_a_slow_server_measures_one_round(profiler_on):
    fast, slow = Ranks(0.001), Ranks(1.0)
    profiler_on(fast).self_measurement()
    profiler_on(slow).self_measurement()
    warm_up = 2
    assert len(fast.sizes) - warm_up == 3 * (len(slow.sizes) - warm_up)


def test_a_lost_step(profiler_on):
    with pytest.raises(WorkersLostError, match="profiling step 0 has not returned within 5 s"):
        profiler_on(Ranks(60.0), timeout_s=5.0).self_measurement()
