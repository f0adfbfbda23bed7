"""Scheduling policies: the order of the requests, and the names of those that come with us."""

from __future__ import annotations

import importlib
import inspect

from fastserve_mega.scheduling.cost_model import CostModel
from fastserve_mega.scheduling.policies.by_key import Fcfs, FixedPriority, Srpt
from fastserve_mega.scheduling.policies.mlfq import Mlfq, SkipJoinMlfq
from fastserve_mega.scheduling.policies.paced import Paced
from fastserve_mega.scheduling.policies.policy import Policy
from fastserve_mega.system.config import SchedulerConfig

POLICIES: dict[str, type[Policy]] = {
    "skip_join_mlfq": SkipJoinMlfq,
    "paced": Paced,
    "mlfq": Mlfq,
    "fcfs": Fcfs,
    "fixed_priority": FixedPriority,
    "srpt": Srpt,
}


def make_policy(config: SchedulerConfig, cost_model: CostModel) -> Policy:
    """Return the policy that a configuration names.

    Raises:
        ValueError: there is no such class, or it is no policy.
    """
    return find_policy(config.policy)(config, cost_model)


def find_policy(name: str) -> type[Policy]:
    """Return the class of a name in `POLICIES`, or of a path like `my_package.my_module:Class`.

    Raises:
        ValueError: there is no such class, or it is no policy.
    """
    if name in POLICIES:
        return POLICIES[name]
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"scheduler.policy {name!r} cannot be loaded: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ValueError(
            f"scheduler.policy {name!r} is not a subclass of "
            f"{Policy.__module__}.{Policy.__qualname__}"
        )
    if inspect.isabstract(found):
        raise ValueError(f"scheduler.policy {name!r} defines no key")
    return found
