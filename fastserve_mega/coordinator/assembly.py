"""Puts a coordinator together: measures the ranks, makes schedulers, opens event logs."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from fastserve_mega import __version__
from fastserve_mega.coordinator.admission import Admission
from fastserve_mega.coordinator.coordinator import Coordinator
from fastserve_mega.coordinator.event_log import (
    EventLogWriter,
    SchedulerSetup,
    StepFunction,
    recorded,
)
from fastserve_mega.coordinator.front_door import FrontDoor
from fastserve_mega.coordinator.profile_grid import ProfileLimits
from fastserve_mega.coordinator.profiler import Profiler
from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.coordinator.worker_group import WorkerGroup
from fastserve_mega.messaging.messages import Welcome
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.scheduling.cost_model import Profile
from fastserve_mega.scheduling.kv.pool import PoolSizes
from fastserve_mega.system.config import Config

_log = logging.getLogger(__name__)


def open_event_logs(path: str | None, replicas: int) -> list[EventLogWriter | None]:
    """A log for each replica: `log.jsonl`, or `log.replica-0.jsonl` and so on for several.

    Raises:
        OSError: a file cannot be written.
    """
    if path is None:
        return [None] * replicas
    whole = Path(path).expanduser()
    if replicas == 1:
        return [EventLogWriter(whole)]
    return [
        EventLogWriter(whole.with_name(f"{whole.stem}.replica-{replica}{whole.suffix}"))
        for replica in range(replicas)
    ]


def make_welcome(config: Config, epoch: str | None, *, is_supervised: bool) -> Welcome:
    """What clients are told before the size of the KV pool is known.

    Raises:
        ValueError, OSError: the model or its configuration is not usable.
    """
    architecture = load_architecture(config.model.directory)
    limit = config.model.max_context
    if limit is not None and limit > architecture.max_context:
        raise ValueError(f"model.max_context is {limit}, the model has {architecture.max_context}")
    return Welcome(
        epoch=epoch or uuid.uuid4().hex,
        model_name=config.model.name,
        model_path=str(config.model.directory.resolve()),
        max_context=limit or architecture.max_context,
        vocab_size=architecture.vocab_size,
        eos_token_ids=architecture.eos_token_ids,
        restart_within_s=config.coordinator.startup_timeout_s if is_supervised else 0.0,
    )


def within_pool(welcome: Welcome, device_blocks: int, block_size: int) -> Welcome:
    """The welcome with a context that fits into the KV pool, since no longer request can run."""
    capacity = (device_blocks - 1) * block_size  # one is the null block
    if capacity >= welcome.max_context:
        return welcome
    _log.warning(
        "the KV pool has room for %d tokens, so the context is that and not %d "
        "(kv_cache.device_blocks, device_memory_gb, model.max_context)",
        capacity,
        welcome.max_context,
    )
    return msgspec.structs.replace(welcome, max_context=capacity)


def make_profiler(config: Config, welcome: Welcome, group: WorkerGroup) -> Profiler:
    """Measures the ranks of one replica."""
    limits = ProfileLimits(
        device_blocks=group.device_blocks,
        block_size=config.kv_cache.block_size,
        max_batch_size=config.scheduler.max_batch_size,
        max_batch_tokens=config.scheduler.max_batch_tokens,
        max_context=welcome.max_context,
        stages=config.parallel.pipeline,
    )
    return Profiler(group, limits, config.coordinator.step_timeout_s)


def make_coordinator(
    config: Config,
    welcome: Welcome,
    front_door: FrontDoor,
    groups: Sequence[WorkerGroup],
    *,
    profile: Profile | None,
    event_logs: Sequence[EventLogWriter | None],
    clock: Callable[[], float],
    poll: Callable[[float | None], None],
) -> Coordinator:
    """A coordinator whose ranks are warm.

    Raises:
        WorkersLostError: a rank failed meanwhile.
    """
    smallest = min(group.device_blocks for group in groups)
    welcome = within_pool(welcome, smallest, config.kv_cache.block_size)
    metrics = ServingMetrics(
        block_bytes=max(group.block_bytes for group in groups),
        info={
            "model_name": config.model.name,
            "policy": config.scheduler.policy,
            "version": __version__,
        },
    )
    replicas = _make_replicas(
        config, welcome, groups, profile=profile, metrics=metrics, event_logs=event_logs
    )
    schedulers = [replica.scheduler for replica in replicas]
    metrics.watch_schedulers(schedulers)
    return Coordinator(
        welcome=welcome,
        replicas=replicas,
        front_door=front_door,
        metrics=metrics,
        admission=Admission(
            vocab_size=welcome.vocab_size,
            eos_token_ids=welcome.eos_token_ids,
            max_context=welcome.max_context,
            max_queued_requests=config.scheduler.max_queued_requests,
            max_queued_tokens=config.scheduler.max_queued_tokens,
            max_wait_s=config.scheduler.max_wait_s or math.inf,
        ),
        prefix_block_size=config.kv_cache.block_size if config.kv_cache.prefix_cache else None,
        clock=clock,
        poll=poll,
    )


def _make_replicas(
    config: Config,
    welcome: Welcome,
    groups: Sequence[WorkerGroup],
    *,
    profile: Profile | None,
    metrics: ServingMetrics,
    event_logs: Sequence[EventLogWriter | None],
) -> list[Replica]:
    """Replicas whose ranks are warm. Without a profile the first one is measured shortly.

    All begin with the same expectations, so that chance does not make one look faster; each then
    learns from its own steps.
    """
    replicas = []
    for group, event_log in zip(groups, event_logs, strict=True):
        profiler = make_profiler(config, welcome, group)
        if profile is None:
            profile = profiler.self_measurement()
            _log.info("self-measurement: %s", profile)
        else:
            profiler.warm_up()
        setup = _scheduler_setup(config, group, profile, first_step_id=profiler.steps)
        scheduler = setup.make_scheduler()
        step: StepFunction = scheduler.step
        if event_log:
            event_log.write(setup)
            step = recorded(scheduler, event_log)
        timeout_s = config.coordinator.step_timeout_s
        replicas.append(Replica(scheduler, step, group, timeout_s, metrics))
    return replicas


def _scheduler_setup(
    config: Config, group: WorkerGroup, profile: Profile, *, first_step_id: int
) -> SchedulerSetup:
    return SchedulerSetup(
        scheduler=config.scheduler,
        swap=config.kv_cache.swap,
        pools=PoolSizes(
            device_blocks=group.device_blocks,
            host_blocks=group.host_blocks,
            block_size=config.kv_cache.block_size,
            grows_ahead=config.parallel.looks_ahead,
        ),
        profile=profile,
        window=config.parallel.pipeline,
        first_step_id=first_step_id,
    )
