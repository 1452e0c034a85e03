"""Announced runs: how far each has come, when it will end, and which tasks hold it up. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agent_infra_core.insight.capacity import EPSILON, RESAMPLES, Array, CapacityModel
from agent_infra_core.insight.gpu_hours import ReplicaUse
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.insight.waste import TurnTime, gpu_time
from agent_infra_core.protocol import MAX_RUN_TASKS

MAX_RUNS = 20  # above this, the oldest is dropped
MAX_INBOX = 50_000  # items that wait for the next document()
MAX_ENDED = 20_000  # sessions
MAX_GAPS = 500  # latest times between two answers of a task
LEAST_DONE = 5  # tasks that must be over before the end of a run is estimated
SILENT_FACTOR = 5.0  # a task silent for this many times its run's longest gap, and for SILENT_S, is over
SILENT_S = 60.0
RECENT_S = 300.0
LISTED_STRAGGLERS = 10
TAIL_FROM = 0.7  # quantile of the turns of tasks beyond which their distribution is a generalised Pareto's
TAIL_SHAPES = tuple(0.1 * number - 0.45 for number in range(18))  # 0 is exponential, 1/2 has infinite variance
TAIL_PRIOR = (0.2, 0.35)  # mean and standard deviation of the shape, before any task is seen
STRAGGLER_SHARE = 0.9  # a straggler has had more turns than this share of the tasks that are over
MAX_SCHEDULED = 300  # tasks that haven't begun and are scheduled one by one; of more, the sum is shared by all agents


class Announcement(NamedTuple):
    """A run that a client announced, ``at`` s since the epoch."""

    name: str
    tasks: int
    at: float


def announcement(header: str, client: str | None, at: float) -> Announcement | None:
    """Read ``X-Run-Tasks``: ``name=tasks``, or only the number. None if it isn't valid.

    A run without a name is called like the client that announces it.
    """
    name, _, tasks = header.rpartition("=")
    name = name.strip() or client or "run"
    tasks = tasks.strip()
    if not (tasks.isascii() and tasks.isdigit() and len(tasks) < 10 and 0 < int(tasks) <= MAX_RUN_TASKS):
        return None
    return Announcement(name, int(tasks), at)


@dataclass
class Task:
    """A task of a run. Times are s since the epoch."""

    begun: float
    last_end: float
    turns: int = 0
    live: set[str] = field(default_factory=set)  # sessions that haven't ended
    is_over: bool = False


@dataclass
class Run:
    """A run of ``tasks`` tasks on one model, from its announcement."""

    name: str
    tasks: int
    announced_at: float
    model: str | None = None
    seen: dict[str, Task] = field(default_factory=dict)
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_GAPS))
    of_session: dict[str, dict[str, Task]] = field(default_factory=dict)  # session that hasn't ended → its tasks
    longest_gap: float = 0.0
    spent: TurnTime = field(default_factory=TurnTime)
    held: dict[ReplicaUse, float] = field(default_factory=dict)  # s, of the model's replicas while the run goes on

    def add(self, key: str, record: TurnRecord, ended_at: float) -> None:
        """Add a finished turn of the task ``key``, whose session ended at ``ended_at``, maybe during the turn."""
        begun = record.finished_at if record.started_at is None else record.started_at
        task = self.seen.get(key)
        if task is None:
            if begun < self.announced_at or len(self.seen) >= MAX_RUN_TASKS:
                return  # of an earlier run
            task = self.seen[key] = Task(begun, begun)
        self.model = record.model or self.model
        gap = max(0.0, record.finished_at - task.last_end)
        self.gaps.append(gap)
        self.longest_gap = max(self.longest_gap, gap)
        task.turns, task.last_end = task.turns + 1, max(task.last_end, record.finished_at)
        if record.session is not None and ended_at < begun:
            task.live.add(record.session)
            self.of_session.setdefault(record.session, {})[key] = task
        task.is_over = not task.live and record.session is not None
        self.spent.add(record)

    def end_session(self, session: str) -> None:
        for task in self.of_session.pop(session, {}).values():
            task.live.discard(session)
            task.is_over = not task.live

    def agents(self, now: float) -> int:
        """Tasks that ran at once, on average of the last RECENT_S: an agent may pause between two of them."""
        since = max(now - RECENT_S, min(task.begun for task in self.seen.values()))
        ends = ((task.begun, task.last_end if task.is_over else now) for task in self.seen.values())
        together = sum(max(0.0, end - max(begun, since)) for begun, end in ends)
        return max(1, round(together / max(now - since, EPSILON)))

    @property
    def ended_at(self) -> float | None:
        """When the last task ended; None while any runs or has yet to begin."""
        if len(self.seen) < self.tasks or not all(task.is_over for task in self.seen.values()):
            return None
        return max(task.last_end for task in self.seen.values())

    def span(self, now: float) -> tuple[float, float]:
        """When the first task began, and when the last one ended, or ``now``; empty if none has begun."""
        return min((task.begun for task in self.seen.values()), default=now), self.ended_at or now

    def hold(self, seconds: Mapping[ReplicaUse, float], share: float = 1.0) -> None:
        """Add a share of the seconds of the run's own model."""
        for use, spent in seconds.items():
            if use.model == self.model:
                self.held[use] = self.held.get(use, 0.0) + share * spent

    def settle(self, now: float) -> None:
        """End the tasks that have been silent for too long."""
        for task in self.seen.values():
            if now - task.last_end > max(SILENT_S, SILENT_FACTOR * self.longest_gap):
                task.is_over = True


@dataclass(frozen=True)
class Lengths:
    """How many turns tasks take: a row, or a value, per draw.

    Up to ``threshold`` as they were seen, beyond it a generalised Pareto distribution.
    """

    turns: Array  # ascending
    shares: Array  # of tasks that take more
    threshold: float
    shape: Array
    scale: Array

    def rest(self, so_far: Array, rng: Any) -> Array:
        """Turns yet to come of tasks that have had ``so_far``: a row per draw, a column per task."""
        import numpy as np

        index = np.searchsorted(self.turns, so_far, side="right") - 1
        lasting = np.where(index >= 0, self.shares[:, index], 1.0)
        wanted, steps = rng.random(lasting.shape) * lasting, np.append(self.turns, np.inf)
        drawn = np.stack([steps[np.searchsorted(-row, -level)] for row, level in zip(self.shares, wanted, strict=True)])
        start, shape = np.maximum(so_far, self.threshold), self.shape[:, None]
        scale = np.maximum(self.scale[:, None] + shape * (start - self.threshold), 0.5)
        beyond = start + scale / shape * (rng.random(lasting.shape) ** -shape - 1)
        return np.maximum(np.where(drawn > self.threshold, beyond, drawn) - so_far, 0.5)


def task_lengths(turns: Array, is_over: Array, rng: Any, draws: int = RESAMPLES) -> Lengths:
    """The lengths of tasks, from those that are over and those still running; short tasks end first.

    Each draw reweights the tasks (Rubin 1981, "The Bayesian bootstrap") of Kaplan & Meier's estimate (1958).
    """
    import numpy as np

    order = np.lexsort((~is_over, turns))
    turns, is_over = turns[order], is_over[order]
    weight = rng.exponential(size=(draws, len(turns)))
    at_risk = np.cumsum(weight[:, ::-1], axis=1)[:, ::-1]
    shares = np.cumprod(1 - weight * is_over / np.maximum(at_risk, EPSILON), axis=1)
    threshold = float(np.quantile(turns, TAIL_FROM))
    return Lengths(turns, shares, threshold, *_tail(turns, is_over, threshold, draws, rng))


def _tail(turns: Array, is_over: Array, threshold: float, draws: int, rng: Any) -> tuple[Array, Array]:
    """Shape and scale of a generalised Pareto distribution of the turns beyond a threshold (Pickands 1975).

    Drawn from their posterior on a grid: a few long tasks don't tell a heavy tail from a light one for sure.
    """
    import numpy as np

    long = turns > threshold
    excess, ended = turns[long] - threshold, is_over[long]
    typical = max(0.5, float(excess.sum()) / max(1, int(ended.sum())))
    shape, scale = (part.ravel() for part in np.meshgrid(TAIL_SHAPES, typical * np.geomspace(0.2, 5.0, 30)))
    logarithm = np.log(np.maximum(1 + shape[:, None] * excess / scale[:, None], EPSILON))
    likelihood = -(logarithm / shape[:, None]).sum(axis=1) - (logarithm + np.log(scale)[:, None]) @ ended
    posterior = likelihood - ((shape - TAIL_PRIOR[0]) / TAIL_PRIOR[1]) ** 2 / 2
    chance = np.exp(posterior - posterior.max())
    found = rng.choice(len(shape), size=draws, p=chance / chance.sum())
    return shape[found], scale[found]


def _finish_times(running: Array, waiting: Array, agents: int, speedup: Array) -> Array:
    """When the last task ends, in s from now, for each draw.

    ``running`` are the durations left of tasks that have begun, ``waiting`` those of tasks that an agent begins when it
    is free; a row per draw. ``speedup[a]`` is the duration of a turn with ``a`` agents left, as a share of now.
    """
    import numpy as np

    draws = len(running)
    free = np.zeros((draws, max(agents, running.shape[1])))
    free[:, : running.shape[1]] = running
    free = np.sort(free, axis=1)
    if agents < free.shape[1] and waiting.shape[1]:  # fewer agents: those with most left keep the others' tasks waiting
        waiting = np.concatenate([free[:, agents:], waiting], axis=1)
        free = free[:, :agents]
    if waiting.shape[1] > MAX_SCHEDULED:
        free = free + waiting[:, MAX_SCHEDULED:].sum(axis=1, keepdims=True) / free.shape[1]
    rows = np.arange(draws)
    for number in range(min(waiting.shape[1], MAX_SCHEDULED)):
        first = free.argmin(axis=1)
        free[rows, first] += waiting[:, number]
    free = np.sort(free, axis=1)
    left = np.arange(free.shape[1] - 1, 0, -1)  # agents at work between two of the ends
    return free[:, 0] + np.diff(free, axis=1) @ speedup[np.minimum(left, len(speedup) - 1)]


@dataclass(frozen=True)
class Forecast:
    """What the end of a run depends on."""

    so_far: Array  # turns that each running task has had
    waiting: int  # tasks that haven't begun
    lengths: Lengths
    gap_s: float
    gap_cv: float

    def finish_s(self, agents: int, pace: float, speedup: Array, rng: Any) -> Array:
        """Draws of the time until the last task ends, if a turn takes ``pace`` times as long as now."""
        import numpy as np

        def seconds(so_far: Array) -> Array:
            turns = self.lengths.rest(so_far, rng)
            spread = max(self.gap_cv, 0.05) ** 2
            return pace * self.gap_s * spread * rng.gamma(turns / spread)

        waiting = seconds(np.zeros(self.waiting)) if self.waiting else np.zeros((len(self.lengths.shape), 0))
        return _finish_times(seconds(self.so_far), waiting, agents, speedup)


def _interval(draws: Array) -> dict[str, Any]:
    """A time with its 90 % interval."""
    import numpy as np

    low, value, high = (round(float(at), 1) for at in np.quantile(draws, [0.05, 0.5, 0.95]))
    return {"value": value, "low": low, "high": high, "reason": None}


def _pace(model: CapacityModel | None, agents: int, then: int, more_replicas: int = 0) -> tuple[float, Array]:
    """How long a cycle of ``then`` agents takes as a share of one of ``agents``, and with 0, 1, … of them left."""
    import numpy as np

    if model is None:
        return 1.0, np.ones(2)
    other = dataclasses.replace(model, replicas=model.replicas + more_replicas)
    counts = np.maximum(np.arange(then + 1), 1.0)
    cycles = counts / other.throughput(counts)
    return float(cycles[-1] * model.throughput(float(agents)) / agents), cycles / cycles[-1]


class RunBook:
    """The announced runs. A task belongs to the run whose name its id begins with; otherwise to the latest run.

    ``announce``, ``add`` and ``end_session`` only queue, in one thread; ``document`` does the work, in any one thread.
    """

    def __init__(self) -> None:
        self._inbox: deque[Announcement | TurnRecord | tuple[str, float]] = deque(maxlen=MAX_INBOX)
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._ended: OrderedDict[str, float] = OrderedDict()  # session → when its agent ended it
        self._announced: OrderedDict[str, Announcement] = OrderedDict()  # the latest of each run
        self._held: Mapping[ReplicaUse, float] = {}  # of the last hold()
        self._held_until = -math.inf

    def announce(self, run: Announcement) -> bool:
        """Begin a run, or change the number of tasks of one. Returns False if it was announced like this before."""
        known = self._announced.get(run.name)
        if known is not None and known.tasks == run.tasks and known.at <= run.at:
            return False
        self._announced[run.name] = run
        if len(self._announced) > MAX_RUNS:
            self._announced.popitem(last=False)
        self._inbox.append(run)
        return True

    def restore(
        self,
        runs: Iterable[Announcement],
        turns: Iterable[TurnRecord],
        ended: Iterable[tuple[str, float]],
        now: float,
        held_between: Callable[[float, float], Mapping[ReplicaUse, float]],
    ) -> None:
        """Continue the runs of an earlier book. Call it before anything else, from the thread that announces.

        ``held_between(since, until)`` returns the seconds of all replicas by use.
        """
        for run in runs:
            self._announced[run.name] = run
            self._take(run)
        for record in turns:
            self._take(record)
        for end in ended:
            self._take(end)
        for known in self._runs.values():
            known.settle(now)
            known.hold(held_between(*known.span(now)))

    def add(self, record: TurnRecord) -> None:
        """Add a finished turn. Without a run, it is nobody's."""
        if self._announced:
            self._inbox.append(record)

    def end_session(self, session: str, at: float) -> None:
        """Record that an agent ended its session, maybe before the session's last turn is added."""
        self._inbox.append((session, at))

    def document(
        self,
        now: float,
        model_of: Callable[[str | None], CapacityModel | None],
        ends_at: Mapping[str, Sequence[float]],
        rng_of: Callable[[], Any],
        held: Mapping[ReplicaUse, float],
    ) -> list[dict[str, Any]]:
        """``runs`` of /stats, the latest first. ``ends_at`` has the walltimes of each model's replicas.

        ``held`` is as for hold().
        """
        for item in [self._inbox.popleft() for _ in range(len(self._inbox))]:
            self._take(item)
        self.hold(held, now)
        runs = list(reversed(self._runs.values()))
        return [_run_row(run, now, model_of(run.model), ends_at.get(run.model or "", ()), rng_of) for run in runs]

    def hold(self, held: Mapping[ReplicaUse, float], now: float) -> None:
        """Settle the runs, and give them the time of replicas since the last call; the first one only begins to count.

        ``held`` are the seconds of all replicas by use, since ever; it must not change later.
        """
        new = {use: seconds - self._held.get(use, 0.0) for use, seconds in held.items()}
        since, self._held, self._held_until = self._held_until, held, now
        for run in self._runs.values():
            run.settle(now)
            begun, ended = run.span(now)
            run.hold(new, max(0.0, ended - max(begun, since)) / max(now - since, EPSILON))

    def _take(self, item: Announcement | TurnRecord | tuple[str, float]) -> None:
        if isinstance(item, Announcement):
            run = self._runs.setdefault(item.name, Run(*item))
            run.tasks, run.announced_at = item.tasks, min(run.announced_at, item.at)
            while len(self._runs) > MAX_RUNS:
                self._runs.popitem(last=False)
        elif isinstance(item, tuple):
            self._ended[item[0]] = item[1]
            if len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)
            for run in self._runs.values():
                run.end_session(item[0])
        elif self._runs and (key := item.task or item.session) is not None:
            named = [run for name, run in self._runs.items() if key.startswith(name)]
            (named or list(self._runs.values()))[-1].add(key, item, self._ended.get(item.session or "", -math.inf))


def _run_row(
    run: Run, now: float, model: CapacityModel | None, walltimes: Sequence[float], rng_of: Callable[[], Any]
) -> dict[str, Any]:
    """A run's entry in /stats."""
    over = [task.turns for task in run.seen.values() if task.is_over]
    running = {key: task for key, task in run.seen.items() if not task.is_over}
    waiting = max(0, run.tasks - len(run.seen))
    reason = None
    if len(over) < LEAST_DONE:
        reason = f"{len(over)} of {LEAST_DONE} tasks are over: too few to tell how long one takes"
    elif not running:
        reason = "no task is running"
    row: dict[str, Any] = {
        "name": run.name,
        "model": run.model,
        "announced_at": run.announced_at,
        "ended_at": run.ended_at,
        "tasks": run.tasks,
        "done": len(over),
        "running": len(running),
        "aborted_share": round(run.spent.aborted_s / run.spent.served_s, 4) if run.spent.served_s else None,
        "gpu_time": gpu_time(run.spent, run.held, len(run.seen)),
        "remaining_s": {"value": None, "low": None, "high": None, "reason": reason},
        "walltime_at": min(walltimes, default=None),
        "ends_before_walltime": None,
        "stragglers": [],
        "what_ifs": [],
    }
    if run.ended_at is not None:
        row["remaining_s"] = {"value": 0.0, "low": 0.0, "high": 0.0, "reason": None}
    elif reason is None:
        _forecast(row, over, running, waiting, run, now, model, rng_of())
    return row


def _forecast(
    row: dict[str, Any],
    over: Sequence[int],
    running: Mapping[str, Task],
    waiting: int,
    run: Run,
    now: float,
    model: CapacityModel | None,
    rng: Any,
) -> None:
    """Fill in the figures about the end of a run."""
    import numpy as np

    so_far = np.array([task.turns for task in running.values()], dtype=float)
    is_over = np.array([True] * len(over) + [False] * len(so_far))
    lengths = task_lengths(np.concatenate([np.array(over, dtype=float), so_far]), is_over, rng)
    gaps = np.array(run.gaps)
    forecast = Forecast(so_far, waiting, lengths, float(gaps.mean()), float(gaps.std() / max(gaps.mean(), EPSILON)))
    agents = run.agents(now) if waiting else len(running)
    draws = forecast.finish_s(agents, *_pace(model, agents, agents), rng)
    row["remaining_s"] = _interval(draws)
    if row["walltime_at"] is not None:
        row["ends_before_walltime"] = round(float(np.mean(now + draws <= row["walltime_at"])), 3)
    usual = float(np.quantile(over, STRAGGLER_SHARE))
    slow = sorted((key for key in running if running[key].turns > usual), key=lambda key: -running[key].turns)
    row["stragglers"] = [
        {
            "task": key,
            "turns": running[key].turns,
            "usual_turns": usual,
            "running_s": round(now - running[key].begun, 1),
        }
        for key in slow[:LISTED_STRAGGLERS]
    ]
    if model is not None:
        fewer = max(1, math.floor(0.75 * agents))
        row["what_ifs"] = [
            {"name": name, "remaining_s": _interval(forecast.finish_s(then, *_pace(model, agents, then, more), rng))}
            for name, then, more in (("+1 replica", agents, 1), ("−25 % agents", fewer, 0))
        ]
