"""API keys while the server runs: who asks, what is left of their limits, what they have used."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from fastserve_mega.server.errors import ApiError
from fastserve_mega.system.api_keys import ApiKey, hash_secret, read_key_file

_log = logging.getLogger(__name__)
_LOOK_INTERVAL_S = 1.0
"""Between two looks whether the file has changed."""
_MINUTE_S = 60.0
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")


class ApiKeys:
    """The keys of a file, which is read again when it changes.

    A new file that is not valid is refused, with one sentence in the log, and the keys before stay.

    Args:
        path: of the file.
        clock: in seconds; does not go back.

    Raises:
        ValueError, OSError: there is no valid file.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._usage = KeyMetrics()
        self._by_hash: dict[str, KeyHolder] = {}
        self._by_name: dict[str, KeyHolder] = {}
        self._looked_at = clock()
        self._seen = self._signature()
        self._take(read_key_file(path))

    def find(self, secret: str) -> KeyHolder | None:
        """Return whose secret this is; None when it is nobody's.

        It is looked up by its hash, so the time that takes tells nothing of other secrets.
        """
        self._look()
        return self._by_hash.get(hash_secret(secret))

    def render(self) -> str:
        """Return what the keys have used, in Prometheus' text format."""
        return self._usage.render()

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_at < _LOOK_INTERVAL_S:
            return
        self._looked_at = now
        if (signature := self._signature()) == self._seen:
            return
        self._seen = signature
        try:
            keys = read_key_file(self._path)
        except (ValueError, OSError) as error:
            _log.warning("the API keys stay as they were: %s", error)
            return
        self._take(keys)
        _log.info("read %d API keys from %s", len(keys), self._path)

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _take(self, keys: tuple[ApiKey, ...]) -> None:
        before, self._by_name = self._by_name, {}
        for key in keys:
            holder = before.pop(key.name, None) or KeyHolder(key, self._usage, self._clock)
            holder.key = key
            self._by_name[key.name] = holder
        for name in before:
            self._usage.forget(name)
        self._by_hash = {holder.key.sha256: holder for holder in self._by_name.values()}


class KeyHolder:
    """The owner of a key."""

    def __init__(self, key: ApiKey, usage: KeyMetrics, clock: Callable[[], float]) -> None:
        self.key = key
        self._usage = usage
        self._clock = clock
        self._requests = _Allowance(clock())
        self._tokens = _Allowance(clock())
        self._unfinished = 0
        usage.begin(key.name)

    def priority_of(self, given: int | None) -> int:
        """Return the priority of a request.

        Raises:
            ApiError: the key is not allowed to be as urgent; status 403.
        """
        least = self.key.most_urgent_priority
        if given is None:
            return max(0, least)
        if given < least:
            raise ApiError(
                403,
                f"priority must be at least {least} with the key {self.key.name!r}, got {given}",
                kind="permission_error",
                param="priority",
            )
        return given

    def admit(self, prompt_tokens: int, answers: int) -> Admitted:
        """Count a request against the limits of the key.

        Raises:
            ApiError: it exceeds one of them; status 429, and when to come again.
        """
        key, now = self.key, self._clock()
        if key.concurrency is not None and self._unfinished + answers > key.concurrency:
            if answers > key.concurrency:
                raise ApiError(400, self._sentence("concurrency", f"{answers} answers at once"))
            raise self._too_much("concurrency", f"{self._unfinished} answers are unfinished", 1.0)
        wait_s = self._requests.wait_s(key.requests_per_minute, 1.0, now)
        if wait_s > 0:
            raise self._too_much("requests_per_minute", "one request more", wait_s)
        # A request may take more than is left: how long its answer is shows only at its end.
        wait_s = self._tokens.wait_s(key.tokens_per_minute, 1.0, now)
        if wait_s > 0:
            raise self._too_much("tokens_per_minute", "the tokens are used up", wait_s)
        self._requests.take(1)
        self._tokens.take(prompt_tokens)
        self._unfinished += answers
        self._usage.admitted(key.name, prompt_tokens, self._unfinished)
        return Admitted(self, answers)

    def finish(self, answers: int, completion_tokens: int) -> None:
        """Take in the end of a request, with the tokens that were generated for it."""
        self._unfinished -= answers
        self._tokens.take(completion_tokens)
        self._usage.finished(self.key.name, completion_tokens, self._unfinished)

    def _too_much(self, limit: str, happened: str, wait_s: float) -> ApiError:
        self._usage.refused(self.key.name, limit)
        return ApiError(
            429,
            self._sentence(limit, happened),
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(max(math.ceil(wait_s), 1))},
        )

    def _sentence(self, limit: str, happened: str) -> str:
        most = getattr(self.key, limit)
        return f"the key {self.key.name!r} has a limit of {most} ({limit}): {happened}"


class Admitted:
    """One request that counts against the limits of its key until it ends."""

    def __init__(self, holder: KeyHolder, answers: int) -> None:
        self._holder: KeyHolder | None = holder
        self._answers = answers

    def end(self, completion_tokens: int) -> None:
        """Say how many tokens were generated; only the first call counts."""
        if self._holder is not None:
            self._holder.finish(self._answers, completion_tokens)
            self._holder = None


class _Allowance:
    """What is left of a limit per minute: a bucket that fills steadily, to a minute's worth.

    It may be overdrawn; then nothing is given until it has filled again.
    """

    def __init__(self, now: float) -> None:
        self._used = 0.0
        self._at = now

    def wait_s(self, per_minute: int | None, amount: float, now: float) -> float:
        """Return the seconds until there is so much; 0 when there is, or there is no limit."""
        if per_minute is None:
            self._used, self._at = 0.0, now
            return 0.0
        rate = per_minute / _MINUTE_S
        self._used = max(self._used - (now - self._at) * rate, 0.0)
        self._at = now
        return max((self._used + amount - per_minute) / rate, 0.0)

    def take(self, amount: float) -> None:
        self._used += amount


class KeyMetrics:
    """What each key has used; the labels are the names in the file."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        name = "fastserve_key"
        self._requests = Counter(f"{name}_requests", "Requests by key", ["key"], registry=registry)
        self._prompt = Counter(
            f"{name}_prompt_tokens", "Prompt tokens by key", ["key"], registry=registry
        )
        self._generated = Counter(
            f"{name}_generation_tokens", "Output tokens by key", ["key"], registry=registry
        )
        self._unfinished = Gauge(
            f"{name}_unfinished_answers", "Unfinished answers by key", ["key"], registry=registry
        )
        self._refused = Counter(
            f"{name}_refused", "Requests beyond a limit of their key", ["key", "limit"],
            registry=registry,
        )  # fmt: skip

    def begin(self, key: str) -> None:
        """Show a key before it is used."""
        for each in (self._requests, self._prompt, self._generated, self._unfinished):
            each.labels(key)
        for limit in _LIMITS:
            self._refused.labels(key, limit)

    def forget(self, key: str) -> None:
        """Take out a key that is in the file no more."""
        for each in (self._requests, self._prompt, self._generated, self._unfinished):
            each.remove(key)
        for limit in _LIMITS:
            self._refused.remove(key, limit)

    def admitted(self, key: str, prompt_tokens: int, unfinished: int) -> None:
        self._requests.labels(key).inc()
        self._prompt.labels(key).inc(prompt_tokens)
        self._unfinished.labels(key).set(unfinished)

    def finished(self, key: str, completion_tokens: int, unfinished: int) -> None:
        self._generated.labels(key).inc(completion_tokens)
        self._unfinished.labels(key).set(unfinished)

    def refused(self, key: str, limit: str) -> None:
        self._refused.labels(key, limit).inc()

    def render(self) -> str:
        return generate_latest(self._registry).decode()
