"""Feeds turns to the tracker, the history and the metrics, and runs the analysis in a thread of its own."""

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
from agent_infra_core.fleet.engines import ENGINES
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.insight.analysis import CapacityAnalysis
from agent_infra_core.insight.gpu_hours import ReplicaTime, replica_use
from agent_infra_core.insight.history import RESTORED_S, History, HistoryBatch, HistoryFile, history_path, verdict_row
from agent_infra_core.insight.measure import fleet_samples
from agent_infra_core.insight.metrics import StatsMetrics, TurnMetrics, metrics_text
from agent_infra_core.insight.replicas import as_mapping
from agent_infra_core.insight.tracker import Tracker
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import ReplicaRecord, SessionEnded, TurnEvent
from agent_infra_core.settings import Config

RESTORED_TURNS = 50_000  # that a new controller reads again, of the last RESTORED_S: about a second's work
VERDICT_INTERVAL_S = 60.0
FIGURES_WRITE_S = 10.0  # between two writings of replica time and of what throughput.history shows
ANALYSIS_INTERVAL_S = 5.0
ANALYSIS_PAUSE_S = 30.0  # the longest, also where a fit is dear or no turn has ended
UNWATCHED_PAUSE_S = 60.0  # the same while nobody reads /stats
ANALYSIS_SHARE = 0.005  # of a core; 8,000 turns take a tenth of a second, so about 20 s go by between two fits


def _without_resumed(ended: dict[str, float], turns: Iterable[TurnRecord]) -> Iterator[TurnRecord]:
    """The turns; on the way the sessions that went on after their end are taken out of ``ended``."""
    for record in turns:
        # By its start: a turn that was open at the end finishes after it, and takes nothing up again.
        at = record.finished_at if record.started_at is None else record.started_at
        if record.session is not None and at > ended.get(record.session, math.inf):
            del ended[record.session]
        yield record


class Analyst:
    """Computes the analysis every ANALYSIS_INTERVAL_S, in a thread of its own: nobody waits for a fit.

    One that takes long is computed more rarely, so that it takes ANALYSIS_SHARE of a core and no more; and so is one
    that nobody reads, or for which no turn has ended since the last.
    """

    def __init__(self, tracker: Tracker, log: Callable[[str, str], None]) -> None:
        """``log`` takes a message and its level."""
        self._tracker, self._log = tracker, log
        self._analysis = CapacityAnalysis(time.time, random.Random())  # noqa: S311  dice, not keys
        self._stop = threading.Event()
        self._change = threading.Event()  # of _stop or _is_watched
        self._is_watched = False
        self._thread = threading.Thread(target=self._run, name="analysis", daemon=True)
        self._told: str | None = None  # the error that the log has
        self._has_news = False  # set by whoever adds to the analysis, taken back by the thread
        self.document: list[dict[str, Any]] = []  # of /stats; replaced as a whole, so that readers need no lock

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, or leave it behind in a computation that nobody will look at."""
        self._stop.set()
        self._change.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)

    def take(self, turns: Iterable[TurnRecord]) -> None:
        """Add finished turns."""
        for record in turns:
            self._analysis.add(record)
            self._has_news = True

    def end_session(self, session: str, at: float) -> None:
        """Note that an agent said so."""
        self._analysis.end(session, at)
        self._has_news = True

    def sample(self, replicas: Iterable[Mapping[str, Any]]) -> None:
        """Take what Tracker.replicas says, once a second."""
        for sample in fleet_samples(time.time(), replicas, self._tracker.silences(), self._analysis.presence):
            self._analysis.sample(sample)

    def watch(self, is_watched: bool) -> None:
        """Note whether somebody reads what it finds; whoever begins to need not wait for the end of a long rest."""
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
            if self._has_news or time.monotonic() >= due:  # else all is as it was, but for where its windows end
                self._has_news, due = False, time.monotonic() + ANALYSIS_PAUSE_S
                pause_s = min(max(ANALYSIS_INTERVAL_S, self._compute() / ANALYSIS_SHARE), ANALYSIS_PAUSE_S)
            ended = time.monotonic()

    def _compute(self) -> float:
        """Replace ``document``; the seconds that it took, of CPU."""
        began = time.thread_time()
        try:
            self.document, self._told = self._analysis.document(), None
        except Exception as error:  # noqa: BLE001  an analysis that fails must not end the next
            self.document = []  # rather nothing than what was true some time ago
            if self._told != repr(error):
                self._log(f"there is no analysis: {traceback.format_exc().strip()}", "error")
            self._told = repr(error)
        return time.thread_time() - began


class Bookkeeper:
    """What becomes of the tracker's turns and the replicas' time: kept beyond the controller's life, and analysed."""

    def __init__(
        self, config: Config, paths: DeploymentPaths, tracker: Tracker, log: Callable[[str, str], None]
    ) -> None:
        """``log`` takes a message and its level."""
        self._tracker = tracker
        path = history_path(config.proxy.history, paths.history)
        self._history = History(path, log, time.time) if path is not None else None
        self._replica_time = ReplicaTime(time.time, time.monotonic)
        self._asked_gpus = {
            model.name: model.tensor_parallel_size * model.pipeline_parallel_size
            for model in config.models
            if config.cluster.type == "slurm" and ENGINES[model.engine].uses_gpus
        }
        self._figures_due = 0.0
        self._told_totals = dict(tracker.totals)
        self._verdicts_due = 0.0
        self._told_until = 0.0  # the points of throughput.history up to then
        self._analyst = Analyst(tracker, log)
        self._metrics = TurnMetrics()

    def open(self) -> None:
        """Give tracker and analysis what an earlier controller kept; before any event."""
        if self._history is not None:
            self._history.open(self._restore)
        self._analyst.start()

    def _restore(self, file: HistoryFile) -> None:
        self._replica_time.restore(file.replica_seconds(), file.since())
        try:
            ended = file.ended_sessions()
            turns = file.latest_turns(RESTORED_TURNS, time.time() - RESTORED_S)
            self._tracker.restore(self._noted(_without_resumed(ended, turns)), file.totals(), ended)
            for session, at in ended.items():
                self._analyst.end_session(session, at)
            self._tracker.timeline.restore(file.points())
        finally:  # also where it broke off: what was restored must not be added again
            self._told_totals = dict(self._tracker.totals)
            self._told_until = time.time()

    def _noted(self, records: Iterable[TurnRecord]) -> Iterator[TurnRecord]:
        for record in records:
            self._analyst.take([record])
            yield record

    def take(self) -> None:
        """Hand on the turns that finished since the last call: into the history, the metrics, the analysis."""
        turns, posts = self._tracker.take_records()
        new = {name: total - self._told_totals[name] for name, total in self._tracker.totals.items()}
        if turns or posts or any(new.values()):
            self._told_totals = dict(self._tracker.totals)
            if self._history is not None:
                self._history.add(HistoryBatch(deque(turns), posts, new))
        self._metrics.add(*turns)
        for post_ms in posts.values():
            self._metrics.add_post(post_ms)
        self._analyst.take(turns)

    def observe(self, *events: TurnEvent) -> None:
        """Take events of the relay, in order."""
        self._tracker.observe(*events)
        for event in events:
            if isinstance(event, SessionEnded):
                self._analyst.end_session(event.session, event.at)
                if self._history is not None:
                    self._history.add(HistoryBatch(ended={event.session: event.at}))

    def _keep_verdicts(self, entries: Sequence[Mapping[str, Any]], now: float) -> None:
        """Once a minute."""
        if self._history is None or not entries or now < self._verdicts_due:
            return
        self._verdicts_due = now + VERDICT_INTERVAL_S
        self._history.add(HistoryBatch(verdicts=[verdict_row(entry, now) for entry in entries]))

    def metrics(self, stats: Mapping[str, Any]) -> bytes:
        """The body of GET /metrics, beside what ``stats``, a /stats document, says."""
        return metrics_text(self._metrics, StatsMetrics(stats, self._replica_time.seconds()))

    def sample(self, records: Iterable[ReplicaRecord], gauges: Mapping[str, Any]) -> None:
        """The replicas as they are now, once a second; ``gauges`` as Tracker.sample takes them."""
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

    def _write_figures(self) -> None:
        taken, points = self._replica_time.take(), self._tracker.timeline.after(self._told_until)
        if points:
            self._told_until = points[-1]["at"]
        if self._history is not None:
            self._history.add(HistoryBatch(replica_time=taken, points=points))

    def analyse(self, replicas: Iterable[Mapping[str, Any]], is_watched: bool) -> None:
        """Take what Tracker.replicas says, once a second, and whether somebody reads what becomes of it."""
        self._analyst.watch(is_watched)
        self._analyst.sample(replicas)
        self._keep_verdicts(self._analyst.document, time.time())

    def document(self) -> dict[str, Any]:
        """What /stats says of it: ``history``, ``accounting`` and ``analysis``."""
        off = {"path": None, "state": "off", "reason": None, "turns": None}
        history = self._history.document() if self._history is not None else off
        return {"history": history, "accounting": self._replica_time.document(), "analysis": self._analyst.document}

    def close(self, takes_rest: bool = True) -> None:
        """Write what is left; ``takes_rest`` unless the controller's thread may still be using the tracker."""
        self._analyst.stop()
        if takes_rest:
            self._tracker.relay_restarted()  # turns that are still open end with it
            self.take()
            self._write_figures()
        if self._history is not None:
            self._history.close()
