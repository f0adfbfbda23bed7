"""Scheduling policies: the order of the requests, and the names of those that come with us."""

from __future__ import annotations

from fastserve_mega.config import SchedulerConfig
from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.policies.fcfs import Fcfs
from fastserve_mega.scheduling.policies.fixed_priority import FixedPriority
from fastserve_mega.scheduling.policies.mlfq import Mlfq, SkipJoinMlfq
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.scheduling.policies.srpt import Srpt

POLICIES: dict[str, type[Policy]] = {
    "skip_join_mlfq": SkipJoinMlfq,
    "mlfq": Mlfq,
    "fcfs": Fcfs,
    "fixed_priority": FixedPriority,
    "srpt": Srpt,
}


def make_policy(config: SchedulerConfig, cost_model: CostModel) -> Policy:
    """Return the policy that a configuration names."""
    return POLICIES[config.policy](config, cost_model)
