from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from transformer_engine.pytorch import distributed, fp8

__all__ = [
    "DotProductAttention",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
]


class DotProductAttention(nn.Module):
    """The project has its own; Megatron's wrapper only inherits from this."""


class _Norm(nn.Module):
    has_bias = False

    def __init__(
        self, normalized_shape=None, eps=1e-5, *, hidden_size=None, zero_centered_gamma=False,
        params_dtype=None, **unused,
    ):  # fmt: skip
        super().__init__()
        size = normalized_shape or hidden_size  # the second is the older name
        self.weight = nn.Parameter(torch.empty(size, dtype=params_dtype))
        self.bias = nn.Parameter(torch.empty(size, dtype=params_dtype)) if self.has_bias else None
        self.eps, self.zero_centered = eps, zero_centered_gamma

    def forward(self, x):
        assert x.is_contiguous()
        return _norm(x, self.weight, self.bias, self.eps, self.zero_centered)


class RMSNorm(_Norm):
    pass


class LayerNorm(_Norm):
    has_bias = True


def _norm(x, weight, bias, eps, zero_centered):
    weight = weight + 1 if zero_centered else weight
    if bias is None:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


class Linear(nn.Module):
    """With `return_bias`, the bias is returned instead of added."""

    def __init__(
        self, in_features, out_features, *, bias, return_bias, parallel_mode, tp_size, params_dtype,
        **unused,
    ):  # fmt: skip
        super().__init__()
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype)) if bias else None
        self.return_bias = return_bias

    def forward(self, x, is_first_microbatch=None):
        if self.return_bias:
            return functional.linear(x, self.weight), self.bias
        return functional.linear(x, self.weight, self.bias)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, eps, normalization, zero_centered_gamma,
                 params_dtype, **options):  # fmt: skip
        super().__init__(in_features, out_features, params_dtype=params_dtype, **options)
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features, dtype=params_dtype))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.empty(in_features, dtype=params_dtype))
        self.eps, self.zero_centered = eps, zero_centered_gamma

    def forward(self, x, is_first_microbatch=None):
        norm = _norm(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered)
        return super().forward(norm)
