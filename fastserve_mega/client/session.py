"""Questions, heartbeats and resubmission: what keeps a client and a coordinator of one mind."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, TypeVar

from fastserve_mega.client.connection import Connection
from fastserve_mega.client.errors import (
    ClientError,
    InvalidRequestError,
    RequestIdInUseError,
    ServerError,
    ServerUnavailableError,
)
from fastserve_mega.client.generation import RequestState
from fastserve_mega.messaging import frames
from fastserve_mega.messaging.messages import (
    Cancel,
    Finished,
    Hello,
    Message,
    Metrics,
    Ping,
    Pong,
    PromptLogprobs,
    Refused,
    Restarting,
    Snapshot,
    Tokens,
    Welcome,
)
from fastserve_mega.types import FinishReason, RequestId

_log = logging.getLogger(__name__)
Answer = TypeVar("Answer", Welcome, Pong, Metrics, Snapshot)


class Session:
    """The unfinished requests of a client and its connection; lives in one event loop.

    Args:
        endpoint: ZeroMQ address of the coordinator, with its key if it has one.
        heartbeat_s: time between pings while requests are unfinished.
        silence_timeout_s: requests fail when pings have not been answered for this long, or for
            as long as the server says that starting it again may take.
    """

    def __init__(self, endpoint: str, *, heartbeat_s: float, silence_timeout_s: float) -> None:
        self.endpoint, _ = frames.without_key(endpoint)
        self.welcome: Welcome | None = None
        self._heartbeat_s = heartbeat_s
        self._silence_timeout_s = silence_timeout_s
        self._requests: dict[RequestId, RequestState] = {}
        self._waiting: dict[type, list[asyncio.Future[Any]]] = {}
        self._busy = asyncio.Event()
        self._epoch: str | None = None
        self._unanswered_pings = 0
        self._restart_within_s = 0.0
        """How long a coordinator that is lost without a word may be away."""
        self._patient_until = 0.0
        """The coordinator has said that it restarts; `time.monotonic()`."""
        self._in_doubt = False
        """The coordinator may not know our requests; submit them again when it answers."""
        self._connection = Connection(
            endpoint,
            on_message=self._on_message,
            on_reconnect=self._on_reconnect,
            on_failure=self._on_failure,
        )
        self._heartbeat = asyncio.create_task(self._beat())
        self._heartbeat.add_done_callback(self._on_heartbeat_end)

    async def close(self) -> None:
        """Cancel what is unfinished and close."""
        for state in list(self._requests.values()):
            self.cancel(state)
        self._fail_all(ServerUnavailableError("the client was closed"))
        self._heartbeat.cancel()
        await asyncio.gather(self._heartbeat, return_exceptions=True)
        await self._connection.close()

    async def ask(self, question: Message, answer: type[Answer], timeout_s: float) -> Answer:
        """Send a question and wait for the answer.

        Raises:
            ServerUnavailableError: no answer within `timeout_s` seconds.
            InvalidRequestError: the coordinator refused the question.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(answer, [])
        waiting.append(future)
        self._send(question)
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise ServerUnavailableError(
                f"no answer from the coordinator at {self.endpoint} within {timeout_s:g} s"
            ) from None
        finally:
            waiting.remove(future)

    def start(self, state: RequestState) -> None:
        """Send a request and follow it to its end.

        Raises:
            InvalidRequestError: its values cannot be sent, or its id is in use.
        """
        submit = state.submit
        if (other := self._requests.get(state.request_id)) is not None:
            if not state.take_over(other):
                raise RequestIdInUseError(f"request {state.request_id!r} is not finished yet")
            del self._requests[state.request_id]
            submit = state.resubmission(time.monotonic()) or submit
            if state.done:
                return
        try:
            frame = frames.encode(submit)
            # The caller is told here what the coordinator would say later.
            frames.decode(frame)
        except frames.BadFrameError as error:
            raise InvalidRequestError(str(error)) from None
        except OverflowError:
            raise InvalidRequestError("a number in the request has more than 64 bits") from None
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"a text is not valid Unicode: {error.reason}") from None
        limit = frames.client_frame_limit(self.welcome.max_context) if self.welcome else len(frame)
        if len(frame) > limit:
            raise InvalidRequestError(f"the request takes {len(frame)} bytes, the limit is {limit}")
        self._requests[state.request_id] = state
        self._connection.send(frame)
        self._busy.set()

    def cancel(self, state: RequestState) -> None:
        """End a request with `abort`, unless it has ended already."""
        if not state.done:
            state.finish(FinishReason.ABORT)
            self._drop(state)

    def give_up(self, reason: str) -> None:
        """End what is unfinished with an error, and let the server stop working on it."""
        for request_id in self._requests:
            self._send(Cancel(request_id))
        self._fail_all(ServerUnavailableError(reason))

    def _drop(self, state: RequestState) -> None:
        """Forget a request that ended at this side; the server is told to stop working on it."""
        if self._requests.pop(state.request_id, None) is not None:
            self._send(Cancel(state.request_id))

    def _send(self, message: Message) -> None:
        self._connection.send(frames.encode(message))

    # --- what arrives --------------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        self._unanswered_pings = 0
        if isinstance(message, Tokens):
            self._on_tokens(message)
        elif isinstance(message, PromptLogprobs):
            if (state := self._requests.get(message.request_id)) is not None:
                state.on_prompt_logprobs(message)
        elif isinstance(message, Finished):
            # Unknown ones are the last words on requests that were cancelled here.
            if (state := self._requests.pop(message.request_id, None)) is not None:
                state.on_finished(message)
        elif isinstance(message, Refused):
            self._on_refused(message)
        elif isinstance(message, Restarting):
            _log.warning("the server restarts: %s", message.reason)
            self._patient_until = time.monotonic() + message.within_s
            for request_id in message.suspects:
                if request_id in self._requests:
                    self._requests[request_id].failed_attempts += 1
        else:
            if isinstance(message, Welcome):
                self.welcome = message
                self._restart_within_s = message.restart_within_s
                self._on_epoch(message.epoch)
            elif isinstance(message, Pong):
                self._on_epoch(message.epoch)
            self._answer(type(message), message)

    def _on_tokens(self, message: Tokens) -> None:
        state = self._requests.get(message.request_id)
        if state is None:
            return
        try:
            state.on_tokens(message)
        except Exception as error:
            # One request's text must not end the receiving for all.
            _log.exception("request %s: cannot use its tokens", state.request_id)
            state.fail(ServerError(f"cannot turn the tokens into text: {error}"))
        if state.done:
            self._drop(state)

    def _on_refused(self, message: Refused) -> None:
        kind = RequestIdInUseError if message.in_use else InvalidRequestError
        error = kind(message.message)
        if message.request_id is not None:
            if (state := self._requests.pop(message.request_id, None)) is not None:
                state.fail(error)
            return
        _log.warning("the coordinator refused a message: %s", message.message)
        for answer in list(self._waiting):
            self._answer(answer, error)

    def _answer(self, answer: type, result: Message | Exception) -> None:
        for future in self._waiting.get(answer, ()):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    # --- losing the coordinator and finding it again -------------------------------------------

    def _on_epoch(self, epoch: str) -> None:
        restarted = self._epoch is not None and epoch != self._epoch
        self._epoch = epoch
        self._patient_until = 0.0
        if restarted:
            self.welcome = None
            self._send(Hello())
        if restarted or self._in_doubt:
            self._in_doubt = False
            self._resubmit_all()

    def _resubmit_all(self) -> None:
        now = time.monotonic()
        for state in list(self._requests.values()):
            message = state.resubmission(now)
            if message is None:
                del self._requests[state.request_id]
            else:
                _log.info("request %s goes on at %d", state.request_id, len(state.received))
                self._send(message)

    def _on_reconnect(self) -> None:
        """Replies to the lost connection are lost too; the Pong tells who is there now."""
        self._in_doubt = True
        self._send(Ping())

    def _on_failure(self, error: BaseException) -> None:
        self._fail_all(ServerUnavailableError(f"the connection failed: {error}"))

    def _on_heartbeat_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)

    async def _beat(self) -> None:
        """Ping while requests are unfinished, and judge by the answers.

        Unanswered pings are counted rather than time measured, so that a program that blocks its
        event loop for a while does not take its own pause for the coordinator's.
        """
        while True:
            await self._busy.wait()
            self._send(Ping())
            self._unanswered_pings += 1
            await asyncio.sleep(self._heartbeat_s)
            if not self._requests:
                self._busy.clear()
                self._unanswered_pings = 0
            elif self._is_silent():
                self._fail_all(
                    ServerUnavailableError(
                        f"the coordinator at {self.endpoint} has not answered for "
                        f"{self._longest_silence_s:g} s"
                    )
                )
            elif self._unanswered_pings:
                self._in_doubt = True

    def _is_silent(self) -> bool:
        if time.monotonic() < self._patient_until:
            return False
        return self._unanswered_pings * self._heartbeat_s >= self._longest_silence_s

    @property
    def _longest_silence_s(self) -> float:
        return max(self._silence_timeout_s, self._restart_within_s)

    def _fail_all(self, error: ClientError) -> None:
        for state in self._requests.values():
            state.fail(error)
        self._requests.clear()
        for answer in list(self._waiting):
            self._answer(answer, error)
