"""The `export` verb: turns of the history as CSV or JSON lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.insight.history import TURN_COLUMNS, HistoryFile, is_damaged
from agent_infra_core.insight.turns import TurnRecord


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
