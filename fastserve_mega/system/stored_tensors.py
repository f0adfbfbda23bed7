"""Which tensors the safetensors files of a directory hold, and whether a model is made of them.

No torch here: what is wrong is known before any rank is started.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastserve_mega.models.architecture import Architecture
from fastserve_mega.system.config import ParallelConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.system.pieces import Piece
from fastserve_mega.system.weights import weights_of

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
KIND_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
"""Kinds of values that are weights, by their names in a file's header, and the size of one."""
_LFS_POINTER = b"version "
"""How it begins."""
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_TEXT_PREFIXES = {"model.language_model.": "model.", "language_model.": ""}
"""How names begin in models that see images as well, and in the text model alone."""
_FUSED_EXPERTS = ".experts.gate_up_proj"


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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    path: Path
    offset: int
    """Byte of the file at which its values start, row by row."""
    shape: tuple[int, ...]
    kind: str
    """Type of its values, as the file has it: F32, BF16, …"""

    @property
    def item_bytes(self) -> int:
        """Size of a value.

        Raises:
            ValueError: weights of this kind cannot be computed with here.
        """
        if self.kind not in KIND_BYTES:
            raise ValueError(
                f"{self.path} holds weights as {self.kind}; supported are {', '.join(KIND_BYTES)}"
            )
        return KIND_BYTES[self.kind]

    def as_table(self) -> StoredTensor:
        """Return the same values with two axes at most."""
        if len(self.shape) <= 2:
            return self
        shape = (math.prod(self.shape[:-1]), self.shape[-1])
        return dataclasses.replace(self, shape=shape)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.item_bytes


def check_tensors(directory: Path, architecture: Architecture) -> None:
    """See that a model's weights are there, whole, and as large as they should be.

    Those of Megatron's checkpoints are not looked at: that takes torch.

    Raises:
        ValueError: a file or tensor is missing, cut short or has another shape; one sentence.
    """
    if not has_safetensors(directory) and any(directory.rglob("*.distcp")):
        return
    tensors = read_tensors(directory)
    partition = partition_model(architecture, ParallelConfig(), 0, 1)
    for weight in weights_of(architecture, partition, fused_experts=has_fused_experts(tensors)):
        for piece in weight.pieces:
            if (name := find_tensor(tensors, piece, directory)) is not None:
                _ = tensors[name].item_bytes


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors by the names that they have in a model of text alone.

    All headers are read and all sizes checked at once, so that nothing is found missing after
    minutes of loading.

    Raises:
        ValueError: a file is missing, cut short or malformed; one sentence names it.
    """
    found: dict[str, StoredTensor] = {}
    for path in find_files(directory):
        for name, tensor in _read_header(path).items():
            found[_text_name(name)] = tensor
    return found


def has_fused_experts(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether all experts of a layer are in two tensors."""
    return any(name.endswith(_FUSED_EXPERTS) for name in tensors)


def find_tensor(tensors: Mapping[str, StoredTensor], piece: Piece, directory: Path) -> str | None:
    """The name of the tensor that a piece is of, None for an optional one that is not there.

    Raises:
        ValueError: it is not there, or has another shape.
    """
    bare = piece.tensor not in tensors and piece.bare_name in tensors
    name = piece.bare_name if bare else piece.tensor
    if name not in tensors:
        if piece.optional:
            return None
        raise ValueError(f"the checkpoint {directory} has no tensor {name}")
    if tensors[name].shape != piece.shape:
        raise ValueError(
            f"the checkpoint's {name} has shape {tensors[name].shape}, config.json implies "
            f"{piece.shape}"
        )
    return name


def _text_name(name: str) -> str:
    for prefix, text_prefix in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return text_prefix + name.removeprefix(prefix)
    return name


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of a file, once it is known to be whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin_bytes = file.read(8)
        if begin_bytes == _LFS_POINTER:
            raise ValueError(
                f"{path} is a pointer of Git LFS and not the file itself; fetch it by git lfs pull"
            )
        length = int.from_bytes(begin_bytes, "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: not a safetensors file")
        begin = 8 + length
        _check_size(path, size, begin)
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((begin + entry["data_offsets"][1] for entry in header.values()), default=0)
            _check_size(path, size, end)
            return {name: _stored(path, begin, entry) for name, entry in header.items()}
        except (KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError):
            raise ValueError(f"{path}: not a safetensors file: its header is malformed") from None
        except json.JSONDecodeError:
            raise ValueError(f"{path}: not a safetensors file: its header is no JSON") from None


def _check_size(path: Path, size: int, wanted: int) -> None:
    if size < wanted:
        raise ValueError(
            f"{path} is cut short: {wanted - size} of its {wanted} bytes are missing; "
            f"was the download interrupted?"
        )


def _stored(path: Path, begin: int, entry: dict[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    stored = StoredTensor(path, begin + start, tuple(entry["shape"]), entry["dtype"])
    # A kind that is not known is an error only where somebody asks for it.
    if stored.kind in KIND_BYTES and math.prod(stored.shape) * stored.item_bytes != end - start:
        raise ValueError(
            f"{path}: {end - start} bytes for a tensor {stored.kind} of shape {list(stored.shape)}"
        )
    return stored
