"""Log probabilities as OpenAI writes them, in the shapes of both endpoints."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterator, Sequence

from fastserve_mega.client import Chunk
from fastserve_mega.client.generation import AnswerSoFar
from fastserve_mega.server.answers import Json
from fastserve_mega.text.detokenizer import TokenDecoder
from fastserve_mega.types import TokenLogprobs

_NOTHING = TokenLogprobs(0.0)
_LEAST = -9999.0
"""JSON has no infinity."""
TokenBytes = Callable[[int], bytes]


def chat_logprobs(
    chunk: Chunk, token_bytes: TokenBytes, ends: Collection[int], top: int | None
) -> Json | None:
    """The `logprobs` of a chat completion's choice; None when the chunk has none.

    Args:
        chunk: tokens and their log probabilities.
        token_bytes: what a token id stands for.
        ends: token ids that end an answer and are no part of it.
        top: how many of the most probable tokens are told; None tells nothing.
    """
    if top is None or not chunk.logprobs:
        return None

    def entry(token_id: int, logprob: float) -> Json:
        data = token_bytes(token_id)
        text, logprob = _text(data, prefix=""), max(logprob, _LEAST)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    content = [
        {
            **entry(token_id, told.logprob),
            "top_logprobs": [entry(*each) for each in _most_probable(told, top)],
        }
        for token_id, told in _spoken(chunk, ends)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(generation: AnswerSoFar, token_bytes: TokenBytes, top: int | None) -> Json:
    """The field `prompt_logprobs` of an answer, as vLLM writes it; null for the first token.

    Of each token its own, and `top` of the most probable ones, by their ids. None: no field.
    """
    if top is None:
        return {}

    def entry(token_id: int, logprob: float, rank: int | None) -> dict[str, Json]:
        text, logprob = _text(token_bytes(token_id)), max(logprob, _LEAST)
        return {str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": text}}

    entries: list[dict[str, Json] | None] = []
    for token_id, told in zip(generation.prompt_token_ids, generation.prompt_logprobs, strict=True):
        told_of = entry(token_id, told.logprob, None) if told else None
        for rank, (each, logprob) in enumerate(_most_probable(told or _NOTHING, top), start=1):
            told_of = {**(told_of or {}), **entry(each, logprob, rank)}
        entries.append(told_of)
    return {"prompt_logprobs": entries}


class CompletionLogprobs:
    """The `logprobs` of a completion's choice, piece by piece: each tells offsets in the text.

    Args:
        token_bytes: what a token id stands for.
        decoder: makes the text, and says whether it has a token.
        ends: token ids that end an answer and are no part of it.
        top: how many of the most probable tokens are told; None tells nothing.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        decoder: TokenDecoder,
        ends: Collection[int],
        top: int | None,
    ) -> None:
        self._count = top
        self._token_bytes = token_bytes
        self._shown = decoder
        self._ends = ends
        self._offset = 0
        self._echo = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of_prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], echo: str
    ) -> Json | None:
        """The arrays of an echoed prompt, which come first; null for its first token.

        A special token that a client has written is in the text `echo`, where others are not.
        What follows it is told to its last token, the end of sequence included: callers tell
        prompt and answer apart by counting.
        """
        if self._count is None or not logprobs:
            return None
        self._ends, self._echo = (), echo
        known = [told or _NOTHING for told in logprobs]
        arrays = self(Chunk("", tuple(token_ids), tuple(known))) or {}
        for index, told in enumerate(logprobs):
            if told is None:
                arrays["token_logprobs"][index] = arrays["top_logprobs"][index] = None
        return arrays

    def __call__(self, chunk: Chunk) -> Json | None:
        """The arrays of a chunk; None when it has none."""
        if self._count is None or not chunk.logprobs:
            return None
        tokens, own, tops, offsets = [], [], [], []
        for token_id, told in _spoken(chunk, self._ends):
            data = self._token_bytes(token_id)
            tokens.append(_text(data))
            own.append(max(told.logprob, _LEAST))
            tops.append(self._top(tokens[-1], own[-1], _most_probable(told, self._count)))
            offsets.append(self._offset)
            is_echoed = self._echo.startswith(tokens[-1], self._offset)
            if is_echoed or self._shown.visible((token_id,)):
                self._offset += len(self._decoder.decode(data))
        return {
            "tokens": tokens,
            "token_logprobs": own,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(
        self, token: str, logprob: float, most_probable: Sequence[tuple[int, float]]
    ) -> dict[str, float]:
        """The most probable tokens, and always the one that was sampled."""
        top = {_text(self._token_bytes(each)): max(value, _LEAST) for each, value in most_probable}
        return {**top, token: logprob}


def _most_probable(told: TokenLogprobs, count: int) -> list[tuple[int, float]]:
    """So many of the most probable tokens, most probable first, with their logarithms."""
    return list(zip(told.top_ids, told.top_logprobs, strict=True))[:count]


def _spoken(chunk: Chunk, ends: Collection[int]) -> Iterator[tuple[int, TokenLogprobs]]:
    if chunk.logprobs:
        for token_id, told in zip(chunk.token_ids, chunk.logprobs, strict=True):
            if told is not None and token_id not in ends:
                yield token_id, told


def _text(data: bytes, prefix: str = "bytes:") -> str:
    r"""A token's text; of a part of a character its bytes, as OpenAI writes them: `\xe2\x80`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)
