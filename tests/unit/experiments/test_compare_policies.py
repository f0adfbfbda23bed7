"""All policies on the standing set, in small."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from fastserve_mega import cli
from fastserve_mega.experiments import compare_policies, standing_set
from fastserve_mega.experiments.compare_policies import CompareOptions, measure, run_comparison
from fastserve_mega.experiments.comparison_tables import cell, interval, shortfalls
from fastserve_mega.experiments.run_log import Run, RunLog
from fastserve_mega.experiments.standing_set import (
    STANDING_SET,
    StandingWorkload,
    at_rate,
    find_workload,
)
from fastserve_mega.simulator.config import make_pools
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.system.deployment import plan_deployment


def tiny(random, count):
    return [RequestSpec(number + 1.0, 20 + number % 3, 3 + number % 5) for number in range(count)]


TINY = StandingWorkload(name="tiny", about="a test", source=tiny, requests=12, quick_requests=8)


@pytest.fixture
def tiny_set(monkeypatch):
    monkeypatch.setattr(standing_set, "STANDING_SET", (TINY,))


OPTIONS = CompareOptions(
    policies=("fcfs", "srpt"), workloads=("tiny",), loads=(0.5, 2.0), quick=True, jobs=1
)


# --- the standing set ----------------------------------------------------------------------------


@pytest.mark.parametrize("workload", STANDING_SET, ids=lambda each: each.name)
def test_requests_come_once_a_second_by_seed_and_fit(workload):
    first, again, other = (workload.draw(seed, 1000) for seed in (0, 0, 1))
    assert first == again != other
    assert [each.arrival_s for each in first] == sorted(each.arrival_s for each in first)
    assert first[-1].arrival_s == pytest.approx(1000, rel=0.3)
    config = workload.load()
    longest = config.deployment.model.max_context or config.architecture.max_context
    pools = make_pools(plan_deployment(config.deployment, config.architecture))
    room = (pools.device_blocks - 1) * pools.block_size
    answer = max(each.output_tokens for each in first)
    assert max(each.prompt_tokens for each in first) + answer <= min(longest, room)


def test_each_can_be_handed_to_another_process():
    assert pickle.loads(pickle.dumps(STANDING_SET)) == STANDING_SET


def test_names_are_unique_and_known():
    assert len({workload.name for workload in STANDING_SET}) == len(STANDING_SET)
    assert find_workload("flood").name == "flood"
    with pytest.raises(ValueError, match="there is no workload 'floo'; there are sharegpt, "):
        find_workload("floo")


def test_special_requests_are_there():
    clients = {each.client for each in find_workload("flood").draw(0, 200)}
    assert clients == {"flood", "writer"}
    priorities = {each.priority for each in find_workload("priorities").draw(0, 50)}
    assert priorities == {0, 4}
    longest = [each.output_tokens for each in find_workload("one-long-answer").draw(0, 50)]
    assert longest.index(32_768) == 15
    bursts = [each.arrival_s for each in find_workload("prompt-bursts").draw(0, 300)]
    assert len(set(bursts)) == 2


def test_a_rate_divides_the_times():
    requests = tiny(np.random.default_rng(0), 3)
    assert [each.arrival_s for each in at_rate(requests, 4.0)] == [0.25, 0.5, 0.75]


def test_twice_the_saturation_rate_cannot_be_served(tiny_set):
    rate = TINY.saturation_rate(20)
    served = {
        load: measure(Run("tiny", load, "fcfs", 0), rate, OPTIONS)["requests_per_s"]
        for load in (0.5, 2.0)
    }
    assert served[0.5] < 0.8 * rate
    assert served[2.0] < 1.6 * rate


# --- the command ---------------------------------------------------------------------------------


def test_a_comparison_is_printed_kept_and_not_repeated(tiny_set, tmp_path, capsys, monkeypatch):
    options = replace(OPTIONS, json_path=tmp_path / "runs.jsonl")
    assert run_comparison(options) == 0
    said = capsys.readouterr().out
    assert "tiny (a test) at 0.5" in said
    assert "tiny: times fcfs" in said
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 1 + 4  # the settings, the saturation rate, the runs
    assert {json.loads(line)["policy"] for line in lines[2:]} == {"fcfs", "srpt"}

    measured = []
    monkeypatch.setattr(
        compare_policies, "measure", lambda run, *rest: measured.append(run) or measure(run, *rest)
    )
    (tmp_path / "runs.jsonl").write_text("\n".join(lines)[:-20])  # cut off while it was written
    assert run_comparison(options) == 0
    assert measured == [Run("tiny", 2.0, "srpt", 0)]
    assert capsys.readouterr().out == said
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines


def test_several_jobs_give_the_same_figures(tmp_path):
    options = replace(
        OPTIONS, workloads=("tiny-pool",), loads=(0.7,), policies=("fcfs",), json_path=None
    )
    results = []
    for jobs in (1, 2):
        path = tmp_path / f"{jobs}.jsonl"
        patched = replace(options, jobs=jobs, json_path=path)
        assert run_comparison(patched) == 0
        results.append(sorted(path.read_text().splitlines()))
    assert results[0] == results[1]


def test_a_policy_that_fails_is_told_and_the_others_go_on(tiny_set, capsys, monkeypatch):
    def fail_srpt(config, requests, *, slo):
        if config.deployment.scheduler.policy == "srpt":
            raise RuntimeError("3 requests are stuck at 7 s")
        return simulate(config, requests, slo=slo)

    simulate = compare_policies.simulate
    monkeypatch.setattr(compare_policies, "simulate", fail_srpt)
    assert run_comparison(OPTIONS) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "tiny at 0.5, srpt: RuntimeError: 3 requests are stuck at 7 s" in said
    assert "fcfs" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies", "fcsf"], "fcsf"),
        (["--policies", "nowhere:Policy"], "scheduler.policy 'nowhere:Policy' cannot be loaded"),
        (["--workloads", "sharegtp"], "there is no workload 'sharegtp'; there are sharegpt, "),
        (["--loads", "0"], "must be a positive number, got '0'"),
        (["--jobs", "0"], "must be a positive number, got '0'"),
        (["--slo", "1"], "not of the form TTFT,TPOT in seconds: '1'"),
    ],
)
def test_wrong_options_end_with_a_sentence(words, message, capsys):
    try:
        status = cli.main(["compare-policies", *words])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err


# --- the file of results -------------------------------------------------------------------------


def test_a_file_of_other_settings_or_of_something_else_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    RunLog(path, {"quick": True})
    with pytest.raises(ValueError, match="holds a comparison with quick=True, this one has False"):
        RunLog(path, {"quick": False})
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="holds no comparison of policies"):
        RunLog(path, {"quick": True})


def test_results_are_read_back(tmp_path):
    path, run = tmp_path / "runs.jsonl", Run("a", 0.5, "fcfs", 3)
    log = RunLog(path, {})
    log.add_rate("a", 2.5)
    log.add(run, {"goodput": 1.0})
    again = RunLog(path, {})
    assert again.saturation_rates == {"a": 2.5}
    assert again.results == {run: {"goodput": 1.0}}


# --- figures -------------------------------------------------------------------------------------


def test_intervals_by_hand():
    assert interval([3.0]) is None
    assert interval([1.0, 3.0]) == pytest.approx(12.71, rel=0.001)  # sd sqrt(2), over sqrt(2)
    assert cell([0.0123]) == "0.012"
    assert cell([0.0]) == "0"
    assert cell([1234.5, 1234.5]) == "1234 ±0"


def result(**changes):
    figures = {
        "requests_per_s": 1.0, "goodput": 0.9, "max_gap_s": 0.1, "recomputed_share": 0.0,
    }  # fmt: skip
    return figures | changes


def test_where_a_policy_falls_short():
    base = [result()]
    assert not list(shortfalls(base, base))
    assert list(shortfalls([result(requests_per_s=0.96)], base)) == ["throughput 0.96"]
    assert list(shortfalls([result(recomputed_share=0.03)], base)) == ["recomputed 3.0 %"]
    assert list(shortfalls([result(max_gap_s=3.0)], base)) == ["gap 3 s"]
    assert list(shortfalls([result(goodput=0.8)], base)) == ["good 80.0 %, not 90.0"]
    # What fcfs does too is not held against a policy.
    assert not list(shortfalls([result(max_gap_s=3.0)], [result(max_gap_s=4.0)]))
