"""A coordinator and its ranks as threads of the test, with a fake runner instead of a model."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from fastserve_mega.config import (
    Config,
    CoordinatorConfig,
    KvCacheConfig,
    MlfqConfig,
    ModelConfig,
    SchedulerConfig,
)
from fastserve_mega.coordinator.main import CoordinatorProcess
from fastserve_mega.coordinator.worker_group import WorkersLostError
from fastserve_mega.messaging.codec import decode, encode
from fastserve_mega.messaging.messages import Hello, Message, Welcome
from fastserve_mega.worker.fake_runner import FakeModelRunner, fake_token
from fastserve_mega.worker.loop import WorkerLoop

VOCAB = 350
MAX_CONTEXT = 512
WAIT_MS = 20_000


def make_model_directory(tokenizer_dir: Path, target: Path) -> Path:
    """A directory the coordinator and the clients take for a model; it has no weights."""
    shutil.copytree(tokenizer_dir, target, dirs_exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": VOCAB,
        "max_position_embeddings": MAX_CONTEXT, "eos_token_id": 0,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    return target


class GatedRunner(FakeModelRunner):
    """Executes a step only when the test lets it, or all of them."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.entered = threading.Event()
        self.fail_with: Exception | None = None

    def execute(self, batch):
        self.entered.set()
        if not self.open_gate.wait(WAIT_MS / 1000):
            raise TimeoutError("the test never opened the gate")
        if self.fail_with:
            raise self.fail_with
        return super().execute(batch)


class FakeServer:
    """Handles of a running coordinator."""

    def __init__(self, endpoint: str, runner: GatedRunner, process: CoordinatorProcess) -> None:
        self.endpoint = endpoint
        self.runner = runner
        self.process = process
        self.ended_with: BaseException | None = None


@contextmanager
def fake_server(model_directory: Path, *, device_blocks=256, block_size=4, **options):
    """Run a server; on leaving it is stopped, and its threads must end."""
    coordinator = options.pop("coordinator", {})
    config = Config(
        model=ModelConfig(path=str(model_directory)),
        kv_cache=KvCacheConfig(block_size=block_size),
        scheduler=SchedulerConfig(mlfq=MlfqConfig(starvation_limit_s=None), **options),
        coordinator=CoordinatorConfig(
            client_endpoint="tcp://127.0.0.1:0",
            **{"drain_timeout_s": 0.001, **coordinator},
        ),
    )
    process = CoordinatorProcess(config, stop_on_stdin_close=False)
    runner = GatedRunner(device_blocks=device_blocks, block_size=block_size, vocab_size=VOCAB)
    server = FakeServer(process._front_door.endpoint, runner, process)
    context = zmq.Context()
    loop = WorkerLoop(context, process._workers.endpoint, 0, runner, lambda: True)
    threads = [
        threading.Thread(target=_run, args=(server, process.run), name="coordinator"),
        threading.Thread(target=_run, args=(server, loop.run), name="worker"),
    ]
    for thread in threads:
        thread.start()
    try:
        _await_ready(server)
        yield server
    finally:
        runner.open_gate.set()
        process.stop()
        for thread in threads:
            thread.join(WAIT_MS / 1000)
            assert not thread.is_alive(), f"the {thread.name} thread hangs"
        context.term()


def _await_ready(server: FakeServer) -> None:
    """Tests close the gate only once the server has measured itself."""
    client = RawClient(server.endpoint)
    try:
        client.send(Hello())
        assert isinstance(client.receive(), Welcome)
    finally:
        client.close()


def _run(server: FakeServer, target) -> None:
    try:
        target()
    except Exception as error:
        if not isinstance(error, WorkersLostError | RuntimeError):
            raise
        server.ended_with = server.ended_with or error


class RawClient:
    """A DEALER socket that sends what it is told, right or wrong."""

    def __init__(self, endpoint: str, receive_buffer: int = 0) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, receive_buffer)
        self._socket.connect(endpoint)

    def send(self, message: Message) -> None:
        self._socket.send(encode(message))

    def send_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> Message:
        assert self._socket.poll(WAIT_MS), "no answer"
        return decode(self._socket.recv(), trusted=True)

    def receive_until(self, kind: type) -> Iterator[Message]:
        while True:
            message = self.receive()
            yield message
            if isinstance(message, kind):
                return

    def close(self) -> None:
        self._context.destroy(linger=0)


def expected_tokens(prompt, count):
    """What the fake runner generates when nothing disturbs it."""
    context = list(prompt)
    for _ in range(count):
        context.append(fake_token(context, VOCAB))
    return tuple(context[len(prompt) :])
