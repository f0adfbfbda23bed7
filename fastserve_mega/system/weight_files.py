"""Which files of a directory hold its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OTHER_WEIGHTS = {
    "adapter_model.*": "an adapter, to be merged into its base model first",
    "consolidated*.safetensors": "weights under Mistral's own names; fetch those of transformers",
    "*.safetensors": f"a part, of which {INDEX_FILE} has to name the others, or a variant, to be "
    "renamed",
    "pytorch_model*.bin": "pickled weights, which can run code; convert them where you trust them: "
    "AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY) of transformers",
    "*.gguf": "quantized weights of llama.cpp, which are not supported",
    "*.pth": "weights under other names, to be converted by the script of their family first",
}
"""Files that a directory may have in place of ours, and what to do with them."""


def has_safetensors(directory: Path) -> bool:
    """Whether there are weights in this format, be they whole or not."""
    return (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file()


def find_files(directory: Path) -> Iterable[Path]:
    """The single file where there is one: an index beside it is ignored, as transformers does.

    Raises:
        ValueError: there are none, or not all that the index names; one sentence.
    """
    index_path = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    for path in (directory / SINGLE_FILE, index_path):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to a file that is not there; fetch the model again")
    if not index_path.is_file():
        raise ValueError(
            f"{directory} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there"
            f"{_advice(directory)}"
        )
    try:
        names = sorted({*json.loads(index_path.read_text())["weight_map"].values()})
        files = [directory / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index_path}: not a valid index of safetensors files") from None
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(
            f"{directory}: {len(missing)} of the files named in {INDEX_FILE} are "
            f"missing, the first is {missing[0]}"
        )
    return files


def _advice(directory: Path) -> str:
    """What to do with weights of another kind, where there are any."""
    for pattern, advice in _OTHER_WEIGHTS.items():
        if found := sorted(path.name for path in directory.glob(pattern)):
            return f", but {found[0]}: {advice}"
    return ""
