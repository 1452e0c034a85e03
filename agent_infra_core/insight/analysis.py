"""The ``analysis`` of every model in /stats: combines fit, verdict and suggestion. Pure."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agent_infra_core.insight.capacity import (
    LEAST_MISFIT,
    LEAST_TURNS,
    RESAMPLES,
    STRUCTURE,
    Array,
    Basis,
    CapacityModel,
    Estimate,
    Outlook,
    capacity_models,
    fleets,
    misfit,
    percent,
    widened,
)
from agent_infra_core.insight.fit import ServiceFit, ThinkFit, fit_service, fit_think, regress
from agent_infra_core.insight.measure import (
    MOST_ABORTED,
    FleetSample,
    Measured,
    Operating,
    is_observed,
    kv_agent_limit,
    littles_law,
    measure,
    mix_change,
    moved_share,
    number_of,
    observed_turns,
    operating,
    operating_change,
    think_change,
)
from agent_infra_core.insight.suggestion import cost, figures, suggest
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.insight.verdict import find_flags, judge

# Memory limits per model and GPU type. A turn takes about 0.3 KB.
MAX_FIT_TURNS = 8000  # above this, the oldest quarter is dropped, except REMEMBERED turns per load
MAX_FIT_AGE_S = 6 * 3600.0  # older turns are dropped, with the same exception
REMEMBERED = 100  # turns kept per load (a factor of √2 in turns in flight), since only light load determines A
MAX_SAMPLES = 900  # of the fleet, one per second
MAX_INBOX = 10_000  # items that wait for the next document()
MAX_ANALYSED = 32  # pairs of model and GPU type; above this, the longest silent pair is dropped
OPERATING_S = 300.0  # window of the current figures, or five cycles of an agent if they take longer
WINDOW_S = 60.0  # predicted and measured throughput are compared in windows of this length
SETTLED_CHANGE = 5  # consecutive samples that must agree on a new number of replicas
UNSURE_THINK = 0.17  # standard error of Z, where sessions don't report their end, above which nothing is said
HELD_S = 15.0  # a new verdict replaces one that was shown after it has been found for this long
KEPT_FITS = 40  # fits of the think time, one every FITS_S, for how long a silence was to be expected when it began
FITS_S = 15.0


class FleetAnalysis:
    """Turns and fleet samples of one model on one GPU type, since its workload or number of replicas last changed.

    Keeps at most MAX_FIT_TURNS turns, MAX_SAMPLES samples, and REMEMBERED turns per load.
    """

    def __init__(self, model: str, gpu: str | None) -> None:
        self.model, self.gpu = model, gpu
        self._turns: Array = ()  # as from observed_turns(), in the order of their ends
        self._names: dict[str, int] = {}  # replica → its number, in the order of the numbers
        self._complete_from = 0.0  # turns that began earlier may have overlapped with turns missing from _turns
        self._samples: deque[FleetSample] = deque(maxlen=MAX_SAMPLES)
        self._remembered: dict[int, deque[tuple[float, ...]]] = {}  # load → rows of Measured
        self._since = 0.0  # time of the last restart of the fit
        self._why = ""  # reason for that restart
        self._flagged: dict[str, float] = {}  # flag → time it was raised
        self._replicas: int | None = None
        self._speed_since: dict[str, float] = {}  # replica → time its speed last changed
        self._thinks: tuple[tuple[float, ThinkFit], ...] = ()  # (time of the fit, fit), oldest first
        self.model_now: CapacityModel | None = None  # the latest fit; None if it may not be reported
        self._shown: dict[str, Any] | None = None  # the verdict shown last
        self._rival_since = math.inf  # time since when another one has been found
        self.last_verdict: dict[str, Any] | None = None  # on the latest turns for which there was one

    def presence(self, silent_s: float, now: float) -> float:
        """Probability that a silent session is still thinking. A guess until think times are known.

        Where sessions report their end, the fit made before the silence began judges it: those who died together can't
        pass for the long think times of the living.
        """
        if not self._thinks:
            return float(silent_s < 60)
        think = self._thinks[-1][1]
        if think.ends_reported:
            think = next((fit for at, fit in reversed(self._thinks) if at <= now - silent_s), self._thinks[0][1])
        return think.presence(silent_s)

    def sample(self, sample: FleetSample) -> None:
        """Add a sample. Restart the fit if the number of replicas has changed for SETTLED_CHANGE samples."""
        self._samples.append(sample)
        if self._replicas is None:
            self._replicas = len(sample.in_flight) or None  # the first replicas aren't a change
        latest = list(self._samples)[-SETTLED_CHANGE:]
        counts = {len(look.in_flight) for look in latest}
        if len(latest) == SETTLED_CHANGE and len(counts) == 1 and counts != {self._replicas or 0}:
            self._restart(latest[0].at, f"{self._replicas} replicas became {len(sample.in_flight)}")
            self._replicas = len(sample.in_flight)

    @property
    def has_turns(self) -> bool:
        return bool(self._names)

    def _restart(self, at: float, why: str) -> None:
        self._since, self._why = max(self._since, at), why
        self._remembered.clear()
        self._speed_since.clear()
        # Keep turns that ended after the restart: later turns overlapped with them.
        if len(self._turns):
            self._turns = self._turns[self._turns["end"] >= at]
        while self._samples and self._samples[0].at < at:
            self._samples.popleft()

    def take(self, records: Iterable[TurnRecord], now: float) -> None:
        """Add finished turns and drop the oldest, except REMEMBERED turns per load."""
        import numpy as np

        fresh = [record for record in records if record.finished_at >= self._since]
        if not fresh:
            return
        for record in fresh:
            self._names.setdefault(record.backend or "", len(self._names))
        turns = observed_turns(fresh, self._names)
        if len(self._turns):
            turns = np.concatenate([self._turns, turns])
        else:
            self._complete_from = max(self._complete_from, float(turns["end"].min()))
        self._turns = turns[np.argsort(turns["end"], kind="stable")]
        ends = self._turns["end"]
        if len(ends) > MAX_FIT_TURNS:
            self._forget(float(ends[len(ends) - 3 * MAX_FIT_TURNS // 4]))
        elif ends[0] < now - MAX_FIT_AGE_S - 600:
            self._forget(now - MAX_FIT_AGE_S)

    def _forget(self, before: float) -> None:
        gone, self._turns = self._turns, self._turns[self._turns["end"] >= before]
        rows, beginnings, replica, _ = measure(gone, list(self._names), self._start, before, self._speed_since)
        if len(rows.seconds) >= LEAST_TURNS:
            rows.seconds /= regress(rows, beginnings, replica).speed
            for row in zip(*dataclasses.astuple(rows), strict=True):
                load = math.floor(2 * math.log2(max(1.0, row[3])))
                self._remembered.setdefault(load, deque(maxlen=REMEMBERED)).append(row)
        self._complete_from = max(self._complete_from, before)

    @property
    def _start(self) -> float:
        return max(self._since, self._complete_from)

    def _with_remembered(self, rows: Measured) -> Measured:
        """``rows`` followed by the remembered rows, in blocks of ten rows of the same load."""
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

    def document(self, now: float, ended: Mapping[int, float], goal_s: float | None, rng: Any) -> dict[str, Any]:
        """This model's entry of ``analysis`` in /stats, at time ``now``."""
        if (change := mix_change(self._turns[self._turns["begin"] >= self._start])) is not None:
            self._restart(change[0], f"the {change[1]} changed")
        outlook = self._outlook(now, ended, rng)
        self.model_now = None if outlook.few or outlook.reason or outlook.evicting else outlook.model
        what_ifs = outlook.what_ifs()
        flags = find_flags(outlook, self._samples)
        self._flagged = {name: self._flagged.get(name, now) for name in flags}
        gpus = int(outlook.model.replicas) * (self._samples[-1].gpus_per_replica if self._samples else 1)
        verdict, suggestion = self._verdict(outlook, what_ifs, now), suggest(outlook, goal_s)
        self._keep_verdict(verdict, suggestion)
        return {
            "model": self.model,
            "gpu": self.gpu,
            "replicas": self.replicas,
            "computed_at": now,
            "verdict": verdict,
            "last_verdict": self.last_verdict,
            "flags": [{"name": name, "since": self._flagged[name], "sentence": flags[name]} for name in flags],
            **figures(outlook),
            "suggestion": suggestion,
            "curve": outlook.curve(),
            "what_ifs": what_ifs,
            "cost": cost(outlook, gpus, self._turns, ended, rng),
            "littles_law": littles_law(outlook.here, None if outlook.few else outlook.model.think_s or None),
        }

    def _verdict(self, outlook: Outlook, what_ifs: Sequence[Mapping[str, Any]], now: float) -> dict[str, Any]:
        """The verdict to show: one that differs from the last is shown when it has been found for HELD_S."""
        before = self._shown["name"] if self._shown else None
        found = judge(outlook, what_ifs, before)
        since = math.inf if found["name"] == before else min(self._rival_since, now)
        if self._shown and before != "NO DATA" and not outlook.few and since <= now < since + HELD_S:
            self._rival_since = since
            return self._shown
        self._rival_since, self._shown = math.inf, found
        return found

    def _keep_verdict(self, verdict: Mapping[str, Any], suggestion: Mapping[str, Any]) -> None:
        """Keep the verdict on the latest turns. Once turns stop, an idle fleet's doesn't replace it."""
        at = float(self._turns["end"][-1]) if len(self._turns) else 0.0
        if verdict["name"] != "NO DATA" and (self.last_verdict is None or at > self.last_verdict["at"]):
            kept = {name: verdict[name] for name in ("name", "confidence", "sentence")}
            self.last_verdict = {**kept, "at": at, "suggestion": suggestion["bound_by"] and suggestion["sentence"]}

    def _outlook(self, now: float, ended: Mapping[int, float], rng: Any) -> Outlook:
        """Fit the model and collect all figures for the document."""
        import numpy as np

        start, last = self._start, self._samples[-1] if self._samples else None
        recent = self._turns["seconds"][-500:]
        # Turns are recorded when they end, so figures on turns that began after this may still change.
        settled = now - min(120.0, 1.1 * float(max(recent, default=0.0)))
        turns_since = self._turns[self._turns["end"] >= start]
        think_since = max(start, think_change(turns_since))
        think = self._fit_think(think_since, settled, ended, rng)
        think_s = think.mean_s if think else None
        cycle_s = (think_s or 0.0) + sum(recent) / max(1, len(recent))
        point = max(think_since, operating_change(self._turns, self._samples), *self._speed_since.values())
        point = max(point, self._samples[0].at if self._samples else 0.0)
        here = operating(self._turns, self._samples, max(point, now - max(OPERATING_S, 5 * cycle_s)), now, rng)
        fit, basis, few = self._fit_service(here, settled, rng)
        law = littles_law(here, think_s)
        is_counted = here.agents is not None and not (think and think.is_guessed)
        agents = here.agents if is_counted else law["agents_computed"]
        model, draws = capacity_models(max(1, self.replicas), fit, think, here.parallel, last.slots if last else None)
        if fit is not None and agents:
            # A guessed number of agents says little about the model.
            error = self._misfit(model, point, now) if is_counted else LEAST_MISFIT
            draws = widened(model, draws, agents, error)
        moves = moved_share(turns_since)
        kv_tokens = (last.kv_capacity_tokens or 0) * self.replicas if last else 0
        return Outlook(
            model=model,
            draws=draws,
            fit=fit,
            think=think,
            here=here,
            agents=agents or 0.0,
            agents_draws=(agents or 0.0) * np.maximum(1 + here.agents_error * rng.standard_normal(RESAMPLES), 0.01),
            basis=basis,
            reason=self._refusal(think, here, agents, law) or (fit.reason if fit else None),
            few=few,
            doubt=1 + math.hypot(STRUCTURE, here.agents_error) * rng.standard_normal(RESAMPLES),
            kv=kv_agent_limit(turns_since, kv_tokens, self.replicas, moves, rng),
            fleets=fleets(model, draws, fit, moves),
        )

    def _fit_service(self, here: Operating, settled: float, rng: Any) -> tuple[ServiceFit | None, Basis, str | None]:
        """The fit of the turns that began before ``settled``, its data, and why there are too few for any figure."""
        known = list(self._names)
        measured, beginnings, replica, names = measure(self._turns, known, self._start, settled, self._speed_since)
        rows = self._with_remembered(measured)
        turns = len(rows.seconds)
        basis = Basis(turns, round(float(rows.begin.max() - rows.begin.min()), 1) if turns else 0.0)
        if turns < LEAST_TURNS:
            why = self._why and f" since {self._why}"
            return None, basis, f"{turns} of {LEAST_TURNS} turns{why}: too few for any number"
        if not here.turns:
            return None, basis, f"no turn ended in the last {here.window_s:.0f} s"
        fit = fit_service(rows, beginnings, replica, names, here.since, rng)
        self._speed_since |= fit.changes
        return fit.at_full_slots(here, self.replicas, self._samples[-1].slots if self._samples else None), basis, None

    def _fit_think(self, since: float, until: float, ended: Mapping[int, float], rng: Any) -> ThinkFit | None:
        """Fit the think time, and keep the fit for ``presence``."""
        think = fit_think(self._turns, since, until, ended, lambda silent_s: self.presence(silent_s, until), rng)
        if think is not None:
            kept = self._thinks
            if len(kept) > 1 and kept[-1][0] < kept[-2][0] + FITS_S:
                kept = kept[:-1]  # the latest fit is always there; of earlier ones, one every FITS_S
            self._thinks = (*kept, (until, think))[-KEPT_FITS:]
        return think

    def _misfit(self, model: CapacityModel, since: float, until: float) -> float:
        """How far the model's X is off in earlier windows of the same run."""
        import numpy as np

        edges = np.arange(until, since - 1e-6, -WINDOW_S)[::-1]
        looks = [(look.at, look.active_agents) for look in self._samples if look.active_agents is not None]
        if len(edges) < 2 or not looks:
            return LEAST_MISFIT
        turns, _ = np.histogram(self._turns["end"][~self._turns["is_aborted"]], edges)
        at, agents = np.array(looks).T
        number, _ = np.histogram(at, edges)
        predicted, _ = np.histogram(at, edges, weights=model.throughput(agents))
        known = (number > 0) & (predicted > 0)
        return misfit(predicted[known] / number[known] * WINDOW_S, turns[known]) if known.any() else LEAST_MISFIT

    @property
    def replicas(self) -> int:
        """Number of serving replicas in the latest sample; without samples, replicas that appear in the turns."""
        if self._samples:
            return len(self._samples[-1].in_flight)
        return len(set(self._turns["replica"].tolist())) if len(self._turns) else 0

    def _refusal(
        self, think: ThinkFit | None, here: Operating, agents: float | None, law: Mapping[str, Any]
    ) -> str | None:
        """Why figures that depend on the fit are withheld; None if they may be reported."""
        if think is None:
            return "think times are not known: no session had two turns (name them: attach() or X-Session-ID)"
        if not self.replicas or not agents:
            return "no agent is active" if self.replicas else "no replica serves"
        if here.aborted > MOST_ABORTED:
            return (
                f"{percent(here.aborted)} of the turns had no answer: clients left or turns failed, and how these "
                "would behave at another load is unknown"
            )
        if law["holds"] is False and not think.is_guessed:
            return (
                f"Little's law is off by {percent(abs(law['error']))}: {law['agents_computed']:.4g} agents by the "
                f"turns, {law['agents_sampled']:.4g} counted; turns are missing, or agents share sessions"
            )
        if think.is_guessed and think.error > UNSURE_THINK:
            return (
                "sessions don't report their end, and it isn't known yet which of the silent ones still think: send "
                "X-Session-End: true with a session's last turn"
            )
        return None


def _plain(value: Any) -> Any:
    """``value`` with every Estimate converted to a dictionary."""
    if isinstance(value, Estimate):
        return vars(value) | {"basis": vars(value.basis)}  # a quarter of the time of asdict()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


class CapacityAnalysis:
    """Finds what limits each model on each GPU type: ``analysis`` of /stats, from finished turns and fleet samples.

    ``add``, ``end`` and ``sample`` only queue their arguments and may be called from any one thread. ``document`` does
    the work, also in any one thread. ``clock`` returns seconds since the epoch. A seeded ``dice`` makes the resampling
    repeatable.
    """

    def __init__(self, clock: Callable[[], float], dice: random.Random, latency_goal_s: float | None = None) -> None:
        self._clock, self._dice, self._goal_s = clock, dice, latency_goal_s
        self._inbox: deque[TurnRecord | FleetSample | tuple[int, float]] = deque(maxlen=MAX_INBOX)
        self._fleets: OrderedDict[tuple[str, str | None], FleetAnalysis] = OrderedDict()
        self._homes: OrderedDict[str, tuple[str, str | None]] = OrderedDict()  # replica → model and GPU type
        self._ended: OrderedDict[int, float] = OrderedDict()  # number of a session → time its agent ended it

    def add(self, record: TurnRecord) -> None:
        """Add a finished turn."""
        self._inbox.append(record)

    def end(self, session: str, at: float) -> None:
        """Record that an agent ended its session."""
        self._inbox.append((number_of(session), at))

    def sample(self, sample: FleetSample) -> None:
        """Add a fleet sample; call once a second."""
        self._inbox.append(sample)

    def presence(self, model: str, gpu: str | None, silent_s: float) -> float:
        """Probability that a silent session is still thinking. A guess until think times are known."""
        fleet = self._fleets.get((model, gpu))
        return fleet.presence(silent_s, self._clock()) if fleet is not None else float(silent_s < 60)

    def dice(self) -> Any:
        """A numpy random generator."""
        import numpy as np

        return np.random.default_rng(self._dice.getrandbits(64))

    def model(self, name: str | None) -> CapacityModel | None:
        """The model of the fleet that serves ``name``, as fitted by the latest document(); None if none may be used."""
        fitted = [fleet.model_now for fleet in self._fleets.values() if fleet.model == name and fleet.model_now]
        return fitted[-1] if fitted else None

    def restore(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Keep the last verdicts of an earlier document's entries. Call it before the first document()."""
        for entry in entries:
            self._fleet((entry["model"], entry["gpu"])).last_verdict = entry["last_verdict"]

    def document(self) -> list[dict[str, Any]]:
        """One entry per model and GPU type that had a turn, as described in docs/stats.schema.json."""
        now = self._clock()
        self._sort_inbox(now)
        fleets = [fleet for fleet in self._fleets.values() if fleet.has_turns]
        if not fleets:
            return []  # don't load numpy without traffic
        rng = self.dice()
        return [_plain(fleet.document(now, self._ended, self._goal_s, rng)) for fleet in fleets]

    def _sort_inbox(self, now: float) -> None:
        arrived = [self._inbox.popleft() for _ in range(len(self._inbox))]
        turns: dict[tuple[str, str | None], list[TurnRecord]] = {}
        for item in arrived:
            if isinstance(item, FleetSample):
                self._fleet((item.model, item.gpu)).sample(item)
                for replica in item.in_flight:
                    self._homes[replica] = item.model, item.gpu
                    self._homes.move_to_end(replica)
            elif isinstance(item, tuple):
                self._ended[item[0]] = item[1]
        for item in arrived:
            if isinstance(item, TurnRecord) and is_observed(item):
                arrived_at = item.finished_at - ((item.inference_ms or 0.0) + (item.queue_ms or 0.0)) / 1000
                if arrived_at > self._ended.get(session := number_of(item.session), math.inf):
                    del self._ended[session]  # the session was resumed
                home = self._homes.get(item.backend or "")
                if home is not None or not self._homes:
                    turns.setdefault(home or (item.model or "", None), []).append(item)
        for key, found in turns.items():
            self._fleet(key).take(found, now)
        for table, bound in ((self._fleets, MAX_ANALYSED), (self._homes, 10_000), (self._ended, 20_000)):
            while len(table) > bound:
                table.popitem(last=False)

    def _fleet(self, key: tuple[str, str | None]) -> FleetAnalysis:
        fleet = self._fleets.setdefault(key, FleetAnalysis(*key))
        self._fleets.move_to_end(key)
        return fleet
