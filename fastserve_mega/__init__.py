"""fastserve_mega: multi-node LLM serving on Megatron-Core with a skip-join MLFQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastserve_mega.client import AsyncClient, Client, RequestOptions
    from fastserve_mega.offline.llm import LLM
    from fastserve_mega.types import FinishReason, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "FinishReason",
    "RequestOptions",
    "SamplingParams",
    "__version__",
]

_HOME = {
    "LLM": "fastserve_mega.offline.llm",
    "AsyncClient": "fastserve_mega.client",
    "Client": "fastserve_mega.client",
    "FinishReason": "fastserve_mega.types",
    "RequestOptions": "fastserve_mega.client",
    "SamplingParams": "fastserve_mega.types",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the parts without zmq or torch stay without them."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
