"""What `fastserve-mega serve` does: keep a deployment up until it is told to stop."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Literal, NoReturn

from fastserve_mega.launcher.deployment import PROBE_S, Deployment, http_url
from fastserve_mega.launcher.processes import ConfigurationError, LaunchError
from fastserve_mega.launcher.restart_policy import RestartPolicy
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
            deployment.start()
            print(_how_to_use(config, arguments), flush=True)
            supervise(deployment, config.supervisor)
        except KeyboardInterrupt:
            _log.warning("stopping; once more kills")
            return 0
        except LaunchError as error:
            _log.error("%s", error)
            return 1


def supervise(
    deployment: Deployment, options: SupervisorConfig, sleep: Callable[[float], None] = time.sleep
) -> NoReturn:
    """Start again whatever ends or hangs.

    Args:
        deployment: has started.
        options: how often.
        sleep: lets time pass.

    Raises:
        LaunchError: it cannot start, or that has been tried too often.
    """
    policy = RestartPolicy(options.max_restarts, options.restart_window_s)
    while True:
        sleep(PROBE_S)
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


def _how_to_use(config: Config, arguments: Sequence[str]) -> str:
    url, name = http_url(config), config.model.name
    return f"""
{name} is being served. Try:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  python -c "from openai import OpenAI; print(OpenAI(base_url='{url}/v1', api_key='none')
    .chat.completions.create(model='{name}', messages=[{{'role': 'user', 'content': 'Hello!'}}])
    .choices[0].message.content)"

  fastserve-mega chat {" ".join(arguments)}

Ctrl-C ends it.
"""
