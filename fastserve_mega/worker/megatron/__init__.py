"""Megatron-Core behind the ModelRunner contract. Only modules of this package import megatron."""

from fastserve_mega.worker.megatron.importing import import_megatron, limit_spinning

limit_spinning()
import_megatron()
