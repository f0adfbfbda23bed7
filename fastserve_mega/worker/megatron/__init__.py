"""Megatron-Core behind the ModelRunner contract. Only modules of this package import megatron."""

from fastserve_mega.worker.megatron.importing import (
    import_megatron,
    limit_kernel_caches,
    limit_spinning,
)

limit_spinning()
limit_kernel_caches()
import_megatron()
