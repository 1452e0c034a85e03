"""The SQLite file of finished turns: schema, migrations, and the thread that writes to it."""

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
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.host import absolute_path, in_portions
from agent_infra_core.insight import summaries
from agent_infra_core.insight.gpu_hours import REPLICA_TIME_BIN_S, ReplicaUse
from agent_infra_core.insight.rates import HISTORY_POINTS
from agent_infra_core.insight.runs import MAX_RUNS, Announcement
from agent_infra_core.insight.turns import TurnRecord

HISTORY_BYTES = 1 << 30  # maximum size of the file; above it, the oldest turns are removed
HISTORY_INTERVAL_S = 1.0  # between batches, so the most a kill -9 can lose; five times as long after a failure
ROWS_AT_ONCE = 32  # takes half a millisecond
HISTORY_BACKLOG_BYTES = 32 << 20  # maximum size of turns waiting while the file can't be written; the oldest is dropped
HISTORY_BACKLOG_ROWS = 20_000  # the same for each small table, in rows
HISTORY_BUSY_S = 2.0  # time a write waits for another program's lock
HISTORY_CLOSE_S = 10.0  # time to write the last batch on close
HISTORY_RETRY_S = 0.1  # between attempts to write it
HISTORY_CHUNK = 1000  # turns per query, so that readers hold locks briefly and don't load the whole file
RESTORED_S = 6 * 3600.0
KEPT_RUNS = 1000  # that charts can mark
MAX_VERDICTS = 100_000  # one per minute and model: two months of one model
REPLICA_TIME_FINE_S = 8 * 86400
PROGRESS_STEPS = 50_000  # of SQLite's machine, about a millisecond: between looks at a deadline
_HISTORY_MARK = 0x41494E46  # PRAGMA application_id, which identifies a history file

# Steps from each schema version (PRAGMA user_version) to the next. Never change a released step.
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
    summaries.SCHEMA,
    "CREATE TABLE analyses (model TEXT, gpu TEXT, entry TEXT NOT NULL, PRIMARY KEY (model, gpu)) WITHOUT ROWID",
)
TURN_COLUMNS = tuple(item.name for item in dataclasses.fields(TurnRecord))
_BOOLEAN_COLUMNS = tuple(
    TURN_COLUMNS.index(name) for name in ("stream", "tokens_estimated")
)  # columns stored as 0 or 1
_turn_values = operator.attrgetter(*TURN_COLUMNS)

# Local file systems. SQLite's write-ahead log needs shared memory and is safe only there. Any other is assumed to be a
# network file system (nfs, lustre, gpfs, beegfs, cifs, fuse, …), where only the rollback journal is safe.
_LOCAL_FILE_SYSTEMS = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs", "bcachefs", "jfs", "nilfs2")
)


def history_path(setting: str | None, default: Path) -> Path | None:
    """The file set by ``proxy.history``; None if it is off."""
    if setting == "off":
        return None
    return default if setting is None else absolute_path(setting, "proxy.history")


def is_local(path: Path, mounts: str) -> bool:
    """Whether a file is on a local disk. ``mounts`` is the text of /proc/self/mountinfo. False if in doubt."""
    kinds: dict[str, str] = {}
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) > 4 and after:
            # Spaces and such are octal escapes. Of two mounts at the same place, the later one is visible.
            place = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
            kinds[place] = after.split()[0]
    for folder in (path, *path.parents):
        if str(folder) in kinds:
            return kinds[str(folder)] in _LOCAL_FILE_SYSTEMS
    return False


class HistoryRefusedError(RefusedError):
    """The file must not be touched: it has a newer schema, or isn't a history."""


@dataclass
class HistoryBatch:
    """Data to be written in one transaction."""

    turns: deque[TurnRecord] = field(default_factory=deque)
    posts: dict[str, float] = field(default_factory=dict)  # turn → post_ms, for turns written earlier
    totals: dict[str, int] = field(default_factory=dict)  # amounts to add
    replica_time: dict[tuple[ReplicaUse, int], float] = field(default_factory=dict)  # (use, step) → seconds to add
    verdicts: list[tuple[Any, ...]] = field(default_factory=list)  # rows of VERDICT_COLUMNS
    analyses: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (model, GPU type or "") → entry as JSON
    points: list[dict[str, Any]] = field(default_factory=list)  # of throughput.history; only the latest are kept
    ended: dict[str, float] = field(default_factory=dict)  # session → time its agent ended it
    gauges: list[tuple[Any, ...]] = field(default_factory=list)  # rows of put_gauges()
    runs: dict[str, Announcement] = field(default_factory=dict)  # by name
    run_ends: dict[str, float | None] = field(default_factory=dict)  # name → when its last task was over
    text_bytes: int = 0  # approximate size of the turns

    def add(self, later: HistoryBatch) -> collections.Counter[str]:
        """Merge a later batch, up to the backlog limits. Returns the number of (oldest) rows dropped of each kind."""
        self.turns += later.turns
        self.text_bytes += later.text_bytes
        self.posts.update(later.posts)
        for name, value in later.totals.items():
            self.totals[name] = self.totals.get(name, 0) + value
        for key, seconds in later.replica_time.items():
            self.replica_time[key] = self.replica_time.get(key, 0.0) + seconds
        self.verdicts = (self.verdicts + later.verdicts)[-MAX_VERDICTS:]
        self.analyses.update(later.analyses)
        self.points = (self.points + later.points)[-HISTORY_POINTS:]
        self.ended.update(later.ended)
        self.gauges = (self.gauges + later.gauges)[-HISTORY_BACKLOG_ROWS:]
        self.runs.update(later.runs)
        self.run_ends.update(later.run_ends)
        dropped: collections.Counter[str] = collections.Counter()
        while self.text_bytes > HISTORY_BACKLOG_BYTES:
            oldest = self.turns.popleft()
            self.text_bytes -= _record_bytes(oldest)
            self.posts.pop(oldest.turn, None)
            dropped["turns"] += 1
        kept: Mapping[str, dict[Any, Any]] = {
            "action times": self.posts,
            "ends of sessions": self.ended,
            "runs": self.runs,
            "spans of replica time": self.replica_time,
        }
        for name, rows in kept.items():
            for first in list(itertools.islice(rows, max(0, len(rows) - HISTORY_BACKLOG_ROWS))):
                del rows[first]
                dropped[name] += 1
        return dropped

    def __bool__(self) -> bool:
        details = self.posts or self.replica_time or self.verdicts or self.analyses or self.points or self.ended
        return bool(self.turns or details or self.gauges or self.runs or self.run_ends or any(self.totals.values()))


def _record_bytes(record: TurnRecord) -> int:
    """Approximate size of a record in memory."""
    return 1000 + len(record.prompt) + len(record.answer)


VERDICT_COLUMNS = (
    *("at", "model", "gpu", "verdict", "confidence", "sentence", "flags"),
    *("agents", "turns_per_hour", "suggested_agents"),
)


def verdict_row(entry: Mapping[str, Any], at: float) -> tuple[Any, ...]:
    """The VERDICT_COLUMNS of one ``analysis`` entry of /stats."""
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
_ANNOUNCE_RUN = (
    "INSERT INTO runs (name, tasks, at) VALUES (?, ?, ?) "
    "ON CONFLICT (name) DO UPDATE SET tasks = excluded.tasks, at = min(at, excluded.at), ended = NULL"
)
_ADD_REPLICA_TIME = (
    "INSERT INTO replica_time (replica, model, gpu_type, gpus, state, at, seconds) VALUES (?, ?, ?, ?, ?, ?, ?) "
    + _SUM_UP
)


def _in_lower_case(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def share_of_day(since: float, begun: float) -> float:
    """Share of its day's replica time at or after ``since``, given that sampling started at ``begun``."""
    end = since // 86400 * 86400 + 86400
    return (end - since) / (end - max(end - 86400, min(begun, since)))


class HistoryFile:
    """One connection to a history file. Opening it for writing creates or migrates the file.

    For one thread at a time. All methods let sqlite3.Error and OSError through, and raise HistoryRefusedError for a
    file that must not be touched.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False) -> None:
        """``path`` None: an empty history in memory."""
        import sqlite3

        self._path = path
        self.refused: list[str] = []  # SQLite's error for each row that the last write() left out
        if path is None:
            self._connection = sqlite3.connect(":memory:", isolation_level=None)
            self._add_functions()
            self._migrate()
            return
        if not read_only and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Create it here to set its mode. Don't open an existing file: closing it drops this process's locks on it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}",
            uri=True,
            timeout=HISTORY_BUSY_S,
            isolation_level=None,
            check_same_thread=False,  # opened by the controller to restore, then used by the writer thread
        )
        try:
            self._add_functions()
            self._check()
            if not read_only:
                self._prepare(path)
        except BaseException:
            self.close()
            raise

    def _add_functions(self) -> None:
        # SQLite's lower() knows ASCII alone
        self._connection.create_function("lower_text", 1, _in_lower_case, deterministic=True)

    def interrupt_at(self, deadline: float) -> None:
        """From ``deadline`` on, in monotonic seconds, queries fail with sqlite3.OperationalError."""
        self._connection.set_progress_handler(lambda: time.monotonic() > deadline, PROGRESS_STEPS)

    def _check(self) -> None:
        version, mark = self._value("PRAGMA user_version"), self._value("PRAGMA application_id")
        if mark != _HISTORY_MARK and (version or self._value("SELECT count(*) FROM sqlite_master")):
            raise HistoryRefusedError(f"{self._path} is not a history of ours; set proxy.history to another path")
        if version > len(_MIGRATIONS):
            raise HistoryRefusedError(
                f"{self._path} is from a newer version (schema {version}, this program knows {len(_MIGRATIONS)}); "
                "use that version, or set proxy.history to another path"
            )

    def _prepare(self, path: Path) -> None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            mounts = ""
        local = is_local(path.resolve(), mounts)
        self._value(f"PRAGMA journal_mode = {'wal' if local else 'truncate'}")
        # A log that isn't flushed after each batch survives the death of the process; a power cut may lose batches.
        self._value(f"PRAGMA synchronous = {'normal' if local else 'full'}")
        if self._value("PRAGMA user_version") < len(_MIGRATIONS):
            self._migrate()

    def _migrate(self) -> None:
        with self._transaction():  # re-read the version inside it: another program may have migrated already
            for step in _MIGRATIONS[self._value("PRAGMA user_version") :]:
                for statement in step.split(";"):
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
            self._connection.execute(f"PRAGMA application_id = {_HISTORY_MARK}")

    def is_current(self) -> bool:
        """Whether the schema is current; a file opened read-only may be older."""
        return bool(self._value("PRAGMA user_version") == len(_MIGRATIONS))

    def close(self) -> None:
        self._connection.close()

    def write(self, batch: HistoryBatch) -> int:
        """Write all of the batch or nothing. Returns the number of new turns; existing turns aren't changed.

        Rows that SQLite can't store are left out, because they would block all others forever; see ``refused``.
        """
        self.refused.clear()
        with self._transaction():
            added = self._put(_INSERT_TURN, list(map(_turn_values, batch.turns)))
            posts = [(post_ms, turn) for turn, post_ms in batch.posts.items()]
            self._put("UPDATE turns SET post_ms = ? WHERE turn = ?", posts)
            self._put(_ADD_TOTAL, [(name, value) for name, value in batch.totals.items() if value])
            self._put(_ADD_REPLICA_TIME, [(*use, at, seconds) for (use, at), seconds in batch.replica_time.items()])
            self._put(_INSERT_VERDICT, batch.verdicts)
            analyses = [(*key, entry.decode()) for key, entry in batch.analyses.items()]
            self._put("INSERT OR REPLACE INTO analyses VALUES (?, ?, ?)", analyses)
            points = [(point["at"], json.dumps(point)) for point in batch.points]
            self._put("INSERT OR REPLACE INTO points VALUES (?, ?)", points)
            self._put("INSERT OR REPLACE INTO ended VALUES (?, ?)", list(batch.ended.items()))
            self._put(_ANNOUNCE_RUN, list(batch.runs.values()))
            self._put("UPDATE runs SET ended = ? WHERE name = ?", [(end, name) for name, end in batch.run_ends.items()])
            summaries.put_gauges(self._connection, batch.gauges)
            summaries.summarise(self._connection)
        return added

    def catch_up(self) -> bool:
        """Summarise some of the turns that an older version wrote. Returns whether there were any left."""
        if not summaries.is_behind(self._connection):
            return False
        with self._transaction():
            summaries.summarise(self._connection)
        return True

    def _put(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """Write rows, one by one if SQLite can't store one of them. Returns the number of rows changed."""
        import sqlite3

        # An integer over 64 bits, a lone surrogate, NULL in a NOT NULL column, a text of a gigabyte.
        unwritable = (OverflowError, UnicodeEncodeError, sqlite3.IntegrityError, sqlite3.DataError)
        if not rows:
            return 0
        self._connection.execute("SAVEPOINT all_at_once")
        try:
            written = (self._connection.executemany(statement, some) for some in in_portions(rows, ROWS_AT_ONCE))
            changed = sum(cursor.rowcount for cursor in written)
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
        """If the file is larger than ``max_bytes``, remove the oldest ``turns`` turns. Returns the number removed."""
        pages = self._value("PRAGMA page_count") - self._value("PRAGMA freelist_count")
        if pages * self._value("PRAGMA page_size") <= max_bytes:
            return 0
        last = "SELECT max(id) FROM (SELECT id FROM turns ORDER BY id LIMIT ?)"
        return self._connection.execute(f"DELETE FROM turns WHERE id <= ({last})", (turns,)).rowcount

    def tidy(self, now: float) -> None:
        """Remove old rows of the small tables."""
        with self._transaction():
            oldest = (self._value("SELECT max(id) FROM verdicts") or 0) - MAX_VERDICTS
            self._connection.execute("DELETE FROM verdicts WHERE id <= ?", (oldest,))
            latest = "SELECT at FROM points ORDER BY at DESC LIMIT ?"
            self._connection.execute(f"DELETE FROM points WHERE at NOT IN ({latest})", (HISTORY_POINTS,))
            self._connection.execute("DELETE FROM ended WHERE at < ?", (now - RESTORED_S,))
            latest = "SELECT name FROM runs ORDER BY at DESC LIMIT ?"
            self._connection.execute(f"DELETE FROM runs WHERE name NOT IN ({latest})", (KEPT_RUNS,))
            self._sum_up_days(int((now - REPLICA_TIME_FINE_S) // 86400) * 86400)
            summaries.tidy(self._connection, now)

    def _sum_up_days(self, before: int) -> None:
        """Merge the replica time before ``before`` into one row per day."""
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
        """All rows of a query; for small results."""
        return self._connection.execute(query, values).fetchall()

    def fill(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Write rows into a temporary table."""
        self._connection.executemany(statement, rows)

    def since(self) -> float:
        """When the file was created, in s since the epoch."""
        return float(self._value("SELECT value FROM about WHERE name = 'since'"))

    def totals(self) -> dict[str, int]:
        """The deployment's totals by name, including turns removed since."""
        return dict(self.query("SELECT name, value FROM totals"))

    def analyses(self, since: float = -math.inf) -> list[dict[str, Any]]:
        """Of each model and GPU type, the entry of ``analysis`` with the last curve, if it is of ``since`` or later."""
        rows = self.query("SELECT entry FROM analyses ORDER BY model, gpu")
        return [entry for (text,) in rows for entry in [json.loads(text)] if entry["computed_at"] >= since]

    def points(self) -> list[dict[str, Any]]:
        """The latest points of ``throughput.history`` in /stats, oldest first."""
        rows = self.query("SELECT figures FROM points ORDER BY at DESC LIMIT ?", HISTORY_POINTS)
        return [json.loads(figures) for (figures,) in reversed(rows)]

    def ended_sessions(self) -> dict[str, float]:
        """Session → time its agent ended it, for at least the last RESTORED_S."""
        return dict(self.query("SELECT session, at FROM ended ORDER BY at"))

    def end_runs(self, followed: Collection[str]) -> None:
        """End the runs of earlier controllers but those ``followed`` on: with the last turn, as far as is known."""
        last = "(SELECT finished_at FROM turns ORDER BY id DESC LIMIT 1)"
        names = "(SELECT value FROM json_each(?))"
        self._connection.execute(
            f"UPDATE runs SET ended = max(at, coalesce({last}, at)) WHERE ended IS NULL AND name NOT IN {names}",
            (json.dumps(list(followed)),),
        )

    def runs(self, limit: int) -> list[Announcement]:
        """The latest announcements of runs whose turns are all among the last ``limit`` written, oldest first."""
        newest = self._value("SELECT max(id) FROM turns") or 0
        oldest = self.query("SELECT id, finished_at FROM turns WHERE id > ? ORDER BY id LIMIT 1", newest - limit)
        since = oldest[0][1] if oldest and oldest[0][0] > 1 else 0.0  # with the first turn, nothing is missing
        rows = self.query("SELECT name, tasks, at FROM runs WHERE at >= ? ORDER BY at DESC LIMIT ?", since, MAX_RUNS)
        return [Announcement(*row) for row in reversed(rows)]

    def count_turns(self) -> int:
        return int(self._value("SELECT count(*) FROM turns"))

    def replica_seconds(self, since: float = 0.0, until: float = math.inf) -> dict[ReplicaUse, float]:
        """Replica time from the time step that contains ``since`` to the one that contains ``until``.

        A day merged into one row counts in proportion to what of it is after ``since``.
        """
        day = int(since // 86400) * 86400
        if self._value("SELECT 1 FROM replica_time WHERE at > ? AND at < ?", day, day + 86400):
            day = -1  # the day isn't merged yet
        share = share_of_day(since, self.since())
        rows = self.query(
            "SELECT replica, model, gpu_type, gpus, state, sum(seconds * CASE at WHEN ? THEN ? ELSE 1 END) "
            "FROM replica_time WHERE (at > ? OR at = ?) AND at <= ? GROUP BY 1, 2, 3, 4, 5 ORDER BY min(at)",
            *(day, share, since - REPLICA_TIME_BIN_S, day, until),
        )
        return {ReplicaUse(*row[:5]): row[5] for row in rows}

    def latest_turns(self, limit: int, since: float) -> Iterator[TurnRecord]:
        """Those of the last ``limit`` turns written that finished at ``since`` or later, oldest first."""
        newest = self._value("SELECT max(id) FROM turns") or 0
        return self.turns(since=since, after=newest - limit)

    def turns(self, session: str | None = None, since: float = 0.0, after: int = 0) -> Iterator[TurnRecord]:
        """Turns in the order they were written. No lock is held between chunks."""
        where = "id > ? AND finished_at >= ?" + (" AND session = ?" if session is not None else "")
        query = f"SELECT id, {', '.join(TURN_COLUMNS)} FROM turns WHERE {where} ORDER BY id LIMIT {HISTORY_CHUNK}"
        values = [since] if session is None else [since, session]
        while rows := self.query(query, after, *values):
            for number, *row in rows:
                for column in _BOOLEAN_COLUMNS:
                    row[column] = None if row[column] is None else bool(row[column])
                after = number
                yield TurnRecord(*row)


class History:
    """Writes a deployment's history file in a separate thread, so callers never wait for the disk.

    Data that can't be written waits in memory, up to HISTORY_BACKLOG_BYTES. The log reports when this starts and ends.
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
        self._lock = threading.Lock()  # guards _pending and _lost
        self._pending = HistoryBatch()
        self._lost: collections.Counter[str] = collections.Counter()  # rows dropped since the last successful write
        self._file: HistoryFile | None = None
        self._opened_as: list[tuple[Path, tuple[int, int]]] = []  # file and journals, when it was opened
        self._turns: int | None = None  # turns in the file; None if unknown
        self._tidied_on = 0.0
        self._problem: str | None = None
        self._may_pass = False  # whether the problem may be gone at the next attempt
        self._stop = threading.Event()
        self._close_by = math.inf  # deadline by time.monotonic(), set by close()
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def open(self, restore: Callable[[HistoryFile], None]) -> None:
        """Call ``restore`` to read what an earlier controller wrote, then write in a thread until close()."""
        try:
            restore(self._open_deployment())
        except Exception as error:  # noqa: BLE001  whatever it is: it is served without history rather than not at all
            self._fail(error, "starting without earlier data: ")
        self._thread.start()

    def add(self, batch: HistoryBatch) -> None:
        """Queue ``batch`` to be written."""
        batch.text_bytes = sum(map(_record_bytes, batch.turns))
        with self._lock:
            self._lost += self._pending.add(batch)

    def document(self) -> dict[str, Any]:
        """``history`` of /stats."""
        state = "on" if self._problem is None else "failing"
        return {"path": str(self.path), "state": state, "reason": self._problem, "turns": self._turns}

    def close(self) -> None:
        """Write the last batch, for at most HISTORY_CLOSE_S."""
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
        """The thread's main loop. Errors don't end it; failed writes are retried."""
        while not self._stop.wait(self._interval_s * (1 if self._problem is None else 5)):
            self._flush()
        self._flush()
        # Another program's lock may outlast one attempt. Don't start an attempt that could run past the deadline.
        while self._pending and self._may_pass and time.monotonic() + 1.5 * HISTORY_BUSY_S < self._close_by:
            time.sleep(HISTORY_RETRY_S)
            self._flush()
        self._let_go()

    def _open_deployment(self) -> HistoryFile:
        if self._file is None:
            self._file = HistoryFile(self.path)
            self._opened_as = list(_files_of(self.path.resolve()))
            self._turns = self._file.count_turns()
        elif self._is_elsewhere():
            raise FileNotFoundError("it was removed or replaced; it is reopened")
        return self._file

    def _is_elsewhere(self) -> bool:
        """Whether the path no longer leads to the open file. SQLite wouldn't notice."""
        return _identity(self.path) not in dict(self._opened_as).values()

    def _let_go(self) -> None:
        """Close the file. If it was moved or removed, delete its journals, or SQLite would apply them to a new file."""
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(Exception):
            (path, opened), *journals = self._opened_as
            if _identity(path) != opened:
                with contextlib.suppress(Exception):
                    file.query("PRAGMA wal_checkpoint(TRUNCATE)")  # it may have been moved and be read there
                for journal, identity in journals:
                    if _identity(journal) == identity:  # otherwise it belongs to the new file
                        journal.unlink()
        with contextlib.suppress(Exception):
            file.close()

    def _flush(self) -> None:
        with self._lock:
            batch, self._pending = self._pending, HistoryBatch()
        if not batch and self._problem is None:
            return
        try:
            file = self._open_deployment()
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
            said = f"{len(file.refused)} rows cannot be stored and are left out: {file.refused[0]}"
            self._log(f"history: {said}", "warning")
        self._recover()
        try:
            while not self._stop.is_set() and file.catch_up():
                pass
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
            consequence = f"; {_amounts(lost)} were lost" if lost else ""
            self._log(f"the history {self.path} is being written again{consequence}", "info")
        self._problem = None

    def _fail(self, error: Exception, consequence: str = "") -> None:
        """Record why the file can't be read or written. A damaged file is renamed and replaced by a new one."""
        self._let_go()
        self._turns = None
        self._may_pass = isinstance(error, FileNotFoundError) or "locked" in str(error)
        problem = f"{error}" if isinstance(error, HistoryRefusedError) else f"{self.path}: {error}"
        if is_damaged(error):
            with contextlib.suppress(OSError):
                problem += f"; it is put aside as {rename_damaged(self.path, self._clock())}, a new one is begun"
        if problem != self._problem:
            self._log(f"history: {consequence}{problem}", "warning")
        self._problem = problem


def _amounts(counts: Mapping[str, int]) -> str:
    """``30 turns, 2 action times``."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def is_damaged(error: Exception) -> bool:
    """Whether SQLite reports that a file isn't a database or is corrupt."""
    import sqlite3

    return type(error) is sqlite3.DatabaseError  # all other errors are subclasses of it


_JOURNALS = ("-wal", "-shm", "-journal")  # suffixes of the files that SQLite keeps beside a database


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, which stay the same when it is renamed; None if it doesn't exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _files_of(path: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """A database and its existing journals, each with its identity."""
    for suffix in ("", *_JOURNALS):
        each = path.with_name(path.name + suffix)
        if (identity := _identity(each)) is not None:
            yield each, identity


def rename_damaged(path: Path, now: float) -> Path:
    """Rename a history and its journals. Returns the new path."""
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.localtime(now))}")
    path.rename(aside)
    for suffix in _JOURNALS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def ratio(one: float | None, other: float | None) -> float | None:
    """``one / other``; None if either is None or ``other`` is 0."""
    return one / other if one is not None and other else None
