from __future__ import annotations

from torch.nn import functional

calls: list[tuple[int, ...]] = []
"""Shapes of the inputs so far."""


class FusedLayerNormAffineFunction:
    # Megatron looks at the names of these arguments.
    @staticmethod
    def forward(ctx, input, weight, bias, normalized_shape, eps, memory_efficient):  # noqa: PLR0917
        raise NotImplementedError

    @staticmethod
    def apply(x, weight, bias, normalized_shape, eps, memory_efficient):  # noqa: PLR0917
        calls.append(tuple(x.shape))
        return functional.layer_norm(x, normalized_shape, weight, bias, eps)
