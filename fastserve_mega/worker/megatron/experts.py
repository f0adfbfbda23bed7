"""The forward pass of Megatron's mixture of experts, as a straight line.

Routing, experts, weights and names are Megatron's MoELayer (TopKRouter, SequentialMLP,
SharedExpertMLP); its token dispatchers are not used. They exist because training divides the
tokens among the ranks. Here every tensor-parallel rank holds all tokens of a step, so each
computes its own experts for the tokens that chose them, and the sum over the ranks, which tensor
parallelism needs anyway, completes the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import RowParallelLinear
from torch import Tensor
from torch.nn import functional

from fastserve_mega.models.architecture import Experts
from fastserve_mega.worker.float8 import Float8Rows
from fastserve_mega.worker.megatron.packing import Packable


class PartialRowLinear(Packable, RowParallelLinear):  # type: ignore[misc] # megatron is untyped
    """A linear whose input columns are divided, and whose caller sums over the ranks."""

    def forward(self, x: Tensor | Float8Rows) -> Tensor:
        """[tokens, this rank's input columns] → [tokens, output], this rank's addend."""
        return self.multiply(x, None)


class ExpertMixture:
    """The feed-forward pass of one layer.

    Args:
        layer: Megatron's MoELayer.
        experts: how the model routes.
        activation: of the gate.
        tensor_group: the ranks that share the layer.
    """

    def __init__(
        self,
        layer: Any,
        experts: Experts,
        activation: Callable[[Tensor], Tensor],
        tensor_group: dist.ProcessGroup,
    ) -> None:
        self.router = layer.router
        self.local = list(layer.experts.local_experts)
        self.first: int = layer.local_expert_indices[0]
        self.shared = layer.shared_experts
        self.experts = experts
        self._activation = activation
        self.group = tensor_group
        self._summed_over_ranks = dist.get_world_size(tensor_group) > 1

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] → [tokens, hidden], the same on all ranks."""
        y = self.chosen_experts(x)
        if self.shared is not None:
            gate = functional.linear(x, self.shared.gate_weight).sigmoid()
            y += gate * self._feed_forward(self.shared, x)
        if self._summed_over_ranks:
            dist.all_reduce(y, group=self.group)
        return y

    def chosen_experts(self, x: Tensor) -> Tensor:
        """This rank's part of the weighted sum, [tokens, hidden]."""
        weights, chosen = route(functional.linear(x, self.router.weight), self.experts)
        choices = chosen.flatten()  # choice c is of token c // experts per token
        # Not bincount, which would make the host wait for the device once more than tolist.
        counted = choices.new_zeros(self.experts.count)
        counts = counted.scatter_add_(0, choices, torch.ones_like(choices)).tolist()
        end = self.first + len(self.local)
        start = sum(counts[: self.first])
        # The choices of this rank's experts, one expert after the other.
        local = choices.argsort(stable=True)[start : start + sum(counts[self.first : end])]
        rows = x.index_select(0, local // self.experts.chosen)
        parts = torch.split(rows, counts[self.first : end])
        outputs = [
            self._feed_forward(expert, part)
            for expert, part in zip(self.local, parts, strict=True)
            if len(part)
        ]
        out = x.new_zeros(choices.shape[0], x.shape[1])
        if outputs:
            out[local] = torch.cat(outputs) * weights.flatten()[local, None].to(x.dtype)
        # Not index_add: on CUDA its order, and with it the rounding, is left to chance.
        return out.view(-1, self.experts.chosen, x.shape[1]).sum(dim=1)

    def _feed_forward(self, mlp: Any, x: Tensor) -> Tensor:
        gate, up = mlp.linear_fc1(x).chunk(2, dim=-1)
        return cast(Tensor, mlp.linear_fc2(self._activation(gate).mul_(up)))


def route(logits: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Weights in float32 and numbers of each token's experts, both [tokens, chosen].

    Args:
        logits: [tokens, experts].
        experts: how many are chosen, and whether their weights are scaled to a sum of 1.
    """
    weights, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(experts.chosen, dim=-1)
    if experts.normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen
