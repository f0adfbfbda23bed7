"""Megatron's layers, computed with fused kernels between the matrix products.

Of a mixture of experts the host does not learn which of them were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from fastserve_mega.worker.kernels.experts import ExpertWeights, multiply_groups
from fastserve_mega.worker.kernels.pages import HeadNorm
from fastserve_mega.worker.kernels.rows import Norm, Rows, activate, add_and_norm, norm
from fastserve_mega.worker.megatron.attention import StepAttention
from fastserve_mega.worker.megatron.experts import ExpertMixture, route
from fastserve_mega.worker.megatron.layers import InferenceLayer, ZeroCenteredRMSNorm


class KernelLayer:
    """One layer: what InferenceLayer.forward computes, in fewer operations.

    Args:
        layer: its weights are loaded, its linears and norms are Megatron's own or ours.
        activation: of its feed-forward pass, by name.
    """

    def __init__(self, layer: InferenceLayer, activation: str) -> None:
        attention = layer.self_attention
        self._is_float8 = attention.linear_qkv.is_float8
        self.input_norm = norm_of(layer.input_layernorm, is_scaled=self._is_float8)
        self._feed_forward_norm = norm_of(
            layer.pre_mlp_layernorm, is_scaled=self._is_float8 and layer.mixture is None
        )
        self._post_norms = [
            norm_of(module) if hasattr(module, "weight") else None
            for module in (layer.post_attention_layernorm, layer.post_mlp_layernorm)
        ]
        self._qkv = attention.linear_qkv
        self._qkv_shape = layer.qkv_shape
        self._attention_options = {
            "norm": _head_norm_of(attention) if layer.config.qk_layernorm else None,
            "is_scaled": self._is_float8,
        }
        self._number: int = attention.core_attention.layer
        self._scale: float = attention.core_attention.scale
        self._projection = attention.linear_proj
        self._activation = activation
        self._is_gated = bool(layer.config.gated_linear_unit)
        self._mixture = layer.mixture
        if self._mixture is not None:
            use_kernels(self._mixture, activation)
        self._mlp = layer.mlp

    def __call__(
        self, normed: Rows, residual: Tensor, step: StepAttention, following: Norm | None
    ) -> tuple[Rows, Tensor]:
        """Compute the layer.

        Args:
            normed: [tokens, hidden] what the layer's first norm makes of the residual.
            residual: [tokens, hidden]
            step: the layer's attention.
            following: the norm behind the layer; None: none.

        Returns:
            The residual with the layer's addends, normed by `following` and itself.
        """
        qkv = self._qkv(normed).view(self._qkv_shape)
        heads = step.attend(self._number, qkv, self._scale, **self._attention_options)
        attended = self._projection(heads)
        after_attention, after_feed_forward = self._post_norms
        if after_attention is not None:
            attended = cast(Tensor, norm(attended, after_attention))
        normed, residual = add_and_norm(attended, residual, self._feed_forward_norm)
        fed = self._feed_forward(normed)
        if after_feed_forward is not None:
            fed = cast(Tensor, norm(fed, after_feed_forward))
        if following is None:
            residual = fed.add_(residual)
            return residual, residual
        return add_and_norm(fed, residual, following)

    def _feed_forward(self, x: Rows) -> Tensor:
        if self._mixture is not None:
            return self._mixture(cast(Tensor, x))
        wide = activate(
            self._mlp.linear_fc1(x),
            self._activation,
            gated=self._is_gated,
            is_scaled=self._is_float8,
        )
        fed: Tensor = self._mlp.linear_fc2(wide)
        return fed


def run_kernel_layers(
    layers: Sequence[KernelLayer],
    hidden: Tensor,
    attention: Sequence[StepAttention],
    final: Norm | None,
) -> Tensor:
    """Compute all layers.

    Args:
        layers: of the stage.
        hidden: [tokens, hidden] from the embedding or the stage before.
        attention: of each layer.
        final: the norm before the logits; None on stages before the last.

    Returns:
        [tokens, hidden], normed by `final`.
    """
    normed: Rows = norm(hidden, layers[0].input_norm)
    residual = hidden
    following = [*(layer.input_norm for layer in layers[1:]), final]
    for layer, step, next_norm in zip(layers, attention, following, strict=True):
        normed, residual = layer(normed, residual, step, next_norm)
    return cast(Tensor, normed)


def norm_of(module: Any, *, is_scaled: bool = False) -> Norm:
    """The weights of torch's norms, of Apex's, or of our own."""
    bias = getattr(module, "bias", None)
    return Norm(
        weight=module.weight.detach(),
        bias=None if bias is None else bias.detach(),
        epsilon=module.eps,
        is_centered=bias is not None,
        offset=1.0 if isinstance(module, ZeroCenteredRMSNorm) else 0.0,
        is_scaled=is_scaled,
    )


def _head_norm_of(attention: Any) -> HeadNorm:
    query, key = norm_of(attention.q_layernorm), norm_of(attention.k_layernorm)
    return HeadNorm(query.weight, key.weight, query.epsilon, query.offset)


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
