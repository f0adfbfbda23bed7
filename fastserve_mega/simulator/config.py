"""What a simulation is made of, read from YAML with the strictness of the live configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml

from fastserve_mega.config import SchedulerConfig, _apply_override
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.analytic_cost_model import AnalyticCostModel
from fastserve_mega.simulator.hardware import DEVICES, LINKS, MODELS, Device, Link, Mesh, ModelShape
from fastserve_mega.simulator.workload import WorkloadConfig
from fastserve_mega.strict import from_plain

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
    """Of that, memory for activations, the CUDA context and workspaces."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"kv_cache.block_size must be at least 1, got {self.block_size}")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(
                "kv_cache.memory_utilization must be above 0 and at most 1, "
                f"got {self.memory_utilization}"
            )
        if self.reserved_gb < 0:
            raise ValueError(f"kv_cache.reserved_gb must not be negative, got {self.reserved_gb}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """Everything a simulation depends on; the files in `configs/sim/` explain it."""

    model: str | ModelShape
    hardware: HardwareConfig
    mesh: Mesh = field(default_factory=Mesh)
    kv_cache: KvMemoryConfig = field(default_factory=KvMemoryConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    workload: WorkloadConfig


def load_simulation_config(path: str | Path, overrides: Sequence[str] = ()) -> SimulationConfig:
    """Read a YAML file and apply overrides of the form `section.field=value`.

    Raises:
        ValueError: the file or an override is not valid; the message names file and field.
        OSError: the file cannot be read.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("the top level must be a mapping of sections")
        for override in overrides:
            _apply_override(raw, override)
        config = from_plain(raw, SimulationConfig)
        make_cost_model(config)  # unknown names are an error of the file
        return config
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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
    kv_cache = config.kv_cache
    device_blocks = kv_cache.device_blocks or cost_model.device_blocks(
        kv_cache.block_size, kv_cache.memory_utilization, kv_cache.reserved_gb * 1e9
    )
    return Scheduler(
        config.scheduler,
        cost_model,
        device_blocks=device_blocks,
        block_size=kv_cache.block_size,
        window=config.mesh.pipeline,
    )


def _look_up(name: str, value: str | T, known: Mapping[str, T]) -> T:
    if not isinstance(value, str):
        return value
    if value not in known:
        raise ValueError(f"{name}: {value!r} is not known; known are {', '.join(known)}")
    return known[value]
