"""`fastserve-mega bench`: statistics by hand, the workload, and runs against a scripted server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastserve_mega import cli
from fastserve_mega.bench.statistics import Record, percentile, summarize
from fastserve_mega.bench.workload import Lengths, make_jobs, parse_mix, read_lengths
from fastserve_mega.messaging.messages import Refused
from fastserve_mega.slo import Slo, largest_gap, lateness


def record(index, prompt, output, *, sent, ttft, jct):
    return Record(index, prompt, output, sent, ttft, jct, largest_gap_s=0.0, lateness_s=ttft)


# --- statistics ----------------------------------------------------------------------------------


def test_percentiles_by_hand():
    assert percentile([3.0], 99) == 3.0
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([10.0, 20.0, 30.0], 95) == pytest.approx(29.0)
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_latencies_of_one_request_by_hand():
    one = record(0, 10, 5, sent=1.0, ttft=0.2, jct=1.0)
    assert one.tpot_s == pytest.approx(0.2)  # 0.8 s for the four tokens after the first
    assert one.normalized_s == pytest.approx(0.2)
    assert record(0, 10, 1, sent=0.0, ttft=0.2, jct=0.2).tpot_s is None


def test_a_summary_by_hand():
    records = [
        record(0, 10, 2, sent=0.0, ttft=0.1, jct=0.3),
        record(1, 10, 2, sent=1.0, ttft=0.3, jct=0.5),
        record(2, 100, 10, sent=1.0, ttft=0.5, jct=3.0),
        Record(3, 10, 2, sent_s=2.0, error="429"),
    ]
    summary = summarize(records)
    assert (summary["requests"], summary["completed"], summary["errors"]) == (4, 3, {"429": 1})
    assert summary["duration_s"] == pytest.approx(4.0)  # from 0.0 to 1.0 + 3.0
    assert summary["output_tokens_per_s"] == pytest.approx(14 / 4)
    latency = summary["latency"]
    assert latency["all"]["ttft_s"]["mean"] == pytest.approx(0.3)
    assert latency["all"]["jct_s"]["p50"] == pytest.approx(0.5)
    assert latency["short"]["tpot_s"]["mean"] == pytest.approx(0.2)
    assert latency["short"]["normalized_latency_s"]["mean"] == pytest.approx((0.15 + 0.25) / 2)
    assert latency["long"]["normalized_latency_s"]["p99"] == pytest.approx(0.3)
    assert summary["slowest_long"] == {
        "requests": 1,
        "jct_s": 3.0,
        "normalized_latency_s": pytest.approx(0.3),
    }


def test_equal_lengths_have_no_long_class_and_no_answers_no_latency():
    assert set(summarize([record(0, 1, 2, sent=0.0, ttft=0.1, jct=0.2)] * 3)["latency"]) == {"all"}
    assert "latency" not in summarize([Record(0, 1, 2, 0.0, error="gone")])


def test_gaps_and_late_tokens_by_hand():
    times = (2.0, 2.5, 4.5, 5.0)  # two tokens each
    assert largest_gap(times) == 2.0
    assert largest_gap((2.0,)) == 0.0
    # The fifth token comes at 4.5, due at 1.0 + 4 * 0.5.
    assert lateness(times, 1.0, 8, 0.5) == pytest.approx(4.5 - 1.0 - 4 * 0.5)
    assert lateness(times, 1.0, 8, 5.0) == pytest.approx(1.0)


def test_promises_are_shares_of_all_requests():
    good = Record(0, 10, 11, 0.0, 0.5, 1.0, largest_gap_s=0.05, lateness_s=0.5)
    paused = Record(1, 10, 11, 0.0, 0.5, 1.5, largest_gap_s=0.8, lateness_s=1.3)
    slow = Record(2, 10, 11, 0.0, 2.0, 3.0, largest_gap_s=0.1, lateness_s=2.0)
    failed = Record(3, 10, 11, sent_s=0.0, error="429")
    summary = summarize([good, paused, slow, failed], Slo(1.0, 0.1))
    assert (summary["goodput"], summary["play"], summary["max_gap_s"]) == (0.5, 0.25, 0.8)
    assert summary["paper_goodputs"] == [0.5, 0.75, 0.75]
    assert summary["latency"]["all"]["largest_gap_s"]["p50"] == pytest.approx(0.1)


# --- the workload --------------------------------------------------------------------------------

MIX = (Lengths(64, 16, 0.8), Lengths(512, 256, 0.2))


def jobs(rate=2.0, seed=0):
    return make_jobs(MIX, range(1000, 30000), 400, rate, seed=seed)


def test_the_workload_is_a_function_of_the_seed():
    first, again, other = jobs(), jobs(), jobs(seed=1)
    assert first == again
    assert first != other
    assert {(len(j.prompt), j.output_tokens) for j in first} == {(64, 16), (512, 256)}
    assert 0.7 < sum(j.output_tokens == 16 for j in first) / 400 < 0.9
    assert first[-1].at_s / 400 == pytest.approx(0.5, rel=0.2)
    assert all(1000 <= token < 30000 for job in first for token in job.prompt)
    assert {job.at_s for job in jobs(rate=None)} == {0.0}


def test_runs_differ_in_their_tokens_only():
    one, other = (make_jobs(MIX, range(1000, 30000), 50, 2.0, seed=0, run=run) for run in (0, 1))
    assert [(len(job.prompt), job.output_tokens, job.at_s) for job in one] == [
        (len(job.prompt), job.output_tokens, job.at_s) for job in other
    ]
    assert not {job.prompt for job in one} & {job.prompt for job in other}


def test_lengths_are_read(tmp_path):
    assert parse_mix("0.8:64/16,0.2:512/256") == MIX
    file = tmp_path / "lengths.csv"
    file.write_text("prompt_tokens,output_tokens\n3,4\n")
    assert read_lengths(file) == (Lengths(3, 4),)
    file.write_text("prompt,output\n3,4\n")
    with pytest.raises(ValueError, match="no column 'prompt_tokens'"):
        read_lengths(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "0"], "must be a positive number, got '0'"),
        (["--rate", "1,nan"], "must be a positive number, got 'nan'"),
        (["--burst", "--concurrency", "1.5"], "must be a positive number, got '1.5'"),
        (["--burst", "--mix", "0.8-64"], "not of the form SHARE:PROMPT/OUTPUT: '0.8-64'"),
        (["--burst", "--mix", "1:64/0"], "must be positive: 1:64/0"),
        (["--burst", "--lengths", "nowhere.csv"], "nowhere.csv: No such file or directory"),
        (["--burst", "--token-ids", "7:7"], "not of the form LOW:HIGH: '7:7'"),
        (["--burst", "--slo", "1"], "not of the form TTFT,TPOT in seconds: '1'"),
        (["--burst", "--rate", "1"], "not allowed with argument"),
        (["--burst", "--url", "x", "--config", "y"], "not both"),
        (["--burst", "--set", "model.path=/m"], "give --config too"),
    ],
)
def test_wrong_options_end_with_a_sentence(options, message, capsys):
    try:
        status = cli.main(["bench", *options])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err


# --- a run ---------------------------------------------------------------------------------------


class Scripted(BaseHTTPRequestHandler):
    """Answers with max_tokens tokens, two in each event; refuses the token 666."""

    def do_GET(self):
        self._start(200, "application/json")
        self.wfile.write(b'{"data": [{"id": "tiny"}]}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "tiny"
        assert body["ignore_eos"]
        if 666 in body["prompt"]:
            self._start(429, "application/json")
            self.wfile.write(b'{"error": {"message": "full"}}')
            return
        self._start(200, "text/event-stream")
        for _ in range(0, body["max_tokens"], 2):
            self._event({"choices": [{"index": 0, "text": "ab"}], "usage": None})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _start(self, status, content_type):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()

    def _event(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_a_run_against_a_scripted_server(url, tmp_path, capsys):
    file = tmp_path / "result.json"
    status = cli.main(
        ["bench", "--url", url, "--burst", "--requests", "12", "--concurrency", "4", "--warmup",
         "1", "--mix", "0.5:4/2,0.5:20/8", "--json", str(file)]
    )  # fmt: skip
    assert status == 0
    result = json.loads(file.read_text())
    assert result["config"]["model"] == "tiny"
    assert result["config"]["seed"] == 0
    assert result["environment"]["cores"] >= 1
    (run,) = result["runs"]
    assert (run["rate"], run["concurrency"], run["summary"]["completed"]) == (None, 4, 12)
    tokens = [record["output_tokens"] for record in run["records"]]
    assert run["summary"]["output_tokens"] == sum(tokens)
    assert set(tokens) == {2, 8}
    assert all(0 < record["ttft_s"] <= record["jct_s"] for record in run["records"])
    assert "12 of 12 requests completed" in capsys.readouterr().out


def test_several_rates_are_several_runs(url, tmp_path, capsys):
    file = tmp_path / "result.json"
    options = ["--rate", "500,1000", "--concurrency", "1,3", "--requests", "4"]
    assert cli.main(["bench", "--url", f"{url}/v1", *options, "--json", str(file)]) == 0
    runs = json.loads(file.read_text())["runs"]
    loads = [(run["rate"], run["concurrency"]) for run in runs]
    assert loads == [(500, 1), (500, 3), (1000, 1), (1000, 3)]
    said = capsys.readouterr().out
    assert "all runs, latencies in seconds" in said
    assert all(name in said for name in ("concurrency", "tokens/s", "TPOT mean", "JCT P99"))
    assert said.count("4 of 4 requests completed") == 4


def test_errors_are_counted_and_shown(url, capsys):
    options = ["--url", url, "--burst", "--requests", "3", "--token-ids", "666:667"]
    assert cli.main(["bench", *options]) == 1
    assert "3 x 429" in capsys.readouterr().out


def test_nobody_there_is_one_sentence(capsys):
    assert cli.main(["bench", "--url", "http://127.0.0.1:1", "--burst"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastserve-mega bench: http://127.0.0.1:1 does not answer: ")
    assert error.count("\n") == 1


# --- over ZeroMQ ---------------------------------------------------------------------------------


def zmq_options(endpoint):
    config = ["--config", "configs/smollm2-135m-cpu.yaml"]
    return [*config, "--set", f"coordinator.client_endpoint={endpoint}", "--burst"]


def test_a_run_against_a_coordinator(fake_coordinator, tmp_path):
    file = tmp_path / "result.json"
    options = ["--requests", "5", "--output-len", "4", "--json", str(file)]
    assert cli.main(["bench", *zmq_options(fake_coordinator.endpoint), *options]) == 0
    result = json.loads(file.read_text())
    (run,) = result["runs"]
    assert result["config"]["url"] is None
    assert result["config"]["model"] == "tiny"
    assert run["summary"]["completed"] == 5
    assert run["summary"]["output_tokens"] == 20
    assert all(0 < record["ttft_s"] <= record["jct_s"] for record in run["records"])


def test_a_coordinator_that_refuses(fake_coordinator, capsys):
    fake_coordinator.behaviour = lambda submit: [Refused("no", submit.request_id)]
    assert cli.main(["bench", *zmq_options(fake_coordinator.endpoint), "--requests", "2"]) == 1
    assert "2 x InvalidRequestError: no" in capsys.readouterr().out
