"""The key pair of the clients' port: the coordinator needs both keys, clients the public one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastserve_mega.system.config import CoordinatorConfig

_KEY_CHARACTERS = 40
"""A CURVE key in Z85 has so many."""


@dataclass(frozen=True, slots=True)
class PortKeys:
    """Who has the public key may connect; who has the secret one is taken for the coordinator."""

    public: str
    secret: str | None
    """None in the file that clients get."""


def read_key_file(path: str) -> PortKeys:
    """Read what `write_key_files` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file.
    """
    lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    keys = dict(line.split(" ", 1) for line in lines if " " in line)
    if not set(keys) <= {"public", "secret"} or len(keys.get("public", "")) != _KEY_CHARACTERS:
        raise ValueError(
            f"{path} is not a file of `fastserve-mega keygen` (coordinator.client_key_file)"
        )
    return PortKeys(keys["public"], keys.get("secret"))


def write_key_files(path: Path, keys: PortKeys) -> Path:
    """Write a file for the coordinator, which only its owner can read, and one for clients.

    Returns:
        The one for clients.

    Raises:
        OSError: one of them exists, or cannot be written.
    """
    for_clients = path.with_name(f"{path.name}.pub")
    for target, text in (
        (path, f"public {keys.public}\nsecret {keys.secret}\n"),
        (for_clients, f"public {keys.public}\n"),
    ):
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    return for_clients


def client_address(options: CoordinatorConfig) -> str:
    """Where clients connect: the endpoint, and behind a space the key if there is one.

    Raises:
        OSError, ValueError: see `read_key_file`.
    """
    if options.client_key_file is None:
        return options.client_endpoint
    return f"{options.client_endpoint} {read_key_file(options.client_key_file).public}"


def coordinator_key(options: CoordinatorConfig) -> bytes | None:
    """The secret key of the clients' port; None when everybody may connect.

    Raises:
        OSError, ValueError: see `read_key_file`; or it is the file for clients.
    """
    if options.client_key_file is None:
        return None
    secret = read_key_file(options.client_key_file).secret
    if secret is None:
        raise ValueError(
            f"{options.client_key_file} is the file for clients; the coordinator needs the one "
            "with the secret key (coordinator.client_key_file)"
        )
    return secret.encode()
