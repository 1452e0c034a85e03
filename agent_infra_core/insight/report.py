"""The `report` verb: a Markdown report of a run, from the history."""

from __future__ import annotations

import collections
import math
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agent_infra_core.insight.export import read_history
from agent_infra_core.insight.gpu_hours import OCCUPYING_STATES, grouped, hours_by_state
from agent_infra_core.insight.history import VERDICT_COLUMNS, HistoryFile, history_path, ratio

REPORT_PARTS = {
    "pre": "observing",
    "queue": "waiting for a slot",
    "ttft": "to the first token",
    "inference": "the whole answer",
    "post": "acting",
    "unaccounted": "think time that the agent did not report",
}
REPORT_ROWS = 24  # in the table of throughput over time, at most
REPORT_RATE_S = 30.0
REPORT_VERDICTS = 100  # only the latest
_REPORT_STEPS_S = (60, 300, 900, 3600, 4 * 3600, 86400, 7 * 86400)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return lines + ["| " + " | ".join(map(_words, row)) + " |" for row in rows] + [""]


def _words(value: Any) -> str:
    """Format a figure or text as a table cell; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")


def _at(moment: float, form: str = "%Y-%m-%d %H:%M") -> str:
    return time.strftime(form, time.localtime(moment))


def report_text(setting: str | None, default: Path, title: str, since: float) -> str:
    """The report of a deployment's history: ``setting`` is proxy.history, ``default`` the deployment's own file."""
    path = history_path(setting, default)
    if path is None:
        return f'# {title}\n\nproxy.history is "off": turns are not kept.'
    with read_history(path) as file:
        return Report(file, title, since).text() if file else f"# {title}\n\nNo turns yet."


class Report:
    """A Markdown report of the turns that finished at ``since`` or later, and of replica time and verdicts since."""

    def __init__(self, file: HistoryFile, title: str, since: float) -> None:
        self._file, self._title, self._since = file, title, since
        self._first, self._last, self._turns, self._completed, self._sessions, self._tasks = self._row(
            "min(coalesce(started_at, finished_at)), max(finished_at), count(*), "
            "coalesce(sum(outcome = 'completed'), 0), count(DISTINCT session), count(DISTINCT task)"
        )
        self._replicas_since = since
        [[row, oldest]] = file.query("SELECT min(id), min(finished_at) FROM turns")
        # Ids start at 1, and the oldest turns are removed first. Leave out replica time from before the first one left.
        self._is_trimmed = row is not None and row > 1 and oldest > since
        if self._is_trimmed:
            self._first = self._replicas_since = oldest

    def _rows(self, columns: str, rest: str = "") -> list[tuple[Any, ...]]:
        return self._file.query(f"SELECT {columns} FROM turns WHERE finished_at >= ? {rest}", self._since)

    def _row(self, columns: str) -> tuple[Any, ...]:
        return self._rows(columns)[0]

    def text(self) -> str:
        """The whole report."""
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
        for model, of_model in grouped(sums, "model").items():
            kinds = ", ".join(sorted({use.gpu_type for use in of_model} - {""})) or "none"
            rows.append((f"{model}: GPUs ({kinds})", *hours_by_state(of_model, of_gpus=True).values()))
            rows.append((f"{model}: replicas", *hours_by_state(of_model, of_gpus=False).values()))
        lines += _table(("hours", *(state.replace("_", ", ") for state in OCCUPYING_STATES)), rows)
        held = {use: seconds for use, seconds in sums.items() if use.state != "pending"}
        gpu_s = sum(seconds * use.gpus for use, seconds in held.items())
        what, total_s = ("GPU-seconds", gpu_s) if gpu_s else ("replica-seconds", sum(held.values()))
        per = (("completed turn", self._completed), ("session", self._sessions), ("task", self._tasks))
        costs = [(f"{what} per {unit}", ratio(total_s, count)) for unit, count in per if count]
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
        is_miss = "cache_miss IS NOT NULL"  # a few missing tokens don't count: engines cache whole blocks
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
            ("prefilled again: expected in the cache but missing", misses, prefilled, _share(prefilled, tokens_in)),
        ]
        lines = ["## Waste", "", *_table(("", "turns", "tokens", "of tokens in"), rows)]
        if vain_ms:
            lines += [f"Wasted inference: {_words(vain_ms / 1000)} s.", ""]
        reasons: collections.Counter[str] = collections.Counter()
        for reason, count in self._rows("cache_miss, count(*)", "AND cache_miss IS NOT NULL GROUP BY 1"):
            reasons[re.split(r" from | message ", reason)[0]] += count  # without replica names and message numbers
        return lines + (_table(("why not in the cache", "turns"), reasons.most_common(10)) if reasons else [])


def _rate(amount: float | None, seconds: float) -> float | None:
    """``amount`` per second; None for less than REPORT_RATE_S, which is too short to be meaningful."""
    return ratio(amount, seconds) if seconds >= REPORT_RATE_S else None


def _share(part: float | None, whole: float | None) -> str | None:
    share = ratio(part, whole)
    return None if share is None else f"{share:.1%}"


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000
