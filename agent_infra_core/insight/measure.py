"""Measures the load that each turn met on its replica, and checks whether it can be fitted. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.insight.capacity import EPSILON, RESAMPLES, Array, significant
from agent_infra_core.insight.statistics import (
    STEP_RATIO,
    change_point,
    interval_widening,
    last_change,
    resample_counts,
)
from agent_infra_core.insight.turns import TurnRecord, generates, is_finite_number

LITTLE_TOLERANCE = 0.15
MIX_RATIO = 1.4  # change of the typical turn that restarts the fit, as a factor
HIT_CHANGE = 0.15  # change of the share of expected tokens that are cached which restarts the fit
ERROR_CHANGE = 0.1  # change of the share of turns without an answer which does the same
MOST_ABORTED = 0.05  # share of turns without an answer above which nothing is predicted


@dataclass(frozen=True)
class FleetSample:
    """One sample of the replicas of a model on a GPU type, independent of the turn records."""

    at: float
    model: str
    gpu: str | None
    in_flight: Mapping[str, int]  # per serving replica
    active_agents: float | None = None  # sessions that are waiting or thinking
    slots: int | None = None  # per replica
    kv_capacity_tokens: int | None = None  # per replica
    kv_usage: float | None = None  # mean, 0 to 1
    preemptions: int | None = None  # of all replicas since they started
    unhealthy: tuple[str, ...] = ()
    gpus_per_replica: int = 1
    waiting_agents: int = 0  # sessions with an open turn
    open_turns: int = 0  # of sessions: at replicas and in the queue


def fleet_samples(
    at: float,
    replicas: Iterable[Mapping[str, Any]],
    sessions: Iterable[tuple[str, str | None, int, float]],
    presence: Callable[[str, str | None, float], float],
) -> list[FleetSample]:
    """One sample per model and GPU type at time ``at``, from the rows of ``backends`` in /stats.

    ``sessions`` has a ``(model, replica, turns open, seconds silent)`` for each session, as from Tracker.silences. A
    silent session counts as ``presence(model, GPU type, seconds)``, the probability that it is still active.
    """
    fleets: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    homes: dict[str | None, tuple[str, str | None]] = {}
    for row in replicas:
        key = row["model"], (row["gpu"] or {}).get("name")
        fleets.setdefault(key, []).append(row)
        homes[row["id"]] = key
    agents: dict[tuple[str, str | None], list[tuple[int, float]]] = {}
    for model, replica, open_turns, silent_s in sessions:
        key = homes.get(replica) or next((key for key in fleets if key[0] == model), (model, None))
        agents.setdefault(key, []).append((open_turns, 1.0 if open_turns else presence(*key, silent_s)))
    return [_fleet_sample(key, rows, at, agents.get(key, [])) for key, rows in fleets.items()]


def _fleet_sample(
    key: tuple[str, str | None], rows: Sequence[Mapping[str, Any]], at: float, agents: Sequence[tuple[int, float]]
) -> FleetSample:
    ready = [row for row in rows if row["state"] == "ready" and row["healthy"] is not False]
    unhealthy = [row for row in rows if row["state"] == "failed" or (row["state"] == "ready" and row not in ready)]

    def known(name: str) -> list[Any]:
        return [row["engine"][name] for row in ready if is_finite_number(row["engine"].get(name))]

    slots = [row["slots"] for row in ready if row["slots"]]
    usage = known("kv_usage")
    return FleetSample(
        at=at,
        model=key[0],
        gpu=key[1],
        in_flight={row["id"]: row["inflight"] or 0 for row in ready},
        active_agents=sum(present for _, present in agents),
        waiting_agents=sum(1 for turns, _ in agents if turns),
        open_turns=sum(turns for turns, _ in agents),
        slots=min(slots, default=None),
        kv_capacity_tokens=min(known("kv_capacity_tokens"), default=None),
        kv_usage=sum(usage) / len(usage) if usage else None,
        preemptions=sum(known("preemptions")) if known("preemptions") else None,
        unhealthy=tuple(row["id"] for row in unhealthy),
        gpus_per_replica=max([(row["gpu"] or {}).get("count") or 1 for row in ready], default=1),
    )


@dataclass(slots=True)
class ObservedTurn:
    """The part of a turn record used by the fit. Times are s since the epoch; at ``begin`` the replica got the turn."""

    begin: float
    end: float
    replica: str
    session: str | None
    task: str | None
    is_completed: bool
    is_aborted: bool  # the client left, or the answer failed
    queue_s: float
    think_s: float | None
    pre_s: float | None
    ttft_s: float | None
    prompt: int | None
    cached: int | None
    expected: int | None  # tokens that should have been cached
    output: int | None

    @property
    def arrived(self) -> float:
        return self.begin - self.queue_s

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def fresh(self) -> int | None:
        """Tokens to prefill."""
        return None if self.prompt is None else max(1, self.prompt - (self.cached or 0))


def observed_turn(record: TurnRecord) -> ObservedTurn | None:
    """The part of a record used by the fit; None if the turn was never sent to a replica or isn't a generation."""
    if record.backend is None or not record.inference_ms or not generates(record.path):
        return None
    return ObservedTurn(
        begin=record.finished_at - record.inference_ms / 1000,
        end=record.finished_at,
        replica=record.backend,
        session=record.session,
        task=record.task,
        is_completed=record.outcome == "completed" and record.retries == 0,
        is_aborted=record.outcome != "completed",
        queue_s=(record.queue_ms or 0.0) / 1000,
        think_s=None if record.think_ms is None else record.think_ms / 1000,
        pre_s=None if record.pre_ms is None else record.pre_ms / 1000,
        ttft_s=None if record.ttft_ms is None else record.ttft_ms / 1000,
        prompt=record.prompt_tokens,
        cached=record.cached_tokens,
        expected=record.expected_cached_tokens,
        output=record.completion_tokens or None,
    )


def _known(values: Iterable[float | None], fallback: float = 1.0) -> Array:
    """An array with unknown values replaced by the mean of the known ones."""
    import numpy as np

    array = np.array([math.nan if value is None else value for value in values], dtype=float)
    known = array[np.isfinite(array)]
    return np.where(np.isfinite(array), array, known.mean() if len(known) else fallback)


class Beginnings:
    """When turns began on a replica, and the prefill work of each, in units of the mean turn's."""

    def __init__(self, begin: Array, work: Array) -> None:
        import numpy as np

        order = np.argsort(begin, kind="stable")
        self._begin = begin[order]
        self._work = np.concatenate([[0.0], np.cumsum(work[order])])

    def between(self, first: Array, last: Array) -> Array:
        """The prefill work of turns that began in [first, last]."""
        import numpy as np

        upto = self._work[np.searchsorted(self._begin, last, side="right")]
        return upto - self._work[np.searchsorted(self._begin, first, side="left")]


@dataclass
class Measured:
    """The load that turns met, as arrays with one value per turn.

    ``in_flight`` is the number of turns on the replica, averaged over the turn's own time; it is 1.0 for a turn that
    was alone. It is exact, computed from when each turn began and ended, so the regressor has no sampling error, which
    would bias B towards zero. ``excess`` is the context in flight beyond that of as many mean turns.
    """

    begin: Array
    seconds: Array  # divided by the replica's speed factor in remembered rows
    size: Array  # tokens of the answer, in units of the mean
    in_flight: Array
    excess: Array
    began: Array  # turns that began on the replica during this turn
    block: Array  # number of the block: a replica and a stretch of time


def _averages(begin: Array, end: Array, excess: Array) -> tuple[Array, Array]:
    """Turns in flight and the excess context on one replica, averaged over each turn's own time."""
    import numpy as np

    times = np.concatenate([begin, end])
    order = np.argsort(times, kind="stable")
    times = times[order]
    present = np.cumsum(np.repeat([1.0, -1.0], len(begin))[order])
    context = np.cumsum(np.concatenate([excess, -excess])[order])
    steps = np.diff(times)

    def average(level: Array) -> Array:
        integral = np.concatenate([[0.0], np.cumsum(level[:-1] * steps)])
        return (np.interp(end, times, integral) - np.interp(begin, times, integral)) / np.maximum(end - begin, EPSILON)

    return average(present), average(context)


def measure(
    turns: Sequence[ObservedTurn], since: float, until: float, same_speed_since: Mapping[str, float]
) -> tuple[Measured, list[Beginnings], Array, list[str]]:
    """Measure the completed turns that began in [since, until], on a replica since its speed last changed.

    Returns the measured load, the beginnings on each replica, each turn's index into these, and the replicas' names.
    ``turns`` must contain every turn that was in flight in that time.
    """
    import numpy as np

    begin, end = np.array([turn.begin for turn in turns]), np.array([turn.end for turn in turns])
    work, context = _known(turn.fresh for turn in turns), _known(turn.prompt for turn in turns)
    output = _known(turn.output for turn in turns)
    names = sorted({turn.replica for turn in turns})
    number = {name: index for index, name in enumerate(names)}
    replica = np.array([number[turn.replica] for turn in turns], dtype=int)
    first = np.array([max(since, same_speed_since.get(name, since)) for name in names])
    wanted = np.array([turn.is_completed for turn in turns], dtype=bool) & (begin <= until)
    wanted &= begin >= first[replica]
    if wanted.any():
        work, output = work / work[wanted].mean(), output / output[wanted].mean()
        context = context / context[wanted].mean() - 1
    mean, excess = np.zeros((2, len(turns)))
    beginnings = []
    for index in range(len(names)):
        here = replica == index
        mean[here], excess[here] = _averages(begin[here], end[here], context[here])
        beginnings.append(Beginnings(begin[here], work[here]))
    seconds = end - begin
    typical_s = seconds[wanted].mean() if wanted.any() else 1.0
    span_s = np.ptp(begin[wanted]) if wanted.any() else 0.0
    # Overlapping turns share what slowed them down, so a block is at least one turn long. Aim for about 80 blocks.
    stretch = np.floor((begin - since) / max(typical_s, span_s * len(names) / 80))
    block = stretch * len(names) + replica
    columns = (begin, seconds, output, mean, excess, np.ones(len(turns)), block)
    return Measured(*(column[wanted] for column in columns)), beginnings, replica[wanted], names


@dataclass(frozen=True)
class Operating:
    """The measured state of a run over [since, until], in s since the epoch."""

    since: float
    until: float
    turns: int  # completed
    per_s: float  # X
    per_s_draws: Array
    wait_s: float  # mean of queue + inference
    slow_wait_s: float  # the 95th percentile
    think_s: float  # mean per turn, of think times that ended
    aborted: float  # share of turns without an answer
    agents: float | None  # N, sampled; None without samples
    agents_draws: Array
    in_flight: float | None  # per replica, sampled
    parallel: float  # p: turns in flight of an agent that waits
    full: float  # share of samples with every slot taken and turns that wait for one

    @property
    def window_s(self) -> float:
        return self.until - self.since


def _is_full(sample: FleetSample) -> bool:
    running = sum(sample.in_flight.values())
    return bool(sample.slots) and running >= (sample.slots or 0) * len(sample.in_flight) < sample.open_turns


def operating(
    turns: Sequence[ObservedTurn], samples: Sequence[FleetSample], since: float, until: float, rng: Any
) -> Operating:
    """Measure a run over [since, until]. X's draws come from counts in 16 equal parts of that time (batch means)."""
    import numpy as np

    over = [turn for turn in turns if since <= turn.end <= until]
    done = [turn for turn in over if not turn.is_aborted]
    waits = [turn.queue_s + turn.seconds for turn in over]
    length = max(until - since, EPSILON)
    counts, _ = np.histogram([turn.end for turn in done], bins=16, range=(since, since + length))
    error = interval_widening(16, 1) * float(np.std(counts, ddof=1)) / 4 / max(1.0, float(np.mean(counts)))
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
        wait_s=float(np.mean(waits)) if over else 0.0,
        slow_wait_s=float(np.quantile(waits, 0.95)) if over else 0.0,
        think_s=sum(turn.think_s or 0.0 for turn in over) / max(1, len(over)),
        aborted=1 - len(done) / max(1, len(over)),
        agents=float(np.mean(agents)) if agents else None,
        agents_draws=np.array(agents or [math.nan], dtype=float),
        in_flight=float(np.mean(in_flight)) if in_flight else None,
        parallel=max(1.0, sum(look.open_turns for look in looks) / max(1, sum(look.waiting_agents for look in looks))),
        full=sum(map(_is_full, looks)) / max(1, len(looks)),
    )


def littles_law(here: Operating, think_s: float | None) -> dict[str, Any]:
    """Compare the sampled N with N = X·(Z + W/p) from the turns. ``holds`` is None while there is too little data.

    The tolerance is LITTLE_TOLERANCE plus 1.64 standard errors of X, a bound that 19 of 20 samples stay within. X
    counts turns without an answer too: their agents waited and thought like the others. While long think times have
    begun that haven't ended, N lies between what ended think times say and what ``think_s``, their mean, does.
    """
    import numpy as np

    if think_s is None:
        return {"agents_sampled": here.agents, "agents_computed": None, "error": None, "holds": None}
    cycle_s = think_s + here.wait_s / here.parallel
    rate = here.per_s / max(EPSILON, 1 - here.aborted)
    bounds = sorted((rate * cycle_s, rate * (cycle_s - think_s + here.think_s)))
    computed = rate * cycle_s if here.agents is None else min(max(here.agents, bounds[0]), bounds[1])
    error = None if not here.agents else computed / here.agents - 1
    is_judged = error is not None and here.window_s >= 2 * cycle_s
    tolerance = LITTLE_TOLERANCE + 1.64 * float(np.std(here.per_s_draws)) / max(here.per_s, EPSILON)
    return {
        "agents_sampled": None if here.agents is None else significant(here.agents),
        "agents_computed": significant(computed),
        "error": None if error is None else round(error, 4),
        "holds": abs(error or 0.0) <= tolerance if is_judged else None,
    }


def mix_change(turns: Sequence[ObservedTurn]) -> tuple[float, str] | None:
    """When the prompt mix or the hit rate last changed, and which of the two; None if neither did.

    Only turns that continue a context count, by what they add to it: contexts that grow, or begin again, aren't a
    change.
    """
    later = [turn for turn in turns if turn.is_completed and turn.output and turn.expected and turn.prompt]
    found = []
    for least, what, figure in (
        (math.log(MIX_RATIO), "prompt mix", lambda turn: math.log(turn.output)),
        (math.log(MIX_RATIO), "prompt mix", lambda turn: math.log(max(1, turn.prompt - turn.expected))),
        (HIT_CHANGE, "hit rate", lambda turn: min(1.0, (turn.cached or 0) / turn.expected)),
    ):
        index = change_point([figure(turn) for turn in later], least)
        if index is not None:
            found.append((later[index].begin, what))
    return max(found, default=None)


def operating_change(turns: Sequence[ObservedTurn], samples: Sequence[FleetSample]) -> float:
    """When the number of agents or the share of turns without an answer last changed; 0.0 if neither did."""
    agents = [(look.at, math.log(max(1.0, look.active_agents))) for look in samples if look.active_agents is not None]
    errors = [(turn.end, float(turn.is_aborted)) for turn in turns]
    at, ratio = last_change(agents, math.log(STEP_RATIO)), math.log(STEP_RATIO) / 2
    before = [number for time, number in agents if time < at]
    after = [number for time, number in agents if time >= at]
    levels = [sum(part) / len(part) for start in range(0, len(before), 30) if (part := before[start : start + 30])]
    if levels and min(levels) - ratio <= sum(after) / len(after) <= max(levels) + ratio:
        at = 0.0  # batches come and go: the number has been there before
    return max(at, last_change(errors, ERROR_CHANGE))


def think_change(turns: Sequence[ObservedTurn]) -> float:
    """When the think time last changed; 0.0 if it never did.

    The first think times to end are the short ones, so those count that ended when 95 % of all would have.
    """
    known = [(turn.arrived, turn.think_s) for turn in turns if turn.think_s is not None]
    usual_s = sorted(seconds for _, seconds in known)[math.ceil(0.95 * len(known)) - 1] if known else 0.0
    begun = min((at - seconds for at, seconds in known), default=0.0)
    settled = [(at, math.log(max(seconds, 1e-3))) for at, seconds in known if at >= begun + usual_s]
    return last_change(settled, math.log(STEP_RATIO))


def kv_agent_limit(
    turns: Sequence[ObservedTurn], kv_tokens: float, replicas: int, rng: Any
) -> tuple[float, Array] | None:
    """N_kv and its draws: ``kv_tokens`` of all replicas divided by what a session holds, also while it thinks.

    That is its mean context, times the copies that moves between replicas leave behind: 1 + k·(share of turns that
    moved), which is 1 if sessions stay and k if each turn goes to a replica at random.
    """
    import numpy as np

    held = [(turn.session or "", turn.prompt + (turn.output or 0)) for turn in turns if turn.prompt]
    if not held or not kv_tokens:
        return None
    places = [(turn.session, turn.replica) for turn in turns if turn.session is not None]
    home: dict[str, str] = {}
    moves = 0
    for name, replica in places:
        moves += home.get(name, replica) != replica
        home[name] = replica
    copies = min(replicas, 1 + replicas * moves / max(1, len(places) - len(home)))
    _, session = np.unique([name for name, _ in held], return_inverse=True)
    tokens, number = np.zeros((2, int(session.max()) + 1))
    np.add.at(tokens, session, [copies * context for _, context in held])
    np.add.at(number, session, 1.0)
    counts = resample_counts(len(number), rng)
    return float(kv_tokens * number.sum() / tokens.sum()), kv_tokens * (counts @ number) / (counts @ tokens)
