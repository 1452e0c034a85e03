"""The `report` verb: what happened in a run, from the history, as blocks and as Markdown."""

from __future__ import annotations

import collections
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent_infra_core.insight.capacity import Basis, Estimate, change_in_words, percent
from agent_infra_core.insight.export import read_history
from agent_infra_core.insight.gpu_hours import OCCUPYING_STATES, grouped, hours_by_state
from agent_infra_core.insight.history import VERDICT_COLUMNS, HistoryFile, history_path, ratio
from agent_infra_core.insight.turns import in_seconds
from agent_infra_core.insight.verdict import sure_in_words
from agent_infra_core.insight.waste import KEPT_PREFILLS, TurnTime, gpu_time

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
REPORT_RUNS = 100
_REPORT_STEPS_S = (60, 300, 900, 3600, 4 * 3600, 86400, 7 * 86400)


@dataclass(frozen=True)
class Heading:
    """The title of the report (level 1) or of a section (2)."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Sentence:
    """A line of text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Figures and words, of which None is unknown. All columns but the first are figures."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class VerdictSpan:
    """A verdict that stood for a while, and what the analysis said of it."""

    where: str  # time, model and GPU type
    verdict: str
    rest: str  # flags and confidence
    sentence: str


Block = Heading | Sentence | Table | VerdictSpan


def markdown(blocks: Iterable[Block]) -> str:
    """The text of a report."""
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, VerdictSpan):
            lines.append(f"- {block.where}: **{block.verdict}**{block.rest}. {words(block.sentence)}")
            continue
        if lines and lines[-1]:
            lines.append("")
        if isinstance(block, Heading):
            lines += ["#" * block.level + f" {block.text}", ""]
        elif isinstance(block, Sentence):
            lines += [block.text, ""]
        else:
            lines += ["| " + " | ".join(block.heads) + " |", "|---" + "|---:" * (len(block.heads) - 1) + "|"]
            lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in block.rows] + [""]
    return "\n".join(lines if not lines or not lines[-1] else [*lines, ""])


def _cell(value: Any) -> str:
    return words(value).replace("|", "\\|")


def words(value: Any) -> str:
    """Format a figure or a text of one line; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split())


def at(moment: float, form: str = "%Y-%m-%d %H:%M") -> str:
    return time.strftime(form, time.localtime(moment))


def report_text(setting: str | None, default: Path, title: str, since: float) -> str:
    """The report of a deployment's history: ``setting`` is proxy.history, ``default`` the deployment's own file."""
    path = history_path(setting, default)
    if path is None:
        return f'# {title}\n\nproxy.history is "off": turns are not kept.'
    with read_history(path) as file:
        return Report(file, title, since).text() if file else f"# {title}\n\nNo turns yet."


class Report:
    """A report of the turns that finished at ``since`` or later, and of replica time and verdicts since."""

    def __init__(self, file: HistoryFile, title: str, since: float) -> None:
        self._file, self.title, self._since = file, title, since
        self._first, self._last, self.turns, self._completed, self._sessions, self._tasks = self._row(
            "min(coalesce(started_at, finished_at)), max(finished_at), count(*), "
            "coalesce(sum(outcome = 'completed'), 0), count(DISTINCT session), count(DISTINCT task)"
        )
        self._replicas_since = since
        [[row, oldest]] = file.query("SELECT min(id), min(finished_at) FROM turns")
        # Ids start at 1, and the oldest turns are removed first. Leave out replica time from before the first one left.
        self._is_trimmed = row is not None and row > 1 and oldest > since
        if self._is_trimmed:
            self._first = self._replicas_since = oldest

    def _rows(self, columns: str, rest: str = "", *values: Any) -> list[tuple[Any, ...]]:
        return self._file.query(f"SELECT {columns} FROM turns WHERE finished_at >= ? {rest}", self._since, *values)

    def _row(self, columns: str) -> tuple[Any, ...]:
        return self._rows(columns)[0]

    def text(self) -> str:
        """The whole report, as Markdown."""
        parts = [self.summary(), self.runs(), self.replica_time(), self.verdicts(), *map(capacity, self.analyses())]
        if self.turns:
            parts[2:2] = [self.throughput(), self.durations()]
            parts.append(self.waste())
        return markdown(block for part in parts for block in part)

    @property
    def span(self) -> tuple[float, float]:
        """When the first turn began and the last one ended, in s since the epoch."""
        return self._first, self._last

    def summary(self) -> list[Block]:
        lines: list[Block] = [Heading(self.title, 1)]
        if not self.turns:
            return [*lines, Sentence("No turns yet." if self._since == 0 else f"No turns since {at(self._since)}.")]
        span_s = self._last - self._first
        tokens_in, tokens_out, cached = self._row("sum(prompt_tokens), sum(completion_tokens), sum(cached_tokens)")
        trimmed = "; turns before that were removed, to keep the history small" if self._is_trimmed else ""
        lines.append(Sentence(f"{at(self._first)} to {at(self._last)}: {words(span_s / 3600)} h{trimmed}"))
        figures: list[tuple[str, Any]] = [
            ("turns", self.turns),
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
        return [*lines, Table(("", "all"), figures)]

    def runs(self) -> list[Block]:
        """The latest announced runs that were not over before."""
        rows = self._file.query(
            "SELECT name, tasks, at, ended FROM runs WHERE coalesce(ended, ?) >= ? ORDER BY at DESC LIMIT ?",
            *(math.inf, self._since, REPORT_RUNS),
        )
        table = [
            (name, tasks, at(began), None if ended is None else at(ended), ended and (ended - began) / 3600)
            for name, tasks, began, ended in rows
        ]
        return [Heading("Runs"), Table(("run", "tasks", "from", "to", "hours"), table)] if table else []

    def throughput(self) -> list[Block]:
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
            table.append((at(n * step), turns, *rates, in_seconds(queue), in_seconds(inference), sessions))
        return [Heading("Throughput"), Table(heads, table), *self._by_replica()]

    def _by_replica(self) -> list[Block]:
        rows = self._rows(
            "coalesce(model, '?'), coalesce(backend, 'none'), count(*), sum(outcome = 'completed'), "
            "sum(completion_tokens), avg(ttft_ms), avg(inference_ms)",
            "GROUP BY 1, 2 ORDER BY 1, 3 DESC LIMIT 100",
        )
        heads = ("model: replica", "turns", "completed", "tokens out", "ttft s, mean", "inference s, mean")
        table = [
            (f"{model}: {replica}", turns, completed, tokens, in_seconds(ttft), in_seconds(inference))
            for model, replica, turns, completed, tokens, ttft, inference in rows
        ]
        return [Table(heads, table)]

    def durations(self) -> list[Block]:
        rows = []
        for part, meaning in REPORT_PARTS.items():
            column = f"{part}_ms"
            values = [row[0] for row in self._rows(column, f"AND {column} IS NOT NULL ORDER BY 1")]
            if values:
                cuts = (values[math.ceil(share * len(values)) - 1] for share in (0.5, 0.9, 0.95, 0.99))
                rows.append((f"{part}: {meaning}", len(values), *map(in_seconds, (sum(values) / len(values), *cuts))))
        heads = ("seconds", "turns", "mean", "p50", "p90", "p95", "p99")
        return [Heading("Where the time of a turn went"), Table(heads, rows)]

    def replica_time(self) -> list[Block]:
        sums = self._file.replica_seconds(self._replicas_since)
        if not sums:
            return []
        rows = []
        for model, of_model in grouped(sums, "model").items():
            kinds = ", ".join(sorted({use.gpu_type for use in of_model} - {""})) or "none"
            rows.append((f"{model}: GPUs ({kinds})", *hours_by_state(of_model, of_gpus=True).values()))
            rows.append((f"{model}: replicas", *hours_by_state(of_model, of_gpus=False).values()))
        lines: list[Block] = [Heading("Replicas and GPUs")]
        lines.append(Table(("hours", *(state.replace("_", ", ") for state in OCCUPYING_STATES)), rows))
        held = {use: seconds for use, seconds in sums.items() if use.state != "pending"}
        gpu_s = sum(seconds * use.gpus for use, seconds in held.items())
        what, total_s = ("GPU-seconds", gpu_s) if gpu_s else ("replica-seconds", sum(held.values()))
        per = (("completed turn", self._completed), ("session", self._sessions), ("task", self._tasks))
        costs = [(f"{what} per {unit}", ratio(total_s, count)) for unit, count in per if count]
        return [*lines, Table(("loading and ready", "all"), costs)] if costs else lines

    def verdicts(self) -> list[Block]:
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
        lines: list[Block] = [Heading("Verdict over time")]
        for span in spans[-REPORT_VERDICTS:]:
            sure = f", {sure_in_words(span['confidence'])}" if span["confidence"] is not None else ""
            flags = f" [{span['flags']}]" if span["flags"] else ""
            where = f"{span['model']} ({span['gpu']})" if span["gpu"] else span["model"]
            when = f"{at(span['at'])}–{at(span['until'], '%H:%M')}"
            lines.append(VerdictSpan(f"{when} {where}", span["verdict"], flags + sure, words(span["sentence"])))
        return lines

    def analyses(self) -> list[dict[str, Any]]:
        """The entry of ``analysis`` in /stats with the last curve, of each model and GPU type."""
        return self._file.analyses(self._since)

    def waste(self) -> list[Block]:
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
        lines: list[Block] = [Heading("Waste"), Table(("", "turns", "tokens", "of tokens in"), rows)]
        if vain_ms:
            lines.append(Sentence(f"Wasted inference: {words(vain_ms / 1000)} s."))
        lines += self._wasted_time()
        reasons: collections.Counter[str] = collections.Counter()
        for reason, count in self._rows("cache_miss, count(*)", "AND cache_miss IS NOT NULL GROUP BY 1"):
            reasons[re.split(r" from | message ", reason)[0]] += count  # without replica names and message numbers
        return [*lines, Table(("why not in the cache", "turns"), reasons.most_common(10))] if reasons else lines

    def _wasted_time(self) -> list[Block]:
        """The GPU time that was wasted, for each model."""
        sums = grouped(self._file.replica_seconds(self._replicas_since), "model")
        by_model = self._rows(
            "model, count(DISTINCT coalesce(task, session)), coalesce(sum(inference_ms), 0) / 1000, "
            "coalesce(sum((outcome <> 'completed') * inference_ms), 0) / 1000, coalesce(sum(retry_ms), 0) / 1000, "
            "coalesce(sum((cache_miss IS NOT NULL AND outcome = 'completed') * "
            "max(0, expected_cached_tokens - cached_tokens)), 0)",
            "AND model IS NOT NULL GROUP BY 1",
        )
        rows = []
        for model, tasks, served_s, aborted_s, retried_s, missed in by_model:
            prefills = self._rows(
                "max(1, prompt_tokens - cached_tokens), ttft_ms / 1000",
                "AND model = ? AND outcome = 'completed' AND prompt_tokens > 0 AND cached_tokens IS NOT NULL "
                f"AND ttft_ms > 0 ORDER BY id DESC LIMIT {KEPT_PREFILLS}",
                model,
            )
            time_of = TurnTime(served_s, aborted_s, retried_s, missed, collections.deque(prefills))
            found = gpu_time(time_of, sums.get(model, {}), tasks)
            figures = ("held", "prefilled_again", "failed", "idle", "wasted", "held_per_task", "wasted_per_task")
            if found["held"]:
                rows.append((f"{model}: {found['unit']}", *(found[name] for name in figures)))
        heads = ("", "held", "prefilled again", "failed, retried", "idle", "wasted", "held per task", "wasted per task")
        return [Table(heads, rows)] if rows else []


def _rate(amount: float | None, seconds: float) -> float | None:
    """``amount`` per second; None for less than REPORT_RATE_S, which is too short to be meaningful."""
    return ratio(amount, seconds) if seconds >= REPORT_RATE_S else None


def _share(part: float | None, whole: float | None) -> str | None:
    share = ratio(part, whole)
    return None if share is None else f"{share:.1%}"


_SHARES = {"agent": "think time of the agents", "base_latency": "unloaded latency", "contention": "contention for GPUs"}
LIMITS = {"knee_agents": "knee", "kv_agents": "KV cache full", "utilisation_agents": "70 % utilisation"}
_OPTIONS = {
    "utilisation": "70 % utilisation",
    "knee": "the knee: more would mostly wait",
    "efficient": "most throughput for its wait",
    "latency_goal": "the latency goal",
}


def capacity(entry: Mapping[str, Any]) -> list[Block]:
    """What an entry of ``analysis`` says: limits, loads with their price, what-ifs, and what it is based on."""
    suggestion, operating = entry["suggestion"], entry["operating"]
    shares = {text: _estimate(entry["verdict"]["shares"][name]) for name, text in _SHARES.items()}
    known = [(text, *_share_and_interval(share)) for text, share in shares.items() if share.value is not None]
    limits = [(text, told(entry["limits"][name]) or entry["limits"][name]["reason"]) for name, text in LIMITS.items()]
    measured = {"name": "measured", "agents": operating["agents"], **suggestion["now"], "change": None}
    suggested = {"name": "suggested", "agents": suggestion["agents"], **suggestion["then"]}
    loads = [
        (
            *(_OPTIONS.get(row["name"], row["name"]), told(row["agents"]), row["turns_per_hour"]["value"]),
            *((row["change"] and change_in_words(_estimate(row["change"]))) or None, told(row["wait_s"])),
        )
        for row in (measured, suggested, *suggestion["options"])
        if told(row["agents"]) is not None
    ]
    what_ifs = [
        (row["name"], row["turns_per_hour"]["value"], *_change_and_interval(_estimate(row["change"])))
        for row in entry["what_ifs"]
    ]
    return [
        Heading(f"Capacity of {label(entry['model'], entry['gpu'])}"),
        Sentence(f"{at(entry['computed_at'])}, {count(entry['replicas'], 'replica')}. {entry['verdict']['sentence']}"),
        Sentence(suggestion["sentence"]),
        *([Table(("throughput is limited by", "share", "interval"), known)] if known else []),
        Table(("limit", "agents"), limits),
        Table(("agents", "number", "turns/h", "change", "wait per turn, s"), loads),
        Table(("what if", "turns/h", "change", "interval"), what_ifs),
        Sentence(_basis(entry)),
    ]


def label(model: str, gpu: str | None) -> str:
    """The name of an entry of ``analysis``."""
    return f"{model} on {gpu}" if gpu else model


def told(value: Mapping[str, Any]) -> str | None:
    """``147 (135 to 159)``, or the interval alone; None if nothing is known."""
    span = f"{words(value['low'])} to {words(value['high'])}" if value["low"] is not None else None
    if value["value"] is None:
        return span
    return words(value["value"]) + (f" ({span})" if span and value["low"] != value["high"] else "")


def _estimate(value: Mapping[str, Any]) -> Estimate:
    return Estimate(**{**value, "basis": Basis(**value["basis"])})


def _share_and_interval(share: Estimate) -> tuple[str, str | None]:
    interval = None if share.low is None or share.high is None else f"{100 * share.low:.0f} to {percent(share.high)}"
    return percent(share.value or 0.0), interval


def _change_and_interval(change: Estimate) -> tuple[str | None, str | None]:
    interval = change_in_words(replace(change, value=None)) or change.reason
    return (change_in_words(change) or None) if change.value is not None else None, interval


def count(number: int, noun: str) -> str:
    """``1 turn``, ``1,200 turns``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _basis(entry: Mapping[str, Any]) -> str:
    """What the model was fitted to, and whether the fit holds."""
    fit, operating, law = entry["fit"], entry["operating"], entry["littles_law"]
    basis = operating["turns_per_hour"]["basis"]
    sentences = [
        f"A turn takes {told(fit['base_latency_s']) or '–'} s alone and {told(fit['per_request_s']) or '–'} s more for "
        f"each turn in flight on its replica; agents think for {told(fit['think_s']) or '–'} s."
    ]
    if law["error"] is not None:
        sentences.append(
            f"Little's law {'holds' if law['holds'] else 'does not hold'}: {words(law['agents_sampled'])} agents seen, "
            f"{words(law['agents_computed'])} computed."
        )
    return " ".join([*sentences, f"From {count(basis['turns'], 'turn')} in {basis['window_s']:,.0f} s."])
