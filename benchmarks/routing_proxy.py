#!/usr/bin/env python3
"""The simulated fleet's workloads through the real proxy: agents over HTTP, in front of engines with prefix caches.

    python benchmarks/routing_proxy.py                       # four engines, four workloads, about eight minutes
    python benchmarks/routing_proxy.py --engines 16 --workloads swe

Every engine is a Replica of routing_simulator.py behind a socket, its clock SPEED_UP times as fast as the wall's; so
turns last as long as on a GPU, scaled. Agents run the scripts of routing.py. Each workload runs with the proxy's
default, without session affinity, round robin, and straight at the engines with sticky sessions; the default also
without any session header. The figures are of engine time: multiply by SPEED_UP what a clock on the wall shows.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from relay_harness import KEY, RelayProcess, backend
from routing import WORKLOADS, Scripts, Workload, build_fleet
from routing_simulator import Chain, Physics, Replica, Script, Session, Turn

SPEED_UP = 40.0
SEED = 1
PROXIES = {
    "default": {},
    "default, no headers": {},
    "no affinity": {"session_affinity": "off"},
    "round robin": {"strategy": "round_robin"},
}
STICKY = "sticky sessions, no proxy"


def now() -> float:
    return time.monotonic() * SPEED_UP


class Engine:
    """A simulated replica that answers HTTP. A request's chain of segments stands in its field ``chain``."""

    def __init__(self, physics: Physics, speed: float) -> None:
        self.replica = Replica(physics, speed)
        self._physics = physics
        self._waits: dict[int, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):  # of its health
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    continue
                body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                answer = await self._answer(json.loads(body))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
                writer.write(b"content-length: %d\r\n\r\n%b" % (len(answer), answer))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, request: dict[str, Any]) -> bytes:
        chain: Chain = tuple((key, tokens) for key, tokens in request["chain"])
        prompt = sum(tokens for _, tokens in chain)
        turn = Turn(Session(0, Script((), ()), chain), chain, prompt, request["max_tokens"], now())
        done = self._waits[id(turn)] = asyncio.get_running_loop().create_future()
        self.replica.submit(turn, now())
        self._set_timer()
        await done
        details = {"cached_tokens": turn.cached}
        usage = {"prompt_tokens": prompt, "completion_tokens": turn.output, "prompt_tokens_details": details}
        message = {"role": "assistant", "content": request["say"]}
        return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if not math.isinf(self.replica.due):
            delay = max(0.0, (self.replica.due - now()) / SPEED_UP)
            self._timer = asyncio.get_running_loop().call_later(delay, self._advance)

    def _advance(self) -> None:
        while self.replica.due <= now():  # in its own time, however late the timer is
            for turn in self.replica.advance(self.replica.due):
                self._waits.pop(id(turn)).set_result(None)
        self._set_timer()


def run_engines(physics: Physics, speeds: Sequence[float], pipe: Connection) -> None:
    """A process: serve until it is killed; tells its ports, each engine's GET /load beside it."""

    async def load(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"state":"ready","kv_capacity_tokens":%d}' % physics.kv_tokens
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body))
        writer.close()

    async def serve() -> None:
        ports = []
        for speed in speeds:
            servers = [
                await asyncio.start_server(each, "127.0.0.1", 0) for each in (Engine(physics, speed).serve, load)
            ]
            ports.append([server.sockets[0].getsockname()[1] for server in servers])
        pipe.send(ports)
        await asyncio.Event().wait()

    asyncio.run(serve())


@dataclass
class Agents:
    """Runs a workload's scripts against ``ports``, one of them (a proxy) or several (engines: sticky sessions)."""

    workload: Workload
    ports: Sequence[int]
    has_headers: bool
    latencies: list[float] = field(default_factory=list)
    served: dict[int, list[str]] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    async def run(self) -> float:
        """Run all scripts. Returns the engine seconds that it took."""
        scripts, began = iter(enumerate(Scripts(self.workload, SEED).draw(), 1)), now()
        self._sessions = Counter(dict.fromkeys(self.ports, 0))

        async def agent(number: int) -> None:
            await asyncio.sleep(self.workload.ramp_s * number / self.workload.agents / SPEED_UP)
            for index, script in scripts:
                await self._session(1_000_000 + index, script)

        await asyncio.gather(*(agent(number) for number in range(self.workload.agents)))
        return now() - began

    async def _session(self, number: int, script: Script) -> None:
        port = min(self.ports, key=self._sessions.__getitem__)
        self._sessions[port] += 1
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        own, messages = 0, [{"role": "system", "content": "s" * sum(tokens for _, tokens in script.shared)}]
        for index, step in enumerate(script.steps):
            own += step.appended
            messages.append({"role": "user", "content": f"{number} {index} ".ljust(step.appended, "u")})
            is_last = index == len(script.steps) - 1
            said = f"{number} {index} ".ljust(step.output, "a")
            request = {
                "model": "m", "messages": messages, "chain": [*script.shared, (number, own)],
                "max_tokens": step.output, "say": said,
            }  # fmt: skip
            await self._turn(reader, writer, number, request, is_last)
            own += step.output
            messages.append({"role": "assistant", "content": said})
            if not is_last:
                await asyncio.sleep(step.think_s / SPEED_UP)
        writer.close()
        self._sessions[port] -= 1

    async def _turn(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, request: Any, is_last: bool
    ) -> None:
        body, began = json.dumps(request).encode(), now()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: b\r\nauthorization: Bearer {KEY}\r\n"
        if self.has_headers:
            head += f"x-session-id: {number}\r\n" + ("x-session-end: true\r\n" if is_last else "")
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answered = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        fields = dict(line.split(": ", 1) for line in answered.split("\r\n")[1:] if line)
        answer = json.loads(await reader.readexactly(int(fields["content-length"])))
        if "usage" not in answer:
            raise RuntimeError(f"a turn failed: {answer}")
        self.latencies.append(now() - began)
        self.served.setdefault(number, []).append(fields.get("x-agent-infra-backend", ""))
        self.prompt_tokens += answer["usage"]["prompt_tokens"]
        self.cached_tokens += answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@contextmanager
def engines(workload: Workload) -> Iterator[list[list[int]]]:
    """The ports of fresh engines with empty caches: of each its own and that of its /load."""
    fleet = build_fleet(workload, SEED)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=run_engines, args=(fleet.physics, fleet.speeds, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def run(workload: Workload, way: str) -> tuple[float, Agents]:
    """Run a workload in one way. Returns its engine seconds, and the agents with what they saw."""
    with engines(workload) as ports, tempfile.TemporaryDirectory() as directory:
        if way == STICKY:
            agents = Agents(workload, [port for port, _ in ports], has_headers=False)
            return asyncio.run(agents.run()), agents
        with RelayProcess(Path(directory)) as relay:
            rows = [backend(number, port, telemetry_port=load) for number, (port, load) in enumerate(ports)]
            relay.controller.send_table(rows, proxy=PROXIES[way])
            time.sleep(2.0)  # until the replicas' capacity is known
            agents = Agents(workload, [relay.port], has_headers="no headers" not in way)
            return asyncio.run(agents.run()), agents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--workloads", nargs="+", default=["swe", "skewed", "paced", "no-reuse"], metavar="NAME")
    parser.add_argument("--ways", nargs="+", choices=[*PROXIES, STICKY], default=[*PROXIES, STICKY], metavar="WAY")
    args = parser.parse_args()
    for name in args.workloads:
        base, scale = WORKLOADS[name], args.engines / WORKLOADS[name].replicas
        steps = (min(base.steps[0], 12.0), base.steps[1])
        agents, sessions = round(base.agents * scale), round(base.agents * scale * (12 if steps[0] == 1 else 1.5))
        workload = dataclasses.replace(base, replicas=args.engines, agents=agents, sessions=sessions, steps=steps)
        print(f"\n{name}: {args.engines} engines, {agents} agents, {sessions} sessions\n")
        print("| way | engine s | mean turn s | p95 s | hits | replicas per session |\n|---|---|---|---|---|---|")
        for way in args.ways:
            seconds, seen = run(workload, way)
            latencies = sorted(seen.latencies)
            replicas = statistics.fmean(len(set(served)) for served in seen.served.values())
            hits = seen.cached_tokens / seen.prompt_tokens
            print(
                f"| {way} | {seconds:.0f} | {statistics.fmean(latencies):.2f} | "
                f"{latencies[int(0.95 * len(latencies))]:.2f} | {hits:.3f} | {replicas:.2f} |", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main()
