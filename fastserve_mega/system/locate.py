"""Finds a model: its directory, from the Hugging Face hub if need be, and its description."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from msgspec import structs

from fastserve_mega.models.architecture import Architecture, load_architecture
from fastserve_mega.system.config import Config, ModelConfig
from fastserve_mega.system.stored_tensors import find_files

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""organization/name."""
_DESCRIPTION = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
"""What the coordinator and the HTTP server need: architecture and tokenizer."""
_TOKENIZER_FILES = ("tokenizer", "vocab")
_WEIGHTS = ["*.safetensors"]

Download = Callable[..., str]
"""huggingface_hub.snapshot_download, or a stand-in for it."""


def resolve_model(
    model: ModelConfig, *, weights: bool, download: Download | None = None
) -> ModelConfig:
    """Return the model with the path of a local directory; done once, when a process starts.

    A name like `Qwen/Qwen2.5-0.5B` that is no directory is looked up in the cache of
    huggingface_hub. What is there in whole is used as it is, without a look at the network; else
    it is downloaded to there.

    Args:
        model: as configured.
        weights: whether they are needed too, and not only configuration and tokenizer.
        download: in place of huggingface_hub's; for tests.

    Raises:
        ValueError: it is no directory, and the hub cannot be reached or does not have it.
    """
    if model.directory.is_dir() or not _HUB_NAME.fullmatch(model.path):
        return model
    if download is None:
        from huggingface_hub import snapshot_download

        download = snapshot_download
    directory = _cached(model.path, download, weights=weights)
    if directory is None:
        patterns = _DESCRIPTION + _WEIGHTS if weights else _DESCRIPTION
        try:
            directory = Path(download(model.path, allow_patterns=patterns))
        except Exception as error:
            # Of many kinds, those of the HTTP library below it included.
            raise ValueError(
                f"model.path {model.path!r} is neither a directory nor could it be fetched from "
                f"the hub: {_first_line(error)}"
            ) from None
    return structs.replace(model, path=str(directory), served_name=model.name)


def find_architecture(config: Config, config_file: Path) -> tuple[Architecture, Path]:
    """The model's config.json: at model.path, or else beside the configuration file.

    Returns:
        The architecture, and the directory it was found in: `architectures/NAME` beside the file
        has it for models that are not on this machine yet.

    Raises:
        ValueError: it is in neither place, or not usable.
    """
    directory = config.model.directory
    beside = config_file.parent / "architectures" / config.model.name
    if not (directory / "config.json").is_file() and (beside / "config.json").is_file():
        directory = beside
    try:
        return load_architecture(directory), directory
    except ValueError as error:
        if directory.is_dir():
            raise
        raise ValueError(f"{error}, and there is no {beside / 'config.json'}") from None


def has_tokenizer(directory: Path) -> bool:
    """Whether a model's directory has files of a tokenizer, of whatever kind."""
    return any(path.name.startswith(_TOKENIZER_FILES) for path in directory.iterdir())


def _cached(name: str, download: Download, *, weights: bool) -> Path | None:
    try:
        directory = Path(download(name, local_files_only=True))
    except Exception:
        return None  # it has many ways to say that there is none
    described = (directory / "config.json").is_file() and has_tokenizer(directory)
    return directory if described and (not weights or _has_all_weights(directory)) else None


def _has_all_weights(directory: Path) -> bool:
    try:
        find_files(directory)
    except (OSError, ValueError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
