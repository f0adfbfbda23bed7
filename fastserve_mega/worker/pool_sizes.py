"""How many KV blocks a rank has memory for."""

from __future__ import annotations

import torch

from fastserve_mega.config import Config, KvCacheConfig
from fastserve_mega.models.architecture import Architecture

_CPU_POOL_GB = 1.0
"""On a CPU the KV shares the memory with everything else, so it takes no share of all there is."""
_HIDDEN_COPIES = 8
"""Activations of a layer that live at once, in hidden sizes: residual, normed, query, key, value,
attention output, and two of the allocator's leftovers."""
_WIDE_COPIES = 3
"""Likewise in intermediate sizes: gate, up, product."""
_LOGIT_BYTES = 4 * 2
"""Logits in float32, and their probabilities."""


def device_blocks(
    config: Config, architecture: Architecture, block_bytes: int, device: torch.device
) -> int:
    """Blocks of the device pool of this rank, the null block included.

    Called when the weights are loaded: what they left is what there is.

    Raises:
        ValueError: there is no memory for two blocks.
    """
    settings = config.kv_cache
    if settings.device_blocks is not None:
        return settings.device_blocks
    if settings.device_memory_gb is None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        activations = activation_bytes(config, architecture)
        memory = free_for_blocks(settings, free, total, activations)
        how = (
            f"kv_cache.device_memory_utilization={settings.device_memory_utilization} leaves "
            f"{memory / 2**30:.2f} GB of {total / 2**30:.2f} beside the weights"
        )
    else:
        memory_gb = settings.device_memory_gb or _CPU_POOL_GB
        memory = int(memory_gb * 2**30)
        how = f"kv_cache.device_memory_gb={memory_gb} is too little"
    if memory < 2 * block_bytes:
        raise ValueError(f"{how}: two blocks need {2 * block_bytes / 2**30:.6f}")
    return memory // block_bytes


def host_blocks(settings: KvCacheConfig, block_bytes: int) -> int:
    """Blocks of the host pool of this rank; none for strategies that do not swap."""
    if not settings.swap.uses_host:
        return 0
    if settings.host_blocks is not None:
        return settings.host_blocks
    return int(settings.host_memory_gb * 2**30) // block_bytes


def free_for_blocks(settings: KvCacheConfig, free: int, total: int, activations: int) -> int:
    """Bytes for KV on a device of `total` bytes of which the weights and others left `free`."""
    kept_free = round((1 - settings.device_memory_utilization) * total)
    return max(free - kept_free - activations, 0)


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
