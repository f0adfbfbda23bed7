"""The experiments run from what is installed, on small samples."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from fastserve_mega.experiments import paper, steady_state
from fastserve_mega.experiments.sweep import Bound, Line, RateSearch, backlog_rate
from fastserve_mega.experiments.systems import SETTINGS, load_system
from fastserve_mega.simulator.config import make_pools
from fastserve_mega.simulator.workload import load_lengths
from fastserve_mega.system.deployment import plan_deployment


@pytest.mark.parametrize("name", SETTINGS)
def test_every_system_has_the_pools_its_figures_are_for(name):
    config = load_system(name, "paper-sharegpt")
    pools = make_pools(plan_deployment(config.deployment, config.architecture))
    assert f"kv_cache.device_blocks={pools.device_blocks}" in SETTINGS[name]
    changed = load_system(name, "paper-sharegpt", ["kv_cache.device_blocks=7"])
    assert changed.deployment.kv_cache.device_blocks == 7


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"there is no opt-1b\.yaml; there are .*opt-13b-a100"):
        load_system("opt-1b", "paper-sharegpt")
    with pytest.raises(ValueError, match=r"there is no alpacca\.yaml; there are .*paper-alpaca"):
        load_system("opt-13b-a100", "alpacca")


def test_a_crossing_is_found_and_interpolated(monkeypatch):
    config = load_system("opt-13b-a100", "paper-sharegpt")
    search = RateSearch(config, load_lengths(config.workload), ((1, 10),), tolerance=0.1)
    monkeypatch.setattr(
        RateSearch, "report", lambda self, policy, rate, seed: SimpleNamespace(rate=rate)
    )

    def latency_s(report):
        return report.rate / 10

    bound = Bound(latency_s, 0.3)
    assert search.max_rate("fcfs", 0, bound, start=1.0) == pytest.approx(3.0)
    assert search.max_rate("fcfs", 0, bound, start=20.0) == pytest.approx(3.0)
    assert search.max_rate("fcfs", 0, Bound(lambda report: 0.0, 0.3), start=1.0) >= 8.0
    assert search.max_rate("fcfs", 0, Bound(lambda report: 1.0, 0.3), start=1.0) == 0.0


def test_skip_join_is_faster_than_fcfs_in_a_crowded_run():
    config = load_system("opt-13b-a100", "paper-sharegpt")
    lengths = load_lengths(config.workload)
    rate = 2 * backlog_rate(config, lengths, num_requests=50)
    search = RateSearch(config, lengths, ((1, 100),))
    fcfs, skip_join = (
        paper.BOUNDS["mean"].measure(search.report(policy, rate, 0))
        for policy in ("fcfs", "skip_join_mlfq")
    )
    assert 0 < skip_join < fcfs


def test_more_requests_are_out_of_time_by_a_stricter_slo_and_at_a_higher_rate():
    config = load_system("opt-13b-a100", "paper-sharegpt")
    lengths = load_lengths(config.workload)
    search = RateSearch(config, lengths, ((1, 100),))
    names = [f"missed {slo}" for slo in paper.PAPER_SLOS]
    strict, medium, loose = (
        paper.BOUNDS[name].measure(search.report("fcfs", 4.0, 0)) for name in names
    )
    assert 1 >= strict >= medium >= loose > 0
    assert paper.BOUNDS[names[0]].measure(search.report("fcfs", 0.5, 0)) < strict
    assert 0.5 < search.max_rate("fcfs", 0, paper.BOUNDS[names[0]], start=1.0) < 4.0


def test_rates_of_several_seeds_are_told_by_mean_and_range():
    line = Line("x", "mean", (161.0, 338.0), 8.0, {"fcfs": [1.0, 3.0], "srpt": [9.0, 8.0]})
    assert line.mean("fcfs") == 2.0
    assert line.spread("fcfs") == "2.00 (1.00-3.00)"
    assert line.spread("srpt") == "> 8.0"


class SerialPool:
    """Stands for the pool of processes."""

    def __init__(self, jobs):
        assert jobs == 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    map = staticmethod(map)


def test_the_papers_comparisons_are_told_beside_its_figures(tmp_path, monkeypatch, capsys):
    limits = {}

    def max_rate(search, policy, seed, bound, start):
        limits.setdefault(bound.limit, set()).add(search.config.deployment.model.path)
        return 2.0 + 3.0 * (policy == "skip_join_mlfq") + seed

    monkeypatch.setattr(paper, "ProcessPoolExecutor", SerialPool)
    monkeypatch.setattr(paper, "backlog_rate", lambda config, lengths, num_requests: 1.0)
    monkeypatch.setattr(RateSearch, "max_rate", max_rate)
    path = tmp_path / "rates.json"
    options = ["--seeds", "2", "--jobs", "1", "--json", str(path)]
    paper.main([*options, "--policies", "skip_join_mlfq", "fcfs"])

    shown = capsys.readouterr().out
    assert {"5.50", "(5.00-6.00)", "2.50", "(2.00-3.00)", "2.20"} <= set(shown.split())
    assert "2.41, 4.89, 2.03" in shown  # the paper's first row
    lines = json.loads(path.read_text())
    names = Counter(line["measure"] for line in lines)
    slos = {f"missed {slo}": len(paper.SLO_SYSTEMS) for slo in paper.PAPER_SLOS}
    swaps_and_ratios = len(paper.SWAP_RATES) + len(paper.RATIOS)
    assert names == {"mean": len(paper.ROWS) + 2 + swaps_and_ratios, "P95": len(paper.ROWS), **slos}
    assert {tuple(line["rates"]) for line in lines if line["measure"] == "P95"} == {
        ("skip_join_mlfq", "fcfs")
    }
    assert set(limits) == {paper.LIMIT_S, 0.05}
    assert len(limits[0.05]) == len(paper.SLO_SYSTEMS)


def test_the_steady_state_compares_policies_at_each_load(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steady_state, "LOADS", (0.5,))
    config = load_system("opt-13b-a100", "paper-sharegpt")
    reports = steady_state.loads(config, None, ("fcfs", "srpt"), share=0.02)
    assert [report.policy for report in reports] == ["fcfs", "srpt"]
    assert [report.requests for report in reports] == [40, 40]
    assert "times of srpt" in capsys.readouterr().out
    json_path = tmp_path / "none.json"
    steady_state.main(["--config", "", "--trace", "", "--json", str(json_path)])
    assert json.loads(json_path.read_text()) == []
