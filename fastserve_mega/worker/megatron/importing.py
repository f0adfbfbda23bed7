"""Makes `import megatron.core` work and keep quiet, whatever else is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_STASH_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"
"""Triton kernels for training mixtures of experts, imported by everything from 0.18 on."""


_SPIN_COUNT = "1000"
"""Some tens of microseconds: about as long as the gap between two operations of a step."""


def limit_spinning() -> None:
    """Make idle OpenMP threads sleep soon; has an effect only before torch is first imported.

    They spin for milliseconds by default. As soon as anything else wants a core, the thread that
    has the work waits for the one that spins, in each of hundreds of operations: on two cores with
    a second busy process a decoding step took over a second, and takes 50 ms with this.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)


_KERNELS = "128"
"""More than one step needs, so that each layer finds those of the layer before."""


def limit_kernel_caches() -> None:
    """Keep fewer of oneDNN's kernels; has an effect only before torch is first imported.

    It generates and keeps one for each shape of a matrix product, and in serving there is no end of
    shapes. With its own limits, 1024 each in two caches, a rank grew by 1.1 GB in 1,500 steps; with
    these it grows by 0.15 GB in the first 100, and is no slower.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)
    os.environ.setdefault("LRU_CACHE_CAPACITY", _KERNELS)


def import_megatron() -> None:
    """Import Megatron-Core; its other modules may be imported as usual afterwards.

    Raises:
        ImportError: megatron-core is not installed, or not usable; the message is its own.
    """
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(_STASH_KERNELS, _stand_in_for_stash_kernels())
    with warnings.catch_warnings(), _without_compiler():
        # At import it warns that Transformer Engine and Apex are absent, which is fine here, and
        # of its own deprecated imports, which is nothing its users could change.
        warnings.simplefilter("ignore")
        for name in (
            "megatron.core.models.gpt.gpt_model",
            "megatron.core.models.gpt.gpt_layer_specs",
        ):
            importlib.import_module(name)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Leave functions as they are where `torch.compile` decorates them.

    Megatron has it for its fused functions, of which none is called here. To decorate them at
    import loads the whole compiler: 70 MB and seconds on each rank.
    """
    import torch

    def leave(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return function if function is not None else lambda function: function

    torch_compile = torch.compile
    torch.compile = leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = torch_compile


def _stand_in_for_stash_kernels() -> types.ModuleType:
    """Replaces that one module where Triton is missing, as on CPU builds of torch.

    A stand-in for `triton` itself would make torch believe that it can compile with it.
    """
    module = types.ModuleType(_STASH_KERNELS)
    kernels = ("paged_stash_copy_kernel", "paged_stash_pop_kernel")
    for kernel in kernels:
        setattr(module, kernel, None)
    module.__dict__["GLOBAL_BLOCK_SIZE"] = 1024
    return module
