"""What the sessions of clients were served; for policies that go by attained service."""

from __future__ import annotations

from collections import OrderedDict

from fastserve_mega.scheduling.request import Request

_MOST_REMEMBERED = 10_000
"""Sessions of which it is known what they were served."""
_FORGOTTEN_AFTER_S = 600.0
"""A session that was served nothing for so long begins anew."""


class Sessions:
    """The service that the requests of each session attained together.

    An agent asks again and again: each of its requests is short, and all together are long. So a
    request goes by what its session was served before it (least attained service per program,
    Autellix, arXiv 2502.13965). Sessions are those of one client: nobody can be taken for another.
    """

    def __init__(self) -> None:
        self._served: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        """Seconds of service, and when the last of them was; the last served is last."""

    def __len__(self) -> int:
        return len(self._served)

    def attained_s(self, request: Request, now: float) -> float:
        """Return what the session of a request was served; 0 without a session."""
        if not request.session:
            return 0.0
        served_s, last_s = self._served.get((request.share.name, request.session), (0.0, now))
        return served_s if now - last_s <= _FORGOTTEN_AFTER_S else 0.0

    def serve(self, request: Request, seconds: float, now: float) -> None:
        """Count service of a request for its session, if it has one."""
        if not request.session:
            return
        served_s = self.attained_s(request, now) + seconds
        key = request.share.name, request.session
        self._served[key] = served_s, now
        self._served.move_to_end(key)
        if len(self._served) > _MOST_REMEMBERED:
            self._served.popitem(last=False)
