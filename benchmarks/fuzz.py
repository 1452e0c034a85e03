#!/usr/bin/env python3
"""Ten minutes of nonsense, greed and broken engines, with well-behaved agents beside: do they notice, is all returned?

    python benchmarks/fuzz.py                  # ten minutes
    python benchmarks/fuzz.py --seconds 30     # shows that it works

Attackers send requests with a few bytes changed, dripping and endless ones, bodies made to be slow to read, pipelines
of fifty; they leave, or stay and read nothing. One model's engine answers nonsense. The agents' turns, plain and
streamed, must all be answered with exactly what each asked for. In the end nothing may be in flight, and the relay's
memory and open files must be what they were; the exit code is 1 if any of this fails.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench_process import BenchmarkError, proxy_and_load_cores, wait_until
from endurance import MODEL, Agent, RunningProxy, ScriptedEngine, ask, main, table, totals, tracebacks
from nonsense import BODY, EXPECTED, STREAM, assail, mutate, post
from relay_harness import Client

AGENTS, ATTACKERS = 6, 8
PATIENCE_S = 1.0  # of an attacker that may have been left without an answer
WILD = "wild"  # the model whose engine answers nonsense
DESCRIPTORS = 4096
SAMPLE_S = 2.0
SETTLE_S = 60.0  # for the last strangers' connections to be closed
GROWTH, GROWTH_MB = 1.05, 3.0  # of the relay's memory, from the middle of the run to its end
FLAT_AFTER_S = 300.0  # caches fill before

PLAIN_ANSWER = (
    b'{"choices":[{"index":0,"message":{"content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3}}'
)
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    % (len(PLAIN_ANSWER), PLAIN_ANSWER),
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in [EVENT] * 5 + [b"data: [DONE]\n\n"])
    + b"0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + EVENT * 5,
    b"HTTP/1.1 103 Hints\r\n\r\n" * 50 + b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n{}",
]


class WildEngine:
    """A server whose answers are nearly right; threads of this process."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock, self._chance.randrange(1 << 30)), daemon=True).start()

    def _serve(self, sock: socket.socket, seed: int) -> None:
        chance = random.Random(seed)
        sock.settimeout(10)
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(1 << 16):
                if data.startswith(b"GET"):
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                    continue
                sock.sendall(mutate(chance.choice(ANSWERS), chance))
                if chance.random() < 0.5:
                    return

    def close(self) -> None:
        self._listener.close()


# Attacks. Each takes the proxy's port and a source of randomness, and lasts a few seconds at most.


def nonsense(port: int, chance: random.Random) -> set[int]:
    """Requests with a few bytes changed."""
    found = set[int]()
    for _ in range(20):
        with contextlib.suppress(TimeoutError):  # the proxy waits for the rest, or for the next request
            found |= assail(port, chance, PATIENCE_S)
    return found


def wild_turn(port: int, chance: random.Random) -> set[int]:
    """Turns with the engine that answers nonsense; their status may be any."""
    for _ in range(10):
        with Client(port, PATIENCE_S) as client, contextlib.suppress(TimeoutError):
            body = chance.choice([BODY, STREAM]).replace(b'"m"', b'"%b"' % WILD.encode())
            client.sock.sendall(post(body))
            client.read()
    return set()


def drip(port: int, chance: random.Random) -> set[int]:
    """A request that comes byte by byte and is given up."""
    with Client(port) as client:
        data = post(BODY)
        for at in range(chance.randrange(len(data))):
            client.sock.sendall(data[at : at + 1])
            time.sleep(0.005)
    return set()


def tiny_chunks(port: int, _: random.Random) -> set[int]:
    """A body in 200,000 chunks of one byte."""
    with Client(port) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sock.sendall(head + b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n")
        return {client.read().status}


def heavy(port: int, chance: random.Random) -> set[int]:
    """A body that is slow to read: a megabyte of empty objects, or of nested lists."""
    filling = chance.choice([b"{}," * 350_000 + b"{}", b"[" * 500 + b"]" * 500, b'"\\ud83d",' * 100_000 + b'""'])
    with Client(port) as client:
        client.sock.sendall(post(b'{"model":"m","messages":[%b]}' % filling))
        return {client.read().status}


def leave(port: int, chance: random.Random) -> set[int]:
    """Streams whose client leaves after some of it."""
    for _ in range(5):
        with Client(port) as client:
            document = {"model": MODEL, "messages": [], "stream": True, "fake": {"tokens": 200, "gap": 0.01}}
            client.sock.sendall(post(json.dumps(document).encode()))
            client.sock.recv(chance.randrange(1, 4000))
    return set()


def deaf(port: int, _: random.Random) -> set[int]:
    """A client that reads nothing of a long answer."""
    with Client(port, is_narrow=True) as client:
        client.sock.sendall(post(json.dumps({"model": MODEL, "messages": [], "fake": {"size": 20_000_000}}).encode()))
        time.sleep(2.0)
    return set()


def strangers(port: int, chance: random.Random) -> set[int]:
    """Connections that send nothing, or the beginning of a head."""
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            client = stack.enter_context(Client(port))
            client.sock.sendall(chance.choice([b"", b"POST /v1", b"\r\n"]))
        time.sleep(1.0)
    return set()


def pipeline(port: int, _: random.Random) -> set[int]:
    """Fifty requests at once on one connection."""
    with Client(port) as client:
        client.sock.sendall(post(BODY) * 50)
        return {client.read().status for _ in range(50)}


ATTACKS: Mapping[Callable[[int, random.Random], set[int]], int] = {  # and how often each is chosen
    nonsense: 8, wild_turn: 4, drip: 1, tiny_chunks: 1, heavy: 1, leave: 2, deaf: 1, strangers: 1, pipeline: 1
}  # fmt: skip


class Attacker:
    """One attack after the other; owns a thread. ``bug`` is what ended it, if anything did."""

    def __init__(self, port: int, seed: int, over: threading.Event) -> None:
        self.statuses, self.attacks = set[int](), Counter[str]()
        self.bug: BaseException | None = None
        self._port, self._chance, self._over = port, random.Random(seed), over
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(120)

    def _run(self) -> None:
        while not self._over.is_set():
            (attack,) = self._chance.choices([*ATTACKS], [*ATTACKS.values()])
            self.attacks[attack.__name__] += 1
            try:
                self.statuses |= attack(self._port, self._chance)
            except (ConnectionResetError, BrokenPipeError):  # refused in the middle of what it sent
                continue
            except BaseException as error:  # noqa: BLE001 - reported at the end
                self.bug = error
                return


def run(seconds: float, seed: int, folder: Path) -> list[str]:
    """One run; prints the report. Returns what went wrong."""
    proxy_cores, load_cores = proxy_and_load_cores()
    with contextlib.ExitStack() as stack:
        engines = [ScriptedEngine(folder, load_cores) for _ in range(2)]
        wild = WildEngine(seed)
        stack.callback(wild.close)
        for engine in engines:
            stack.callback(engine.stop)
        backends = {MODEL: [engine.port for engine in engines], WILD: [wild.port]}
        proxy = RunningProxy(folder, proxy_cores, backends, DESCRIPTORS)
        stack.callback(proxy.stop)
        proxy.start()
        ask(proxy.port, "GET", "/v1/models")  # Flask and all are loaded
        before, relay = proxy.usage(), proxy.relay()
        over = threading.Event()
        stack.callback(over.set)
        agents = [Agent(proxy.port, f"agent-{number}", seed + number, over) for number in range(AGENTS)]
        attackers = [Attacker(proxy.port, seed + 1000 + number, over) for number in range(ATTACKERS)]
        samples = _watch(proxy, agents, seconds)
        over.set()
        for agent in agents:
            agent.join()
        for attacker in attackers:
            attacker.join()
        problems = _left_behind(proxy, engines, before)
        usage = proxy.usage()
        print(_report(agents, attackers, samples, before, usage))
        return problems + _judge(agents, attackers, samples, relay, proxy)


def _watch(proxy: RunningProxy, agents: list[Agent], seconds: float) -> list[tuple[float, dict[str, float]]]:
    """Samples of the usage, and a line a minute."""
    samples, start, report_at = list[tuple[float, dict[str, float]]](), time.monotonic(), 0.0
    while (passed := time.monotonic() - start) < seconds:
        samples.append((passed, proxy.usage()))
        if passed >= report_at:
            report_at += 60.0
            print(f"{passed:5.0f} s  {dict(totals(agents))}  {samples[-1][1]}", file=sys.stderr, flush=True)
        time.sleep(SAMPLE_S)
    return samples


def _left_behind(proxy: RunningProxy, engines: list[ScriptedEngine], before: Mapping[str, float]) -> list[str]:
    """What is still held once nobody asks for anything."""
    problems = []

    def is_idle() -> bool:
        queue = json.loads(ask(proxy.port, "GET", "/queue/status"))
        return bool(queue["pending"] == 0 and queue["in_flight"] == 0)

    def is_closed() -> bool:
        return proxy.usage()["files"] <= before["files"] + 1  # this very question may have one

    for condition, what in ((is_idle, "turns are still in flight"), (is_closed, "files are still open")):
        try:
            for engine in engines if condition is is_closed else ():
                engine.stop()  # closes the idle connections to them
            wait_until(condition, what, SETTLE_S)
        except BenchmarkError:
            problems.append(f"{what}: {proxy.usage()}, before {before}")
    return problems


def _judge(
    agents: list[Agent], attackers: list[Attacker], samples: list[tuple[float, dict[str, float]]], relay: int,
    proxy: RunningProxy,
) -> list[str]:  # fmt: skip
    problems = [f"{bad}" for agent in agents for bad in agent.log if bad.outcome != "completed"][:20]
    problems += [f"an attack failed: {attacker.bug!r}" for attacker in attackers if attacker.bug is not None]
    if unexpected := set().union(*(attacker.statuses for attacker in attackers)) - EXPECTED - {0}:
        problems.append(f"unexpected statuses: {unexpected}")
    if proxy.relay() != relay:
        problems.append("the relay was replaced")
    problems += tracebacks(proxy.relay_log)
    middle, end = (_median(samples, share, "relay_mb") for share in ((0.4, 0.6), (0.8, 1.0)))
    is_long = samples[-1][0] >= FLAT_AFTER_S
    if is_long and end > middle * GROWTH + GROWTH_MB:
        problems.append(f"the relay grew from {middle:.1f} to {end:.1f} MB")
    return problems


def _median(samples: list[tuple[float, dict[str, float]]], share: tuple[float, float], name: str) -> float:
    """Of a part of the run."""
    first, last = (round(part * (len(samples) - 1)) for part in share)
    return statistics.median(sample[name] for _, sample in samples[first : last + 1])


def _report(
    agents: list[Agent], attackers: list[Attacker], samples: list[tuple[float, dict[str, float]]],
    before: Mapping[str, float], after: Mapping[str, float],
) -> str:  # fmt: skip
    rows: list[list[Any]] = [["before", *(f"{before[name]:.1f}" for name in before)]]
    for first, last in ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0)):
        medians = [f"{_median(samples, (first, last), name):.1f}" for name in before]
        rows.append([f"{first:.0%} to {last:.0%} (median)", *medians])
    rows.append(["after", *(f"{after[name]:.1f}" for name in before)])
    attacks = sum((attacker.attacks for attacker in attackers), Counter[str]())
    lines = [table(["", "relay RSS, MB", "controller RSS, MB", "relay's files"], rows), ""]
    lines += [f"turns of the agents: {dict(totals(agents))}", f"attacks: {dict(attacks)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, 600.0, run, "all answers right, nothing left behind")
