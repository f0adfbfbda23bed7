"""One ZeroMQ connection to the coordinator, within an event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from fastserve_mega import faults
from fastserve_mega.messaging import frames
from fastserve_mega.messaging.messages import Message, Refused

_log = logging.getLogger(__name__)
_HEARTBEAT_MS = 5_000
_HEARTBEAT_TIMEOUT_MS = 15_000
_RECONNECT_MS = 100
_LONGEST_RECONNECT_MS = 500


class Connection:
    """A DEALER socket that receives in the background and connects again by itself.

    Args:
        endpoint: address of the coordinator, and behind a space its key if it has one.
        on_message: called with each message that arrives.
        on_reconnect: called when the connection was lost and is there again. The coordinator
            then takes us for a new client.
        on_failure: called with the error when receiving has ended for good.

    Raises:
        ValueError: ZeroMQ does not understand the endpoint.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        on_message: Callable[[Message], None],
        on_reconnect: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._on_message = on_message
        self._on_reconnect = on_reconnect
        self._on_failure = on_failure
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._configure()
        self._send = faults.at("client.send", self._send_frame)
        self._take = faults.at("client.receive", self._on_frame)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            frames.connect(self._socket, endpoint)
        except ValueError:
            self._context.destroy(linger=0)
            raise
        self._tasks = [self._start(self._receive()), self._start(self._watch())]

    def send(self, frame: bytes) -> None:
        """Send a frame now, or as soon as the coordinator is there; never waits."""
        self._send(frame)

    def _send_frame(self, frame: bytes) -> None:
        sent = asyncio.ensure_future(self._socket.send(frame))
        if sent.done():
            sent.result()

    async def close(self) -> None:
        """Close at once; frames not sent yet are dropped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._context.destroy(linger=0)

    def _configure(self) -> None:
        self._socket.setsockopt(zmq.LINGER, 0)
        # Without a mark to wait at, sending is immediate. What can queue up while the coordinator
        # is away are the requests of the user, who holds them in memory anyway.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, _LONGEST_RECONNECT_MS)

    def _start(self, loop: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(loop)
        task.add_done_callback(self._on_task_end)
        return task

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)

    async def _receive(self) -> None:
        while True:
            self._take(await self._socket.recv())

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = frames.decode(frame)
        except frames.OtherVersionError as error:
            message = Refused(str(error))
        except frames.BadFrameError as error:
            _log.warning("the coordinator sent a bad frame: %s", error)
            return
        self._on_message(message)

    async def _watch(self) -> None:
        connected = False
        while True:
            await recv_monitor_message(self._monitor)
            if connected:
                self._on_reconnect()
            connected = True
