"""A coordinator without a model, for tests of its clients."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import zmq

from fastserve_mega.messaging import codec
from fastserve_mega.messaging.messages import (
    Cancel,
    Finished,
    GetMetrics,
    Hello,
    Message,
    Metrics,
    Ping,
    Pong,
    Submit,
    Tokens,
    Welcome,
)
from fastserve_mega.types import FinishReason, Usage

Behaviour = Callable[[Submit], Iterable[Message]]
WAIT_S = 10.0


def answer(tokens: Sequence[int], reason: FinishReason = FinishReason.STOP) -> Behaviour:
    """Answer each request with these tokens, one a message, and end as a real one would."""

    def behaviour(submit: Submit) -> Iterable[Message]:
        ids = tokens[: submit.params.max_tokens]
        for offset in range(len(submit.received), len(ids)):
            yield Tokens(submit.request_id, offset, (ids[offset],))
        end = FinishReason.LENGTH if len(ids) == submit.params.max_tokens else reason
        yield Finished(submit.request_id, end, Usage(len(submit.prompt), len(ids)))

    return behaviour


def begin(tokens: Sequence[int]) -> Behaviour:
    """Answer with these tokens and leave the request unfinished."""
    return lambda submit: list(answer(tokens)(submit))[:-1]


def end(reason: FinishReason, message: str = "") -> Behaviour:
    """End each request at once."""
    return lambda submit: [
        Finished(submit.request_id, reason, Usage(len(submit.prompt), 0), message)
    ]


class FakeCoordinator:
    """A ROUTER on a thread of its own that does what `behaviour` says for each Submit."""

    def __init__(self, model_path: str = "/nowhere/tiny", max_context: int = 256) -> None:
        self.reset()
        self.welcome = Welcome(
            epoch="epoch-0", model_name="tiny", model_path=model_path,
            max_context=max_context, vocab_size=400, eos_token_ids=(2,),
        )  # fmt: skip
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
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Forget what was received, and do as in the beginning."""
        self.behaviour: Behaviour = answer([5, 6, 7, 8])
        self.silent = False
        self._received: list[Message] = []

    def received(self, kind: type) -> list:
        with self._arrived:
            return [message for message in self._received if type(message) is kind]

    def wait_for(self, kind: type, count: int = 1) -> list:
        """The first messages of a kind, after waiting for `count` of them."""
        with self._arrived:
            ok = self._arrived.wait_for(
                lambda: sum(type(m) is kind for m in self._received) >= count, WAIT_S
            )
        assert ok, f"{count} {kind.__name__} expected, got {self._received}"
        return self.received(kind)

    def send(self, message: Tokens | Finished) -> None:
        """Send a message about a request to whoever submitted it last."""
        self._act(lambda: self._send(self._identities[message.request_id], message))

    def restart(self, *, same_epoch: bool = False) -> None:
        """Forget everything and come back at the same address."""

        def action() -> None:
            self._router.close(linger=0)
            self._identities.clear()
            if not same_epoch:
                fields = {f: getattr(self.welcome, f) for f in Welcome.__dataclass_fields__}
                self.welcome = Welcome(**{**fields, "epoch": f"epoch-{next(self._epochs)}"})
            self._router = self._new_router()
            self._bind_again()

        self._act(action)

    def close(self) -> None:
        self._act(lambda: setattr(self, "_closing", True))
        self._thread.join(WAIT_S)
        self._context.destroy(linger=0)

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
                done.set_result(action())
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
            ready = dict(poller.poll(WAIT_S * 1000))
            if self._woken in ready:
                self._woken.recv()
                self._actions.get_nowait()()
            elif self._router in ready:
                identity, frame = self._router.recv_multipart()
                self._on_message(identity, codec.decode(frame))

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
        raise AssertionError(f"unexpected {message}")

    def _send(self, identity: bytes, message: Message) -> None:
        self._router.send_multipart([identity, codec.encode(message)])
