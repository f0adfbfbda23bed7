"""Weights of linears, in the form in which they are multiplied.

That is 8 bits where it is configured (`worker.float8`), and on CPUs that compute in bfloat16 the
layout that oneDNN computes with. torch's linear hands oneDNN a plain matrix, which it lays out anew
in every call: at one token that costs as much as the product itself (docs/performance.md). The
operators used for it are those that torch's own compiler emits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastserve_mega.worker.float8 import Float8Rows, multiply

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
    """A mixin for linears of Megatron's: how their `weight` is kept and multiplied."""

    weight: Any
    weight_scale: Any
    """[outputs] of a weight in 8 bits."""
    _packed: Tensor | None = None

    @property
    def is_float8(self) -> bool:
        """Whether the weight has 8 bits."""
        return bool(self.weight.dtype == torch.float8_e4m3fn)

    def use_float8(self) -> None:
        """Have a weight in 8 bits, with nothing in it yet."""
        shape, device = self.weight.shape, self.weight.device
        values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(shape[0], dtype=torch.float32, device=device)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)

    def pack_weight(self) -> None:
        """Pack the weight, and free the plain one; nothing happens where that is not possible."""
        if self._packed is None and can_pack(self.weight):
            self._packed = pack(self.weight)
            self.weight.data = self.weight.new_empty(0)

    def multiply(self, x: Tensor | Float8Rows, bias: Tensor | None) -> Tensor:
        """Multiply x [tokens, inputs] by the weight's transpose and add the bias."""
        if self.is_float8:
            return multiply(x, self.weight, self.weight_scale, bias)
        assert isinstance(x, Tensor)
        if self._packed is None:
            return functional.linear(x, self.weight, bias)
        return packed_linear(x, self._packed, bias)
