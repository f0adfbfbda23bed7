"""Weights in the layout that oneDNN computes with, on CPUs that compute in bfloat16.

torch's linear hands oneDNN a plain matrix, which it lays out anew in every call: at one token
that costs as much as the product itself (docs/performance.md). The operators used here are those
that torch's own compiler emits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

_TYPICAL_TOKENS = 16
"""The layout may depend on how many rows are multiplied; steps of this size count most."""


def can_pack(weight: Tensor) -> bool:
    """Whether a weight [outputs, inputs] has a packed form here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch._C._has_mkldnn
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(weight: Tensor) -> Tensor:
    """The packed form, an opaque tensor for `packed_linear`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_TOKENS)
    return cast(Tensor, packed)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """[tokens, inputs] → [tokens, outputs], as torch's linear with the unpacked weight."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


class Packable:
    """A mixin for modules with a `weight`, which `pack_weight` replaces by its packed form."""

    weight: Any
    _packed: Tensor | None = None

    def pack_weight(self) -> None:
        """Pack the weight, and free the plain one; nothing happens where that is not possible."""
        if self._packed is None and can_pack(self.weight):
            self._packed = pack(self.weight)
            self.weight.data = self.weight.new_empty(0)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply x [tokens, inputs] by the weight's transpose and add the bias."""
        if self._packed is None:
            return functional.linear(x, self.weight, bias)
        return packed_linear(x, self._packed, bias)
