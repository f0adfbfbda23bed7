"""Looks into a distributed checkpoint's `.metadata` before torch does.

Torch keeps there where each tensor lies, in a format that can name any function of any module and
have it called. So it is first read as a list of instructions, of which none is carried out.
"""

from __future__ import annotations

import pickletools
from typing import Any

_TORCH_CLASSES = {
    "filesystem": {"_StorageInfo", "_StoragePrefix"},
    "metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}  # fmt: skip
_DTYPES = {
    "bfloat16", "bool", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int16",
    "int32", "int64", "int8", "uint8",
}  # fmt: skip
_HARMLESS = {
    *(
        f"torch.distributed.checkpoint.{module} {name}"
        for module, names in _TORCH_CLASSES.items()
        for name in names
    ),
    *(f"torch {name}" for name in _DTYPES),
    "torch Size",
    "torch.serialization _get_layout",
    "megatron.core.dist_checkpointing.strategies.torch MCoreMetadata",
    "megatron.core.dist_checkpointing.strategies.torch MCoreSavePlan",
    "collections OrderedDict",
    "pathlib PosixPath",
    "pathlib._local PosixPath",
}
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_RECALLS = {"GET", "BINGET", "LONG_BINGET"}
_KEEPS = {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}
_NAMES_A_FUNCTION = {"INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}


def check_names(content: bytes) -> None:
    """Refuse what names anything but the classes that torch and Megatron write.

    Raises:
        ValueError: it does; or it is not what torch writes. The message has no file name.
    """
    last: list[str | None] = []
    """The strings that lie on top of the stack, as far as it is known."""
    memory: dict[int, str | None] = {}
    try:
        argument: Any
        for operation, argument, _ in pickletools.genops(content):
            name = operation.name
            if name in _STRINGS:
                last.append(argument)
            elif name in _RECALLS:
                last.append(memory.get(int(argument)))
            elif name in _KEEPS:
                at = len(memory) if name == "MEMOIZE" else int(argument)
                memory[at] = last[-1] if last else None
            else:
                if name == "STACK_GLOBAL":
                    _check(" ".join(str(word) for word in last[-2:]))
                elif name == "GLOBAL":
                    _check(argument)
                elif name in _NAMES_A_FUNCTION:
                    _check(f"{name} {argument}")
                last.clear()
    except (IndexError, TypeError, UnicodeDecodeError):
        raise ValueError("is not what torch writes") from None


def _check(name: str) -> None:
    if name not in _HARMLESS:
        raise ValueError(f"names {name.replace(' ', '.')!r}, which no checkpoint has need of")
