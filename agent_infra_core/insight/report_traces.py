"""Sessions as waterfalls for `report --html`: their turns on one time axis, as HTML that needs no script. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from agent_infra_core.host import printable_text
from agent_infra_core.insight.report import words

MAX_TRACE_TEXT = 500  # characters of a prompt or an answer
# The phases of a turn in their order on the time axis; the first two are before its arrival.
PHASES = {
    "think": "the agent observes and acts, before the turn",
    "idle": "time before the turn that the agent didn't explain",
    "queued": "waiting for a slot",
    "held": "waiting for room in a KV cache",
    "retry": "lost at a replica that failed",
    "replayed prefill": "reading tokens again that should have been cached",
    "prefill": "reading the prompt, until the first token",
    "decode": "writing the answer",
    "inference": "reading and writing; it wasn't streamed, so no more is known",
}
BEFORE = ("think", "idle")
_STEPS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, *(1000 * s for s in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)))
MOST_TICKS = 5


def phases_of(turn: Mapping[str, Any]) -> dict[str, float]:
    """The known phases of a row of GET /stats/sessions/{id}, in ms."""
    known = {name: turn[f"{name.replace(' ', '_')}_ms"] for name in PHASES}
    if known["decode"] is not None:
        known["inference"] = None
    if known["think"] is not None and known["idle"] is not None:
        known["think"] -= known["idle"]  # think_ms is the whole gap
    return {name: ms for name, ms in known.items() if ms is not None and ms > 0}


def waterfall(turns: Sequence[Mapping[str, Any]]) -> str:
    """The turns of one session, rows of GET /stats/sessions/{id}, as HTML; each may be opened."""
    rows = []
    for turn in sorted(turns, key=lambda turn: int(turn["number"])):
        if turn["started_at"] is not None:
            phases = phases_of(turn)
            rows.append((turn, phases, 1000 * turn["started_at"] - sum(phases.get(name, 0.0) for name in BEFORE)))
    begin = min((at for _, _, at in rows), default=0.0)
    span = max([1.0, *(at + sum(phases.values()) - begin for _, phases, at in rows)])
    ticks = "".join(f'<span style="left:{100 * ms / span:.2f}%">{duration(ms)}</span>' for ms in _ticks(span))
    lines = [_row(turn, phases, (at - begin) / span, span) for turn, phases, at in rows]
    return f'<div class="axis"><span></span><div>{ticks}</div><span></span></div>{"".join(lines)}'


def _row(turn: Mapping[str, Any], phases: Mapping[str, float], left: float, span: float) -> str:
    bars = []
    for name, ms in phases.items():
        place = f"left:{100 * left:.3f}%;width:{100 * ms / span:.3f}%"
        bars.append(f'<span class="{name.replace(" ", "-")}" style="{place}"></span>')
        left += ms / span
    is_bad = turn["outcome"] not in ("completed", "aborted")
    cells = f'<span>{turn["number"]}</span><span class="lane">{"".join(bars)}</span>'
    title = ", ".join(f"{name} {duration(ms)}" for name, ms in phases.items()) or "no times known"
    note = f'<span class="note{" bad" * is_bad}">{escape(_note(turn, phases))}</span>'
    texts = "".join(
        f"<p>{name}</p><pre>{_lines(turn[name])}</pre>" for name in ("error", "prompt", "answer") if turn[name]
    )
    facts = escape("\n".join(f"{name}: {text}" for name, text in _facts(turn, phases)))
    return f'<details><summary class="row" title="{title}">{cells}{note}</summary>{texts}<pre>{facts}</pre></details>'


def _note(turn: Mapping[str, Any], phases: Mapping[str, float]) -> str:
    """A turn's length without think time, and what went wrong."""
    took = sum(ms for name, ms in phases.items() if name not in BEFORE)
    parts = [duration(took) if took else words(None)]
    if turn["outcome"] != "completed":
        parts.append(turn["outcome"])
    if turn["miss_reason"]:
        parts.append("cache miss")
    return " · ".join(parts)


def _facts(turn: Mapping[str, Any], phases: Mapping[str, float]) -> list[tuple[str, str]]:
    """What is known of a turn, as (name, text)."""
    outcome = turn["outcome"] + (f", HTTP {turn['status']}" if turn["status"] else "")
    if turn["retries"]:
        outcome += f", retried {'once' if turn['retries'] == 1 else str(turn['retries']) + ' times'}"
    tokens = f"{words(turn['tokens_in'])} in, {words(turn['tokens_out'])} out"
    cached = f"{words(turn['cached_tokens'])} of {words(turn['tokens_in'])} input tokens"
    if turn["expected_cached_tokens"] is not None:
        cached += f", {words(turn['expected_cached_tokens'])} expected"
    return [
        ("outcome", outcome),
        ("replica", words(turn["replica"])),
        ("tokens", ("≈ " if turn["tokens_estimated"] else "") + tokens),
        ("cached", cached),
        *((name, duration(ms)) for name, ms in phases.items()),
        *([("cache miss", words(turn["miss_reason"]))] if turn["miss_reason"] else []),
    ]


def _lines(text: str) -> str:
    """A text that may be shortened, with its line ends."""
    shown = text[:MAX_TRACE_TEXT] + (" …" if len(text) > MAX_TRACE_TEXT else "")
    return "\n".join(map(escape, shown.split("\n")))


def duration(ms: float) -> str:
    """A duration with about three digits: 0.4 ms, 340 ms, 3.21 s, 2 min 05 s, 3 h 12 min, 2 d 3 h."""
    if ms < 999.5:
        return f"{ms:.1f} ms" if 0 < ms < 9.95 else f"{ms:.0f} ms"
    if ms < 59_950:
        return f"{ms / 1000:.{2 if ms < 9995 else 1}f} s"
    seconds = round(ms / 1000)
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    size, unit, part, part_unit = next(row for row in units if seconds >= row[0])
    rest = seconds % size // part
    return f"{seconds // size} {unit}" + (f" {rest:0{1 if unit == 'd' else 2}d} {part_unit}" if rest else "")


def _ticks(span_ms: float) -> list[float]:
    """Round times from 0 to ``span_ms``, at most MOST_TICKS steps."""
    step = next((step for step in _STEPS_MS if span_ms / step <= MOST_TICKS), 0)
    step = step or 3_600_000 * math.ceil(span_ms / 3_600_000 / MOST_TICKS)
    return [index * step for index in range(int(span_ms / step) + 1)]


def escape(value: object) -> str:
    """A text as HTML, without control characters."""
    return html.escape(printable_text(str(value)))


LEGEND = "".join(
    f'<li title="{html.escape(meaning)}"><span class="swatch {name.replace(" ", "-")}"></span>{name}</li>'
    for name, meaning in PHASES.items()
)

# The colours of the page's trace.
TRACE_STYLE = """
:root { --think: light-dark(#8172b3, #9a8bd0); --queued: light-dark(#59626d, #98a2ad);
  --prefill: light-dark(#1f5fb4, #5a96e6); --decode: light-dark(#0b8076, #3fc4b0);
  --inference: light-dark(#23809f, #5db3cf); --lost: light-dark(#b45309, #f0a860);
  --bad: light-dark(#ab1f17, #f4938b); --none: light-dark(#6f7a87, #8994a1); }
.think { background: var(--think); } .queued { background: var(--queued); } .prefill { background: var(--prefill); }
.decode { background: var(--decode); } .inference { background: var(--inference); } .retry { background: var(--bad); }
.held { background: repeating-linear-gradient(135deg, var(--queued) 0 3px, transparent 3px 6px); }
.replayed-prefill { background: repeating-linear-gradient(135deg, var(--lost) 0 3px, var(--prefill) 3px 6px); }
.idle { background: repeating-linear-gradient(135deg, var(--none) 0 2px, transparent 2px 6px); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 0; list-style: none; font-size: .85rem; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.trace { margin: .4rem 0; } .trace > summary { overflow-wrap: anywhere; }
.axis, .row { display: grid; grid-template-columns: 3.5ch minmax(0, 1fr) 23ch; gap: 0 12px; align-items: center; }
.axis { height: 20px; font-size: .8rem; color: var(--grey); } .axis div { position: relative; height: 100%; }
.axis div span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis div span:first-child { transform: none; }
.row { height: 24px; font-size: .85rem; font-variant-numeric: tabular-nums; } .row:hover { background: #8882; }
.row > span:first-child { text-align: right; color: var(--grey); }
.lane { position: relative; height: 100%; border-left: 1px solid var(--line); }
.lane span { position: absolute; top: 5px; height: 14px; min-width: 2px; border-radius: 1px; }
.lane .think, .lane .idle { top: 10px; height: 4px; }
.note { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; color: var(--grey); }
.note.bad { color: var(--bad); font-weight: 600; }
.trace details > :not(summary) { margin-left: calc(3.5ch + 12px); }
@media (max-width: 700px) { .axis, .row { grid-template-columns: 3ch minmax(0, 1fr) 14ch; gap: 0 6px; }
  .axis div span:nth-child(even) { display: none; } }
"""
