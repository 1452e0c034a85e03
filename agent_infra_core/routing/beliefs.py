"""What the router believes about replicas' prefix caches. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

RESTART_SHARE = 0.5  # a prefix that is gone while less of the cache is in use was lost in a restart, not evicted
MAX_WARM_PREFIXES = 256  # remembered per replica
WARM_SHARE = 0.25  # of the room, that shared prefixes may take
SPEED_TURNS = 100.0  # over which a replica's speed is averaged
REGAIN_SHARE = 0.01  # of the room that a miss has shown to be taken, regained with each turn


@dataclass(slots=True)
class SessionPlace:
    """Where a session's prefix should be cached, and how much of it."""

    home: ReplicaBelief
    context: int = 0  # tokens of its last prompt and answer
    shared: int = 0  # of these, tokens that other sessions have, too
    cached: int = 0  # tokens believed to be cached on its home
    used_at: float = -math.inf  # when its last turn ended, or its first was sent
    in_flight: int = 0
    is_live: bool = False
    is_over: bool = False


@dataclass(slots=True, eq=False)
class ReplicaBelief:
    """What the router knows about a replica beyond the replica's own reports.

    It keeps a model of the prefix cache: the contexts in it by their last use, of which the first is evicted first. If
    the capacity is unknown, nothing is evicted until an answer shows that it was.
    """

    ready_at: float = 0.0  # clock time when the prefill work sent so far should be done
    sent_tokens: int = 0  # to be prefilled, since the start
    prefilled_tokens: int = 0  # of these, those that are done for sure
    live_tokens: int = 0  # contexts of the sessions that live here; reserved at the choice
    running_tokens: int = 0  # prompts of the turns in flight
    slowness: float = 1.0  # its seconds per unit of work, over the fleet's
    measured_s: float = 100.0  # decayed sums over its turns: their seconds, and what the fit predicts for them
    predicted_s: float = 100.0
    measured_at: float = -math.inf
    kv_tokens: float = 0.0  # capacity of the cache; 0 = unknown
    room_tokens: float = 0.0  # capacity, less what misses have shown to be taken by others; 0 = unknown
    used_tokens: int = 0  # of the cache; a shared prefix counts once
    cached: OrderedDict[str, SessionPlace] = field(default_factory=OrderedDict)
    warm: dict[Hashable, int] = field(default_factory=dict)  # shared prefixes that should be cached → tokens
    warm_tokens: int = 0  # their sum

    def measure(self, seconds: float, predicted_s: float) -> None:
        """Compare a turn's time with what the fleet's rates predict for it."""
        self.measured_s += seconds - self.measured_s / SPEED_TURNS
        self.predicted_s += predicted_s - self.predicted_s / SPEED_TURNS
        self.slowness = self.measured_s / self.predicted_s

    def note_prefilled(self, tokens: int, prefill_s: float, now: float) -> None:
        """A turn is over, so the first ``tokens`` that were sent are prefilled: the rest is what may still wait."""
        self.prefilled_tokens = max(self.prefilled_tokens, tokens)
        rest_s = (self.sent_tokens - self.prefilled_tokens) * prefill_s * self.slowness
        self.ready_at = min(self.ready_at, now + rest_s)

    def warm_up(self, prefix: Hashable, tokens: int) -> None:
        """A shared prefix is used; those that were unused for longest are forgotten first."""
        grown = tokens - self.warm.pop(prefix, 0)
        self.warm[prefix] = tokens
        self.used_tokens += grown
        self.warm_tokens += grown
        most = WARM_SHARE * self.room_tokens or math.inf
        while len(self.warm) > 1 and (self.warm_tokens > most or len(self.warm) > MAX_WARM_PREFIXES):
            self._cool(next(iter(self.warm)))

    def _cool(self, prefix: Hashable) -> None:
        """A shared prefix isn't cached any more."""
        tokens = self.warm.pop(prefix)
        self.used_tokens -= tokens
        self.warm_tokens -= tokens

    def keep(self, session: str, place: SessionPlace, context: int, shared: int) -> None:
        """A session's whole context is cached now; what doesn't fit any more was evicted."""
        if self.cached.get(session) is place:
            self.used_tokens -= place.context - place.shared
            self.cached.move_to_end(session)
        else:
            self.drop(session)  # an ended session of this name
            self.cached[session] = place
        place.context = place.cached = context
        place.shared = shared
        self.used_tokens += context - shared
        if self.room_tokens and self.used_tokens > self.room_tokens:
            self._evict(session)

    def _evict(self, kept: str) -> None:
        excess, evicted = self.used_tokens - self.room_tokens, []
        for session, place in self.cached.items():
            if excess <= 0:
                break
            if not place.in_flight and session != kept:
                excess -= place.context - place.shared
                evicted.append(session)
        for session in evicted:
            self.drop(session)

    def drop(self, session: str) -> None:
        """A session's own context isn't cached any more."""
        place = self.cached.pop(session, None)
        if place is not None:
            self.used_tokens -= place.context - place.shared
            place.cached = 0

    def note_miss(self, used_at: float, sent: float) -> None:
        """A prefix last used at ``used_at`` wasn't found by a turn sent at ``sent``: what was used before is gone, too.

        After a restart everything is gone. After an eviction, something unknown takes the room.
        """
        if self.room_tokens and self.used_tokens < RESTART_SHARE * self.room_tokens:
            return self.forget(sent)
        self.forget(used_at)
        if self.room_tokens:
            self.room_tokens = max(self.used_tokens, self.room_tokens / 2)
        return None

    def note_hit(self) -> None:
        """A prefix was found: give back some of the room that misses have taken from the capacity."""
        if self.room_tokens < self.kv_tokens:
            self.room_tokens += REGAIN_SHARE * (self.kv_tokens - self.room_tokens)

    def forget(self, used_until: float) -> None:
        """What was last used up to a moment isn't cached any more."""
        for session, place in list(self.cached.items()):
            if place.used_at <= used_until and not place.in_flight:
                self.drop(session)

    def clear(self) -> None:
        """Nothing is cached any more."""
        for session in list(self.cached):
            self.drop(session)
        for prefix in list(self.warm):
            self._cool(prefix)

    def would_evict(self, tokens: float, since: float) -> bool:
        """Whether so many new tokens would evict a context that was used after ``since``. What never fits evicts none
        that it could wait for."""
        free = self.room_tokens - self.used_tokens
        if not free < tokens <= self.room_tokens:
            return False
        for place in self.cached.values():
            if tokens <= free:
                return False
            if not place.in_flight:
                if place.used_at > since:
                    return True
                free += place.context - place.shared
        return tokens > free
