"""Loads one layer's mixture of experts: of each rank, its experts and its columns of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from fastserve_mega.models.architecture import Architecture, Experts
from fastserve_mega.models.weight_names import ExpertNames
from fastserve_mega.worker.partition import Partition


class ReadLinear(Protocol):
    """Some rows (outputs) or columns (inputs) of the weight of a module."""

    def __call__(
        self,
        name: str,
        shape: tuple[int, int],
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor: ...


class ExpertWeights:
    """Megatron's parameters of the mixtures of one rank.

    Args:
        architecture: a model with experts.
        partition: of the rank.
        read_linear: reads slices of a weight by the name of its module.
        open_slice: a handle on a tensor by its name, checked to have a shape.
        has: whether the checkpoint has a tensor of a name.
    """

    def __init__(
        self,
        architecture: Architecture,
        partition: Partition,
        *,
        read_linear: ReadLinear,
        open_slice: Callable[[str, tuple[int, ...]], Any],
        has: Callable[[str], bool],
    ) -> None:
        if architecture.experts is None or architecture.weights.experts is None:
            raise ValueError(f"{architecture.name} has no experts")
        self._experts: Experts = architecture.experts
        self._names: ExpertNames = architecture.weights.experts
        self._hidden = architecture.hidden_size
        self._partition = partition
        self._read_linear = read_linear
        self._open_slice = open_slice
        self._has = has

    def layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Name below the layer, and this rank's slice, of each parameter of one layer's mixture.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        shape = (self._experts.count, self._hidden)
        fused = self._at(layer, self._names.fused)
        is_fused = self._has(f"{fused}.experts.gate_up_proj")
        router = f"{fused}.gate" if is_fused else self._at(layer, self._names.router)
        yield "mlp.router.weight", self._read_linear(router, shape)
        read = self._fused if is_fused else self._separate
        for local, expert in enumerate(self._partition.experts):
            up, down = read(layer, expert)
            yield f"mlp.experts.local_experts.{local}.linear_fc1.weight", up
            yield f"mlp.experts.local_experts.{local}.linear_fc2.weight", down
        if self._experts.shared_ffn_hidden_size is not None:
            yield from self._shared(layer, self._experts.shared_ffn_hidden_size)

    def _separate(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """A tensor for each expert and projection, as checkpoints on the hub have them."""
        names, columns = self._names, self._partition.expert_columns
        return self._mlp(
            [self._at(layer, name, expert) for name in (names.gate, names.up, names.down)],
            self._experts.ffn_hidden_size,
            columns,
        )

    def _fused(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """All experts in two tensors."""
        name, experts = f"{self._at(layer, self._names.fused)}.experts", self._experts
        ffn, columns = experts.ffn_hidden_size, self._partition.expert_columns
        gate_up = self._open_slice(f"{name}.gate_up_proj", (experts.count, 2 * ffn, self._hidden))
        down = self._open_slice(f"{name}.down_proj", (experts.count, self._hidden, ffn))
        start, stop = columns.start, columns.stop
        up = torch.cat((gate_up[expert, start:stop], gate_up[expert, ffn + start : ffn + stop]))
        return up, down[expert, :, start:stop]

    def _shared(self, layer: int, ffn: int) -> Iterator[tuple[str, Tensor]]:
        names = self._names
        parts = (names.shared_gate, names.shared_up, names.shared_down)
        up, down = self._mlp(
            [self._at(layer, name or "") for name in parts],
            ffn,
            self._partition.shared_expert_columns,
        )
        yield "mlp.shared_experts.linear_fc1.weight", up
        yield "mlp.shared_experts.linear_fc2.weight", down
        router = self._at(layer, names.shared_router or "")
        yield "mlp.shared_experts.gate_weight", self._read_linear(router, (1, self._hidden))

    def _mlp(self, names: list[str], ffn: int, columns: range) -> tuple[Tensor, Tensor]:
        """Gate and up rows as one weight, and the columns of the down projection."""
        *halves, down = names
        shape = (ffn, self._hidden)
        parts = [self._read_linear(name, shape, rows=columns) for name in halves]
        return torch.cat(parts), self._read_linear(down, shape[::-1], columns=columns)

    @staticmethod
    def _at(layer: int, name: str, expert: int | None = None) -> str:
        return name.format(layer=layer, expert=expert)
