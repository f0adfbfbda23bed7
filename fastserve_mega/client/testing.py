"""A coordinator without a model, for tests of programs that use the clients.

    with FakeCoordinator("Tokyo") as coordinator:
        assert ask_for_a_city(coordinator.endpoint) == "Tokyo"
        (submit,) = coordinator.received(Submit)
        assert "largest city" in coordinator.text_of(submit.prompt)

It speaks the protocol over a real socket, so nothing of the program under test is replaced.
"""

from __future__ import annotations

import itertools
import queue
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import zmq
from msgspec.structs import replace

from fastserve_mega.messaging import frames
from fastserve_mega.messaging.messages import (
    Cancel,
    Finished,
    GetMetrics,
    Hello,
    Message,
    Metrics,
    Ping,
    Pong,
    Refused,
    Submit,
    Tokens,
    Welcome,
)
from fastserve_mega.text.byte_tokenizer import END, VOCAB_SIZE, decode_bytes, write_byte_tokenizer
from fastserve_mega.types import FinishReason, Usage

__all__ = ["Behaviour", "FakeCoordinator", "Submit", "answer", "begin", "end", "say"]

M = TypeVar("M", bound=Message)
Behaviour = Callable[[Submit], Iterable[Message]]
"""What a coordinator answers to a request."""
WAIT_S = 60.0
"""Longest wait for anything; a test that needs more than this has failed."""
_MAX_CONTEXT = 4096
_EMBEDDING = array("f", (0.6, 0.0, -0.8)).tobytes()


def say(text: str) -> Behaviour:
    """Answer each request with this text."""
    return answer(tuple(text.encode("utf-8")))


def answer(tokens: Sequence[int], reason: FinishReason = FinishReason.STOP) -> Behaviour:
    """Answer each request with these tokens, one a message, and end as a real one would."""

    def behaviour(submit: Submit) -> Iterable[Message]:
        ids = tokens[: submit.params.max_tokens]
        for offset in range(len(submit.received), len(ids)):
            embedding = _EMBEDDING if submit.params.embeds else b""
            yield Tokens(submit.request_id, offset, (ids[offset],), embedding=embedding)
        end = FinishReason.LENGTH if len(ids) == submit.params.max_tokens else reason
        yield Finished(submit.request_id, end, Usage(len(submit.prompt), len(ids)))

    return behaviour


def begin(tokens: Sequence[int]) -> Behaviour:
    """Answer with these tokens and leave the request unfinished."""
    return lambda submit: list(answer(tokens)(submit))[:-1]


def end(reason: FinishReason, message: str = "", retry_after_s: float | None = None) -> Behaviour:
    """End each request at once."""
    return lambda submit: [
        Finished(
            submit.request_id,
            reason,
            Usage(len(submit.prompt), 0),
            message,
            retry_after_s=retry_after_s,
        )
    ]


class FakeCoordinator:
    """A coordinator on a thread of its own that does what it is told for each request.

    A context manager. Tell it something else at any time by `behaviour`; with `silent` it answers
    nothing.
    """

    def __init__(
        self, behaviour: str | Behaviour = "Hello!", *, welcome: Welcome | None = None
    ) -> None:
        """Listen on a free port.

        Args:
            behaviour: the text that answers each request, or a function that makes the messages.
            welcome: what it says of its model; None takes a model whose tokens are bytes, with a
                tokenizer that clients on this machine find by themselves.
        """
        self._first_behaviour = say(behaviour) if isinstance(behaviour, str) else behaviour
        self._files = ExitStack()
        if welcome is None:
            directory = tempfile.TemporaryDirectory(prefix="fastserve-fake-")
            welcome = _byte_model(Path(self._files.enter_context(directory)))
        self.welcome = welcome
        self.reset()
        self._epochs = itertools.count(1)
        self._context = zmq.Context()
        self._router = self._new_router()
        port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._identities: dict[str, bytes] = {}
        self._arrived = threading.Condition()
        self._actions: queue.Queue[Callable[[], None]] = queue.Queue()
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://wake")
        self._woken = self._context.socket(zmq.PAIR)
        self._woken.connect("inproc://wake")
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fake-coordinator", daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeCoordinator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        """Forget what was received, and do as in the beginning."""
        self.behaviour: Behaviour = self._first_behaviour
        self.silent = False
        self._received: list[Message] = []

    def text_of(self, token_ids: tuple[int, ...]) -> str:
        """Text of tokens of the model of bytes."""
        return decode_bytes(token_ids)

    def received(self, kind: type[M]) -> list[M]:
        """All messages of a kind that came so far."""
        with self._arrived:
            return [message for message in self._received if isinstance(message, kind)]

    def wait_for(self, kind: type[M], count: int = 1) -> list[M]:
        """The messages of a kind, after waiting for `count` of them.

        Raises:
            AssertionError: they did not come.
        """
        with self._arrived:
            ok = self._arrived.wait_for(
                lambda: sum(isinstance(m, kind) for m in self._received) >= count, WAIT_S
            )
            if not ok:
                raise AssertionError(f"{count} {kind.__name__} expected, got {self._received}")
        return self.received(kind)

    def send(self, message: Tokens | Finished) -> None:
        """Send a message about a request to the client that submitted it last."""
        self._act(lambda: self._send(self._identities[message.request_id], message))

    def restart(self, *, same_epoch: bool = False) -> None:
        """Forget everything and come back at the same address."""

        def action() -> None:
            self._router.close(linger=0)
            self._identities.clear()
            if not same_epoch:
                self.welcome = replace(self.welcome, epoch=f"epoch-{next(self._epochs)}")
            self._router = self._new_router()
            self._bind_again()

        self._act(action)

    def close(self) -> None:
        """End, and give the port back."""
        self._act(lambda: setattr(self, "_closing", True))
        self._thread.join(WAIT_S)
        self._context.destroy(linger=0)
        self._files.close()

    def _new_router(self) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        # At its mark a ROUTER drops messages without a word.
        router.setsockopt(zmq.SNDHWM, 0)
        return router

    def _bind_again(self) -> None:
        """ZeroMQ gives a closed socket's port back a moment later."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                self._router.bind(self.endpoint)
                return
            except zmq.ZMQError:
                if time.monotonic() > deadline:
                    raise
                self._woken.poll(1)

    def _act(self, action: Callable[[], None]) -> None:
        """Run an action on the thread, since ZeroMQ sockets belong to one thread."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        self._actions.put(run)
        self._wake.send(b"")
        done.result(WAIT_S)

    def _run(self) -> None:
        while not self._closing:
            poller = zmq.Poller()
            poller.register(self._router, zmq.POLLIN)
            poller.register(self._woken, zmq.POLLIN)
            ready = dict(poller.poll(int(WAIT_S * 1000)))
            if self._woken in ready:
                self._woken.recv()
                self._actions.get_nowait()()
            elif self._router in ready:
                identity, frame = self._router.recv_multipart()
                self._on_message(identity, frames.decode(frame))

    def _on_message(self, identity: bytes, message: Message) -> None:
        with self._arrived:
            self._received.append(message)
            self._arrived.notify_all()
        if self.silent:
            return
        for reply in self._replies(identity, message):
            self._send(identity, reply)

    def _replies(self, identity: bytes, message: Message) -> Iterable[Message]:
        if isinstance(message, Hello):
            return [self.welcome]
        if isinstance(message, Ping):
            return [Pong(self.welcome.epoch)]
        if isinstance(message, GetMetrics):
            return [Metrics("fake_requests_total 1\n")]
        if isinstance(message, Submit):
            self._identities[message.request_id] = identity
            return self.behaviour(message)
        if isinstance(message, Cancel):
            return [Finished(message.request_id, FinishReason.ABORT, Usage(0, 0))]
        return [Refused(f"a fake coordinator does not answer {type(message).__name__}")]

    def _send(self, identity: bytes, message: Message) -> None:
        self._router.send_multipart([identity, frames.encode(message)])


def _byte_model(directory: Path) -> Welcome:
    write_byte_tokenizer(directory)
    return Welcome(
        epoch="epoch-0", model_name="bytes", model_path=str(directory), max_context=_MAX_CONTEXT,
        vocab_size=VOCAB_SIZE, eos_token_ids=(END,),
    )  # fmt: skip
