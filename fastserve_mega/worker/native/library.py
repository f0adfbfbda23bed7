"""Loads the C++ library and declares its functions. No torch here.

`stage.h` and `stage.cpp` have the other side of each structure, number and function.
"""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum
from pathlib import Path


class NativeError(RuntimeError):
    """The library is not there, or cannot be used; the message is one sentence."""


class InstructionSet(IntEnum):
    """What the kernels were compiled for; the best one that the machine has is used."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3

    @property
    def title(self) -> str:
        """As in a log line."""
        return _TITLES[self]


_TITLES = {
    InstructionSet.PORTABLE: "portable instructions",
    InstructionSet.AVX2: "AVX2",
    InstructionSet.AVX512: "AVX-512",
    InstructionSet.AVX512_BF16: "AVX-512 with bfloat16",
}


class MatrixName(IntEnum):
    """A layer's matrices; of the layer behind the last, OUTPUT."""

    QKV = 0
    PROJECTION = 1
    FC1 = 2
    FC2 = 3
    OUTPUT = 0


class VectorName(IntEnum):
    """A layer's vectors: weights of norms, whose biases have the next number, and biases."""

    INPUT_NORM = 0
    FEED_FORWARD_NORM = 2
    POST_ATTENTION_NORM = 4
    POST_FEED_FORWARD_NORM = 6
    QUERY_NORM = 8
    KEY_NORM = 10
    QKV_BIAS = 12
    PROJECTION_BIAS = 13
    FC1_BIAS = 14
    FC2_BIAS = 15
    FINAL_NORM = 0


_I, _P, _F = ctypes.c_int32, ctypes.c_void_p, ctypes.c_float

GatherFunction = ctypes.CFUNCTYPE(ctypes.c_int, _P, _P, ctypes.c_int64)
"""Gathers that many floats from one address of each rank to another one; not 0 on failure."""


AskFunction = ctypes.CFUNCTYPE(ctypes.c_int32)
"""Gives a Verdict on the step that is being computed."""


class StageConfig(ctypes.Structure):
    """What a stage looks like; all sizes are those of this rank."""

    _fields_ = (
        *(
            (name, _I)
            for name in (
                "instruction_set",
                "threads",
                "dtype",
                "layers",
                "hidden",
                "feed_forward",
                "kv_heads",
                "group",
                "head_dim",
                "block_size",
                "vocabulary",
                "norm",
                "activation",
                "gated",
                "ropes",
                "first",
                "last",
                "ranks",
                "first_token",
                "has_byte_weights",
                "norms_whole_projection",
            )
        ),
        ("norm_epsilon", _F),
        ("attention_scale", _F),
        ("attention_softcap", _F),
        ("embedding_scale", _F),
        ("residual_scale", _F),
        ("weight_bytes", ctypes.c_int64),
        ("pool", _P),
        ("gather", GatherFunction),
    )


class StepInput(ctypes.Structure):
    """Sizes of a step, and where its arrays are."""

    _fields_ = (
        *((name, _I) for name in ("tokens", "sequences", "samples", "max_context")),
        *(
            (name, _P)
            for name in (
                "token_ids",
                "positions",
                "slots",
                "first_row",
                "rows",
                "start",
                "table_at",
                "tables",
                "sample_rows",
                "hidden_in",
                "hidden_out",
                "logits",
                "normed",
            )
        ),
        ("ask", AskFunction),
    )


_SIGNATURES = {
    "best_instruction_set": (ctypes.c_int, ()),
    "config_bytes": (_I, ()),
    "create": (_P, (ctypes.POINTER(StageConfig),)),
    "destroy": (None, (_P,)),
    "set_matrix": (ctypes.c_int, (_P, _I, _I, _P, _I, _I)),
    "set_vector": (ctypes.c_int, (_P, _I, _I, _P, _I)),
    "set_attention": (None, (_P, _I, _I, _I)),
    "set_rope": (None, (_P, _I, _P, _I, _F)),
    "set_tables": (None, (_P, _P, _P)),
    "step": (ctypes.c_int, (_P, ctypes.POINTER(StepInput))),
    "find_largest": (None, (_P, _I, _I, _P, _P)),
}


class Library:
    """The functions of the shared library at `path`.

    Raises:
        NativeError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeError(f"{path.name} cannot be loaded: {error}") from None
        another = NativeError(f"{path.name} is of another version: install again")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"fastserve_{name}", None)
            if function is None:
                raise another
            function.restype, function.argtypes = result, list(arguments)
        if library.fastserve_config_bytes() != ctypes.sizeof(StageConfig):
            raise another
        self.create = library.fastserve_create
        self.destroy = library.fastserve_destroy
        self.set_matrix = library.fastserve_set_matrix
        self.set_vector = library.fastserve_set_vector
        self.set_attention = library.fastserve_set_attention
        self.set_rope = library.fastserve_set_rope
        self.set_tables = library.fastserve_set_tables
        self.step = library.fastserve_step
        self.find_largest = library.fastserve_find_largest
        self.best_instruction_set = InstructionSet(library.fastserve_best_instruction_set())


def library_path() -> Path:
    """Where the build puts the library, whether it is there or not."""
    return Path(__file__).with_name("_stage.so")


@functools.cache
def load_library() -> Library:
    """Load the library once.

    Raises:
        NativeError: it was not built, or cannot be loaded.
    """
    path = library_path()
    if not path.exists():
        raise NativeError("it was not built: install fastserve_mega where there is a C++ compiler")
    return Library(path)
