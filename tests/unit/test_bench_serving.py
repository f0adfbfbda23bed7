from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_serving
from serving_statistics import Record, percentile, summarize


def record(index, prompt, output, *, sent, ttft, jct):
    return Record(index, prompt, output, sent, ttft, jct)


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


# --- the workload --------------------------------------------------------------------------------


def jobs(*options, seed=0):
    return bench_serving.make_jobs(bench_serving.parse_arguments([*options]), seed)


def test_the_workload_is_a_function_of_the_seed():
    options = ("--rate", "2", "--requests", "400", "--mix", "0.8:64/16,0.2:512/256")
    first, again, other = jobs(*options), jobs(*options), jobs(*options, seed=1)
    assert first == again
    assert first != other
    assert {(len(j.prompt), j.output_tokens) for j in first} == {(64, 16), (512, 256)}
    assert 0.7 < sum(j.output_tokens == 16 for j in first) / 400 < 0.9
    assert first[-1].at_s / 400 == pytest.approx(0.5, rel=0.2)
    assert all(1000 <= token < 30000 for job in first for token in job.prompt)


def test_lengths_come_from_a_file(tmp_path):
    file = tmp_path / "lengths.csv"
    file.write_text("prompt_tokens,output_tokens\n3,4\n")
    (job,) = jobs("--burst", "--requests", "1", "--lengths", str(file))
    assert (len(job.prompt), job.output_tokens, job.at_s) == (3, 4, 0.0)


@pytest.mark.parametrize(
    "options",
    [("--rate", "0"), ("--burst", "--mix", "0.8-64"), ("--burst", "--lengths", "nowhere.csv")],
)
def test_wrong_options_end_with_a_sentence(options, capsys):
    with pytest.raises(SystemExit):
        bench_serving.parse_arguments(options)
    assert "error: " in capsys.readouterr().err


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
        self._event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
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
    status = bench_serving.main(
        ["--url", url, "--burst", "--requests", "12", "--concurrency", "4", "--warmup", "1",
         "--mix", "0.5:4/2,0.5:20/8", "--json", str(file)]
    )  # fmt: skip
    assert status == 0
    result = json.loads(file.read_text())
    assert result["config"]["model"] == "tiny"
    assert result["config"]["seed"] == 0
    assert result["environment"]["cores"] >= 1
    assert result["summary"]["completed"] == 12
    tokens = [record["output_tokens"] for record in result["records"]]
    assert result["summary"]["output_tokens"] == sum(tokens)
    assert set(tokens) == {2, 8}
    assert all(0 < record["ttft_s"] <= record["jct_s"] for record in result["records"])
    assert "12 of 12 requests completed" in capsys.readouterr().out


def test_errors_are_counted_and_shown(url, capsys):
    options = ["--url", url, "--burst", "--requests", "3", "--token-ids", "666:667"]
    assert bench_serving.main(options) == 1
    assert "3 x RuntimeError: 429" in capsys.readouterr().out


def test_nobody_there_is_one_sentence(capsys):
    assert bench_serving.main(["--url", "http://127.0.0.1:1", "--burst"]) == 1
    assert capsys.readouterr().err.startswith("http://127.0.0.1:1 does not answer: ")
