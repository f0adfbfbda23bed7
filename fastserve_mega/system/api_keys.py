"""The file of API keys: who may ask, for how much, and which secret shows it."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from fastserve_mega.records import PositiveInt, Record
from fastserve_mega.system.config_file import load_yaml

_SECRET_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile("[0-9a-f]{64}")
Weight = Annotated[float, Meta(ge=0.001, le=1000)]


class ApiKey(Record, frozen=True, kw_only=True):
    """One key. Limits that are not given are none."""

    name: str
    """What metrics and the scheduler call its owner."""
    sha256: str
    """Hash of the secret, in hexadecimal; a slower one is not needed for 256 random bits."""
    weight: Weight = 1.0
    """Its share of the server, in proportion to the weights of the others."""
    requests_per_minute: PositiveInt | None = None
    """HTTP requests that are answered with tokens."""
    tokens_per_minute: PositiveInt | None = None
    """Tokens of prompts and answers."""
    concurrency: PositiveInt | None = None
    """Unfinished answers."""
    most_urgent_priority: Annotated[int, Meta(ge=-1000, le=1000)] = -1000
    """The lowest `priority` that it may ask for, lower being sooner; above 0 it is the default."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                "the name of a key must be 1 to 64 letters, digits and . _ -, the first no "
                f"punctuation, got {self.name!r}"
            )
        if not _HASH.fullmatch(self.sha256):
            raise ValueError(
                f"sha256 of the key {self.name!r} must be 64 hexadecimal digits, "
                f"got {self.sha256[:80]!r}"
            )


class KeyFile(Record, frozen=True, kw_only=True):
    """All keys of a deployment."""

    keys: Annotated[tuple[ApiKey, ...], Meta(min_length=1, max_length=10_000)]

    def __post_init__(self) -> None:
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two keys have the {field} {twice}")


def read_key_file(path: Path) -> tuple[ApiKey, ...]:
    """Read the keys.

    Raises:
        ValueError: the file is not valid; one sentence with its name and the field.
        OSError: the file cannot be read.
    """
    try:
        return load_yaml(path, KeyFile).keys
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None


def hash_secret(secret: str) -> str:
    """Return what a key file has in place of a secret."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def draw_secret() -> str:
    """Return a new secret."""
    return f"fsm-{secrets.token_urlsafe(_SECRET_BYTES)}"
