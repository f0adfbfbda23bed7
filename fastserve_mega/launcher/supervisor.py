"""What `fastserve-mega serve` does: keep a deployment up until it is told to stop."""

from __future__ import annotations

import logging
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Literal, NoReturn

from fastserve_mega.launcher.deployment import PROBE_S, Deployment, http_url
from fastserve_mega.launcher.processes import ConfigurationError, LaunchError
from fastserve_mega.launcher.restart_policy import RestartPolicy
from fastserve_mega.launcher.stats_line import StatsLine
from fastserve_mega.messaging.messages import Snapshot
from fastserve_mega.process_tree import adopt_orphans
from fastserve_mega.system.config import Config, SupervisorConfig

_log = logging.getLogger(__name__)


def serve(
    config: Config, arguments: Sequence[str], *, runner: Literal["megatron", "fake"] = "megatron"
) -> int:
    """`fastserve-mega serve`: run until Ctrl-C or SIGTERM; returns the exit status.

    The first signal ends everything in order, the second one at once.
    """
    num_signals = 0

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals <= 2:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    adopt_orphans()
    with Deployment(config, arguments, http=True, restarts=True, runner=runner) as deployment:
        try:
            print(_what_starts(config), flush=True)
            deployment.start()
            print(_how_to_use(config, arguments, deployment.snapshot()), flush=True)
            stats = StatsLine(deployment.snapshot, time.monotonic())
            await_end = deployment.await_end
            supervise(deployment, config.supervisor, stats=stats, await_end=await_end)
        except KeyboardInterrupt:
            _log.warning("stopping; once more kills")
            return 0
        except LaunchError as error:
            _log.error("%s", error)
            return 1


def supervise(
    deployment: Deployment,
    options: SupervisorConfig,
    sleep: Callable[[float], None] = time.sleep,
    stats: StatsLine | None = None,
    await_end: Callable[[float], None] | None = None,
) -> NoReturn:
    """Start again whatever ends or hangs.

    Args:
        deployment: has started.
        options: how often.
        sleep: lets time pass.
        await_end: the same, but no longer than until a process ends; None: as `sleep` does.
        stats: says on stdout how much there is to do.

    Raises:
        LaunchError: it cannot start, or that has been tried too often.
    """
    policy = RestartPolicy(options.max_restarts, options.restart_window_s)
    while True:
        (await_end or sleep)(PROBE_S)
        if stats and (line := stats.due(time.monotonic())):
            print(line, flush=True)
        if not (lost := deployment.lost()):
            continue
        reason = ", ".join(lost.values())
        wait_s = policy.wait_before_attempt(time.monotonic())
        if wait_s is None:
            raise LaunchError(
                f"{reason}, after {options.max_restarts} restarts within "
                f"{options.restart_window_s:g} s (supervisor.max_restarts)"
            )
        _log.warning("%s; starting again%s", reason, f" in {wait_s:g} s" if wait_s else "")
        sleep(wait_s)
        try:
            deployment.restart(lost)
        except ConfigurationError:
            raise
        except LaunchError as error:
            _log.warning("not started: %s", error)
        else:
            policy.succeeded(time.monotonic())
            _log.warning("serving again")


def _what_starts(config: Config) -> str:
    parallel = config.parallel
    sizes = {"data": parallel.data, "pipeline": parallel.pipeline, "tensor": parallel.tensor}
    mesh = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    ranks = "1 rank" if parallel.world_size == 1 else f"{parallel.world_size} ranks ({mesh})"
    return f"starting {config.model.name} from {config.model.path} on {ranks}"


def _how_to_use(config: Config, arguments: Sequence[str], snapshot: Snapshot | None) -> str:
    url, name = http_url(config), config.model.name
    tokens = config.kv_cache.block_size * sum(
        replica.device.capacity for replica in (snapshot.replicas if snapshot else ())
    )
    addresses = {"OpenAI API": "/v1", "API reference": "/docs", "metrics": "/metrics"}
    if config.server.live_view:
        addresses["live view"] = "/"
    listed = "\n".join(f"  {what:<15}{url}{path}" for what, path in addresses.items())
    room = f" with room for {tokens:,} tokens of KV" if tokens else ""
    return f"""
{name} is being served{room}, policy {config.scheduler.policy}.

{listed}
  {"ZeroMQ":<15}{config.coordinator.client_endpoint}

Try:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  python -c "from openai import OpenAI; print(OpenAI(base_url='{url}/v1', api_key='none')
    .chat.completions.create(model='{name}', messages=[{{'role': 'user', 'content': 'Hello!'}}])
    .choices[0].message.content)"

  fastserve-mega chat {_server_of(config, arguments)}

Ctrl-C ends it.
"""


def _server_of(config: Config, arguments: Sequence[str]) -> str:
    """What tells `chat` where this is."""
    if "--config" in arguments:
        return shlex.join(arguments)
    return f"--url {config.coordinator.client_endpoint}"
