"""Measures the load that each turn met on its replica, and checks whether it can be fitted. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.insight.capacity import EPSILON, RESAMPLES, Array, significant
from agent_infra_core.insight.fit import interval_widening, resample_counts
from agent_infra_core.insight.turns import TurnRecord, generates, is_finite_number

LITTLE_TOLERANCE = 0.15
MIX_RATIO = 1.4  # change of the typical turn that restarts the fit, as a factor
HIT_CHANGE = 0.15  # change of the cached share of prompts that restarts the fit


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
        return [row["engine"][name] for row in ready if is_finite_number(row["engine"].get(name))]

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


@dataclass(slots=True)
class ObservedTurn:
    """The part of a turn record used by the fit. Times are s since the epoch; at ``begin`` the replica got the turn."""

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
        queue_s=(record.queue_ms or 0.0) / 1000,
        think_s=None if record.think_ms is None else record.think_ms / 1000,
        pre_s=None if record.pre_ms is None else record.pre_ms / 1000,
        prompt=record.prompt_tokens,
        cached=record.cached_tokens,
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
    was alone. ``variance`` is its variance over that time. Both are exact, computed from when each turn began and
    ended, so the regressor has no sampling error, which would bias B towards zero. ``excess`` is the context in flight
    beyond that of as many mean turns.
    """

    begin: Array
    seconds: Array
    size: Array  # tokens of the answer, in units of the mean
    in_flight: Array
    variance: Array
    excess: Array
    began: Array  # turns that began on the replica during this turn
    block: Array  # number of the block: a replica and a stretch of time


def _averages(begin: Array, end: Array, excess: Array) -> tuple[Array, Array, Array]:
    """Turns in flight, their variance and the excess context on one replica, averaged over each turn's own time."""
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

    mean = average(present)
    return mean, np.maximum(average(present**2) - mean**2, 0.0), average(context)


def measure(turns: Sequence[ObservedTurn], since: float, until: float) -> tuple[Measured, list[Beginnings], Array]:
    """Measure the completed turns that began in [since, until].

    Returns the measured load, the beginnings on each replica, and each turn's index into these. ``turns`` must contain
    every turn that was in flight in that time.
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
    # Overlapping turns share what slowed them down, so a block is at least one turn long. Aim for about 80 blocks.
    stretch = np.floor((begin - since) / max(typical_s, span_s * len(names) / 80))
    block = stretch * len(names) + replica
    columns = (begin, seconds, output, mean, variance, excess, np.ones(len(turns)), block)
    return Measured(*(column[wanted] for column in columns)), beginnings, replica[wanted]


@dataclass(frozen=True)
class Operating:
    """The measured state of a run over [since, until], in s since the epoch."""

    since: float
    until: float
    turns: int  # completed
    per_s: float  # X
    per_s_draws: Array
    wait_s: float  # mean of queue + inference
    agents: float | None  # N, sampled; None without samples
    agents_draws: Array
    in_flight: float | None  # per replica, sampled

    @property
    def window_s(self) -> float:
        return self.until - self.since


def operating(
    turns: Sequence[ObservedTurn], samples: Sequence[FleetSample], since: float, until: float, rng: Any
) -> Operating:
    """Measure a run over [since, until]. X's draws come from counts in 16 equal parts of that time (batch means)."""
    import numpy as np

    done = [turn for turn in turns if turn.is_completed and since <= turn.end <= until]
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
        wait_s=float(np.mean([turn.queue_s + turn.seconds for turn in done])) if done else 0.0,
        agents=float(np.mean(agents)) if agents else None,
        agents_draws=np.array(agents or [math.nan], dtype=float),
        in_flight=float(np.mean(in_flight)) if in_flight else None,
    )


def littles_law(here: Operating, think_s: float | None) -> dict[str, Any]:
    """Compare the sampled N with N = X·(Z + R) from the turns. ``holds`` is None while there is too little data.

    The tolerance is LITTLE_TOLERANCE plus 1.64 standard errors of X, a bound that 19 of 20 samples stay within.
    """
    import numpy as np

    if think_s is None:
        return {"agents_sampled": here.agents, "agents_computed": None, "error": None, "holds": None}
    cycle_s = think_s + here.wait_s
    computed = here.per_s * cycle_s
    error = None if not here.agents else computed / here.agents - 1
    is_judged = error is not None and here.window_s >= 2 * cycle_s
    tolerance = LITTLE_TOLERANCE + 1.64 * float(np.std(here.per_s_draws)) / max(here.per_s, EPSILON)
    return {
        "agents_sampled": None if here.agents is None else significant(here.agents),
        "agents_computed": significant(computed),
        "error": None if error is None else round(error, 4),
        "holds": abs(error or 0.0) <= tolerance if is_judged else None,
    }


def change_point(values: Sequence[float], least: float) -> int | None:
    """Index at which the mean of a series changed by more than ``least``, or None (CUSUM, Page 1954).

    This is the most likely split with at least 50 values on both sides and a step of more than 6 standard errors.
    """
    import numpy as np

    series = np.array(values)
    if len(series) < 100:
        return None
    before = np.arange(50, len(series) - 49)
    sums, squares = np.cumsum(series), np.cumsum(series**2)
    first, second = sums[before - 1] / before, (sums[-1] - sums[before - 1]) / (len(series) - before)
    within = squares[-1] - before * first**2 - (len(series) - before) * second**2
    deviation = np.sqrt(np.maximum(within, EPSILON) / len(series))
    error = deviation * np.sqrt(1 / before + 1 / (len(series) - before))
    best = int(np.argmax(np.abs(second - first) / error))
    step = abs(float(second[best] - first[best]))
    return int(before[best]) if step > max(least, 6 * float(error[best])) else None


def mix_change(turns: Sequence[ObservedTurn]) -> tuple[float, str] | None:
    """When the prompt mix or the hit rate last changed, and which of the two; None if neither did."""
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


def kv_agent_limit(turns: Sequence[ObservedTurn], kv_tokens: float, rng: Any) -> tuple[float, Array] | None:
    """N_kv and its draws: ``kv_tokens`` divided by a session's mean context, which it keeps while it thinks."""
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
