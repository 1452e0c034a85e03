"""The page that `report --html` writes, in a real Chromium without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from program import MODULE, wait_for
from recorded_run import HOSTILE, write_run

CHARTS_S = PATIENCE_S


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vl_convert")
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "history.db")
    words = ["report", "--history", str(folder / "history.db"), "--html", str(folder / "run.html")]
    done = subprocess.run(
        [sys.executable, str(MODULE), *words], capture_output=True, text=True, timeout=2 * PATIENCE_S, cwd=folder
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert os.stat(folder / "run.html").st_mode & 0o777 == 0o600
    return folder / "run.html"


@pytest.fixture
def opened(chromium: Any, page_file: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page, and what it asked of the network or complained about."""
    context = chromium.new_context(viewport={"width": 390, "height": 800}, offline=True)
    page, troubles = context.new_page(), list[str]()
    page.on(
        "request", lambda request: troubles.append(request.url) if request.url[:5] not in ("file:", "data:") else None
    )
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text))
    page.goto(page_file.as_uri(), timeout=1000 * CHARTS_S)
    page.wait_for_selector("#stages svg", timeout=1000 * CHARTS_S)
    page.wait_for_selector("#over-time svg", timeout=1000 * CHARTS_S)
    yield page, troubles
    context.close()


def test_it_opens_offline_with_all_charts_and_runs_nothing_that_an_agent_wrote(opened: tuple[Any, list[str]]) -> None:
    page, troubles = opened
    page.wait_for_selector("#capacity-0 svg", timeout=1000 * CHARTS_S)
    assert page.evaluate("window.hacked === undefined")
    lines = page.locator("#over-time svg .mark-line path")
    wait_for(lambda: lines.count() >= 9, "the lines of all charts over time", CHARTS_S)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert troubles == []


def test_sessions_are_searched_and_sorted_and_a_prompt_is_read(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    sessions = page.locator("#sessions table")
    page.locator("#sessions input").fill("S1<")
    assert sessions.locator("tbody tr:visible").count() == 1
    page.locator("#sessions input").fill("")
    for order in ("ascending", "descending"):
        sessions.locator("th", has_text="session").first.click()
        assert sessions.locator("th").first.get_attribute("aria-sort") == order
    assert sessions.locator("tbody tr").first.inner_text().startswith("s2")
    slowest = page.locator("#turns table").last.locator("tbody tr").first
    prompt = slowest.locator("details").first
    prompt.locator("summary").click()
    assert prompt.locator("pre").inner_text() == f"q239 {HOSTILE}"


def test_the_fitted_curve_has_its_limits_and_what_was_measured(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    chart = page.locator("#capacity-0 svg")
    words = chart.locator("text").all_text_contents()
    assert {"knee 181", "suggested 147", "predicted, with its interval", "measured, each minute"} <= set(words)
    assert chart.locator(".mark-symbol.role-mark path").count() == 41  # minutes, and the diamond
    assert chart.locator(".mark-area path").count() == 1
    assert "+1 replica" in page.locator("#analysis").inner_text()


def test_a_trace_shows_where_the_time_of_its_turns_went_and_opens_a_prompt(opened: tuple[Any, list[str]]) -> None:
    page, troubles = opened
    traces = page.locator("#traces .trace")
    assert traces.count() == 3
    rows = traces.first.locator(".row:visible")
    assert rows.count() == 80
    assert traces.nth(1).locator(".row:visible").count() == 0
    failed = rows.filter(has_text="error").last
    assert failed.locator(".lane span").evaluate_all("bars => bars.map(bar => bar.className)") == [
        *("think", "queued", "prefill", "decode")
    ]
    axis = traces.first.locator(".axis > div").bounding_box()
    boxes = [bar.bounding_box() for bar in rows.last.locator(".lane span").all()]
    assert all(axis["x"] - 3 <= box["x"] <= axis["x"] + axis["width"] + 3 for box in boxes)
    failed.click()
    opened_turn = failed.locator("xpath=..")
    texts = opened_turn.locator("pre:visible").all_inner_texts()
    assert texts[0] == f"it broke {HOSTILE}"
    assert texts[1].endswith(HOSTILE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("window.hacked === undefined")
    assert troubles == []


def test_a_turn_leads_to_the_trace_of_its_session(opened: tuple[Any, list[str]]) -> None:
    page, troubles = opened
    link = page.locator("#turns table").last.locator("tbody tr a").first  # of the slowest turn
    place = link.get_attribute("href")
    trace = page.locator(place)
    name = link.inner_text().removesuffix(" …")
    assert trace.locator("xpath=..").locator("> summary").inner_text().startswith(name)
    link.click()
    trace.locator(".row").first.wait_for(state="visible", timeout=1000 * PATIENCE_S)
    assert troubles == []
