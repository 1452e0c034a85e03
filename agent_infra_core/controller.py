"""Controller: the control plane, plain Python: discovery, the relay's life, sessions, the /stats snapshot."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_infra_core.analysis import CapacityAnalysis, fleet_samples
from agent_infra_core.clusters import DeploymentPaths, end_process
from agent_infra_core.configuration import Config, proxy_url
from agent_infra_core.engines import ENGINES
from agent_infra_core.errors import SERVING_PACKAGES, AgentInfraError, RefusedError, require_packages
from agent_infra_core.history import (
    FIGURES_WRITE_S,
    METRICS_TYPE,
    RESTORED_S,
    RESTORED_TURNS,
    VERDICT_INTERVAL_S,
    History,
    HistoryBatch,
    HistoryFile,
    ReplicaTime,
    StatsMetrics,
    TurnMetrics,
    history_path,
    metrics_text,
    replica_use,
    verdict_row,
)
from agent_infra_core.node import ReplicaRecord, process_stamp, write_atomically
from agent_infra_core.relay import unix_address
from agent_infra_core.routing import Backend
from agent_infra_core.tracking import (
    SessionEnded,
    Tracker,
    TurnEvent,
    TurnRecord,
    _as_mapping,
    decode_events,
    encode_stats,
)
from agent_infra_core.tunnels import TunnelSet
from agent_infra_core.wire import (
    FRAME_ANSWER,
    FRAME_EVENTS,
    FRAME_GAUGES,
    FRAME_HELLO,
    FRAME_REQUEST,
    FRAME_STATS,
    FRAME_TABLE,
    FrameReader,
    encode_frame,
    error_document,
)

RELAY_START_S = 15.0  # for a relay to import gevent and Flask and open its control socket
RELAY_SILENCE_S = 15.0  # it reports every second; silent for so long, it is hung and is replaced
RELAY_END_S = 5.0  # for a relay to end in order once its turns are over, or their time is
RELAY_RETRY_S = 2.0  # between two starts of a relay that dies at once
DISCOVERY_INTERVAL_S = 0.5
SNAPSHOT_INTERVAL_S = 1.0
WATCHED_S = 10.0  # that /stats documents are made ahead after one was read
ANALYSIS_INTERVAL_S = 5.0
ANALYSIS_PAUSE_S = 30.0  # the longest, also where a fit is dear or no turn has ended
UNWATCHED_PAUSE_S = 60.0  # the same while nobody reads /stats
ANALYSIS_SHARE = 0.005  # of a core; 8,000 turns take a tenth of a second, so about 20 s go by between two fits
DRAIN_S = 30.0  # that turns in flight have to end before a relay or a replica is stopped
STOP_S = 10.0  # that each thread of the controller has to end


class RelayGoneError(AgentInfraError):
    """The relay's process or its control socket is gone; the controller starts another."""


class RelayLink:
    """The relay process and the control socket to it; owns both, and the listening socket, which outlives any relay."""

    def __init__(self, paths: DeploymentPaths, host: str, port: int) -> None:
        self._paths, self._host, self.port = paths, host, port
        self._listener: socket.socket | None = None
        self._control: socket.socket | None = None
        self._frames = FrameReader()
        self._early: list[tuple[bytes, bytes]] = []  # frames that came with the hello
        self.pid = 0
        self._stamp: str | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        """Take over the relay that an earlier controller left behind, or else listen and start one."""
        require_packages(SERVING_PACKAGES)  # it would end at once, and say so in its log alone
        if self._adopt():
            return
        self._listener = listen_on(self._host, self.port)
        self.port = self._listener.getsockname()[1]
        self.spawn()

    def _adopt(self) -> bool:
        """Connect to a relay that still serves this address; end one that serves another."""
        left = read_relay_record(self._paths)
        if left is None:
            return False
        if left["host"] == self._host and self.port in (0, left["port"]):
            with contextlib.suppress(RelayGoneError):
                self.port = left["port"]
                self._greet(time.monotonic() + 2.0)
                return True
        end_process(left["pid"], left["process"], DRAIN_S + RELAY_END_S)
        return False

    def spawn(self) -> None:
        """Start a relay on the listening socket and wait until it says hello; RelayGoneError when it does not."""
        listener = self._listener
        if listener is None:
            raise RelayGoneError("there is no listening socket; open() comes first")
        self.abandon()
        folder, name = os.path.split(os.path.abspath(__file__))
        # As a module, Python takes its cached bytecode: a quarter of the time, when every connection waits.
        command = [sys.executable, "-m", name.removesuffix(".py"), "relay"]
        command += ["--socket", str(self._paths.relay_socket), "--listener-fd", str(listener.fileno())]
        with open(self._paths.log("proxy"), "ab") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                cwd=folder,
            )
        self._greet(time.monotonic() + RELAY_START_S)

    def _greet(self, deadline: float) -> None:
        """Connect to the control socket and read the hello, which carries the listening socket."""
        self._frames = FrameReader()
        while True:
            control = socket.socket(socket.AF_UNIX)
            descriptors: list[int] = []
            control.settimeout(5.0)
            try:
                with unix_address(str(self._paths.relay_socket)) as address:
                    control.connect(address)
                data, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
                frames = self._frames.feed(data)
                if frames and descriptors and frames[0][0] == FRAME_HELLO:
                    break
                error: object = "it hung up"
            except (OSError, ValueError) as problem:
                error = problem
            control.close()
            for descriptor in descriptors:
                os.close(descriptor)
            child = self._child  # close() may come from another thread, here and below
            exited = child is not None and child.poll() is not None
            if exited or time.monotonic() > deadline:
                raise RelayGoneError(f"the relay does not answer ({error}); see {self._paths.log('proxy')}")
            time.sleep(0.02)
        received = socket.socket(fileno=descriptors[0])
        if self._listener is None:
            self._listener = received
        else:
            received.close()
        self._early = frames[1:]
        self._control, self.pid = control, int(json.loads(frames[0][1])["pid"])
        self._stamp = process_stamp(self.pid)
        record = {"pid": self.pid, "process": self._stamp, "host": self._host, "port": self.port}
        with contextlib.suppress(OSError):  # on a full disk it serves all the same
            write_atomically(self._paths.relay_record, json.dumps(record))

    def reconnect(self) -> bool:
        """Open a new control connection to the relay that runs; whether it answered."""
        control = self._control
        if control is None or process_stamp(self.pid) != self._stamp:
            return False
        control.close()
        self._control = None
        with contextlib.suppress(RelayGoneError):
            self._greet(time.monotonic() + 2.0)
            return True
        return False

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send a frame; RelayGoneError when the relay takes none."""
        control = self._control  # close() may come from another thread
        try:
            if control is None:
                raise OSError("not connected")
            control.sendall(encode_frame(kind, payload))
        except OSError as error:
            raise RelayGoneError(f"the relay (pid {self.pid}) is gone: {error}") from error

    def receive(self, timeout: float) -> list[tuple[bytes, bytes]]:
        """The frames that arrive within ``timeout`` seconds, perhaps none; RelayGoneError at the end of the stream."""
        control = self._control
        if control is None:
            raise RelayGoneError("the relay is not connected")
        if self._early:
            frames, self._early = self._early, []
            return frames
        try:
            if not select.select([control], [], [], timeout)[0]:
                return []
            data = control.recv(1 << 20)
            if not data:
                raise OSError("it hung up")
            return self._frames.feed(data)
        except (OSError, ValueError) as error:
            raise RelayGoneError(f"the relay (pid {self.pid}) is gone: {error}") from error

    def rest(self) -> list[tuple[bytes, bytes]]:
        """The frames that came and were not received yet, also of a relay that is gone."""
        frames, self._early = self._early, []
        control = self._control
        with contextlib.suppress(OSError, ValueError):
            while control is not None and select.select([control], [], [], 0.0)[0]:
                data = control.recv(1 << 20)
                if not data:
                    break
                frames += self._frames.feed(data)
        return frames

    def abandon(self) -> None:
        """Close the control socket and make sure that the relay's process is gone."""
        control, self._control = self._control, None
        stamp, self._stamp = self._stamp, None
        child, self._child = self._child, None
        if control is not None:
            control.close()
        if stamp is not None:
            end_process(self.pid, stamp, 0.0)
        if child is not None:
            child.kill()
            child.wait()

    def terminate(self) -> None:
        """Accept no more, and ask the relay to finish what is in flight and exit; called again, to exit at once."""
        if self._listener is not None:
            self._listener.close()  # else connections would wait in it for a relay that never comes
            self._listener = None
        if self._stamp is not None and process_stamp(self.pid) == self._stamp:
            os.kill(self.pid, signal.SIGTERM)

    def close(self) -> None:
        """End the relay, close the sockets, remove what names them."""
        self.abandon()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for path in (self._paths.relay_record, self._paths.relay_socket):
            path.unlink(missing_ok=True)


def listen_on(host: str, port: int) -> socket.socket:
    """A listening TCP socket; RefusedError, with the fix, when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=4096)
    except OSError as error:
        fix = "set proxy.host to an address of this machine"
        if error.errno == errno.EADDRINUSE:
            fix = "end the program that listens there, or set proxy.port (or --port) to a free one"
        elif error.errno == errno.EACCES:
            fix = "set proxy.port to one above 1023"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        raise RefusedError(f"the proxy cannot listen on {host}:{port}: {reason}; {fix}") from error


def read_relay_record(paths: DeploymentPaths) -> dict[str, Any] | None:
    """What the controller noted of the deployment's relay, if that very process still runs."""
    try:
        record: dict[str, Any] = json.loads(paths.relay_record.read_text(encoding="utf-8"))
        return record if process_stamp(record["pid"]) == record["process"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Discovery:
    """Looks at the replicas every ``interval_s``, in a thread of its own, because a look may block.

    ``warn`` is told when looks begin to fail, and when they fail for another reason.
    """

    def __init__(
        self, look: Callable[[], Sequence[ReplicaRecord]], interval_s: float, warn: Callable[[str], None]
    ) -> None:
        self._look, self._interval_s, self._warn = look, interval_s, warn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)
        self.records: Sequence[ReplicaRecord] = ()  # replaced as a whole, so that readers need no lock
        self.error: str | None = None

    def start(self) -> None:
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, or leave it behind in a look that takes long: whatever that finds, nobody acts on it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)
            if self._thread.is_alive():
                self._warn(
                    "a look at the replicas still goes on; it is left behind, and a handover that it may be at too"
                )

    def look(self) -> None:
        """One look; what goes wrong is kept in ``error`` and leaves the last records standing."""
        try:
            self.records, self.error = self._look(), None
        except Exception as error:  # noqa: BLE001  a look that fails must not end discovery
            problem = str(error) if isinstance(error, AgentInfraError) else f"{type(error).__name__}: {error}"
            if problem != self.error:
                self._warn(f"the replicas cannot be looked at, so what was seen last stands: {problem}")
            self.error = problem

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look()


def replica_table(
    models: Sequence[str],
    records: Iterable[ReplicaRecord],
    key: str | None,
    drained: frozenset[str] = frozenset(),
    expected: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The payload of FRAME_TABLE but for the settings: who can serve what, and which models are still loading.

    ``drained`` are replicas that an operator drained, ``expected`` models whose replicas are about to be started.
    """
    backends, loading = [], set(expected)
    for record in records:
        if record.state in ("pending", "starting", "loading"):
            loading.add(record.model)
        if record.state not in ("ready", "draining") or record.port is None:
            continue
        state = "draining" if record.replica in drained else record.state
        backend = Backend(
            id=record.replica,
            model=record.model,
            host=record.host,
            port=record.port,
            telemetry_port=record.telemetry_port,
            key=key,
            state=state,
            slots=record.slots,
            node=record.node,
        )
        backends.append(dataclasses.asdict(backend))
    return {"models": list(models), "loading": sorted(loading), "backends": backends}


# --- Handover (pure): a replica is replaced before the walltime of its job ends. -------------------------------------
HANDOVER_MARGIN = 1.5  # times what a replica was seen to need until it was ready
HANDOVER_RESERVE_S = 180.0  # for the old one's turns to end before Slurm tells it to, a minute early perhaps
HANDOVER_LIFE_SHARE = 0.75  # of the walltime, at most: else long queues would have every replica replaced at once
HANDOVER_ATTEMPTS = 3  # successors that fail, before it is given up
HANDOVER_RETRY_S = 60.0  # between the first and the second of these, at least; doubled each time

# Reasons for which a successor waits until its predecessor has ended, because the two count against one limit.
_LIMIT_REASON = re.compile(r"(QOS|Assoc)(Max|Grp)\w*|Max\w*Per(User|Account)\w*|Licenses")


@dataclass(frozen=True)
class Succession:
    """A replica that is being replaced; handover.json keeps these by the name of the replica."""

    job: str | None  # the replica's: another job of its name is another replica
    successor: str
    is_after: bool = False  # the successor starts when the replica has ended, for a limit does not allow both
    attempts: int = 1
    note: str = ""  # for `status`
    at: float = 0.0  # when that was submitted, or was to be (s since the epoch)


@dataclass(frozen=True)
class HandoverStep:
    """What is to be done next about one replica."""

    action: str  # submit | give up | postpone (a limit does not allow both) | drain (and end once idle) | forget
    replica: str
    reason: str  # for the log


def handover_lead_s(record: ReplicaRecord, records: Iterable[ReplicaRecord], now: float) -> float:
    """How long before the end of its walltime a replica's successor is to be submitted.

    From the longest wait in the queue and the longest loading time that its model's replicas had.
    """
    peers = [peer for peer in records if peer.model == record.model]
    wait_s = max((peer.queue_wait_s or 0.0 for peer in peers), default=0.0)
    load_s = max((peer.ready_at - peer.started_at for peer in peers if peer.ready_at), default=0.0)
    walltime_s = (record.time_left_s or 0.0) + max(0.0, now - record.started_at)
    return min(HANDOVER_MARGIN * (wait_s + load_s) + HANDOVER_RESERVE_S, HANDOVER_LIFE_SHARE * walltime_s)


def plan_handover(
    records: Sequence[ReplicaRecord], successions: Mapping[str, Succession], now: float
) -> list[HandoverStep]:
    """The next step for every replica whose walltime nears its end, or that is being replaced already.

    ``now`` is s since the epoch.  Steps may come again at the next look, until they have had their effect.
    """
    known = {record.replica: record for record in records}
    steps = [_succession_step(known, replica, succession, now) for replica, succession in successions.items()]
    for record in records:
        is_followed = record.replica in successions and successions[record.replica].job == record.job_id
        if record.state == "ready" and record.time_left_s is not None and not is_followed:
            lead_s = handover_lead_s(record, records, now)
            if record.time_left_s < lead_s:
                reason = f"{record.replica} has {record.time_left_s:.0f} s left, a successor needs up to {lead_s:.0f} s"
                steps.append(HandoverStep("submit", record.replica, reason))
    return [step for step in steps if step]


def _succession_step(
    known: Mapping[str, ReplicaRecord], replica: str, succession: Succession, now: float
) -> HandoverStep | None:
    """What is next for a replica that has a successor; None: to wait."""
    old, new = known.get(replica), known.get(succession.successor)
    if old is None or old.job_id != succession.job or old.state in ("stopped", "failed"):
        return HandoverStep("forget", replica, f"{replica} has ended, {succession.successor} takes its place")
    if new is None or new.state in ("stopped", "failed"):
        why = f"{succession.successor}, to replace {replica}, is {describe_replica(new) if new else 'gone'}"
        if not succession.successor:
            why = f"the successor of {replica} {succession.note}"
        if succession.attempts >= HANDOVER_ATTEMPTS:
            return HandoverStep("give up", replica, f"{why}; it was the last of {HANDOVER_ATTEMPTS} attempts")
        if now < succession.at + HANDOVER_RETRY_S * 2 ** (succession.attempts - 1):
            return None  # what made it fail, a bad node or a limit, may take a while to pass
        return HandoverStep("submit", replica, f"{why}; another is submitted")
    if new.state == "ready":
        return HandoverStep("drain", replica, f"{new.replica} is ready and takes over from {replica}")
    if new.state == "pending" and not succession.is_after and _LIMIT_REASON.fullmatch(new.pending_reason or ""):
        reason = f"{new.pending_reason} does not allow {new.replica} beside {replica}: it starts once that has ended"
        return HandoverStep("postpone", replica, reason)
    return None


def describe_replica(record: ReplicaRecord) -> str:
    """A replica's state in words: ``LOADING 5/9``, ``READY 127.0.0.1:5901``, ``FAILED out_of_memory: …``."""
    words = record.state.upper()
    if record.state == "pending":
        start = time.strftime("est. %H:%M", time.localtime(record.starts_at)) if record.starts_at else ""
        told = ", ".join(part for part in (record.pending_reason, start) if part)
        return words + (f" ({told})" if told else "")
    if record.state == "ready":
        words += f" {record.host}:{record.port}"
    elif record.state == "starting" and record.job_id:
        words = f"RUNNING {record.node}"
    elif record.progress:
        words += f" {record.progress}"
    if record.failure is not None and record.state == "failed":
        words += f" {record.failure.kind}: {record.failure.line}"
    elif record.failure is not None:
        words += f" (before: {record.failure.line})"
    elif record.message:
        words += f" ({record.message})"
    if record.restarts:
        words += f" [{record.restarts} restart{'s' if record.restarts > 1 else ''}]"
    return words


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
        backends = _as_mapping(gauges.get("backends"))
        uses, started = [], {}
        for record in records:
            in_flight = _as_mapping(backends.get(record.replica)).get("in_flight")
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
        """Write what is left. Nothing is taken or sampled any more; if it may be, nothing more is taken here."""
        self._analyst.stop()
        if takes_rest:
            self._tracker.relay_restarted()  # turns that are still open end with it
            self.take()
            self._write_figures()
        if self._history is not None:
            self._history.close()


def append_line(path: Path, line: str) -> None:
    """Add a line to a log; neither a full disk nor half a surrogate pair stops the service."""
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
        log.write(line + "\n")


class StatsMaker:
    """Makes the /stats document and has it sent: every second while somebody reads it, else when one is asked for."""

    def __init__(
        self, tracker: Tracker, books: Bookkeeper, strategy: str, send: Callable[[bytes, bytes], None]
    ) -> None:
        """``send`` takes a frame's kind and its payload."""
        self._tracker, self._books, self._strategy, self._send = tracker, books, strategy, send
        self._document: Mapping[str, Any] = {}
        self._due = 0.0  # until then the document is new enough
        self._watched_until = 0.0
        self._reads = 0  # as the relay counts them

    def note_reads(self, reads: int) -> None:
        """How often /stats was read, at the relay's count, which begins anew with each relay."""
        if reads > self._reads:
            self._watched_until = time.monotonic() + WATCHED_S
        self._reads = reads

    def relay_replaced(self) -> None:
        """The next relay has no document yet."""
        self._due = 0.0

    def look(self, records: Sequence[Mapping[str, Any]], table: Sequence[Backend]) -> None:
        """Once a second; ``records`` and ``table`` as Tracker.replicas takes them."""
        if is_watched := time.monotonic() < self._watched_until:
            self._make(records, table)
        replicas = self._document["backends"] if is_watched else self._tracker.replicas(records, table)
        self._books.analyse(replicas, is_watched)

    def fresh(self, records: Sequence[Mapping[str, Any]], table: Sequence[Backend]) -> Mapping[str, Any]:
        """The document, which the relay has then: no older than a second."""
        if time.monotonic() >= self._due:
            self._make(records, table)
        return self._document

    def _make(self, records: Sequence[Mapping[str, Any]], table: Sequence[Backend]) -> None:
        snapshot = self._tracker.snapshot(records, table, self._strategy)
        self._document = {**snapshot, **self._books.document()}
        self._due = time.monotonic() + SNAPSHOT_INTERVAL_S
        self._send(FRAME_STATS, encode_stats(self._document))


class ControllerLog:
    """The controller's lines in the proxy's log, which it shares with the relay."""

    def __init__(self, path: Path, form: str) -> None:
        """``form`` is text or json."""
        self._path, self._form = path, form
        self._told: dict[str, str] = {}  # replica → what was said of it last

    def say(self, message: str, level: str = "info") -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        line = f"{at} {level} controller: {message}"
        if self._form == "json":
            line = json.dumps({"at": at, "level": level, "role": "controller", "message": message})
        append_line(self._path, line)

    def note_changes(self, records: Sequence[ReplicaRecord]) -> None:
        """Say which replicas changed, and to what."""
        told = {record.replica: describe_replica(record) for record in records}
        for replica, words in told.items():
            if self._told.get(replica) != words:
                self.say(f"{replica} is {words}")
        for replica in self._told.keys() - told.keys():
            self.say(f"{replica} is gone")
        self._told = told


class Controller:
    """The control plane of one deployment: keeps relay, replica table and tracker in step, in one thread of its own."""

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
    ) -> None:
        """``look`` finds the replicas, ``tunnels`` lead to them; ``keys`` are the clients' key and the replicas'."""
        self._config, self._paths, self.tunnels = config, paths, tunnels
        client_key, self._replica_key = keys
        self._settings = {
            "proxy": {**dataclasses.asdict(config.proxy), "api_key": client_key},
            "headers": dataclasses.asdict(config.headers),
            "log_format": log_format,
            "drain_seconds": DRAIN_S,
        }
        self._journal = ControllerLog(paths.log("proxy"), log_format)
        self._log = self._journal.say
        warn = functools.partial(self._log, level="warning")
        self.discovery = Discovery(look, max(pause_s, DISCOVERY_INTERVAL_S), warn)
        self.relay = RelayLink(paths, config.proxy.host, config.proxy.port)
        self._tracker = Tracker(time.time)
        self._books = Bookkeeper(config, paths, self._tracker, self._log)
        self._stats = StatsMaker(self._tracker, self._books, config.proxy.strategy, self.relay.send)
        self.expected: frozenset[str] = frozenset()  # models about to be started; replaced as a whole
        self._drained: frozenset[str] = frozenset()
        self._known: dict[str, tuple[str | None, str]] = {}  # replica → its job and process
        self._looked: Sequence[ReplicaRecord] | None = None  # discovery's records that the relay was told of
        self._records: Sequence[ReplicaRecord] = ()  # the same, with this side's ends of the tunnels
        self._seen: tuple[Any, ...] = (None, None, None)  # what _sent_table was made of
        self._sent_table: Any = None
        self._stop = threading.Event()
        self._ending = threading.Event()  # set by the thread that drains: a relay that ends now is meant to
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._heard_at = 0.0
        self.failure: BaseException | None = None

    @property
    def url(self) -> str:
        """The proxy's address as a client on this machine types it."""
        return proxy_url(self._config.proxy.host, self.relay.port)

    def start(self) -> None:
        """Take over or start the relay, then keep everything in step in a thread until stop()."""
        self.relay.open()
        self._books.open()
        self.discovery.start()
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def refresh(self, deadline_s: float = 5.0) -> None:
        """Look at the replicas now, and return once the relay was told what is to be seen."""
        self.discovery.look()
        deadline = time.monotonic() + deadline_s
        while self._looked is not self.discovery.records and self.is_running and time.monotonic() < deadline:
            time.sleep(0.01)

    def stop(self, grace_s: float = DRAIN_S) -> None:
        """Let turns in flight end (``grace_s`` at most), end the relay and the threads. Safe to call again."""
        if self._thread.is_alive() and grace_s > 0:
            self._ending.set()
            self.relay.terminate()
            # Longer than the relay's own patience: at its end it still tells the clients of the turns that it cuts.
            self._thread.join(timeout=grace_s + RELAY_END_S)
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=STOP_S)
        if is_stuck := self._thread.is_alive():
            self._ending.set()
            self.relay.close()  # it ends what the thread may be waiting for, and the thread by that
            self._thread.join(timeout=STOP_S)
            if is_stuck := self._thread.is_alive():
                lost = "the history lacks the turns and the replica time that it has not handed on"
                self._log(f"the controller's thread still works and is left behind; {lost}", "warning")
        self.discovery.stop()
        self._books.close(takes_rest=not is_stuck)
        self.relay.close()
        if self.tunnels is not None:
            self.tunnels.close()

    def _run(self) -> None:
        """The thread: never ends by an error of the relay, which is replaced, only by stop()."""
        try:
            sample_due = 0.0
            self._heard_at = time.monotonic()
            while not self._stop.is_set():
                try:
                    self._exchange(max(0.0, min(0.25, sample_due - time.monotonic())))
                    if time.monotonic() >= sample_due:
                        sample_due = time.monotonic() + SNAPSHOT_INTERVAL_S
                        self._stats.look(*self._replicas())
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
        """Send the table if it changed, take in what the relay says."""
        looked = self.discovery.records
        records = self.tunnels.follow(looked) if self.tunnels is not None else looked
        if self._looked is not looked or records != self._records:
            self._records = records
            self._forget_drained(records)
        awaited = self.tunnels.awaited() if self.tunnels is not None else None
        seen = (self._records, self._drained, self.expected | awaited if awaited else self.expected)
        if self._sent_table is None or any(new is not old for new, old in zip(seen, self._seen, strict=True)):
            models = [model.name for model in self._config.models]
            table = replica_table(models, seen[0], self._replica_key, *seen[1:])
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
            raise RelayGoneError(f"the relay (pid {self.relay.pid}) said nothing for {RELAY_SILENCE_S:g} s")

    def _hear(self, frames: Iterable[tuple[bytes, bytes]]) -> None:
        """Take in what the relay says."""
        for kind, payload in frames:
            self._heard_at = time.monotonic()
            try:
                self._take(kind, payload)
            except RelayGoneError:
                raise
            except Exception as error:  # noqa: BLE001  a bug, or a package that is missing, must not end the controller
                self._log(f"a frame {kind!r} of the relay cannot be taken, and is left out: {error!r}")

    def _forget_drained(self, records: Sequence[ReplicaRecord]) -> None:
        """A replica that is gone, or was started anew under its name, is drained no longer."""
        known = {record.replica: (record.job_id, record.process) for record in records}
        self._drained = frozenset(name for name in self._drained & known.keys() if known[name] == self._known.get(name))
        self._known = known

    def _take(self, kind: bytes, payload: bytes) -> None:
        """One frame of the relay."""
        if kind == FRAME_EVENTS:
            self._books.observe(*decode_events(payload))
        elif kind == FRAME_GAUGES:
            gauges = json.loads(payload)
            self._tracker.sample(gauges)
            self._books.sample(self._records, gauges)
            self._stats.note_reads(gauges.get("stats_read", 0))
        elif kind == FRAME_REQUEST:
            self._do(json.loads(payload))

    def _do(self, request: Mapping[str, Any]) -> None:
        """What somebody asked for over HTTP."""
        if request["op"] in ("stats", "metrics"):
            stats = self._stats.fresh(*self._replicas())
            body = self._books.metrics(stats).decode() if request["op"] == "metrics" else ""
            self._answer(request, 200, METRICS_TYPE, body)
            return
        if request["op"] == "session":
            document = self._tracker.session(request["session"])
            error = "there is no session of this name, or it was forgotten; /stats lists those that are known"
            body = json.dumps(document) if document else error_document(404, error, None, False).decode()
            self._answer(request, 200 if document else 404, "application/json", body)
            return
        backend = {request["backend"]}
        self._drained = self._drained | backend if request["op"] == "drain" else self._drained - backend

    def _answer(self, request: Mapping[str, Any], status: int, content_type: str, body: str) -> None:
        answer = {"id": request["id"], "status": status, "type": content_type, "body": body}
        self.relay.send(FRAME_ANSWER, json.dumps(answer).encode())

    def _replace_relay(self, why: RelayGoneError) -> None:
        """Speak to the relay anew if it still answers, since it serves; else start another, at once.

        One that cannot be started is tried again, at a bounded rate, until stop().
        """
        self._sent_table = None
        self._stats.relay_replaced()
        if self.relay.reconnect():
            self._log(f"{why}; connected to it again")
        else:
            self._log(f"{why}; starting another")
            self._tracker.relay_restarted()
            try:
                self.relay.spawn()
            except (RelayGoneError, OSError, ValueError) as error:
                # OSError: no process or no descriptor is to be had now. ValueError: close() came in between.
                self._log(str(error))
                self._stop.wait(RELAY_RETRY_S)
        self._heard_at = time.monotonic()

    def _replicas(self) -> tuple[list[dict[str, Any]], list[Backend]]:
        """As the tracker takes them."""
        tunnels = self.tunnels.rows() if self.tunnels is not None else {}
        records = [{**dataclasses.asdict(record), "tunnel": tunnels.get(record.replica)} for record in self._records]
        return records, [Backend(**row) for row in self._sent_table["backends"]]
