"""A coordinator and its ranks as threads of the test, with a fake runner instead of a model."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import zmq
from msgspec import structs

from fastserve_mega.coordinator.main import CoordinatorProcess
from fastserve_mega.coordinator.worker_group import WorkersLostError
from fastserve_mega.messaging.frames import connect, decode, encode
from fastserve_mega.messaging.messages import Hello, Message, Welcome
from fastserve_mega.system.config import (
    Config,
    CoordinatorConfig,
    KvCacheConfig,
    MlfqConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SwapConfig,
)
from fastserve_mega.system.key_file import client_address
from fastserve_mega.worker.fake_runner import FakeModelRunner, fake_token
from fastserve_mega.worker.loop import WorkerLoop, connect_to_coordinator

VOCAB = 350
MAX_CONTEXT = 512
WAIT_MS = 60_000


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
    """Executes a step or a copy only when the test lets it, or all of them."""

    copy_delay_s = 0.0

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.entered = threading.Event()
        self.fail_with: Exception | None = None
        self.open_copy_gate = threading.Event()
        self.open_copy_gate.set()
        self.fail_copy_with: Exception | None = None
        self.overlapped_steps = 0

    def execute(self, batch):
        self.entered.set()
        if not self.open_gate.wait(WAIT_MS / 1000):
            raise TimeoutError("the test never opened the gate")
        if self.fail_with:
            raise self.fail_with
        return super().execute(batch)

    def move(self, copy):
        before = self.steps
        if not self.open_copy_gate.wait(WAIT_MS / 1000):
            raise TimeoutError("the test never opened the gate")
        if self.fail_copy_with:
            raise self.fail_copy_with
        time.sleep(self.copy_delay_s)
        super().move(copy)
        self.overlapped_steps += self.steps - before


class FakeServer:
    """Handles of a running coordinator."""

    def __init__(
        self, endpoint: str, runners: list[GatedRunner], process: CoordinatorProcess
    ) -> None:
        self.endpoint = endpoint
        self.runners = runners
        self.runner = runners[-1]  # samples
        self.process = process
        self.ended_with: BaseException | None = None
        self.lost_ranks = threading.Event()
        """The coordinator has told its clients."""


def _configuration(model_directory: Path, ranks: int, replicas: int, **options) -> Config:
    options.setdefault("admission", "greedy")  # most tests want memory to run out
    options.setdefault("policy", "skip_join_mlfq")  # and look at its levels
    return Config(
        model=ModelConfig(path=str(model_directory)),
        parallel=ParallelConfig(pipeline=ranks // replicas, data=replicas, look_ahead=True),
        kv_cache=KvCacheConfig(
            block_size=options.pop("block_size"),
            prefix_cache=options.pop("prefix_cache", True),
            swap=options.pop("swap", None) or SwapConfig(strategy="recompute"),
        ),
        coordinator=CoordinatorConfig(
            **{
                "client_endpoint": "tcp://127.0.0.1:0",
                "drain_timeout_s": 0.001,
                **options.pop("coordinator", {}),
            }
        ),
        scheduler=SchedulerConfig(mlfq=MlfqConfig(starvation_limit_s=None), **options),
    )


@contextmanager
def fake_server(
    model_directory: Path,
    *,
    device_blocks=256,
    host_blocks=0,
    block_size=4,
    ranks=1,
    replicas=1,
    make_runner=GatedRunner,
    supervised=False,
    **options,
):
    """Run a server; on leaving it is stopped, and its threads must end."""
    config = _configuration(model_directory, ranks, replicas, block_size=block_size, **options)
    process = CoordinatorProcess(
        config, stop_on_stdin_close=False, supervisor=os.getpid() if supervised else None
    )
    runners = [
        make_runner(
            device_blocks=device_blocks,
            host_blocks=host_blocks,
            block_size=block_size,
            vocab_size=VOCAB,
            is_sampling_rank=(rank + 1) % (ranks // replicas) == 0,
            looks_ahead=config.parallel.looks_ahead,
        )
        for rank in range(ranks)
    ]
    bound = structs.replace(config.coordinator, client_endpoint=process._front_door.endpoint)
    server = FakeServer(client_address(bound), runners, process)
    context = zmq.Context()
    loops = [
        WorkerLoop(
            connect_to_coordinator(context, process._workers.endpoint, rank),
            rank,
            runner,
            lambda: True,
        )
        for rank, runner in enumerate(runners)
    ]
    threads = [threading.Thread(target=_run, args=(server, process.run), name="coordinator")]
    threads += [threading.Thread(target=_run, args=(server, loop.run)) for loop in loops]
    for thread in threads:
        thread.start()
    with ExitStack() as closers:
        for runner in runners:
            closers.enter_context(closing(runner))
        try:
            _await_ready(server)
            yield server
        finally:
            for runner in runners:
                runner.open_gate.set()
                runner.open_copy_gate.set()
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
        if isinstance(error, WorkersLostError):
            server.lost_ranks.set()


class RawClient:
    """A DEALER socket that sends what it is told, right or wrong."""

    def __init__(self, endpoint: str, receive_buffer: int = 0) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, receive_buffer)
        connect(self._socket, endpoint)

    def send(self, message: Message) -> None:
        self._socket.send(encode(message))

    def send_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> Message:
        return decode(self.receive_frame())

    def receive_frame(self) -> bytes:
        assert self._socket.poll(WAIT_MS), "no answer"
        return self._socket.recv()

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
