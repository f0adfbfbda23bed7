"""What a simulation is made of, read from YAML with the strictness of the live configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fastserve_mega.scheduling.memory import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.analytic_cost_model import AnalyticCostModel
from fastserve_mega.simulator.workload import WorkloadConfig
from fastserve_mega.system.config import SchedulerConfig, SwapConfig
from fastserve_mega.system.config_file import load_yaml
from fastserve_mega.system.hardware import (
    DEVICES,
    GIB,
    LINKS,
    MODELS,
    Device,
    Link,
    Mesh,
    ModelShape,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareConfig:
    """Figures by name from `simulator/hardware.py`, or written out as a mapping."""

    device: str | Device
    interconnect: str | Link = "pcie-4"
    """Between the devices of a node."""
    network: str | Link = "network-400g"
    """Between nodes."""
    layer_overhead_s: float = 10e-6
    """Small kernels and launches of a layer, in each step."""
    step_overhead_s: float = 1e-3
    """Scheduling, messages and sampling between a step's result and the next plan."""

    def __post_init__(self) -> None:
        for name in ("layer_overhead_s", "step_overhead_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"hardware.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMemoryConfig:
    """The pools of KV blocks."""

    block_size: int = 16
    device_blocks: int | None = None
    """Blocks on the device, the null block included; None takes what the weights leave."""
    memory_utilization: float = 0.9
    """Fraction of device memory the server may use (as in the paper's scripts)."""
    reserved_gb: float = 1.0
    """Of that, memory (GiB) for activations, the CUDA context and workspaces."""
    host_blocks: int | None = None
    """Blocks in host memory, the null block included; None takes host_memory_gb. Only swap
    strategies that swap have a host pool."""
    host_memory_gb: float = 56.0
    """Host memory of each device (GiB) when host_blocks is None; as in the authors' scripts."""
    swap: SwapConfig = field(default_factory=SwapConfig)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"kv_cache.block_size must be at least 1, got {self.block_size}")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(
                "kv_cache.memory_utilization must be above 0 and at most 1, "
                f"got {self.memory_utilization}"
            )
        for name in ("reserved_gb", "host_memory_gb", "host_blocks"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"kv_cache.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """Everything a simulation depends on; the files in `configs/sim/` explain it."""

    model: str | ModelShape
    hardware: HardwareConfig
    mesh: Mesh = field(default_factory=Mesh)
    kv_cache: KvMemoryConfig = field(default_factory=KvMemoryConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    workload: WorkloadConfig

    def __post_init__(self) -> None:
        if self.scheduler.profile is not None:
            raise ValueError(
                "scheduler.profile is for a live server; here step times come from `hardware`"
            )


def load_simulation_config(path: str | Path, overrides: Sequence[str] = ()) -> SimulationConfig:
    """Read a YAML file and apply overrides of the form `section.field=value`.

    Raises:
        ValueError: the file or an override is not valid; the message names which of them, and
            the field.
        OSError: the file cannot be read.
    """
    return load_yaml(path, SimulationConfig, overrides, check=make_cost_model)


def make_cost_model(config: SimulationConfig) -> AnalyticCostModel:
    """The cost model of the configured hardware and model."""
    hardware = config.hardware
    return AnalyticCostModel(
        _look_up("hardware.device", hardware.device, DEVICES),
        _look_up("model", config.model, MODELS),
        config.mesh,
        interconnect=_look_up("hardware.interconnect", hardware.interconnect, LINKS),
        network=_look_up("hardware.network", hardware.network, LINKS),
        max_batch_tokens=config.scheduler.max_batch_tokens,
        layer_overhead_s=hardware.layer_overhead_s,
        step_overhead_s=hardware.step_overhead_s,
    )


def make_scheduler(config: SimulationConfig, cost_model: AnalyticCostModel) -> Scheduler:
    """A fresh scheduler for one run."""
    return Scheduler(
        config.scheduler,
        cost_model,
        make_pools(config.kv_cache, cost_model),
        swap=config.kv_cache.swap,
        window=config.mesh.pipeline,
    )


def make_pools(kv_cache: KvMemoryConfig, cost_model: AnalyticCostModel) -> PoolSizes:
    """The KV blocks that fit into the memories of a rank."""
    block_size = kv_cache.block_size
    device_blocks, host_blocks = kv_cache.device_blocks, kv_cache.host_blocks
    if device_blocks is None:
        device_blocks = cost_model.device_blocks(
            block_size, kv_cache.memory_utilization, kv_cache.reserved_gb * GIB
        )
    if kv_cache.swap.strategy not in ("proactive", "reactive"):
        host_blocks = 0
    elif host_blocks is None:
        host_blocks = int(kv_cache.host_memory_gb * GIB // cost_model.block_bytes(block_size))
    return PoolSizes(device_blocks, host_blocks, block_size)


def _look_up(name: str, value: str | T, known: Mapping[str, T]) -> T:
    if not isinstance(value, str):
        return value
    if value not in known:
        raise ValueError(f"{name}: {value!r} is not known; known are {', '.join(known)}")
    return known[value]
