"""A profile as a file: JSON, written by `fastserve-mega profile`, read for `scheduler.profile`."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from fastserve_mega.records import explain
from fastserve_mega.scheduling.cost_model import Profile


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
    for name in profile.__struct_fields__:
        value = getattr(profile, name)
        if isinstance(value, Profile):
            text = _one_point_a_line(value, f"{indent} ")
        elif isinstance(value, tuple) and value:
            points = f",\n{indent}  ".join(_on_one_line(point) for point in value)
            text = f"[\n{indent}  {points}\n{indent} ]"
        else:
            text = _on_one_line(value)
        sections.append(f'{indent} "{name}": {text}')
    return "{\n" + ",\n".join(sections) + f"\n{indent}}}"


def _on_one_line(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def load_profile(path: str | Path) -> Profile:
    """Read a profile; ~ is expanded.

    Raises:
        ValueError: it is not what `save_profile` writes; one sentence that names the file.
        OSError: it cannot be read.
    """
    text = Path(path).expanduser().read_bytes()
    try:
        return msgspec.json.decode(text, type=Profile)
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: {explain(error, msgspec.json.decode(text), Profile)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
