"""`report --html`: the figures of the text, charts that Vega-Lite takes, and nothing that agents wrote as markup."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import pytest
from recorded_run import HOSTILE, START, write_run

import agent_infra
import streamlit_dashboard as dashboard
from agent_infra_core.insight.history import HistoryFile
from agent_infra_core.insight.html_report import HtmlReport
from agent_infra_core.insight.report import Report, Table, capacity
from agent_infra_core.insight.report_charts import CAPACITY, CHART_CONFIGS, capacity_spec
from agent_infra_core.insight.report_traces import PHASES, TRACE_STYLE, duration, waterfall
from agent_infra_core.insight.series import turn_row
from agent_infra_core.insight.turns import TurnRecord


class Outline(HTMLParser):
    """The elements of a page, and the cells of its tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def make_page(path: Path, since: float = 0.0) -> str:
    write_run(path)
    with contextlib.closing(HistoryFile(path, read_only=True)) as file:
        report = Report(file, f"a run {HOSTILE}", since)
        return HtmlReport(file, report, since, START + 3000).page("window.vegaEmbed = null; // </script>")


def specs_of(page: str) -> Any:
    [text] = re.findall(r'<script type="application/json" id="specs">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_what_agents_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    page = make_page(tmp_path / "history.db")
    outline = Outline(page)
    assert outline.tags.count("script") == 3
    assert "img" not in outline.tags
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert any(HOSTILE in text for text in outline.texts)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "default-src 'none'" in page


def test_every_chart_is_one_that_vega_lite_takes(tmp_path: Path) -> None:
    specs = specs_of(make_page(tmp_path / "history.db"))
    assert set(specs) == {"over-time", "stages", "capacity-0"}
    titles = [chart["title"] for chart in specs["over-time"]["vconcat"]]
    assert titles[0] == "turns per minute"
    assert len(titles) == 9
    rows = {chart["title"]: chart["data"]["values"] for chart in specs["over-time"]["vconcat"]}
    turns = [row["value"] for row in rows["turns per minute"] if row["name"] == "turns"]
    assert turns[:11] == [None, *[12.0, 0.0] * 5]  # one in ten seconds, in steps of five
    assert sum(row["value"] or 0 for row in rows["preemptions"]) == 239
    layers = specs["capacity-0"]["layer"]
    values = [row for layer in layers for row in layer["data"]["values"]]
    assert {row["kind"] for row in values if "kind" in row} == set(CAPACITY.values())
    assert {"knee 181", "KV cache full 164", "70 % utilisation 169", "suggested 147"} < {r.get("text") for r in values}
    for spec in specs.values():
        for chart in spec.get("vconcat", spec.get("layer", [spec])):
            del chart["data"]["values"][3:]  # Altair looks at each row, which takes minutes
        alt.Chart.from_dict(spec)  # raises if it doesn't fit the schema


BACKGROUNDS = {"light": "#ffffff", "dark": "#16181c"}  # of the page, as its style has them


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_and_lines_stand_out_in_both_schemes(tmp_path: Path, scheme: str) -> None:
    """Contrast as WCAG 2 defines it."""

    def contrast(colour: str) -> float:
        light, dark = sorted((luminance(colour), luminance(BACKGROUNDS[scheme])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    config = CHART_CONFIGS[scheme]
    assert min(contrast(config[part][name]) for part, name in (("axis", "labelColor"), ("title", "color"))) >= 4.5
    assert min(map(contrast, config["range"]["category"])) >= 3
    page = make_page(tmp_path / "history.db")
    assert json.dumps(config) in page
    assert "scheme" not in json.dumps(specs_of(page))
    assert BACKGROUNDS["dark"] in page


def test_the_page_has_every_figure_of_the_text(tmp_path: Path) -> None:
    texts = set(Outline(make_page(tmp_path / "history.db")).texts)
    with contextlib.closing(HistoryFile(tmp_path / "history.db", read_only=True)) as file:
        report = Report(file, "a run", 0.0)
        text = report.text()
        parts = [report.summary(), report.throughput(), report.durations(), report.replica_time(), report.waste()]
        parts += [report.runs(), *map(capacity, report.analyses())]
    tables = [block for part in parts for block in part if isinstance(block, Table)]
    assert len(tables) >= 6
    cells = [cell for table in tables for row in table.rows for cell in row if isinstance(cell, str)]
    assert [cell for cell in cells if cell not in texts] == []
    figures = re.findall(r"(?<=\| )[\d,.%]+(?= \|)", text)
    assert len(figures) > 50
    assert [figure for figure in figures if figure not in texts] == []
    assert [text for text in texts if "BOUND" in text]
    [run] = [line for line in text.splitlines() if line.startswith("| night ")]
    assert re.fullmatch(r"100 \| [-\d]{10} [:\d]{5} \| – \| – \|", run.partition(" | ")[2])  # it goes on


def test_a_run_without_a_fit_shows_what_was_measured_and_says_that_there_is_no_curve(tmp_path: Path) -> None:
    write_run(tmp_path / "history.db")
    with contextlib.closing(HistoryFile(tmp_path / "history.db")) as file:
        file.query("DELETE FROM analyses")
        report = Report(file, "a run", 0.0)
        page = HtmlReport(file, report, 0.0, START + 3000).page("")
    assert "No curve: too little is known to predict throughput." in Outline(page).texts
    [layer] = specs_of(page)["capacity-0"]["layer"]
    assert {row["kind"] for row in layer["data"]["values"]} == {CAPACITY["minutes"]}
    assert len(layer["data"]["values"]) == 40


def test_limits_beyond_the_curve_are_left_out_and_an_interval_ends_with_the_chart() -> None:
    entry = json.loads((Path(__file__).parents[2] / "golden/analysis.json").read_text())[0]
    entry["curve"] = [row for row in entry["curve"] if row["agents"] <= 182]
    entry["operating"]["agents"]["value"] = 150.0
    rows = [row for layer in capacity_spec(entry, [])["layer"] for row in layer["data"]["values"]]
    right = max(row["agents"] for row in entry["curve"])
    named = {row["name"]: row for row in rows if "name" in row}
    assert all(row["agents"] <= right for row in named.values())
    assert all(row["high"] <= 1.03 * right for row in named.values())
    assert len({row["px"] for row in named.values()}) == len(named)


def test_a_waterfall_shows_every_phase_of_every_turn_on_one_time_axis() -> None:
    def turn(number: int, **fields: Any) -> Any:
        return turn_row(TurnRecord(f"t{number}", START + 10 * number + 4, "completed", 200, **fields), number)

    streamed: dict[str, Any] = {"stream": True, "queue_ms": 1500.0, "held_ms": 300.0, "retry_ms": 200.0}
    streamed |= {"ttft_ms": 1000.0, "inference_ms": 2500.0, "think_ms": 6000.0, "unaccounted_ms": 2000.0}
    streamed |= {"prompt_tokens": 100, "cached_tokens": 50, "expected_cached_tokens": 75, "cache_miss": "evicted"}
    whole = {"queue_ms": 0.0, "inference_ms": 4000.0, "started_at": START + 10}
    drawn = waterfall([turn(2, started_at=START + 20, **streamed), turn(1, **whole)])
    found = re.findall(r'class="([a-z-]+)" style="left:([\d.]+)%;width:([\d.]+)%"', drawn)
    bars = [(name, round(float(left) * 0.14, 2), round(float(width) * 0.14, 2)) for name, left, width in found]
    assert bars == [  # from, for: of 14 s in all
        ("inference", 0.0, 4.0),
        ("think", 4.0, 4.0),
        ("idle", 8.0, 2.0),
        ("queued", 10.0, 1.0),
        ("held", 11.0, 0.3),
        ("retry", 11.3, 0.2),
        ("replayed-prefill", 11.5, 0.5),
        ("prefill", 12.0, 0.5),
        ("decode", 12.5, 1.5),
    ]
    assert "4.00 s · cache miss" in drawn
    assert "cached: 50 of 100 input tokens, 75 expected" in drawn


def test_long_texts_of_a_trace_are_shortened_and_a_turn_without_a_start_is_passed_over() -> None:
    record = TurnRecord("t", START, "error", 500, started_at=START - 1, error="<b>", prompt="p" * 9999, answer="")
    drawn = waterfall([turn_row(record, 1), turn_row(TurnRecord("u", START, "error", 500), 2)])
    assert drawn.count("<details>") == 1
    assert "p" * 500 + " …</pre>" in drawn
    assert "p" * 501 not in drawn
    assert "<pre>&lt;b&gt;</pre>" in drawn


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        *((0, "0 ms"), (0.42, "0.4 ms"), (340, "340 ms"), (999.6, "1.00 s"), (3214, "3.21 s"), (12_345, "12.3 s")),
        *((59_960, "1 min"), (125_000, "2 min 05 s"), (3_599_600, "1 h"), (11_520_000, "3 h 12 min")),
        *((86_400_000, "1 d"), (183_600_000, "2 d 3 h")),
    ],
)
def test_durations_read_as_on_the_page(ms: float, text: str) -> None:
    assert duration(ms) == text
    assert dashboard.duration(ms).replace(dashboard.SPACE, " ") == text


def test_a_trace_has_the_words_and_colours_of_the_page() -> None:
    assert PHASES == dashboard.PHASE_MEANINGS
    colours = re.findall(r"--\w+: light-dark\([^)]*\)", TRACE_STYLE)
    assert len(colours) == 8
    assert [colour for colour in colours if colour not in dashboard.COLOURS_CSS] == []


def test_a_page_of_a_later_time_leaves_the_rest_out(tmp_path: Path) -> None:
    page = make_page(tmp_path / "history.db", since=START + 1200)
    texts = Outline(page).texts
    assert any(text.startswith("q239 ") for text in texts)
    assert not any(text.startswith("q7 ") for text in texts)
    assert any(text == "Capacity of m on H100" for text in texts)
    assert specs_of(page)["over-time"]["vconcat"][0]["data"]["values"][0]["at"] >= (START + 1190) * 1000


def test_without_the_package_the_message_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "history.db")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    words = ["report", "--history", str(tmp_path / "history.db"), "--html", str(tmp_path / "run.html")]
    assert agent_infra.main(words) == 2
    assert "pip install 'vl-convert-python" in capsys.readouterr().err
    assert not (tmp_path / "run.html").exists()


def test_where_nothing_was_kept_there_is_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("models: [{name: m, model_path: p}]\ncluster: {name: nothing-kept-here}\n")
    pytest.importorskip("vl_convert")
    assert agent_infra.main(["report", "--config", str(config), "--html", str(tmp_path / "run.html")]) == 2
    assert "no turns were kept yet" in capsys.readouterr().err
