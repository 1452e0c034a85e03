"""Feeds turns to the tracker, the history and the metrics, and runs the analysis in its own thread."""

from __future__ import annotations

import math
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent_infra_core.control.discovery import STOP_S
from agent_infra_core.control.exporter import SpanSender, TurnExporter, span_maker
from agent_infra_core.control.reader import HistoryReader, history_question, session_question, sessions_question
from agent_infra_core.fleet.engines import ENGINES
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.insight.analysis import CapacityAnalysis
from agent_infra_core.insight.gauges import GaugeLog
from agent_infra_core.insight.gpu_hours import ReplicaTime, ReplicaUse, hours_by_state, replica_use
from agent_infra_core.insight.history import RESTORED_S, History, HistoryBatch, HistoryFile, history_path, verdict_row
from agent_infra_core.insight.measure import fleet_samples
from agent_infra_core.insight.metrics import StatsMetrics, TurnMetrics, metrics_text
from agent_infra_core.insight.replicas import as_mapping
from agent_infra_core.insight.runs import Announcement, RunBook, announcement
from agent_infra_core.insight.tracker import Tracker, encode_stats
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import ReplicaRecord, SessionEnded, TurnEvent, TurnFinished, TurnStarted
from agent_infra_core.settings import Config

RESTORED_TURNS = 50_000  # turns a new controller restores, from the last RESTORED_S; takes about a second
RESTORED_RUN_TURNS = 200_000  # runs that began before the last so many turns aren't continued
VERDICT_INTERVAL_S = 60.0
FIGURES_WRITE_S = 10.0  # between writes of replica time and of the points of throughput.history
ANALYSIS_INTERVAL_S = 5.0
ANALYSIS_PAUSE_S = 30.0  # longest pause, for expensive fits or when no turn has ended
UNWATCHED_PAUSE_S = 60.0  # pause while nobody reads /stats
ANALYSIS_SHARE = 0.005  # of a core; a fit of 8,000 turns takes 0.1 s, so fits are about 20 s apart


def _drop_resumed(ended: dict[str, float], turns: Iterable[TurnRecord]) -> Iterator[TurnRecord]:
    """Yield the turns, and remove sessions that continued after their end from ``ended``."""
    for record in turns:
        # Use the turn's start: a turn that was open when the session ended finishes later, but doesn't resume it.
        at = record.finished_at if record.started_at is None else record.started_at
        if record.session is not None and at > ended.get(record.session, math.inf):
            del ended[record.session]
        yield record


class Analyst:
    """Computes the analysis every ANALYSIS_INTERVAL_S in its own thread, so nobody waits for a fit.

    The interval is longer if a fit is slow, to use at most ANALYSIS_SHARE of a core. It is also longer while nobody
    reads the analysis or no turn has ended since the last one.
    """

    def __init__(self, tracker: Tracker, log: Callable[[str, str], None], latency_goal_s: float | None = None) -> None:
        """``log`` takes a message and its level."""
        self._tracker, self._log = tracker, log
        dice = random.Random()  # noqa: S311  not keys
        self._analysis = CapacityAnalysis(time.time, dice, latency_goal_s)
        self._stop = threading.Event()
        self._change = threading.Event()  # _stop or _is_watched has changed
        self._is_watched = False
        self._thread = threading.Thread(target=self._run, name="analysis", daemon=True)
        self._told: str | None = None  # the error logged last
        self._has_news = False  # set when data is added, cleared by the thread
        self._runs = RunBook()
        self._ends_at: dict[str, list[float]] = {}  # model → walltimes of its replicas
        self._held: Mapping[ReplicaUse, float] = {}  # seconds of all replicas; replaced as a whole
        self.document: list[dict[str, Any]] = []  # ``analysis`` of /stats; replaced as a whole, so readers need no lock
        self.runs: list[dict[str, Any]] = []  # ``runs`` of /stats; likewise

    def start(self) -> None:
        self._runs.hold(self._held, time.time())
        self._thread.start()

    def stop(self) -> None:
        """End the thread. If it is still computing after STOP_S, abandon it."""
        self._stop.set()
        self._change.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)

    def take(self, turns: Iterable[TurnRecord]) -> None:
        """Add finished turns."""
        for record in turns:
            self._analysis.add(record)
            self._runs.add(record)
            self._has_news = True

    def restore(self, record: TurnRecord) -> None:
        """Add a turn of an earlier controller. Runs get theirs from restore_runs()."""
        self._analysis.add(record)
        self._has_news = True

    def restore_verdicts(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Keep the last verdicts of an earlier controller's entries. Call it before start()."""
        self._analysis.restore(entries)

    def announce_run(self, run: Announcement) -> bool:
        """Begin a run, or change the number of tasks of one. Returns False if that is known already."""
        self._has_news = True
        return self._runs.announce(run)

    def restore_runs(
        self,
        runs: Iterable[Announcement],
        turns: Iterable[TurnRecord],
        ended: Iterable[tuple[str, float]],
        held_between: Callable[[float, float], Mapping[ReplicaUse, float]],
    ) -> None:
        """Continue the runs of an earlier controller. Call it before start()."""
        self._runs.restore(runs, turns, ended, time.time(), held_between)

    def hold(self, held: Mapping[ReplicaUse, float]) -> None:
        """Set the seconds of all replicas by use, of which runs get those after start()."""
        self._held = dict(held)

    def end_session(self, session: str, at: float) -> None:
        """Record that an agent ended its session."""
        self._analysis.end(session, at)
        self._runs.end_session(session, at)
        self._has_news = True

    def sample(self, replicas: Iterable[Mapping[str, Any]]) -> None:
        """Sample the fleets from the rows of Tracker.replicas; call once a second."""
        rows = list(replicas)
        ends_at: dict[str, list[float]] = {}
        for row in rows:
            if row["state"] == "ready" and row["ends_at"] is not None:
                ends_at.setdefault(row["model"], []).append(row["ends_at"])
        self._ends_at = ends_at
        for sample in fleet_samples(time.time(), rows, self._tracker.silences(), self._analysis.presence):
            self._analysis.sample(sample)

    def watch(self, is_watched: bool) -> None:
        """Set whether somebody reads the analysis. A new reader needn't wait for a long pause to end."""
        if is_watched != self._is_watched:
            self._is_watched = is_watched
            self._change.set()

    def _run(self) -> None:
        pause_s, ended, due = ANALYSIS_INTERVAL_S, time.monotonic(), 0.0
        while not self._stop.is_set():
            if (rest_s := ended + (pause_s if self._is_watched else UNWATCHED_PAUSE_S) - time.monotonic()) > 0:
                self._change.wait(rest_s)
                self._change.clear()
                continue
            if self._has_news or time.monotonic() >= due:  # otherwise only the ends of the time windows would change
                self._has_news, due = False, time.monotonic() + ANALYSIS_PAUSE_S
                pause_s = min(max(ANALYSIS_INTERVAL_S, self._compute() / ANALYSIS_SHARE), ANALYSIS_PAUSE_S)
            ended = time.monotonic()

    def _compute(self) -> float:
        """Replace ``document``. Returns the CPU time used, in seconds."""
        began = time.thread_time()
        try:
            self.document, self._told = self._analysis.document(), None
            model_of, rng_of = self._analysis.model, self._analysis.dice
            self.runs = self._runs.document(time.time(), model_of, self._ends_at, rng_of, self._held)
        except Exception as error:  # noqa: BLE001  an analysis that fails must not end the next
            self.document, self.runs = [], []  # no data is better than old data
            if self._told != repr(error):
                self._log(f"the analysis failed: {traceback.format_exc().strip()}", "error")
            self._told = repr(error)
        return time.thread_time() - began


class Bookkeeper:
    """Passes turns and replica time to the history, which outlives the controller, and to metrics and analysis."""

    def __init__(
        self,
        config: Config,
        paths: DeploymentPaths,
        tracker: Tracker,
        log: Callable[[str, str], None],
        answer: Callable[[Mapping[str, Any], int, str], None],
        spans: SpanSender | None = None,
    ) -> None:
        """``log`` takes a message and its level; ``answer`` a request, a status and a JSON document, in any thread.

        ``spans`` gets every finished turn.
        """
        self._tracker = tracker
        path = history_path(config.proxy.history, paths.history)
        self._history = History(path, log, time.time) if path is not None else None
        self._reader = HistoryReader(path, answer, log)
        self._gauges = GaugeLog(time.time())
        engines = {model.name: model.engine for model in config.models}
        make = span_maker(config.cluster.name, engines, config.otel.text)
        self._exporter = TurnExporter(spans, make, log) if spans is not None else None
        self._replica_time = ReplicaTime(time.time, time.monotonic)
        self._asked_gpus = {
            model.name: model.tensor_parallel_size * model.pipeline_parallel_size
            for model in config.models
            if config.cluster.type == "slurm" and ENGINES[model.engine].uses_gpus
        }
        self._figures_due = 0.0
        self.gpu_hours: Mapping[str, float] = {}  # model → GPU-hours of its replicas; replaced as a whole
        self._told_totals = dict(tracker.totals)
        self._verdicts_due = 0.0
        self._latest: dict[tuple[str, str], Mapping[str, Any]] = {}  # (model, GPU type) → entry on its latest turns
        self._told_until = 0.0  # points of throughput.history up to this time have been written
        self._analyst = Analyst(tracker, log, config.analysis.latency_goal_s)
        self._metrics = TurnMetrics()

    def open(self) -> None:
        """Restore tracker and analysis from an earlier controller. Call it before any event."""
        if self._history is not None:
            self._history.open(self._restore)
        self._reader.start()
        if self._exporter is not None:
            self._exporter.start()
        self._analyst.hold(self._replica_time.seconds())
        self._analyst.start()

    def _restore(self, file: HistoryFile) -> None:
        self._replica_time.restore(file.replica_seconds(), file.since())
        try:
            ended = file.ended_sessions()
            turns = file.latest_turns(RESTORED_TURNS, time.time() - RESTORED_S)
            self._tracker.restore(self._noted(_drop_resumed(ended, turns)), file.totals(), ended)
            for session, at in ended.items():
                self._analyst.end_session(session, at)
            self._tracker.timeline.restore(file.points())
            runs = file.runs(RESTORED_RUN_TURNS)
            if runs:
                turns = file.latest_turns(RESTORED_RUN_TURNS, min(run.at for run in runs))
                self._analyst.restore_runs(runs, turns, ended.items(), file.replica_seconds)
            file.end_runs({run.name for run in runs})
            self._latest = {(entry["model"], entry["gpu"] or ""): entry for entry in file.analyses()}
            self._analyst.restore_verdicts(self._latest.values())
        finally:  # even if it failed halfway: restored data must not be added again
            self._told_totals = dict(self._tracker.totals)
            self._told_until = time.time()

    def _noted(self, records: Iterable[TurnRecord]) -> Iterator[TurnRecord]:
        for record in records:
            self._analyst.restore(record)
            yield record

    def take(self) -> None:
        """Pass the turns finished since the last call to the history, the metrics and the analysis."""
        turns, posts = self._tracker.take_records()
        new = {name: total - self._told_totals[name] for name, total in self._tracker.totals.items()}
        if turns or posts or any(new.values()):
            self._told_totals = dict(self._tracker.totals)
            if self._history is not None:
                self._history.add(HistoryBatch(deque(turns), posts, new))
        if self._exporter is not None:
            self._exporter.add(turns)
        self._metrics.add(*turns)
        for post_ms in posts.values():
            self._metrics.add_post(post_ms)
        self._analyst.take(turns)

    def observe(self, *events: TurnEvent) -> None:
        """Process relay events, in order."""
        self._tracker.observe(*events)
        for event in events:
            started = event.started if isinstance(event, TurnFinished) else event
            if isinstance(started, TurnStarted) and started.run is not None:
                run = announcement(started.run, started.client, started.at)
                if run is not None:
                    self.announce_run(run)
            if isinstance(event, SessionEnded):
                self._analyst.end_session(event.session, event.at)
                if self._history is not None:
                    self._history.add(HistoryBatch(ended={event.session: event.at}))

    def _keep_verdicts(self, entries: Sequence[Mapping[str, Any]], now: float) -> None:
        """Write the verdicts to the history, once a minute, and the entries on the latest turns."""
        for entry in entries:
            key, last = (entry["model"], entry["gpu"] or ""), entry["last_verdict"]
            kept = self._latest.get(key)
            # An idle fleet's entry doesn't replace the one on its last turns, nor one without a curve one that has it.
            if last and (kept is None or last["at"] > kept["last_verdict"]["at"]):
                self._latest[key] = entry if entry["curve"] or kept is None else {**kept, "last_verdict": last}
        if self._history is None or not entries or now < self._verdicts_due:
            return
        self._verdicts_due = now + VERDICT_INTERVAL_S
        analyses = {key: encode_stats(entry) for key, entry in self._latest.items()}
        self._history.add(HistoryBatch(verdicts=[verdict_row(entry, now) for entry in entries], analyses=analyses))

    def metrics(self, stats: Mapping[str, Any]) -> bytes:
        """The body of GET /metrics, which includes figures from ``stats``, a /stats document."""
        return metrics_text(self._metrics, StatsMetrics(stats, self._replica_time.seconds()))

    def sample(self, records: Iterable[ReplicaRecord], gauges: Mapping[str, Any]) -> None:
        """Account for the current replicas; call once a second. ``gauges`` are as for Tracker.sample."""
        backends = as_mapping(gauges.get("backends"))
        uses, started = [], {}
        for record in records:
            in_flight = as_mapping(backends.get(record.replica)).get("in_flight")
            if (use := replica_use(record, in_flight, self._asked_gpus.get(record.model, 0))) is not None:
                uses.append(use)
                started[record.replica] = record.started_at
        self._replica_time.sample(uses, started)
        if time.monotonic() >= self._figures_due:
            self._figures_due = time.monotonic() + FIGURES_WRITE_S
            self._write_figures()
            self._analyst.hold(self._replica_time.seconds())
            hours = {name: hours_by_state(sums, of_gpus=True) for name, sums in self._replica_time.by_model().items()}
            self.gpu_hours = {name: sum(row.values()) - row["pending"] for name, row in hours.items()}

    def _write_figures(self) -> None:
        taken, points = self._replica_time.take(), self._tracker.timeline.after(self._told_until)
        if points:
            self._told_until = points[-1]["at"]
        ends = {run["name"]: run["ended_at"] for run in self.runs}
        if self._history is not None:
            self._history.add(HistoryBatch(replica_time=taken, points=points, run_ends=ends))

    def analyse(self, replicas: Iterable[Mapping[str, Any]], is_watched: bool) -> None:
        """Feed the rows of Tracker.replicas to the analysis; call once a second. ``is_watched``: whether it is read."""
        rows = list(replicas)
        self._gauges.sample(time.time(), rows, self._tracker.waiting())
        if self._history is not None and (gauges := self._gauges.take()):
            self._history.add(HistoryBatch(gauges=gauges))
        self._analyst.watch(is_watched)
        self._analyst.sample(rows)
        self._keep_verdicts(self._analyst.document, time.time())

    def ask(self, request: Mapping[str, Any]) -> None:
        """Answer a question about the history (``op``: history, sessions or session), without waiting for the disk."""
        now = time.time()
        if request["op"] == "history":
            question = history_question(request, now)
        elif request["op"] == "sessions":
            question = sessions_question(request, self._tracker.session_rows())
        else:
            question = session_question(request, self._tracker.session(request["session"]), now)
        self._reader.ask(request, question)

    def announce_run(self, run: Announcement) -> None:
        """Begin a run, or change the number of tasks of one. The history keeps it for the next controller."""
        if self._analyst.announce_run(run) and self._history is not None:
            self._history.add(HistoryBatch(runs={run.name: run}))

    @property
    def runs(self) -> list[dict[str, Any]]:
        """``runs`` of /stats."""
        return self._analyst.runs

    @property
    def analysis(self) -> list[dict[str, Any]]:
        """``analysis`` of /stats. Thread-safe."""
        return self._analyst.document

    def document(self) -> dict[str, Any]:
        """``history``, ``accounting``, ``analysis`` and ``runs`` of /stats."""
        off = {"path": None, "state": "off", "reason": None, "turns": None}
        history = self._history.document() if self._history is not None else off
        return {
            "history": history,
            "accounting": self._replica_time.document(),
            "analysis": self._analyst.document,
            "runs": self.runs,
        }

    def close(self, takes_rest: bool = True) -> None:
        """Write the remaining data. Pass ``takes_rest=False`` if the controller's thread may still use the tracker."""
        self._analyst.stop()
        self._reader.stop()
        if takes_rest:
            self._tracker.relay_restarted()  # closes the turns that are still open
            self.take()
            self._write_figures()
            self._verdicts_due = 0.0
            self._keep_verdicts(self._analyst.document, time.time())
        if self._exporter is not None:
            self._exporter.close()
        if self._history is not None:
            self._history.close()
