"""A profile as a file: JSON, written by `fastserve-mega profile`, read for `scheduler.profile`."""

from __future__ import annotations

import dataclasses
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
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(_one_point_a_line(profile) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _one_point_a_line(profile: Profile, indent: str = "") -> str:
    """Fully indented, the contexts of a mixed step alone would take a screen."""
    sections = []
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        if isinstance(value, Profile):
            text = _one_point_a_line(value, f"{indent} ")
        elif isinstance(value, tuple) and value:
            points = f",\n{indent}  ".join(_on_one_line(point) for point in value)
            text = f"[\n{indent}  {points}\n{indent} ]"
        else:
            text = _on_one_line(value)
        sections.append(f'{indent} "{field.name}": {text}')
    return "{\n" + ",\n".join(sections) + f"\n{indent}}}"


def _on_one_line(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


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
