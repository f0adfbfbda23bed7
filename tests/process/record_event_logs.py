#!/usr/bin/env python3
"""Record the event logs of test_event_log.py anew, when a change of the plans is intended.

PYTHONPATH=.:tests/process tests/process/record_event_logs.py DIRECTORY_WITH_A_TOKENIZER
"""

from __future__ import annotations

import gzip
import re
import sys
import tempfile
from pathlib import Path

from fake_server import VOCAB, expected_tokens, fake_server, make_model_directory

from fastserve_mega.client import Client
from fastserve_mega.system.config import SwapConfig
from fastserve_mega.types import SamplingParams

RECORDED = Path(__file__).parent / "recorded"
CALLS = 1_000
ENDLESS = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)


def record(tokenizer: Path, name: str, ranks: int, strategy: str) -> None:
    """Requests that share prefixes, get in each other's way, and of which some are aborted."""
    swap = SwapConfig(strategy=strategy, write_through_blocks=3, write_through_occupancy=0.3)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "run.jsonl"
        model = make_model_directory(tokenizer, Path(scratch) / "model")
        with fake_server(
            model, coordinator={"event_log": str(log)}, swap=swap, ranks=ranks, device_blocks=48,
            host_blocks=300, max_batch_size=5, max_batch_tokens=32,
        ) as server, Client(server.endpoint) as client:  # fmt: skip
            aborted = [client.submit([9, i], ENDLESS) for i in range(4)]
            shared = [1 + j % (VOCAB - 1) for j in range(16)]
            jobs = []
            for i in range(60):
                own = [1 + (i * 37 + j) % (VOCAB - 1) for j in range(1 + 7 * i % 60)]
                prompt = own if i % 3 else shared + own
                count = 5 + i * 11 % 60
                params = SamplingParams(max_tokens=count, temperature=0.0)
                jobs.append((client.submit(prompt, params), expected_tokens(prompt, count)))
            for generation in aborted:
                generation.cancel()
            assert all(job.wait().token_ids == expected for job, expected in jobs)
        text = "".join(log.read_text().splitlines(keepends=True)[: CALLS + 1])
    # Request ids and hashes are random: short names in their place are what makes it small.
    names = dict.fromkeys(re.findall(r'"([0-9a-f]{32})"', text))
    short = {name: f'"x{number}"' for number, name in enumerate(names)}
    text = re.sub(r'"([0-9a-f]{32})"', lambda found: short[found[1]], text)
    with gzip.GzipFile(RECORDED / f"{name}.jsonl.gz", "wb", 9, mtime=0) as file:
        file.write(text.encode())


if __name__ == "__main__":
    record(Path(sys.argv[1]), "proactive_one_rank", 1, "proactive")
    record(Path(sys.argv[1]), "reactive_two_ranks", 2, "reactive")
