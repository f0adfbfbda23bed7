"""The native step with Megatron's weights: laid out once, and freed where Megatron had them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.partition import Partition
from fastserve_mega.worker.kv_cache import KvCache
from fastserve_mega.worker.megatron.engine import Receive, TakeRows, ignore
from fastserve_mega.worker.megatron.model import Stage, limit_logits
from fastserve_mega.worker.megatron.rotation import Rotation
from fastserve_mega.worker.model_runner import Ask, SequenceInput
from fastserve_mega.worker.native.library import (
    InstructionSet,
    Library,
    MatrixName,
    StageConfig,
    VectorName,
)
from fastserve_mega.worker.native.stage import NativeStage, packed_bytes
from fastserve_mega.worker.native.step import StepArrays
from fastserve_mega.worker.step_batch import fresh_blocks

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_MATRICES = {
    MatrixName.QKV: ("self_attention.linear_qkv", VectorName.QKV_BIAS),
    MatrixName.PROJECTION: ("self_attention.linear_proj", VectorName.PROJECTION_BIAS),
    MatrixName.FC1: ("mlp.linear_fc1", VectorName.FC1_BIAS),
    MatrixName.FC2: ("mlp.linear_fc2", VectorName.FC2_BIAS),
}
_NORMS = {
    VectorName.INPUT_NORM: "input_layernorm",
    VectorName.FEED_FORWARD_NORM: "pre_mlp_layernorm",
    VectorName.POST_ATTENTION_NORM: "post_attention_layernorm",
    VectorName.POST_FEED_FORWARD_NORM: "post_mlp_layernorm",
    VectorName.QUERY_NORM: "self_attention.q_layernorm",
    VectorName.KEY_NORM: "self_attention.k_layernorm",
}
_EMBEDDING = "embedding.word_embeddings.weight"
_POSITIONS = "embedding.position_embeddings.weight"
_OUTPUT = "output_layer.weight"


class NativeEngine:
    """Computes a step in one call.

    What it lays out anew is taken from the model, so that nothing is held twice. A tied embedding
    is read from the output matrix.

    Args:
        library: loaded.
        stage: its weights are loaded; it cannot compute afterwards.
        architecture: of the model, one that the library can compute.
        partition: of this rank.
        cache: its pool.
        has_byte_weights: the matrices are laid out in 8 bits.
        instruction_set: None takes the best that the machine has.
    """

    hidden_dtype = torch.float32

    def __init__(
        self,
        library: Library,
        stage: Stage,
        architecture: Architecture,
        partition: Partition,
        cache: KvCache,
        *,
        has_byte_weights: bool = False,
        instruction_set: InstructionSet | None = None,
    ) -> None:
        if instruction_set is None:
            instruction_set = library.best_instruction_set
        self.title = instruction_set.title
        self.threads = torch.get_num_threads()
        self._architecture = architecture
        self._partition = partition
        self._tensor_group = stage.groups.tensor
        self._cache = cache
        parameters = stage.parameters()
        kinds = [architecture.attention_kind(layer) for layer in partition.layers]
        ropes = list(dict.fromkeys(kind.rope for kind in kinds if kind.rope is not None))
        config = _config(architecture, partition, cache)
        config.instruction_set, config.threads = instruction_set, self.threads
        config.ropes = len(ropes)
        config.has_byte_weights = has_byte_weights
        config.weight_bytes = _weight_bytes(parameters, has_byte_weights)
        self._native = NativeStage(library, config, stage.groups.tensor)
        for number, rope in enumerate(ropes):
            rotation = Rotation(rope, architecture.head_dim, cache.pool.device)
            self._native.set_rope(number, rotation.frequencies, rotation.factor)
        for layer, kind in enumerate(kinds):
            rope_number = None if kind.rope is None else ropes.index(kind.rope)
            self._native.set_attention(layer, rope_number, kind.window)
            self._set_layer(layer, parameters)
        self._set_ends(len(kinds), parameters)

    def run(
        self,
        batch: Sequence[SequenceInput],
        receive: Receive,
        score: TakeRows = ignore,
        embed: TakeRows = ignore,
        drawn: TakeRows = ignore,
    ) -> Tensor:
        step = self._lay_out(batch)
        normed = None
        if self._partition.is_last_stage and any(each.embeds for each in batch):
            normed = torch.empty((step.samples, self._architecture.hidden_size))
        result = self._native.run(step, receive(), normed)
        if not self._partition.is_last_stage:
            return result
        if normed is not None:
            embed(normed[step.scored :])
        logits = limit_logits(self._whole_logits(result), self._architecture)
        if step.scored:
            score(logits[: step.scored])
        return logits[step.scored :]

    def run_ahead(self, batch: Sequence[SequenceInput], ask: Ask) -> Tensor | None:
        """Run a step of decodes as the only rank; None when `ask` ended it."""
        logits = self._native.run_ahead(self._lay_out(batch), ask)
        return None if logits is None else limit_logits(logits, self._architecture)

    def _lay_out(self, batch: Sequence[SequenceInput]) -> StepArrays:
        """A step's numbers, for blocks that hold nothing of their last owners."""
        step = StepArrays(
            batch,
            block_size=self._cache.block_size,
            vocab_size=self._architecture.vocab_size,
            num_blocks=self._cache.num_blocks,
        )
        if fresh := fresh_blocks(batch, self._cache.block_size):
            self._cache.clear(torch.tensor(fresh))
        return step

    def close(self) -> None:
        self._native.close()

    def _whole_logits(self, own: Tensor) -> Tensor:
        """[samples, this rank's part of the vocabulary] → [samples, vocabulary]."""
        if self._partition.tensor_size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self._partition.tensor_size)]
        if own.shape[0]:
            dist.all_gather(parts, own, group=self._tensor_group)
        return torch.cat(parts, dim=-1)[:, : self._architecture.vocab_size].contiguous()

    def _set_layer(self, layer: int, parameters: Mapping[str, nn.Parameter]) -> None:
        prefix = f"decoder.layers.{layer}."
        for name, (module, bias_name) in _MATRICES.items():
            self._move_matrix(layer, name, parameters[f"{prefix}{module}.weight"])
            bias = parameters.get(f"{prefix}{module}.bias")
            if bias is not None:
                self._native.set_vector(layer, bias_name, bias)
        for norm, module in _NORMS.items():
            self._set_norm(layer, norm, prefix + module, parameters)

    def _set_ends(self, layers: int, parameters: Mapping[str, nn.Parameter]) -> None:
        embedding = parameters.get(_EMBEDDING)
        self._set_norm(layers, VectorName.FINAL_NORM, "decoder.final_layernorm", parameters)
        output = parameters.get(_OUTPUT)
        is_tied = output is None and "decoder.final_layernorm.weight" in parameters
        if is_tied:
            output, embedding = embedding, None
        # Before the matrix is moved: a tied embedding is not a table any more.
        self._native.set_tables(embedding, parameters.get(_POSITIONS))
        if output is not None:
            rows = _vocabulary(self._architecture, self._partition)
            self._move_matrix(layers, MatrixName.OUTPUT, output, rows)

    def _move_matrix(
        self, layer: int, name: MatrixName, weight: nn.Parameter, rows: int | None = None
    ) -> None:
        self._native.set_matrix(layer, name, weight[:rows])
        weight.data = weight.new_empty(0)

    def _set_norm(
        self, layer: int, name: VectorName, module: str, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        weight = parameters.get(f"{module}.weight")
        if weight is None:
            return
        wide = weight.detach().float()
        if self._architecture.zero_centered_norm:
            wide = wide + 1.0
        self._native.set_norm(layer, name, wide, parameters.get(f"{module}.bias"))


def _config(architecture: Architecture, partition: Partition, cache: KvCache) -> StageConfig:
    dtype = cache.pool.dtype
    scale = architecture.attention_scale
    return StageConfig(
        dtype=int(dtype == torch.bfloat16),
        layers=len(partition.layers),
        hidden=architecture.hidden_size,
        feed_forward=len(partition.ffn_columns),
        kv_heads=len(partition.kv_heads),
        group=len(partition.query_heads) // len(partition.kv_heads),
        head_dim=architecture.head_dim,
        block_size=cache.block_size,
        vocabulary=_vocabulary(architecture, partition),
        ranks=partition.tensor_size,
        first_token=partition.vocab_rows.start,
        norm=int(architecture.norm == "layer"),
        activation=_ACTIVATIONS[architecture.activation],
        gated=int(architecture.gated),
        norms_whole_projection=int(architecture.qk_norm == "projection"),
        first=int(partition.is_first_stage),
        last=int(partition.is_last_stage),
        norm_epsilon=architecture.norm_epsilon,
        attention_scale=1.0 / math.sqrt(architecture.head_dim) if scale is None else scale,
        attention_softcap=architecture.attention_softcap or 0.0,
        residual_scale=architecture.residual_scale,
        embedding_scale=torch.tensor(architecture.embedding_scale, dtype=dtype).item(),
        pool=cache.pool.data_ptr(),
    )


def _vocabulary(architecture: Architecture, partition: Partition) -> int:
    """Tokens whose logits this rank computes; with others, they have equal parts of them."""
    ranks = partition.tensor_size
    return architecture.vocab_size if ranks == 1 else len(partition.vocab_rows)


def _weight_bytes(parameters: Mapping[str, nn.Parameter], has_byte_weights: bool) -> int:
    """Room for all of them once they are laid out; memory that is not used is not taken."""
    needed = 0
    for parameter in parameters.values():
        rows, columns = (*parameter.shape, 1)[:2]
        is_vector = parameter.dim() == 1
        itemsize = torch.float32.itemsize if is_vector else parameter.itemsize
        needed += packed_bytes(
            rows, columns, itemsize, has_byte_weights=has_byte_weights and not is_vector
        )
    return needed
