"""Which replica a session's next turn goes to: it stays with its cached prefix while that is expected to pay. Pure."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from agent_infra_core.routing.beliefs import ReplicaBelief, SessionPlace
from agent_infra_core.routing.rates import ServiceRates
from agent_infra_core.routing.strategies import BackendView

IDLE_S = 300.0  # a session silent for longer, or for longer than most think, is no load any more
MAX_SESSIONS = 20_000  # remembered; the longest silent goes first
LOOKED_AT = 8  # replicas of a larger fleet compared for one turn, besides the session's own
FURTHER_WEIGHT = 0.25  # of a session's further turns where it settles: loads change. From benchmarks/routing.py
MIN_EVIDENCE_TOKENS = 1024  # a shorter prefix that wasn't cached says nothing: engines cache whole blocks
ENDS_SOON_S = 1e6  # added to the score of a replica whose walltime ends too soon: better than none
LONGEST_HOLD_S = 60.0  # that a turn waits for room in a KV cache; then it goes on, and another session is evicted
LEAST_RETURNS = 1.0  # turns that a session must be expected to have still for its context to be worth a wait
RETURNS_SOON = 0.9  # share of sessions that send their next turn within ``SessionRouter.return_s``
MEASURE_EVERY_S = 0.05  # per replica: more turns add nothing to the fitted rates
REFRESH_S = 0.05  # age of prices, and of what is known of silent sessions
RECENT_SESSIONS, RECENT_ANSWERS, RECENT_SPEEDS = 200.0, 50.0, 100.0  # windows of decayed means


class ReplicaView(BackendView, Protocol):
    """A replica that keeps sessions."""

    @property
    def belief(self) -> ReplicaBelief:
        """Starts empty with the engine's process."""

    @property
    def ends_at(self) -> float:
        """Clock time at which its walltime ends; infinity = unknown or never."""

    @property
    def kv_tokens(self) -> float:
        """Capacity of its KV cache in tokens; 0 = unknown."""


ViewT = TypeVar("ViewT", bound=ReplicaView)


@dataclass(slots=True)
class SessionTurn:
    """A turn of a session before its replica is chosen."""

    session: str
    prompt: int  # tokens
    parent: str | None = None  # session whose context it continues, if it is the first of its own
    parent_tokens: int = 0  # of that context, that its prompt begins with
    prefix: Hashable = None  # identifies what its prompt has in common with other sessions: tools and system prompt
    prefix_tokens: int = 0
    is_held: bool = False  # set by ``choose``: it waits for room in a KV cache, not for a slot
    held_tokens: int = 0  # that it would add to that cache


@dataclass(slots=True)
class Placement:
    """A turn that was placed; ``finish`` needs it back."""

    session: str
    place: SessionPlace
    belief: ReplicaBelief
    expected: int  # tokens of the prompt that should be cached
    used_at: float  # when its session's prefix was used last before
    sent: float
    prompt: int  # tokens, as it was guessed
    beside_tokens: int  # prompts of the turns that ran there when it was sent
    waiting_tokens: float  # to be prefilled before its own
    sent_tokens: int  # to be prefilled there, up to its own, since the start
    is_running: bool = True

    def leave(self) -> None:
        """Its replica is done with it, so no answer there waits for its context any more. Safe to call again."""
        if self.is_running:
            self.is_running = False
            self.belief.running_tokens -= self.prompt


class SessionRouter:
    """Chooses replicas for the turns of one model's sessions, and remembers whose prefix is cached where.

    The score of a replica is the seconds of the prefill work that waits there; the turn's own, times one more than the
    turns that run there, for it delays them all; and the answer, each token of which reads the contexts of all turns
    that run there. What the session's home has cached and the replica hasn't counts twice. Where a session settles, the
    answers of its further turns count too, beside the contexts that the sessions living there have in flight on
    average: those that think now are seen so. A settled session doesn't move for that. The lowest score wins; ties are
    broken at random. The rates are fitted from the turns (see ServiceRates). Work from elsewhere counts as turns like
    this one.

    With ``holds``, a turn whose context isn't cached waits while it would evict a context that is expected to be used
    again soon, LONGEST_HOLD_S at most.
    """

    def __init__(self, random_source: random.Random, holds: bool = True) -> None:
        self.holds = holds
        self.rates = ServiceRates()
        self.return_s = 10.0
        self._random = random_source
        self._sessions: OrderedDict[str, SessionPlace] = OrderedDict()
        self._live: OrderedDict[str, SessionPlace] = OrderedDict()  # by last use, without the idle ones
        self._output = 200.0  # decayed means: tokens of an answer, s of a turn, s of thinking between two
        self._turns_s = self._think_s = 1.0
        self._mean_slowness = 1.0
        self._further_turns, self._started = 100.0, 10.0  # decayed counts: turns after a session's first; sessions
        self._refresh(-math.inf)

    @property
    def horizon(self) -> float:
        """Turns that a session is expected to have still."""
        return self._further_turns / self._started

    def find(self, session: str) -> SessionPlace | None:
        """What is known of a session."""
        return self._sessions.get(session)

    def choose(
        self, views: Sequence[ViewT], turn: SessionTurn, now: float, waited_s: float = 0.0,
        excluded: frozenset[str] = frozenset(),
    ) -> ViewT | None:  # fmt: skip
        """Return the replica for a turn; None if none may take it, or if waiting is better: for a slot where its prefix
        is cached (as long as computing that elsewhere takes, at most), or for room in a KV cache (``turn.is_held``)."""
        if now >= self._refreshed_at + REFRESH_S:
            self._refresh(now)
        turn.is_held = False
        place, source, known = self._continued(turn)
        home, cached = (source.home, min(source.cached, known)) if source is not None else (None, 0)
        found = self._lowest(self._looked_at(views, home), turn, place, home, cached, now, waited_s, excluded)
        if found is None and len(views) > LOOKED_AT:
            found = self._lowest(views, turn, place, home, cached, now, waited_s, excluded)
        return found

    def _continued(self, turn: SessionTurn) -> tuple[SessionPlace | None, SessionPlace | None, int]:
        """The place of a turn's session, the place whose context the turn continues (that one or its parent's), and the
        most tokens of it that its prompt can begin with."""
        place = self._sessions.get(turn.session)
        if place is not None:
            return place, place, turn.prompt
        parent = self._sessions.get(turn.parent) if turn.parent is not None else None
        return None, parent, min(turn.prompt, turn.parent_tokens)

    def _looked_at(self, views: Sequence[ViewT], home: ReplicaBelief | None) -> Sequence[ViewT]:
        """The replicas to compare, a session's own one first: its score rules out most others at a glance."""
        count, own = len(views), 0
        if home is not None:
            while own < count and views[own].belief is not home:
                own += 1
        if count <= LOOKED_AT:
            return [*views[own:], *views[:own]]
        start = int(self._random.random() * count)
        some = [*views[start : start + LOOKED_AT], *views[: max(0, start + LOOKED_AT - count)]]
        if home is None or own == count:
            return some
        return [views[own], *(view for view in some if view.belief is not home)]

    def _lowest(
        self, views: Sequence[ViewT], turn: SessionTurn, place: SessionPlace | None, home: ReplicaBelief | None,
        cached: int, now: float, waited_s: float, excluded: frozenset[str],
    ) -> ViewT | None:  # fmt: skip
        settles = place is None or not cached  # it has nothing to lose anywhere, or only its parent's context
        own = place.context if place is not None and place.is_live else 0
        prefill_s, step_s, context_s, in_turns, further, first_stay_s, stay_s = self._prices
        prompt, least, stay_s = turn.prompt, turn.prompt - cached, first_stay_s if place is None else stay_s
        prefix, holds, waits = turn.prefix, self._may_hold and waited_s < LONGEST_HOLD_S, waited_s < prefill_s * cached
        best, lowest, ties = None, math.inf, 0
        for view in views:
            belief = view.belief
            is_home, others = belief is home, view.in_flight
            is_full = 0 < view.capacity <= others
            is_closed = not view.accepts_work or view.busy_until > now or view.id in excluded
            if is_closed or (is_full and not (waits and is_home)):
                continue
            tokens = least if is_home else prompt
            if prefix is not None and prefix in belief.warm:
                tokens = min(tokens, prompt - turn.prefix_tokens)
            if holds and tokens > MIN_EVIDENCE_TOKENS and belief.would_evict(tokens, now - self.return_s):
                turn.is_held, turn.held_tokens = True, tokens
                continue
            if cached and tokens > least:
                tokens += tokens - least  # lost by leaving: a copy also pushes others out of that cache
            slowness, like_it = belief.slowness, 1 + view.foreign_work
            running, contexts = others + like_it, prompt * like_it
            wait_s = belief.ready_at - now if belief.ready_at > now else 0.0
            answer_s = step_s + context_s * (contexts + belief.running_tokens)
            score = wait_s + (tokens * prefill_s * running + answer_s) * slowness
            if settles:
                living = belief.live_tokens - own if is_home else belief.live_tokens
                score += further * (step_s + context_s * (contexts + in_turns * living)) * slowness
            if is_full or view.ends_at < now + stay_s:
                score += self._turns_s / view.capacity if is_full else ENDS_SOON_S  # until one of its turns ends
            if score < lowest:
                best, lowest, ties = view, score, 1
            elif score == lowest:
                ties += 1
                if self._random.random() * ties < 1.0:
                    best = view
        turn.is_held = turn.is_held and best is None
        return None if best is not None and 0 < best.capacity <= best.in_flight else best

    def _refresh(self, now: float) -> None:
        """Retire silent sessions, decide whether turns may be held, and set the prices.

        These are the seconds that a turn costs per token to prefill, for its answer, and for its answer per token of
        the contexts that run there. Then the share of their time that sessions spend in turns, the further turns that
        count where a session settles, and the seconds for which a replica must last for a session's first turn and for
        a later one: a session that lives somewhere can leave between two turns.
        """
        self._refreshed_at = now
        self._expire(now)
        self._may_hold = self.holds and self.horizon >= LEAST_RETURNS
        rates, output, turn_s = self.rates, self._output, self._turns_s
        in_turns = turn_s / (turn_s + self._think_s)
        first_stay_s = (1.0 + self.horizon) * (turn_s + self._think_s)
        self._prices = (
            rates.prefill_s, output * rates.step_s, output * rates.context_s, in_turns, FURTHER_WEIGHT * self.horizon,
            first_stay_s, 2.0 * turn_s,
        )  # fmt: skip

    def place(self, view: ReplicaView, turn: SessionTurn, now: float, arrived: float) -> Placement:
        """Reserve a turn's work on the chosen replica; ``finish`` is then due."""
        belief, (place, source, known) = view.belief, self._continued(turn)
        prompt, expected, shared, used_at = turn.prompt, 0, 0, -math.inf
        if source is not None:
            used_at = source.used_at
            if source.home is belief:
                expected = min(source.cached, known)
                shared = min(source.shared if place is not None else source.context, known)
        if turn.prefix is not None:
            shared = max(shared, min(prompt, turn.prefix_tokens))
            if turn.prefix in belief.warm:
                expected = max(expected, turn.prefix_tokens)
            belief.warm_up(turn.prefix, turn.prefix_tokens)
        belief.kv_tokens = view.kv_tokens
        belief.room_tokens = belief.room_tokens or view.kv_tokens
        prefill_s = self.rates.prefill_s * belief.slowness
        waiting = max(0.0, belief.ready_at - now)
        belief.sent_tokens += prompt - expected
        belief.ready_at = now + waiting + prefill_s * (prompt - expected)
        if place is None:
            place = self._begin(turn.session, belief, now)
        else:
            self._return(turn.session, place, belief, arrived)
        place.in_flight += 1
        beside_tokens = belief.running_tokens
        belief.running_tokens += prompt
        self._use(turn.session, place, max(1, prompt), shared, now)
        beside_tokens += prompt * view.foreign_work
        return Placement(
            turn.session, place, belief, expected, used_at, now, prompt, beside_tokens, waiting / prefill_s,
            belief.sent_tokens,
        )  # fmt: skip

    def _begin(self, session: str, home: ReplicaBelief, now: float) -> SessionPlace:
        """A session sends its first turn."""
        fade = 1.0 - 1.0 / RECENT_SESSIONS
        self._further_turns, self._started = self._further_turns * fade, self._started * fade + 1.0
        place = self._sessions[session] = SessionPlace(home, used_at=now)
        if len(self._sessions) > MAX_SESSIONS:
            self.end(next(iter(self._sessions)))
        return place

    def _return(self, session: str, place: SessionPlace, home: ReplicaBelief, arrived: float) -> None:
        """A session sends another turn, perhaps to a new home."""
        if place.in_flight or arrived >= place.used_at:  # else the turn is sent again, or waited for the one before
            self._further_turns += 1.0
            if not place.in_flight:
                self._learn_return(arrived - place.used_at)
        self._sessions.move_to_end(session)
        if place.home is not home:
            place.home.drop(session)
            self._retire(session, place)
            place.home = home

    def _learn_return(self, gap_s: float) -> None:
        """Follow the think times' mean and their quantile RETURNS_SOON."""
        self._think_s += (min(IDLE_S, max(0.0, gap_s)) - self._think_s) / RECENT_ANSWERS
        step = RETURNS_SOON if gap_s > self.return_s else RETURNS_SOON - 1.0
        self.return_s = min(IDLE_S, max(0.1, self.return_s * (1.0 + 0.1 * step)))

    def _use(self, session: str, place: SessionPlace, context: int, shared: int, now: float) -> None:
        """A session's context is load of its home, and cached there."""
        home, grown = place.home, context
        if place.is_live:
            grown -= place.context
        else:
            place.is_live, place.used_at = True, now
            self._live[session] = place
        home.live_tokens += grown
        home.keep(session, place, context, shared)

    def _retire(self, session: str, place: SessionPlace) -> None:
        """A session is load no more."""
        if place.is_live:
            place.is_live = False
            place.home.live_tokens -= place.context
            del self._live[session]

    def _expire(self, now: float) -> None:
        while self._live:
            session, place = next(iter(self._live.items()))
            if place.used_at > now - self.return_s:
                return
            if place.in_flight:
                place.used_at = now
                self._live.move_to_end(session)
            else:
                self._retire(session, place)

    def end(self, session: str) -> None:
        """A session is over: it is load no more. What is cached of it stays until it is evicted."""
        place = self._sessions.pop(session, None)
        if place is not None:
            place.is_over = True
            self._retire(session, place)
            place.in_flight, place.used_at = 0, -math.inf
            if not place.home.room_tokens:
                place.home.drop(session)

    def finish(
        self, placement: Placement, now: float, prompt: int | None, cached: int | None, output: int | None
    ) -> None:
        """Release a turn's reservation and learn from its answer; None is what the engine didn't report."""
        belief, place = placement.belief, placement.place
        if not place.is_over:
            place.in_flight -= 1
            if place.home is belief:
                if prompt is not None or belief.cached.get(placement.session) is place:  # else it died with the turn
                    context = place.context if prompt is None else max(1, prompt + (output or 0))
                    self._use(placement.session, place, context, min(place.shared, context), now)
                place.used_at = now
                if place.is_live:
                    self._live.move_to_end(placement.session)
        placement.leave()
        belief.note_prefilled(placement.sent_tokens, self.rates.prefill_s, now)
        if cached is not None and placement.expected > MIN_EVIDENCE_TOKENS:
            if 2 * cached < placement.expected:
                belief.note_miss(placement.used_at, placement.sent)
            else:
                belief.note_hit()
        if output and prompt and now > belief.measured_at + MEASURE_EVERY_S:
            belief.measured_at = now
            known = min(placement.expected, prompt) if cached is None else cached
            contexts = placement.prompt + (placement.beside_tokens + belief.running_tokens) / 2
            computed = placement.waiting_tokens + max(0, prompt - known)
            self._measure(belief, computed, output, contexts, now - placement.sent)

    def _measure(self, belief: ReplicaBelief, computed: float, output: int, contexts: float, seconds: float) -> None:
        """Learn how fast the fleet is, and how slow this replica is beside the others: only that ratio can be told."""
        self._output += (output - self._output) / RECENT_ANSWERS
        self._turns_s += (seconds - self._turns_s) / RECENT_ANSWERS
        if self.rates.is_fitted:  # the first turns would tell how far the defaults are off, not how fast a replica is
            belief.measure(seconds, self.rates.seconds(computed, output, contexts))
        self._mean_slowness += (belief.slowness - self._mean_slowness) / RECENT_SPEEDS
        self.rates.add(computed, output, contexts, seconds * self._mean_slowness / belief.slowness)
