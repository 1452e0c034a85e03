"""A run of sessions through the real relay while a replica dies, loses its cache, drains or joins.

The engines are those of benchmarks/routing_proxy.py: simulated, with prefix caches, a thousand times as fast as real.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from relay_harness import RelayProcess, backend
from routing_proxy import Clock, Engine

from agent_infra_core.routing.simulator import Physics

SESSIONS, TURNS, TOKENS = 12, 9, 4000
EVENT, RECOVERED = 3, 6  # turns before which it happens, and by which all is well again


@dataclass
class Host:
    """One engine and its server."""

    engine: Engine
    server: asyncio.Server
    writers: list[asyncio.StreamWriter]

    @property
    def port(self) -> int:
        return int(self.server.sockets[0].getsockname()[1])

    @classmethod
    async def start(cls) -> Host:
        engine, writers = Engine(Physics(), 1.0, Clock(1000.0)), list[asyncio.StreamWriter]()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            try:
                await engine.serve(reader, writer)
            finally:
                writer.close()

        return cls(engine, await asyncio.start_server(serve, "127.0.0.1", 0), writers)

    def kill(self) -> None:
        """As a crash: nobody listens, and connections are reset."""
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()


@dataclass
class Fleet:
    """Engines behind a relay, and what sessions saw."""

    relay: RelayProcess
    hosts: dict[str, Host] = field(default_factory=dict)
    homes: dict[int, list[str]] = field(default_factory=dict)
    cached: dict[int, list[float]] = field(default_factory=dict)  # share of what the last prompt and answer had
    contexts: dict[int, int] = field(default_factory=dict)

    async def add(self) -> str:
        name = f"r{len(self.hosts) + 1}"
        self.hosts[name] = await Host.start()
        self.tell()
        return name

    async def close(self) -> None:
        for host in self.hosts.values():
            host.kill()
            await asyncio.gather(*(writer.wait_closed() for writer in host.writers), return_exceptions=True)

    def tell(self, draining: str = "") -> None:
        rows = [
            backend(int(name[1:]), host.port, state="draining" if name == draining else "ready")
            for name, host in self.hosts.items()
            if host.server.is_serving()
        ]
        self.relay.controller.send_table(rows)

    async def relay_knows(self, replicas: int) -> None:
        """Wait until the relay has so many replicas."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not any(len(seen["backends"]) == replicas for seen in self.relay.controller.gauges[-1:]):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)

    async def turn(self, number: int) -> None:
        """A session's next turn, on a connection of its own."""
        before = self.contexts.get(number, 0)
        prompt = before + TOKENS
        request = {"model": "m", "messages": [{"role": "user", "content": "x" * 4 * prompt}], "max_tokens": 20}
        body = json.dumps({**request, "chain": [(1_000_000 + number, prompt)], "say": "a"}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nx-session-id: s{number}\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.relay.port, limit=1 << 22)
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answered = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        fields = dict(line.split(": ", 1) for line in answered.split("\r\n")[1:] if line)
        answer: dict[str, Any] = json.loads(await reader.readexactly(int(fields["content-length"])))
        writer.close()
        await writer.wait_closed()
        assert answered.startswith("http/1.1 200"), answer
        self.homes.setdefault(number, []).append(fields["x-agent-infra-backend"])
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.cached.setdefault(number, []).append(cached / before if before else 1.0)
        self.contexts[number] = prompt + 20


def kill(fleet: Fleet, home: str) -> None:
    fleet.hosts[home].kill()


def flush(fleet: Fleet, home: str) -> None:
    """As a restart between two turns, on the same port."""
    fleet.hosts[home].engine.replica.cache.clear()


def drain(fleet: Fleet, home: str) -> None:
    fleet.tell(draining=home)


@pytest.mark.parametrize("event", [kill, flush, drain], ids=lambda event: str(event.__name__))
def test_sessions_of_a_lost_replica_re_home_once_and_hit_again(
    tmp_path: Path, event: Callable[[Fleet, str], None]
) -> None:
    async def run(fleet: Fleet) -> str:
        for _ in range(3):
            await fleet.add()
        await fleet.relay_knows(3)
        victim = ""
        for turn in range(TURNS):
            if turn == EVENT:
                victim = fleet.homes[0][-1]
                event(fleet, victim)
            for number in range(SESSIONS):
                await fleet.turn(number)
        await fleet.close()
        return victim

    with RelayProcess(tmp_path) as relay:
        fleet = Fleet(relay)
        victim = asyncio.run(run(fleet))
    for number, homes in fleet.homes.items():
        moves = sum(one != other for one, other in itertools.pairwise(homes))
        was_there = homes[EVENT - 1] == victim
        assert moves <= was_there, (number, homes)
        if was_there and event is not flush:
            assert victim not in homes[RECOVERED:], homes
        assert all(share > 0.95 for share in fleet.cached[number][RECOVERED:]), (number, fleet.cached[number])
        if not was_there:
            assert all(share > 0.95 for share in fleet.cached[number]), (number, fleet.cached[number])


def test_new_sessions_go_to_a_replica_that_joins_and_the_others_stay(tmp_path: Path) -> None:
    async def run(fleet: Fleet) -> str:
        for _ in range(2):
            await fleet.add()
        await fleet.relay_knows(2)
        joined = ""
        for turn in range(TURNS):
            if turn == EVENT:
                joined = await fleet.add()
                await fleet.relay_knows(3)
            for number in range(SESSIONS + (6 if joined else 0)):
                await fleet.turn(number)
        await fleet.close()
        return joined

    with RelayProcess(tmp_path) as relay:
        fleet = Fleet(relay)
        joined = asyncio.run(run(fleet))
    assert {fleet.homes[number][0] for number in range(SESSIONS, SESSIONS + 4)} == {joined}
    for number, homes in fleet.homes.items():
        assert len(set(homes)) == 1, (number, homes)
        assert all(share > 0.95 for share in fleet.cached[number])
