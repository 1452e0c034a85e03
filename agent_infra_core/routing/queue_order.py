"""Which waiting turn goes next: least attained service, with aging. Pure."""

from __future__ import annotations

from collections import OrderedDict

AGING = 4.0  # a second of waiting outweighs this many seconds of service that a session has had
SERVICE_HALF_LIFE_S = 60.0


class AttainedService:
    """Seconds of service that each session had lately, with a half-life; forgets the longest unseen."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        self._sessions: OrderedDict[str, tuple[float, float]] = OrderedDict()  # session → (seconds, as of)

    def charge(self, session: str, seconds: float, now: float) -> float:
        """Add ``seconds`` (negative: give back) to what ``session`` had; return what that was before, at ``now``."""
        had, at = self._sessions.pop(session, (0.0, now))
        had *= 0.5 ** ((now - at) / SERVICE_HALF_LIFE_S)
        self._sessions[session] = (max(0.0, had + seconds), now)
        if len(self._sessions) > self._limit:
            self._sessions.popitem(last=False)
        return float(had)


def queue_key(attained_s: float, arrived: float, queue_timeout_s: float) -> float:
    """Place in the queue, lowest first: least attained service, aged by waiting.

    Every waiting turn ages at the same rate, so the order of two turns never changes and the key needs no clock:
    attained − AGING · (now − arrived) sorts like attained + AGING · arrived.  What a session has attained counts for
    at most half of the queue timeout's aging, so that no turn starves.
    """
    return min(attained_s, AGING * queue_timeout_s / 2) + AGING * arrived
