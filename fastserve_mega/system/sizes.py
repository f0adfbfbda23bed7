"""How much memory a rank's share of a model takes. No torch here: nothing needs to be loaded."""

from __future__ import annotations

from collections.abc import Iterator

from fastserve_mega.models.architecture import Architecture, LearnedPositions
from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig
from fastserve_mega.system.hardware import GIB
from fastserve_mega.system.partition import Partition

VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
"""Bytes of a parameter and a KV element by `model.dtype`; auto is taken for half precision."""
CPU_POOL_GB = 1.0
"""GiB of a rank's KV pool on a CPU, where it shares the memory with everything else."""
_WEIGHT_SCALE_BYTES = 4
"""What the scale takes that an output of a quantized weight has."""
_BYTE_WEIGHT_BYTES = 1 + 4 / 64
"""What an int8 weight takes, of which 64 share a scale."""
_KV_SCALE_BYTES = 2
"""What the scale takes that a head's quantized key or value of a token has."""
_HIDDEN_COPIES = 8
"""Activations of a layer that live at once, in hidden sizes: residual, normed, query, key, value,
attention output, and two of the allocator's leftovers."""
_WIDE_COPIES = 3
"""Activations of a feed-forward layer that live at once, in its sizes: gate, up, product."""
_LOGIT_BYTES = 4 * 2
"""Logits in float32, and their probabilities."""


def parameter_count(architecture: Architecture, partition: Partition) -> int:
    """Parameters that a rank holds, as Megatron lays them out."""
    hidden = architecture.hidden_size
    vocabulary = len(partition.vocab_rows) * hidden
    count = sum(
        _small_parameters(architecture, partition, layer)
        + sum(outputs * inputs for outputs, inputs in _linears(architecture, partition, layer))
        for layer in partition.layers
    )
    if partition.is_first_stage:
        count += vocabulary
        if isinstance(architecture.positions, LearnedPositions):
            count += architecture.max_context * hidden
    if partition.is_last_stage:
        count += _norm_parameters(architecture)
        # A last stage of its own has no embedding to share, and holds a copy.
        if not (architecture.tied_embeddings and partition.is_first_stage):
            count += vocabulary
    return count


def weight_bytes(architecture: Architecture, partition: Partition, model: ModelConfig) -> int:
    """Memory of a rank's parameters, in the precision that is configured."""
    value_bytes = VALUE_BYTES[model.dtype]
    count = parameter_count(architecture, partition)
    total = count * value_bytes
    if model.quantization == "none":
        return total
    if model.quantization == "int8":
        # A table that is not the output matrix as well keeps its precision.
        is_table = partition.is_first_stage and not (
            architecture.tied_embeddings and partition.is_last_stage
        )
        table = len(partition.vocab_rows) * architecture.hidden_size if is_table else 0
        return table * value_bytes + round((count - table) * _BYTE_WEIGHT_BYTES)
    for layer in partition.layers:
        for outputs, inputs in _linears(architecture, partition, layer):
            total += outputs * inputs * (1 - value_bytes) + outputs * _WEIGHT_SCALE_BYTES
    return total


def kv_head_bytes(architecture: Architecture, settings: KvCacheConfig, value_bytes: int) -> int:
    """Memory of one token's key, or value, of one head; `value_bytes` are the model's."""
    if settings.is_quantized:
        return architecture.head_dim + _KV_SCALE_BYTES
    return architecture.head_dim * value_bytes


def block_bytes(
    architecture: Architecture, partition: Partition, settings: KvCacheConfig, value_bytes: int
) -> int:
    """Memory of a rank's share of a KV block.

    Args:
        architecture: of the model.
        partition: the rank's share.
        settings: of the cache.
        value_bytes: of one element of the model's.
    """
    heads = len(partition.layers) * 2 * len(partition.kv_heads)
    return heads * settings.block_size * kv_head_bytes(architecture, settings, value_bytes)


def activation_bytes(config: Config, architecture: Architecture) -> int:
    """Most that the activations of a step take on a rank, estimated from the sizes."""
    tensor = config.parallel.tensor
    per_token = _HIDDEN_COPIES * architecture.hidden_size
    per_token += _WIDE_COPIES * architecture.ffn_hidden_size // tensor
    if (experts := architecture.experts) is not None:
        # A rank may hold all that a token chose: rows in and out, and the widest at a time.
        wide = experts.ffn_hidden_size * config.parallel.expert // tensor
        per_token += experts.chosen * (2 * architecture.hidden_size + _WIDE_COPIES * wide)
    logits = config.scheduler.max_batch_size * architecture.vocab_size * _LOGIT_BYTES
    # Four bytes: norms and softmax compute in float32.
    return 4 * per_token * config.scheduler.max_batch_tokens + logits


def free_for_blocks(settings: KvCacheConfig, free: int, total: int, activations: int) -> int:
    """Bytes for KV on a device of `total` bytes of which the weights and others left `free`."""
    kept_free = round((1 - settings.device_memory_utilization) * total)
    return max(free - kept_free - activations, 0)


def host_blocks(settings: KvCacheConfig, block_bytes: int) -> int:
    """Blocks of the host pool of a rank; none for strategies that do not swap."""
    if not settings.swap.uses_host:
        return 0
    if settings.host_blocks is not None:
        return settings.host_blocks
    return int(settings.host_memory_gb * GIB) // block_bytes


def _linears(
    architecture: Architecture, partition: Partition, layer: int
) -> Iterator[tuple[int, int]]:
    """Outputs and inputs of a rank's linears in a layer, which are what is quantized."""
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    query_size = len(partition.query_heads) * head_dim
    yield query_size + 2 * len(partition.kv_heads) * head_dim, hidden
    yield hidden, query_size
    if architecture.experts is None or not architecture.has_experts(layer):
        wide = len(partition.ffn_columns)
        yield (2 if architecture.gated else 1) * wide, hidden
        yield hidden, wide
        return
    columns = [len(partition.expert_columns)] * len(partition.experts)
    if architecture.experts.shared_ffn_hidden_size is not None:
        columns.append(len(partition.shared_expert_columns))
    for wide in columns:
        yield 2 * wide, hidden
        yield hidden, wide


def _small_parameters(architecture: Architecture, partition: Partition, layer: int) -> int:
    """Parameters of a layer besides its linears: norms, biases and routers."""
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    norms = 2 * architecture.pre_norms + 2 * architecture.post_norms
    count = norms * _norm_parameters(architecture)
    if architecture.qkv_bias or architecture.linear_bias:
        count += (len(partition.query_heads) + 2 * len(partition.kv_heads)) * head_dim
    if architecture.linear_bias:
        count += hidden
    if architecture.qk_norm == "projection":
        count += (architecture.num_heads + architecture.num_kv_heads) * head_dim
    elif architecture.qk_norm:
        count += 2 * head_dim
    experts = architecture.experts
    if experts is not None and architecture.has_experts(layer):
        return count + hidden * (experts.count + (experts.shared_ffn_hidden_size is not None))
    if architecture.linear_bias:
        count += (2 if architecture.gated else 1) * len(partition.ffn_columns) + hidden
    return count


def _norm_parameters(architecture: Architecture) -> int:
    return architecture.hidden_size * (2 if architecture.norm == "layer" else 1)
