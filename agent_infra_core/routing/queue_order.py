"""The order of waiting turns: least attained service, with aging. Pure."""

from __future__ import annotations

from collections import OrderedDict

AGING = 4.0  # one second of waiting counts as much as this many seconds of service received
SERVICE_HALF_LIFE_S = 60.0


class AttainedService:
    """Recent seconds of service per session, with a half-life; forgets the sessions unseen for longest."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        self._sessions: OrderedDict[str, tuple[float, float]] = OrderedDict()  # session → (seconds, as of)

    def charge(self, session: str, seconds: float, now: float) -> float:
        """Add ``seconds`` (negative: refund) to a session's service. Returns its service before that, as of ``now``."""
        had, at = self._sessions.pop(session, (0.0, now))
        had *= 0.5 ** ((now - at) / SERVICE_HALF_LIFE_S)
        self._sessions[session] = (max(0.0, had + seconds), now)
        if len(self._sessions) > self._limit:
            self._sessions.popitem(last=False)
        return float(had)


def queue_key(attained_s: float, arrived: float, queue_timeout_s: float) -> float:
    """Return a turn's sort key in the queue, lowest first: least attained service, reduced by waiting time.

    All waiting turns age at the same rate, so the order of two turns never changes and the key needs no clock:
    attained − AGING · (now − arrived) sorts like attained + AGING · arrived.  The attained service is capped at the
    aging of half the queue timeout, so no turn starves.
    """
    return min(attained_s, AGING * queue_timeout_s / 2) + AGING * arrived
