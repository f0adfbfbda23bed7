"""ZeroMQ clients of the coordinator: `AsyncClient` for asyncio, `Client` for other programs."""

from fastserve_mega.client.async_client import AsyncClient
from fastserve_mega.client.errors import (
    ClientError,
    InvalidRequestError,
    RequestIdInUseError,
    SentAgainError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
    TokenizerUnavailableError,
)
from fastserve_mega.client.generation import AsyncGeneration, Chunk
from fastserve_mega.client.options import RequestOptions
from fastserve_mega.client.sync_client import Client, Generation

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "Chunk",
    "Client",
    "ClientError",
    "Generation",
    "InvalidRequestError",
    "RequestIdInUseError",
    "RequestOptions",
    "SentAgainError",
    "ServerBusyError",
    "ServerError",
    "ServerUnavailableError",
    "TokenizerUnavailableError",
]
