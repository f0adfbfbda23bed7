"""Megatron's transformer layer and parallel linears, with a straight line for inference.

Construction, weights and names are Megatron's; only `forward` is replaced. Megatron's own serves
training, recomputation, offloading and CUDA graphs too, and spends on a CPU as much time on that
as on the arithmetic of a decoding step. Activations are [tokens, hidden], without Megatron's
batch dimension, which would be 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional

from fastserve_mega.worker.float8 import Float8Rows
from fastserve_mega.worker.megatron.attention import StepAttention
from fastserve_mega.worker.megatron.experts import ExpertMixture
from fastserve_mega.worker.megatron.packing import Packable


class ColumnLinear(Packable, ColumnParallelLinear):  # type: ignore[misc] # megatron is untyped
    """A linear whose output columns are divided among the tensor-parallel ranks."""

    def forward(self, x: Tensor | Float8Rows) -> Tensor:
        """[tokens, input] → [tokens, this rank's output columns]."""
        return self.multiply(x, self.bias)


class RowLinear(Packable, RowParallelLinear):  # type: ignore[misc] # megatron is untyped
    """A linear whose input columns are divided; the ranks' partial results are summed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._summed_over_ranks = dist.get_world_size(self.tp_group) > 1

    def forward(self, x: Tensor | Float8Rows) -> Tensor:
        """[tokens, this rank's input columns] → [tokens, output], the same on all ranks."""
        if not self._summed_over_ranks:
            return self.multiply(x, self.bias)
        y = self.multiply(x, None)
        dist.all_reduce(y, group=self.tp_group)
        return y if self.bias is None else y + self.bias


class InferenceLayer(TransformerLayer):  # type: ignore[misc] # megatron is untyped
    """Pre-norm attention and feed-forward, each added to the residual.

    Args:
        *args: Megatron's.
        post_norm: class of the norms of what is added, for models that have them.
        residual_scale: of what is added.
        **kwargs: Megatron's.
    """

    def __init__(
        self,
        *args: Any,
        post_norm: Any = nn.Identity,
        residual_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._residual_scale = residual_scale
        sizes = {"hidden_size": self.config.hidden_size, "eps": self.config.layernorm_epsilon}
        self.post_attention_layernorm = post_norm(config=self.config, **sizes)
        self.post_mlp_layernorm = post_norm(config=self.config, **sizes)
        attention = self.self_attention
        group_size = attention.core_attention.group_size
        kv_heads = attention.num_query_groups_per_partition
        self.qkv_shape = (-1, kv_heads, group_size + 2, attention.key_hidden_size)
        self._has_qk_norm = bool(self.config.qk_layernorm)
        self._activation = self.config.activation_func
        self._gated = bool(self.config.gated_linear_unit)
        self.mixture: ExpertMixture | None = None

    def use_experts(self, mixture: ExpertMixture) -> None:
        """Compute the feed-forward pass with experts."""
        self.mixture = mixture

    def forward(self, hidden: Tensor, step: StepAttention) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        attended = self._attend(self.input_layernorm(hidden), step)
        hidden = self._add(hidden, self.post_attention_layernorm(attended))
        fed = self._feed_forward(self.pre_mlp_layernorm(hidden))
        return self._add(hidden, self.post_mlp_layernorm(fed))

    def _add(self, hidden: Tensor, added: Tensor) -> Tensor:
        """Add to the residual; `added` is changed."""
        if self._residual_scale != 1.0:
            added = added.mul_(self._residual_scale)
        return added.add_(hidden)

    def _attend(self, x: Tensor, step: StepAttention) -> Tensor:
        attention = self.self_attention
        # Per key-value head: its query heads, the key, the value.
        qkv = _output(attention.linear_qkv(x)).view(self.qkv_shape)
        if self._has_qk_norm:
            group_size = attention.core_attention.group_size
            for norm, heads in (
                (attention.q_layernorm, qkv[:, :, :group_size]),
                (attention.k_layernorm, qkv[:, :, group_size : group_size + 1]),
            ):
                ranks = [attention.pg_collection.tp] if isinstance(norm, ProjectionNorm) else []
                heads.copy_(norm(heads, *ranks))
        return _output(attention.linear_proj(attention.core_attention(qkv, step)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.mixture is not None:
            return self.mixture(x)
        y = _output(self.mlp.linear_fc1(x))
        if self._gated:
            gate, up = y.chunk(2, dim=-1)
            y = self._activation(gate).mul_(up)
        else:
            y = self._activation(y)
        return _output(self.mlp.linear_fc2(y))


def _output(y: Any) -> Tensor:
    """Transformer Engine's linears return their output and, apart from it, a bias or None."""
    if isinstance(y, tuple):
        y, bias = y
        y = y if bias is None else y + bias
    return cast(Tensor, y)


class ProjectionNorm(nn.Module):
    """RMSNorm over the queries, or keys, of all heads together, of which a rank has some.

    Args:
        config: Megatron's TransformerConfig.
        hidden_size: of a head.
        eps: added to the mean square.
        num_heads: of the whole model; all ranks have all of the weight.
        own_heads: of this rank.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float, *, num_heads: int, own_heads: range
    ) -> None:
        super().__init__()
        del config
        self.weight = nn.Parameter(torch.empty(num_heads * hidden_size))
        self.eps = eps
        self._own = slice(own_heads.start * hidden_size, own_heads.stop * hidden_size)

    def forward(self, heads: Tensor, group: dist.ProcessGroup) -> Tensor:
        """[tokens, kv_heads, n, head_dim] → the same; all ranks of `group` have as many heads."""
        wide = heads.float()
        squares = wide.square().mean(dim=(1, 2, 3), keepdim=True)
        if (ranks := dist.get_world_size(group)) > 1:
            # Where ranks hold copies of a key, all keys have as many.
            dist.all_reduce(squares, group=group)
            squares /= ranks
        normed = wide * torch.rsqrt(squares + self.eps)
        return (normed * self.weight[self._own].float().view(heads.shape[1:])).to(heads.dtype)


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm whose weight is kept as its difference from 1; the sum is taken in float32.

    Args:
        config: Megatron's TransformerConfig.
        hidden_size: of the last dimension.
        eps: added to the mean square.
        **unused: what Megatron gives its own norms.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        del config, unused
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., hidden]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 has it."""
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": torch.relu,
}
