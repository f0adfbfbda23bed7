"""What can go wrong at a client. Each is one sentence for a person to read."""

from __future__ import annotations


class ClientError(Exception):
    """Base of all errors of the clients."""


class InvalidRequestError(ClientError, ValueError):
    """The request is wrong; sending it again will not help."""


class RequestIdInUseError(InvalidRequestError):
    """The request's id belongs to another request."""


class TokenizerUnavailableError(ClientError):
    """Text was given or asked for, and the tokenizer is not on this machine."""


class ServerBusyError(ClientError):
    """The server holds as many requests as it may; try again later.

    Args:
        message: one sentence.
        retry_after_s: when there will be room if nobody else comes, seconds; None: nobody knows.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerError(ClientError):
    """The server failed; nothing was wrong with the request."""


class SentAgainError(ServerError):
    """Says that the same request was sent again, and goes on there."""


class ServerUnavailableError(ClientError, ConnectionError):
    """The coordinator does not answer, or the client was closed."""
