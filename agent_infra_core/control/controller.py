"""The controller of one deployment: keeps the relay, the replica table, the tracker and /stats in step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_infra_core.control.bookkeeping import Bookkeeper
from agent_infra_core.control.discovery import DISCOVERY_INTERVAL_S, STOP_S, Discovery, replica_table
from agent_infra_core.control.exporter import SpanSender
from agent_infra_core.control.link import (
    DRAIN_S,
    RELAY_END_S,
    RELAY_RETRY_S,
    RELAY_SILENCE_S,
    RelayGoneError,
    RelayLink,
)
from agent_infra_core.control.scaling import Demand, may_wake
from agent_infra_core.control.status import describe_replica
from agent_infra_core.errors import AgentInfraError
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.host import append_line, in_portions, write_atomically
from agent_infra_core.insight.metrics import METRICS_TYPE
from agent_infra_core.insight.runs import Announcement
from agent_infra_core.insight.tracker import Tracker, encode_stats
from agent_infra_core.protocol import (
    FRAME_ANSWER,
    FRAME_EVENTS,
    FRAME_GAUGES,
    FRAME_REQUEST,
    FRAME_STATS,
    FRAME_TABLE,
    Backend,
    ReplicaRecord,
    decode_events,
    is_count,
)
from agent_infra_core.settings import Config, proxy_url
from agent_infra_core.ssh.tunnels import TunnelSet

JSON_TYPE = "application/json"
EVENTS_AT_ONCE = 16  # takes half a millisecond
SNAPSHOT_INTERVAL_S = 1.0
WATCHED_S = 10.0  # time after a read of /stats in which new documents are made ahead


class StatsMaker:
    """Makes the /stats document and sends it: every second while somebody reads it, otherwise on request."""

    def __init__(
        self, tracker: Tracker, books: Bookkeeper, strategy: str, send: Callable[[bytes, bytes], None]
    ) -> None:
        """``send`` takes a frame's kind and its payload."""
        self._tracker, self._books, self._strategy, self._send = tracker, books, strategy, send
        self._document: Mapping[str, Any] = {}
        self._turns = -1  # in it
        self._due = 0.0  # until then the document is fresh
        self._watched_until = 0.0
        self._reads = 0  # the relay's count

    def note_reads(self, reads: int) -> None:
        """Update the relay's count of /stats reads, which restarts at zero with each relay."""
        if reads > self._reads:
            self._watched_until = time.monotonic() + WATCHED_S
        self._reads = reads

    def relay_replaced(self) -> None:
        """The next relay has no document yet."""
        self._due = 0.0

    def look(self, records: Sequence[Mapping[str, Any]], table: Sequence[Backend]) -> None:
        """Make a document if somebody reads /stats, and feed the analysis. Call it once a second.

        ``records`` and ``table`` are as for Tracker.replicas.
        """
        if is_watched := time.monotonic() < self._watched_until:
            self._make(records, table)
        replicas = self._document["backends"] if is_watched else self._tracker.replicas(records, table)
        self._books.analyse(replicas, is_watched)

    def fresh(self, records: Sequence[Mapping[str, Any]], table: Sequence[Backend]) -> Mapping[str, Any]:
        """A document no older than a second, with all turns that are over; the relay has the same one."""
        if time.monotonic() >= self._due or self._turns != self._tracker.totals["requests"]:
            self._make(records, table)
        return self._document

    def _make(self, records: Sequence[Mapping[str, Any]], table: Sequence[Backend]) -> None:
        self._turns = self._tracker.totals["requests"]
        snapshot = self._tracker.snapshot(records, table, self._strategy)
        self._document = {**snapshot, **self._books.document()}
        self._due = time.monotonic() + SNAPSHOT_INTERVAL_S
        self._send(FRAME_STATS, encode_stats(self._document))


class ControllerLog:
    """The controller's lines in the proxy's log, which it shares with the relay."""

    def __init__(self, path: Path, form: str) -> None:
        """``form`` is text or json."""
        self._path, self._form = path, form
        self._told: dict[str, str] = {}  # replica → its state as logged last

    def say(self, message: str, level: str = "info") -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        line = f"{at} {level} controller: {message}"
        if self._form == "json":
            line = json.dumps({"at": at, "level": level, "role": "controller", "message": message})
        append_line(self._path, line)

    def note_changes(self, records: Sequence[ReplicaRecord]) -> None:
        """Log which replicas changed, and their new state."""
        told = {record.replica: describe_replica(record) for record in records}
        for replica, words in told.items():
            if self._told.get(replica) != words:
                self.say(f"{replica} is {words}")
        for replica in self._told.keys() - told.keys():
            self.say(f"{replica} is gone")
        self._told = told


class Controller:
    """The control plane of one deployment: keeps relay, replica table and tracker in step, in its own thread."""

    def __init__(
        self,
        config: Config,
        paths: DeploymentPaths,
        look: Callable[[], Sequence[ReplicaRecord]],
        *,
        keys: tuple[str, str | None],
        log_format: str = "text",
        pause_s: float = DISCOVERY_INTERVAL_S,
        tunnels: TunnelSet | None = None,
        spans: SpanSender | None = None,
    ) -> None:
        """``look`` lists replicas, ``tunnels`` lead to them, ``spans`` gets turns; ``keys``: clients' and replicas'."""
        self._config, self._paths, self.tunnels, (client_key, self._replica_key) = config, paths, tunnels, keys
        self._settings = {
            "proxy": {**dataclasses.asdict(config.proxy), "api_key": client_key},
            "headers": dataclasses.asdict(config.headers),
            "log_format": log_format,
            "drain_seconds": DRAIN_S,
        }
        self._journal = ControllerLog(paths.log("proxy"), log_format)
        self._log, pause_s = self._journal.say, max(pause_s, DISCOVERY_INTERVAL_S)
        self.discovery = Discovery(look, pause_s, functools.partial(self._log, level="warning"))
        self.relay = RelayLink(paths, config.proxy.host, config.proxy.port)
        self._tracker = Tracker(time.time)
        self._books = Bookkeeper(config, paths, self._tracker, self._log, self._answer, spans)
        self._stats = StatsMaker(self._tracker, self._books, config.proxy.strategy, self.relay.send)
        self.expected, self.asleep = frozenset[str](), frozenset[str]()  # models that turns wait for (see Autoscaler)
        # Replicas, with their job and process: those that an operator drained, and as of the last look.
        self._known: dict[str, tuple[str | None, str]] = _read_drained(paths.drained)
        self._drain_lock = threading.Lock()  # for changes of _drained, which discovery and the controller make
        # Replica → when its drain was asked for, monotonic s; replaced as a whole.
        self._drained: Mapping[str, float] = dict.fromkeys(self._known, time.monotonic())
        self._saved_drained = frozenset(self._drained)
        self._looked: Sequence[ReplicaRecord] | None = None  # discovery's records in the table sent last
        self._records: Sequence[ReplicaRecord] = ()  # the same, with the local ends of the tunnels
        self._seen: tuple[Any, ...] = (None, None, None)  # inputs of _sent_table
        self._sent_table: Any = None
        self._rows: tuple[Any, Any, list[dict[str, Any]], list[Backend]] = None, None, [], []  # see _replicas()
        self._stop, self._ending = threading.Event(), threading.Event()  # _ending: the relay is expected to exit
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._heard_at = 0.0
        self._gauges: tuple[float, Mapping[str, Any]] = (0.0, {})  # the relay's latest report, and when it came
        self.failure: BaseException | None = None

    @property
    def url(self) -> str:
        """The proxy's address for clients on this machine."""
        return proxy_url(self._config.proxy.host, self.relay.port)

    def routes(self) -> list[str]:
        """Lines on how the replicas are reached, for the operator."""
        return self.tunnels.describe() if self.tunnels is not None else []

    def start(self) -> None:
        """Take over or start the relay, then keep everything in step in a thread until stop()."""
        self.relay.open()
        if self.relay.retired is not None:
            words = f"the relay (pid {self.relay.retired}) is of another version: it finishes its turns and exits"
            self._log(f"{words}; they will be missing from the history. A new relay serves from now on", "warning")
        self._books.open()
        self.discovery.start()
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def check(self) -> None:
        """Raise AgentInfraError if the thread has failed."""
        if not self.is_running:
            raise AgentInfraError(f"the controller failed: {self.failure!r}; the proxy's log says more")

    @property
    def port(self) -> int:
        """The port that clients use."""
        return self.relay.port

    def begin(self) -> None:
        """The replicas that turns wait for are submitted: look at them."""
        self.refresh()
        self.expected = frozenset()

    def settle(self, _show: object = None, _should_stop: object = None) -> bool:
        """Return once turns reach the replicas that are ready."""
        self.refresh()
        return True

    def end_turns(self) -> None:
        """Have the relay cut its turns, if it is ending already."""
        self.relay.terminate()

    def refresh(self, deadline_s: float = 5.0) -> None:
        """Poll the replicas now, and return once the result was sent to the relay or after ``deadline_s``."""
        self.discovery.look()
        deadline = time.monotonic() + deadline_s
        while self._looked is not self.discovery.records and self.is_running and time.monotonic() < deadline:
            time.sleep(0.01)

    def drain(self, replica: str) -> int | None:
        """Send a replica no new turns. Returns how many it still has; None until the relay has surely reported since.

        Call it again until then. Thread-safe.
        """
        asked_at = self._drained.get(replica)
        reported_at, gauges = self._gauges
        if asked_at is None:
            with self._drain_lock:
                self._drained = {**self._drained, replica: time.monotonic()}
        elif reported_at > asked_at + 2 * SNAPSHOT_INTERVAL_S:
            return int(gauges["backends"].get(replica, {}).get("in_flight", 0))
        return None

    def demand(self) -> dict[str, Demand]:
        """What each model's agents ask for, as last reported. Thread-safe."""
        gauges, records, turns = self._gauges[1], self._records, self.turns()
        verdicts = {row["model"]: row["verdict"]["name"] for row in self._books.analysis}
        return {
            model.name: Demand(
                waiting=gauges.get("waiting", {}).get(model.name, 0),
                in_flight=sum(turns.get(record.replica, 0) for record in records if record.model == model.name),
                slots=max((record.slots for record in records if record.model == model.name), default=0),
                verdict=verdicts.get(model.name),
                gpu_hours=self._books.gpu_hours.get(model.name, 0.0),
            )
            for model in self._config.models
        }

    def turns(self) -> dict[str, int]:
        """Replica → its turns in flight, as last reported. Thread-safe."""
        rows = self._gauges[1].get("backends", {})
        return {replica: row["in_flight"] for replica, row in rows.items() if is_count(row.get("in_flight"))}

    def stop(self, grace_s: float = DRAIN_S) -> None:
        """Wait up to ``grace_s`` for turns in flight, then end the relay and the threads. Safe to call again.

        Clients whose turns are cut get an error.
        """
        if self._thread.is_alive():
            self._ending.set()
            self.relay.terminate()
            # Longer than the relay's own grace period, after which it still answers the clients whose turns it cuts.
            deadline = time.monotonic() + grace_s + RELAY_END_S
            while self._thread.is_alive() and time.monotonic() < deadline:
                self._thread.join(timeout=grace_s + RELAY_END_S if grace_s else 0.1)
                if not grace_s:
                    self.relay.terminate()  # the second one ends its patience
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)
        if is_stuck := self._thread.is_alive():
            self._ending.set()
            self.relay.close()  # ends what the thread may be waiting for, and so the thread
            self._thread.join(timeout=STOP_S)
            if is_stuck := self._thread.is_alive():
                lost = "turns and replica time that it has not passed on are missing from the history"
                self._log(f"the controller's thread is still busy and was abandoned; {lost}", "warning")
        self.discovery.stop()
        self._books.close(takes_rest=not is_stuck)
        self.relay.close()
        if self.tunnels is not None:
            self.tunnels.close()

    def _run(self) -> None:
        """The thread's main loop. A relay that fails is replaced; only stop() ends the loop."""
        try:
            sample_due = 0.0
            self._heard_at = time.monotonic()
            while not self._stop.is_set():
                try:
                    self._exchange(max(0.0, min(0.25, sample_due - time.monotonic())))
                    if time.monotonic() >= sample_due:
                        sample_due = time.monotonic() + SNAPSHOT_INTERVAL_S
                        self._stats.look(*self._replicas())
                        self.relay.keep_record()
                        self._save_drained()
                except RelayGoneError as error:
                    self._hear(frame for frame in self.relay.rest() if frame[0] != FRAME_REQUEST)
                    if self._ending.is_set():
                        return
                    self._replace_relay(error)
        except BaseException as error:
            self.failure = error
            self._log(f"the controller failed: {traceback.format_exc().strip()}", "error")
            raise

    def _exchange(self, timeout: float) -> None:
        """Send the table if it changed, and process the relay's frames."""
        looked = self.discovery.records
        records = self.tunnels.follow(looked) if self.tunnels is not None else looked
        if self._looked is not looked or records != self._records:
            self._records = records
            if self.discovery.error is None:
                self._forget_drained(records)
        awaited = self.tunnels.awaited() if self.tunnels is not None else frozenset[str]()
        seen = (self._records, self._drained, self.expected | self.asleep | awaited)
        if self._sent_table is None or seen != self._seen:
            models = [model.name for model in self._config.models]
            wakes = [model.name for model in self._config.models if may_wake(model)]
            table = {**replica_table(models, seen[0], self._replica_key, *seen[1:]), "wakes": wakes}
            if table != self._sent_table:
                first = {"settings": self._settings} if self._sent_table is None else {}
                self.relay.send(FRAME_TABLE, json.dumps({**first, **table}).encode())
                self._journal.note_changes(seen[0])
                self._sent_table = table
            self._seen = seen
        self._looked = looked
        self._hear(self.relay.receive(timeout))
        self._books.take()
        if time.monotonic() - self._heard_at > RELAY_SILENCE_S:
            raise RelayGoneError(f"the relay (pid {self.relay.pid}) was silent for {RELAY_SILENCE_S:g} s")

    def _hear(self, frames: Iterable[tuple[bytes, bytes]]) -> None:
        """Process the relay's frames."""
        for kind, payload in frames:
            self._heard_at = time.monotonic()
            try:
                self._take(kind, payload)
            except RelayGoneError:
                raise
            except Exception as error:  # noqa: BLE001  a bug, or a package that is missing, must not end the controller
                self._log(f"a frame {kind!r} from the relay cannot be processed and is ignored: {error!r}")

    def _forget_drained(self, records: Sequence[ReplicaRecord]) -> None:
        """A replica that is gone or was restarted under the same name is no longer drained."""
        known = {record.replica: (record.job_id, record.process) for record in records}
        with self._drain_lock:
            self._drained = {
                name: at for name, at in self._drained.items() if name in known and known[name] == self._known.get(name)
            }
        self._known = known

    def _save_drained(self) -> None:
        """Keep the drained replicas for the next controller; on a full disk, the next call tries again."""
        drained = frozenset(self._drained)
        if drained != self._saved_drained:
            known = {name: self._known.get(name, (None, "")) for name in sorted(drained)}
            with contextlib.suppress(OSError):
                write_atomically(self._paths.drained, json.dumps(known))
                self._saved_drained = drained

    def _take(self, kind: bytes, payload: bytes) -> None:
        """Process one frame of the relay."""
        if kind == FRAME_EVENTS:
            for events in in_portions(decode_events(payload), EVENTS_AT_ONCE):
                self._books.observe(*events)
        elif kind == FRAME_GAUGES:
            gauges = json.loads(payload)
            self._gauges = time.monotonic(), gauges
            self._tracker.sample(gauges)
            self._books.sample(self._records, gauges)
            self._stats.note_reads(gauges.get("stats_read", 0))
            if self.asleep & gauges.get("waiting", {}).keys() or self._is_left(gauges):
                self.discovery.hurry()  # a replica has to be woken
        elif kind == FRAME_REQUEST:
            self._do(json.loads(payload))

    def _is_left(self, gauges: Mapping[str, Any]) -> bool:
        """Whether turns wait for a model that may be woken, and whose last replica is just leaving by itself."""
        table, loads = self._sent_table or {}, gauges["backends"]
        states: dict[str, set[Any]] = {
            name: set() for name in gauges.get("waiting", {}) if name in table.get("wakes", ())
        }
        for row in table.get("backends", ()) if states else ():
            if row["model"] in states:
                states[row["model"]].add((loads.get(row["id"], {}).get("load") or {}).get("state"))
        return any(each == {"draining"} for each in states.values())

    def _do(self, request: Mapping[str, Any]) -> None:
        """Serve a request that the relay got over HTTP."""
        if request["op"] in ("stats", "metrics"):
            self._books.take()  # the turns that were reported just before
            stats = self._stats.fresh(*self._replicas())
            body = self._books.metrics(stats).decode() if request["op"] == "metrics" else ""
            self._answer(request, 200, body, METRICS_TYPE)
            return
        if request["op"] in ("runs", "run"):
            if request["op"] == "run":
                self._books.announce_run(Announcement(request["name"], request["tasks"], time.time()))
            self._answer(request, 200, json.dumps({"runs": self._books.runs}))
            return
        if request["op"] in ("history", "sessions", "session"):
            self._books.ask(request)
            return
        with self._drain_lock:
            others = {name: at for name, at in self._drained.items() if name != request["backend"]}
            self._drained = {**others, request["backend"]: time.monotonic()} if request["op"] == "drain" else others

    def _answer(self, request: Mapping[str, Any], status: int, body: str, content_type: str = JSON_TYPE) -> None:
        """Answer a request, in any thread. RelayGoneError if the relay is gone."""
        answer = {"id": request["id"], "status": status, "type": content_type, "body": body}
        self.relay.send(FRAME_ANSWER, json.dumps(answer).encode())

    def _replace_relay(self, why: RelayGoneError) -> None:
        """Reconnect to the relay if it still answers, since it is serving; otherwise start another at once.

        If starting fails, the caller tries again at a bounded rate until stop().
        """
        self._sent_table = None
        self._stats.relay_replaced()
        if self.relay.reconnect():
            self._log(f"{why}; reconnected")
        else:
            self._log(f"{why}; starting another")
            self._tracker.relay_restarted()
            try:
                self.relay.spawn()
            except (RelayGoneError, OSError, ValueError) as error:
                # OSError: no process or descriptor is available. ValueError: close() was called meanwhile.
                self._log(str(error))
                self._stop.wait(RELAY_RETRY_S)
        self._heard_at = time.monotonic()

    def _replicas(self) -> tuple[list[dict[str, Any]], list[Backend]]:
        """Records and table, in the form the tracker takes."""
        tunnels = self.tunnels.rows() if self.tunnels is not None else {}
        if self._rows[0] is not self._records or self._rows[1] is not self._sent_table:  # made anew once a poll
            rows = [dataclasses.asdict(record) for record in self._records]
            backends = [Backend(**row) for row in self._sent_table["backends"]]
            self._rows = self._records, self._sent_table, rows, backends
        _, _, rows, backends = self._rows
        return [{**row, "tunnel": tunnels.get(row["replica"])} for row in rows], backends


def _read_drained(path: Path) -> dict[str, tuple[str | None, str]]:
    """The drained replicas that the last controller kept, with job and process; none where they can't be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return {name: (job, process) for name, (job, process) in json.loads(path.read_text(encoding="utf-8")).items()}
    return {}
