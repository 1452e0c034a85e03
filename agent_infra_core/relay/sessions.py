"""Sessions as the relay routes them: which one a turn belongs to, and which replica has its prefix cached."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agent_infra_core.http.events import NO_DIGEST
from agent_infra_core.protocol import Conversations
from agent_infra_core.relay.replicas import LiveReplica
from agent_infra_core.routing.affinity import (
    LONGEST_HOLD_S,
    MIN_EVIDENCE_TOKENS,
    Placement,
    SessionRouter,
    SessionTurn,
)
from agent_infra_core.routing.strategies import RouteRequest

if TYPE_CHECKING:
    from agent_infra_core.relay.book import Turn
    from agent_infra_core.relay.server import Relay

HELD_RESPONSES = 50_000  # answers of /v1/responses remembered, for the requests that continue them by their id
HELD_PROMPTS = 50_000  # remembered, for the sessions that begin with one of them
MOST_ADDED = 32  # messages that the first prompt of such a session adds to it
PRINT_BYTES = 4  # of each message in a turn's ``prints``, after as many of what stands before them
NO_PARENT: tuple[str | None, int] = (None, 0)


class SessionRoutes:
    """Owns the session routers of all models, and what conversations are known by.

    A session that its client names is known by that name. Otherwise a turn belongs to the session whose answer it
    continues, as in the controller's tracking. A client library's retry of the same body is the same turn. A session
    whose first prompt begins with all of an earlier prompt is a fork: a sub-agent that was given its parent's context.
    """

    def __init__(self, relay: Relay, random_source: random.Random) -> None:
        self._relay, self._random = relay, random_source
        self._routers: dict[str, SessionRouter] = {}
        self._holds = True
        self._conversations = Conversations()
        self._responses: OrderedDict[str, tuple[str | None, str]] = OrderedDict()  # id → session, who holds it
        self._prompts: OrderedDict[int, tuple[str, int]] = OrderedDict()  # prints → session that sent it last, tokens
        self._tokens_per_guess = 1.0  # decayed mean: prompt tokens over those guessed from a body's size

    def identify(self, turn: Turn, prefix: bytes, prefix_bytes: int) -> None:
        """Find the session of a turn that was read. ``prefix`` identifies its tools and system prompt."""
        session = turn.session
        if session is None and turn.follows is not None:
            session = self._follow(turn, turn.follows)
        if session is not None:
            tokens = self._tokens_per_guess
            shared = int(prefix_bytes / 4 * tokens)
            prompt = int(turn.tokens * tokens) or 1
            place, parent = self._router(turn.model).find(session), NO_PARENT
            if place is None:
                parent = self._parent_of(turn.prints)
            elif turn.route.holder:
                prompt += place.context  # the holder knows it already
            if turn.prints:
                self._prompts[hash(turn.prints)] = session, prompt
                if len(self._prompts) > HELD_PROMPTS:
                    self._prompts.popitem(last=False)
            turn.routed = SessionTurn(session, prompt, *parent, prefix if shared else None, shared)

    def _parent_of(self, prints: bytes) -> tuple[str | None, int]:
        """Return the session whose prompt a new session's first one begins with, and that prompt's tokens."""
        size = PRINT_BYTES
        for end in range(len(prints) - size, max(size, len(prints) - (MOST_ADDED + 1) * size), -size):
            if (found := self._prompts.get(hash(prints[:end]))) is not None:
                return found
        return NO_PARENT

    def find_holder(self, turn: Turn, response: str) -> None:
        """A turn continues an answer of /v1/responses by its id: its session is that one's, and its replica the one
        that keeps the answer."""
        session, holder = self._responses.get(response, (None, None))
        turn.session = turn.session or session
        turn.follows = "" if turn.session is None else None
        turn.route = RouteRequest(holder=holder or "")

    def _follow(self, turn: Turn, follows: str) -> str:
        """Find the session whose answer a turn continues; a new one if another turn continues it already."""
        if turn.labels.is_retry and turn.prints:
            session = self._conversations.retried(None, turn.prints, follows, turn.arrived)
            if session is not None:
                return session
        return self._conversations.session_of(turn.id, None, follows) or turn.id

    def choose(self, turn: Turn, routed: SessionTurn, pool: Sequence[LiveReplica], now: float) -> LiveReplica | None:
        """Return the replica for a turn of a session, its work reserved there; None if none may take it, or the turn
        does better to wait."""
        router, excluded = self._router(turn.model), turn.route.excluded_at(now)
        replica = router.choose(pool, routed, now, now - turn.arrived, excluded)
        if replica is not None:
            turn.placement = router.place(replica, routed, now, turn.arrived)
        return replica

    def give_up(self, turn: Turn, now: float) -> None:
        """The replica of a turn that was placed won't answer it."""
        if turn.placement is not None:
            self._finish(turn.placement, turn, now)

    def finish(self, turn: Turn, key: str | None) -> None:
        """A turn is over: learn from its answer. ``key`` is what its conversation is known by from now on."""
        routed = turn.routed
        digest = turn.digest if turn.outcome == "completed" and turn.digest is not None else NO_DIGEST
        if digest.response is not None and turn.backend is not None:
            self._responses[digest.response] = routed.session if routed is not None else None, turn.backend
            if len(self._responses) > HELD_RESPONSES:
                self._responses.popitem(last=False)
        if routed is None:
            return
        if turn.placement is not None:
            prompt = digest.prompt_tokens
            if prompt and turn.tokens and turn.route.holder is None:  # else its body is a part of its prompt
                self._tokens_per_guess += 0.02 * (prompt / turn.tokens - self._tokens_per_guess)
            self._finish(turn.placement, turn, turn.ended, prompt, digest.cached_tokens, digest.completion_tokens)
        if turn.follows is not None:
            self._conversations.finish(turn.id, turn.follows, key, routed.session)
            if turn.prints:
                answered_at = turn.ended if turn.outcome == "completed" else None
                self._conversations.tried(routed.session, None, turn.prints, key, answered_at)
        if turn.labels.ends_session:
            self.end(routed.session)

    def _finish(
        self, placement: Placement, turn: Turn, now: float, prompt: int | None = None, cached: int | None = None,
        output: int | None = None,
    ) -> None:  # fmt: skip
        turn.placement = None
        self._router(turn.model).finish(placement, now, prompt, cached, output)

    def end(self, session: str) -> None:
        """A session is over."""
        for router in self._routers.values():
            router.end(session)

    def is_held(self, turn: Turn, now: float) -> bool:
        """Whether a waiting turn waits for room in a KV cache, not for a slot. After the longest hold it doesn't, even
        if it has not been offered a slot since."""
        return turn.routed is not None and turn.routed.is_held and now < turn.arrived + LONGEST_HOLD_S

    def why_held(self, turn: Turn, now: float) -> str | None:
        """Return why a waiting turn waits for room in a KV cache; None if it waits for a slot."""
        routed = turn.routed
        if routed is None or not self.is_held(turn, now):
            return None
        return (
            f"{routed.held_tokens:,} of its tokens aren't cached, and would push out contexts that are expected back "
            f"within {self._router(turn.model).return_s:.0f} s; it goes on after {LONGEST_HOLD_S:g} s at most"
        )

    def is_warm(self, turn: Turn) -> bool:
        """Whether a waiting turn's prefix is cached on a replica with a free slot, and long enough to skip others."""
        place = self._router(turn.model).find(turn.routed.session) if turn.routed is not None else None
        if place is None or place.cached < MIN_EVIDENCE_TOKENS:
            return False
        pool = self._relay.pools.get(turn.model, ())
        return any(replica.belief is place.home and replica.has_room for replica in pool)

    def _router(self, model: str) -> SessionRouter:
        router = self._routers.get(model)
        if router is None:
            router = self._routers[model] = SessionRouter(self._random, self._holds)
        return router

    def configure(self, holds: bool) -> None:
        """Set whether turns wait for room in a KV cache."""
        self._holds = holds
        for router in self._routers.values():
            router.holds = holds
