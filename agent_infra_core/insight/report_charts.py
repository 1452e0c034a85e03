"""The charts of `report --html`, as Vega-Lite specifications. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agent_infra_core.insight.report import LIMITS, REPORT_PARTS, Block, Table

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
        "text": {"color": text, "fontSize": 12},
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


CAPACITY = {
    "curve": "predicted, with its interval",
    "here": "measured last, with its interval",
    "minutes": "measured, each minute",
}
_CAPACITY_PX, _LABEL_PX = 300, 17


def capacity_spec(entry: Mapping[str, Any] | None, minutes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A Vega-Lite specification of throughput by number of agents: the fitted curve, limits, what was measured.

    ``entry`` is one of ``analysis`` in /stats. ``minutes`` have at (ms), verdict, agents and turns_per_hour.
    """
    curve = list(entry["curve"]) if entry is not None else []
    here = _measured_last(entry["operating"]) if entry is not None else []
    rows = [*curve, *here, *minutes]
    right = max(row["agents"] for row in rows)
    limits = _limits(entry, right) if entry is not None else []
    top = max(row[name] for row in rows for name in ("turns_per_hour", "high") if row.get(name) is not None)
    room = 1 - (_LABEL_PX * len(limits) + 6) / _CAPACITY_PX  # for the labels, above the curve
    x = {"field": "agents", "type": "quantitative", "scale": {"domain": [0, 1.03 * right], "nice": False}}
    y = {"field": "turns_per_hour", "type": "quantitative", "scale": {"domain": [0, 1.03 * top / room], "nice": False}}
    x["axis"], y["axis"] = {"title": "agents in parallel", "tickCount": 6}, {"title": "turns per hour", "tickCount": 5}
    span = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}
    at_label = {"x": x, "y": {"field": "px", "type": "quantitative", "scale": None}}
    text = {**at_label, "text": {"field": "text"}}
    knee = [row for row in limits if row["name"] == "knee" and row["low"] is not None]
    marks = (
        (knee, {"type": "rect", "opacity": 0.12}, {"x": {**x, "field": "low"}, "x2": {"field": "high"}}),
        (limits, {"type": "rule", "strokeDash": [4, 4]}, {**at_label, "y2": {"value": _CAPACITY_PX}}),
        *(
            ([row for row in limits if row["side"] == side], {"type": "text", "align": side, "dx": dx}, text)
            for side, dx in (("left", 5), ("right", -5))
        ),
    )
    layers = [
        *_layer(curve, "curve", {"type": "area", "opacity": 0.18}, span),
        *_layer(curve, "curve", {"type": "line", "strokeWidth": 2}, {"x": x, "y": y}),
        *_layer(minutes, "minutes", {"type": "point", "filled": True, "size": 40, "opacity": 0.6}, {"x": x, "y": y}),
        *({"data": {"values": data}, "mark": mark, "encoding": encoding} for data, mark, encoding in marks if data),
        *_layer(here, "here", {"type": "rule", "strokeWidth": 2}, span),
        *_layer(here, "here", {"type": "point", "shape": "diamond", "filled": True, "size": 150}, {"x": x, "y": y}),
    ]
    return {**_CHART, "height": _CAPACITY_PX, "layer": layers}


def _layer(
    rows: Sequence[Mapping[str, Any]], kind: str, mark: Mapping[str, Any], encoding: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The layer with the marks of ``rows``; none without any."""
    if not rows:
        return []
    legend = {"columns": 1, "symbolOpacity": 1, "labelLimit": 300}
    colour = {"field": "kind", "type": "nominal", "scale": {"domain": list(CAPACITY.values())}, "legend": legend}
    return [
        {
            "data": {"values": [{**row, "kind": CAPACITY[kind]} for row in rows]},
            "mark": {**mark, "tooltip": {"content": "data"}},
            "encoding": {**encoding, "color": colour},
        }
    ]


def _measured_last(operating: Mapping[str, Any]) -> list[dict[str, Any]]:
    agents, rate = operating["agents"]["value"], operating["turns_per_hour"]
    if agents is None or rate["value"] is None:
        return []
    return [{"agents": agents, "turns_per_hour": rate["value"], "low": rate["low"], "high": rate["high"]}]


def _limits(entry: Mapping[str, Any], right: float) -> list[dict[str, Any]]:
    """The limits on the number of agents up to ``right``, and the suggestion, with labels below each other."""
    found = [(entry["limits"][name], text) for name, text in LIMITS.items()]
    known = [(value, text) for value, text in [*found, (entry["suggestion"]["agents"], "suggested")] if value["value"]]
    rows = [
        {
            "name": text,
            "agents": value["value"],
            "low": value["low"],
            "high": min(value["high"], 1.03 * right) if value["high"] is not None else None,
            "text": f"{text} {value['value']:,.0f}",
            "side": "left" if value["value"] < right / 2 else "right",
        }
        for value, text in sorted(known, key=lambda each: float(each[0]["value"]))
        if value["value"] <= right
    ]
    # A line begins at its label, which stands beside it, towards the middle: above the lines that it would cross.
    rows.sort(key=lambda row: (row["side"] == "right", row["agents"] if row["side"] == "left" else -row["agents"]))
    return [{**row, "px": _LABEL_PX * level + 8} for level, row in enumerate(rows)]
