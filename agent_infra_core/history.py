"""History: what outlives the controller, in one SQLite file, and what it becomes: export, report; and GET
/metrics. Knows the tracker's records and plain figures; nothing of replicas' life or of the relay."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import operator
import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from agent_infra_core import __version__
from agent_infra_core.errors import RefusedError
from agent_infra_core.tracking import HISTORY_POINTS, LISTED_REPLICAS, Histogram, TurnRecord, _as_mapping
from agent_infra_core.wire import is_count

HISTORY_BYTES = 1 << 30  # of the file; beyond, the oldest turns go
HISTORY_INTERVAL_S = 1.0  # between two batches, so what a kill -9 loses at most; five times as long after a failure
HISTORY_BACKLOG_BYTES = 32 << 20  # of turns that wait while the file cannot be written; beyond, the oldest is lost
HISTORY_BACKLOG_ROWS = 20_000  # of each of the small tables that wait likewise
HISTORY_BUSY_S = 2.0  # that a write waits for another program's lock
HISTORY_CLOSE_S = 10.0  # that the last batch has, at the end
HISTORY_RETRY_S = 0.1  # between two tries to write it
HISTORY_CHUNK = 1000  # turns that one query reads: a reader must not hold a lock for long, nor the file in memory
RESTORED_TURNS = 50_000  # that a new controller reads again, of the last RESTORED_S: about a second's work
RESTORED_S = 6 * 3600.0
VERDICT_INTERVAL_S = 60.0
MAX_VERDICTS = 100_000  # kept, one a minute and model: two months of one model
REPLICA_TIME_STEP_S = 300  # by which replica time is summed; of days gone by for a week, by the day
REPLICA_TIME_FINE_S = 8 * 86400
NEW_REPLICA_S = 5.0  # that a replica gets which the last sample had not, and which does not say when it started
FIGURES_WRITE_S = 10.0  # between two writings of replica time and of what throughput.history shows
REPLICA_STATES_HELD = ("pending", "loading", "ready_busy", "ready_idle")
_HISTORY_MARK = 0x41494E46  # PRAGMA application_id: by which a file is known for one of ours

# The steps from each version of the schema (PRAGMA user_version) to the next. One that was released never changes.
_MIGRATIONS = (
    """
    CREATE TABLE turns (id INTEGER PRIMARY KEY, turn TEXT NOT NULL UNIQUE, finished_at REAL NOT NULL,
        outcome TEXT NOT NULL, status INTEGER NOT NULL, session TEXT, task TEXT, client TEXT, model TEXT, path TEXT,
        stream INTEGER, backend TEXT, started_at REAL, retries INTEGER NOT NULL, think_ms REAL, pre_ms REAL,
        queue_ms REAL, ttft_ms REAL, inference_ms REAL, post_ms REAL, unaccounted_ms REAL, prompt_tokens INTEGER,
        completion_tokens INTEGER, cached_tokens INTEGER, expected_cached_tokens INTEGER, cache_miss TEXT,
        tokens_estimated INTEGER NOT NULL, finish_reason TEXT, error TEXT, prompt TEXT NOT NULL, answer TEXT NOT NULL);
    CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
    INSERT INTO about VALUES ('since', CAST(strftime('%s', 'now') AS REAL))
    """,
    """
    CREATE TABLE replica_time (replica TEXT, model TEXT, gpu_type TEXT, gpus INTEGER, state TEXT, at INTEGER,
        seconds REAL NOT NULL, PRIMARY KEY (replica, model, gpu_type, gpus, state, at)) WITHOUT ROWID;
    CREATE TABLE verdicts (id INTEGER PRIMARY KEY, at REAL NOT NULL, model TEXT NOT NULL, gpu TEXT, verdict TEXT,
        confidence REAL, sentence TEXT, flags TEXT, agents REAL, turns_per_hour REAL, suggested_agents REAL)
    """,
    "ALTER TABLE turns ADD COLUMN key TEXT",
    "CREATE TABLE points (at REAL PRIMARY KEY, figures TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE ended (session TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
)
TURN_COLUMNS = tuple(item.name for item in dataclasses.fields(TurnRecord))
_TRUTHS = tuple(TURN_COLUMNS.index(name) for name in ("stream", "tokens_estimated"))  # columns that SQLite has as 0, 1
_turn_values = operator.attrgetter(*TURN_COLUMNS)

# File systems of one machine, where SQLite's write-ahead log, which needs shared memory, is safe. Any other is taken
# for a network's (nfs, lustre, gpfs, beegfs, cifs, fuse, …), where only the rollback journal is.
_LOCAL_FILE_SYSTEMS = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs", "bcachefs", "jfs", "nilfs2")
)


def history_path(setting: str | None, default: Path) -> Path | None:
    """The file that ``proxy.history`` means; None when it is off."""
    if setting == "off":
        return None
    return default if setting is None else Path(setting).expanduser().absolute()


def is_local(path: Path, mounts: str) -> bool:
    """Whether a file lies on a disk of this machine, by the text of /proc/self/mountinfo; False when in doubt."""
    kinds: dict[str, str] = {}
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) > 4 and after:
            # Blanks and the like stand as octal numbers; of two mounts on one place the later one is seen.
            place = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
            kinds[place] = after.split()[0]
    for folder in (path, *path.parents):
        if str(folder) in kinds:
            return kinds[str(folder)] in _LOCAL_FILE_SYSTEMS
    return False


class HistoryRefusedError(RefusedError):
    """A file is not to be touched: it is of a newer version, or no history at all."""


class ReplicaView(Protocol):
    """What accounting asks of a replica: its record."""

    @property
    def replica(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def gpus(self) -> Sequence[Any]: ...  # each with a name
    @property
    def gpu_ids(self) -> Sequence[str]: ...


class ReplicaUse(NamedTuple):
    """What a replica holds, and in which of REPLICA_STATES_HELD."""

    replica: str
    model: str
    gpu_type: str  # "" where there is no GPU, or none that tells
    gpus: int
    state: str


def replica_use(record: ReplicaView, in_flight: Any, asked_gpus: int = 0) -> ReplicaUse | None:
    """What a replica holds now; None for one that has ended. Without a word on its turns it is idle.

    ``asked_gpus`` are those that its job asked for, which a record tells only once it runs, and of one node alone.
    """
    phase = {"pending": "pending", "starting": "loading", "loading": "loading"}.get(record.state)
    if phase is None and record.state not in ("ready", "draining"):
        return None
    phase = phase or ("ready_busy" if is_count(in_flight) and in_flight > 0 else "ready_idle")
    gpu_type = str(record.gpus[0].name) if record.gpus else ""
    gpus = max(len(record.gpus), len(record.gpu_ids), asked_gpus)
    return ReplicaUse(record.replica, record.model, gpu_type, gpus, phase)


class ReplicaTime:
    """How long each replica was in which state: all of it, and what was not taken yet, in steps of time.

    Only the time that is sampled counts: a deployment without a controller is not seen.
    """

    def __init__(self, clock: Callable[[], float], steady_clock: Callable[[], float]) -> None:
        self._clock, self._steady_clock = clock, steady_clock
        self.since = clock()
        self._sums: dict[ReplicaUse, float] = {}
        self._untaken: dict[tuple[ReplicaUse, int], float] = {}
        self._sampled_at = steady_clock()
        self._present: frozenset[str] = frozenset()  # replicas of the last sample

    def sample(self, uses: Collection[ReplicaUse], started: Mapping[str, float]) -> None:
        """The replicas were like this since the last sample, or since they ``started``; 0 where that is not known."""
        now, steady_now = self._clock(), self._steady_clock()
        passed, self._sampled_at = steady_now - self._sampled_at, steady_now
        step = int(now // REPLICA_TIME_STEP_S) * REPLICA_TIME_STEP_S
        known, self._present = self._present, frozenset(use.replica for use in uses)
        for use in uses:
            seconds = passed  # many, where no gauges came for a while
            if use.replica not in known:
                at = started.get(use.replica)
                seconds = min(passed, max(0.0, now - at) if at else NEW_REPLICA_S)
            self._sums[use] = self._sums.get(use, 0.0) + seconds
            self._untaken[use, step] = self._untaken.get((use, step), 0.0) + seconds

    def take(self) -> dict[tuple[ReplicaUse, int], float]:
        """Seconds by use and step of time, since the last call."""
        taken, self._untaken = self._untaken, {}
        return taken

    def restore(self, sums: Mapping[ReplicaUse, float], since: float) -> None:
        """Go on where an earlier controller was."""
        self._sums.update(sums)
        self.since = since

    def document(self) -> dict[str, Any]:
        """``accounting`` of /stats: hours by state, of GPUs and of replicas, in all, by model and by replica."""
        return {
            "since": self.since,
            **_hours_row(self._sums),
            "by_model": [{"model": name, **_hours_row(sums)} for name, sums in _grouped(self._sums, "model").items()],
            "by_replica": [
                {"replica": name, "model": next(iter(sums)).model, **_hours_row(sums)}
                for name, sums in _grouped(self._sums, "replica").items()
                if name in self._present
            ][:LISTED_REPLICAS],
        }

    def seconds(self) -> Mapping[ReplicaUse, float]:
        """All of it."""
        return self._sums


def _hours_row(sums: Mapping[ReplicaUse, float]) -> dict[str, Any]:
    return {"gpu_hours": _hours(sums, of_gpus=True), "replica_hours": _hours(sums, of_gpus=False)}


def _grouped(sums: Mapping[ReplicaUse, float], by: str) -> dict[str, dict[ReplicaUse, float]]:
    groups: dict[str, dict[ReplicaUse, float]] = {}
    for use, seconds in sums.items():
        groups.setdefault(getattr(use, by), {})[use] = seconds
    return groups


def _hours(sums: Mapping[ReplicaUse, float], of_gpus: bool) -> dict[str, float]:
    """Hours by state: of GPUs, or of replicas whether they have one or not."""
    hours = dict.fromkeys(REPLICA_STATES_HELD, 0.0)
    for use, seconds in sums.items():
        hours[use.state] += seconds * (use.gpus if of_gpus else 1) / 3600
    return {state: round(value, 4) for state, value in hours.items()}


@dataclass
class HistoryBatch:
    """What waits to be written, all of it in one transaction."""

    turns: deque[TurnRecord] = field(default_factory=deque)
    posts: dict[str, float] = field(default_factory=dict)  # turn → post_ms, of turns that were written before
    totals: dict[str, int] = field(default_factory=dict)  # what is to be added
    replica_time: dict[tuple[ReplicaUse, int], float] = field(default_factory=dict)  # (use, step) → seconds to be added
    verdicts: list[tuple[Any, ...]] = field(default_factory=list)  # rows of VERDICT_COLUMNS
    points: list[dict[str, Any]] = field(default_factory=list)  # of throughput.history in /stats; the latest are kept
    ended: dict[str, float] = field(default_factory=dict)  # session → when its agent said that it is over
    text_bytes: int = 0  # of the turns, about

    def add(self, later: HistoryBatch) -> collections.Counter[str]:
        """Add what came later, up to HISTORY_BACKLOG_BYTES and _ROWS; of what, the oldest, how many were dropped."""
        self.turns += later.turns
        self.text_bytes += later.text_bytes
        self.posts.update(later.posts)
        for name, value in later.totals.items():
            self.totals[name] = self.totals.get(name, 0) + value
        for key, seconds in later.replica_time.items():
            self.replica_time[key] = self.replica_time.get(key, 0.0) + seconds
        self.verdicts = (self.verdicts + later.verdicts)[-MAX_VERDICTS:]
        self.points = (self.points + later.points)[-HISTORY_POINTS:]
        self.ended.update(later.ended)
        dropped: collections.Counter[str] = collections.Counter()
        while self.text_bytes > HISTORY_BACKLOG_BYTES:
            oldest = self.turns.popleft()
            self.text_bytes -= _record_bytes(oldest)
            self.posts.pop(oldest.turn, None)
            dropped["turns"] += 1
        kept: Mapping[str, dict[Any, float]] = {
            "action times": self.posts,
            "ends of sessions": self.ended,
            "spans of replica time": self.replica_time,
        }
        for name, rows in kept.items():
            for first in list(itertools.islice(rows, max(0, len(rows) - HISTORY_BACKLOG_ROWS))):
                del rows[first]
                dropped[name] += 1
        return dropped

    def __bool__(self) -> bool:
        details = self.posts or self.replica_time or self.verdicts or self.points or self.ended
        return bool(self.turns or details or any(self.totals.values()))


def _record_bytes(record: TurnRecord) -> int:
    """About what a record takes in memory."""
    return 1000 + len(record.prompt) + len(record.answer)


VERDICT_COLUMNS = (
    *("at", "model", "gpu", "verdict", "confidence", "sentence", "flags"),
    *("agents", "turns_per_hour", "suggested_agents"),
)


def verdict_row(entry: Mapping[str, Any], at: float) -> tuple[Any, ...]:
    """VERDICT_COLUMNS of one entry of /stats's ``analysis``."""
    verdict, operating = entry["verdict"], entry["operating"]
    return (
        *(at, entry["model"], entry["gpu"], verdict["name"], verdict["confidence"], verdict["sentence"]),
        ", ".join(flag["name"] for flag in entry["flags"]),
        *(operating["agents"]["value"], operating["turns_per_hour"]["value"], entry["suggestion"]["agents"]["value"]),
    )


_INSERT_TURN = (
    f"INSERT INTO turns ({', '.join(TURN_COLUMNS)}) VALUES ({', '.join('?' * len(TURN_COLUMNS))}) "
    "ON CONFLICT (turn) DO NOTHING"
)
_INSERT_VERDICT = (
    f"INSERT INTO verdicts ({', '.join(VERDICT_COLUMNS)}) VALUES ({', '.join('?' * len(VERDICT_COLUMNS))})"
)
_ADD_TOTAL = "INSERT INTO totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
_SUM_UP = "ON CONFLICT (replica, model, gpu_type, gpus, state, at) DO UPDATE SET seconds = seconds + excluded.seconds"
_ADD_REPLICA_TIME = (
    "INSERT INTO replica_time (replica, model, gpu_type, gpus, state, at, seconds) VALUES (?, ?, ?, ?, ?, ?, ?) "
    + _SUM_UP
)


def share_of_day(since: float, begun: float) -> float:
    """How much of a day's replica time is of ``since`` and later, where nothing was sampled before ``begun``."""
    end = since // 86400 * 86400 + 86400
    return (end - since) / (end - max(end - 86400, min(begun, since)))


class HistoryFile:
    """One connection to a history file, made and brought up to date where it is opened to be written.

    Of one thread at a time.  All methods raise sqlite3.Error and OSError as they come, HistoryRefusedError for a file
    that is not to be touched.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        import sqlite3

        self._path = path
        self.refused: list[str] = []  # what SQLite said of each row that write() left out, the last time
        if not read_only and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # By hand, for its mode. Never where it exists: to close a file drops this process's locks on it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}",
            uri=True,
            timeout=HISTORY_BUSY_S,
            isolation_level=None,
            check_same_thread=False,  # opened by the controller, to restore; then the writer's
        )
        try:
            self._check()
            if not read_only:
                self._prepare()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        version, mark = self._value("PRAGMA user_version"), self._value("PRAGMA application_id")
        if mark != _HISTORY_MARK and (version or self._value("SELECT count(*) FROM sqlite_master")):
            raise HistoryRefusedError(f"{self._path} is no history of Agent Infra; set proxy.history to another path")
        if version > len(_MIGRATIONS):
            raise HistoryRefusedError(
                f"{self._path} is of a newer version (schema {version}, this program knows {len(_MIGRATIONS)}); "
                "take that version of the program, or set proxy.history to another path"
            )

    def _prepare(self) -> None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            mounts = ""
        local = is_local(self._path.resolve(), mounts)
        self._value(f"PRAGMA journal_mode = {'wal' if local else 'truncate'}")
        # A log that is not flushed at each batch survives any end of a process; only a power cut may cost batches.
        self._value(f"PRAGMA synchronous = {'normal' if local else 'full'}")
        if self._value("PRAGMA user_version") < len(_MIGRATIONS):
            self._migrate()

    def _migrate(self) -> None:
        with self._transaction():  # in which the version is read again: another program may have been quicker
            for step in _MIGRATIONS[self._value("PRAGMA user_version") :]:
                for statement in step.split(";"):
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
            self._connection.execute(f"PRAGMA application_id = {_HISTORY_MARK}")

    def is_current(self) -> bool:
        """Whether it is of this version; one that is read only may be older."""
        return bool(self._value("PRAGMA user_version") == len(_MIGRATIONS))

    def close(self) -> None:
        self._connection.close()

    def write(self, batch: HistoryBatch) -> int:
        """Write all of it, or nothing; how many turns are new. One that is there already stays as it is.

        Rows that SQLite cannot hold are left out, or they would keep out all others for ever; see ``refused``.
        """
        self.refused.clear()
        with self._transaction():
            added = self._put(_INSERT_TURN, list(map(_turn_values, batch.turns)))
            posts = [(post_ms, turn) for turn, post_ms in batch.posts.items()]
            self._put("UPDATE turns SET post_ms = ? WHERE turn = ?", posts)
            self._put(_ADD_TOTAL, [(name, value) for name, value in batch.totals.items() if value])
            self._put(_ADD_REPLICA_TIME, [(*use, at, seconds) for (use, at), seconds in batch.replica_time.items()])
            self._put(_INSERT_VERDICT, batch.verdicts)
            points = [(point["at"], json.dumps(point)) for point in batch.points]
            self._put("INSERT OR REPLACE INTO points VALUES (?, ?)", points)
            self._put("INSERT OR REPLACE INTO ended VALUES (?, ?)", list(batch.ended.items()))
        return added

    def _put(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """Write rows, one by one where SQLite cannot hold one of them; how many rows of the file it changed."""
        import sqlite3

        # A number of more than 64 bits, half a surrogate pair, nothing where something must be, a text of a gigabyte.
        unwritable = (OverflowError, UnicodeEncodeError, sqlite3.IntegrityError, sqlite3.DataError)
        if not rows:
            return 0
        self._connection.execute("SAVEPOINT all_at_once")
        try:
            changed = self._connection.executemany(statement, rows).rowcount
        except unwritable:
            self._connection.execute("ROLLBACK TO all_at_once")
            changed = 0
            for row in rows:
                try:
                    changed += self._connection.execute(statement, row).rowcount
                except unwritable as error:
                    self.refused.append(str(error))
        self._connection.execute("RELEASE all_at_once")
        return changed

    def trim(self, max_bytes: int, turns: int) -> int:
        """Where the file is larger than ``max_bytes``, remove the oldest ``turns``; how many went."""
        pages = self._value("PRAGMA page_count") - self._value("PRAGMA freelist_count")
        if pages * self._value("PRAGMA page_size") <= max_bytes:
            return 0
        last = "SELECT max(id) FROM (SELECT id FROM turns ORDER BY id LIMIT ?)"
        return self._connection.execute(f"DELETE FROM turns WHERE id <= ({last})", (turns,)).rowcount

    def tidy(self, now: float) -> None:
        """Keep the small tables small."""
        with self._transaction():
            oldest = (self._value("SELECT max(id) FROM verdicts") or 0) - MAX_VERDICTS
            self._connection.execute("DELETE FROM verdicts WHERE id <= ?", (oldest,))
            latest = "SELECT at FROM points ORDER BY at DESC LIMIT ?"
            self._connection.execute(f"DELETE FROM points WHERE at NOT IN ({latest})", (HISTORY_POINTS,))
            self._connection.execute("DELETE FROM ended WHERE at < ?", (now - RESTORED_S,))
            self._sum_up_days(int((now - REPLICA_TIME_FINE_S) // 86400) * 86400)

    def _sum_up_days(self, before: int) -> None:
        """Put the replica time of days gone by into one row a day."""
        self._connection.execute(
            "INSERT INTO replica_time (replica, model, gpu_type, gpus, state, at, seconds) "
            "SELECT replica, model, gpu_type, gpus, state, at - at % 86400, sum(seconds) FROM replica_time "
            "WHERE at < ? AND at % 86400 != 0 GROUP BY 1, 2, 3, 4, 5, 6 " + _SUM_UP,
            (before,),
        )
        self._connection.execute("DELETE FROM replica_time WHERE at < ? AND at % 86400 != 0", (before,))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # some errors have rolled back already
                self._connection.execute("ROLLBACK")
            raise

    def _value(self, query: str, *values: Any) -> Any:
        row = self._connection.execute(query, values).fetchone()
        return row[0] if row else None

    def query(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query that has few."""
        return self._connection.execute(query, values).fetchall()

    def since(self) -> float:
        """When the file was begun."""
        return float(self._value("SELECT value FROM about WHERE name = 'since'"))

    def totals(self) -> dict[str, int]:
        """The deployment's totals by name, also of turns that were removed since."""
        return dict(self.query("SELECT name, value FROM totals"))

    def points(self) -> list[dict[str, Any]]:
        """The latest points of ``throughput.history`` in /stats, oldest first."""
        rows = self.query("SELECT figures FROM points ORDER BY at DESC LIMIT ?", HISTORY_POINTS)
        return [json.loads(figures) for (figures,) in reversed(rows)]

    def ended_sessions(self) -> dict[str, float]:
        """Session → when its agent said that it is over, of the last RESTORED_S and perhaps longer."""
        return dict(self.query("SELECT session, at FROM ended ORDER BY at"))

    def count_turns(self) -> int:
        return int(self._value("SELECT count(*) FROM turns"))

    def replica_seconds(self, since: float = 0.0) -> dict[ReplicaUse, float]:
        """Replica time, from the step of time that holds ``since``; of a day that was summed up, in proportion."""
        day = int(since // 86400) * 86400
        if self._value("SELECT 1 FROM replica_time WHERE at > ? AND at < ?", day, day + 86400):
            day = -1  # it has its steps
        share = share_of_day(since, self.since())
        rows = self.query(
            "SELECT replica, model, gpu_type, gpus, state, sum(seconds * CASE at WHEN ? THEN ? ELSE 1 END) "
            "FROM replica_time WHERE at > ? OR at = ? GROUP BY 1, 2, 3, 4, 5 ORDER BY min(at)",
            *(day, share, since - REPLICA_TIME_STEP_S, day),
        )
        return {ReplicaUse(*row[:5]): row[5] for row in rows}

    def latest_turns(self, limit: int, since: float) -> Iterator[TurnRecord]:
        """The ``limit`` turns that were written last, of those that finished after ``since``, oldest first."""
        newest = self._value("SELECT max(id) FROM turns") or 0
        return self.turns(since=since, after=newest - limit)

    def turns(self, session: str | None = None, since: float = 0.0, after: int = 0) -> Iterator[TurnRecord]:
        """Turns as they were written, row by row; no lock is held between two chunks of them."""
        where = "id > ? AND finished_at >= ?" + (" AND session = ?" if session is not None else "")
        query = f"SELECT id, {', '.join(TURN_COLUMNS)} FROM turns WHERE {where} ORDER BY id LIMIT {HISTORY_CHUNK}"
        values = [since] if session is None else [since, session]
        while rows := self.query(query, after, *values):
            for number, *row in rows:
                for column in _TRUTHS:
                    row[column] = None if row[column] is None else bool(row[column])
                after = number
                yield TurnRecord(*row)


class History:
    """Keeps a deployment's history in a file that a thread of its own writes, so that nobody waits for a disk.

    What cannot be written waits in memory, up to HISTORY_BACKLOG_BYTES; the log is told when that begins and ends.
    """

    def __init__(
        self,
        path: Path,
        log: Callable[[str, str], None],
        clock: Callable[[], float],
        *,
        interval_s: float = HISTORY_INTERVAL_S,
        max_bytes: int = HISTORY_BYTES,
    ) -> None:
        """``log`` takes a message and its level."""
        self.path = path
        self._log, self._clock = log, clock
        self._interval_s, self._max_bytes = interval_s, max_bytes
        self._lock = threading.Lock()  # of _pending and _lost
        self._pending = HistoryBatch()
        self._lost: collections.Counter[str] = collections.Counter()  # what had no room, since it was last written
        self._file: HistoryFile | None = None
        self._opened_as: list[tuple[Path, tuple[int, int]]] = []  # what it and its journals were, when it was opened
        self._turns: int | None = None  # in the file; None: not known
        self._tidied_on = 0.0
        self._problem: str | None = None
        self._may_pass = False  # the problem, by the next try
        self._stop = threading.Event()
        self._close_by = math.inf  # by time.monotonic(); from close() on
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def open(self, restore: Callable[[HistoryFile], None]) -> None:
        """Let ``restore`` read what an earlier controller wrote, then write in a thread, until close()."""
        try:
            restore(self._opened())
        except Exception as error:  # noqa: BLE001  whatever it is: it is served without history rather than not at all
            self._fail(error, "starting without what was before: ")
        self._thread.start()

    def add(self, batch: HistoryBatch) -> None:
        """Have it written with the next batch."""
        batch.text_bytes = sum(map(_record_bytes, batch.turns))
        with self._lock:
            self._lost += self._pending.add(batch)

    def document(self) -> dict[str, Any]:
        """``history`` of /stats."""
        state = "on" if self._problem is None else "failing"
        return {"path": str(self.path), "state": state, "reason": self._problem, "turns": self._turns}

    def close(self) -> None:
        """Write the last batch, as far as it can be within HISTORY_CLOSE_S."""
        self._close_by = time.monotonic() + HISTORY_CLOSE_S
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=HISTORY_CLOSE_S)
        with self._lock:
            left = self._lost + collections.Counter(turns=len(self._pending.turns))
        if self._thread.is_alive():
            self._log(f"the history {self.path} may lack its last turns: the disk is too slow", "warning")
        elif left:
            self._log(f"the history lacks {_amounts(left)}: {self._problem or 'the disk is too slow'}", "warning")

    def _run(self) -> None:
        """The thread. No error ends it: what fails is tried again."""
        while not self._stop.wait(self._interval_s * (1 if self._problem is None else 5)):
            self._flush()
        self._flush()
        # Another program's lock may outlast one try. None is begun that may go on when nobody waits for it any more.
        while self._pending and self._may_pass and time.monotonic() + 1.5 * HISTORY_BUSY_S < self._close_by:
            time.sleep(HISTORY_RETRY_S)
            self._flush()
        self._let_go()

    def _opened(self) -> HistoryFile:
        if self._file is None:
            self._file = HistoryFile(self.path)
            self._opened_as = list(_files_of(self.path.resolve()))
            self._turns = self._file.count_turns()
        elif self._is_elsewhere():
            raise FileNotFoundError("it was removed, or another file put in its place; it is opened anew")
        return self._file

    def _is_elsewhere(self) -> bool:
        """Whether the path leads to another file than the one that is open, or to none: SQLite would not notice."""
        return _identity(self.path) not in dict(self._opened_as).values()

    def _let_go(self) -> None:
        """Close the file. The journals of one that left its place go: they would be taken for its successor's."""
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(Exception):
            (path, opened), *journals = self._opened_as
            if _identity(path) != opened:
                with contextlib.suppress(Exception):
                    file.query("PRAGMA wal_checkpoint(TRUNCATE)")  # it may have been moved, and be read where it is now
                for journal, identity in journals:
                    if _identity(journal) == identity:  # else it came with the other file
                        journal.unlink()
        with contextlib.suppress(Exception):
            file.close()

    def _flush(self) -> None:
        with self._lock:
            batch, self._pending = self._pending, HistoryBatch()
        if not batch and self._problem is None:
            return
        try:
            file = self._opened()
            added = file.write(batch)
        except Exception as error:  # noqa: BLE001  see _run
            with self._lock:
                batch_and_later = batch
                self._lost += batch_and_later.add(self._pending)
                self._pending = batch_and_later
            self._fail(error)
            return
        self._turns = (self._turns or 0) + added
        if file.refused:
            said = f"{len(file.refused)} rows cannot be kept and are left out; of the first: {file.refused[0]}"
            self._log(f"history: {said}", "warning")
        self._recover()
        try:
            self._turns -= file.trim(self._max_bytes, max(1000, 2 * len(batch.turns)))
            if self._clock() - self._tidied_on > 3600:
                file.tidy(self._clock())
                self._tidied_on = self._clock()
        except Exception as error:  # noqa: BLE001  see _run
            self._fail(error)

    def _recover(self) -> None:
        if self._problem is not None:
            with self._lock:
                lost, self._lost = self._lost, collections.Counter()
            consequence = f"; {_amounts(lost)} are lost to it" if lost else ""
            self._log(f"the history {self.path} is written again{consequence}", "info")
        self._problem = None

    def _fail(self, error: Exception, consequence: str = "") -> None:
        """Note why the file cannot be read or written; a damaged one is put aside, so that a new one can begin."""
        self._let_go()
        self._turns = None
        self._may_pass = isinstance(error, FileNotFoundError) or "locked" in str(error)
        problem = f"{error}" if isinstance(error, HistoryRefusedError) else f"{self.path}: {error}"
        if is_damaged(error):
            with contextlib.suppress(OSError):
                problem += f"; it is put aside as {put_aside(self.path, self._clock())}, a new one is begun"
        if problem != self._problem:
            self._log(f"history: {consequence}{problem}", "warning")
        self._problem = problem


def _amounts(counts: Mapping[str, int]) -> str:
    """``30 turns, 2 action times``."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def is_damaged(error: Exception) -> bool:
    """Whether SQLite says that a file is no database, or one that does not hold together."""
    import sqlite3

    return type(error) is sqlite3.DatabaseError  # whatever else can be wrong has a class below this one


_JOURNALS = ("-wal", "-shm", "-journal")  # what SQLite appends to a file's name for those that belong to it


def _identity(path: Path) -> tuple[int, int] | None:
    """By which a file is known for the same whatever its name; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _files_of(path: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """A database and those of its journals that there are, each with its identity."""
    for suffix in ("", *_JOURNALS):
        each = path.with_name(path.name + suffix)
        if (identity := _identity(each)) is not None:
            yield each, identity


def put_aside(path: Path, now: float) -> Path:
    """Rename a history, with the journals that belong to it; its new name."""
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.localtime(now))}")
    path.rename(aside)
    for suffix in _JOURNALS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def _ratio(one: float | None, other: float | None) -> float | None:
    """A quotient, or None where there is none."""
    return one / other if one is not None and other else None


# --- Export: turns as text. -------------------------------------------------------------------------------------------
@contextlib.contextmanager
def read_history(path: Path) -> Iterator[HistoryFile | None]:
    """A history to read, while a controller writes it or not; None where there is none yet.

    One of an older version is brought up to date first. Raises RefusedError, with the fix, where it cannot be read.
    """
    import sqlite3

    if not path.exists():
        yield None
        return
    with contextlib.ExitStack() as stack:

        def opened(read_only: bool) -> HistoryFile:
            return stack.enter_context(contextlib.closing(HistoryFile(path, read_only=read_only)))

        try:
            file = opened(read_only=True)
            if not file.is_current():
                opened(read_only=False)
            yield file
        except sqlite3.Error as error:
            fix = "the controller puts it aside, at its next start" if is_damaged(error) else "try again"
            raise RefusedError(f"the history {path} cannot be read: {error}; {fix}") from error


def csv_cell(value: Any) -> Any:
    """A value as CSV shows it: what a spreadsheet would take for a formula gets an apostrophe, which it hides."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def export_turns(turns: Iterable[TurnRecord], form: str, out: IO[str]) -> None:
    """Write turns as ``csv`` (a line of names first) or ``jsonl``, one by one."""
    import csv

    writer = csv.writer(out)  # with the line ends of RFC 4180: else a carriage return in a text would end its line
    if form == "csv":
        writer.writerow(TURN_COLUMNS)
    for turn in turns:
        row = turn.row()
        if form == "csv":
            writer.writerow(map(csv_cell, row.values()))
        else:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


# --- Report: a run in Markdown. ---------------------------------------------------------------------------------------
REPORT_PARTS = {
    "pre": "observing",
    "queue": "waiting for a slot",
    "ttft": "to the first token",
    "inference": "the whole answer",
    "post": "acting",
    "unaccounted": "think time that the agent did not report",
}
REPORT_ROWS = 24  # of throughput over time
REPORT_RATE_S = 30.0
REPORT_VERDICTS = 100  # the latest
_REPORT_STEPS_S = (60, 300, 900, 3600, 4 * 3600, 86400, 7 * 86400)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table; text first, figures to the right."""
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return lines + ["| " + " | ".join(map(_words, row)) + " |" for row in rows] + [""]


def _words(value: Any) -> str:
    """A figure or text as a table's cell; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")


def _at(moment: float, form: str = "%Y-%m-%d %H:%M") -> str:
    return time.strftime(form, time.localtime(moment))


class Report:
    """A run in Markdown: the turns of a history that finished at ``since`` or later, and what happened meanwhile."""

    def __init__(self, file: HistoryFile, title: str, since: float) -> None:
        self._file, self._title, self._since = file, title, since
        self._first, self._last, self._turns, self._completed, self._sessions, self._tasks = self._row(
            "min(coalesce(started_at, finished_at)), max(finished_at), count(*), "
            "coalesce(sum(outcome = 'completed'), 0), count(DISTINCT session), count(DISTINCT task)"
        )
        self._replicas_since = since
        [[row, oldest]] = file.query("SELECT min(id), min(finished_at) FROM turns")
        # Ids begin at 1, and the oldest turns are the first to go. What their replicas took is nobody's here.
        self._is_trimmed = row is not None and row > 1 and oldest > since
        if self._is_trimmed:
            self._first = self._replicas_since = oldest

    def _rows(self, columns: str, rest: str = "") -> list[tuple[Any, ...]]:
        return self._file.query(f"SELECT {columns} FROM turns WHERE finished_at >= ? {rest}", self._since)

    def _row(self, columns: str) -> tuple[Any, ...]:
        return self._rows(columns)[0]

    def text(self) -> str:
        """All of it."""
        parts = [self._summary(), self._replica_time(), self._verdicts()]
        if self._turns:
            parts[1:1] = [self._throughput(), self._durations()]
            parts.append(self._waste())
        return "\n".join(line for part in parts for line in part)

    def _summary(self) -> list[str]:
        lines = [f"# {self._title}", ""]
        if not self._turns:
            return [*lines, "No turns yet." if self._since == 0 else f"No turns since {_at(self._since)}.", ""]
        span_s = self._last - self._first
        tokens_in, tokens_out, cached = self._row("sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens)")
        trimmed = "; turns before that were removed, to keep the history small" if self._is_trimmed else ""
        lines += [f"{_at(self._first)} to {_at(self._last)}: {span_s / 3600:.2g} h{trimmed}", ""]
        figures: list[tuple[str, Any]] = [
            ("turns", self._turns),
            *(
                (f"… {outcome}", count)
                for outcome, count in self._rows("outcome, count(*)", "GROUP BY 1 ORDER BY 2 DESC")
            ),
            ("sessions", self._sessions),
            ("tasks", self._tasks),
            ("completed turns per hour", _rate(self._completed * 3600, span_s)),
            ("tokens in", tokens_in),
            ("… found in the cache", _share(cached, tokens_in)),
            ("tokens out", tokens_out),
            ("tokens out per second", _rate(tokens_out, span_s)),
        ]
        return lines + _table(("", "all"), figures)

    def _throughput(self) -> list[str]:
        span_s = self._last - self._first
        step = next((step for step in _REPORT_STEPS_S if span_s / step < REPORT_ROWS), _REPORT_STEPS_S[-1])
        rows = self._rows(
            f"CAST(finished_at / {step} AS INTEGER), count(*), sum(outcome = 'completed'), sum(completion_tokens), "
            "avg(queue_ms), avg(inference_ms), count(DISTINCT session)",
            "GROUP BY 1 ORDER BY 1",
        )
        heads = ("from", "turns", "completed/min", "tokens out/s", "queue s, mean", "inference s, mean", "sessions")
        table = []
        for n, turns, done, out, queue, inference, sessions in rows:
            seconds = min((n + 1) * step, self._last) - max(n * step, self._first)
            rates = _rate(done * 60, seconds), _rate(out, seconds)
            table.append((_at(n * step), turns, *rates, _seconds(queue), _seconds(inference), sessions))
        return ["## Throughput", "", *_table(heads, table), *self._by_replica()]

    def _by_replica(self) -> list[str]:
        rows = self._rows(
            "coalesce(model, '?'), coalesce(backend, 'none'), count(*), sum(outcome = 'completed'), "
            "sum(completion_tokens), avg(ttft_ms), avg(inference_ms)",
            "GROUP BY 1, 2 ORDER BY 1, 3 DESC LIMIT 100",
        )
        heads = ("model: replica", "turns", "completed", "tokens out", "ttft s, mean", "inference s, mean")
        table = (
            (f"{model}: {replica}", turns, completed, tokens, _seconds(ttft), _seconds(inference))
            for model, replica, turns, completed, tokens, ttft, inference in rows
        )
        return _table(heads, table)

    def _durations(self) -> list[str]:
        rows = []
        for part, words in REPORT_PARTS.items():
            column = f"{part}_ms"
            values = [row[0] for row in self._rows(column, f"AND {column} IS NOT NULL ORDER BY 1")]
            if values:
                cuts = (values[math.ceil(share * len(values)) - 1] for share in (0.5, 0.9, 0.95, 0.99))
                rows.append((f"{part}: {words}", len(values), *map(_seconds, (sum(values) / len(values), *cuts))))
        heads = ("seconds", "turns", "mean", "p50", "p90", "p95", "p99")
        return ["## Where the time of a turn went", "", *_table(heads, rows)]

    def _replica_time(self) -> list[str]:
        sums = self._file.replica_seconds(self._replicas_since)
        if not sums:
            return []
        lines = ["## Replicas and GPUs", ""]
        rows = []
        for model, of_model in _grouped(sums, "model").items():
            kinds = ", ".join(sorted({use.gpu_type for use in of_model} - {""})) or "none"
            rows.append((f"{model}: GPUs ({kinds})", *_hours(of_model, of_gpus=True).values()))
            rows.append((f"{model}: replicas", *_hours(of_model, of_gpus=False).values()))
        lines += _table(("hours", *(state.replace("_", ", ") for state in REPLICA_STATES_HELD)), rows)
        held = {use: seconds for use, seconds in sums.items() if use.state != "pending"}
        gpu_s = sum(seconds * use.gpus for use, seconds in held.items())
        what, total_s = ("GPU-seconds", gpu_s) if gpu_s else ("replica-seconds", sum(held.values()))
        per = (("completed turn", self._completed), ("session", self._sessions), ("task", self._tasks))
        costs = [(f"{what} per {unit}", _ratio(total_s, count)) for unit, count in per if count]
        return lines + (_table(("loading and ready", "all"), costs) if costs else [])

    def _verdicts(self) -> list[str]:
        rows = self._file.query(
            f"SELECT {', '.join(VERDICT_COLUMNS)} FROM verdicts WHERE at >= ? ORDER BY model, gpu, id", self._since
        )
        spans: list[dict[str, Any]] = []
        for row in rows:
            verdict = dict(zip(VERDICT_COLUMNS, row, strict=True))
            same = ("model", "gpu", "verdict", "flags")
            if spans and all(spans[-1][name] == verdict[name] for name in same):
                spans[-1].update(verdict, at=spans[-1]["at"], until=verdict["at"])
            else:
                spans.append({**verdict, "until": verdict["at"]})
        if not spans:
            return []
        lines = ["## Verdict over time", ""]
        for span in spans[-REPORT_VERDICTS:]:
            sure = f", {span['confidence']:.0%} sure" if span["confidence"] is not None else ""
            flags = f" [{span['flags']}]" if span["flags"] else ""
            where = f"{span['model']} ({span['gpu']})" if span["gpu"] else span["model"]
            when = f"{_at(span['at'])}–{_at(span['until'], '%H:%M')}"
            lines.append(f"- {when} {where}: **{span['verdict']}**{flags}{sure}. {_words(span['sentence'])}")
        return [*lines, ""]

    def _waste(self) -> list[str]:
        in_vain = "outcome IN ('aborted', 'cut', 'error')"
        is_miss = "cache_miss IS NOT NULL"  # a few tokens less are none: engines cache whole blocks
        spent = f"sum(({in_vain}) * (coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0)))"
        retried, again, vain, vain_ms, vain_tokens, misses, prefilled, tokens_in = self._row(
            f"coalesce(sum(retries > 0), 0), sum(retries * prompt_tokens), coalesce(sum({in_vain}), 0), "
            f"sum(({in_vain}) * inference_ms), {spent}, "
            f"coalesce(sum({is_miss}), 0), sum(({is_miss}) * (expected_cached_tokens - cached_tokens)), "
            "sum(prompt_tokens)"
        )
        rows = [
            ("retried: sent to more than one replica", retried, again, _share(again, tokens_in)),
            ("aborted, cut or failed", vain, vain_tokens, _share(vain_tokens, tokens_in)),
            ("prefilled again: expected in the cache, and not there", misses, prefilled, _share(prefilled, tokens_in)),
        ]
        lines = ["## Waste", "", *_table(("", "turns", "tokens", "of tokens in"), rows)]
        if vain_ms:
            lines += [f"Inference in vain: {_words(vain_ms / 1000)} s.", ""]
        reasons: collections.Counter[str] = collections.Counter()
        for reason, count in self._rows("cache_miss, count(*)", "AND cache_miss IS NOT NULL GROUP BY 1"):
            reasons[re.split(r" from | message ", reason)[0]] += count  # without the names of replicas, and numbers
        return lines + (_table(("why not in the cache", "turns"), reasons.most_common(10)) if reasons else [])


def _rate(amount: float | None, seconds: float) -> float | None:
    """Per second; None over less than REPORT_RATE_S, where it would say nothing."""
    return _ratio(amount, seconds) if seconds >= REPORT_RATE_S else None


def _share(part: float | None, whole: float | None) -> str | None:
    share = _ratio(part, whole)
    return None if share is None else f"{share:.1%}"


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


# --- Metrics: the text of GET /metrics. -------------------------------------------------------------------------------
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_METRIC_SERIES = (
    2000  # of turns by model, backend and outcome; beyond, the one that was quiet for longest is dropped
)

# Upper bounds of the histograms' buckets, in octaves of a millisecond: 1 ms to 17 minutes, where Histogram's end too.
METRIC_OCTAVES = range(21)
METRIC_PARTS = {
    "pre": "Time an agent observed before a turn.",
    "queue": "Time a turn waited for a slot.",
    "ttft": "Time from sending a turn to a replica to its first token.",
    "inference": "Time from sending a turn to a replica to its last byte.",
    "unaccounted": "Think time that the agent did not report.",
    "post": "Time an agent acted on an answer.",
}
_MODEL_DURATIONS = {part: operator.attrgetter(f"{part}_ms") for part in METRIC_PARTS if part != "post"}
METRIC_SUMS = {
    "retries": "Times that a turn was sent to another replica.",
    "prompt_tokens": "Tokens in.",
    "cached_tokens": "Tokens in that were found in a prefix cache.",
    "prefilled_again_tokens": "Tokens in that should have been in a prefix cache and were not, of turns with a miss.",
    "completion_tokens": "Tokens out.",
}


class TurnMetrics:
    """Counters and histograms of turns since this process started, by model; none by session."""

    def __init__(self) -> None:
        self._turns: OrderedDict[tuple[str, str, str], int] = OrderedDict()
        self._sums: dict[tuple[str, str], int] = {}  # (name, model) → sum
        self._durations: dict[tuple[str, str], Histogram] = {}  # (part, model) → durations; post is of all models

    def add(self, *records: TurnRecord) -> None:
        """Count finished turns; many at once cost a fraction of one by one."""
        by_model: dict[str, list[TurnRecord]] = {}
        series: collections.Counter[tuple[str, str, str]] = collections.Counter()
        for record in records:
            model = record.model or ""
            series[model, record.backend or "", record.outcome] += 1
            by_model.setdefault(model, []).append(record)
            if record.post_ms is not None:
                self.add_post(record.post_ms)
        for key, count in series.items():
            self._turns[key] = self._turns.get(key, 0) + count
            self._turns.move_to_end(key)
            if len(self._turns) > MAX_METRIC_SERIES:
                self._turns.popitem(last=False)
        for model, turns in by_model.items():
            self._add_figures(model, turns)

    def _add_figures(self, model: str, records: Sequence[TurnRecord]) -> None:
        missed = ((each.expected_cached_tokens or 0) - (each.cached_tokens or 0) for each in records if each.cache_miss)
        counts = {
            "retries": sum(each.retries for each in records),
            "prompt_tokens": sum(each.prompt_tokens or 0 for each in records),
            "cached_tokens": sum(each.cached_tokens or 0 for each in records),
            "prefilled_again_tokens": sum(missed),
            "completion_tokens": sum(each.completion_tokens or 0 for each in records),
        }
        for name, value in counts.items():
            if value:
                self._sums[name, model] = self._sums.get((name, model), 0) + value
        for part, read in _MODEL_DURATIONS.items():
            if durations := [ms for ms in map(read, records) if ms is not None]:
                self._histogram(part, model).add(*durations)

    def add_post(self, ms: float) -> None:
        """Count the time that an agent acted on an answer."""
        self._histogram("post", "").add(ms)

    def _histogram(self, part: str, model: str) -> Histogram:
        if (part, model) not in self._durations:
            self._durations[part, model] = Histogram()
        return self._durations[part, model]

    def families(self) -> Iterator[Any]:
        """As prometheus_client takes it."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        turns = CounterMetricFamily("agent_infra_turns", "Finished turns.", labels=("model", "backend", "outcome"))
        for key, count in self._turns.items():
            turns.add_metric(key, count)
        yield turns
        for name, text in METRIC_SUMS.items():
            counter = CounterMetricFamily(f"agent_infra_{name}", text, labels=("model",))
            for (each, model), value in self._sums.items():
                if each == name:
                    counter.add_metric((model,), value)
            yield counter
        for part, text in METRIC_PARTS.items():
            by = () if part == "post" else ("model",)
            family = HistogramMetricFamily(f"agent_infra_{part}_seconds", text, labels=by)
            for (each, model), durations in self._durations.items():
                if each == part:
                    family.add_metric((model,)[: len(by)], _cumulative(durations), durations.sum_ms / 1000)
            yield family


def _cumulative(durations: Histogram) -> list[tuple[str, float]]:
    """A histogram's buckets: (upper bound in seconds, how many are below it)."""
    bounds = [(str(2.0**octave / 1000), float(durations.count_below(octave))) for octave in METRIC_OCTAVES]
    return [*bounds, ("+Inf", float(durations.count))]


# Of a backend's row in /stats: name → text and what it is there; None is not told.
_BACKEND_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "up": ("Whether it is ready and healthy.", lambda row: row["state"] == "ready" and row["healthy"] is not False),
    "in_flight": ("Turns with it.", lambda row: row["inflight"]),
    "slots": ("Turns that it can work on at once.", lambda row: row["slots"]),
    "kv_cache_usage_ratio": ("Used share of its KV cache.", lambda row: row["engine"]["kv_usage"]),
    "gpu_memory_used_bytes": ("Used memory of its GPUs.", lambda row: _as_mapping(row["gpu"]).get("memory_used")),
    "gpu_memory_bytes": ("Memory of its GPUs.", lambda row: _as_mapping(row["gpu"]).get("memory_total")),
    "gpu_utilization_ratio": ("Of its GPUs.", lambda row: _ratio(_as_mapping(row["gpu"]).get("utilization"), 100)),
}
_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "start_time_seconds": ("When the controller started.", lambda stats: stats["now"] - stats["uptime_seconds"]),
    "queue_turns": ("Turns that wait for a slot.", lambda stats: stats["queue"]["pending"]),
    "in_flight_turns": ("Turns with a replica.", lambda stats: stats["queue"]["in_flight"]),
    "live_sessions": ("Sessions that are not over.", lambda stats: stats["sessions"]["live"]),
    "active_sessions": ("Of these, heard of lately.", lambda stats: stats["sessions"]["active"]),
    "relay_resident_memory_bytes": ("Of the relay.", lambda stats: stats["relay"]["rss_bytes"]),
    "relay_connections": ("Open connections of clients.", lambda stats: stats["relay"]["connections"]),
    "history_up": ("Whether turns are being kept.", lambda stats: stats["history"]["state"] == "on"),
    "history_turns": ("Turns in the history.", lambda stats: stats["history"]["turns"]),
}

# Of an entry of the analysis: the same.
_ANALYSIS_GAUGES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "suggested_agents": ("Agents to run in parallel.", lambda entry: entry["suggestion"]["agents"]["value"]),
    "utilisation_ratio": ("Of the replicas, by the model.", lambda entry: entry["operating"]["utilisation"]["value"]),
}


class StatsMetrics:
    """The state that a /stats document tells, and replica time, as prometheus_client takes it."""

    def __init__(self, stats: Mapping[str, Any], replica_seconds: Mapping[ReplicaUse, float]) -> None:
        self._stats, self._replica_seconds = stats, replica_seconds

    def families(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        info = GaugeMetricFamily("agent_infra_info", "Of the program.", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info
        backends = [((row["model"], row["id"]), row) for row in self._stats["backends"]]
        analysis = [((entry["model"], entry["gpu"] or ""), entry) for entry in self._stats["analysis"] or ()]
        for prefix, labels, rows, gauges in (
            ("", (), [((), self._stats)], _GAUGES),
            ("backend_", ("model", "backend"), backends, _BACKEND_GAUGES),
            ("", ("model", "gpu"), analysis, _ANALYSIS_GAUGES),
        ):
            for name, (text, read) in gauges.items():
                gauge = GaugeMetricFamily(f"agent_infra_{prefix}{name}", text, labels=labels)
                for values, row in rows:
                    if (figure := read(row)) is not None:
                        gauge.add_metric(values, figure)
                yield gauge
        relay = self._stats["relay"]
        yield CounterMetricFamily("agent_infra_relay_restarts", "Relays that were replaced.", relay["restarts"])
        yield CounterMetricFamily("agent_infra_events_dropped", "Turns not counted.", relay["events_dropped"])
        for what in ("replica", "gpu"):
            family = CounterMetricFamily(
                f"agent_infra_{what}_seconds", f"Time of {what}s by state.", labels=("model", "gpu", "state")
            )
            sums: dict[tuple[str, str, str], float] = {}
            for use, seconds in self._replica_seconds.items():
                key = use.model, use.gpu_type, use.state
                sums[key] = sums.get(key, 0.0) + seconds * (use.gpus if what == "gpu" else 1)
            for key, seconds in sums.items():
                family.add_metric(key, seconds)
            yield family


class _Families:
    """What prometheus_client calls a collector."""

    def __init__(self, *sources: TurnMetrics | StatsMetrics) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Any]:
        for source in self._sources:
            yield from source.families()


def metrics_text(*sources: TurnMetrics | StatsMetrics) -> bytes:
    """The body of GET /metrics, in Prometheus's text format (METRICS_TYPE)."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(*sources))
    return generate_latest(registry)
