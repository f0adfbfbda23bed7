"""How many KV blocks the device of a rank has memory for, once the weights are loaded."""

from __future__ import annotations

import torch

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.config import Config
from fastserve_mega.system.sizes import CPU_POOL_GB, activation_bytes, free_for_blocks


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
        memory_gb = settings.device_memory_gb or CPU_POOL_GB
        memory = int(memory_gb * 2**30)
        how = f"kv_cache.device_memory_gb={memory_gb} is too little"
    if memory < 2 * block_bytes:
        raise ValueError(f"{how}: two blocks need {2 * block_bytes / 2**30:.6f}")
    return memory // block_bytes
