"""Measures the load that each turn met on its replica, and checks whether it can be fitted. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.insight.capacity import EPSILON, RESAMPLES, Array, significant
from agent_infra_core.insight.statistics import (
    LEAST_SIDE,
    STEP_RATIO,
    change_point,
    interval_widening,
    last_change,
    resample_counts,
)
from agent_infra_core.insight.turns import TurnRecord, generates, in_seconds, is_finite_number

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


# What the fit uses of a turn. Times are s since the epoch; at ``begin`` the replica got the turn. Unknown is NaN.
_TURN_COLUMNS: tuple[tuple[str, type, Callable[[TurnRecord], Any]], ...] = (
    ("begin", float, lambda record: record.finished_at - (record.inference_ms or 0.0) / 1000),
    ("end", float, lambda record: record.finished_at),
    ("session", int, lambda record: number_of(record.session)),
    ("task", int, lambda record: number_of(record.task)),
    ("is_completed", bool, lambda record: record.outcome == "completed" and record.retries == 0),
    ("is_aborted", bool, lambda record: record.outcome != "completed"),  # the client left, or the answer failed
    ("queue_s", float, lambda record: (record.queue_ms or 0.0) / 1000),
    ("think_s", float, lambda record: in_seconds(record.think_ms)),
    ("pre_s", float, lambda record: in_seconds(record.pre_ms)),
    ("ttft_s", float, lambda record: in_seconds(record.ttft_ms)),
    ("prompt", float, lambda record: record.prompt_tokens),
    ("cached", float, lambda record: record.cached_tokens),
    ("expected", float, lambda record: record.expected_cached_tokens),  # tokens that should have been cached
    ("output", float, lambda record: record.completion_tokens or None),
)


def number_of(name: str | None) -> int:
    """A number of 63 bits for a session or task, so that no two names share one; 0 for None."""
    if name is None:
        return 0
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_observed(record: TurnRecord) -> bool:
    """Whether a turn was sent to a replica, and is a generation."""
    return record.backend is not None and bool(record.inference_ms) and generates(record.path)


def observed_turns(records: Sequence[TurnRecord], replicas: Mapping[str, int]) -> Array:
    """The _TURN_COLUMNS of observed turns and ``arrived``, ``seconds``, ``fresh`` (tokens to prefill) and ``replica``,
    its number in ``replicas``: a structured array with one row per turn."""
    import numpy as np

    names = [*((name, kind) for name, kind, _ in _TURN_COLUMNS), *_DERIVED_COLUMNS]
    turns = np.empty(len(records), dtype=names)
    for name, kind, read in _TURN_COLUMNS:
        turns[name] = np.array([read(record) for record in records], dtype=kind)
    turns["replica"] = [replicas[record.backend or ""] for record in records]
    turns["arrived"], turns["seconds"] = turns["begin"] - turns["queue_s"], turns["end"] - turns["begin"]
    turns["fresh"] = np.maximum(1.0, turns["prompt"] - np.nan_to_num(turns["cached"]))
    return turns


_DERIVED_COLUMNS = (("replica", int), ("arrived", float), ("seconds", float), ("fresh", float))


def _known(array: Array, fallback: float = 1.0) -> Array:
    """``array`` with unknown values replaced by the mean of the known ones."""
    import numpy as np

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
    turns: Array, names: Sequence[str], since: float, until: float, same_speed_since: Mapping[str, float]
) -> tuple[Measured, list[Beginnings], Array, list[str]]:
    """Measure the completed turns that began in [since, until], on a replica since its speed last changed.

    Returns the measured load, the beginnings on each replica, each turn's index into these, and the replicas' names.
    ``turns`` must contain every turn that was in flight in that time; ``names`` are the replicas' by their numbers.
    """
    import numpy as np

    begin, end = turns["begin"], turns["end"]
    work, context, output = _known(turns["fresh"]), _known(turns["prompt"]), _known(turns["output"])
    numbers, replica = np.unique(turns["replica"], return_inverse=True)
    found = [names[number] for number in numbers]
    first = np.array([max(since, same_speed_since.get(name, since)) for name in found])
    wanted = turns["is_completed"] & (begin <= until) & (begin >= first[replica])
    if wanted.any():
        work, output = work / work[wanted].mean(), output / output[wanted].mean()
        context = context / context[wanted].mean() - 1
    mean, excess = np.zeros((2, len(turns)))
    beginnings = []
    for index in range(len(found)):
        here = replica == index
        mean[here], excess[here] = _averages(begin[here], end[here], context[here])
        beginnings.append(Beginnings(begin[here], work[here]))
    typical_s = turns["seconds"][wanted].mean() if wanted.any() else 1.0
    span_s = np.ptp(begin[wanted]) if wanted.any() else 0.0
    # Overlapping turns share what slowed them down, so a block is at least one turn long. Aim for about 80 blocks.
    stretch = np.floor((begin - since) / max(typical_s, span_s * len(found) / 80))
    block = stretch * len(found) + replica
    columns = (begin, turns["seconds"], output, mean, excess, np.ones(len(turns)), block)
    return Measured(*(column[wanted] for column in columns)), beginnings, replica[wanted], found


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
    agents_error: float  # standard error of N, as a share
    in_flight: float | None  # per replica, sampled
    parallel: float  # p: turns in flight of an agent that waits
    full: float  # share of samples with every slot taken and turns that wait for one

    @property
    def window_s(self) -> float:
        return self.until - self.since


def _is_full(sample: FleetSample) -> bool:
    running = sum(sample.in_flight.values())
    return bool(sample.slots) and running >= (sample.slots or 0) * len(sample.in_flight) < sample.open_turns


def _relative_error(parts: Array) -> float:
    """Standard error of the mean of 16 equal parts of a window (batch means), as a share of the mean."""
    import numpy as np

    return interval_widening(16, 1) * float(np.std(parts, ddof=1)) / 4 / max(1.0, float(np.mean(parts)))


def operating(turns: Array, samples: Sequence[FleetSample], since: float, until: float, rng: Any) -> Operating:
    """Measure a run over [since, until]. The errors of X and N come from 16 equal parts of that time."""
    import numpy as np

    over = turns[(turns["end"] >= since) & (turns["end"] <= until)]
    done, waits = over[~over["is_aborted"]], over["queue_s"] + over["seconds"]
    length = max(until - since, EPSILON)
    counts, _ = np.histogram(done["end"], bins=16, range=(since, since + length))
    per_s = len(done) / length
    looks = [sample for sample in samples if since <= sample.at <= until]
    agents = np.array([sample.active_agents for sample in looks if sample.active_agents is not None])
    in_flight = [sum(sample.in_flight.values()) / len(sample.in_flight) for sample in looks if sample.in_flight]
    return Operating(
        since=since,
        until=until,
        turns=len(done),
        per_s=per_s,
        per_s_draws=per_s * np.maximum(1 + _relative_error(counts) * rng.standard_normal(RESAMPLES), 0.01),
        wait_s=float(np.mean(waits)) if len(over) else 0.0,
        slow_wait_s=float(np.quantile(waits, 0.95)) if len(over) else 0.0,
        think_s=float(np.nansum(over["think_s"])) / max(1, len(over)),
        aborted=1 - len(done) / max(1, len(over)),
        agents=float(agents.mean()) if len(agents) else None,
        agents_error=_relative_error(agents[np.linspace(0, len(agents) - 1, 16).astype(int)]) if len(agents) else 0.0,
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
    tolerance = LITTLE_TOLERANCE + 1.64 * float(np.std(here.per_s_draws)) / max(here.per_s, EPSILON)
    return {
        "agents_sampled": None if here.agents is None else significant(here.agents),
        "agents_computed": significant(computed),
        "error": None if error is None else round(error, 4),
        "holds": abs(error) <= tolerance if error is not None and here.window_s >= 2 * cycle_s else None,
    }


def mix_change(turns: Array) -> tuple[float, str] | None:
    """When the prompt mix or the hit rate last changed, and which of the two; None if neither did.

    Only turns that continue a context count, by what they add to it: contexts that grow, or begin again, aren't a
    change.
    """
    import numpy as np

    later = turns[turns["is_completed"] & (turns["output"] > 0) & (turns["expected"] > 0) & (turns["prompt"] > 0)]
    added = np.maximum(1.0, later["prompt"] - later["expected"])
    hits = np.minimum(1.0, np.nan_to_num(later["cached"]) / later["expected"])
    found = []
    for least, what, values in (
        (math.log(MIX_RATIO), "prompt mix", np.log(later["output"])),
        (math.log(MIX_RATIO), "prompt mix", np.log(added)),
        (HIT_CHANGE, "hit rate", hits),
    ):
        if (index := change_point(values, least)) is not None:
            found.append((float(later["begin"][index]), what))
    return max(found, default=None)


def operating_change(turns: Array, samples: Sequence[FleetSample]) -> float:
    """When the number of agents or the share of turns without an answer last changed; 0.0 if neither did."""
    import numpy as np

    looks = [(look.at, look.active_agents) for look in samples if look.active_agents is not None]
    times, agents = np.array(looks or [(0.0, 1.0)]).T
    numbers = np.log(np.maximum(1.0, agents))
    at, ratio = last_change(times, numbers, math.log(STEP_RATIO)), math.log(STEP_RATIO) / 2
    before, after = numbers[times < at], numbers[times >= at].mean()
    levels = np.convolve(before, np.ones(LEAST_SIDE) / LEAST_SIDE, "valid") if len(before) >= LEAST_SIDE else before
    if len(levels) and min(levels) - ratio <= after <= max(levels) + ratio:
        at = 0.0  # batches come and go: the number has been there before
    return max(at, last_change(turns["end"], turns["is_aborted"], ERROR_CHANGE))


def think_change(turns: Array) -> float:
    """When the think time last changed; 0.0 if it never did.

    The first think times to end are the short ones, so those count that ended when 95 % of all would have.
    """
    import numpy as np

    known = turns[np.isfinite(turns["think_s"])]
    if not len(known):
        return 0.0
    at, seconds = known["arrived"], known["think_s"]
    settled = at >= (at - seconds).min() + np.quantile(seconds, 0.95, method="inverted_cdf")
    return last_change(at[settled], np.log(np.maximum(seconds[settled], 1e-3)), math.log(STEP_RATIO))


def moved_share(turns: Array) -> float:
    """Share of the turns of going sessions that went to another replica than the turn before."""
    import numpy as np

    placed = turns[turns["session"] != 0]
    placed = placed[np.argsort(placed["session"], kind="stable")]
    goes_on = placed["session"][1:] == placed["session"][:-1]
    moves = (goes_on & (placed["replica"][1:] != placed["replica"][:-1])).sum()
    return float(moves / max(1, goes_on.sum()))


def kv_agent_limit(turns: Array, kv_tokens: float, replicas: int, moves: float, rng: Any) -> tuple[float, Array] | None:
    """N_kv and its draws: ``kv_tokens`` of all replicas divided by what a session holds, also while it thinks.

    That is its mean context, times the copies that moves between replicas leave behind: 1 + k·``moves``, the share of
    turns that moved. It is 1 if sessions stay and k if each turn goes to a replica at random.
    """
    import numpy as np

    held = turns[turns["prompt"] > 0]
    if not len(held) or not kv_tokens:
        return None
    copies = min(replicas, 1 + replicas * moves)
    _, session = np.unique(held["session"], return_inverse=True)
    tokens = copies * np.bincount(session, held["prompt"] + np.nan_to_num(held["output"]))
    number, counts = np.bincount(session), resample_counts(session.max() + 1, rng)
    return float(kv_tokens * number.sum() / tokens.sum()), kv_tokens * (counts @ number) / (counts @ tokens)
