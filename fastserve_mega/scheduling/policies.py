"""Policy names of the configuration to policies."""

from __future__ import annotations

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.fcfs import Fcfs
from fastserve_mega.scheduling.fixed_priority import FixedPriority
from fastserve_mega.scheduling.mlfq import Mlfq
from fastserve_mega.scheduling.policy import Policy
from fastserve_mega.scheduling.srpt import Srpt
from fastserve_mega.system.config import SchedulerConfig


def make_policy(config: SchedulerConfig, cost_model: CostModel) -> Policy:
    """The policy a configuration names."""
    match config.policy:
        case "skip_join_mlfq":
            return Mlfq(
                config.mlfq, cost_model, skip_join=True, max_batch_size=config.max_batch_size
            )
        case "mlfq":
            return Mlfq(
                config.mlfq, cost_model, skip_join=False, max_batch_size=config.max_batch_size
            )
        case "fcfs":
            return Fcfs()
        case "fixed_priority":
            return FixedPriority()
        case "srpt":
            return Srpt(cost_model)
