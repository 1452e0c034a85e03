"""`report --html`: the report as one page that needs no network, with charts as Vega-Lite specifications."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agent_infra_core.host import printable_text
from agent_infra_core.insight.history import HistoryFile
from agent_infra_core.insight.report import (
    REPORT_PARTS,
    Block,
    Heading,
    Report,
    Sentence,
    Table,
    VerdictSpan,
    at,
    words,
)
from agent_infra_core.insight.series import SeriesQuery, SessionsQuery, find_sessions, read_series

CHART_POINTS = 600
LISTED_SESSIONS = 1000
LISTED_TURNS = 50
MAX_TEXT = 2000  # characters of a prompt or an answer

# The charts over time: title with unit → series of GET /history.
PANELS: Mapping[str, Sequence[str]] = {
    "turns per minute": ("turns_per_minute", "errors_per_minute", "rejected_per_minute", "aborted_per_minute"),
    "output tokens per second": ("tokens_per_second",),
    "time to first token, ms": ("ttft_ms_p50", "ttft_ms_p95"),
    "inter-token latency, ms": ("itl_ms_p50",),
    "latency of a turn (queue and inference), ms": ("latency_ms_p50", "latency_ms_p95"),
    "turns in flight and waiting": ("in_flight", "queue"),
    "KV cache used, prefix cache hits and GPU use, share": ("kv_usage", "hit_rate", "gpu_utilization"),
    "preemptions": ("preemptions",),
    "turns by finish reason": (),  # whichever there are
}


def _chart_config(text: str, lines: Sequence[str]) -> dict[str, Any]:
    return {
        "background": "transparent",
        "view": {"stroke": None},
        "axis": dict.fromkeys(("labelColor", "titleColor", "domainColor", "tickColor"), text) | {"gridColor": "#8884"},
        "legend": {"labelColor": text, "titleColor": text, "orient": "top", "title": None},
        "title": {"color": text, "anchor": "start", "fontSize": 12, "fontWeight": "normal"},
        "rule": {"color": text},
        "range": {"category": list(lines)},
    }


# The page's colours: text at least 4.5:1 on its background, lines at least 3:1.
CHART_CONFIGS = {
    "light": _chart_config("#4f5965", ("#1f5fb4", "#b0448f", "#0b8076", "#7a6a00", "#6d4fc2", "#59626d")),
    "dark": _chart_config("#b4bcc6", ("#5a96e6", "#e08ac4", "#3fc4b0", "#d2bd4a", "#b39df0", "#98a2ad")),
}
_CHART = {
    "$schema": "https://vega.github.io/schema/vega-lite/v6.json",  # a name; nothing is loaded from there
    "config": CHART_CONFIGS["light"],  # the page sets the one of the reader's scheme
}


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
        sessions = turns = ""
        if report.turns:
            specs |= {"over-time": timeline_spec(self._series()), "stages": stages_spec(report.durations())}
            hint = "<p>Drag to move, scroll to zoom: all charts follow.</p>"
            overview += ['<div id="over-time"></div>', hint, _blocks(report.throughput())]
            sessions, turns = self._sessions(), self._turns()
            if rows := self._operating():
                specs["capacity"] = capacity_spec(rows)
                analysis.append('<div id="capacity"></div>')
            analysis += ['<div id="stages"></div>', _blocks(report.durations()), _blocks(report.waste())]
        parts = {
            "Overview": "\n".join(overview),
            "Sessions": sessions,
            "Turns": turns,
            "Analysis": "\n".join(analysis),
            "Replicas": _blocks(report.replica_time()),
        }
        sections = {title: _section(title, body) for title, body in parts.items() if body}
        return _PAGE.format(
            title=_escape(report.title),
            style=_STYLE,
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
        return f"<p>{listed}{_count(found['total'], 'session')}</p>{_table(heads, rows, is_searchable=True)}"

    def _turns(self) -> str:
        failed = self._listed("outcome IN ('error', 'cut', 'rejected')", "id DESC")
        slow = self._listed("outcome = 'completed'", "queue_ms + inference_ms DESC")
        heads = ("at", "session", "outcome", "status", "replica", "queue s", "first token s", "inference s")
        columns = (*heads, "error", "prompt", "answer")
        parts = ["<h3>The last that failed or were refused</h3>", _table(columns, failed)] if failed else []
        return "".join([*parts, "<h3>The slowest</h3>", _table(columns, slow, is_searchable=True)])

    def _listed(self, where: str, order: str) -> list[tuple[Any, ...]]:
        query = (
            "SELECT finished_at, session, outcome, status, backend, queue_ms / 1000, ttft_ms / 1000, "
            "inference_ms / 1000, error, prompt, answer "
            f"FROM turns WHERE finished_at >= ? AND {where} ORDER BY {order} LIMIT {LISTED_TURNS}"
        )
        rows = self._file.query(query, self._since)
        return [
            (at(finished_at, "%Y-%m-%d %H:%M:%S"), *figures, *((text or "")[:MAX_TEXT] or None for text in texts))
            for finished_at, *figures, error, prompt, answer in rows
            for texts in [(error, prompt, answer)]
        ]

    def _operating(self) -> list[dict[str, Any]]:
        """Agents, throughput and verdict of each minute for which the analysis had them."""
        names = ("model", "verdict", "agents", "turns_per_hour", "suggested_agents")
        rows = self._file.query(
            f"SELECT CAST(at * 1000 AS INTEGER), {', '.join(names)} FROM verdicts "
            "WHERE at >= ? AND agents IS NOT NULL AND turns_per_hour IS NOT NULL ORDER BY id DESC LIMIT 2000",
            self._since,
        )
        return [dict(zip(("at", *names), row, strict=True)) for row in rows]


def timeline_spec(document: Mapping[str, Any]) -> dict[str, Any]:
    """A Vega-Lite specification of all charts over time, which zoom together, from the body of GET /history."""
    series = document["series"]
    reasons = [name for name in series if name.startswith("finish_reasons.")]
    panels = {title: [name for name in names or reasons if name in series] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if any(_has_figures(series[name]) for name in names)}
    times = [at_s * 1000 for at_s in series["at"]]
    charts = [_panel(title, {_label(name): series[name] for name in names}, times) for title, names in panels.items()]
    runs = [{"at": run["from"] * 1000, "run": run["name"]} for run in document["runs"]]
    if runs and charts:
        charts[0]["layer"].append(
            {
                "data": {"values": runs},
                "mark": {"type": "rule", "strokeDash": [4, 4], "strokeWidth": 1.5, "clip": True},
                "encoding": {"x": {"field": "at", "type": "temporal"}, "tooltip": {"field": "run", "title": "run"}},
            }
        )
    return {
        **_CHART,
        "params": [
            {
                "name": "zoom",
                "select": {"type": "interval", "encodings": ["x"]},
                "bind": "scales",
                "views": list(panels),  # not the layer with the runs
            }
        ],
        "vconcat": charts,
        "spacing": 18,
        "resolve": {"scale": {"x": "shared", "color": "independent"}},
    }


def _label(name: str) -> str:
    """``ttft_ms_p50`` → ``ttft p50``; the unit is in the title."""
    return name.removeprefix("finish_reasons.").replace("_ms", "").replace("_per_minute", "").replace("_", " ")


def _has_figures(values: Iterable[float | None]) -> bool:
    return any(value is not None for value in values)


def _panel(title: str, series: Mapping[str, Sequence[float | None]], times: Sequence[int]) -> dict[str, Any]:
    """One chart over time: figures are of whole steps, and nothing is drawn where there are none.

    Names are data, never fields: a finish reason may be any text.
    """
    names = list(series)
    rows = [
        {"at": moment, "name": name, "value": value}
        for name, values in series.items()
        for moment, value in zip(times, values, strict=True)
    ]
    return {
        "title": title,
        "height": 110,
        "data": {"values": rows},
        "layer": [
            {
                "name": title,
                "mark": {
                    "type": "line",
                    "interpolate": "step-after",
                    "strokeWidth": 1.5,
                    "clip": True,
                    "tooltip": True,
                },
                "encoding": {
                    "x": {"field": "at", "type": "temporal", "axis": {"title": None, "grid": False}},
                    "y": {"field": "value", "type": "quantitative", "axis": {"title": None, "tickCount": 3}},
                    "color": {
                        "field": "name",
                        "type": "nominal",
                        "scale": {"domain": names},
                        **({"legend": None} if len(names) == 1 else {}),
                    },
                },
            }
        ],
    }


def stages_spec(durations: Sequence[Block]) -> dict[str, Any]:
    """A Vega-Lite specification of where the time of a turn went, from Report.durations()."""
    [table] = [block for block in durations if isinstance(block, Table)]
    names = {f"{part}: {meaning}": meaning for part, meaning in REPORT_PARTS.items()}
    rows = [
        {"stage": names.get(row[0], row[0]), "statistic": statistic, "seconds": row[column]}
        for row in table.rows
        for column, statistic in ((2, "mean"), (5, "p95"))
    ]
    return {
        **_CHART,
        "data": {"values": rows},
        "height": {"step": 14},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "y": {"field": "stage", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 240}},
            "yOffset": {"field": "statistic", "sort": None},
            "x": {"field": "seconds", "type": "quantitative", "axis": {"title": "seconds", "tickCount": 6}},
            "color": {"field": "statistic", "scale": {"domain": ["mean", "p95"]}},
        },
    }


def capacity_spec(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A Vega-Lite specification of agents against throughput, minute by minute, with the latest suggestion."""
    suggested = [row for row in rows[:1] if row["suggested_agents"] is not None]
    points = {
        "mark": {"type": "point", "filled": True, "size": 40, "opacity": 0.7, "tooltip": {"content": "data"}},
        "encoding": {
            "x": {"field": "agents", "type": "quantitative", "axis": {"title": "agents in parallel", "tickCount": 6}},
            "y": {
                "field": "turns_per_hour",
                "type": "quantitative",
                "axis": {"title": "turns per hour", "tickCount": 5},
            },
            "color": {"field": "verdict", "type": "nominal"},
            "shape": {"field": "model", "type": "nominal"},
        },
    }
    rule = {
        "data": {"values": [dict(row) for row in suggested]},
        "mark": {"type": "rule", "strokeDash": [4, 4], "strokeWidth": 1.5},
        "encoding": {
            "x": {"field": "suggested_agents", "type": "quantitative"},
            "tooltip": {"field": "suggested_agents", "title": "suggested agents"},
        },
    }
    return {
        **_CHART,
        "title": "agents and throughput, minute by minute; dashed: the agents suggested last",
        "data": {"values": [dict(row) for row in rows]},
        "height": 240,
        "layer": [points, rule] if suggested else [points],
    }


def _escape(value: object) -> str:
    return html.escape(printable_text(str(value)))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _section(title: str, body: str) -> str:
    return f'<section id="{title.lower()}"><h2>{title}</h2>{body}</section>'


def _blocks(blocks: Iterable[Block]) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h3>{_escape(block.text)}</h3>" if block.level > 1 else "")
        elif isinstance(block, Sentence):
            parts.append(f"<p>{_escape(block.text)}</p>")
        elif isinstance(block, VerdictSpan):
            told = f"{_escape(block.where)}: <strong>{_escape(block.verdict)}</strong>{_escape(block.rest)}"
            parts.append(f'<p class="verdict">{told}. {_escape(block.sentence)}</p>')
        else:
            parts.append(_table(block.heads, block.rows, first_figure=1))
    return "\n".join(parts)


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], is_searchable: bool = False, first_figure: int | None = None
) -> str:
    """A table whose columns are sorted by their heads. Long text may be opened in place.

    Columns from ``first_figure`` on are figures, even if they come as text.
    """
    head = "".join(f'<th scope="col"><button>{_escape(name)}</button></th>' for name in heads)
    last_text = len(heads) if first_figure is None else first_figure
    cells = ("".join(_cell(value, number >= last_text) for number, value in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    search = '<input type="search" placeholder="Search" aria-label="Search this table">' if is_searchable else ""
    return f'{search}<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any, is_figure: bool) -> str:
    if isinstance(value, (int, float)):
        return f'<td class="figure" data-value="{value!r}">{_escape(words(value))}</td>'
    text = words(value) if value is None else str(value)
    if len(text) <= 60 and "\n" not in text:
        return f"<td{' class=figure' * is_figure}>{_escape(text)}</td>"
    short, whole = _escape(" ".join(text[:60].split())), "\n".join(map(_escape, text.split("\n")))
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
