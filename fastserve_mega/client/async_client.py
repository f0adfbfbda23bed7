"""The ZeroMQ client for asyncio."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

import msgspec

from fastserve_mega.client.errors import (
    InvalidRequestError,
    ServerUnavailableError,
    TokenizerUnavailableError,
)
from fastserve_mega.client.generation import AsyncGeneration, RequestState
from fastserve_mega.client.options import RequestOptions
from fastserve_mega.client.session import Session
from fastserve_mega.messaging.messages import (
    GetMetrics,
    GetSnapshot,
    Hello,
    Metrics,
    Ping,
    Pong,
    Snapshot,
    Submit,
    Welcome,
)
from fastserve_mega.text.detokenizer import Detokenizer, TokenDecoder, stop_strings
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import MAX_SEED, RequestId, SamplingParams, seed_of

_log = logging.getLogger(__name__)
DEFAULT_ENDPOINT = "tcp://127.0.0.1:5570"


class AsyncClient:
    """Talks to a coordinator; belongs to the event loop in which it is first used.

    Unfinished requests survive a lost connection and a restart of the coordinator: they are
    submitted again with the tokens received so far, and their streams go on.

    Args:
        endpoint: ZeroMQ address of the coordinator. Where it asks for a key, that follows behind a
            space: `tcp://10.0.0.1:5570 KEY`, with what stands behind `public` in the key file.
        tokenizer: a tokenizer or its directory. None takes the model's directory if the server
            is on this machine; without any, token ids can be sent and received.
        timeout_s: longest wait for the answer to a question, the first one included.
        heartbeat_s: time between signs of life while requests are unfinished.
        silence_timeout_s: requests fail when the coordinator has not answered for this long; with
            `serve`, which starts it again, only after the time that this may take.

    Raises:
        ServerUnavailableError: (all methods) the coordinator does not answer, or the client was
            closed.
        ValueError: (at first use) the endpoint is not an address.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        tokenizer: Tokenizer | str | Path | None = None,
        *,
        timeout_s: float = 10.0,
        heartbeat_s: float = 5.0,
        silence_timeout_s: float = 30.0,
    ) -> None:
        self.endpoint = endpoint
        self._given_tokenizer = tokenizer
        self._tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else None
        self._tokenizer_lock = asyncio.Lock()
        self._timeout_s = timeout_s
        self._heartbeat_s = heartbeat_s
        self._silence_timeout_s = silence_timeout_s
        self._session: Session | None = None
        self._closed = False

    async def __aenter__(self) -> AsyncClient:
        try:
            await self.info()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is unfinished and close."""
        self._closed = True
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    def give_up(self, reason: str) -> None:
        """End what is unfinished with ServerUnavailableError, where `aclose` cancels it."""
        if self._session is not None:
            self._session.give_up(reason)

    # --- questions -----------------------------------------------------------------------------

    async def info(self) -> Welcome:
        """Model, context length and vocabulary of the server."""
        session = self._started()
        return session.welcome or await session.ask(Hello(), Welcome, self._timeout_s)

    async def ping(self, timeout_s: float | None = None) -> str:
        """Ask the coordinator for a sign of life, for `timeout_s` seconds; returns its epoch."""
        answer = await self._started().ask(Ping(), Pong, timeout_s or self._timeout_s)
        return answer.epoch

    async def metrics(self) -> str:
        """The server's metrics in Prometheus' text format."""
        return (await self._started().ask(GetMetrics(), Metrics, self._timeout_s)).text

    async def snapshot(self, max_requests: int = 200) -> Snapshot:
        """What the server is doing, with at most so many requests of each replica."""
        return await self._started().ask(GetSnapshot(max_requests), Snapshot, self._timeout_s)

    async def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in use, loaded at the first call; None when there is none here.

        Raises:
            FileNotFoundError, ValueError: the directory given to the client has no tokenizer.
        """
        async with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = await self._load_tokenizer()
        return self._tokenizer

    # --- requests ------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGeneration:
        """Start to answer a prompt.

        Args:
            prompt: text, or token ids.
            params: how to sample; None takes the defaults (16 tokens).
            options: see `RequestOptions`.

        Raises:
            TokenizerUnavailableError: text or stop strings without a tokenizer.
            InvalidRequestError: a value cannot be sent. What the server refuses is raised by
                the generation.
        """
        if isinstance(prompt, str):
            prompt = await self._encode(prompt)
        return await self.submit(prompt, params, **options)

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGeneration:
        """Start to answer a conversation: messages with `role` and `content`.

        `params` and `options` are those of `generate`.

        Raises:
            TokenizerUnavailableError: there is no tokenizer here.
            InvalidRequestError: the model has no chat template, or it refuses the messages.
        """
        prompt = await self._encode(messages)
        return await self.submit(prompt, params, continues_text=False, **options)

    async def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
        client: str = "",
        weight: float = 1.0,
        expected_output_tokens: int | None = None,
        session: str = "",
        request_id: str | None = None,
        fingerprint: str = "",
        decoder: TokenDecoder | None = None,
        continues_text: bool = True,
        tells_stop: bool = False,
    ) -> AsyncGeneration:
        """`generate` for token ids; see `RequestOptions` for the keyword arguments.

        `decoder` makes the text; None is the tokenizer, which shows no special tokens.
        `continues_text` says that the answer goes on with the prompt's text, where that of a chat
        begins: tokenizers may leave out the space before the first word of a text. `tells_stop`
        makes the stop string or stop token part of the text.
        """
        welcome = await self.info()
        params = params or SamplingParams()
        if params.seed is None:
            # Chosen here, so that the rest of a resumed answer is the one it would have had.
            seed = seed_of(request_id or "") if fingerprint else secrets.randbelow(MAX_SEED + 1)
            params = msgspec.structs.replace(params, seed=seed)
        if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s > 0):
            raise InvalidRequestError(f"timeout_s must be positive and finite, got {timeout_s}")
        submit = Submit(
            request_id=RequestId(request_id or uuid.uuid4().hex),
            prompt=tuple(prompt),
            params=params,
            priority=priority,
            cache_salt=cache_salt,
            timeout_s=timeout_s,
            fingerprint=fingerprint,
            client=client,
            weight=weight,
            expected_output_tokens=expected_output_tokens,
            session=session,
        )
        end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= frozenset(welcome.eos_token_ids)
        detokenizer = await self._new_detokenizer(stop, end_ids, params, decoder, tells_stop)
        if detokenizer is not None and continues_text:
            detokenizer.follow(submit.prompt)
        state = RequestState(submit, detokenizer, end_ids, submitted_at=time.monotonic())
        connection = self._started()
        connection.start(state)
        return AsyncGeneration(state, connection.cancel)

    def _started(self) -> Session:
        """The session, made at first use since it belongs to the running event loop."""
        if self._closed:
            raise ServerUnavailableError("the client was closed")
        if self._session is None:
            self._session = Session(
                self.endpoint,
                heartbeat_s=self._heartbeat_s,
                silence_timeout_s=self._silence_timeout_s,
            )
        return self._session

    async def _encode(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Tokenize a text or a conversation in a thread: it may be long, and others are waiting."""
        tokenizer = await self._require_tokenizer()
        try:
            if isinstance(prompt, str):
                return await asyncio.to_thread(tokenizer.encode, prompt)
            return await asyncio.to_thread(tokenizer.apply_chat_template, prompt)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None

    async def _new_detokenizer(
        self,
        stop: str | Sequence[str] | None,
        silent: frozenset[int],
        params: SamplingParams,
        decoder: TokenDecoder | None,
        tells_stop: bool,
    ) -> Detokenizer | None:
        try:
            stops = stop_strings(stop)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None
        decoder = decoder or await (self._require_tokenizer() if stops else self.tokenizer())
        if decoder is None:
            return None
        special = (await self._require_tokenizer()).special_tokens(stops) if stops else {}
        held = params.min_tokens
        return Detokenizer(decoder, stops, silent, held, special, tells_stop=tells_stop)

    async def _require_tokenizer(self) -> Tokenizer:
        tokenizer = await self.tokenizer()
        if tokenizer is None:
            raise TokenizerUnavailableError(
                f"text needs a tokenizer, and the server's ({(await self.info()).model_path}) "
                "is not usable on this machine; pass tokenizer=DIRECTORY, or send token ids"
            )
        return tokenizer

    async def _load_tokenizer(self) -> Tokenizer | None:
        if isinstance(self._given_tokenizer, str | Path):
            return await asyncio.to_thread(Tokenizer, self._given_tokenizer)
        directory = Path((await self.info()).model_path)
        if not directory.is_dir():
            return None
        try:
            return await asyncio.to_thread(Tokenizer, directory)
        except (ValueError, ImportError) as error:
            _log.warning("going on with token ids only: %s", error)
            return None
