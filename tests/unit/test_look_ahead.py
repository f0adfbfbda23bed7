"""Steps computed ahead of their commands: the real coordinator and rank, in turns in one thread."""

from __future__ import annotations

import random

import pytest
from driven_rank import (
    PENALIZED,
    PLAIN,
    STEP_S,
    STOPPED,
    STOPS,
    STRUCTURED,
    VOCAB,
    expected_tokens,
    opened,
    submits,
)
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.messaging.messages import Submit
from fastserve_mega.messaging.rank_messages import StepCommand
from fastserve_mega.plan import CopyDirection, Plan, SequenceSlice
from fastserve_mega.scheduling.events import StepDone
from fastserve_mega.types import FinishReason, SamplingParams
from fastserve_mega.worker.fake_runner import FakeModelRunner
from fastserve_mega.worker.look_ahead import LookAhead
from fastserve_mega.worker.model_runner import SequenceInput, StepOutput, Verdict


@given(
    seed=st.integers(0, 2**32),
    strategy=st.sampled_from(["proactive", "reactive", "recompute", "none"]),
    policy=st.sampled_from(["paced", "skip_join_mlfq", "fcfs"]),
    admission=st.sampled_from(["greedy", "projected"]),
    cancels=st.sampled_from([0.0, 0.05, 0.3]),
    hurry=st.sampled_from([0.0, 0.5, 1.0]),
    launches_ahead=st.booleans(),
)
def test_tokens_are_those_of_an_undisturbed_run(  # noqa: PLR0917 - drawn by name
    seed, strategy, policy, admission, cancels, hurry, launches_ahead
):
    """Whatever ends, leaves or is preempted while a step that counts on it is computed."""
    rng = random.Random(seed)
    requests = submits(rng, 8)
    with opened(
        rng,
        requests,
        launches_ahead=launches_ahead,
        strategy=strategy,
        policy=policy,
        admission=admission,
        hurry=hurry,
    ) as (world, loop, _):
        world.cancels = cancels
        assert loop.run()
    for submit in requests:
        tokens, expected = world.tokens[submit.request_id], expected_tokens(submit)
        if world.ended[submit.request_id] is FinishReason.ABORT:
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
    again = world.setup.make_scheduler()
    for now, events, plan in world.calls:
        assert again.step(now, events) == plan


KINDS = {
    "ends": ((PLAIN, STOPPED), {}, 0.0),
    "aborts": ((PLAIN, STOPPED), {}, 0.2),
    "swaps": ((PLAIN, STOPPED), {"strategy": "proactive"}, 0.0),
    "penalties": ((PLAIN, PENALIZED), {}, 0.0),
    "grammars": ((PLAIN, STRUCTURED), {}, 0.0),
}
"""What the requests ask for, options of their world, and how often one is cancelled."""
OCCUR = {
    "ends": {FinishReason.STOP, FinishReason.LENGTH},
    "aborts": {FinishReason.ABORT, FinishReason.LENGTH},
    "swaps": set(CopyDirection),
}


def tokens_of(seed, kind, **ways):
    """What requests of a kind get, how they end, which copies were made, and steps ahead."""
    rules, options, cancels = KINDS[kind]
    rng = random.Random(seed)
    requests = submits(rng, 6, rules=rules)
    with opened(rng, requests, **ways, **options) as (world, loop, _):
        world.cancels = cancels
        assert loop.run()
    plans = [plan for _, _, plan in world.calls if plan]
    seen = {*world.ended.values(), *(copy.direction for plan in plans for copy in plan.copies)}
    return world.tokens, seen, loop.ahead


@pytest.mark.parametrize("way", ["looks_ahead", "launches_ahead"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_one_step_at_a_time(kind, way):
    """On a CPU, and on the stand-in of a device."""
    all_seen, all_ahead = set(), 0
    for seed in range(12):
        one_at_a_time, _, none = tokens_of(seed, kind, looks_ahead=False)
        tokens, seen, ahead = tokens_of(seed, kind, **{"looks_ahead": False, way: True})
        assert not none
        all_seen |= seen
        all_ahead += ahead
        for name, expected in one_at_a_time.items():
            common = min(len(tokens[name]), len(expected)) if kind == "aborts" else None
            assert tokens[name][:common] == expected[:common]
    assert all_ahead > 50
    assert OCCUR.get(kind, set()) <= all_seen


def test_a_step_is_charged_what_it_took_the_device_however_long_the_others_took():
    """And not from its command, which came while the step before was computed."""
    requests = submits(random.Random(5), 6, rules=(PLAIN,))
    with opened(random.Random(5), requests, launches_ahead=True) as (world, loop, _):
        assert loop.run()
    charged = [
        event.elapsed_s
        for _, events, _ in world.calls
        for event in events
        if isinstance(event, StepDone)
    ]
    assert loop.ahead > 0
    assert charged == [STEP_S] * len(charged)


@pytest.mark.parametrize("launches_ahead", [False, True])
def test_each_token_after_the_first_is_computed_ahead_of_its_command(launches_ahead):
    submit = Submit("r", (5, 6, 7), SamplingParams(max_tokens=17))
    with opened(random.Random(1), [submit], hurry=0.0, launches_ahead=launches_ahead) as (
        world, loop, runner,
    ):  # fmt: skip
        assert loop.run()
    assert world.tokens["r"] == expected_tokens(submit)
    assert (loop.ahead, runner.steps, runner.abandoned_steps) == (16, 17, 0)


@pytest.mark.parametrize(
    ("piece", "token", "fits"),
    [
        (SequenceSlice("a", 3, 1, True, 1, ()), 8, True),
        (SequenceSlice("a", 3, 1, True, 1, (9,)), 8, True),  # the block of its next token
        (SequenceSlice("a", 3, 1, True, 1, ()), 7, False),
        (SequenceSlice("a", 2, 1, True, 1, ()), 8, False),
        (SequenceSlice("b", 3, 1, True, 1, ()), 8, False),
    ],
)
def test_a_command_for_anything_else_does_not_fit(piece, token, fits):
    runner = FakeModelRunner(device_blocks=9, block_size=4, vocab_size=VOCAB, looks_ahead=True)
    ahead = LookAhead(runner.execute_ahead, 4)
    params = SamplingParams(max_tokens=9)
    batch = [SequenceInput("a", (5, 6, 7), 0, [1], True, params, seed=0, prompt_tokens=3)]
    ahead.go_on(batch, StepOutput([8]), lambda: Verdict.UNKNOWN)
    command = StepCommand(Plan(1, (piece,)), ((token,),))
    assert ahead.fits(command) is fits
    taken = ahead.take(command)
    assert (taken is not None) is fits
    assert ahead.take(command) is None
    # Where the last guess was wrong, the next step is not computed ahead.
    ahead.go_on(batch, StepOutput([8]), lambda: Verdict.UNKNOWN)
    assert runner.steps == 1 + fits
    runner.close()


def test_the_device_has_the_next_step_before_the_host_waits_for_the_last(monkeypatch):
    submit, done = Submit("r", (5, 6, 7), SamplingParams(max_tokens=4)), []
    with opened(random.Random(1), [submit], launches_ahead=True) as (_, loop, runner):
        launch = loop._launch_ahead._launch

        def watched(batch):
            number = len([each for each in done if each[0] == "launch"])
            done.append(("launch", number))
            result = launch(batch)

            def waited():
                done.append(("wait", number))
                return result()

            return waited

        monkeypatch.setattr(loop._launch_ahead, "_launch", watched)
        assert loop.run()
        assert runner.steps == 4
    assert done == [
        ("launch", 0), ("launch", 1), ("wait", 0), ("launch", 2), ("wait", 1),
        ("launch", 3), ("wait", 2), ("wait", 3),
    ]  # fmt: skip


def test_without_it_a_step_waits_for_its_command():
    submit = Submit("r", (5, 6, 7), SamplingParams(max_tokens=17))
    with opened(random.Random(1), [submit], looks_ahead=False) as (_, loop, runner):
        assert loop.run()
    assert (loop.ahead, runner.steps) == (0, 17)


@pytest.mark.parametrize("hurry", [0.0, 1.0])
def test_who_ends_by_a_stop_token_does_not_stop_the_others(hurry):
    """A command for some of the sequences takes what was computed for them."""
    params = SamplingParams(max_tokens=24, stop_token_ids=STOPS)
    requests = [Submit(f"r{index}", (index, 9), params) for index in range(3)]
    ends = [len(expected_tokens(each)) for each in requests]
    with opened(random.Random(1), requests, hurry=hurry, policy="fcfs") as (world, loop, _):
        assert loop.run()
    assert len(set(ends)) == 3, ends
    for submit in requests:
        assert world.tokens[submit.request_id] == expected_tokens(submit)
    assert loop.ahead > max(ends) / 2
