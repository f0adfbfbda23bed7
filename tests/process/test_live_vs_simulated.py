"""The comparison of a live run with its simulation, on fake ranks that take a known time."""

import asyncio
import sys
import time
from pathlib import Path

import pytest
from fake_server import GatedRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import live_vs_simulated as tool

from fastserve_mega.coordinator.event_log import read_event_log
from fastserve_mega.coordinator.profile_file import load_profile
from fastserve_mega.simulator.profiled_engine import ProfiledEngine
from fastserve_mega.simulator.records import RequestRecord
from fastserve_mega.simulator.workload import RequestSpec

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
        live, copy_block_s = asyncio.run(tool.send_all(server.endpoint, specs))
    assert copy_block_s == 0.0
    setup, calls = read_event_log(log)
    engine = ProfiledEngine(load_profile(profile), (1,))
    sent = [
        spec._replace(arrival_s=record.arrival_s) for spec, record in zip(specs, live, strict=True)
    ]
    simulated = tool.simulate(setup, engine, sent)
    assert [(r.prompt_tokens, r.output_tokens) for r in simulated] == [spec[1:] for spec in specs]
    rows = tool.compare(live, simulated)
    assert [row.name for row in rows] == ["TTFT mean", "TTFT P95", "JCT mean", "JCT P95"]
    # Never faster than the runner sleeps; how much slower depends on the machine's other work.
    assert all(-0.5 < row.difference < 0.1 for row in rows)
    elapsed_s, expected_s = tool.step_times(list(calls), engine)
    assert 0.9 * expected_s < elapsed_s < 2 * expected_s
    everything_at_once = tool.saturation_rate(setup, engine, specs)
    assert everything_at_once > len(specs) / max(record.finish_s for record in simulated)


def test_differences_by_hand():
    live = [RequestRecord(1, 2, 0.0, 1.0, 3.0), RequestRecord(1, 2, 1.0, 4.0, 6.0)]
    simulated = [RequestRecord(1, 2, 0.0, 1.0, 2.0), RequestRecord(1, 2, 1.0, 2.0, 5.0)]
    mean_ttft, _, mean_jct, p95_jct = tool.compare(live, simulated)
    assert (mean_ttft.live_s, mean_ttft.simulated_s) == (2.0, 1.0)
    assert mean_ttft.difference == -0.5
    assert mean_jct.difference == pytest.approx(3 / 4 - 1)
    assert p95_jct.live_s == pytest.approx(4.9)
