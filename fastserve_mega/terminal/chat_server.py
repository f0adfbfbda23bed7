"""Who answers a conversation in the terminal: a coordinator, or any server with the OpenAI API."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from fastserve_mega.client import Client, ClientError, ServerUnavailableError
from fastserve_mega.types import SamplingParams

if TYPE_CHECKING:
    import httpx

Messages = Sequence[Mapping[str, str]]
CONNECT_S = 10.0
"""How long a server may take to say what it is."""
_SILENCE_S = 60.0
"""Longest time without any data."""
_ERROR_CHARACTERS = 200


class ChatServer(Protocol):
    """Answers conversations, one at a time."""

    model: str

    def answer(
        self, messages: Messages, params: SamplingParams
    ) -> Generator[str, None, int | None]:
        """Pieces of text as they come; returns the number of tokens, if it is told.

        Closing it ends the answer.

        Raises:
            ClientError: it was refused, or did not come to its end.
        """

    def close(self) -> None:
        """Nothing is asked any more."""


def connect(url: str) -> ChatServer:
    """The server at an address, `http…` or one of ZeroMQ.

    Raises:
        ClientError: it does not answer.
        ModuleNotFoundError: HTTP needs httpx.
    """
    return HttpChatServer(url) if url.startswith(("http://", "https://")) else ZmqChatServer(url)


class ZmqChatServer:
    """A coordinator."""

    def __init__(self, endpoint: str) -> None:
        self._client = Client(endpoint, timeout_s=CONNECT_S)
        try:
            self.model = self._client.info().model_name
        except ClientError:
            self._client.close()
            raise

    def answer(
        self, messages: Messages, params: SamplingParams
    ) -> Generator[str, None, int | None]:
        """See `ChatServer`."""
        generation = self._client.chat(messages, params)
        try:
            for chunk in generation:
                yield chunk.text
        finally:
            generation.cancel()
        return generation.usage.completion_tokens if generation.usage else None

    def close(self) -> None:
        self._client.close()


class HttpChatServer:
    """Needs httpx."""

    def __init__(self, url: str) -> None:
        """Connect.

        Args:
            url: with or without /v1.
        """
        import httpx

        self._errors = (httpx.HTTPError, ValueError, LookupError, TypeError)
        self._http = httpx.Client(
            base_url=url.rstrip("/").removesuffix("/v1"), timeout=_SILENCE_S, trust_env=False
        )
        try:
            listed = self._http.get("/v1/models").raise_for_status().json()
            self.model = str(listed["data"][0]["id"])
        except self._errors as error:
            self._http.close()
            raise ServerUnavailableError(f"{url} does not answer: {error}") from None

    def answer(
        self, messages: Messages, params: SamplingParams
    ) -> Generator[str, None, int | None]:
        """See `ChatServer`."""
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    said = response.read().decode(errors="replace")
                    raise ClientError(f"{response.status_code}: {said}"[:_ERROR_CHARACTERS])
                return (yield from _read_stream(response))
        except self._errors as error:
            raise ClientError(f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]) from None

    def close(self) -> None:
        self._http.close()


def _read_stream(response: httpx.Response) -> Generator[str, None, int | None]:
    output_tokens = None
    for line in response.iter_lines():
        if not line.startswith("data:") or line.endswith("[DONE]"):
            continue
        event = json.loads(line.removeprefix("data:"))
        if "error" in event:
            raise ClientError(str(event["error"]["message"])[:_ERROR_CHARACTERS])
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""
        if event.get("usage"):
            output_tokens = int(event["usage"]["completion_tokens"])
    return output_tokens
