"""The comparison of a live run with its simulation, on fake ranks that take a known time."""

import asyncio
import json
import time

import pytest
from fake_server import GatedRunner

from fastserve_mega.coordinator.event_log import SchedulerSetup, read_event_log
from fastserve_mega.coordinator.profile_file import load_profile
from fastserve_mega.experiments import live_run
from fastserve_mega.experiments import live_vs_simulated as experiment
from fastserve_mega.experiments.other_policies import simulate
from fastserve_mega.records import convert
from fastserve_mega.scheduling.cost_model import Profile
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.simulator.profiled_engine import ProfiledEngine
from fastserve_mega.simulator.records import RequestRecord
from fastserve_mega.simulator.workload import RequestSpec
from fastserve_mega.system.config import MlfqConfig, SchedulerConfig, SwapConfig

STEP_S, TOKEN_S = 0.02, 0.001
PROFILE = f"""{{
 "prefill": [{{"tokens": 1, "seconds": {STEP_S + TOKEN_S}}},
             {{"tokens": 101, "seconds": {STEP_S + 101 * TOKEN_S}}}],
 "decode": [{{"batch": 1, "context": 16, "seconds": {STEP_S + TOKEN_S}}},
            {{"batch": 11, "context": 16, "seconds": {STEP_S + 11 * TOKEN_S}}}]
}}"""


class PunctualRunner(GatedRunner):
    """Takes as long as the profile says."""

    def execute(self, batch):
        tokens = sum(len(sequence.token_ids) for sequence in batch)
        time.sleep(STEP_S + TOKEN_S * tokens)
        return super().execute(batch)


def test_a_punctual_engine_is_simulated_closely(start_server, tmp_path):
    profile, log = tmp_path / "profile.json", tmp_path / "log.jsonl"
    profile.write_text(PROFILE)
    specs = [RequestSpec(i * 0.05, 3 + 5 * (i % 7), 4 + 3 * (i % 5)) for i in range(20)]
    with start_server(
        make_runner=PunctualRunner, profile=str(profile), coordinator={"event_log": str(log)}
    ) as server:
        clients = asyncio.run(live_run.send_all(server.endpoint, specs))
    live = clients.records
    assert clients.copy_block_s == 0.0
    assert clients.delivery_s > 0.0
    setup, calls = read_event_log(log)
    engine = ProfiledEngine(load_profile(profile), (1,))
    sent = [
        spec._replace(arrival_s=record.arrival_s) for spec, record in zip(specs, live, strict=True)
    ]
    simulated = simulate(setup, engine, sent, clients.delivery_s)
    assert [(r.prompt_tokens, r.output_tokens) for r in simulated] == [spec[1:3] for spec in specs]
    rows = experiment.compare(live, simulated)
    assert [row.name for row in rows] == ["TTFT mean", "TTFT P95", "JCT mean", "JCT P95"]
    # Never faster than the runner sleeps; how much slower depends on the machine's other work.
    assert all(-0.5 < row.difference < 0.1 for row in rows)
    steps = experiment.step_times(list(calls), engine)
    assert [row.kind for row in steps] == ["decode", "with prefill"]
    for row in steps:
        assert row.steps > 0
        assert row.live_s > 0.9 * row.expected_s  # never faster than the runner sleeps
    everything_at_once = experiment.drain_rate(setup, engine, specs)
    assert everything_at_once > len(specs) / max(record.finish_s for record in simulated)


def record(arrival_s, first_token_s, finish_s):
    gap_s = finish_s - first_token_s
    return RequestRecord(1, 2, arrival_s, first_token_s, finish_s, gap_s, 0.0)


def test_differences_by_hand():
    live = [record(0.0, 1.0, 3.0), record(1.0, 4.0, 6.0)]
    simulated = [record(0.0, 1.0, 2.0), record(1.0, 2.0, 5.0)]
    mean_ttft, _, mean_jct, p95_jct = experiment.compare(live, simulated)
    assert (mean_ttft.live_s, mean_ttft.simulated_s) == (2.0, 1.0)
    assert mean_ttft.difference == -0.5
    assert mean_jct.difference == pytest.approx(3 / 4 - 1)
    assert p95_jct.live_s == pytest.approx(4.9)


def test_delivery_is_part_of_what_clients_see():
    setup = SchedulerSetup(
        scheduler=SchedulerConfig(mlfq=MlfqConfig(starvation_limit_s=None)), swap=SwapConfig(),
        pools=PoolSizes(100, 0, 16), profile=convert(json.loads(PROFILE), Profile), window=1,
        first_step_id=0,
    )  # fmt: skip
    engine = ProfiledEngine(setup.profile, (1,))
    (near,) = simulate(setup, engine, [RequestSpec(1.0, 9, 3)])
    (far,) = simulate(setup, engine, [RequestSpec(1.0, 9, 3)], delivery_s=0.5)
    assert near.ttft_s == pytest.approx(STEP_S + 9 * TOKEN_S)
    assert far.arrival_s == pytest.approx(1.0)
    assert far.ttft_s == pytest.approx(near.ttft_s + 0.5)
    assert far.jct_s == pytest.approx(near.jct_s + 0.5)
