from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from fastserve_mega.simulator.config import SimulationConfig, load_simulation_config
from fastserve_mega.simulator.main import run_simulate, simulate, with_policy
from fastserve_mega.simulator.records import RequestRecord, SimulationResult
from fastserve_mega.simulator.replica import CopyStats
from fastserve_mega.simulator.report import jain_index, summarize, to_json
from fastserve_mega.simulator.workload import make_requests
from fastserve_mega.slo import Slo

CONFIGS = Path(__file__).parents[3] / "configs"
DEPLOYMENT = CONFIGS / "opt-13b-a100.yaml"
WORKLOAD = CONFIGS / "workloads" / "paper-sharegpt.yaml"

LENGTHS = "prompt_tokens,output_tokens,turn\n" + "".join(
    f"{5 + 37 * i % 400},{1 + 53 * i % 300},0\n" for i in range(200)
)


@pytest.fixture
def config(tmp_path: Path) -> SimulationConfig:
    (tmp_path / "w.csv").write_text(LENGTHS, encoding="utf-8")
    overrides = ["workload.source=w.csv", "workload.num_requests=60", "workload.rate=4"]
    return load_simulation_config(DEPLOYMENT, WORKLOAD, overrides)


def test_figures_of_a_report() -> None:
    records = tuple(
        RequestRecord(5, output, 1.0, 2.0, 2.0 + output, largest_gap_s=1.0, lateness_s=1.0)
        for output in range(1, 102)
    )
    result = SimulationResult(
        records=records, rejected=0, elapsed_s=202.0, steps=9, slices=18,
        decode_tokens=8, prefill_tokens=7, output_tokens=404, finished=101, busy_s=101.0,
        preemptions=0, recomputed_tokens=0,
        copies=CopyStats(), timeline=(),
    )  # fmt: skip
    report = summarize(result, "fcfs", 2.0)
    assert (report.jct_s.mean, report.jct_s.p50, report.jct_s.p95) == (52.0, 52.0, 97.0)
    assert report.jct_s.p99 == pytest.approx(101.0)
    assert report.ttft_s.mean == 1.0
    assert report.slowest_long_jct_s == pytest.approx(101.0)  # 100, 101, 102 of the longest 26
    assert (report.requests_per_s, report.output_tokens_per_s) == (0.5, 2.0)
    assert (report.utilization, report.mean_batch_size) == (0.5, 2.0)
    assert json.loads(to_json([report]))[0]["tpot_s"]["p50"] == pytest.approx(52 / 51)


def test_the_same_seed_gives_the_same_report(config: SimulationConfig, tmp_path: Path) -> None:
    reports = []
    for seed in (0, 0, 1):
        seeded = replace(config, workload=replace(config.workload, seed=seed))
        requests = make_requests(seeded.workload, tmp_path)
        reports.append(to_json([summarize(simulate(seeded, requests), "x", 4.0)]))
    assert reports[0] == reports[1] != reports[2]


def test_what_users_feel_by_hand() -> None:
    records = (  # prompt, output, arrival, first token, end, largest gap, lateness, client
        RequestRecord(5, 11, 0.0, 1.0, 2.0, 0.1, 1.0, "a"),  # good, played
        RequestRecord(5, 11, 0.0, 1.0, 2.0, 0.5, 1.2, "a"),  # good, but paused on the way
        RequestRecord(5, 11, 0.0, 1.5, 2.5, 0.1, 1.5, "b"),  # the first token came too late
        RequestRecord(5, 11, 0.0, 1.0, 7.0, 6.0, 6.0, "b"),  # too slow
    )
    result = SimulationResult(
        records=records, rejected=0, elapsed_s=7.0, steps=9, slices=18,
        decode_tokens=40, prefill_tokens=60, output_tokens=44, finished=4, busy_s=7.0,
        preemptions=1, recomputed_tokens=25, copies=CopyStats(), timeline=(), slo=Slo(1.0, 0.1),
    )  # fmt: skip
    report = summarize(result, "fcfs", 2.0)
    assert (report.goodput, report.play) == (0.5, 0.25)
    assert report.paper_goodputs == (0.75, 0.75, 1.0)
    assert (report.max_gap_s, report.gap_s.p50) == (6.0, pytest.approx(0.3))
    assert report.recomputed_share == 0.25
    assert report.client_tokens_per_s == {"a": 22 / 4, "b": 22 / 9.5}
    assert report.fairness == pytest.approx(
        (5.5 + 22 / 9.5) ** 2 / (2 * (5.5**2 + (22 / 9.5) ** 2))
    )
    plain = json.loads(to_json([report]))[0]
    assert plain["slo"] == {"ttft_s": 1.0, "tpot_s": 0.1}
    assert jain_index([1.0, 1.0]) == 1.0
    assert jain_index([1.0, 0.0]) == 0.5


@pytest.mark.parametrize(
    "policy", ["skip_join_mlfq", "paced", "mlfq", "fcfs", "fixed_priority", "srpt"]
)
def test_every_policy_finishes_every_request(
    config: SimulationConfig, tmp_path: Path, policy: str
) -> None:
    requests = make_requests(config.workload, tmp_path)
    result = simulate(with_policy(config, policy), requests)  # type: ignore[arg-type]
    assert len(result.records) == len(requests)
    assert result.output_tokens == sum(request.output_tokens for request in requests)


@pytest.mark.parametrize(
    "path",
    sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "smollm2-135m-cpu"),
    ids=lambda path: path.stem,
)
def test_shipped_deployments_run(path: Path) -> None:
    config = load_simulation_config(path, overrides=["workload.rate=2", "workload.num_requests=5"])
    assert len(simulate(config, make_requests(config.workload)).records) == 5


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("workloads/*.yaml")), ids=lambda path: path.stem
)
def test_shipped_workloads_run_without_data_of_ones_own(path: Path) -> None:
    overrides = [
        "workload.warmup_requests=0", "workload.cooldown_requests=0", "workload.num_requests=5",
    ]  # fmt: skip
    config = load_simulation_config(CONFIGS / "llama-3-8b-a100.yaml", path, overrides)
    assert len(simulate(config, make_requests(config.workload)).records) == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hardware.device=a1000", "hardware.device: 'a1000' is not known; known are a100-40g"),
        ("hardware.network=lan", "hardware.network: 'lan' is not known; known are nvlink-a100"),
        ("model.served_name=opt", "there is no .*architectures/opt/config.json"),
        ("parallel.tensor=3", "40 attention heads cannot be divided among parallel.tensor=3"),
        ("scheduler.polcy=fcfs", "unknown field 'scheduler.polcy'"),
        ("hardware.step_overhead_s=-1", "hardware.step_overhead_s must be at least 0, got -1"),
        ("hardware.device=null", "nothing says how many KV blocks there are"),
        ("hardware.device_memory_gb=20", "opt-13b does not fit: 25.7 GB of weights"),
        ("workload.rat=1", "--set workload.rat=1: unknown field 'workload.rat'"),
        (
            "workload.source={prompt: {mean: 0, cv: 1}}",
            "workload.source.prompt.mean must be above 0, got 0",
        ),
    ],
)
def test_a_bad_config_is_one_clear_error(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_simulation_config(DEPLOYMENT, WORKLOAD, [override])


def test_the_command_writes_table_json_and_plots(
    config: SimulationConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    out.mkdir()
    status = run_simulate(
        config, data=tmp_path, policies=["fcfs", "mlfq"], rates=[2.0, 4.0],
        json_path=out / "r.json", plots=out,
    )  # fmt: skip
    assert status == 0
    assert "fcfs" in capsys.readouterr().out
    runs = [(run["policy"], run["rate"]) for run in json.loads((out / "r.json").read_text())]
    assert runs == [("fcfs", 2.0), ("fcfs", 4.0), ("mlfq", 2.0), ("mlfq", 4.0)]
    assert sorted(path.name for path in out.glob("*.png")) == [
        "cdf-2.png", "cdf-4.png", "latency.png", "timeline-fcfs-2.png", "timeline-fcfs-4.png",
        "timeline-mlfq-2.png", "timeline-mlfq-4.png",
    ]  # fmt: skip


def test_the_simulator_runs_without_torch(config: SimulationConfig, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; sys.modules['zmq'] = None\n"
        "from pathlib import Path\n"
        "from fastserve_mega.simulator.config import load_simulation_config\n"
        "from fastserve_mega.simulator.main import run_simulate\n"
        f"config = load_simulation_config({str(DEPLOYMENT)!r}, {str(WORKLOAD)!r},\n"
        "    ['workload.source=w.csv', 'workload.num_requests=5'])\n"
        f"sys.exit(run_simulate(config, data=Path({str(tmp_path)!r})))\n"
    )
    root = str(Path(__file__).parents[3])
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": root}
    )
