"""The page in a real Chromium: it is looked at, clicked, typed at, and outlives what happens to the proxy."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import simulated
import stats_server as stats
from browser_site import Site, collect_complaints, status, wait_text
from patience import PATIENCE_S
from program import MODULE, is_listening, program, wait_for
from stats_schema import check_stats
from testbed.ports import free_port
from weights import packaged_gguf

TABS = {  # what each has when it is whole
    "Overview": ".stVegaLiteChart canvas",
    "Sessions": ".st-key-sessions canvas",
    "Replicas": ".st-key-replicas canvas",
    "Analysis": "text=Where the time of turns goes",
    "History": ".stVegaLiteChart canvas",
}

# What a reader would see of a page that is not laid out well.
UNTIDY = """() => {
  const found = [];
  if (document.scrollingElement.scrollWidth > innerWidth) found.push("the page is wider than the window");
  const texts = [];
  const walk = root => {
    for (const each of root.querySelectorAll("*")) {
      if (each.shadowRoot) walk(each.shadowRoot);
      const own = [...each.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
      if (!own || !each.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
      if (each.closest("table, canvas, pre, [data-testid=stHeader], [data-testid=stTooltipContent]")) continue;
      const range = document.createRange();
      range.selectNodeContents(each);
      const box = range.getBoundingClientRect(), clip = each.getBoundingClientRect();
      const right = Math.min(box.right, clip.right), bottom = Math.min(box.bottom, clip.bottom);
      if (right - box.left > 2 && bottom - box.top > 2) texts.push([each, box.left, box.top, right, bottom]);
    }
  };
  walk(document.querySelector(".stMainBlockContainer"));
  texts.forEach(([one, left, top, right, bottom], index) => {
    for (const [other, otherLeft, otherTop, otherRight, otherBottom] of texts.slice(index + 1))
      if (!one.contains(other) && !other.contains(one) && left < otherRight - 2 && otherLeft < right - 2
          && top < otherBottom - 3 && otherTop < bottom - 3)
        found.push(`over each other: ${one.textContent.slice(0, 40)} | ${other.textContent.slice(0, 40)}`);
    if (right > innerWidth + 1) found.push("beyond the window: " + one.textContent.slice(0, 40));
  });
  return found;
}"""

# The stretches of time that the charts show: [[begin, end] of each].
SHOWN_TIMES = """() => {
  const chart = document.querySelector(".stVegaLiteChart");
  let fiber = chart[Object.keys(chart).find(key => key.startsWith("__reactFiber"))];
  for (let depth = 0; fiber && depth < 40; depth++, fiber = fiber.return) {
    for (let hook = fiber.memoizedState; hook; hook = hook.next) {
      const view = hook.memoizedState?.current;
      if (typeof view?.scale !== "function") continue;
      return [1, 2, 3].map(index => view.scale(`concat_${index}_x`).domain().map(Number));
    }
  }
  return null;
}"""


def assert_tidy(tab: Any) -> None:
    """Once the browser has laid it out: charts follow a moment later."""
    wait_for(lambda: not tab.evaluate(UNTIDY), f"a tidy page; {tab.evaluate(UNTIDY)}")


def open_row(tab: Any, table: str, row: int) -> None:
    """Tick the box of a table's row."""
    box = tab.locator(f"{table} canvas").first.bounding_box()
    tab.mouse.click(box["x"] + 18, box["y"] + 36 + 32 * row + 16)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_is_tidy_and_accessible_in_light_and_dark(site: Site, axe: str, scheme: str) -> None:
    tab = site.open(stats.busy(), scheme)
    for name, whole in TABS.items():
        tab.get_by_role("tab", name=name).click()
        tab.wait_for_selector(whole)
        assert tab.evaluate("getComputedStyle(document.querySelector('.stApp')).colorScheme") == scheme
        assert_tidy(tab)
        assert serious(tab, axe) == []
    tab.goto(f"{site.url}&session=task-0012")
    tab.wait_for_selector(".row")
    tab.locator(".row").nth(6).click()
    wait_text(tab, "Turn 7")
    assert_tidy(tab)
    assert serious(tab, axe) == []


def serious(tab: Any, axe: str) -> list[str]:
    """What axe-core finds serious or critical, but for the inside of Streamlit's own tables and sparklines."""
    tab.evaluate(axe)
    result = tab.evaluate("axe.run({exclude: [['.stDataFrame'], ['.stMetric svg']]}, {resultTypes: ['violations']})")
    return [
        f"{violation['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for violation in result["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("name", ["busy", "extreme", "empty", "all_down"])
def test_a_phone_shows_every_tab_without_scrolling_sideways(site: Site, name: str) -> None:
    tab = site.open(getattr(stats, name)(), "dark", 390, 844)
    for each in TABS:
        tab.get_by_role("tab", name=each).click()
        tab.wait_for_function(
            "name => document.querySelector('[role=tab][aria-selected=true]').innerText === name", arg=each
        )
        tab.wait_for_timeout(300)
        assert_tidy(tab)
        assert "NaN" not in tab.inner_text("body")


def test_the_layout_stands_still_while_figures_change(site: Site) -> None:
    document = stats.busy()
    tab = site.open(document)
    tab.wait_for_selector(TABS["Overview"])
    tab.wait_for_timeout(1000)
    tab.evaluate(
        "window.moved = 0; new PerformanceObserver(list => list.getEntries().forEach("
        "entry => window.moved += entry.value)).observe({type: 'layout-shift'})"
    )
    for step in range(5):
        site.server.document = {**copy.deepcopy(document), "queue": {**document["queue"], "pending": 10**step}}
        wait_text(tab, f"{10**step:,}", ".st-key-metrics_now")
    assert tab.evaluate("window.moved") < 0.02


def test_a_session_is_found_among_two_thousand_opened_and_left_again(site: Site) -> None:
    tab = site.open(tab="Sessions")
    wait_text(tab, "Showing 1 to 200 of 2,000 sessions, most recent first.")
    tab.fill("input[type=search]", "task-19")
    wait_text(tab, "100 sessions, most recent first.")
    tab.get_by_role("combobox", name="Order").click()
    tab.get_by_role("option", name="longest wait").click()
    wait_text(tab, "100 sessions, longest wait first.")
    rows = [row for row in site.server.sessions if "task-19" in row["id"]]
    longest = max(rows, key=lambda row: row["queued_s"])["id"]
    tab.wait_for_timeout(500)
    open_row(tab, ".st-key-sessions", 0)
    tab.wait_for_selector(".row")
    assert f"session={longest}" in tab.url
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.locator("[data-testid=stCode]").first.hover()
    tab.get_by_role("button", name="Copy to clipboard").first.click()
    wait_for(lambda: tab.evaluate("navigator.clipboard.readText()") == longest, "the id in the clipboard")
    tab.get_by_role("button", name="All sessions").click()
    wait_text(tab, "longest wait first.")
    assert "session=" not in tab.url


def test_a_link_leads_to_a_session_whose_turns_can_be_read(site: Site) -> None:
    tab = site.open(session="task-1999")  # one that has ended
    tab.wait_for_selector(".row")
    tab.locator(".row").nth(6).click()
    wait_text(tab, "Turn 7")
    wait_text(tab, "Observation 7: the page lists 12 articles.")
    wait_text(tab, "I open the third article")
    label = tab.locator(".row").nth(6).get_attribute("title")
    assert all(phase in label for phase in ("think", "queued", "retry", "replayed prefill", "prefill", "decode"))
    tab.locator(".row").nth(8).click()
    wait_text(tab, "the replica died during this turn")


def focused(tab: Any) -> str | None:
    """The number of the turn that has the focus."""
    deep = "(e => { while (e?.shadowRoot?.activeElement) e = e.shadowRoot.activeElement; return e })"
    number: str | None = tab.evaluate(f"{deep}(document.activeElement)?.dataset?.number || null")
    return number


def test_keys_keep_their_turn_while_turns_are_added(site: Site) -> None:
    tab = site.open(session="task-0012")
    tab.wait_for_selector(".row")
    wait_for(lambda: focused(tab) == "1", "the focus on the first turn")
    for key, number in (("j", "2"), ("ArrowDown", "3"), ("j", "4"), ("k", "3")):
        tab.keyboard.press(key)
        assert focused(tab) == number
    site.server.turns = 14
    tab.wait_for_function("document.querySelector('.st-key-trace *') && true")
    wait_for(lambda: tab.locator(".row").count() == 14, "the new turns")
    assert focused(tab) == "3"
    tab.keyboard.press("Enter")
    wait_text(tab, "Turn 3")
    site.server.turns = 15
    wait_for(lambda: tab.locator(".row").count() == 15, "the new turn")
    assert focused(tab) == "3"
    assert "Turn 3" in tab.inner_text(".stMainBlockContainer")
    tab.keyboard.press("Escape")
    wait_for(lambda: "Turn 3" not in tab.inner_text(".stMainBlockContainer"), "the turn to close")
    assert focused(tab) == "3"
    tab.keyboard.press("Tab")
    assert focused(tab) is None
    tab.keyboard.press("Shift+Tab")
    assert focused(tab) == "3"


def test_q_and_escape_pause_only_while_keys_are_on(site: Site) -> None:
    tab = site.open()
    tab.wait_for_selector(TABS["Overview"])
    tab.keyboard.press("q")
    tab.wait_for_timeout(500)
    assert "PAUSED" not in status(tab)
    tab.get_by_role("button", name="Settings").click()
    tab.locator(".st-key-keys label").click()
    tab.wait_for_timeout(1500)
    tab.keyboard.press("Escape")  # closes the settings
    tab.wait_for_timeout(500)
    tab.locator(".st-key-status").click()
    if "PAUSED" in status(tab):
        tab.keyboard.press("q")
        tab.wait_for_function("!document.querySelector('.st-key-status').innerText.includes('PAUSED')")
    tab.keyboard.press("q")
    wait_text(tab, "PAUSED")
    tab.keyboard.press("Escape")
    tab.wait_for_function("!document.querySelector('.st-key-status').innerText.includes('PAUSED')")


def test_a_stretch_of_time_chosen_in_the_strip_is_what_all_charts_show(site: Site) -> None:
    tab = site.open()
    tab.wait_for_selector(TABS["Overview"])
    wait_for(lambda: tab.evaluate(SHOWN_TIMES) is not None, "the charts")
    before = tab.evaluate(SHOWN_TIMES)
    tab.locator(".stVegaLiteChart canvas").scroll_into_view_if_needed()
    box = tab.locator(".stVegaLiteChart canvas").bounding_box()
    tab.mouse.move(box["x"] + 500, box["y"] + 36)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 650, box["y"] + 36, steps=4)
    tab.mouse.up()

    def zoomed() -> bool:
        times = tab.evaluate(SHOWN_TIMES)
        return (
            all(end - begin < 0.5 * (before[0][1] - before[0][0]) for begin, end in times)
            and len({tuple(each) for each in times}) == 1
        )

    wait_for(zoomed, "all charts to show the same shorter time")
    tab.wait_for_timeout(6000)  # a refresh later
    assert zoomed()


def test_a_paused_page_asks_nothing_and_resumes_when_told(site: Site) -> None:
    tab = site.open()
    tab.wait_for_selector(TABS["Overview"])
    tab.get_by_role("button", name="Pause").click()
    wait_text(tab, "PAUSED")
    tab.wait_for_timeout(1200)
    asked = len(site.server.asked)
    site.server.document["queue"]["pending"] = 777
    tab.wait_for_timeout(2500)
    assert len(site.server.asked) == asked
    assert "777" not in tab.inner_text("body")
    tab.get_by_role("button", name="Resume").click()
    wait_text(tab, "777")


def test_the_page_outlives_the_proxys_restart_and_says_how_old_its_figures_are(site: Site) -> None:
    tab = site.open()
    wait_text(tab, "258", ".st-key-metrics_now")
    site.server.close()
    wait_text(tab, "There is no proxy at")
    wait_text(tab, "old.", ".st-key-status")
    assert "GPU-BOUND" not in status(tab)  # what was true then is not said of now
    site.server.document["queue"]["pending"] = 555
    site.server.open()
    wait_text(tab, "GPU-BOUND", ".st-key-status")
    wait_text(tab, "555", ".st-key-metrics_now")


@pytest.mark.parametrize(
    ("document", "code", "says"),
    [
        (stats.busy(schema_version=1), 200, "version 1 of /stats"),
        (stats.busy(), 401, "--token-file"),
        (stats.busy(), 503, "as the test said"),
        (stats.busy(), 404, "isn't Agent Infra's proxy"),
    ],
)
def test_a_page_without_figures_says_why_and_what_to_do(site: Site, document: Any, code: int, says: str) -> None:
    site.server.status = code
    tab = site.open(document)
    wait_text(tab, says)


def test_nobody_without_the_key_sees_anything(site: Site) -> None:
    tab = site.browser.new_page()
    tab.goto(site.url.partition("?")[0])
    tab.wait_for_selector("text=complete address")
    assert tab.query_selector(".st-key-status") is None
    assert site.key not in " ".join(site.command.process.args)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", range(4))
def test_hostile_text_is_shown_as_it_is(site: Site, number: int) -> None:
    document, text = stats.extreme(), stats.HOSTILE[number]
    document["recent_turns"][0].update(outcome="error", error=text)
    site.server.show(document)
    site.server.said = text
    tab = site.open(session=text)
    tab.wait_for_selector(".row")
    tab.locator(".row").nth(8).click()
    wait_text(tab, "Turn 9")
    codes = tab.locator("[data-testid=stCode]")
    wait_for(lambda: codes.all_inner_texts().count(codes.first.inner_text()) >= 3, "its id, prompt and answer")
    assert codes.first.inner_text().replace("\u00a0", " ") == text
    wait_text(tab, text[:60], ".st-key-status")
    assert tab.evaluate("window.hacked") is None
    inside = ":is(script, img, em, a[href^=javascript])"
    assert (
        tab.query_selector_all(f"[data-testid=stText] {inside}, [data-testid=stCode] {inside}, .stMetric {inside}")
        == []
    )
    assert_tidy(tab)


def test_what_has_not_changed_is_not_drawn_anew(site: Site) -> None:
    tab = site.open(session="task-0012")
    tab.wait_for_selector(".row")
    tab.wait_for_timeout(1500)
    tab.locator(".rows").evaluate(
        "rows => { window.changes = 0; new MutationObserver(all => window.changes += all.length).observe("
        "rows, {subtree: true, childList: true, attributes: true, characterData: true}) }"
    )
    tab.wait_for_timeout(2500)
    assert tab.evaluate("window.changes") == 0


SIMULATED = (
    lambda: simulated.document(140, 4, 10.0),
    lambda: simulated.document(220, 4, 10.0),
    lambda: simulated.document(24, 4, 30.0),
)
PICTURES: dict[str, tuple[Callable[[], Any], str, int, int, str]] = {  # name: (document, scheme, width, height, tab)
    "busy-light": (SIMULATED[0], "light", 1280, 1500, "Overview"),
    "busy-dark": (SIMULATED[0], "dark", 1280, 1500, "Overview"),
    "saturated": (SIMULATED[1], "light", 1920, 1100, "Analysis"),
    "agent-bound": (SIMULATED[2], "dark", 1920, 1100, "Analysis"),
    "phone": (stats.busy, "light", 390, 844, "Overview"),
    "phone-dark": (stats.all_down, "dark", 390, 844, "Overview"),
    "wide": (stats.busy, "light", 2560, 1300, "History"),
    "empty": (stats.empty, "light", 1280, 800, "Overview"),
    "failed": (stats.extreme, "dark", 1920, 1000, "Replicas"),
    "sessions": (stats.busy, "light", 1280, 1000, "Sessions"),
    "session": (stats.busy, "light", 1280, 1100, "Sessions"),
    "session-dark": (stats.busy, "dark", 1920, 1000, "Sessions"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "picture" in metafunc.fixturenames:
        every = metafunc.config.getoption("--screenshots")
        metafunc.parametrize("picture", PICTURES if every else ("busy-light", "saturated", "agent-bound"))


def test_fleets_are_shown_as_what_they_are(
    site: Site, request: pytest.FixtureRequest, tmp_path: Path, picture: str
) -> None:
    """The pictures of the documentation: --screenshots writes all of them anew."""
    make, scheme, width, height, each = PICTURES[picture]
    is_kept = request.config.getoption("--screenshots")
    document = make()
    check_stats(document)
    if make in SIMULATED:
        site.server.history = stats.recorded(document)
    is_trace = picture in ("session", "session-dark")
    options = {"session": "task-0012"} if is_trace else {"tab": each, "range": "15m"}
    tab = site.open(document, scheme, width, height, **options)
    if is_trace:
        tab.locator(".row").nth(6).click()
        wait_text(tab, "Turn 7")
    else:
        tab.wait_for_selector("[data-testid=stCode] code" if picture == "empty" else TABS[each])
    if picture in ("saturated", "agent-bound"):
        assert {"saturated": "GPU-BOUND", "agent-bound": "AGENT-BOUND"}[picture] in status(tab)
    tab.wait_for_function("!document.querySelector('[data-testid=stSkeleton]')")
    assert_tidy(tab)
    tab.wait_for_timeout(2500 if is_kept else 100)
    folder = MODULE.parent / "docs" if is_kept else tmp_path
    tab.screenshot(path=str(folder / f"page-{picture}.png"))


def test_a_page_whose_own_server_died_says_so(chromium: Any, tmp_path: Path) -> None:
    with stats.serving(stats.busy()) as server:
        port = next(port for port in iter(free_port, 0) if port != 10080)  # which Chromium refuses
        command = [sys.executable, str(MODULE), "dashboard", "--proxy", server.url, "--port", str(port)]
        environment = {"XDG_STATE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            wait_for(lambda: is_listening(port), "the page's server")
            tab = chromium.new_page()
            tab.goto(url)
            tab.wait_for_selector(".st-key-phases ul")
            process.send_signal(signal.SIGKILL)
            tab.wait_for_selector("text=Connection error", timeout=1000 * PATIENCE_S)
            tab.get_by_role("button", name="Close").click()
            tab.wait_for_selector(".stConnectionStatus", timeout=1000 * PATIENCE_S)  # also when that is closed
            tab.close()
        finally:
            process.kill()
            process.wait()
            process.stdout.close() if process.stdout else None


def test_up_brings_the_page_along_and_takes_it_with_it(tmp_path: Path, chromium: Any) -> None:
    """The real proxy, the embedded model, ten turns of the example: they are on the page, and can be opened."""
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
        tab.set_default_timeout(1000 * PATIENCE_S)
        collect_complaints(tab, complaints)
        tab.goto(f"{url}&tab=Sessions")
        wait_text(tab, "1 session, most recent first.")
        tab.wait_for_selector(TABS["Sessions"])
        tab.wait_for_timeout(500)
        open_row(tab, ".st-key-sessions", 0)
        tab.wait_for_selector(".row")
        assert tab.locator(".row").count() == 10
        tab.get_by_role("tab", name="Overview").click()
        tab.wait_for_selector(TABS["Overview"])
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
