"""One pipeline stage as a Megatron model."""

from __future__ import annotations

import functools
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional

from fastserve_mega.models.architecture import Architecture, LearnedPositions
from fastserve_mega.worker.megatron.attention import PagedAttention, StepAttention
from fastserve_mega.worker.megatron.initialize import ProcessGroups
from fastserve_mega.worker.megatron.layers import (
    ACTIVATIONS,
    ColumnLinear,
    InferenceLayer,
    RowLinear,
)
from fastserve_mega.worker.megatron.packing import Packable, can_pack, pack, packed_linear
from fastserve_mega.worker.partition import Partition


class Stage:
    """The layers of one rank, with the embedding on the first stage and the logits on the last."""

    def __init__(
        self, model: GPTModel, groups: ProcessGroups, partition: Partition, vocab_size: int
    ) -> None:
        self.model = model
        self.groups = groups
        self._partition = partition
        self._vocab_size = vocab_size
        self._layers: list[InferenceLayer] = list(model.decoder.layers)
        self._packed_output: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of all parameters of this rank."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def pack_weights(self) -> None:
        """Lay the weights out for this machine, once they are loaded."""
        for module in self.model.modules():
            if isinstance(module, Packable):
                module.pack_weight()
        if self._partition.is_last_stage and can_pack(weight := self._output_weight()):
            self._packed_output = pack(weight)
            own = self.model.output_layer.weight
            if own is not None:  # else it is the embedding's, which stays
                own.data = own.new_empty(0)

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[tokens] → [tokens, hidden]; on the first stage."""
        embedded = self.model.embedding(input_ids=token_ids[None], position_ids=positions[None])
        # Megatron's batch dimension leaves an odd stride behind that slows down the first linear.
        return cast(Tensor, embedded).reshape(token_ids.shape[0], -1).contiguous()

    def run_layers(self, hidden: Tensor, step: StepAttention) -> Tensor:
        """[tokens, hidden] → [tokens, hidden]."""
        for layer in self._layers:
            hidden = layer(hidden, step)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[samples, hidden] → [samples, vocabulary], on all ranks of the last stage."""
        local = self._multiply_output(self.model.decoder.final_layernorm(hidden))
        parts = [local]
        if self._partition.tensor_size > 1:
            parts = [torch.empty_like(local) for _ in range(self._partition.tensor_size)]
            dist.all_gather(parts, local, group=self.groups.tensor)
        return torch.cat(parts, dim=-1)[:, : self._vocab_size]

    def _multiply_output(self, hidden: Tensor) -> Tensor:
        if self._packed_output is None:
            return functional.linear(hidden, self._output_weight())
        return packed_linear(hidden, self._packed_output, None)

    def _output_weight(self) -> Tensor:
        own = self.model.output_layer.weight
        weight = self.model.embedding.word_embeddings.weight if own is None else own
        return cast(Tensor, weight)


def build_stage(
    architecture: Architecture,
    partition: Partition,
    groups: ProcessGroups,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Stage:
    """Build the stage with uninitialized weights.

    The only place that knows which Megatron class is the model: GPTModel is deprecated from
    Megatron-Core 0.19 on.
    """
    learned = isinstance(architecture.positions, LearnedPositions)
    # Parameters are allocated where they are used. Megatron warns of its own deprecated defaults.
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPTModel(
            config=_transformer_config(architecture, partition, dtype),
            transformer_layer_spec=_layer_spec(architecture),
            vocab_size=partition.padded_vocab_size,
            max_sequence_length=architecture.max_context,
            pre_process=partition.is_first_stage,
            post_process=partition.is_last_stage,
            parallel_output=True,
            # A last stage of its own has no embedding to share and holds a copy.
            share_embeddings_and_output_weights=architecture.tied_embeddings
            and partition.num_stages == 1,
            # Rotation is the attention's business.
            position_embedding_type="learned_absolute" if learned else "none",
            pg_collection=groups.megatron,
        )
    # torch's norms and the position table do not follow params_dtype.
    model = model.requires_grad_(False).to(dtype).eval()
    return Stage(model, groups, partition, architecture.vocab_size)


def _transformer_config(
    architecture: Architecture, partition: Partition, dtype: torch.dtype
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=len(partition.layers),
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        # With fewer key-value heads than ranks, ranks hold copies (Partition.kv_heads).
        num_query_groups=max(architecture.num_kv_heads, partition.tensor_size),
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_hidden_size,
        normalization="RMSNorm" if architecture.norm == "rms" else "LayerNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        activation_func=ACTIVATIONS[architecture.activation],
        gated_linear_unit=architecture.gated,
        add_bias_linear=architecture.linear_bias,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        tensor_model_parallel_size=partition.tensor_size,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=True,
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _layer_spec(architecture: Architecture) -> Any:
    """Megatron's specification of a layer, with our forward passes and our attention."""
    spec = get_gpt_layer_local_spec(
        qk_layernorm=architecture.qk_norm,
        normalization="RMSNorm" if architecture.norm == "rms" else "LayerNorm",
    )
    spec.module = InferenceLayer
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PagedAttention
    attention.linear_qkv = ColumnLinear
    attention.linear_proj = RowLinear
    mlp = spec.submodules.mlp
    # A functools.partial from Megatron-Core 0.19 on, a ModuleSpec before.
    parts = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    parts.linear_fc1 = ColumnLinear
    parts.linear_fc2 = RowLinear
    return spec
