"""Answers as the `choices` of OpenAI's completions and chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastserve_mega.client import Chunk
from fastserve_mega.server.answers import Answer, Json, encode_event
from fastserve_mega.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What an endpoint calls its answers."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def new_id(self) -> str:
        return f"{self.id_prefix}-{uuid.uuid4().hex}"


class Choice(Protocol):
    """One of the answers to a request, as its endpoint writes it: entries of `choices`."""

    def whole(self, chunk: Chunk, reason: str) -> Json:
        """A whole answer: its text and all its tokens."""

    def opening(self) -> list[Json]:
        """What begins a stream."""

    def delta(self, chunk: Chunk) -> list[Json]:
        """A piece of a stream."""

    def closing(self, reason: str) -> list[Json]:
        """The end of a stream."""


class ChoicesShape:
    """Each event of a stream has the fields of the whole answer, and a piece of one choice.

    Args:
        answer: what is written.
        endpoint: names it.
        choice: writes the generation of an index.
        more: further fields of a whole answer.
    """

    last_words = b"data: [DONE]\n\n"

    def __init__(
        self,
        answer: Answer,
        endpoint: Endpoint,
        choice: Callable[[int], Choice],
        more: Callable[[], Json] = dict,
    ) -> None:
        self._answer = answer
        self._more = more
        self._choices: Sequence[Choice] = [choice(i) for i in range(len(answer.generations))]
        self._usage = answer.body.usage_in_stream
        is_stream = answer.body.stream
        self._head: Json = {
            "id": answer.answer_id,
            "object": endpoint.chunk_object_name if is_stream else endpoint.object_name,
            "created": int(time.time()),
            "model": answer.model,
        }

    def whole(self) -> Json:
        choices = [
            choice.whole(self._answer.text_and_tokens(index), self._answer.reason(index))
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": self._counts(), **self._more()}

    def opening(self, index: int) -> Iterable[bytes]:
        return self._pieces(self._choices[index].opening())

    def delta(self, index: int, chunk: Chunk) -> Iterable[bytes]:
        return self._pieces(self._choices[index].delta(chunk))

    def closing(self, index: int) -> Iterable[bytes]:
        return self._pieces(self._choices[index].closing(self._answer.reason(index)))

    def end(self) -> Iterable[bytes]:
        if self._usage == "never":
            return []
        return [encode_event({**self._head, "choices": [], "usage": self._counts()})]

    def failure(self, error: ApiError) -> Iterable[bytes]:
        return [encode_event(error.body)]

    def _pieces(self, choices: Sequence[Json]) -> Iterable[bytes]:
        told: Json = {}
        if self._usage != "never":
            told = {"usage": self._counts() if self._usage == "always" else None}
        return [encode_event({**self._head, "choices": [choice], **told}) for choice in choices]

    def _counts(self) -> Json:
        usage = self._answer.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }
