"""Megatron-Core behind the ModelRunner contract. Only modules of this package import megatron."""

from fastserve_mega.worker.megatron.importing import import_megatron

import_megatron()
