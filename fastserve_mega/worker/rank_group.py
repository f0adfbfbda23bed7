"""All ranks of a deployment together: what they agree on, and how they give up."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import signal
import socket
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

import fastserve_mega
from fastserve_mega.system.config import Config
from fastserve_mega.worker.exchange import Exchange, MissingRanksError
from fastserve_mega.worker.topology import Topology, place_on_hosts

_FINE, _FAILED = "+", "!"
_GRACE_S = 1.0
"""How long a rank that failed waits for others that fail as well, so that one of them speaks."""
_STAGGER_S = 0.1
_LONGEST_STAGGER_S = 2.0

_log = logging.getLogger(__name__)


class SaidError(Exception):
    """Something failed that has been said on stderr already."""


class OthersFailedError(Exception):
    """Other ranks failed, and one of them says why."""


class RankGroup:
    """Collective calls of all ranks.

    A rank that has failed answers the others' next call with its error, so that all of them end at
    once and the sentence is said once.
    """

    def __init__(self, topology: Topology, exchange: Exchange, limit_s: float) -> None:
        """No communication yet.

        Args:
            topology: of this rank.
            exchange: between all of them.
            limit_s: longest wait for another rank.
        """
        self.topology = topology
        self._exchange = exchange
        self._limit_s = limit_s

    @property
    def uses_master_port(self) -> bool:
        """Whether the exchange itself listens at MASTER_PORT."""
        return self._exchange.uses_master_port

    def gather(self, value: str = "") -> list[str]:
        """The values of all ranks in rank order, on every rank.

        Raises:
            OthersFailedError: ranks failed before this call.
            MissingRanksError: ranks have not come in time.
        """
        answers = self._exchange.gather(_FINE + value, self._limit_s)
        if _failures(answers):
            raise OthersFailedError
        return [answer[1:] for answer in answers]

    def broadcast(self, value: str) -> str:
        """Rank 0's value, on every rank. Raises like `gather`."""
        return self.gather(value)[0]

    def agree(self, config: Config) -> None:
        """Make sure that all run the same code with the same configuration, and learn the hosts.

        Raises:
            ValueError: they do not; the message says what differs where.
            OthersFailedError, MissingRanksError: see `gather`.
        """
        said = {"host": socket.gethostname(), "versions": _versions(), "config": _digests(config)}
        everyone = [json.loads(answer) for answer in self.gather(json.dumps(said))]
        for what in ("versions", "config"):
            _check_equal(what, [one[what] for one in everyone])
        self.topology = place_on_hosts(self.topology, [one["host"] for one in everyone])

    def share_no_device(self, name: str) -> None:
        """Make sure that each rank has a device of its own.

        Args:
            name: of this rank's device among those of its host; empty for a CPU.

        Raises:
            ValueError: ranks of a host share one.
            OthersFailedError, MissingRanksError: see `gather`.
        """
        users: dict[tuple[str, str], list[int]] = {}
        for rank, place in enumerate(zip(self.topology.hosts, self.gather(name), strict=True)):
            users.setdefault(place, []).append(rank)
        for (_, device), ranks in users.items():
            if device and len(ranks) > 1:
                raise ValueError(
                    f"ranks {ranks} have one device together ({device}), each needs its own"
                )

    def fail(self, error: Exception) -> None:
        """End all ranks because of an error of this one: returns when all know, or aborts."""
        sentence = "" if isinstance(error, SaidError) else describe(error)
        try:
            answers = self._exchange.gather(_FAILED + sentence, _GRACE_S)
        except MissingRanksError:
            self.speak_and_abort(sentence)
            return
        same = _without_numbers(sentence)
        who = [rank for rank, text in _failures(answers).items() if _without_numbers(text) == same]
        if sentence and self.topology.rank == who[0]:
            _log.error("%s", self._attribute(sentence, who))

    def speak_and_abort(self, sentence: str) -> None:
        """Say it, unless a lower rank does so first and ends this one; then end all."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(min(_STAGGER_S * self.topology.rank, _LONGEST_STAGGER_S))
        if sentence:
            _log.error("%s", self._attribute(sentence, [self.topology.rank]))
        self.abort()

    def abort(self) -> None:
        """End all ranks now."""
        logging.shutdown()
        self._exchange.abort()

    def close(self) -> None:
        """No rank needs the others any more."""
        self._exchange.close()

    def _attribute(self, sentence: str, who: list[int]) -> str:
        """The rank that says it, unless all do."""
        if len(who) == self.topology.world_size:
            return sentence
        name = f"rank {who[0]}" if len(who) == 1 else f"ranks {who}"
        host = f" on {socket.gethostname()}" if self.topology.has_several_hosts else ""
        return f"{name}{host}: {sentence}"


def is_expected(error: Exception) -> bool:
    """Whether a user can cause it, so that its text says enough."""
    return isinstance(error, (ValueError, OSError, MemoryError, MissingRanksError))


def describe(error: Exception) -> str:
    """A sentence about an error; Python's own MemoryError has none."""
    name, told = type(error).__name__, str(error)
    if not told:
        return name
    return told if is_expected(error) else f"{name}: {told}"


def _without_numbers(sentence: str) -> str:
    """Two ranks that measure the same trouble differ in the last digit."""
    return re.sub(r"[0-9]+", "#", sentence)


def _failures(answers: list[str]) -> dict[int, str]:
    return {rank: text[1:] for rank, text in enumerate(answers) if text.startswith(_FAILED)}


def _versions() -> dict[str, str]:
    found = {"fastserve_mega": fastserve_mega.__version__}
    for package in ("torch", "megatron-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _digests(config: Config) -> dict[str, str]:
    """Field by its path → hash of its value: enough to name the field that differs."""
    fields: dict[str, str] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, msgspec.Struct):
            for name in value.__struct_fields__:
                visit(getattr(value, name), f"{path}.{name}" if path else name)
        else:
            fields[path] = hashlib.sha256(repr(value).encode()).hexdigest()[:12]

    visit(config, "")
    return fields


def _check_equal(what: str, values: list[dict[str, str]]) -> None:
    different = [rank for rank, value in enumerate(values) if value != values[0]]
    if not different:
        return
    first, other = values[0], values[different[0]]
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    if what == "versions":
        raise ValueError(
            f"ranks {different} run {names[0]} {other.get(names[0])}, rank 0 runs "
            f"{first.get(names[0])}"
        )
    raise ValueError(
        f"ranks {different} have a configuration unlike rank 0's: {', '.join(names)} differ"
        if len(names) > 1
        else f"ranks {different} have another {names[0]} than rank 0"
    )
