"""Makes `import megatron.core` work and keep quiet, whatever else is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings

_STASH_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"
"""Triton kernels for training mixtures of experts, imported by everything from 0.18 on."""


def import_megatron() -> None:
    """Import Megatron-Core; its other modules may be imported as usual afterwards.

    Raises:
        ImportError: megatron-core is not installed, or not usable; the message is its own.
    """
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(_STASH_KERNELS, _stand_in_for_stash_kernels())
    with warnings.catch_warnings():
        # At import it warns that Transformer Engine and Apex are absent, which is fine here, and
        # of its own deprecated imports, which is nothing its users could change.
        warnings.simplefilter("ignore")
        for name in (
            "megatron.core.models.gpt.gpt_model",
            "megatron.core.models.gpt.gpt_layer_specs",
        ):
            importlib.import_module(name)


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
