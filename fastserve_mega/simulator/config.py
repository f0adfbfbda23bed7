"""What a simulation is made of: a deployment's own configuration, and a workload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.records import Record
from fastserve_mega.scheduling.cost_model import CostModel, Profile, ProfiledCostModel
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.scheduling.scheduler import Scheduler
from fastserve_mega.simulator.analytic_cost_model import AnalyticCostModel
from fastserve_mega.simulator.engine_model import EngineModel
from fastserve_mega.simulator.profiled_engine import ProfiledEngine
from fastserve_mega.simulator.replica import SimulatedReplica
from fastserve_mega.simulator.workload import WorkloadConfig, load_workload
from fastserve_mega.system.config import Config
from fastserve_mega.system.config_file import load_yaml
from fastserve_mega.system.deployment import DeploymentPlan, plan_deployment
from fastserve_mega.system.locate import find_architecture


class SimulationConfig(Record, frozen=True, kw_only=True):
    """Everything a simulation depends on."""

    deployment: Config
    architecture: Architecture
    workload: WorkloadConfig
    profile: Profile | None = None
    """Step times measured on the ranks, in place of those from `deployment.hardware`."""


def load_simulation_config(
    path: str | Path,
    workload: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    profile: Profile | None = None,
) -> SimulationConfig:
    """Read a deployment and a workload.

    Args:
        path: the YAML file of the deployment.
        workload: the YAML file of the workload; None takes the defaults.
        overrides: `section.field=value` of the deployment, or `workload.field=value`.
        profile: measured on the ranks.

    Raises:
        ValueError: a file or an override is not valid, or the model is not found; the message
            names which of them, and the field.
        OSError: a file cannot be read.
    """
    of_deployment, of_workload = split_overrides(overrides)
    requests = load_workload(workload, of_workload)

    def assemble(deployment: Config) -> SimulationConfig:
        config = SimulationConfig(
            deployment=deployment,
            architecture=find_architecture(deployment, Path(path))[0],
            workload=requests,
            profile=profile,
        )
        make_replicas(config)
        return config

    return assemble(load_yaml(path, Config, of_deployment, check=assemble))


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell overrides of the deployment from those of the workload."""
    of_workload = [each for each in overrides if each.strip().startswith("workload.")]
    return [each for each in overrides if each not in of_workload], of_workload


def make_replicas(config: SimulationConfig) -> list[SimulatedReplica]:
    """Fresh replicas for one run.

    Raises:
        ValueError: the model cannot be split over the ranks or does not fit, or nothing says how
            long a step takes.
    """
    deployment = config.deployment
    plan = plan_deployment(deployment, config.architecture)
    pools = make_pools(plan)
    replicas = []
    for replica in range(plan.replicas):
        engine, cost_model = _make_models(config, plan, replica)
        scheduler = Scheduler(
            deployment.scheduler,
            cost_model,
            pools,
            swap=deployment.kv_cache.swap,
            window=deployment.parallel.pipeline,
        )
        replicas.append(
            SimulatedReplica(
                scheduler,
                engine,
                stages=deployment.parallel.pipeline,
                block_size=plan.block_size,
            )
        )
    return replicas


def make_pools(plan: DeploymentPlan) -> PoolSizes:
    """The KV blocks of a replica.

    Raises:
        ValueError: nothing says how many there are, or there are fewer than two.
    """
    blocks = plan.device_blocks
    if blocks is None:
        raise ValueError(
            "nothing says how many KV blocks there are: give hardware.device, "
            "kv_cache.device_memory_gb or kv_cache.device_blocks"
        )
    if blocks < 2:
        raise ValueError(
            f"{plan.model} does not fit: {plan.stages[0].weight_bytes / 1e9:.1f} GB of weights on "
            f"each rank leave {max(blocks, 0)} KV blocks, and at least 2 are needed"
        )
    return PoolSizes(blocks, plan.host_blocks, plan.block_size)


def _make_models(
    config: SimulationConfig, plan: DeploymentPlan, replica: int
) -> tuple[EngineModel, CostModel]:
    """How long steps take, and what the scheduler expects of them."""
    if config.profile is None:
        analytic = AnalyticCostModel(config.deployment, plan, replica)
        return analytic, analytic
    layers = [len(stage.layers) for stage in plan.stages]
    engine = ProfiledEngine(config.profile, layers, _copy_block_s(config.deployment, plan))
    return engine, ProfiledCostModel(config.profile)


def _copy_block_s(deployment: Config, plan: DeploymentPlan) -> float:
    """Seconds to copy a KV block to the host; 0 when no device is named: then it is not known."""
    device = deployment.hardware.device_figures
    if device is None:
        return 0.0
    block = plan.rank_kv_bytes_per_token * plan.block_size
    return block / (device.host_bandwidth * device.host_efficiency)
