"""The servers to measure: any with the OpenAI API, or a coordinator over ZeroMQ."""

from __future__ import annotations

import json
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastserve_mega.bench.workload import Job
from fastserve_mega.client import AsyncClient, ClientError
from fastserve_mega.types import FinishReason, SamplingParams

if TYPE_CHECKING:
    import httpx

_ERROR_CHARACTERS = 200


class TargetError(Exception):
    """The server does not answer, or not as it should; str() is one sentence."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that came to its end. Times are those of `time.perf_counter()`."""

    prompt_tokens: int
    """Prompt tokens as the server counts them."""
    output_tokens: int
    """Output tokens as the server counts them."""
    times: tuple[float, ...]
    """When each piece of it came, one or more; a piece is one token or a few."""


class Target(Protocol):
    """A server. An asynchronous context manager: entering it finds out whether it answers."""

    model: str

    async def __aenter__(self) -> Target: ...
    async def __aexit__(self, *_: object) -> None: ...

    async def send(self, job: Job) -> Reply:
        """Send a request and read its stream to the end.

        Raises:
            TargetError: it was refused, or ended otherwise than by its length.
        """


class HttpTarget:
    """An OpenAI-compatible server; needs httpx."""

    def __init__(self, url: str, model: str | None, timeout_s: float) -> None:
        """Connects when it is entered.

        Args:
            url: with or without /v1.
            model: None takes the first one that the server lists.
            timeout_s: longest time without any data.
        """
        try:
            import httpx
        except ImportError:
            raise TargetError("--url needs httpx: pip install 'fastserve_mega[terminal]'") from None
        self.model = model or ""
        self._url = url.rstrip("/").removesuffix("/v1")
        self._errors = (httpx.HTTPError, ValueError, LookupError, TypeError)
        self._http = httpx.AsyncClient(
            base_url=self._url,
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> HttpTarget:
        try:
            answer = await self._http.get("/v1/models")
            names = [each["id"] for each in answer.raise_for_status().json()["data"]]
        except self._errors as error:
            await self._http.aclose()
            raise TargetError(f"{self._url} does not answer: {error}") from None
        self.model = self.model or names[0]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send(self, job: Job) -> Reply:
        """See `Target`."""
        body = {
            "model": self.model,
            "prompt": list(job.prompt),
            "max_tokens": job.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    said = (await response.aread()).decode(errors="replace")
                    raise TargetError(f"{response.status_code}: {said}"[:_ERROR_CHARACTERS])
                return await _read_stream(response)
        except self._errors as error:
            said = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
            raise TargetError(said) from None


async def _read_stream(response: httpx.Response) -> Reply:
    times: list[float] = []
    usage: dict[str, int] | None = None
    async for line in response.aiter_lines():
        if not line.startswith("data:") or line.endswith("[DONE]"):
            continue
        event = json.loads(line.removeprefix("data:"))
        if "error" in event:
            raise TargetError(str(event["error"]["message"])[:_ERROR_CHARACTERS])
        if event["choices"]:
            times.append(time.perf_counter())
        usage = event.get("usage") or usage
    if not times or usage is None:
        raise TargetError("the stream has no text or no usage")
    return Reply(int(usage["prompt_tokens"]), int(usage["completion_tokens"]), tuple(times))


class ZmqTarget:
    """A coordinator, without HTTP in between."""

    def __init__(self, endpoint: str, timeout_s: float) -> None:
        """Connects when it is entered.

        Args:
            endpoint: ZeroMQ address for clients.
            timeout_s: longest silence of the coordinator.
        """
        self.model = ""
        self._client = AsyncClient(endpoint, silence_timeout_s=timeout_s)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> ZmqTarget:
        try:
            await self._stack.enter_async_context(self._client)
            await self._client.tokenizer()  # its loading must not delay the first request
            self.model = (await self._client.info()).model_name
        except (ClientError, ValueError) as error:
            raise TargetError(str(error)) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def send(self, job: Job) -> Reply:
        """See `Target`."""
        params = SamplingParams(max_tokens=job.output_tokens, temperature=0.0, ignore_eos=True)
        try:
            answer = await self._client.submit(job.prompt, params)
            times = []
            while await answer.take():
                times.append(time.perf_counter())
        except ClientError as error:
            said = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
            raise TargetError(said) from None
        if answer.finish_reason is not FinishReason.LENGTH or not times or not answer.usage:
            raise TargetError(f"ended with {answer.finish_reason}")
        usage = answer.usage
        return Reply(usage.prompt_tokens, usage.completion_tokens, tuple(times))
