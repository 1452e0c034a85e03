"""The page in a real Chromium: it is looked at, clicked, typed at, and outlives what happens to the proxy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import simulated
import stats_server as stats
from browser_site import Site, collect_complaints
from patience import PATIENCE_S
from program import MODULE, is_listening, program, wait_for
from stats_schema import check_stats
from weights import packaged_gguf

PANELS = ["verdict", "queue", "analysis", "timeline", "backends", "sessions", "turns", "watchdog", "cost"]

# What a reader would see of a page that is not laid out well: text that is cut, and panels that are too wide.
UNTIDY = """() => {
  const found = [];
  if (document.scrollingElement.scrollWidth > innerWidth) found.push("the page is wider than the window");
  for (const each of document.querySelectorAll(
      "h1, h2, h3, dt, dd, .ai-badge, th, .ai-num, .ai-large, .ai-keys li, .ai-legend li")) {
    if (each.closest(".ai-hidden")) continue;
    if (each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).display !== "inline")
      found.push("cut: " + each.textContent.slice(0, 60));
  }
  for (const each of document.querySelectorAll(".ai-scroll"))
    if (each.scrollWidth > each.clientWidth + 1) found.push("scrolls: " + each.getAttribute("aria-label"));
  const cards = [...document.querySelectorAll(".ai-card, [class*=st-key-card]")]
    .map(each => each.getBoundingClientRect());
  cards.forEach((one, index) => cards.slice(index + 1).forEach(other => {
    if (one.left < other.right - 1 && other.left < one.right - 1 && one.top < other.bottom - 1
        && other.top < one.bottom - 1) found.push("cards overlap");
  }));
  for (const chart of document.querySelectorAll(".stVegaLiteChart canvas")) {
    const card = chart.closest("[class*=st-key-card]").getBoundingClientRect();
    if (chart.getBoundingClientRect().right > card.right) found.push("a chart leaves its card");
  }
  return found;
}"""


def text_of(tab: Any, panel: str) -> str:
    return str(tab.inner_text(f"[data-panel={panel}]"))


def wait_text(tab: Any, selector: str, text: str) -> None:
    tab.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)", arg=[selector, text]
    )


def focused(tab: Any) -> str:
    """The panel and the row that have the focus."""
    return str(
        tab.evaluate(
            "[document.activeElement.closest('[data-panel]')?.dataset.panel || '',"
            " [...(document.activeElement.closest('[data-panel]')?.querySelectorAll('[data-row]') || [])]"
            ".indexOf(document.activeElement)].join(' ')"
        )
    )


def assert_tidy(tab: Any) -> None:
    """Once the browser has laid it out: charts follow a moment later."""
    wait_for(lambda: not tab.evaluate(UNTIDY), f"a tidy page; {tab.evaluate(UNTIDY)}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_fleet_at_work_is_shown_whole_and_tidy_in_light_and_dark(site: Site, axe: str, scheme: str) -> None:
    tab = site.open(stats.busy(), scheme)
    assert [each.get_attribute("data-panel") for each in tab.query_selector_all("[data-panel]")] == PANELS
    tab.wait_for_function("document.querySelectorAll('.stVegaLiteChart canvas').length >= 2")
    assert tab.evaluate("getComputedStyle(document.querySelector('.stApp')).colorScheme") == scheme
    assert_tidy(tab)
    assert "GPU-BOUND" in text_of(tab, "verdict")
    assert "qwen-1" in text_of(tab, "backends")
    tab.evaluate(axe)
    result = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")
    ours = [
        f"{violation['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for violation in result["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
        if "ai-" in node["html"] or "data-panel" in node["html"]
    ]
    assert ours == []
    tab.set_viewport_size({"width": 1920, "height": 1000})
    assert_tidy(tab)


def test_a_session_is_expanded_stays_so_and_keeps_the_focus_while_the_figures_change(site: Site) -> None:
    document = stats.busy()
    tab = site.open(document)
    toggle = "[data-toggle='session:task-0012']"
    tab.click(toggle)
    wait_text(tab, "[data-panel=sessions]", "12 latest turns")
    assert tab.evaluate(f'document.activeElement === document.querySelector("{toggle}")')
    rows = document["clients"][0]["sessions"]
    rows[:] = [{**rows[2], "turns": 444}, *rows[:2], *rows[3:]]  # at once: it may be served at any moment
    wait_text(tab, "[data-panel=sessions]", "444")
    assert tab.get_attribute(toggle, "aria-expanded") == "true"
    assert tab.evaluate(f'document.activeElement === document.querySelector("{toggle}")')
    tab.click(toggle)
    tab.wait_for_selector("[data-panel=sessions] .ai-detail", state="detached")
    tab.click("[data-toggle='turn:turn-3']")
    wait_text(tab, "[data-panel=turns]", "Observation 3")


def test_what_is_painted_first_stays_when_the_rest_comes(site: Site) -> None:
    tab = site.browser.new_page()
    tab.goto(site.url)
    verdict = tab.wait_for_selector("[data-panel=verdict]")
    tab.wait_for_selector("[data-panel=cost]")
    tab.wait_for_function("document.querySelectorAll('.stVegaLiteChart canvas').length === 2")
    assert verdict.evaluate("each => each.isConnected")


def test_the_model_that_is_chosen_is_the_one_that_is_shown_and_drawn(site: Site) -> None:
    """Two models, of which one has a curve."""
    entries = [
        {**stats.analysis("NO DATA")[0], "model": "small"},
        {**stats.analysis("GPU-BOUND")[0], "model": "large"},
    ]
    tab = site.open(stats.busy(analysis=entries))
    charts = "document.querySelectorAll('.stVegaLiteChart canvas').length"
    tab.wait_for_function(f"{charts} === 1")
    tab.click("[data-panel=analysis] [data-set^=large]")
    tab.wait_for_function(f"{charts} === 2")
    assert tab.get_attribute("[data-panel=analysis] [data-set^=large]", "aria-pressed") == "true"
    wait_text(tab, ".st-key-card_analysis", "+1 replica")
    assert_tidy(tab)
    tab.click("[data-panel=analysis] [data-set^=small]")
    tab.wait_for_function(f"{charts} === 1")
    wait_text(tab, "[data-panel=analysis]", "The parts of a turn")


def test_keys_move_expand_and_pause_only_while_they_are_on(site: Site) -> None:
    tab = site.open()
    tab.keyboard.press("j")
    assert focused(tab) == " -1"
    tab.click(".st-key-keys label")
    tab.wait_for_selector(".ai-keys")
    tab.keyboard.press("Tab")
    assert focused(tab) == "verdict -1"
    for _ in range(4):
        tab.keyboard.press("Tab")
    assert focused(tab) == "backends -1"
    tab.keyboard.press("j")
    tab.keyboard.press("ArrowDown")
    assert focused(tab) == "backends 1"
    tab.keyboard.press("k")
    assert focused(tab) == "backends 0"
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert focused(tab) == "sessions 1"
    tab.keyboard.press("Enter")
    wait_text(tab, "[data-panel=sessions]", "12 latest turns")
    assert focused(tab) == "sessions 1"
    tab.keyboard.press("Shift+Tab")
    assert focused(tab) == "backends -1"
    tab.keyboard.press("q")
    wait_text(tab, ".ai-header", "paused")
    tab.keyboard.press("Escape")
    wait_text(tab, ".ai-header", "live")
    tab.focus("[data-panel=verdict]")
    tab.keyboard.press("Shift+Tab")  # at the end of the panels Tab is the browser's: nobody is caught
    assert focused(tab) == " -1"
    tab.click(".st-key-keys label")
    tab.wait_for_selector(".ai-keys", state="detached")
    tab.keyboard.press("q")
    tab.wait_for_timeout(300)
    assert "live" in tab.inner_text(".ai-header")


def test_a_paused_page_asks_nothing_and_goes_on_when_told(site: Site) -> None:
    tab = site.open()
    tab.click(".st-key-pause button")
    wait_text(tab, ".ai-header", "paused")
    tab.wait_for_timeout(1200)
    asked = len(site.server.asked)
    site.server.document["queue"]["pending"] = 777
    tab.wait_for_timeout(2500)
    assert len(site.server.asked) == asked
    assert "777" not in text_of(tab, "queue")
    tab.click(".st-key-pause button")
    wait_text(tab, "[data-panel=queue]", "777")


def test_the_page_outlives_the_proxys_restart(site: Site) -> None:
    tab = site.open()
    site.server.close()
    wait_text(tab, ".ai-problem", "There is no proxy at")
    assert "qwen-1" in text_of(tab, "backends")  # the last figures stay, in grey
    assert tab.evaluate("getComputedStyle(document.querySelector('[data-panel=backends]')).filter") == "grayscale(1)"
    site.server.document["queue"]["pending"] = 555
    site.server.open()
    tab.wait_for_selector(".ai-problem", state="detached")
    wait_text(tab, "[data-panel=queue]", "555")


@pytest.mark.parametrize(
    ("document", "status", "says"),
    [
        (stats.busy(schema_version=1), 200, "version 1 of /stats"),
        (stats.busy(), 401, "--token-file"),
        (stats.busy(), 503, "has no figures yet"),
        (stats.busy(), 404, "is not Agent Infra's proxy"),
    ],
)
def test_a_page_without_figures_says_why_and_what_to_do(site: Site, document: Any, status: int, says: str) -> None:
    site.server.status = status
    tab = site.open(document)
    wait_text(tab, ".ai-problem", says)


def test_nobody_without_the_key_sees_anything(site: Site) -> None:
    tab = site.browser.new_page()
    tab.goto(site.url.partition("?")[0])
    tab.wait_for_selector("text=complete address")
    assert tab.query_selector("[data-panel]") is None
    assert site.key not in " ".join(site.command.process.args)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_extremes_and_hostile_text_are_shown_as_they_are(site: Site, scheme: str) -> None:
    tab = site.open(stats.extreme(), scheme)
    tab.click("[data-toggle=backends]")
    tab.wait_for_function("document.querySelectorAll('[data-panel=backends] tbody tr').length === 64")
    tab.click("[data-toggle='turn:turn-0']")
    wait_text(tab, "[data-panel=turns]", "<script>window.hacked = 1</script>")
    tab.click("[data-toggle='turn:turn-1']")
    wait_text(tab, "[data-panel=turns]", "**bold** _it_ `code` $x^2$ :smile: :red[red] [a](javascript:")
    assert tab.evaluate("window.hacked") is None
    assert tab.query_selector_all("[data-panel] :is(script, img, a, strong strong, em, code)") == []
    assert_tidy(tab)


@pytest.mark.parametrize(
    ("name", "panel", "says"),
    [("empty", "sessions", "No traffic yet"), ("all_down", "backends", "0 of 4 ready")],
)
def test_a_fleet_that_does_nothing_is_shown_too(site: Site, name: str, panel: str, says: str) -> None:
    tab = site.open(getattr(stats, name)())
    wait_text(tab, f"[data-panel={panel}]", says)
    assert "NaN" not in tab.inner_text("body")
    assert_tidy(tab)


def test_unchanged_figures_touch_nothing_in_the_document(site: Site) -> None:
    """What did not change is not drawn anew: no flicker, no lost selection."""
    tab = site.open()
    tab.wait_for_timeout(1500)
    tab.evaluate(
        "window.changes = 0; new MutationObserver(all => window.changes += all.length).observe("
        "document.querySelector('[data-panel=sessions]'), {subtree: true, childList: true, attributes: true,"
        " characterData: true})"
    )
    tab.wait_for_timeout(2500)
    assert tab.evaluate("window.changes") == 0


@pytest.mark.parametrize(
    ("name", "scheme", "agents", "think_s", "verdict"),
    [
        ("busy-light", "light", 140, 10.0, "AGENT-BOUND"),
        ("busy-dark", "dark", 140, 10.0, "AGENT-BOUND"),
        ("saturated", "light", 220, 10.0, "GPU-BOUND"),
        ("agent-bound", "light", 24, 30.0, "AGENT-BOUND"),
    ],
)
def test_simulated_fleets_are_shown_as_what_they_are(
    site: Site,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    name: str,
    scheme: str,
    agents: int,
    think_s: float,
    verdict: str,
) -> None:
    """The pictures of the documentation: --screenshots writes them anew."""
    document = simulated.document(agents, 4, think_s)
    check_stats(document)
    assert document["analysis"][0]["verdict"]["name"] == verdict
    tab = site.open(document, scheme, 1280, 1620)
    wait_text(tab, "[data-panel=verdict]", verdict)
    tab.wait_for_function("document.querySelectorAll('.stVegaLiteChart canvas').length >= 1")
    is_kept = request.config.getoption("--screenshots")
    tab.wait_for_timeout(1500 if is_kept else 200)
    assert_tidy(tab)
    folder = MODULE.parent / "docs" if is_kept else tmp_path
    tab.screenshot(path=str(folder / f"page-{name}.png"))


def test_up_brings_the_page_along_and_takes_it_with_it(tmp_path: Path, chromium: Any) -> None:
    """The real proxy, the embedded model, ten turns of the example: they are on the page, and can be expanded."""
    packaged_gguf()
    with program(tmp_path) as app:
        up = app.spawn("up", "--dashboard")
        url = up.wait_line(r"page +(http://\S+)")[1]
        up.wait_line("Ctrl-C stops everything")
        environment = {**app.environment, "PYTHONPATH": str(MODULE.parent)}
        environment["OPENAI_BASE_URL"] = f"http://127.0.0.1:{app.port}/v1"
        agent = [sys.executable, str(MODULE.parent / "examples/quickstart.py"), "--stream"]
        subprocess.run(agent, env=environment, check=True, capture_output=True, timeout=120)
        port = int(url.rpartition(":")[2].partition("/")[0])
        wait_for(lambda: is_listening(port), "the page's server")
        complaints: list[str] = []
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        collect_complaints(tab, complaints)
        tab.goto(url)
        tab.wait_for_selector("[data-panel=sessions] [data-toggle^='session:']", timeout=1000 * PATIENCE_S)
        tab.click("[data-panel=sessions] [data-toggle^='session:']")
        wait_text(tab, "[data-panel=sessions]", "10 latest turns")
        assert "smollm2-1" in text_of(tab, "backends")
        tab.close()
        assert complaints == []
        assert up.end() == 0
        wait_for(lambda: not app.processes(), f"no process left: {app.processes()}")
        assert not is_listening(port)


def test_the_page_ends_when_its_proxy_is_killed(tmp_path: Path) -> None:
    """With -9, so that nobody is left who would end it: it notices by itself."""
    packaged_gguf()
    with program(tmp_path) as app:
        up = app.spawn("up", "--dashboard")
        port = int(up.wait_line(r"page +http://127\.0\.0\.1:(\d+)")[1])
        up.wait_line("Ctrl-C stops everything")
        wait_for(lambda: is_listening(port), "the page's server")
        up.process.kill()
        wait_for(lambda: not is_listening(port), "the end of the page")
        assert app.run("stop").returncode == 0
        wait_for(lambda: not app.processes(), "no process left")
