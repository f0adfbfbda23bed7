"""What goes where, and whether it fits: arithmetic on sizes, without a device or weights."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.config import Config, ParallelConfig
from fastserve_mega.system.hardware import GIB, HardwareConfig
from fastserve_mega.system.partition import Partition, partition_model
from fastserve_mega.system.sizes import (
    CPU_POOL_GB,
    VALUE_BYTES,
    activation_bytes,
    block_bytes,
    free_for_blocks,
    host_blocks,
    parameter_count,
    weight_bytes,
)

CONTEXT_BYTES = GIB // 2
"""Memory of a CUDA context with its libraries before anything is allocated, about, on an A100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What each rank of a pipeline stage holds. Sizes in bytes, of one rank."""

    stage: int
    ranks: tuple[range, ...]
    """Ranks of this stage, for each replica."""
    layers: range
    query_heads: int
    kv_heads: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    device_blocks: int | None
    """Blocks that its device has room for; None when nothing says what memory it has."""
    host_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """A configuration in numbers. Sizes in bytes."""

    model: str
    architecture: Architecture
    value_bytes: int
    """Bytes of a parameter, and of a KV element, that is not quantized."""
    block_size: int
    parameters: int
    """Parameters of the model, each counted once."""
    weight_bytes: int
    """Weights on all ranks of a replica together, with what several of them hold."""
    kv_bytes_per_token: int
    """KV of a token on all ranks of a replica together."""
    activation_bytes: int
    """Activations of a step on one rank, at most."""
    max_context: int
    stages: tuple[StagePlan, ...]
    replicas: int
    nodes: int
    problems: tuple[str, ...]
    """Why it does not fit, or would be slow; one sentence each."""

    @property
    def rank_kv_bytes_per_token(self) -> int:
        """KV of a token on the rank that holds most of it."""
        return max(stage.kv_bytes_per_token for stage in self.stages)

    @property
    def device_blocks(self) -> int | None:
        """KV blocks of a replica, the null block included: those of its smallest pool."""
        counts = [stage.device_blocks for stage in self.stages]
        return None if None in counts else min(count for count in counts if count is not None)

    @property
    def host_blocks(self) -> int:
        """KV blocks in the host memory of a replica, those of its smallest pool."""
        return min(stage.host_blocks for stage in self.stages)

    def requests_of(self, tokens: int, blocks: int) -> int:
        """How many requests of so many tokens fit into a pool of `blocks`, in one replica."""
        return max(blocks - 1, 0) // -(-tokens // self.block_size)


def plan_deployment(config: Config, architecture: Architecture) -> DeploymentPlan:
    """Compute everything.

    Raises:
        ValueError: the model cannot be split over this mesh, or model.max_context is too much.
    """
    value_bytes = VALUE_BYTES[config.model.dtype]
    parallel = config.parallel
    partitions = [
        partition_model(architecture, parallel, rank, parallel.replica_size)
        for rank in range(parallel.replica_size)
    ]
    activations = activation_bytes(config, architecture)
    stages = tuple(
        _plan_stage(config, architecture, partitions[stage * parallel.tensor], activations)
        for stage in range(parallel.pipeline)
    )
    settings = config.kv_cache
    kv_bytes = sum(
        block_bytes(architecture, partition, settings, value_bytes) for partition in partitions
    )
    max_context = config.model.max_context or architecture.max_context
    return DeploymentPlan(
        model=config.model.name,
        architecture=architecture,
        value_bytes=value_bytes,
        block_size=config.kv_cache.block_size,
        parameters=parameter_count(
            architecture, partition_model(architecture, ParallelConfig(), 0, 1)
        ),
        weight_bytes=sum(weight_bytes(architecture, each, config.model) for each in partitions),
        kv_bytes_per_token=kv_bytes // settings.block_size,
        activation_bytes=activations,
        max_context=max_context,
        stages=stages,
        replicas=parallel.data,
        nodes=-(-parallel.world_size // config.hardware.devices_per_node),
        problems=tuple(_problems(config, stages, activations, max_context)),
    )


def _plan_stage(
    config: Config, architecture: Architecture, partition: Partition, activations: int
) -> StagePlan:
    parallel, settings = config.parallel, config.kv_cache
    value_bytes = VALUE_BYTES[config.model.dtype]
    weights = weight_bytes(architecture, partition, config.model)
    block = block_bytes(architecture, partition, settings, value_bytes)
    first = partition.stage * parallel.tensor
    return StagePlan(
        stage=partition.stage,
        ranks=tuple(
            range(start + first, start + first + parallel.tensor)
            for start in range(0, parallel.world_size, parallel.replica_size)
        ),
        layers=partition.layers,
        query_heads=len(partition.query_heads),
        kv_heads=len(partition.kv_heads),
        parameters=parameter_count(architecture, partition),
        weight_bytes=weights,
        kv_bytes_per_token=block // settings.block_size,
        device_blocks=_device_blocks(config, weights, activations, block),
        host_blocks=host_blocks(settings, block),
    )


def _device_blocks(config: Config, weights: int, activations: int, block: int) -> int | None:
    settings, total = config.kv_cache, config.hardware.device_memory_bytes
    if settings.device_blocks is not None:
        return settings.device_blocks
    if settings.device_memory_gb is not None:
        return int(settings.device_memory_gb * GIB) // block
    if config.parallel.device == "cpu":
        return int(CPU_POOL_GB * GIB) // block
    if total is None:
        return None
    return free_for_blocks(settings, total - weights - CONTEXT_BYTES, total, activations) // block


def _problems(
    config: Config, stages: tuple[StagePlan, ...], activations: int, max_context: int
) -> list[str]:
    problems = []
    hardware, block_size = config.hardware, config.kv_cache.block_size
    memory = hardware.device_memory_bytes
    for stage in stages:
        if memory is None or stage.device_blocks is None:
            continue
        pool = stage.device_blocks * block_size * stage.kv_bytes_per_token
        needed = stage.weight_bytes + CONTEXT_BYTES + activations + pool
        if needed > memory:
            problems.append(
                f"a rank of stage {stage.stage} needs {needed / GIB:.1f} GiB, its device has "
                f"{memory / GIB:g} ({_memory_setting(hardware)})"
            )
        if (stage.device_blocks - 1) * block_size < max_context:
            problems.append(
                f"stage {stage.stage} has room for {max(stage.device_blocks - 1, 0) * block_size} "
                f"tokens of KV, so no request can have the {max_context} of the context"
            )
    if hardware.host_memory_gb is not None:
        on_node = min(hardware.devices_per_node, config.parallel.world_size)
        pools = on_node * max(
            stage.host_blocks * block_size * stage.kv_bytes_per_token for stage in stages
        )
        if pools > hardware.host_memory_gb * GIB:
            problems.append(
                f"the host pools of a node take {pools / GIB:.0f} GiB, it has "
                f"{hardware.host_memory_gb:g} (hardware.host_memory_gb)"
            )
    if config.parallel.tensor > 1 and any(
        hardware.spans_nodes(ranks.start, ranks.stop - 1)
        for stage in stages
        for ranks in stage.ranks
    ):
        problems.append(
            f"parallel.tensor={config.parallel.tensor} ranks are on more than one node of "
            f"{hardware.devices_per_node} devices: every layer waits for the network twice"
        )
    return problems


def _memory_setting(hardware: HardwareConfig) -> str:
    """What the configuration says the memory of a device with."""
    return "hardware.device" if hardware.device_memory_gb is None else "hardware.device_memory_gb"
