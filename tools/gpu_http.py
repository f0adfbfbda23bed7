"""A server and its load, for tools/gpu_check.py."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

_PORT = 18431
_COMMAND = (sys.executable, "-m", "fastserve_mega")


def time_per_token(
    model: Path, settings: Sequence[str], result: Path, *, users: int, prompt: int, output: int
) -> float:
    """Seconds from token to token, the median of users who all come at once.

    Args:
        model: directory.
        settings: of the configuration.
        result: file for all that is measured.
        users: one request each.
        prompt: tokens.
        output: tokens.
    """
    options = [word for each in (*settings, f"server.port={_PORT}") for word in ("--set", each)]
    server = subprocess.Popen([*_COMMAND, "serve", str(model), *options])
    try:
        _await(server)
        subprocess.run(
            [
                *_COMMAND, "bench", "--url", f"http://127.0.0.1:{_PORT}", "--burst", "--requests",
                str(users), "--warmup", "2", "--input-len", str(prompt), "--output-len",
                str(output), "--token-ids", "5:500", "--json", str(result),
            ],
            check=True,
        )  # fmt: skip
    finally:
        server.terminate()
        server.wait(20)
    return _latency(json.loads(result.read_text()))["all"]["tpot_s"]["p50"]


def _await(server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/v1/models", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server ended with status {server.returncode}")


def _latency(tree: object) -> dict[str, dict[str, dict[str, float]]]:
    """What stands under `latency`, the first of several."""
    if isinstance(tree, dict) and "latency" in tree:
        return tree["latency"]
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return next((found for each in inner if (found := _latency(each))), {})
