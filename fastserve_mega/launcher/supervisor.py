"""What `fastserve-mega serve` does: keep a deployment up until it is told to stop."""

from __future__ import annotations

import logging
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Literal, NoReturn

from fastserve_mega.launcher.deployment import PROBE_S, Deployment, http_url
from fastserve_mega.launcher.processes import LaunchError
from fastserve_mega.logs import discard_output
from fastserve_mega.messaging.messages import Snapshot
from fastserve_mega.process_tree import adopt_orphans, end_descendants
from fastserve_mega.snapshot import PoolView
from fastserve_mega.system.config import Config, SupervisorConfig

SETTLED_S = 10.0
"""A loss after serving for so long has nothing to do with the one before."""
_LONGEST_WAIT_S = 30.0
INTERVAL_S = 10.0
"""Between two lines on the load."""

_log = logging.getLogger(__name__)


def serve(
    config: Config, arguments: Sequence[str], *, runner: Literal["megatron", "fake"] = "megatron"
) -> int:
    """`fastserve-mega serve`: run until Ctrl-C, SIGTERM or a closed terminal; the exit status.

    The first signal ends everything in order, the second one at once. SIGUSR1 and SIGUSR2, which
    others take for "reopen your logs", are for nothing here.
    """
    num_signals = 0

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals == 1:
            raise KeyboardInterrupt
        # No exception, which could come where nobody expects it: whoever is waited for has ended.
        end_descendants()

    def ignore(signum: int, frame: FrameType | None) -> None:
        """Not SIG_IGN, which children would inherit."""

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, stop)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, ignore)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, stop)
    adopt_orphans()
    with Deployment(config, arguments, http=True, restarts=True, runner=runner) as deployment:
        try:
            _say(_what_starts(config))
            deployment.start()
            _say(_how_to_use(config, arguments, deployment.snapshot()))
            stats = StatsLine(deployment.snapshot, time.monotonic())
            await_end = deployment.await_end
            supervise(deployment, config.supervisor, stats=stats, await_end=await_end)
        except KeyboardInterrupt:
            _log.warning("stopping; once more kills")
            return 0
        except (LaunchError, OSError) as error:
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
            _say(line)
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
        except (LaunchError, OSError) as error:  # OSError: no memory, processes, files, or disk
            _log.warning("not started: %s", error)
        else:
            policy.succeeded(time.monotonic())
            _log.warning("serving again")


def _say(text: str) -> None:
    """Print for whoever has started this, and may have gone since: that ends nothing."""
    try:
        print(text, flush=True)
    except OSError:
        discard_output()


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


class RestartPolicy:
    """At once the first time; with growing pauses when that was in vain. Time is an argument."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        """Nothing was lost yet.

        Args:
            max_restarts: attempts within the window; one more is refused.
            window_s: length of the window.
        """
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._attempts: deque[float] = deque()
        self._vain = 0
        self._serving_since: float | None = None

    def wait_before_attempt(self, now: float) -> float | None:
        """Seconds to wait before the next attempt, which counts from now on; None: no more."""
        while self._attempts and now - self._attempts[0] >= self._window_s:
            self._attempts.popleft()
        if len(self._attempts) >= self._max_restarts:
            return None
        self._attempts.append(now)
        if self._serving_since is not None and now - self._serving_since >= SETTLED_S:
            self._vain = 0
        self._serving_since = None
        wait_s: float = min(2.0 ** (self._vain - 1), _LONGEST_WAIT_S) if self._vain else 0.0
        self._vain += 1
        return wait_s

    def succeeded(self, now: float) -> None:
        """The last attempt has led to something that serves."""
        self._serving_since = now


class StatsLine:
    """One line on the load since the last one; none while nobody asks for anything.

    Args:
        ask: for the state of the coordinator; None when it does not answer.
        now: time on a monotonic clock.
    """

    def __init__(self, ask: Callable[[], Snapshot | None], now: float) -> None:
        self._ask = ask
        self._next = now + INTERVAL_S
        self._before: Snapshot | None = None

    def due(self, now: float) -> str | None:
        """The line, when it is time for one and there was work."""
        if now < self._next:
            return None
        self._next = now + INTERVAL_S
        before, self._before = self._before, self._ask()
        if self._before is None:
            return None
        return describe(self._before, before)


def describe(snapshot: Snapshot, before: Snapshot | None) -> str | None:
    """The load between two snapshots; None when there was none.

    Args:
        snapshot: the newer one.
        before: the older one, of this or an earlier start; None when there is none.
    """
    running = sum(view.running for each in snapshot.replicas for view in each.requests)
    unfinished = sum(sum(each.levels) for each in snapshot.replicas)
    tokens, elapsed_s = snapshot.generation_tokens, snapshot.clock_s
    if before is not None and before.generation_tokens <= tokens and before.clock_s < elapsed_s:
        tokens -= before.generation_tokens
        elapsed_s -= before.clock_s
    elif before is not None:
        return None  # it has started anew, and counts from there
    if not unfinished and not tokens:
        return None
    parts = [
        f"{running} running",
        f"{unfinished - running} waiting",
        f"{tokens / elapsed_s:.1f} tokens/s" if before is not None else f"{tokens} tokens so far",
        f"KV {_share([each.device for each in snapshot.replicas])}",
    ]
    if any(each.host.owned for each in snapshot.replicas):
        parts.append(f"host KV {_share([each.host for each in snapshot.replicas])}")
    return ", ".join(parts)


def _share(pools: list[PoolView]) -> str:
    capacity = sum(pool.capacity for pool in pools)
    return f"{sum(pool.owned for pool in pools) / capacity:.0%}" if capacity else "none"
