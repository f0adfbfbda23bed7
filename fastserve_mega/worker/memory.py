"""What a rank takes of the memory of its device and of its host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.config import Config, KvCacheConfig
from fastserve_mega.system.sizes import CPU_POOL_GB, activation_bytes, free_for_blocks, host_blocks
from fastserve_mega.worker.transfer import wait_for

_log = logging.getLogger(__name__)


def is_sized_by_memory(settings: KvCacheConfig, device: torch.device) -> bool:
    """Whether the device pool takes what the rest leaves."""
    is_given = settings.device_blocks is not None or settings.device_memory_gb is not None
    return device.type == "cuda" and not is_given


def measure_activations(device: torch.device, run: Callable[[], None]) -> int:
    """Bytes that a computation takes of a CUDA device besides what it leaves there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    run()
    wait_for(device)
    taken = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    return taken


def device_blocks(
    config: Config,
    architecture: Architecture,
    block_bytes: int,
    device: torch.device,
    activations: int | None = None,
) -> int:
    """Blocks of the device pool of this rank, the null block included.

    Called when the weights are loaded: what they left is what there is.

    Args:
        config: the deployment.
        architecture: of the model.
        block_bytes: memory of a block.
        device: of the pool.
        activations: bytes that the largest step was measured to take; None: estimated.

    Raises:
        ValueError: there is no memory for two blocks.
    """
    settings = config.kv_cache
    if settings.device_blocks is not None:
        return settings.device_blocks
    if is_sized_by_memory(settings, device):
        free, total = torch.cuda.mem_get_info(device)
        if activations is None:
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


def host_memory_needs(
    config: Config,
    architecture: Architecture,
    block_bytes: int,
    device: torch.device,
    weight_bytes: int,
) -> dict[str, int]:
    """Bytes that a rank will take of its host's memory, by purpose.

    Called when the weights are allocated, which takes no memory until they are loaded.
    """
    needs = {}
    if device.type == "cpu":
        needs["weights"] = weight_bytes
        blocks = device_blocks(config, architecture, block_bytes, device)
        needs["KV (kv_cache.device_blocks or device_memory_gb)"] = blocks * block_bytes
    in_host = host_blocks(config.kv_cache, block_bytes) * block_bytes
    needs["swapped KV (kv_cache.host_blocks or host_memory_gb)"] = in_host
    return needs


def check_host_memory(
    needs: Mapping[str, int], ranks: int, available: int | None, *, is_final: bool = True
) -> None:
    """Refuse to allocate what the host does not have.

    Args:
        needs: bytes of one rank by what they are for.
        ranks: of this host, which need as much each.
        available: when none of them had allocated anything; None: not known.
        is_final: False warns only, for memory that is page-locked as it is allocated: the system
            knows better, since a virtual machine may get more while it takes it.

    Raises:
        ValueError: it is too little.
    """
    total = ranks * sum(needs.values())
    if available is None or total <= available:
        return
    parts = ", ".join(f"{size / 2**30:.2f} for {what}" for what, size in needs.items() if size)
    each = "the rank" if ranks == 1 else f"each of its {ranks} ranks"
    message = (
        f"the host has {available / 2**30:.2f} GB of memory left, but {total / 2**30:.2f} GB are "
        f"needed: {each} takes {parts}"
    )
    if is_final:
        raise ValueError(message)
    _log.warning("%s", message)
