"""An answer as a row of blocks: reasoning, text and calls, in the order in which they come.

OpenAI's responses and Anthropic's messages are made of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastserve_mega.client import Chunk
from fastserve_mega.server.answers import Answer, Json
from fastserve_mega.server.errors import ApiError
from fastserve_mega.server.tools.pieces import CallPiece, Piece, Reasoning, ToolParser

BlockKind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """A block of an answer, as far as it is known."""

    index: int
    kind: BlockKind
    item_id: str
    """Name of a call, by which its result is told."""
    name: str = ""
    """Name of the function that is called."""
    text: str = ""
    """Arguments of a call, as JSON."""


class BlockShape(ABC):
    """Writes the one generation of an answer block by block; a stream and a whole are the same.

    Args:
        answer: what is written.
        parser: reads it.
        new_call_id: names a tool call.
    """

    last_words = b""

    def __init__(self, answer: Answer, parser: ToolParser, new_call_id: Callable[[], str]) -> None:
        self.answer = answer
        self.new_call_id = new_call_id
        self.blocks: list[Block] = []
        self.all_told = False
        """Nothing will be added to any block."""
        self._parser = parser
        self._is_open = False

    # --- what an API writes --------------------------------------------------------------------

    @abstractmethod
    def body(self) -> Json:
        """The answer as far as it is known."""

    @abstractmethod
    def started(self) -> Iterable[bytes]:
        """Before the first block."""

    @abstractmethod
    def began(self, block: Block) -> Iterable[bytes]:
        """A block has begun; its text is empty."""

    @abstractmethod
    def grew(self, block: Block, text: str) -> Iterable[bytes]:
        """Text was added to a block."""

    @abstractmethod
    def ended(self, block: Block) -> Iterable[bytes]:
        """A block is complete."""

    @abstractmethod
    def finished(self) -> Iterable[bytes]:
        """After the last block."""

    @abstractmethod
    def failure(self, error: ApiError) -> Iterable[bytes]:
        """An error after the stream has begun."""

    def new_item_id(self, kind: BlockKind) -> str:
        """Names a block."""
        return self.new_call_id() if kind == "call" else ""

    # --- what has happened ---------------------------------------------------------------------

    def whole(self) -> Json:
        chunk = self.answer.text_and_tokens(0)
        for _ in (*self.opening(0), *self.delta(0, chunk), *self.closing(0)):
            pass
        return self.body()

    def opening(self, index: int) -> Iterable[bytes]:
        return self.started()

    def delta(self, index: int, chunk: Chunk) -> Iterable[bytes]:
        return self._take(self._parser.push(chunk.text))

    def closing(self, index: int) -> Iterable[bytes]:
        yield from self._take(self._parser.finish())
        self.all_told = True
        yield from self._close()
        yield from self.finished()

    def end(self) -> Iterable[bytes]:
        return []

    def _take(self, pieces: Sequence[Piece]) -> Iterable[bytes]:
        for piece in pieces:
            kind = _kind(piece)
            is_new_call = isinstance(piece, CallPiece) and piece.name is not None
            if not self._is_open or self.blocks[-1].kind != kind or is_new_call:
                yield from self._close()
                block = Block(len(self.blocks), kind, self.new_item_id(kind))
                if isinstance(piece, CallPiece):
                    block.name = piece.name or ""
                self.blocks.append(block)
                self._is_open = True
                yield from self.began(block)
            if text := _text(piece):
                self.blocks[-1].text += text
                yield from self.grew(self.blocks[-1], text)

    def _close(self) -> Iterable[bytes]:
        if self._is_open:
            self._is_open = False
            yield from self.ended(self.blocks[-1])


def _kind(piece: Piece) -> BlockKind:
    if isinstance(piece, str):
        return "text"
    return "reasoning" if isinstance(piece, Reasoning) else "call"


def _text(piece: Piece) -> str:
    if isinstance(piece, str):
        return piece
    return piece.text if isinstance(piece, Reasoning) else piece.arguments
