"""One pipeline stage as a Megatron model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from fastserve_mega.models.architecture import Architecture, LearnedPositions
from fastserve_mega.system.partition import Partition
from fastserve_mega.worker.megatron.attention import StepAttention
from fastserve_mega.worker.megatron.experts import ExpertMixture
from fastserve_mega.worker.megatron.initialize import ProcessGroups
from fastserve_mega.worker.megatron.layer_spec import LayerChoice, block_spec
from fastserve_mega.worker.megatron.layers import ACTIVATIONS, InferenceLayer
from fastserve_mega.worker.megatron.packing import Packable, can_pack, pack, packed_linear


class Stage:
    """The layers of one rank, with the embedding on the first stage and the logits on the last."""

    def __init__(
        self,
        model: GPTModel,
        groups: ProcessGroups,
        partition: Partition,
        architecture: Architecture,
    ) -> None:
        self.model = model
        self.groups = groups
        self._partition = partition
        # In the precision of the weights, as the models were trained.
        dtype = next(model.parameters()).dtype
        scale = torch.tensor(architecture.embedding_scale, dtype=dtype, device="cpu")
        self._embedding_scale = float(scale.item())
        self._architecture = architecture
        self.layers: list[InferenceLayer] = list(model.decoder.layers)
        self._packed_output: Tensor | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters, by the names of Megatron's own layers.

        Transformer Engine's linears hold the norm before them.
        """
        renamed = {
            "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
            "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
        }

        def separate(name: str) -> str:
            for fused, alone in renamed.items():
                name = name.replace(fused, alone)
            return name

        return {separate(name): value for name, value in self.model.named_parameters()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters of this rank."""
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
        hidden = cast(Tensor, embedded).reshape(token_ids.shape[0], -1).contiguous()
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        return hidden

    def run_layers(self, hidden: Tensor, attention: Sequence[StepAttention]) -> Tensor:
        """[tokens, hidden] → [tokens, hidden], with what each layer needs to know of the step."""
        for layer, step in zip(self.layers, attention, strict=True):
            hidden = layer(hidden, step)
        return hidden

    def norm(self, hidden: Tensor) -> Tensor:
        """[samples, hidden] → [samples, hidden], by the norm before the logits."""
        return cast(Tensor, self.model.decoder.final_layernorm(hidden))

    def logits(self, normed: Tensor) -> Tensor:
        """[samples, hidden] → [samples, vocabulary], on all ranks of the last stage."""
        local = self._multiply_output(normed)
        logits = local
        if self._partition.tensor_size > 1:
            parts = [torch.empty_like(local) for _ in range(self._partition.tensor_size)]
            dist.all_gather(parts, local, group=self.groups.tensor)
            logits = torch.cat(parts, dim=-1)
        return limit_logits(logits[:, : self._architecture.vocab_size], self._architecture)

    def _multiply_output(self, hidden: Tensor) -> Tensor:
        if self._packed_output is None:
            return functional.linear(hidden, self._output_weight())
        return packed_linear(hidden, self._packed_output, None)

    def _output_weight(self) -> Tensor:
        own = self.model.output_layer.weight
        weight = self.model.embedding.word_embeddings.weight if own is None else own
        return cast(Tensor, weight)


def limit_logits(logits: Tensor, architecture: Architecture) -> Tensor:
    """Scale what the output layer gives, and squeeze it into (-softcap, softcap)."""
    if architecture.logit_scale != 1.0:
        logits = logits * architecture.logit_scale
    limit = architecture.logit_softcap
    return logits if limit is None else logits.div(limit).tanh_().mul_(limit)


def build_stage(
    architecture: Architecture,
    partition: Partition,
    groups: ProcessGroups,
    choice: LayerChoice,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Stage:
    """Build the stage with uninitialized weights.

    The only place that knows which Megatron class is the model: GPTModel is deprecated from
    Megatron-Core 0.19 on.
    """
    learned = isinstance(architecture.positions, LearnedPositions)
    # Parameters are allocated where they are used, or nowhere until they have 8 bits.
    place = torch.device("meta") if choice.float8 else device
    # Megatron warns of its own deprecated defaults.
    with place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPTModel(
            config=_transformer_config(architecture, partition, choice, dtype),
            transformer_layer_spec=block_spec(architecture, partition, choice),
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
    if choice.float8:
        for module in model.modules():
            if isinstance(module, Packable):
                module.use_float8()
        model = model.to_empty(device=device)
    if architecture.experts is not None:
        activation = ACTIVATIONS[architecture.activation]
        for layer in model.decoder.layers:
            if layer.is_moe_layer:
                mixture = ExpertMixture(layer.mlp, architecture.experts, activation, groups.tensor)
                layer.use_experts(mixture)
    return Stage(model, groups, partition, architecture)


def _transformer_config(
    architecture: Architecture, partition: Partition, choice: LayerChoice, dtype: torch.dtype
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
        softmax_scale=architecture.attention_scale,
        layernorm_zero_centered_gamma=architecture.zero_centered_norm,
        activation_func=ACTIVATIONS[architecture.activation],
        gated_linear_unit=architecture.gated,
        add_bias_linear=architecture.linear_bias,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm is not None,
        tensor_model_parallel_size=partition.tensor_size,
        **_expert_settings(architecture, partition),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # Transformer Engine would draw random weights on the CPU first.
        use_cpu_initialization=choice.linears == "local",
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


def _expert_settings(architecture: Architecture, partition: Partition) -> dict[str, Any]:
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.chosen,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_ffn_hidden_size is not None,
        "expert_model_parallel_size": partition.expert_size,
        "expert_tensor_parallel_size": partition.tensor_size // partition.expert_size,
    }
