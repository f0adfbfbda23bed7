#!/usr/bin/env python3
"""Uses an installed fastserve_mega as a new user would: doctor, plan, a simulation, a request.

Run by the Python of the environment and from outside the source tree (tools/test_install.sh does):
only the configurations come from there. Exit status 1 when something does not work.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import fastserve_mega

SOURCE = Path(__file__).resolve().parents[1]
COMMAND = Path(sys.executable).with_name("fastserve-mega")
CONFIG = SOURCE / "configs" / "smollm2-135m-cpu.yaml"
SIMULATED = SOURCE / "configs" / "opt-13b-a100.yaml"
WORKLOAD = SOURCE / "configs" / "workloads" / "sharegpt.yaml"
COMMAND_S, START_S, ANSWER_S, STOP_S = 300, 600, 120, 60


def run(*words: str) -> str:
    """What a command prints; RuntimeError unless it ends well."""
    print(f"-- fastserve-mega {' '.join(words)}", flush=True)
    done = subprocess.run(
        [COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}:\n{done.stdout}")
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def simulate() -> None:
    """The workload's lengths come with the package."""
    files = ("--config", str(SIMULATED), "--workload", str(WORKLOAD))
    print(run("simulate", *files, "--set", "workload.num_requests=50"))


def serve() -> None:
    """Start the model on its ranks, ask over HTTP, load the live view's page, and end it."""
    port = free_port()
    changes = (
        f"server.port={port}",
        f"coordinator.client_endpoint=tcp://127.0.0.1:{free_port()}",
        "model.dtype=float32",  # the answer is known
    )
    words = ["serve", "--config", str(CONFIG)]
    words += [word for change in changes for word in ("--set", change)]
    print(f"-- fastserve-mega {' '.join(words)}", flush=True)
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [COMMAND, *words], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ask(server, f"http://127.0.0.1:{port}")
            server.send_signal(signal.SIGINT)
            status = server.wait(STOP_S)
            if status:
                raise RuntimeError(f"the server ends with status {status}")
        except Exception:
            log.seek(0)
            print(log.read())
            raise
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def ask(server: subprocess.Popen[bytes], url: str) -> None:
    await_health(server, url)
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"messages": [question], "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        text = json.load(response)["choices"][0]["message"]["content"]
    print(text)
    if "Paris" not in text:
        raise RuntimeError(f"the model answers {text!r}")
    with urllib.request.urlopen(f"{url}/", timeout=ANSWER_S) as response:
        if b"<html" not in response.read():
            raise RuntimeError("the live view's page is not in the package")


def await_health(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no server within {START_S} s, or it has ended ({server.poll()})")


def main() -> int:
    package = Path(fastserve_mega.__file__).parent
    print(f"fastserve_mega {fastserve_mega.__version__} in {package}")
    if package.is_relative_to(SOURCE):
        print("this is the source tree and not an installed package", file=sys.stderr)
        return 1
    try:
        run("doctor", "--config", str(CONFIG))
        run("plan", "--config", str(CONFIG))
        simulate()
        serve()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
