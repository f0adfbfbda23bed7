"""A live run, repeated from its event log: every plan comes out byte for byte the same."""

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from fake_server import VOCAB, WAIT_MS, expected_tokens

from fastserve_mega.client import Client
from fastserve_mega.coordinator.event_log import EventLogWriter, StepCall, read_event_log
from fastserve_mega.scheduling.events import Arrived, StepDone
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import FinishReason, SamplingParams

RECORDED = Path(__file__).parent / "recorded"
ENDLESS = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)


def replay(log, *more):
    command = [sys.executable, "-m", "fastserve_mega", "replay", str(log), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def record(start_server, log, strategy="proactive", ranks=1):
    """A run with preemptions, swaps where the strategy does them, and aborts."""
    swap = SwapConfig(strategy=strategy, write_through_blocks=3, write_through_occupancy=0.3)
    with start_server(
        coordinator={"event_log": str(log)}, swap=swap, ranks=ranks, device_blocks=32,
        host_blocks=200, max_batch_size=5, max_batch_tokens=16,
    ) as server, Client(server.endpoint) as client:  # fmt: skip
        # The first of them is in a step, and stays there until all are aborted.
        server.runner.open_gate.clear()
        server.runner.entered.clear()
        aborted = [client.submit([9, i], ENDLESS) for i in range(3)]
        assert server.runner.entered.wait(WAIT_MS / 1000)
        jobs = []
        for i in range(10):
            prompt = [1 + (i * 37 + j) % (VOCAB - 1) for j in range(1 + 7 * i)]
            count = 5 + (i * 11) % 23
            params = SamplingParams(max_tokens=count, temperature=0.0)
            jobs.append((client.submit(prompt, params), expected_tokens(prompt, count)))
        for generation in aborted:
            generation.cancel()
            assert generation.wait().finish_reason is FinishReason.ABORT
        server.runner.open_gate.set()
        assert all(generation.wait().token_ids == expected for generation, expected in jobs)


def lines_of(log):
    return log.read_text().splitlines()


@pytest.mark.parametrize("strategy", ["proactive", "reactive", "recompute"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_recorded_run_is_repeated_exactly(start_server, tmp_path, strategy, ranks):
    log = tmp_path / "run.jsonl"
    record(start_server, log, strategy, ranks)
    setup, calls = read_event_log(log)
    calls = list(calls)
    plans = [call.plan for call in calls if call.plan]
    assert setup.window == ranks
    assert plans[0].step_id == setup.first_step_id
    kinds = {type(event).__name__ for call in calls for event in call.events}
    assert kinds >= {"Arrived", "StepDone", "Aborted"}
    assert ("CopyDone" in kinds) == any(plan.copies for plan in plans) == (strategy != "recompute")
    done = replay(log)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{len(plans)} of {len(plans)} plans equal, {len(calls)} calls\n"


@pytest.mark.parametrize("name", ["proactive_one_rank", "reactive_two_ranks"])
def test_plans_recorded_by_an_earlier_version_come_out_byte_for_byte(tmp_path, name):
    log = tmp_path / "run.jsonl"
    log.write_bytes(gzip.decompress((RECORDED / f"{name}.jsonl.gz").read_bytes()))
    _, calls = read_event_log(log)
    logged = [line.partition('"plan":')[2] for line in lines_of(log)[1:]]
    decoded = [msgspec.json.encode(call.plan).decode() for call in calls]
    assert all(line.startswith(plan) for line, plan in zip(logged, decoded, strict=True))
    done = replay(log)
    assert (done.returncode, done.stderr) == (0, "")
    plans = sum(plan != "null" for plan in decoded)
    assert done.stdout == f"{plans} of {plans} plans equal, {len(decoded)} calls\n"
    assert plans > 400


def test_a_tampered_log_is_noticed(start_server, tmp_path):
    log = tmp_path / "run.jsonl"
    record(start_server, log)
    lines = lines_of(log)
    number, call = next(
        (i, json.loads(line)) for i, line in enumerate(lines)
        if i > 20 and '"batch":[[' in line
    )  # fmt: skip
    call["plan"]["batch"][0][2] += 1
    lines[number] = json.dumps(call)
    log.write_text("\n".join(lines) + "\n")
    done = replay(log)
    assert done.returncode == 1
    assert f"first difference: call {number}, now {call['now']}" in done.stdout
    equal, of, plans = done.stdout.split()[:3]
    assert (of, int(equal)) == ("of", int(plans) - 1)


def test_the_requests_of_a_log_under_another_policy(start_server, tmp_path):
    log, figures = tmp_path / "run.jsonl", tmp_path / "figures.json"
    record(start_server, log)
    done = replay(log, "--policy", "fcfs,srpt", "--json", str(figures))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(figures.read_text())
    assert found["requests"] + found["left_out"] == 13
    assert found["requests"] >= 10
    names = ["skip_join_mlfq, as it was"]
    names += [f"{name}, simulated" for name in ("skip_join_mlfq", "fcfs", "srpt")]
    assert list(found["latencies_s"]) == names
    for latencies in found["latencies_s"].values():
        assert 0 < latencies["TTFT"]["mean"] < latencies["JCT"]["mean"]
        assert f"{latencies['JCT']['mean']:.3f}" in done.stdout


def test_a_log_without_answers_has_no_latencies(start_server, tmp_path):
    log = tmp_path / "run.jsonl"
    with start_server(coordinator={"event_log": str(log)}):
        pass
    done = replay(log, "--policy", "fcfs")
    assert done.returncode == 2
    assert done.stderr == "fastserve-mega replay: no request of the log got a token\n"


def test_another_setup_gives_other_plans(start_server, tmp_path):
    log = tmp_path / "run.jsonl"
    record(start_server, log)
    first, *rest = lines_of(log)
    setup = json.loads(first)
    setup["scheduler"]["policy"] = "fcfs"
    log.write_text("\n".join([json.dumps(setup), *rest]) + "\n")
    assert replay(log).returncode == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"now": 1.0', "line 2: "),
        ('{"now": 1.0, "events": [], "plan": null, "colour": 1}', "unknown field 'colour'"),
        ('{"now": 1.0, "events": [{"type": "Departed"}], "plan": null}', "is not one of Arrived, "),
        ('{"now": 1.0, "events": [{"type": "CopyDone", "copy_id": "1"}], "plan": null}', "`int`"),
    ],
)
def test_a_damaged_log_is_told_in_one_sentence(start_server, tmp_path, line, message):
    log = tmp_path / "run.jsonl"
    with start_server(coordinator={"event_log": str(log)}):
        pass
    log.write_text(lines_of(log)[0] + "\n" + line + "\n")
    done = replay(log)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith(f"fastserve-mega replay: {log}, line 2: ")
    assert done.stderr.count("\n") == 1


def test_an_empty_and_a_missing_log(tmp_path):
    (tmp_path / "empty").touch()
    assert "is empty" in replay(tmp_path / "empty").stderr
    assert replay(tmp_path / "missing").returncode == 2


def test_a_full_disk_ends_the_log_and_not_the_server(tmp_path, caplog):
    writer = EventLogWriter(Path("/dev/full"))
    writer.write(StepCall(0.0, (), None))
    writer.write(StepCall(1.0, (), None))
    assert len(caplog.records) == 1
    writer.close()


def test_a_disk_with_room_for_part_of_a_line_leaves_whole_lines(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    writer = EventLogWriter(path)
    writer.write(StepCall(0.0, (), None))
    line, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(line) * 2 - 5, limits[1]))
    try:
        writer.write(StepCall(1.0, (), None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.write(StepCall(2.0, (), None))
    assert path.read_bytes() == line
    assert [record.message for record in caplog.records] == [
        "the event log ends here: [Errno 28] No space left on device"
    ]


def test_a_log_that_cannot_be_written_is_told_before_anything_starts(start_server, tmp_path):
    missing = str(tmp_path / "missing" / "run.jsonl")
    with (
        pytest.raises(OSError, match="No such file"),
        start_server(coordinator={"event_log": missing}),
    ):
        pass


def story(log, name):
    command = [sys.executable, "-m", "fastserve_mega", "story", str(log), name]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_story_of_a_request_of_a_log(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_bytes(gzip.decompress((RECORDED / "proactive_one_rank.jsonl.gz").read_bytes()))
    events = [event for call in read_event_log(log)[1] for event in call.events]
    ids = [event.request_id for event in events if isinstance(event, Arrived)]
    finished = [name for each in events if isinstance(each, StepDone) for name in each.finished]
    told = {name: story(log, name) for name in (finished[0], finished[-1])}
    unknown = story(log, "nobody")
    for name, done in told.items():
        assert (done.returncode, done.stderr) == (0, "")
        first, *lines = done.stdout.splitlines()
        assert first == f"request {name}, seconds since it arrived"
        assert lines[0].startswith("     0.000  arrived with ")
        assert "tokens" in lines[-1]
    everything = "".join(done.stdout for done in told.values())
    assert "ran in " in everything
    assert "device blocks" in everything
    assert unknown.returncode == 2
    assert f"has no request 'nobody'; it has {len(ids)}: {ids[0]}, " in unknown.stderr
