"""One turn of the coordinator's loop, with everything around it written down in its order."""

from __future__ import annotations

import math

import pytest

from fastserve_mega.coordinator.admission import Admission
from fastserve_mega.coordinator.coordinator import Coordinator
from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.coordinator.reports import Reports
from fastserve_mega.coordinator.worker_group import WorkersLostError
from fastserve_mega.messaging.frames import decode
from fastserve_mega.messaging.messages import (
    Finished,
    Ping,
    Pong,
    Refused,
    Restarting,
    Submit,
    Tokens,
    Welcome,
)
from fastserve_mega.messaging.rank_messages import (
    CopyResult,
    SamplingFailure,
    ScoredPrompt,
    StepResult,
)
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.scheduling.cost_model import (
    DecodePoint,
    PrefillPoint,
    Profile,
    ProfiledCostModel,
)
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.system.config import MlfqConfig, SchedulerConfig
from fastserve_mega.types import FinishReason, SamplingParams

EOS = 2
PROFILE = Profile((PrefillPoint(1, 0.1),), (DecodePoint(1, 16, 0.1),))


class World:
    """The sockets, the ranks and the clock; `log` has what the coordinator did to them."""

    ranks = range(1)

    def __init__(self, config=None, window=1, blocks=32, max_wait_s=None):
        self.log, self.arrived, self.returned, self.lost = [], [], [], []
        self.now = 0.0
        config = config or SchedulerConfig(policy="fcfs")
        costs, pools = ProfiledCostModel(PROFILE), PoolSizes(blocks, 0, 4)
        scheduler = Scheduler(config, costs, pools, window=window)
        welcome = Welcome("e", "m", "/m", max_context=64, vocab_size=99, eos_token_ids=(EOS,))
        self.metrics = metrics = ServingMetrics(block_bytes=1)
        self.coordinator = Coordinator(
            welcome=welcome,
            replicas=[Replica(scheduler, scheduler.step, self, 10.0, metrics)],
            front_door=self,
            metrics=metrics,
            admission=Admission(99, (EOS,), 64, *self.limits(max_wait_s)),
            prefix_block_size=None,
            clock=lambda: self.now,
            poll=lambda deadline: self.log.append(("poll", deadline)),
        )

    @staticmethod
    def limits(max_wait_s):
        """Requests, prompt tokens, and seconds of waiting; the last one alone where it is given."""
        return (10, 100, math.inf) if max_wait_s is None else (10**6, 10**9, max_wait_s)

    def turn(self, *messages, result=None):
        """What the coordinator does in a turn in which this has arrived."""
        self.log.clear()
        self.arrived = [(b"client", message) for message in messages]
        self.returned = [result] if result else []
        self.coordinator.turn()
        return self.log

    # The ranks.
    def results(self):
        yield from self.returned

    def dispatch(self, command):
        self.log.append(("dispatch", command.plan.step_id, command.token_ids))

    # The clients.
    def receive(self, now):
        yield from self.arrived

    def take_lost(self, now):
        yield from self.lost

    def send(self, client, message):
        self.log.append(message)


@pytest.fixture
def world():
    return World()


def submit(name="r", **params):
    return Submit(name, (5, 6), SamplingParams(temperature=0.0, **params))


def test_the_next_plan_goes_out_before_the_tokens_of_the_last_one(world):
    assert world.turn(submit(max_tokens=2)) == [("poll", None), ("dispatch", 0, ((5, 6),))]
    world.now = 1.0
    assert world.turn(result=StepResult(0, (7,))) == [
        ("poll", 10.0), ("dispatch", 1, ((7,),)), Tokens("r", 0, (7,)),
    ]  # fmt: skip
    tokens, finished = world.turn(result=StepResult(1, (8,)))[1:]
    assert tokens == Tokens("r", 1, (8,))
    assert (type(finished), finished.reason) == (Finished, FinishReason.LENGTH)
    assert world.coordinator.num_unfinished == 0


def test_what_arrives_in_a_turn_is_planned_in_it(world):
    world.turn(submit("a", max_tokens=9))
    log = world.turn(submit("b", max_tokens=9), result=StepResult(0, (7,)))
    assert log[1] == ("dispatch", 1, ((7,), (5, 6)))
    assert world.turn() == [("poll", 10.0)]  # nothing arrived, and the window is full


def test_a_turn_comes_when_a_request_starves_though_nothing_arrives():
    """Two stages, and memory for one request: the place of the second is free all the time."""
    mlfq = MlfqConfig(base_quantum_s=0.01, starvation_limit_s=0.3)
    world = World(SchedulerConfig(policy="skip_join_mlfq", mlfq=mlfq), window=2, blocks=16)
    world.turn(*[Submit(name, (5,) * 40, SamplingParams(max_tokens=5)) for name in "ab"])
    scheduler = world.coordinator._replicas[0].scheduler
    assert scheduler.view(0.0, 0).steps_in_flight == 1
    assert world.turn()[0] == ("poll", 0.3)
    assert scheduler.level_lengths()[0] == 0
    world.now = 0.3
    world.turn()
    assert scheduler.level_lengths()[0] == 1
    assert world.turn()[0] == ("poll", 0.6)  # when `a` starves, unless its step is done before


def test_a_flood_is_answered_in_several_turns(world):
    inbox = [(b"client", Ping())] * 10

    def receive(now):
        while inbox:
            world.now += 0.008  # what each of them takes
            yield inbox.pop(0)

    world.receive = receive
    answers = []
    while inbox:
        before = len(inbox)
        answers += world.turn()[1:]
        assert before - len(inbox) <= 3
    assert answers == [Pong("e")] * 10


@pytest.mark.parametrize("timeout_s", [None, 1.0])
def test_what_very_many_requests_leave_behind_ends_in_several_turns(timeout_s):
    world = World(max_wait_s=math.inf)
    names = [f"r{number}" for number in range(10)]
    world.turn(*(Submit(name, (5,), SamplingParams(), timeout_s=timeout_s) for name in names))
    send = world.coordinator._reply

    def slowly(client, message):
        world.now += 0.015  # what the end of each of them takes
        send(client, message)

    world.coordinator._reply = slowly
    world.now, world.lost = 1.0, [] if timeout_s else [(b"client", "went")]
    ended = []
    for _ in range(4):
        log = world.turn()
        world.lost = []
        ended += [m.request_id for m in log if isinstance(m, Finished)]
    assert ended == names
    assert world.turn() == [("poll", 10.0)]  # for the step that runs still


def test_more_prompt_tokens_than_may_wait_are_rejected(world):
    long = [Submit(name, (5,) * 40, SamplingParams(max_tokens=9)) for name in "abcd"]
    log = world.turn(*long[:3])
    assert not [each for each in log if isinstance(each, Finished)]
    (rejected,) = (each for each in world.turn(long[3]) if isinstance(each, Finished))
    assert rejected.reason is FinishReason.REJECTED
    assert rejected.message == (
        "the prompts of unfinished requests have 120 tokens, the limit is 100 "
        "(scheduler.max_queued_tokens)"
    )


def test_the_same_answer_is_given_again_for_a_while():
    made = []

    class Counted:
        def render(self):
            made.append(1)
            return f"number {len(made)}"

    reports = Reports((), Counted())

    def ask(now):
        return decode(reports.metrics(now)).text

    assert [ask(10.0) for _ in range(1000)][-1] == "number 4"
    assert ask(10.2) == "number 4"
    assert ask(10.3) == "number 5"


@pytest.mark.parametrize(
    ("params", "token", "reason"),
    [
        ({}, EOS, FinishReason.STOP),
        ({"ignore_eos": True}, EOS, None),
        ({"min_tokens": 2}, EOS, None),
        ({"stop_token_ids": (9,)}, 9, FinishReason.STOP),
        ({"ignore_eos": True, "stop_token_ids": (9,)}, 9, FinishReason.STOP),
        ({}, 9, None),
        ({"max_tokens": 1}, 9, FinishReason.LENGTH),
        ({"max_tokens": 1}, EOS, FinishReason.STOP),
    ],
)
def test_what_ends_a_request(world, params, token, reason):
    world.turn(submit(**params))
    ends = [m for m in world.turn(result=StepResult(0, (token,))) if isinstance(m, Finished)]
    assert [end.reason for end in ends] == ([reason] if reason else [])


@pytest.mark.parametrize("is_invalid", [False, True])
def test_a_token_that_cannot_be_sampled_ends_its_request_and_says_who_is_to_blame(
    world, is_invalid
):
    world.turn(submit())
    failure = SamplingFailure(0, "too complex", is_invalid)
    (finished,) = world.turn(result=StepResult(0, (0,), failures=(failure,)))[1:]
    assert (finished.reason, finished.message) == (FinishReason.ERROR, "too complex")
    assert finished.is_invalid == is_invalid


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (StepResult(7, (1,)), "answered step 7 out of order"),
        (StepResult(0, ()), "step 0 yielded 0 tokens for 1 requests"),
        (StepResult(0, (99,)), "step 0 yielded token 99 of a vocabulary of 99"),
        (StepResult(0, (-1,)), "token -1 of"),
        (StepResult(0, (2**63,)), f"token {2**63} of"),
        (StepResult(0, (1,), logprobs=(None, None)), "2 log probabilities for 1 requests"),
        (StepResult(0, (1,), embeddings=(b"",)), "1 embeddings for 0 requests"),
        (StepResult(0, (1,), failures=(SamplingFailure(1, ""),)), "failures of request 1 of 1"),
        (StepResult(0, (1,), scored=(ScoredPrompt(3, 1, ()),)), "prompts of request 3 of 1"),
        (StepResult(0, (1,), compute_s=math.inf), "step 0 took it inf s, the limit is 10 s"),
        (CopyResult(5, 0, 0.1), "rank 0 reported copy 5, which it was not asked for"),
    ],
)
def test_a_result_that_cannot_be_loses_its_ranks_and_leaves_the_request(world, result, reason):
    world.turn(submit(max_tokens=9))
    with pytest.raises(WorkersLostError, match=reason):
        world.turn(result=result)
    world.log.clear()
    world.coordinator.announce_restart(1.0, reason)
    assert world.log == [Restarting(1.0, reason, suspects=("r",))]


def test_max_tokens_beyond_the_context_is_refused_with_both_numbers(world):
    (refused,) = world.turn(submit(max_tokens=63))[1:]
    assert refused == Refused(
        "2 prompt tokens and max_tokens 63 exceed the context of 64 tokens", "r"
    )


def test_requests_of_a_lost_client_and_overdue_ones_end(world):
    world.turn(submit("a", max_tokens=9), Submit("b", (5,), SamplingParams(), timeout_s=3.0))
    assert world.turn()[0] == ("poll", 3.0)
    world.lost, world.now = [(b"gone", "went"), (b"client", "went")], 2.0
    ends = [(m.request_id, m.reason, m.message) for m in world.turn() if isinstance(m, Finished)]
    assert ends == [("a", FinishReason.ABORT, "went"), ("b", FinishReason.ABORT, "went")]
    world.lost = []
    world.turn(Submit("c", (5,), SamplingParams(), timeout_s=3.0))
    world.now = 5.0
    (end,) = [m for m in world.turn() if isinstance(m, Finished)]
    assert (end.reason, end.message) == (
        FinishReason.TIMEOUT,
        "unfinished after its timeout of 3 s",
    )
