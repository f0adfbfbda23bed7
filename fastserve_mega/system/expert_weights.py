"""The parameters of one layer's mixture of experts: of each rank, its experts and columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from fastserve_mega.models.architecture import Architecture, Experts
from fastserve_mega.models.weight_names import ExpertNames
from fastserve_mega.system.partition import Partition
from fastserve_mega.system.pieces import Piece, Weight, stack


class LinearPiece(Protocol):
    """Some rows (outputs) or columns (inputs) of the weight of a module."""

    def __call__(
        self,
        name: str,
        shape: tuple[int, int],
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Piece: ...


def expert_weights(
    architecture: Architecture,
    partition: Partition,
    layer: int,
    linear: LinearPiece,
    *,
    fused: bool,
) -> Iterator[Weight]:
    """Parameters of a layer's mixture, by their names below the layer.

    Args:
        architecture: a model with experts.
        partition: of the rank.
        layer: by its number in the whole model.
        linear: makes a piece of the weight of a module.
        fused: the checkpoint has all experts of a layer in two tensors, not one per projection.

    Raises:
        ValueError: the family has no experts.
    """
    mixture = _Mixture(architecture, partition, layer, linear)
    yield from mixture.router(fused=fused)
    yield from mixture.fused_experts() if fused else mixture.separate_experts()
    yield from mixture.shared_expert()


class _Mixture:
    def __init__(
        self,
        architecture: Architecture,
        partition: Partition,
        layer: int,
        linear: LinearPiece,
    ) -> None:
        experts, names = architecture.experts, architecture.weights.experts
        if experts is None or names is None:
            raise ValueError(f"{architecture.name} has no experts")
        self._experts: Experts = experts
        self._names: ExpertNames = names
        self._prefix = architecture.weights.prefix
        self._hidden = architecture.hidden_size
        self._partition = partition
        self._layer = layer
        self._linear = linear

    def router(self, *, fused: bool) -> Iterator[Weight]:
        name = f"{self._names.fused}.gate" if fused else self._names.router
        shape = (self._experts.count, self._hidden)
        yield stack("mlp.router.weight", [self._linear(self._at(name), shape)])

    def separate_experts(self) -> Iterator[Weight]:
        """A tensor for each expert and projection, as checkpoints on the hub have them."""
        names = self._names
        for local, expert in enumerate(self._partition.experts):
            yield from self._mlp(
                f"mlp.experts.local_experts.{local}",
                [self._at(name, expert) for name in (names.gate, names.up, names.down)],
                self._experts.ffn_hidden_size,
                self._partition.expert_columns,
            )

    def fused_experts(self) -> Iterator[Weight]:
        """All experts in two tensors, as transformers 5 can write them."""
        hidden, ffn = self._hidden, self._experts.ffn_hidden_size
        columns, count = self._partition.expert_columns, self._experts.count
        for local, expert in enumerate(self._partition.experts):
            first = 2 * ffn * expert
            halves = [
                range(start + columns.start, start + columns.stop) for start in (first, first + ffn)
            ]
            up = [self._slab("gate_up_proj", (count, 2 * ffn, hidden), rows) for rows in halves]
            rows = range(hidden * expert, hidden * (expert + 1))
            down = self._slab("down_proj", (count, hidden, ffn), rows, columns)
            target = f"mlp.experts.local_experts.{local}"
            yield stack(f"{target}.linear_fc1.weight", up)
            yield stack(f"{target}.linear_fc2.weight", [down])

    def shared_expert(self) -> Iterator[Weight]:
        ffn, names = self._experts.shared_ffn_hidden_size, self._names
        if ffn is None:
            return
        parts = (names.shared_gate, names.shared_up, names.shared_down)
        columns = self._partition.shared_expert_columns
        yield from self._mlp(
            "mlp.shared_experts", [self._at(name or "") for name in parts], ffn, columns
        )
        router = self._linear(self._at(names.shared_router or ""), (1, self._hidden))
        yield stack("mlp.shared_experts.gate_weight", [router])

    def _mlp(self, target: str, names: list[str], ffn: int, columns: range) -> Iterator[Weight]:
        """Gate and up rows as one weight, and the columns of the down projection."""
        *halves, down = names
        shape = (ffn, self._hidden)
        parts = [self._linear(name, shape, rows=columns) for name in halves]
        yield stack(f"{target}.linear_fc1.weight", parts)
        part = self._linear(down, shape[::-1], columns=columns)
        yield stack(f"{target}.linear_fc2.weight", [part])

    def _slab(
        self, name: str, shape: tuple[int, int, int], rows: range, columns: range | None = None
    ) -> Piece:
        """Pieces of a tensor that has the matrices of all experts."""
        name = self._at(f"{self._names.fused}.experts.{name}")
        columns = range(shape[2]) if columns is None else columns
        return Piece(self._prefix + name, name, shape, rows, columns)

    def _at(self, name: str, expert: int | None = None) -> str:
        return name.format(layer=self._layer, expert=expert)
