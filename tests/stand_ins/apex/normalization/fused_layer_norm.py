from __future__ import annotations

from torch.nn import functional

calls = 0


class FusedLayerNormAffineFunction:
    @staticmethod
    def forward(ctx, input, weight, bias, normalized_shape, eps, memory_efficient=False):
        """Megatron looks at the names of these arguments."""

    @staticmethod
    def apply(input, weight, bias, normalized_shape, eps, memory_efficient=False):
        global calls
        calls += 1
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
