"""Analysis (pure): what holds a run back, how many agents to run. Finished turns and samples of the fleet in, the
document's `analysis` out. Clock and random source are arguments; numpy is loaded when the first fit is due."""

from __future__ import annotations

import bisect
import dataclasses
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.tracking import TurnRecord, _is_figure, generates

LEAST_TURNS = 30  # below: no number; from POINT_TURNS on a point with its interval, between them the interval alone
POINT_TURNS = 300

# Bounds of what is kept for each model and GPU type; a turn is about 0.3 KB.
MAX_FIT_TURNS = 8000  # beyond, or older than MAX_FIT_AGE_S: the oldest quarter goes, all but REMEMBERED of each load
MAX_FIT_AGE_S = 6 * 3600.0
REMEMBERED = 100  # turns of each load (a factor of √2 in flight) that outlive the others: A is known from light load
MAX_SILENCES = 1200  # think times that Z is fitted to; of more, every second, third, … session's are taken
MAX_SAMPLES = 900  # of the fleet, one a second
MAX_INBOX = 10_000  # turns that wait for the next document
MAX_ANALYSED = 32  # models and GPU types; the one silent for longest goes
OPERATING_S = 300.0  # what "now" is taken over: this, or five cycles of an agent where they take longer
RESAMPLES = 300
SURE = 0.9  # share of the resampled fits that a verdict needs, and the probability that an interval holds
LITTLE_TOLERANCE = 0.15
GROWTH_LIMIT = 2.0  # nothing is told of more in flight than so many times what was seen
GOOD_UTILISATION = 0.7
GOOD_KV_SHARE = 0.9
MAX_CURVE_POINTS = 60
SETTLED_CHANGE = 5  # samples that a new number of replicas must last
MIX_RATIO = 1.4  # by which the typical turn must change, and
HIT_CHANGE = 0.15  # the cached share of prompts, for a fit to start anew
FAINT = 1e-9  # for a denominator that may be zero
Figure = Any  # a float, or an array with one for each resampled fit
Array = Any  # a numpy array: naming the type would load numpy


@dataclass(frozen=True)
class CapacityModel:
    """A closed queueing network: N agents think for Z seconds, then wait for one of k replicas.

    A replica with n turns in flight answers each in R(n) = A + B·n seconds: continuous batching, where a step costs a
    fixed part and a part per sequence; beyond its slots turns queue.  With the interactive response time law
    N = X·(Z + R) (Denning & Buzen 1978, "The Operational Analysis of Queueing Network Models"; Lazowska et al. 1984,
    "Quantitative System Performance", ch. 3) and Little's law n = X·R / k (Little 1961) this is a quadratic in n.
    Means stand for distributions; n counts the turn itself, whose own share B is lost when it runs alone: X is too
    high by B / (Z + A + B) at most.  Any of the figures may be an array of draws.
    """

    replicas: Figure  # k
    base_s: Figure  # A
    per_request_s: Figure  # B
    think_s: Figure  # Z
    slots: float = math.inf  # of one replica

    def in_flight(self, agents: Figure) -> Figure:
        """Turns in flight on each replica: n = [−q + √(q² + 4ABm)] / 2B with m = N/k, q = Z + A − mB."""
        import numpy as np

        crowd = agents / self.replicas
        slack = self.think_s + self.base_s - crowd * self.per_request_s
        root = (slack**2 + 4 * self.base_s * self.per_request_s * crowd) ** 0.5
        # The same, times (q + √…) above and below: holds for B = 0 too.
        return np.minimum(2 * self.base_s * crowd / np.maximum(slack + root, FAINT), self.slots)

    def answer_s(self, agents: Figure) -> Figure:
        """R(n): seconds that a turn spends on its replica."""
        return self.base_s + self.per_request_s * self.in_flight(agents)

    def throughput(self, agents: Figure) -> Figure:
        """X in turns a second: k·n / (A + B·n)."""
        return self.replicas * self.in_flight(agents) / self.answer_s(agents)

    def utilisation(self, agents: Figure) -> Figure:
        """ρ = B·X / k: how far a replica is from the most turns a second that it could ever do, 1 / B."""
        return self.per_request_s * self.throughput(agents) / self.replicas

    def shares(self, agents: Figure) -> tuple[Figure, Figure, Figure]:
        """Elasticities of X: ``(agent, base latency, contention)``, by which percentage X rises for 1 % less of each.

        d ln X / d ln of Z, A and 1/k, from X = N / (Z + R) and R = A / (1 − ρ): with D = Z + R + R·ρ/(1 − ρ) they are
        Z/D, R/D and the rest, and sum to 1.  When the slots are full, X follows the replicas alone.
        """
        import numpy as np

        answer, busy = self.answer_s(agents), self.utilisation(agents)
        crowding = answer * busy / np.maximum(1 - busy, FAINT)
        whole = self.think_s + answer + crowding
        is_full = self.in_flight(agents) >= self.slots
        agent, base = np.where(is_full, 0, self.think_s / whole), np.where(is_full, 0, answer / whole)
        return agent, base, np.maximum(1 - agent - base, 0)

    @property
    def knee(self) -> Figure:
        """N* = k·(Z + A + B) / B, where the asymptotes N / (Z + A + B) and k / B of X meet."""
        import numpy as np

        return self.replicas * (self.think_s + self.base_s + self.per_request_s) / np.maximum(self.per_request_s, FAINT)

    def agents_at(self, in_flight: Figure) -> Figure:
        """N with so many in flight on each replica: k·n·(Z + A + B·n) / (A + B·n)."""
        answer = self.base_s + self.per_request_s * in_flight
        return self.replicas * in_flight * (self.think_s + answer) / answer

    def agents_at_utilisation(self, utilisation: float) -> Figure:
        """N(ρ) = (kρ/B)·(Z + A/(1 − ρ))."""
        import numpy as np

        rate = self.replicas * utilisation / np.maximum(self.per_request_s, FAINT)
        return rate * (self.think_s + self.base_s / (1 - utilisation))


@dataclass(frozen=True)
class FleetSample:
    """What one look at the replicas of a model on a GPU type saw, independent of any turn's record."""

    at: float
    model: str
    gpu: str | None
    in_flight: Mapping[str, int]  # of each replica that serves
    active_agents: float | None = None  # sessions that wait or think
    slots: int | None = None  # of one replica
    kv_capacity_tokens: int | None = None  # of one replica
    kv_usage: float | None = None  # mean, 0 to 1
    preemptions: int | None = None  # of all replicas, since they started
    unhealthy: tuple[str, ...] = ()
    gpus_per_replica: int = 1


def fleet_samples(
    at: float,
    replicas: Iterable[Mapping[str, Any]],
    sessions: Iterable[tuple[str, str | None, int, float]],
    presence: Callable[[str, str | None, float], float],
) -> list[FleetSample]:
    """What ``backends`` of /stats say of each model on each GPU type, ``at`` that moment.

    ``sessions`` are ``(model, replica, turns open, seconds silent)`` as Tracker.silences gives them; a silent one
    counts with the probability that ``presence(model, GPU type, seconds)`` gives it.
    """
    fleets: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    homes: dict[str | None, tuple[str, str | None]] = {}
    for row in replicas:
        key = row["model"], (row["gpu"] or {}).get("name")
        fleets.setdefault(key, []).append(row)
        homes[row["id"]] = key
    agents: dict[tuple[str, str | None], float] = {}
    for model, replica, open_turns, silent_s in sessions:
        key = homes.get(replica) or next((key for key in fleets if key[0] == model), (model, None))
        agents[key] = agents.get(key, 0.0) + (open_turns or presence(*key, silent_s))
    return [_fleet_sample(key, rows, at, agents.get(key, 0.0)) for key, rows in fleets.items()]


def _fleet_sample(
    key: tuple[str, str | None], rows: Sequence[Mapping[str, Any]], at: float, agents: float
) -> FleetSample:
    ready = [row for row in rows if row["state"] == "ready" and row["healthy"] is not False]
    unhealthy = [row for row in rows if row["state"] == "failed" or (row["state"] == "ready" and row not in ready)]

    def known(name: str) -> list[Any]:
        return [row["engine"][name] for row in ready if _is_figure(row["engine"].get(name))]

    slots = [row["slots"] for row in ready if row["slots"]]
    usage = known("kv_usage")
    return FleetSample(
        at=at,
        model=key[0],
        gpu=key[1],
        in_flight={row["id"]: row["inflight"] or 0 for row in ready},
        active_agents=agents,
        slots=min(slots, default=None),
        kv_capacity_tokens=min(known("kv_capacity_tokens"), default=None),
        kv_usage=sum(usage) / len(usage) if usage else None,
        preemptions=sum(known("preemptions")) if known("preemptions") else None,
        unhealthy=tuple(row["id"] for row in unhealthy),
        gpus_per_replica=max([(row["gpu"] or {}).get("count") or 1 for row in ready], default=1),
    )


@dataclass(frozen=True)
class Basis:
    """What an estimate rests on."""

    turns: int
    window_s: float


@dataclass(frozen=True)
class Estimate:
    """A figure, the interval that holds it with 90 % probability, what both rest on; or why there is none.

    With a reason: no value, and an interval only where as much is known.
    """

    value: float | None
    low: float | None
    high: float | None
    unit: str
    basis: Basis
    reason: str | None = None


def _significant(value: Any) -> float | None:
    """To four digits, for people and for JSON; None for what is not finite."""
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None


def estimate(unit: str, basis: Basis, value: Figure, draws: Figure = None, reason: str | None = None) -> Estimate:
    """An estimate from its value and its resampled values; the rules of how many turns allow what are here."""
    import numpy as np

    if reason is None and basis.turns < LEAST_TURNS:
        reason = f"{basis.turns} of {LEAST_TURNS} turns: too few for any number"
    if reason is not None or value is None:
        return Estimate(None, None, None, unit, basis, reason or "not known")
    spread = np.atleast_1d(value if draws is None else draws)
    low, high = (_significant(bound) for bound in np.quantile(spread, [(1 - SURE) / 2, (1 + SURE) / 2]))
    if high is None or not math.isfinite(value) or abs(high) > 1e6 * (1 + abs(low or 0)):
        few = "the load was too light to tell how a replica slows down under more"
        return Estimate(None, low, None, unit, basis, few)
    if basis.turns < POINT_TURNS:
        few = f"{basis.turns} of {POINT_TURNS} turns: a range, no point yet"
        return Estimate(None, low, high, unit, basis, few)
    return Estimate(_significant(value), low, high, unit, basis)


# --- Measuring: what each turn met on its replica. -------------------------------------------------------------------
@dataclass(slots=True)
class ObservedTurn:
    """Of a turn's record what the fit needs. Times in s since the epoch; ``begin`` is when its replica got it."""

    begin: float
    end: float
    replica: str
    session: str | None
    task: str | None
    is_completed: bool
    queue_s: float
    think_s: float | None
    pre_s: float | None
    prompt: int | None
    cached: int | None
    output: int | None

    @property
    def arrived(self) -> float:
        return self.begin - self.queue_s

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def observed_turn(record: TurnRecord) -> ObservedTurn | None:
    """What a record says of its replica's work; None where it was never sent to one, or was no generation."""
    if record.backend is None or not record.inference_ms or not generates(record.path):
        return None
    return ObservedTurn(
        begin=record.finished_at - record.inference_ms / 1000,
        end=record.finished_at,
        replica=record.backend,
        session=record.session,
        task=record.task,
        is_completed=record.outcome == "completed" and record.retries == 0,
        queue_s=(record.queue_ms or 0.0) / 1000,
        think_s=None if record.think_ms is None else record.think_ms / 1000,
        pre_s=None if record.pre_ms is None else record.pre_ms / 1000,
        prompt=record.prompt_tokens,
        cached=record.cached_tokens,
        output=record.completion_tokens or None,
    )


def _known(values: Iterable[float | None], fallback: float = 1.0) -> Array:
    """An array in which what is not known is the mean of what is."""
    import numpy as np

    array = np.array([math.nan if value is None else value for value in values], dtype=float)
    known = array[np.isfinite(array)]
    return np.where(np.isfinite(array), array, known.mean() if len(known) else fallback)


class Beginnings:
    """When turns began on a replica and what prefilling each was, in units of the mean turn's."""

    def __init__(self, begin: Array, work: Array) -> None:
        import numpy as np

        order = np.argsort(begin, kind="stable")
        self._begin = begin[order]
        self._work = np.concatenate([[0.0], np.cumsum(work[order])])

    def between(self, first: Array, last: Array) -> Array:
        """The work of those that began in [first, last]."""
        import numpy as np

        upto = self._work[np.searchsorted(self._begin, last, side="right")]
        return upto - self._work[np.searchsorted(self._begin, first, side="left")]


@dataclass
class Measured:
    """What turns met, an array each, in the order of ``turns``: all were alone at 1.0 in flight.

    ``in_flight`` is exact: the number of turns on the replica, from when each began and ended, averaged over the
    turn's own time, ``variance`` is its variance in that time. So the regressor has no sampling error, which would
    bias B towards zero. ``excess``: contexts in flight beyond so many mean ones.
    """

    begin: Array
    seconds: Array
    size: Array  # tokens of the answer, in units of the mean
    in_flight: Array
    variance: Array
    excess: Array
    began: Array  # turns that began on the replica in this one's time
    block: Array  # number of the replica and stretch of time that the turn belongs to


def _averages(begin: Array, end: Array, excess: Array) -> tuple[Array, Array, Array]:
    """In flight, its variance and the excess context, each averaged over every turn's own time, on one replica."""
    import numpy as np

    times = np.concatenate([begin, end])
    order = np.argsort(times, kind="stable")
    times = times[order]
    present = np.cumsum(np.repeat([1.0, -1.0], len(begin))[order])
    context = np.cumsum(np.concatenate([excess, -excess])[order])
    steps = np.diff(times)

    def average(level: Array) -> Array:
        integral = np.concatenate([[0.0], np.cumsum(level[:-1] * steps)])
        return (np.interp(end, times, integral) - np.interp(begin, times, integral)) / np.maximum(end - begin, FAINT)

    mean = average(present)
    return mean, np.maximum(average(present**2) - mean**2, 0.0), average(context)


def measure(turns: Sequence[ObservedTurn], since: float, until: float) -> tuple[Measured, list[Beginnings], Array]:
    """What the completed turns met that began in [since, until]; the beginnings on each replica, and which is whose.

    ``turns`` must hold everything that was in flight in that time.
    """
    import numpy as np

    begin, end = np.array([turn.begin for turn in turns]), np.array([turn.end for turn in turns])
    fresh = [
        None if turn.prompt is None else max(1, turn.prompt - (turn.cached or 0)) for turn in turns
    ]  # tokens to prefill
    work, context = _known(fresh), _known(turn.prompt for turn in turns)
    output = _known(turn.output for turn in turns)
    names = sorted({turn.replica for turn in turns})
    number = {name: index for index, name in enumerate(names)}
    replica = np.array([number[turn.replica] for turn in turns])
    wanted = np.array([turn.is_completed for turn in turns], dtype=bool) & (begin >= since) & (begin <= until)
    if wanted.any():
        work, output = work / work[wanted].mean(), output / output[wanted].mean()
        context = context / context[wanted].mean() - 1
    mean, variance, excess = np.zeros((3, len(turns)))
    beginnings = []
    for index in range(len(names)):
        here = replica == index
        mean[here], variance[here], excess[here] = _averages(begin[here], end[here], context[here])
        beginnings.append(Beginnings(begin[here], work[here]))
    seconds = end - begin
    typical_s = seconds[wanted].mean() if wanted.any() else 1.0
    span_s = np.ptp(begin[wanted]) if wanted.any() else 0.0
    # Turns that overlap share what slowed them down: a block is at least a turn long, and there are some 80 of them.
    stretch = np.floor((begin - since) / max(typical_s, span_s * len(names) / 80))
    block = stretch * len(names) + replica
    columns = (begin, seconds, output, mean, variance, excess, np.ones(len(turns)), block)
    return Measured(*(column[wanted] for column in columns)), beginnings, replica[wanted]


# --- Fitting. --------------------------------------------------------------------------------------------------------
@dataclass
class ServiceFit:
    """R(n) = A + B·n: the estimate and its resampled draws, in seconds."""

    base_s: float
    per_request_s: float
    base_draws: Array
    per_request_draws: Array
    turns: int
    most_in_flight: float  # that turns met, but for the highest hundredth
    least_in_flight: float  # but for the lowest twentieth
    is_alone: bool  # no replica ever served two at once, so that nothing is known of B
    reason: str | None = None  # why B cannot be told


def _solve(design: Array, seconds: Array, weight: Array) -> Array:
    import numpy as np

    scale = np.sqrt(weight)
    return np.linalg.lstsq(design * scale[:, None], seconds * scale, rcond=1e-9)[0]


def _design(rows: Measured, in_flight: Array) -> Array:
    """The regressors: 1, answer's length, in flight x length, turns that began, excess context x length."""
    import numpy as np

    size = rows.size
    return np.stack([np.ones(len(size)), size - 1, size * in_flight, rows.began, size * rows.excess], axis=1)


def _regress(rows: Measured, beginnings: list[Beginnings], replica: Array) -> tuple[Array, Array, Array]:
    """``(design, weights, coefficients)`` of the last of a few passes, since each pass needs the one before.

    Weighted by 1/R², because errors are in proportion; what is off by more than five deviations (of the median, times
    1.48) is trimmed. Two regressors depend on the fit: the speed at which the turn moved weights the in-flight count
    (to second order), and turns are counted that began in the time it should have taken: the time it took would count
    a turn's own bad luck as its cause. ``replica`` numbers the first rows; further ones are remembered as they were.
    """
    import numpy as np

    now = len(replica)
    typical = np.median(rows.seconds)
    expected, weight, in_flight = rows.seconds * 0 + typical, np.ones(len(rows.seconds)), rows.in_flight
    for _ in range(4):
        last = rows.begin[:now] + expected[:now]
        for index, began in enumerate(beginnings):
            here = np.flatnonzero(replica == index)
            rows.began[here] = began.between(rows.begin[here], last[here])
        design = _design(rows, in_flight)
        found = _solve(design, rows.seconds, weight)
        expected = np.maximum(design @ found, 0.05 * typical)
        off = (rows.seconds - expected) / expected
        deviation = 1.4826 * np.median(np.abs(off - np.median(off)))
        weight = (np.abs(off) <= 5 * deviation + 1e-6) * (typical / expected) ** 2
        slope = max(0.0, found[2])
        in_flight = rows.in_flight - slope * rows.variance / np.maximum(found[0] + slope * rows.in_flight, typical / 10)
    return design, weight, found


def resample_counts(blocks: int, rng: Any) -> Array:
    """How often each block is drawn in each of the RESAMPLES resamplings."""
    import numpy as np

    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES).astype(float)


def _widening(blocks: int, unknowns: int) -> float:
    """By how much resampled deviations fall short of the truth's: few blocks (Student's t instead of the normal)."""
    free = max(1.0, blocks - unknowns)
    return math.sqrt(blocks / max(1.0, blocks - 1)) * (1 + 0.93 / free)


def fit_service(rows: Measured, beginnings: list[Beginnings], replica: Array, rng: Any) -> ServiceFit:
    """Regress turns' seconds on what was in flight; resample blocks of turns for the draws.

    Blocks, because turns are correlated: Künsch 1989, "The jackknife and the bootstrap for general stationary
    observations"; Cameron, Gelbach & Miller 2008 for clusters. B is the cost of a turn's presence (regressors in
    flight) and of its beginning (each turn in flight sees as many begin as are in flight, on average), which differ:
    one is decoding, the other prefilling. The excess context takes up what long neighbours cost, which else would
    look like the effect of many, since whoever is slow is also many.
    """
    import numpy as np

    low, high = np.quantile(rows.in_flight, [0.05, 0.95])
    design, weight, found = _regress(rows, beginnings, replica)
    _, block = np.unique(rows.block, return_inverse=True)
    blocks = int(block.max()) + 1
    moments = np.zeros((blocks, 5, 5))
    totals = np.zeros((blocks, 5))
    np.add.at(moments, block, weight[:, None, None] * design[:, :, None] * design[:, None, :])
    np.add.at(totals, block, (weight * rows.seconds)[:, None] * design)
    counts = resample_counts(blocks, rng)
    sums = counts @ np.stack([np.bincount(block), np.bincount(block, rows.seconds)], axis=1)
    left = np.tensordot(counts, moments, 1)
    drawn = (np.linalg.pinv(left, rcond=1e-9, hermitian=True) @ (counts @ totals)[:, :, None])[:, :, 0]
    drawn = found + _widening(blocks, 5) * (drawn - found)
    is_alone = bool(high <= 1.2)
    reason = None
    if not is_alone and high - low < 0.25 + 0.05 * high:
        reason = (
            f"the load hardly varied ({low:.1f} to {high:.1f} turns in flight on a replica), so it cannot be told how "
            "one slows down under more; run half the agents for a minute"
        )
    slope, slopes = found[2] + found[3], drawn[:, 2] + drawn[:, 3]
    mean = rows.seconds.mean()
    return ServiceFit(
        base_s=mean if is_alone else max(found[0], mean / 100),
        per_request_s=0.0 if is_alone else max(slope, 0.0),
        base_draws=sums[:, 1] / sums[:, 0] if is_alone else np.maximum(drawn[:, 0], mean / 100),
        per_request_draws=np.zeros(RESAMPLES) if is_alone else np.maximum(slopes, 0.0),
        turns=len(rows.seconds),
        most_in_flight=float(np.quantile(rows.in_flight, 0.99)),
        least_in_flight=float(low),
        is_alone=is_alone,
        reason=reason,
    )


@dataclass
class ThinkFit:
    """Z: mean think time and its resampled draws, in seconds; what is presumed of a session that is silent."""

    mean_s: float
    draws: Array
    turns: int
    observing_share: float  # of the think time: pre
    left: float  # share of the silences that never end: the session was left without a word
    durations: Sequence[float]  # ascending, and
    surviving: Sequence[float]  # the share of the others that last longer than each

    def presence(self, silent_s: float) -> float:
        """How probable it is that a session silent for so long thinks, and has not been left for good."""
        index = bisect.bisect_right(self.durations, silent_s) - 1
        lasting = (1 - self.left) * (self.surviving[index] if index >= 0 else 1.0)
        return lasting / (lasting + self.left)


def every_nth(turns: Sequence[ObservedTurn]) -> Iterable[str]:
    """As many of the sessions as MAX_SILENCES turns have."""
    names = sorted({turn.session for turn in turns if turn.session is not None})
    return names[:: math.ceil(len(turns) / MAX_SILENCES) or 1]


def silences(
    turns: Sequence[ObservedTurn], since: float, until: float, ended: Mapping[str, float]
) -> tuple[list[float], list[bool], list[str]]:
    """``(seconds, is over, session)`` of every think time that began in [since, until], cut where it was not over.

    Those that go on count as far as they went: without them a short window would hold short thinking only.
    """
    seconds, is_over, sessions = [], [], []
    last: dict[str, tuple[float, float]] = {}  # session → end of its latest turn, arrival of the one after
    chosen = set(every_nth(turns))
    for turn in turns:
        if turn.session is None or turn.session not in chosen:
            continue
        if turn.think_s is not None and since <= turn.arrived - turn.think_s and turn.arrived <= until:
            seconds.append(turn.think_s)
            is_over.append(True)
            sessions.append(turn.session)
        if turn.arrived <= until:
            last[turn.session] = turn.begin, turn.end
    for session, (_, end) in last.items():
        if since <= end <= until and session not in ended:
            seconds.append(until - end)
            is_over.append(False)
            sessions.append(session)
    return seconds, is_over, sessions


def _returning(durations: Array, over: Array, counts: Array) -> tuple[Array, float]:
    """How probable it is that each silence will end, for each row of counts (of every silence); the share that won't.

    A cure model (Berkson & Gage 1952) with exponential thinking, fitted by expectation and maximisation.
    """
    import numpy as np

    going = np.flatnonzero(over == 0)
    weight, lasting = counts[:, going], durations[going]
    ended = np.maximum(counts @ over, 1.0)
    total = counts @ (durations * over)
    mean, left = np.maximum(total / ended, FAINT), np.full(len(counts), 0.05)
    alive = np.ones(weight.shape)
    for _ in range(20):
        alive = (1 - left)[:, None] * np.exp(-lasting / mean[:, None])
        alive /= alive + left[:, None]
        mean = np.maximum((total + (weight * alive) @ lasting) / ended, FAINT)
        left = np.clip((weight * (1 - alive)).sum(axis=1) / counts.sum(axis=1), 1e-3, 0.5)
    returning = np.ones(counts.shape)
    returning[:, going] = alive
    return returning, float(left[0])


def fit_think(
    turns: Sequence[ObservedTurn], since: float, until: float, ended: Mapping[str, float], rng: Any
) -> ThinkFit | None:
    """Mean think time after Kaplan & Meier (1958, "Nonparametric estimation from incomplete observations").

    Silences that last to the end of what is seen never end, by presumption: those sessions were left. Resampled by
    session, since an agent's think times are alike; few and long sessions in stretches of ten.
    """
    import numpy as np

    seconds, is_over, sessions = silences(turns, since, until, ended)
    if sum(is_over) < 2:
        return None
    order = np.argsort(seconds, kind="stable")
    durations, over = np.array(seconds)[order], np.array(is_over, dtype=float)[order]
    seen: dict[str, int] = {}
    clusters: dict[tuple[str, int], int] = {}
    length = 10 if len(set(sessions)) < 20 else len(sessions)
    block = []
    for session in sessions:
        seen[session] = seen.get(session, 0) + 1
        block.append(clusters.setdefault((session, (seen[session] - 1) // length), len(clusters)))
    counts = np.vstack([np.ones(len(clusters)), resample_counts(len(clusters), rng)])
    weight = counts[:, np.array(block)[order]]
    returning, left = _returning(durations, over, weight)
    weight = weight * returning
    at_risk = np.cumsum(weight[:, ::-1], axis=1)[:, ::-1]
    ending = np.where(at_risk > 0, weight * over / np.maximum(at_risk, FAINT), 0.0)
    surviving = np.cumprod(1 - ending, axis=1)
    drop = np.hstack([np.ones((len(counts), 1)), surviving[:, :-1]]) * ending
    exposure = (weight @ durations) / np.maximum(weight @ over, 1.0)
    # What lasts longer than all that was seen goes on like an exponential of the mean.
    means = drop @ durations + surviving[:, -1] * (durations[-1] + exposure)
    known = [(turn.pre_s, turn.think_s) for turn in turns if turn.pre_s is not None and turn.think_s]
    observing = sum(min(pre, think) for pre, think in known) / max(FAINT, sum(think for _, think in known))
    return ThinkFit(
        mean_s=float(means[0]),
        draws=means[0] + _widening(len(clusters), 1) * (means[1:] - means[0]),
        turns=int(sum(is_over)),
        observing_share=observing if known else 1.0,
        left=left,
        durations=durations.tolist(),
        surviving=surviving[0].tolist(),
    )


# --- The document. ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Operating:
    """Where the run is, as measured: over [since, until], s since the epoch."""

    since: float
    until: float
    turns: int  # completed
    per_s: float  # X
    per_s_draws: Array
    wait_s: float  # mean of queue and inference
    agents: float | None  # N, sampled; None where nobody sampled it
    agents_draws: Array
    in_flight: float | None  # on each replica, sampled

    @property
    def window_s(self) -> float:
        return self.until - self.since


def operating(
    turns: Sequence[ObservedTurn], samples: Sequence[FleetSample], since: float, until: float, rng: Any
) -> Operating:
    """Measured over [since, until]; X's draws come from the counts of 16 stretches of that time (batch means)."""
    import numpy as np

    done = [turn for turn in turns if turn.is_completed and since <= turn.end <= until]
    length = max(until - since, FAINT)
    counts, _ = np.histogram([turn.end for turn in done], bins=16, range=(since, since + length))
    error = _widening(16, 1) * float(np.std(counts, ddof=1)) / 4 / max(1.0, float(np.mean(counts)))
    per_s = len(done) / length
    looks = [sample for sample in samples if since <= sample.at <= until]
    agents = [sample.active_agents for sample in looks if sample.active_agents is not None]
    in_flight = [sum(sample.in_flight.values()) / len(sample.in_flight) for sample in looks if sample.in_flight]
    return Operating(
        since=since,
        until=until,
        turns=len(done),
        per_s=per_s,
        per_s_draws=per_s * np.maximum(1 + error * rng.standard_normal(RESAMPLES), 0.01),
        wait_s=float(np.mean([turn.queue_s + turn.seconds for turn in done])) if done else 0.0,
        agents=float(np.mean(agents)) if agents else None,
        agents_draws=np.array(agents or [math.nan], dtype=float),
        in_flight=float(np.mean(in_flight)) if in_flight else None,
    )


def littles_law(here: Operating, think_s: float | None) -> dict[str, Any]:
    """N as sampled beside N = X·(Z + R) from the turns; ``holds`` is None where that cannot be judged yet.

    Off by more than LITTLE_TOLERANCE is off by so much beyond what X's own sampling error explains, 19 times of 20.
    """
    import numpy as np

    if think_s is None:
        return {"agents_sampled": here.agents, "agents_computed": None, "error": None, "holds": None}
    cycle_s = think_s + here.wait_s
    computed = here.per_s * cycle_s
    error = None if not here.agents else computed / here.agents - 1
    is_judged = error is not None and here.window_s >= 2 * cycle_s
    tolerance = LITTLE_TOLERANCE + 1.64 * float(np.std(here.per_s_draws)) / max(here.per_s, FAINT)
    return {
        "agents_sampled": None if here.agents is None else _significant(here.agents),
        "agents_computed": _significant(computed),
        "error": None if error is None else round(error, 4),
        "holds": abs(error or 0.0) <= tolerance if is_judged else None,
    }


def change_point(values: Sequence[float], least: float) -> int | None:
    """Where a series changed its mean by more than ``least``, or None: the likeliest split (CUSUM, Page 1954).

    Both sides have 50 values or more, and the step stands out by 6 standard errors.
    """
    import numpy as np

    series = np.array(values)
    if len(series) < 100:
        return None
    before = np.arange(50, len(series) - 49)
    sums, squares = np.cumsum(series), np.cumsum(series**2)
    first, second = sums[before - 1] / before, (sums[-1] - sums[before - 1]) / (len(series) - before)
    within = squares[-1] - before * first**2 - (len(series) - before) * second**2
    deviation = np.sqrt(np.maximum(within, FAINT) / len(series))
    error = deviation * np.sqrt(1 / before + 1 / (len(series) - before))
    best = int(np.argmax(np.abs(second - first) / error))
    step = abs(float(second[best] - first[best]))
    return int(before[best]) if step > max(least, 6 * float(error[best])) else None


def mix_change(turns: Sequence[ObservedTurn]) -> tuple[float, str] | None:
    """When the prompt mix or the hit rate changed last, and which; None where they did not."""
    done = [turn for turn in turns if turn.is_completed and turn.prompt and turn.output]
    found = []
    for least, what, figure in (
        (math.log(MIX_RATIO), "prompt mix", lambda turn: math.log(turn.output)),
        (math.log(MIX_RATIO), "prompt mix", lambda turn: math.log(turn.prompt)),
        (HIT_CHANGE, "hit rate", lambda turn: min(1.0, (turn.cached or 0) / turn.prompt)),
    ):
        index = change_point([figure(turn) for turn in done], least)
        if index is not None:
            found.append((done[index].begin, what))
    return max(found, default=None)


def context_limit(turns: Sequence[ObservedTurn], kv_tokens: float, rng: Any) -> tuple[float, Array] | None:
    """N_kv and its draws: kv_tokens over the mean context that a session holds, while it thinks too."""
    import numpy as np

    held = [(turn.session or "", turn.prompt + (turn.output or 0)) for turn in turns if turn.prompt]
    if not held or not kv_tokens:
        return None
    _, session = np.unique([name for name, _ in held], return_inverse=True)
    tokens, number = np.zeros((2, int(session.max()) + 1))
    np.add.at(tokens, session, [context for _, context in held])
    np.add.at(number, session, 1.0)
    counts = resample_counts(len(number), rng)
    return float(kv_tokens * number.sum() / tokens.sum()), kv_tokens * (counts @ number) / (counts @ tokens)


def turns_of_each(
    turns: Sequence[ObservedTurn], name: str, think: ThinkFit, ended: Mapping[str, float], now: float
) -> tuple[float, float] | None:
    """``(turns, how many ended)`` of the sessions or tasks: turns over ends, right also where most still run.

    How many ended is an expectation: of one that is silent it is only probable.
    """
    last: dict[str, ObservedTurn] = {}
    named = 0
    for turn in turns:
        key = turn.session if name == "session" else turn.task
        if key is not None and turn.is_completed:
            last[key] = turn
            named += 1
    over = sum(1.0 if turn.session in ended else 1 - think.presence(now - turn.end) for turn in last.values())
    return (named / over, over) if over >= 5 else None


@dataclass(frozen=True)
class Outlook:
    """What is known of one model on one GPU type at one moment; all that the document's entry is made of."""

    model: CapacityModel
    draws: CapacityModel
    fit: ServiceFit | None
    think: ThinkFit | None
    here: Operating
    agents: float  # N, sampled or computed
    basis: Basis
    reason: str | None  # why nothing may be told that rests on the fit
    few: str | None  # why nothing may be told at all
    kv: tuple[float, Array] | None

    def told(self, unit: str, figure: Callable[[CapacityModel], Figure], reason: str | None = None) -> Estimate:
        """A figure of the model."""
        reason = self.few or self.reason or reason
        if reason is not None:
            return estimate(unit, self.basis, None, reason=reason)
        return estimate(unit, self.basis, float(figure(self.model)), figure(self.draws))

    def measured(self, unit: str, value: float | None, draws: Figure, reason: str) -> Estimate:
        """A figure that does not rest on the fit; ``reason`` is why there is none, where there is none."""
        why = self.few or (reason if value is None else None)
        return estimate(unit, self.basis, value, draws, why)

    @property
    def most_in_flight(self) -> float:
        """On a replica, of which anything may be told."""
        return GROWTH_LIMIT * self.fit.most_in_flight if self.fit else 0.0

    @property
    def most_agents(self) -> float:
        """N of which anything may be told."""
        return max(self.agents, float(self.model.agents_at(self.most_in_flight)))

    def beyond(self, agents: float) -> str | None:
        """Why nothing is told of so many agents; None where it may."""
        if self.fit is not None and self.fit.is_alone and agents > self.agents:
            return "no replica ever served two turns at once, so it cannot be told how one slows down"
        if agents > self.most_agents * 1.0001:
            return f"{agents:.0f} agents are beyond twice the load seen; run more than {self.agents:.0f} to know"
        return None

    @property
    def evicting(self) -> str | None:
        """Why nothing is told of any other load; None where contexts fit into the KV cache."""
        if self.kv is None or self.agents <= self.kv[0]:
            return None
        return "contexts are evicted at this load, and how replicas do when others fit, the fit cannot tell"

    def what_if(self, name: str, change: Callable[[CapacityModel], CapacityModel], agents: float) -> dict[str, Any]:
        """Throughput when the system changes, and by how much that is more (as a fraction)."""
        reason = self.evicting or self.beyond(agents)
        if reason is None and self.kv is not None and self.agents < agents and agents > self.kv[0]:
            reason = f"the contexts of {agents:.0f} agents would not fit into the KV cache"
        return {
            "name": name,
            "turns_per_hour": self.told("turns/h", lambda model: 3600 * change(model).throughput(agents), reason),
            "change": self.told(
                "fraction",
                lambda model: change(model).throughput(agents) / model.throughput(self.agents) - 1,
                reason,
            ),
        }

    def what_ifs(self) -> list[dict[str, Any]]:
        half = 1 - 0.5 * (self.think.observing_share if self.think else 0.0)
        return [
            self.what_if(
                "+1 replica", lambda model: dataclasses.replace(model, replicas=model.replicas + 1), self.agents
            ),
            self.what_if(
                "half the observation time",
                lambda model: dataclasses.replace(model, think_s=half * model.think_s),
                self.agents,
            ),
            self.what_if("+25 % agents", lambda model: model, 1.25 * self.agents),
            self.what_if("−25 % agents", lambda model: model, 0.75 * self.agents),
        ]

    def curve(self) -> list[dict[str, Any]]:
        """X(N), as far as may be told, and no further than is of use."""
        import numpy as np

        if (
            self.few
            or self.reason
            or self.evicting
            or self.fit is None
            or self.fit.is_alone
            or self.basis.turns < POINT_TURNS
        ):
            return []
        most = min(self.most_agents, max(2 * self.agents, 1.5 * float(self.model.knee)))
        points = np.unique(np.round(np.linspace(1, max(1.0, most), MAX_CURVE_POINTS)))
        rows = [(int(at), self.told("turns/h", lambda model, at=at: 3600 * model.throughput(at))) for at in points]  # type: ignore[misc]
        return [
            {"agents": agents, "turns_per_hour": row.value, "low": row.low, "high": row.high} for agents, row in rows
        ]


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _in_words(what: Mapping[str, Any], with_range: bool = False) -> str:
    """``+1 replica → +38 % turns/h [31, 44]``; empty where nothing is known of it."""
    change: Estimate = what["change"]
    if change.low is None or change.high is None:
        return ""
    low, high = (f"{100 * bound:+.0f}".replace("-", "−") for bound in (change.low, change.high))
    if change.value is None and low == high:
        return f"{what['name']} → {low} % turns/h"
    if change.value is None:
        return f"{what['name']} → {low} to {high} % turns/h"
    words = f"{what['name']} → {100 * change.value:+.0f} %".replace("-", "−")
    return f"{words} turns/h [{low.lstrip('+')}, {high.lstrip('+')}]" if with_range else words


def judge(outlook: Outlook, what_ifs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict: which share is largest, in at least SURE of the resampled fits; else BALANCED."""
    import numpy as np

    names = ("agent", "base_latency", "contention")
    reason = outlook.few or outlook.reason
    shares = {
        name: outlook.told("fraction", lambda model, index=index: model.shares(outlook.agents)[index])  # type: ignore[misc]
        for index, name in enumerate(names)
    }
    if reason is not None:
        sentence = f"No verdict: {reason}."
        return {"name": "NO DATA", "confidence": None, "sentence": sentence, "reason": reason, "shares": shares}
    point = [float(share) for share in outlook.model.shares(outlook.agents)]
    drawn = np.argmax(np.stack([np.broadcast_to(d, RESAMPLES) for d in outlook.draws.shares(outlook.agents)]), axis=0)
    counts = np.bincount(drawn, minlength=3) / RESAMPLES
    largest = int(np.argmax(counts))
    confidence = float(counts[largest])
    name = ("AGENT-BOUND", "LATENCY-BOUND", "GPU-BOUND")[largest] if confidence >= SURE else "BALANCED"
    sentence = verdict_sentence(name, confidence, point, outlook, what_ifs)
    return {"name": name, "confidence": round(confidence, 3), "sentence": sentence, "reason": None, "shares": shares}


def verdict_sentence(
    name: str, confidence: float, shares: Sequence[float], outlook: Outlook, what_ifs: Sequence[Mapping[str, Any]]
) -> str:
    """The verdict in words that a researcher acts on: what holds the run back, and what each change would bring."""
    sure = "over 99 % sure" if confidence > 0.99 else f"{math.floor(100 * confidence)} % sure"
    replica, observing, more, _ = what_ifs
    model, agents = outlook.model, outlook.agents
    if name == "GPU-BOUND":
        said = f"GPU-bound ({sure}): throughput follows GPU capacity with elasticity {shares[2]:.2f}."
        if math.isfinite(model.slots) and float(model.in_flight(agents)) >= model.slots:
            said = f"GPU-bound ({sure}): all {model.slots:.0f} slots of each replica are taken, turns queue."
        effects = [_in_words(replica, True), _in_words(more)]
    elif name == "AGENT-BOUND":
        said = f"Agent-bound ({sure}): agents think for {model.think_s:.3g} s a turn, "
        said += f"the GPUs answer in {float(model.answer_s(agents)):.3g} s."
        effects = [_in_words(observing, True), _in_words(more), _in_words(replica)]
    elif name == "LATENCY-BOUND":
        said = f"Latency-bound ({sure}): even an idle replica takes {model.base_s:.3g} s for a turn, "
        said += f"agents think for {model.think_s:.3g} s. Shorter answers or a faster GPU would help."
        effects = [_in_words(more, True), _in_words(replica)]
    else:
        agent, base, crowding = (_percent(share) for share in shares)
        said = (
            f"Balanced: throughput follows the agents' think time ({agent}), the latency of an idle replica ({base}) "
        )
        said += f"and GPU capacity ({crowding}); no one is the largest for sure."
        effects = [_in_words(replica, True), _in_words(observing), _in_words(more)]
    known = "; ".join(effect for effect in effects if effect)
    return f"{said} {known[0].upper()}{known[1:]}." if known else said


def suggest(outlook: Outlook) -> dict[str, Any]:
    """How many agents to run: the least of what keeps GPUs at GOOD_UTILISATION, contexts in the cache, and the fit's
    word good."""
    import numpy as np

    nothing = outlook.few or outlook.reason
    if nothing is None and outlook.fit is not None and outlook.fit.is_alone:
        nothing = outlook.beyond(math.inf)
    if nothing is not None:
        none = estimate("agents", outlook.basis, None, reason=nothing)
        return {"agents": none, "bound_by": None, "sentence": f"No suggestion: {nothing}."}
    model, draws = outlook.model, outlook.draws
    most, now = outlook.most_agents, round(outlook.agents)
    evicting = outlook.evicting
    busy = [
        np.minimum(
            m.agents_at_utilisation(GOOD_UTILISATION), m.agents_at(m.slots) if math.isfinite(m.slots) else math.inf
        )
        for m in (model, draws)
    ]
    limits: list[tuple[float, Array, str | None, str]] = [
        (float(busy[0]), busy[1], "utilisation", f"the GPUs would be {_percent(GOOD_UTILISATION)} busy."),
        (most, np.full(RESAMPLES, most), None, "more would be beyond twice the load seen. Then look again."),
    ]
    if outlook.kv is not None:
        tokens = "beyond that their contexts do not fit into the KV cache, and are computed again."
        fitting = (GOOD_KV_SHARE * outlook.kv[0], GOOD_KV_SHARE * outlook.kv[1], "kv", tokens)
        limits = [fitting] if evicting else [*limits, fitting]
    value, _, bound_by, why = min(limits, key=lambda limit: limit[0])
    spread = np.maximum(1.0, np.round(np.min([limit[1] for limit in limits], axis=0)))
    agents = estimate("agents", outlook.basis, max(1.0, round(value)), spread)
    if agents.value is None and agents.low != agents.high:
        sentence = f"Run {agents.low:.0f} to {agents.high:.0f} agents (now {now}): {why}"
    else:
        sentence = f"Run {agents.low if agents.value is None else agents.value:.0f} agents (now {now}): {why}"
    return {"agents": agents, "bound_by": bound_by, "sentence": sentence}


def find_flags(outlook: Outlook, samples: Sequence[FleetSample]) -> dict[str, str]:
    """What else is wrong: flag → what to say of it."""
    found = {}
    looks = [sample for sample in samples if sample.at >= outlook.here.since]
    if outlook.kv is not None and outlook.few is None and outlook.agents > outlook.kv[0]:
        found["KV-BOUND"] = (
            f"The contexts of {outlook.agents:.0f} agents do not fit into the KV cache, those of {outlook.kv[0]:.0f} "
            f"do: thinking sessions are evicted and computed again. Run {GOOD_KV_SHARE * outlook.kv[0]:.0f} agents, or "
            "add a replica."
        )
    preemptions = [sample.preemptions for sample in looks if sample.preemptions is not None]
    if "KV-BOUND" not in found and len(preemptions) > 1 and preemptions[-1] > preemptions[0]:
        found["KV-BOUND"] = (
            f"Replicas ran out of KV cache and put off {preemptions[-1] - preemptions[0]} running turns, which are "
            "computed again. Run fewer agents, or add a replica."
        )
    flights: dict[str, list[int]] = {}
    for sample in looks[-60:]:
        for replica, number in sample.in_flight.items():
            flights.setdefault(replica, []).append(number)
    means = {replica: sum(numbers) / len(numbers) for replica, numbers in flights.items() if len(numbers) >= 30}
    if len(means) > 1:
        most, least = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
        typical = sum(means.values()) / len(means)
        if means[most] - means[least] > max(2.0, 0.6 * typical):
            found["IMBALANCED"] = (
                f"{most} has {means[most]:.1f} turns in flight, {least} {means[least]:.1f}, in the mean of a minute: "
                "the busiest replica makes its agents wait while others have room."
            )
    if samples and samples[-1].unhealthy:
        names = ", ".join(samples[-1].unhealthy)
        found["UNHEALTHY"] = f"{names}: not healthy. What the rest does is measured, what all could do is not."
    return found


def capacity_models(
    replicas: int, fit: ServiceFit | None, think: ThinkFit | None, slots: int | None
) -> tuple[CapacityModel, CapacityModel]:
    """The model of the estimates, and the one of their draws; without a fit, one that nobody may ask."""
    import numpy as np

    zeros = np.zeros(RESAMPLES)
    limit = float(slots) if slots else math.inf
    point = CapacityModel(replicas, 1.0, 0.0, think.mean_s if think else 0.0, limit)
    draws = CapacityModel(replicas, zeros + 1, zeros, think.draws if think else zeros, limit)
    if fit is None:
        return point, draws
    return (
        dataclasses.replace(point, base_s=fit.base_s, per_request_s=fit.per_request_s),
        dataclasses.replace(draws, base_s=fit.base_draws, per_request_s=fit.per_request_draws),
    )


def figures(outlook: Outlook) -> dict[str, Any]:
    """An entry's `fit`, `operating` and `limits`."""
    model, draws, here = outlook.model, outlook.draws, outlook.here
    thinking = "no session had two turns"
    alone = outlook.beyond(math.inf) if outlook.fit and outlook.fit.is_alone else None
    blind = alone or outlook.evicting
    knee_flight = float(model.in_flight(model.knee)) if math.isfinite(model.knee) else math.inf
    far = None
    if outlook.fit is not None and knee_flight > outlook.most_in_flight:
        far = f"it lies beyond twice the load seen ({outlook.fit.most_in_flight:.1f} turns in flight on a replica)"
    good_flight = GOOD_UTILISATION / (1 - GOOD_UTILISATION) * model.base_s / max(model.per_request_s, FAINT)
    good_far = far if good_flight > outlook.most_in_flight else None
    kv_value, kv_draws = outlook.kv if outlook.kv is not None else (None, None)
    return {
        "fit": {
            "base_latency_s": outlook.told("s", lambda m: m.base_s),
            "per_request_s": outlook.told("s", lambda m: m.per_request_s, alone),
            "think_s": outlook.measured("s", model.think_s if outlook.think else None, draws.think_s, thinking),
        },
        "operating": {
            "agents": outlook.measured(
                "agents",
                outlook.agents or None,
                outlook.agents if here.agents is None else here.agents_draws,
                "no agent is active",
            ),
            "in_flight_per_replica": outlook.measured(
                "turns", here.in_flight, here.in_flight, "no sample of the fleet"
            ),
            "turns_per_hour": outlook.measured("turns/h", 3600 * here.per_s, 3600 * here.per_s_draws, ""),
            "predicted_turns_per_hour": outlook.told("turns/h", lambda m: 3600 * m.throughput(outlook.agents)),
            "utilisation": outlook.told("fraction", lambda m: m.utilisation(outlook.agents), alone),
        },
        "limits": {
            "knee_agents": outlook.told("agents", lambda m: m.knee, blind or far),
            "kv_agents": outlook.measured(
                "agents", kv_value, kv_draws, "the KV capacity or the contexts are not known"
            ),
            "utilisation_agents": outlook.told(
                "agents", lambda m: m.agents_at_utilisation(GOOD_UTILISATION), blind or good_far
            ),
        },
    }


def cost(
    outlook: Outlook, gpus: int, turns: Sequence[ObservedTurn], ended: Mapping[str, float], rng: Any
) -> dict[str, Estimate]:
    """``gpus`` seconds of GPU for X turns: GPU-seconds a turn, a session, a task."""
    here, think = outlook.here, outlook.think
    each = {
        "gpu_seconds_per_turn": outlook.measured(
            "GPU-s",
            gpus / here.per_s if here.per_s else None,
            gpus / here.per_s_draws if here.per_s else None,
            "no turn ended",
        )
    }
    for name in ("session", "task"):
        counted = turns_of_each(turns, name, think, ended, here.until) if think else None
        value = draws = None
        if counted is not None and here.per_s:
            value = counted[0] * gpus / here.per_s
            draws = value * counted[1] / rng.gamma(counted[1], size=RESAMPLES) * here.per_s / here.per_s_draws
        each[f"gpu_seconds_per_{name}"] = outlook.measured("GPU-s", value, draws, f"fewer than five {name}s have ended")
    return each


class FleetAnalysis:
    """The capacity model of one model on one GPU type: its turns and samples, and since when they are alike.

    Everything is bounded: MAX_FIT_TURNS turns, MAX_SAMPLES samples, REMEMBERED turns for each load.
    """

    def __init__(self, model: str, gpu: str | None) -> None:
        self.model, self.gpu = model, gpu
        self._turns: list[ObservedTurn] = []
        self._complete_from = 0.0  # turns that began earlier may have met others that are not known
        self._samples: deque[FleetSample] = deque(maxlen=MAX_SAMPLES)
        self._remembered: dict[int, deque[tuple[float, ...]]] = {}  # load → rows of Measured
        self._since = 0.0  # when it started anew
        self._why = ""  # because of what
        self._flagged: dict[str, float] = {}  # flag → since when
        self._replicas: int | None = None
        self.think: ThinkFit | None = None

    def sample(self, sample: FleetSample) -> None:
        """Take a look at the fleet; another number of replicas, once it lasts, starts the fit anew."""
        self._samples.append(sample)
        if self._replicas is None:
            self._replicas = len(sample.in_flight) or None  # a fleet that starts is no change
        latest = list(self._samples)[-SETTLED_CHANGE:]
        counts = {len(look.in_flight) for look in latest}
        if len(latest) == SETTLED_CHANGE and len(counts) == 1 and counts != {self._replicas or 0}:
            self._restart(latest[0].at, f"{self._replicas} replicas became {len(sample.in_flight)}")
            self._replicas = len(sample.in_flight)

    @property
    def has_turns(self) -> bool:
        return bool(self._turns or self._since)

    def _restart(self, at: float, why: str) -> None:
        self._since, self._why = max(self._since, at), why
        self._remembered.clear()
        # Turns that reached into the new time stay: the ones after met them.
        self._turns = [turn for turn in self._turns if turn.end >= at]
        while self._samples and self._samples[0].at < at:
            self._samples.popleft()

    def take(self, turns: Iterable[ObservedTurn], now: float) -> None:
        """Add finished turns; forget the oldest, but for some of each load."""
        fresh = [turn for turn in turns if turn.end >= self._since]
        if not self._turns and fresh:
            self._complete_from = max(self._complete_from, min(turn.end for turn in fresh))
        self._turns = sorted([*self._turns, *fresh], key=lambda turn: turn.end)
        if len(self._turns) > MAX_FIT_TURNS:
            self._forget(self._turns[len(self._turns) - 3 * MAX_FIT_TURNS // 4].end)
        elif self._turns and self._turns[0].end < now - MAX_FIT_AGE_S - 600:
            self._forget(now - MAX_FIT_AGE_S)

    def _forget(self, before: float) -> None:
        gone, self._turns = self._turns, [turn for turn in self._turns if turn.end >= before]
        rows, beginnings, replica = measure(gone, self._start, before)
        if len(rows.seconds) >= LEAST_TURNS:
            _regress(rows, beginnings, replica)
            for row in zip(*dataclasses.astuple(rows), strict=True):
                load = math.floor(2 * math.log2(max(1.0, row[3])))
                self._remembered.setdefault(load, deque(maxlen=REMEMBERED)).append(row)
        self._complete_from = max(self._complete_from, before)

    @property
    def _start(self) -> float:
        return max(self._since, self._complete_from)

    def _with_remembered(self, rows: Measured) -> Measured:
        """The rows, and after them those of turns long gone, ten of one load a block."""
        import numpy as np

        kept = [
            (*row[:-1], -1 - 1000 * load - index // 10)
            for load, remembered in self._remembered.items()
            for index, row in enumerate(remembered)
        ]
        if not kept:
            return rows
        columns = zip(dataclasses.astuple(rows), np.array(kept).T, strict=True)
        return Measured(*(np.concatenate(pair) for pair in columns))

    def document(self, now: float, ended: Mapping[str, float], rng: Any) -> dict[str, Any]:
        """This model's entry of /stats' `analysis`, at time ``now``."""
        change = mix_change([turn for turn in self._turns if turn.begin >= self._start])
        if change is not None:
            self._restart(change[0], f"the {change[1]} changed")
        outlook = self._outlook(now, ended, rng)
        what_ifs = outlook.what_ifs()
        flags = find_flags(outlook, self._samples)
        self._flagged = {name: self._flagged.get(name, now) for name in flags}
        gpus = int(outlook.model.replicas) * (self._samples[-1].gpus_per_replica if self._samples else 1)
        return {
            "model": self.model,
            "gpu": self.gpu,
            "replicas": self.replicas,
            "computed_at": now,
            "verdict": judge(outlook, what_ifs),
            "flags": [{"name": name, "since": self._flagged[name], "sentence": flags[name]} for name in flags],
            **figures(outlook),
            "suggestion": suggest(outlook),
            "curve": outlook.curve(),
            "what_ifs": what_ifs,
            "cost": cost(outlook, gpus, self._turns, ended, rng),
            "littles_law": littles_law(outlook.here, None if outlook.few else outlook.model.think_s or None),
        }

    def _outlook(self, now: float, ended: Mapping[str, float], rng: Any) -> Outlook:
        """Everything that is known now."""
        start, last = self._start, self._samples[-1] if self._samples else None
        recent = [turn.seconds for turn in self._turns[-500:]]
        # Turns in flight are not known before they end: what began later than this may still change.
        settled = now - min(120.0, 1.1 * max(recent, default=0.0))
        self.think = fit_think(self._turns, start, settled, ended, rng)
        think_s = self.think.mean_s if self.think else None
        cycle_s = (think_s or 0.0) + sum(recent) / max(1, len(recent))
        since = max(start, now - max(OPERATING_S, 5 * cycle_s), self._samples[0].at if self._samples else 0.0)
        here = operating(self._turns, self._samples, since, now, rng)
        measured, beginnings, replica = measure(self._turns, start, settled)
        rows = self._with_remembered(measured)
        turns, few = len(rows.seconds), None
        if turns < LEAST_TURNS:
            few = f"{turns} of {LEAST_TURNS} turns{self._why and f' since {self._why}'}: too few for any number"
        elif not here.turns:
            few = f"no turn ended in the last {here.window_s:.0f} s"
        fit = fit_service(rows, beginnings, replica, rng) if few is None else None
        law = littles_law(here, think_s)
        agents = here.agents if here.agents is not None else law["agents_computed"]
        model, draws = capacity_models(max(1, self.replicas), fit, self.think, last.slots if last else None)
        kv_tokens = (last.kv_capacity_tokens or 0) * self.replicas if last else 0
        return Outlook(
            model=model,
            draws=draws,
            fit=fit,
            think=self.think,
            here=here,
            agents=agents or 0.0,
            basis=Basis(turns, round(float(rows.begin.max() - rows.begin.min()), 1) if turns else 0.0),
            reason=self._refusal(fit, agents, law),
            few=few,
            kv=context_limit([turn for turn in self._turns if turn.end >= start], kv_tokens, rng),
        )

    @property
    def replicas(self) -> int:
        """That serve now, as far as anybody looked."""
        if self._samples:
            return len(self._samples[-1].in_flight)
        return len({turn.replica for turn in self._turns})

    def _refusal(self, fit: ServiceFit | None, agents: float | None, law: Mapping[str, Any]) -> str | None:
        """Why nothing is told that rests on the fit; None where it may."""
        if self.think is None:
            return "think times are not known: no session had two turns (name them: attach() or X-Session-ID)"
        if not self.replicas or not agents:
            return "no agent is active" if self.replicas else "no replica serves"
        if law["holds"] is False:
            return (
                f"Little's law is off by {_percent(abs(law['error']))}: {law['agents_computed']:.4g} agents by the "
                f"turns, {law['agents_sampled']:.4g} counted; turns are missing, or agents share sessions"
            )
        return fit.reason if fit else None


def _plain(value: Any) -> Any:
    """With estimates as the dictionaries that the document has."""
    if isinstance(value, Estimate):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


class CapacityAnalysis:
    """What holds each model on each GPU type back.  Finished turns and fleet samples in, /stats' `analysis` out.

    ``add``, ``end`` and ``sample`` only note what they are given, from any one thread; ``document`` does the work, in
    any one thread too. ``clock`` is seconds since the epoch; ``dice``, seeded, make the resampling repeatable.
    """

    def __init__(self, clock: Callable[[], float], dice: random.Random) -> None:
        self._clock, self._dice = clock, dice
        self._inbox: deque[TurnRecord | FleetSample | tuple[str, float]] = deque(maxlen=MAX_INBOX)
        self._fleets: OrderedDict[tuple[str, str | None], FleetAnalysis] = OrderedDict()
        self._homes: OrderedDict[str, tuple[str, str | None]] = OrderedDict()  # replica → model and GPU type
        self._ended: OrderedDict[str, float] = OrderedDict()  # sessions that said so

    def add(self, record: TurnRecord) -> None:
        """Take a finished turn."""
        self._inbox.append(record)

    def end(self, session: str, at: float) -> None:
        """Note that an agent said that its session is over."""
        self._inbox.append((session, at))

    def sample(self, sample: FleetSample) -> None:
        """Take a look at a fleet; once a second."""
        self._inbox.append(sample)

    def presence(self, model: str, gpu: str | None, silent_s: float) -> float:
        """How probable it is that a session so long silent still thinks; before think times are known, a guess."""
        fleet = self._fleets.get((model, gpu))
        think = fleet.think if fleet is not None else None
        return think.presence(silent_s) if think is not None else float(silent_s < 60)

    def document(self) -> list[dict[str, Any]]:
        """One entry for each model and GPU type that had a turn, as docs/stats.schema.json says."""
        now = self._clock()
        self._sort_inbox(now)
        fleets = [fleet for fleet in self._fleets.values() if fleet.has_turns]
        if not fleets:
            return []  # without traffic numpy is not even loaded
        import numpy as np

        rng = np.random.default_rng(self._dice.getrandbits(64))
        return [_plain(fleet.document(now, self._ended, rng)) for fleet in fleets]

    def _sort_inbox(self, now: float) -> None:
        arrived = [self._inbox.popleft() for _ in range(len(self._inbox))]
        turns: dict[tuple[str, str | None], list[ObservedTurn]] = {}
        for item in arrived:
            if isinstance(item, FleetSample):
                self._fleet((item.model, item.gpu)).sample(item)
                for replica in item.in_flight:
                    self._homes[replica] = item.model, item.gpu
                    self._homes.move_to_end(replica)
            elif isinstance(item, tuple):
                self._ended[item[0]] = item[1]
        for item in arrived:
            if isinstance(item, TurnRecord) and (turn := observed_turn(item)) is not None:
                if turn.session is not None and turn.arrived > self._ended.get(turn.session, math.inf):
                    del self._ended[turn.session]  # it went on
                home = self._homes.get(turn.replica)
                if home is not None or not self._homes:
                    turns.setdefault(home or (item.model or "", None), []).append(turn)
        for key, found in turns.items():
            self._fleet(key).take(found, now)
        for table, bound in ((self._fleets, MAX_ANALYSED), (self._homes, 10_000), (self._ended, 20_000)):
            while len(table) > bound:
                table.popitem(last=False)

    def _fleet(self, key: tuple[str, str | None]) -> FleetAnalysis:
        fleet = self._fleets.setdefault(key, FleetAnalysis(*key))
        self._fleets.move_to_end(key)
        return fleet
