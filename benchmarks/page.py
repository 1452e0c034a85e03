#!/usr/bin/env python3
"""What the page costs: first paint, and the CPU of its server and of a browser that shows it, refreshed once a second.

    python benchmarks/page.py                     # 64 replicas, 2,000 live sessions, whose figures change all the time
    python benchmarks/page.py --seconds 60 --tab Sessions
    python benchmarks/page.py --seconds 600       # whether memory stays flat

Needs Chromium (apt-get install chromium) and playwright (pip install -e '.[test]').  A viewer paints first when the
status is there, and has the page whole with its figures and charts.  Memory is that of the page's server and of the
browser, at the beginning of the stay, after each minute and at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import stats_server as stats  # noqa: E402
from bench_process import Child, cpu_seconds, free_port, process_tree, wait_until  # noqa: E402
from program import is_listening  # noqa: E402

SESSIONS_THAT_MOVE = 0.3  # a second
WHOLE = {  # what a tab has when it is there
    "Overview": ".stVegaLiteChart canvas",
    "Sessions": ".st-key-sessions canvas",
    "Replicas": ".st-key-replicas canvas",
    "Analysis": "text=Where the time of turns goes",
    "History": ".stVegaLiteChart canvas",
}


def move(server: stats.StatsServer, step: int) -> None:
    """A second of a busy fleet: every replica, a third of the listed sessions and ten turns change."""
    document = server.document
    for row in server.sessions:
        if row["state"] != "ended" and random.random() < SESSIONS_THAT_MOVE:
            row.update(turns=row["turns"] + 1, last_at=document["now"], queued_s=row["queued_s"] + random.random())
    document["now"] += 1
    for row in document["backends"]:
        row.update(inflight=random.randint(10, 40), requests=row["requests"] + 1)
        row["inflight_history"] = [*row["inflight_history"][1:], row["inflight"]]
        row["engine"]["kv_usage"] = random.random()
    for client in document["clients"]:
        for row in client["sessions"]:
            if random.random() < SESSIONS_THAT_MOVE:
                row.update(turns=row["turns"] + 1, last_seen=document["now"])
                row["inference_ms"] = (row["inference_ms"] or 0) + 5000
    new = [stats.turn(1000 + 10 * step + number, "task-0001", finished_at=document["now"]) for number in range(10)]
    document["recent_turns"] = new + document["recent_turns"][:-10]
    document["throughput"].update(turns_per_minute=700 + random.random() * 40, tokens_per_second=1500 + random.random())
    document["queue"].update(pending=random.randint(0, 9), in_flight=random.randint(100, 150))
    history = document["throughput"]["history"]
    history[:] = [*history[1:], {**history[-1], "at": document["now"], "turns_per_minute": 700 + random.random() * 40}]


def measure(browser: Any, url: str, whole: str, server_pid: int, asked: Sequence[str], seconds: float) -> None:
    """Print the figures of one viewer after another, then those of the last one's stay."""
    for viewer in ("first viewer", "second viewer", "third viewer"):
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        began = time.monotonic()
        tab.goto(url)
        tab.wait_for_selector(".st-key-status .root")
        first_s = time.monotonic() - began
        tab.wait_for_selector(whole)
        print(f"{viewer}: first paint {first_s:.2f} s, whole {time.monotonic() - began:.2f} s", flush=True)
        if viewer != "third viewer":
            tab.close()
    time.sleep(5)
    ours = set(process_tree(server_pid))
    shown = [pid for pid in process_tree(os.getpid()) if pid not in ours and pid != os.getpid()]
    server_s, browser_s, asked_before, began = cpu_seconds(ours), cpu_seconds(shown), len(asked), time.monotonic()
    while (wall_s := time.monotonic() - began) < seconds:
        print(f"{wall_s:.0f} s: server {memory_mib(ours):.0f} MiB, browser {memory_mib(shown):.0f} MiB", flush=True)
        time.sleep(min(60.0, seconds - wall_s))
    refreshed = asked[asked_before:].count("/stats") / wall_s
    print(f"refreshed {refreshed:.2f} times a second")  # fewer than 1: the machine is busy
    print(f"page's server: {(cpu_seconds(ours) - server_s) / wall_s:.2f} of a core")
    print(f"browser: {(cpu_seconds(shown) - browser_s) / wall_s:.2f} of a core")
    print(f"memory: server {memory_mib(ours):.0f} MiB, browser {memory_mib(shown):.0f} MiB")


def memory_mib(pids: Iterable[int]) -> float:
    """Proportional set size of processes that may have ended meanwhile (MiB)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
            total += int(found[1]) if found else 0
    return total / 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Measure once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of steady showing")
    parser.add_argument("--tab", choices=list(WHOLE), default="Overview", help="the one that is open")
    arguments, port, stopping = parser.parse_args(argv), free_port(), threading.Event()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        parser.error(f"playwright is not installed for {sys.executable}: pip install -e '.[test]'")
    command = [sys.executable, str(ROOT / "agent_infra.py"), "dashboard", "--port", str(port), "--proxy"]
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with stats.serving(stats.extreme()) as server:

        def keep_moving() -> None:
            step = 0
            while not stopping.wait(1.0):
                step += 1
                move(server, step)

        mover = threading.Thread(target=keep_moving, name="fleet")
        mover.start()
        try:
            with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
                state, cores = Path(name), os.sched_getaffinity(0)
                with Child([*command, server.url], cores, state / "log", {"XDG_STATE_HOME": name}) as child:
                    wait_until(lambda: is_listening(port), "the page's server")
                    flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
                    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
                    key = (state / "agent-infra/default/page_key").read_text().strip()
                    url = f"http://127.0.0.1:{port}/?key={key}&tab={arguments.tab}"
                    measure(browser, url, WHOLE[arguments.tab], child.pid, server.asked, arguments.seconds)
                    browser.close()
        finally:
            stopping.set()
            mover.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
