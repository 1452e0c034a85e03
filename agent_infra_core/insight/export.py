"""The `export` verb: turns of the history as CSV or JSON lines."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.host import printable_text
from agent_infra_core.insight.history import TURN_COLUMNS, HistoryFile, is_damaged
from agent_infra_core.insight.turns import TurnRecord


@contextlib.contextmanager
def read_history(path: Path) -> Iterator[HistoryFile | None]:
    """Open a history for reading, even while a controller writes to it; None if the file doesn't exist.

    Migrates a file of an older version first. Raises RefusedError, with the fix, if the file can't be read.
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
                migrated = opened(read_only=False)
                while migrated.catch_up():
                    pass
            yield file
        except sqlite3.Error as error:
            fix = "the controller renames it at its next start" if is_damaged(error) else "try again"
            raise RefusedError(f"the history {path} cannot be read: {error}; {fix}") from error


_FORMULA = frozenset("=+-@＝＋－＠")  # how a formula begins, also in full-width characters
_C1 = re.compile(r"[\x7f-\x9f]")  # JSON escapes the other control characters


def csv_cell(value: Any) -> Any:
    """A value as a CSV cell. Text that looks like a formula gets an apostrophe, which spreadsheets hide.

    Blanks and invisible characters don't keep spreadsheets from reading a formula behind them.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    first = next((character for character in value if character.isprintable() and not character.isspace()), "")
    return ("'" if first in _FORMULA or value[:1] in ("\t", "\r", "\n") else "") + printable_text(value)


def export_turns(turns: Iterable[TurnRecord], form: str, out: IO[str]) -> None:
    """Write turns one by one, as ``csv`` with a header row or as ``jsonl``."""
    import csv

    writer = csv.writer(out)  # CRLF line ends (RFC 4180); with others, a carriage return in a text would end the row
    if form == "csv":
        writer.writerow(TURN_COLUMNS)
    for turn in turns:
        row = turn.row()
        if form == "csv":
            writer.writerow(map(csv_cell, row.values()))
        else:
            line = json.dumps(row, ensure_ascii=False)
            out.write(_C1.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n")
