"""Log probabilities as OpenAI writes them, in the shapes of both endpoints."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterator, Sequence

from fastserve_mega.client import Chunk
from fastserve_mega.server.answers import Json
from fastserve_mega.text.detokenizer import TokenDecoder
from fastserve_mega.types import TokenLogprobs

_NOTHING = TokenLogprobs(0.0)
_LEAST = -9999.0
"""JSON has no infinity."""
TokenBytes = Callable[[int], bytes]


def chat_logprobs(chunk: Chunk, token_bytes: TokenBytes, ends: Collection[int]) -> Json:
    """The `logprobs` of a chat completion's choice.

    Args:
        chunk: tokens and their log probabilities.
        token_bytes: what a token id stands for.
        ends: token ids that end an answer and are no part of it.
    """

    def entry(token_id: int, logprob: float) -> Json:
        data = token_bytes(token_id)
        text, logprob = _text(data, prefix=""), max(logprob, _LEAST)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    content = [
        {
            **entry(token_id, told.logprob),
            "top_logprobs": [
                entry(*top) for top in zip(told.top_ids, told.top_logprobs, strict=True)
            ],
        }
        for token_id, told in _spoken(chunk, ends)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The `logprobs` of a completion's choice, piece by piece: each tells offsets in the text.

    Args:
        token_bytes: what a token id stands for.
        decoder: makes the text, and says whether it has a token.
        ends: token ids that end an answer and are no part of it.
    """

    def __init__(
        self, token_bytes: TokenBytes, decoder: TokenDecoder, ends: Collection[int]
    ) -> None:
        self._token_bytes = token_bytes
        self._shown = decoder
        self._ends = ends
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of_prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
    ) -> Json | None:
        """The arrays of an echoed prompt, which come first; null for its first token.

        What follows it is told to its last token, the end of sequence included: callers tell
        prompt and answer apart by counting.
        """
        if not logprobs:
            return None
        self._ends = ()
        known = [told or _NOTHING for told in logprobs]
        arrays = self(Chunk("", tuple(token_ids), tuple(known))) or {}
        for index, told in enumerate(logprobs):
            if told is None:
                arrays["token_logprobs"][index] = arrays["top_logprobs"][index] = None
        return arrays

    def __call__(self, chunk: Chunk) -> Json | None:
        """The arrays of a chunk; None when it has none."""
        tokens, own, tops, offsets = [], [], [], []
        for token_id, told in _spoken(chunk, self._ends):
            data = self._token_bytes(token_id)
            tokens.append(_text(data))
            own.append(max(told.logprob, _LEAST))
            tops.append(self._top(tokens[-1], own[-1], told))
            offsets.append(self._offset)
            if self._shown.visible((token_id,)):
                self._offset += len(self._decoder.decode(data))
        if not chunk.logprobs:
            return None
        return {
            "tokens": tokens,
            "token_logprobs": own,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, token: str, logprob: float, told: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens, and always the one that was sampled."""
        top = {
            _text(self._token_bytes(token_id)): max(value, _LEAST)
            for token_id, value in zip(told.top_ids, told.top_logprobs, strict=True)
        }
        return {**top, token: logprob}


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
