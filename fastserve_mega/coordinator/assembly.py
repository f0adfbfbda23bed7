"""Puts a replica together: measures its ranks, makes its scheduler, opens its event log."""

from __future__ import annotations

import logging
from pathlib import Path

from fastserve_mega.config import Config
from fastserve_mega.coordinator.event_log import (
    EventLogWriter,
    RecordingScheduler,
    SchedulerSetup,
)
from fastserve_mega.coordinator.profile_grid import ProfileLimits
from fastserve_mega.coordinator.profiler import Profiler
from fastserve_mega.coordinator.replica import Replica
from fastserve_mega.coordinator.worker_group import ZmqWorkerGroup
from fastserve_mega.messaging.messages import Welcome
from fastserve_mega.metrics import ServingMetrics
from fastserve_mega.scheduling.cost_model import Profile
from fastserve_mega.scheduling.memory import PoolSizes

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


def make_profiler(config: Config, welcome: Welcome, group: ZmqWorkerGroup) -> Profiler:
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


def make_replica(
    config: Config,
    welcome: Welcome,
    group: ZmqWorkerGroup,
    *,
    profile: Profile | None,
    metrics: ServingMetrics,
    event_log: EventLogWriter | None,
) -> Replica:
    """A replica whose ranks are warm; without a profile they are measured shortly.

    Raises:
        WorkersLostError: a rank failed meanwhile.
    """
    profiler = make_profiler(config, welcome, group)
    if profile is None:
        profile = profiler.self_measurement()
        _log.info("self-measurement: %s", profile)
    else:
        profiler.warm_up()
    setup = SchedulerSetup(
        scheduler=config.scheduler,
        swap=config.kv_cache.swap,
        pools=PoolSizes(
            device_blocks=group.device_blocks,
            host_blocks=group.host_blocks,
            block_size=config.kv_cache.block_size,
        ),
        profile=profile,
        window=config.parallel.pipeline,
        first_step_id=profiler.steps,
    )
    scheduler = setup.make_scheduler()
    step = scheduler.step
    if event_log:
        event_log.begin(setup)
        step = RecordingScheduler(scheduler, event_log).step
    return Replica(scheduler, step, group, config.coordinator.step_timeout_s, metrics)
