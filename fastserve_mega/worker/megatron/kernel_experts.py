"""The mixture of experts by kernels: the host does not learn which experts were chosen."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from fastserve_mega.worker.kernels.experts import ExpertWeights, multiply_groups
from fastserve_mega.worker.kernels.rows import activate
from fastserve_mega.worker.megatron.experts import ExpertMixture, route


def use_kernels(mixture: ExpertMixture, activation: str) -> None:
    """Let a mixture compute its chosen experts by kernels.

    Args:
        mixture: its weights are loaded. Those of its experts are put behind each other, and
            Megatron's parameters become parts of that.
        activation: of the gate, by name.
    """
    if "chosen_experts" in vars(mixture):
        return  # by an engine on trial
    wide = _stacked([expert.linear_fc1 for expert in mixture.local])
    narrow = _stacked([expert.linear_fc2 for expert in mixture.local])
    first, count = mixture.first, len(mixture.local)
    chosen, experts = mixture.experts.chosen, mixture.experts.count

    def compute(x: Tensor) -> Tensor:
        weights, numbers = route(functional.linear(x, mixture.router.weight), mixture.experts)
        choices = numbers.flatten()
        counts = choices.new_zeros(experts + 1).scatter_add_(
            0, choices + 1, torch.ones_like(choices)
        )
        firsts = counts.cumsum(0)[first : first + count + 1]
        order = choices.argsort(stable=True)
        inner = multiply_groups(x, wide, firsts, order, chosen=chosen)
        inner = cast(Tensor, activate(inner, activation, gated=True))
        out = multiply_groups(
            inner, narrow, firsts, order, chosen=chosen, factors=weights.flatten()
        )
        # Not added up while writing: the order, and with it the rounding, would be left to chance.
        return out.view(-1, chosen, x.shape[1]).sum(dim=1)

    mixture.chosen_experts = compute  # type: ignore[method-assign]


def _stacked(linears: list[Any]) -> ExpertWeights:
    """All of them behind each other; the modules keep their parts of it."""
    together = torch.stack([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, together, strict=True):
        linear.weight.data = part
    if together.dtype != torch.float8_e4m3fn:
        return ExpertWeights(together)
    return ExpertWeights(together, torch.stack([each.weight_scale.detach() for each in linears]))
