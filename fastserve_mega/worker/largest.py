"""The largest logit of each row: on CPUs in one pass over them and on one thread.

torch takes several passes, and its threads wait for each other as long as another process has
their cores.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastserve_mega.worker.native.library import NativeError, load_library


def find_largest(logits: Tensor) -> tuple[list[int], list[float]]:
    """Where each row of `logits` [rows, columns] has its largest value, and the value.

    The first one of several that are equal. A NaN is larger than anything.
    """
    rows, columns = logits.shape
    usable = logits.device.type == "cpu" and logits.dtype == torch.float32
    if not (usable and logits.is_contiguous()):
        return _by_torch(logits)
    try:
        library = load_library()
    except NativeError:
        return _by_torch(logits)
    tokens, values = (ctypes.c_int32 * rows)(), (ctypes.c_float * rows)()
    library.find_largest(logits.data_ptr(), rows, columns, tokens, values)
    return list(tokens), list(values)


def _by_torch(logits: Tensor) -> tuple[list[int], list[float]]:
    best = logits.argmax(dim=-1, keepdim=True)
    return best.squeeze(-1).tolist(), logits.gather(-1, best).squeeze(-1).tolist()
