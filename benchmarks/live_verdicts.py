#!/usr/bin/env python3
"""Runs that change, through the real proxy: how soon is the verdict right, and does it stay so?

    python benchmarks/live_verdicts.py                        # every change at once, in about four minutes
    python benchmarks/live_verdicts.py --changes killed think --at-once 1

Each change has a proxy of its own, before two engines (tests/fake_engine.py) in which a turn takes A + B·n seconds with
n of them in the works. Agents think, send turns and report the ends of their sessions. After WARM_S something changes;
for WATCHED_S, /stats is read every second. What is right before and after follows from the closed form.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fake_engine import FakeEngine
from program import Program, program

A_S, B_S = 0.5, 0.07
TURNS = 15  # of a session
WARM_S = 90.0
WATCHED_S = 150.0
DUE_S = 60.0


@dataclass
class Scene:
    """A proxy, its engines and its agents."""

    proxy: Program
    engines: list[FakeEngine]
    think_s: float
    agents: list[asyncio.Task[None]] = field(default_factory=list)

    def add(self, agents: int) -> None:
        for _ in range(agents):
            self.agents.append(asyncio.create_task(self._agent(len(self.agents))))

    def kill(self, agents: int) -> None:
        """The latest agents die, and end no session."""
        for _ in range(agents):
            self.agents.pop().cancel()

    async def _agent(self, number: int) -> None:
        dice = random.Random(number)
        await asyncio.sleep(dice.uniform(0, self.think_s))
        for session in itertools.count():
            left = dice.randint(1, TURNS) if session == 0 else TURNS
            for turn in range(left):
                await self._turn(f"{number}-{session}", turn == left - 1)
                await asyncio.sleep(dice.expovariate(1 / self.think_s))

    async def _turn(self, session: str, is_last: bool) -> None:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": session}]}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: b\r\nconnection: close\r\nx-session-id: {session}\r\n"
        head += "x-session-end: true\r\n" if is_last else ""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port)
            try:
                writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                await reader.read()
            finally:
                writer.close()


def slow_down(scene: Scene) -> None:
    scene.engines[-1].call({"base_s": 2.5 * A_S, "each_s": 2.5 * B_S, "slots": 256})


@dataclass(frozen=True)
class Change:
    """What happens, and the verdict before and after it; ``flag`` is a flag that must appear."""

    agents: int
    happens: Callable[[Scene], None]
    before: str
    after: tuple[str, ...]
    flag: str | None = None


CHANGES = {
    "replica killed": Change(36, lambda scene: scene.engines.pop().kill(), "AGENT-BOUND", ("GPU-BOUND",), "UNHEALTHY"),
    "replica slowed": Change(36, slow_down, "AGENT-BOUND", ("AGENT-BOUND", "BALANCED", "GPU-BOUND"), "SLOW"),
    "agents doubled": Change(36, lambda scene: scene.add(36), "AGENT-BOUND", ("GPU-BOUND",)),
    "agents killed": Change(72, lambda scene: scene.kill(54), "GPU-BOUND", ("AGENT-BOUND",)),
    "think time": Change(36, lambda scene: setattr(scene, "think_s", 0.3), "AGENT-BOUND", ("GPU-BOUND",)),
}


@dataclass
class Seen:
    """What /stats said: the verdict before the change, and ``(s since the change, verdict, flags)`` after it."""

    before: str = ""
    after: list[tuple[float, str, set[str]]] = field(default_factory=list)

    def row(self, name: str, change: Change) -> tuple[str, bool]:
        """A row of the table, and whether all is as it must be."""

        def is_right(verdict: str, flags: set[str]) -> bool:
            return verdict in change.after and (change.flag is None or change.flag in flags)

        wrong = [at for at, verdict, flags in self.after if not is_right(verdict, flags)]
        right_after = max(wrong, default=0.0)
        names = [verdict for _, verdict, _ in self.after]
        changes = sum(now != then for then, now in itertools.pairwise(names))
        is_good = right_after <= DUE_S and self.before == change.before and changes <= 2
        end = f"{names[-1]} {' '.join(sorted(self.after[-1][2]))}".strip()
        return f"| {name:14} | {self.before:11} | {end:30} | {right_after:5.0f} s | {changes:7} |", is_good


async def play(change: Change, folder: Path) -> Seen:
    """Run one change."""
    seen = Seen()
    with program(folder) as proxy, contextlib.ExitStack() as stack:
        engines = [stack.enter_context(FakeEngine(base_s=A_S, each_s=B_S, slots=256)) for _ in range(2)]
        second = ("--backend", f"m=127.0.0.1:{engines[1].port}")
        running = proxy.spawn(
            "proxy", "--port", str(proxy.port), "--backend", f"m=127.0.0.1:{engines[0].port}", *second
        )
        await asyncio.to_thread(running.wait_line, "^proxy  http")
        scene = Scene(proxy, engines, 2.0)
        scene.add(change.agents)

        async def look() -> tuple[str, set[str]]:
            [entry] = (await asyncio.to_thread(proxy.get, "/stats"))["analysis"] or [{}]
            flags = {flag["name"] for flag in entry.get("flags", ())}
            return entry.get("verdict", {}).get("name", "none"), flags

        end = time.monotonic() + WARM_S
        while time.monotonic() < end:
            seen.before, _ = await look()
            await asyncio.sleep(1.0)
        began = time.monotonic()
        change.happens(scene)
        while time.monotonic() < began + WATCHED_S:
            seen.after.append((time.monotonic() - began, *await look()))
            await asyncio.sleep(1.0)
        for agent in scene.agents:
            agent.cancel()
    return seen


async def play_all(names: Sequence[str], at_once: int, folder: Path) -> list[Seen]:
    turn = asyncio.Semaphore(at_once)

    async def one(name: str) -> Seen:
        async with turn:
            home = folder / name.replace(" ", "-")
            home.mkdir()
            return await play(CHANGES[name], home)

    return await asyncio.gather(*(one(name) for name in names))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns 1 if a verdict is late, wrong or unsteady."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--changes", nargs="+", choices=list(CHANGES), default=list(CHANGES), metavar="NAME")
    parser.add_argument("--at-once", type=int, default=len(CHANGES), help="proxies that run at the same time")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(play_all(options.changes, options.at_once, Path(folder)))
    rows = [seen.row(name, CHANGES[name]) for name, seen in zip(options.changes, found, strict=True)]
    print("| change         | before      | in the end                     | right by | changes |")
    print("|----------------|-------------|--------------------------------|---------:|--------:|")
    for row, _ in rows:
        print(row)
    return 0 if all(is_good for _, is_good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
