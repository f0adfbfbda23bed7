"""Whether the processes of a deployment answer."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable

import zmq

from fastserve_mega.messaging import frames
from fastserve_mega.messaging.messages import GetSnapshot, Message, Ping, Pong, Snapshot

_MIN_MISSES = 3
"""A pause of this process itself, after which one answer is late, is nobody's fault."""


class CoordinatorProbe:
    """Pings the coordinator of one start, and takes an answer of no other."""

    def __init__(self, endpoint: str, epoch: str) -> None:
        """Connect, now or as soon as somebody listens.

        Raises:
            ValueError: it is no address.
        """
        self._epoch = epoch
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up while nobody listens
        try:
            frames.connect(self._socket, endpoint)
        except ValueError:
            self.close()
            raise

    def answers(self, limit_s: float) -> bool:
        """Ask; whether an answer has come, to this question or late to one before."""
        late = [self._receive() for _ in iter(self._has_more, False)]
        return (
            any(map(self._is_pong, late)) or self._ask(Ping(), self._is_pong, limit_s) is not None
        )

    def snapshot(self, limit_s: float) -> Snapshot | None:
        """What the coordinator is doing; None when it does not say so within the limit."""
        answer = self._ask(GetSnapshot(), lambda each: isinstance(each, Snapshot), limit_s)
        return answer if isinstance(answer, Snapshot) else None

    def _ask(
        self, question: Message, answers: Callable[[Message | None], bool], limit_s: float
    ) -> Message | None:
        deadline = time.monotonic() + limit_s
        if not self._socket.poll(int(limit_s * 1000), zmq.POLLOUT):
            return None
        self._socket.send(frames.encode(question), zmq.DONTWAIT)
        while (left_s := deadline - time.monotonic()) > 0:
            if self._socket.poll(int(left_s * 1000) + 1) and answers(answer := self._receive()):
                return answer
        return None

    def _has_more(self) -> bool:
        return bool(self._socket.poll(0))

    def _receive(self) -> Message | None:
        try:
            return frames.decode(self._socket.recv())
        except frames.BadFrameError:
            return None

    def _is_pong(self, message: Message | None) -> bool:
        return isinstance(message, Pong) and message.epoch == self._epoch

    def close(self) -> None:
        self._context.destroy(linger=0)


def http_status(host: str, port: int, path: str, limit_s: float) -> int | None:
    """Status of the answer to GET; None when there is none within the limit."""
    # Not urllib, which would ask a proxy if the environment names one.
    connection = http.client.HTTPConnection(host, port, timeout=limit_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


class Watch:
    """Tells a process that hangs from one that is late once."""

    def __init__(self, answers: Callable[[], bool], limit_s: float, now: float) -> None:
        """It has just answered.

        Args:
            answers: asks it.
            limit_s: longest silence.
            now: time on a monotonic clock.
        """
        self._answers = answers
        self._limit_s = limit_s
        self._last_answer = now
        self._misses = 0

    def hangs(self, now: float) -> bool:
        """Ask once; whether it has been silent for too long."""
        if self._answers():
            self._last_answer = now
            self._misses = 0
            return False
        self._misses += 1
        return self._misses >= _MIN_MISSES and now - self._last_answer >= self._limit_s
