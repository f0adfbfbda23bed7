"""A parameter of a rank as blocks of rows, each with the place of its values in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of rows of a parameter, and the part of a tensor that holds the same values."""

    tensor: str
    """Name in the checkpoint."""
    bare_name: str
    """Name in a checkpoint that was saved from the bare model, without its prefix."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    rows: range
    """Rows of the parameter, as are the columns; see `transposed`. A tensor with three axes is
    taken for a table with the rows of all its matrices below each other."""
    columns: range | None = None
    """None for a vector."""
    transposed: bool = False
    """The checkpoint has the axes in the other order; so has `shape`."""
    optional: bool = False
    """Zero where the checkpoint has no such tensor."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of a rank: its pieces below each other, then zeros."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    extra: bool = False
    """No parameter of Megatron's model, but a part of a tensor that no parameter holds."""


def stack(name: str, pieces: list[Piece]) -> Weight:
    """A parameter of exactly these pieces."""
    columns = pieces[0].columns
    rows = sum(len(piece.rows) for piece in pieces)
    return Weight(name, (rows,) if columns is None else (rows, len(columns)), tuple(pieces))
