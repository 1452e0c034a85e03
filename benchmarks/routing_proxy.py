#!/usr/bin/env python3
"""The simulated fleet's workloads through the real proxy: agents over HTTP, in front of engines with prefix caches.

    python benchmarks/routing_proxy.py                       # four engines, nine workloads, about 20 minutes
    python benchmarks/routing_proxy.py --engines 16 --speed-up 10 --workloads swe skewed

Every engine is a Replica of routing/simulator.py behind a socket, its clock --speed-up times as fast as the wall's; so
turns last as long as on a GPU, scaled. Agents run the scripts of routing.py, shortened. Each workload runs with the
proxy's default, without session affinity, round robin, and straight at the engines with sticky sessions; the default
also without any session header. The figures are of engine time; throughput is that of the first 90 % of the turns, over
the default's. A machine that can't follow shows as "late": the mean time by which engines were behind their own clock,
per turn. Then choose a lower --speed-up.
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
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from relay_harness import KEY, RelayProcess, backend
from routing import WORKLOADS, Scripts, Workload, build_fleet

from agent_infra_core.routing.simulator import Chain, Physics, Replica, Script, Session, Turn

SEED = 1
WORKLOADS_RUN = ["steady", "swe", "skewed", "paced", "no-reuse", "slow-replica", "flushed", "burst", "fanout"]
LONGEST_SESSION = 10.0  # steps, in the median
MOST = 0.9  # of the turns count for the throughput: the last ones are those of a few long sessions
PROXIES = {
    "default": {},
    "default, no headers": {},
    "no affinity": {"session_affinity": "off"},
    "round robin": {"strategy": "round_robin"},
}
STICKY = "sticky sessions, no proxy"


@dataclass(frozen=True)
class Clock:
    """Engine seconds, of which ``speed_up`` pass in one of the wall's."""

    speed_up: float

    def now(self) -> float:
        return time.monotonic() * self.speed_up

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.speed_up)


class Engine:
    """A simulated replica that answers HTTP. A request's chain of segments stands in its field ``chain``."""

    def __init__(self, physics: Physics, speed: float, clock: Clock) -> None:
        self.replica = Replica(physics, speed)
        self._physics, self._clock = physics, clock
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
        turn = Turn(Session(0, Script((), ()), chain), chain, prompt, request["max_tokens"], self._clock.now())
        done = self._waits[id(turn)] = asyncio.get_running_loop().create_future()
        self.replica.submit(turn, self._clock.now())
        self._set_timer()
        await done
        late_s = self._clock.now() - turn.finished
        details = {"cached_tokens": turn.cached}
        usage = {"prompt_tokens": prompt, "completion_tokens": turn.output, "prompt_tokens_details": details}
        message = {"role": "assistant", "content": request["say"]}
        choices = [{"message": message, "finish_reason": "stop"}]
        return json.dumps({"choices": choices, "usage": usage, "late_s": late_s}).encode()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if not math.isinf(self.replica.due):
            delay = max(0.0, (self.replica.due - self._clock.now()) / self._clock.speed_up)
            self._timer = asyncio.get_running_loop().call_later(delay, self._advance)

    def _advance(self) -> None:
        while (due := self.replica.due) <= self._clock.now():  # in its own time, however late the timer is
            for turn in self.replica.advance(due):
                turn.finished = due
                self._waits.pop(id(turn)).set_result(None)
        self._set_timer()


def run_engines(physics: Physics, speeds: Sequence[float], flush_s: float, clock: Clock, pipe: Connection) -> None:
    """A process: serve until it is killed; tells its ports, each engine's GET /load beside it. The first engine loses
    its cache after ``flush_s``, if that isn't 0."""

    async def load(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"state":"ready","kv_capacity_tokens":%d}' % physics.kv_tokens
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body))
        writer.close()

    async def serve() -> None:
        ports, fleet = [], [Engine(physics, speed, clock) for speed in speeds]
        for engine in fleet:
            servers = [await asyncio.start_server(each, "127.0.0.1", 0) for each in (engine.serve, load)]
            ports.append([server.sockets[0].getsockname()[1] for server in servers])
        pipe.send(ports)
        if flush_s:
            await clock.sleep(flush_s)
            fleet[0].replica.cache.clear()
        await asyncio.Event().wait()

    asyncio.run(serve())


@dataclass
class Agents:
    """Runs a workload's scripts against ``ports``, one of them (a proxy) or several (engines: sticky sessions)."""

    workload: Workload
    ports: Sequence[int]
    has_headers: bool
    clock: Clock
    late_s: float = 0.0
    latencies: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)  # engine seconds since the start
    served: dict[int, list[str]] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    async def run(self) -> float:
        """Run all scripts. Returns the engine seconds that it took."""
        scripts, self._began = iter(Scripts(self.workload, SEED).draw()), self.clock.now()
        self._sessions, self._numbers = Counter(dict.fromkeys(self.ports, 0)), count(1_000_001)

        async def agent(number: int) -> None:
            await self.clock.sleep(self.workload.ramp_s * number / self.workload.agents)
            for script in scripts:
                await self._session(script, script.shared, [_system(script)])

        await asyncio.gather(*(agent(number) for number in range(self.workload.agents)))
        return self.clock.now() - self._began

    async def _session(self, script: Script, shared: Chain, messages: list[dict[str, str]]) -> None:
        """Run a session. Its first prompt begins with ``messages``, which are cached as ``shared``."""
        number = next(self._numbers)
        port = min(self.ports, key=self._sessions.__getitem__)
        self._sessions[port] += 1
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        own = 0
        for index, step in enumerate(script.steps):
            own += step.appended
            messages.append({"role": "user", "content": f"{number} {index} ".ljust(step.appended, "u")})
            is_last = index == len(script.steps) - 1
            said = f"{number} {index} ".ljust(step.output, "a")
            request = {
                "model": "m", "messages": messages, "chain": [*shared, (number, own)],
                "max_tokens": step.output, "say": said,
            }  # fmt: skip
            await self._turn(reader, writer, number, request, is_last)
            own += step.output
            messages.append({"role": "assistant", "content": said})
            chain = (*shared, (number, own))
            await asyncio.gather(
                *(
                    self._session(fork, *((chain, list(messages)) if fork.inherits else (fork.shared, [_system(fork)])))
                    for fork in step.forks
                )
            )
            if not is_last:
                await self.clock.sleep(step.think_s)
        writer.close()
        self._sessions[port] -= 1

    async def _turn(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, request: Any, is_last: bool
    ) -> None:
        body, began = json.dumps(request).encode(), self.clock.now()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: b\r\nauthorization: Bearer {KEY}\r\n"
        if self.has_headers:
            head += f"x-session-id: {number}\r\n" + ("x-session-end: true\r\n" if is_last else "")
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answered = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        fields = dict(line.split(": ", 1) for line in answered.split("\r\n")[1:] if line)
        answer = json.loads(await reader.readexactly(int(fields["content-length"])))
        if "usage" not in answer:
            raise RuntimeError(f"a turn failed: {answer}")
        self.latencies.append(self.clock.now() - began)
        self.answered.append(self.clock.now() - self._began)
        self.late_s += answer["late_s"]
        self.served.setdefault(number, []).append(fields.get("x-agent-infra-backend", ""))
        self.prompt_tokens += answer["usage"]["prompt_tokens"]
        self.cached_tokens += answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def _system(script: Script) -> dict[str, str]:
    """The message that stands for a script's system prompt."""
    return {"role": "system", "content": "s" * sum(tokens for _, tokens in script.shared)}


@contextmanager
def engines(workload: Workload, clock: Clock) -> Iterator[list[list[int]]]:
    """The ports of fresh engines with empty caches: of each its own and that of its /load."""
    fleet = build_fleet(workload, SEED)
    ours, theirs = multiprocessing.Pipe()
    arguments = (fleet.physics, fleet.speeds, workload.flush, clock, theirs)
    process = multiprocessing.Process(target=run_engines, args=arguments, daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def run(workload: Workload, way: str, clock: Clock) -> tuple[float, Agents]:
    """Run a workload in one way. Returns its engine seconds, and the agents with what they saw."""
    with engines(workload, clock) as ports, tempfile.TemporaryDirectory() as directory:
        if way == STICKY:
            agents = Agents(workload, [port for port, _ in ports], has_headers=False, clock=clock)
            return asyncio.run(agents.run()), agents
        with RelayProcess(Path(directory)) as relay:
            rows = [backend(number, port, telemetry_port=load) for number, (port, load) in enumerate(ports)]
            relay.controller.send_table(rows, proxy=PROXIES[way])
            time.sleep(2.0)  # until the replicas' capacity is known
            agents = Agents(workload, [relay.port], has_headers="no headers" not in way, clock=clock)
            return asyncio.run(agents.run()), agents


def shortened(base: Workload, replicas: int, scale: float) -> Workload:
    """A workload for so many engines, with sessions short enough for a minute or two."""
    steps, agents = (min(base.steps[0], LONGEST_SESSION), base.steps[1]), round(base.agents * scale)
    sessions = round(agents * (6 if steps[0] == 1 else 1.25))
    flush = min(base.flush, 100.0)
    return dataclasses.replace(base, replicas=replicas, agents=agents, sessions=sessions, steps=steps, flush=flush)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS_RUN, choices=WORKLOADS, metavar="NAME")
    parser.add_argument("--speed-up", type=float, default=40.0, help="engine seconds in one second (%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=[*PROXIES, STICKY], default=[*PROXIES, STICKY], metavar="WAY")
    args = parser.parse_args()
    for name in args.workloads:
        base, scale = WORKLOADS[name], args.engines / WORKLOADS[name].replicas
        workload = shortened(base, args.engines, scale)
        print(f"\n{name}: {args.engines} engines, {workload.agents} agents, {workload.sessions} sessions\n")
        heads = "way | throughput | engine s | mean turn s | p95 s | hits | replicas per session | late s"
        print(f"| {heads} |\n|" + "---|" * (heads.count("|") + 1))
        reference = math.nan
        for way in args.ways:
            seconds, seen = run(workload, way, Clock(args.speed_up))
            throughput = MOST * len(seen.answered) / seen.answered[int(MOST * len(seen.answered))]
            reference = throughput if math.isnan(reference) else reference
            latencies = sorted(seen.latencies)
            replicas = statistics.fmean(len(set(served)) for served in seen.served.values())
            hits = seen.cached_tokens / seen.prompt_tokens
            print(
                f"| {way} | {throughput / reference:.3f} | {seconds:.0f} | {statistics.fmean(latencies):.2f} | "
                f"{latencies[int(0.95 * len(latencies))]:.2f} | {hits:.3f} | {replicas:.2f} | "
                f"{seen.late_s / len(latencies):.2f} |", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main()
