"""A profile as a file: JSON, written by `fastserve-mega profile`, read for `scheduler.profile`."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from fastserve_mega.scheduling.cost_model import Profile
from fastserve_mega.strict import from_plain


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile; a file that was there is replaced as a whole.

    Raises:
        OSError: it cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(text + b"\n")
    os.replace(unfinished, path)


def load_profile(path: str | Path) -> Profile:
    """Read a profile; ~ is expanded.

    Raises:
        ValueError: it is not what `save_profile` writes; one sentence that names the file.
        OSError: it cannot be read.
    """
    try:
        return from_plain(msgspec.json.decode(Path(path).expanduser().read_bytes()), Profile)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
