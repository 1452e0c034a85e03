"""`report --html`: the report as one page that needs no network, with charts as Vega-Lite specifications."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from agent_infra_core.insight.history import HistoryFile
from agent_infra_core.insight.report import (
    Block,
    Heading,
    Report,
    Sentence,
    VerdictSpan,
    at,
    capacity,
    count,
    label,
    words,
)
from agent_infra_core.insight.report_charts import CHART_CONFIGS, capacity_spec, stages_spec, timeline_spec
from agent_infra_core.insight.report_traces import LEGEND, MAX_TRACE_TEXT, TRACE_STYLE, escape, waterfall
from agent_infra_core.insight.series import SeriesQuery, SessionsQuery, SessionTurns, find_sessions, read_series

CHART_POINTS = 600
LISTED_SESSIONS = 1000
LISTED_TURNS = 50
MAX_TEXT = 2000  # characters of a prompt or an answer
TRACED_SESSIONS = 10  # of each kind: with turns that failed, and with the slowest turns
TRACED_TURNS = 100  # of one session, the latest
MEASURED_MINUTES = 2000
FAILED = "outcome IN ('error', 'cut', 'rejected')"
COMPLETED, SLOWEST = "outcome = 'completed'", "queue_ms + inference_ms"


class HtmlReport:
    """The page: the figures of the text report, charts, sessions, and the turns that failed or took longest.

    Whatever agents and clients wrote is escaped, and the page may load nothing.
    """

    def __init__(self, file: HistoryFile, report: Report, since: float, now: float) -> None:
        """``report`` is of the same file and time."""
        self._file, self._report, self._since, self._now = file, report, since, now

    def page(self, script: str) -> str:
        """The whole page. ``script`` defines ``vegaEmbed``."""
        report, specs = self._report, dict[str, Any]()
        overview, analysis = [_blocks(report.summary())], [_blocks(report.verdicts())]
        sessions = turns = traces = ""
        if report.turns:
            specs |= {"over-time": timeline_spec(self._series()), "stages": stages_spec(report.durations())}
            hint = "<p>Drag to move, scroll to zoom: all charts follow.</p>"
            overview += ['<div id="over-time"></div>', hint, _blocks(report.runs()), _blocks(report.throughput())]
            traced = self._traced()
            sessions, turns, traces = self._sessions(), self._turns(traced), self._traces(traced)
            analysis += self._capacity(specs)
            analysis += [_blocks(report.durations()), '<div id="stages"></div>', _blocks(report.waste())]
        parts = {
            "Overview": "\n".join(overview),
            "Sessions": sessions,
            "Turns": turns,
            "Traces": traces,
            "Analysis": "\n".join(analysis),
            "Replicas": _blocks(report.replica_time()),
        }
        sections = {title: _section(title, body) for title, body in parts.items() if body}
        return _PAGE.format(
            title=escape(report.title),
            style=_STYLE + TRACE_STYLE,
            body="\n".join(sections.values()),
            links="".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections),
            # JSON inside a script element: nothing in it may end the element.
            specs=json.dumps(specs).replace("<", "\\u003c"),
            library=script.replace("</script", "<\\/script"),
            program=_PROGRAM,
        )

    def _series(self) -> dict[str, Any]:
        first, last = self._report.span
        query = SeriesQuery(max(self._since, first), last, CHART_POINTS)
        return read_series(self._file, query, max(self._now, last))

    def _sessions(self) -> str:
        found = find_sessions(self._file, [], SessionsQuery(since=self._since, limit=LISTED_SESSIONS))
        heads = (
            *("session", "task", "client", "model", "from", "to", "turns", "errors"),
            *("tokens in", "cached", "tokens out", "queued s", "inference s", "think s", "last replica"),
        )
        rows = [
            (
                *(row["id"], row["task"], row["client"], row["model"]),
                *(None if row["started_at"] is None else at(row["started_at"]), at(row["last_at"])),
                *(row["turns"], row["errors"], row["tokens_in"], row["cached_tokens"], row["tokens_out"]),
                *(row["queued_s"], row["inference_s"], row["think_s"], row["replica"]),
            )
            for row in found["sessions"]
        ]
        listed = f"showing the {len(rows):,} most recent of " if found["total"] > len(rows) else ""
        return f"<p>{listed}{count(found['total'], 'session')}</p>{_table(heads, rows, is_searchable=True)}"

    def _turns(self, traced: Sequence[str]) -> str:
        failed, slow = (
            [
                (moment, _Link(name, f"trace-{traced.index(name)}") if name in traced else name, *rest)
                for moment, name, *rest in rows
            ]
            for rows in (self._listed(FAILED, "id"), self._listed(COMPLETED, SLOWEST))
        )
        heads = ("at", "session", "outcome", "status", "replica", "queue s", "first token s", "inference s")
        columns = (*heads, "error", "prompt", "answer")
        parts = ["<h3>The last that failed or were refused</h3>", _table(columns, failed)] if failed else []
        return "".join([*parts, "<h3>The slowest</h3>", _table(columns, slow, is_searchable=True)])

    def _listed(self, where: str, order: str) -> list[tuple[Any, ...]]:
        query = (
            "SELECT finished_at, session, outcome, status, backend, queue_ms / 1000, ttft_ms / 1000, "
            "inference_ms / 1000, error, prompt, answer "
            f"FROM turns WHERE finished_at >= ? AND {where} ORDER BY {order} DESC LIMIT {LISTED_TURNS}"
        )
        rows = self._file.query(query, self._since)
        return [
            (at(finished_at, "%Y-%m-%d %H:%M:%S"), *figures, *((text or "")[:MAX_TEXT] or None for text in texts))
            for finished_at, *figures, error, prompt, answer in rows
            for texts in [(error, prompt, answer)]
        ]

    def _traces(self, names: Sequence[str]) -> str:
        """These sessions as waterfalls."""
        if not names:
            return ""
        hint = (
            f"The {TRACED_SESSIONS} sessions that failed last and the {TRACED_SESSIONS} with the slowest turns: the "
            f"last {TRACED_TURNS} turns of each, with up to {MAX_TRACE_TEXT} characters of prompts and answers."
        )
        traces: list[str] = []
        for number, name in enumerate(names):
            turns = SessionTurns(TRACED_TURNS, None)
            turns.add(self._file.turns(session=name, since=self._since))
            rows = turns.latest_first()
            failures = sum(row["outcome"] not in ("completed", "aborted") for row in rows)
            facts = [count(turns.count, "turn"), f"{failures} failed" if failures else "", rows[0]["model"] or ""]
            title = escape(" · ".join(filter(None, (name, *facts))))
            # Browsers open what a link leads into, but not what it leads to.
            inner = f'<summary>{title}</summary><div id="trace-{number}">{waterfall(rows)}</div>'
            traces.append(f'<details class="trace"{" open" * (number == 0)}>{inner}</details>')
        return f'<p>{hint}</p><ul class="legend">{LEGEND}</ul>{"".join(traces)}'

    def _traced(self) -> list[str]:
        """The sessions with which the two lists of turns begin."""
        query = (
            "SELECT session FROM turns WHERE finished_at >= ? AND session IS NOT NULL AND {} "
            f"GROUP BY session ORDER BY {{}} DESC LIMIT {TRACED_SESSIONS}"
        )
        orders = ((FAILED, "max(id)"), (COMPLETED, f"max({SLOWEST})"))
        rows = [row for kind in orders for row in self._file.query(query.format(*kind), self._since)]
        return list(dict.fromkeys(name for (name,) in rows))

    def _capacity(self, specs: dict[str, Any]) -> list[str]:
        """For each model and GPU type what the analysis says, and a chart, whose specification goes into ``specs``."""
        entries = {(entry["model"], entry["gpu"]): entry for entry in self._report.analyses()}
        minutes: dict[tuple[str, str | None], list[dict[str, Any]]] = {key: [] for key in entries}
        rows = self._file.query(
            "SELECT model, gpu, CAST(at * 1000 AS INTEGER), verdict, agents, turns_per_hour FROM verdicts WHERE "
            f"at >= ? AND agents IS NOT NULL AND turns_per_hour IS NOT NULL ORDER BY id DESC LIMIT {MEASURED_MINUTES}",
            self._since,
        )
        for model, gpu, *figures in rows:
            row = dict(zip(("at", "verdict", "agents", "turns_per_hour"), figures, strict=True))
            minutes.setdefault((model, gpu), []).append(row)
        parts = []
        for number, (key, measured) in enumerate(minutes.items()):
            entry, place = entries.get(key), f"capacity-{number}"
            specs[place] = capacity_spec(entry, measured)
            without: list[Block] = [
                Heading(f"Capacity of {label(*key)}"),
                Sentence("No curve: too little is known to predict throughput."),
            ]
            parts += [_blocks(capacity(entry) if entry else without), f'<div id="{place}"></div>']
        return parts


def _section(title: str, body: str) -> str:
    return f'<section id="{title.lower()}"><h2>{title}</h2>{body}</section>'


def _blocks(blocks: Iterable[Block]) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h3>{escape(block.text)}</h3>" if block.level > 1 else "")
        elif isinstance(block, Sentence):
            parts.append(f"<p>{escape(block.text)}</p>")
        elif isinstance(block, VerdictSpan):
            told = f"{escape(block.where)}: <strong>{escape(block.verdict)}</strong>{escape(block.rest)}"
            parts.append(f'<p class="verdict">{told}. {escape(block.sentence)}</p>')
        else:
            parts.append(_table(block.heads, block.rows, first_figure=1))
    return "\n".join(parts)


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], is_searchable: bool = False, first_figure: int | None = None
) -> str:
    """A table whose columns are sorted by their heads. Long text may be opened in place.

    Columns from ``first_figure`` on are figures, even if they come as text.
    """
    head = "".join(f'<th scope="col"><button>{escape(name)}</button></th>' for name in heads)
    last_text = len(heads) if first_figure is None else first_figure
    cells = ("".join(_cell(value, number >= last_text) for number, value in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    search = '<input type="search" placeholder="Search" aria-label="Search this table">' if is_searchable else ""
    return f'{search}<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class _Link:
    """A text that leads to another place of the page."""

    text: str
    place: str


def _cell(value: Any, is_figure: bool) -> str:
    if isinstance(value, _Link):
        short = value.text[:60] + " …" * (len(value.text) > 60)
        return f'<td><a href="#{value.place}">{escape(short)}</a></td>'
    if isinstance(value, (int, float)):
        return f'<td class="figure" data-value="{value!r}">{escape(words(value))}</td>'
    text = words(value) if value is None else str(value)
    if len(text) <= 60 and "\n" not in text:
        return f"<td{' class=figure' * is_figure}>{escape(text)}</td>"
    short, whole = escape(" ".join(text[:60].split())), "\n".join(map(escape, text.split("\n")))
    return f"<td><details><summary>{short} …</summary><pre>{whole}</pre></details></td>"


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --grey: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --grey: #a3a3a3; } body { background: #16181c; color: #e6e6e6; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { border-top: 1px solid var(--line); padding-top: 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; } p { color: var(--grey); } .verdict { color: inherit; }
.table { overflow-x: auto; max-height: 70vh; margin: .5rem 0 1.5rem; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
td { vertical-align: top; white-space: nowrap; }
td:has(details) { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
.figure { text-align: right; font-variant-numeric: tabular-nums; }
th { text-align: left; white-space: nowrap; } th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; } th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
pre { white-space: pre-wrap; max-width: 40rem; margin: .3rem 0; } summary { cursor: pointer; }
input[type=search] { font: inherit; padding: .2rem .5rem; width: min(20rem, 90%); }
section > div { max-width: 100%; overflow-x: auto; }
"""

_PROGRAM = (
    f"const configs = {json.dumps(CHART_CONFIGS)};"
    + """
const config = configs[matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"];
for (const [name, spec] of Object.entries(JSON.parse(document.getElementById("specs").textContent))) {
  const place = document.getElementById(name), width = Math.max(260, place.clientWidth - 110);
  for (const chart of spec.vconcat || [spec]) chart.width = width - (name === "stages" ? 140 : 0);
  const actions = {export: true, source: false, compiled: false, editor: false};
  vegaEmbed(place, {...spec, config}, {renderer: "svg", actions})
    .catch(error => { place.textContent = "This chart cannot be drawn: " + error; });
}
for (const table of document.querySelectorAll("table")) {
  const rows = [...table.tBodies[0].rows];
  table.tHead.addEventListener("click", event => {
    const head = event.target.closest("th");
    if (!head) return;
    const falls = head.getAttribute("aria-sort") === "ascending", column = head.cellIndex;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falls ? "descending" : "ascending");
    const value = row => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent.toLowerCase() : Number(cell.dataset.value);
    };
    const compare = (a, b) => typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : a < b ? -1 : a > b ? 1 : 0;
    rows.sort((a, b) => (falls ? -1 : 1) * compare(value(a), value(b)));
    table.tBodies[0].append(...rows);
  });
  const search = table.parentElement.previousElementSibling;
  if (search && search.type === "search") search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
"""
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<nav>{links}</nav>
{body}
<script type="application/json" id="specs">{specs}</script>
<script>{library}</script>
<script>{program}</script>
</body>
</html>
"""
