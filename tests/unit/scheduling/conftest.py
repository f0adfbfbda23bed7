"""Every status a request takes in these tests is one that the table of transitions allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastserve_mega.scheduling.request import TRANSITIONS, Request, RequestStatus


class CheckedStatus:
    """Stands before the slot of `Request.status`, so that the product need not check."""

    def __init__(self, slot: Any) -> None:
        self._slot = slot

    def __get__(self, request: Request | None, owner: type) -> Any:
        return self if request is None else self._slot.__get__(request, owner)

    def __set__(self, request: Request, status: RequestStatus) -> None:
        try:
            before = self._slot.__get__(request)
        except AttributeError:  # it is being made
            allowed = frozenset({RequestStatus.WAITING})
        else:
            allowed = TRANSITIONS[before]
        if status not in allowed:
            raise RuntimeError(f"{request.request_id}: from {before.name} to {status.name}")
        self._slot.__set__(request, status)


@pytest.fixture(scope="session", autouse=True)
def transitions_are_those_of_the_table() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "status", CheckedStatus(Request.__dict__["status"]))
        yield
