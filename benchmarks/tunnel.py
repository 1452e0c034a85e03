#!/usr/bin/env python3
"""What a tunnel costs: both SSH drivers beside no tunnel at all, in one run on one machine.

    apt-get install openssh-server
    python benchmarks/tunnel.py             # three rounds, about three minutes
    python benchmarks/tunnel.py --quick     # one short round: does it work at all?

A throw-away sshd on 127.0.0.1 is the login host, one fake engine the replica; in front of each way to it stands a proxy
of its own (`agent_infra.py proxy`), pinned to one core, with everything else on the others.  Every round measures each
way in turn, in an order that rotates; figures are medians over the rounds, and ratios are taken within a round.
CPU is the relay's and the tunnel's own process tree's (not sshd's), over a counted number of stream events.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench_engine  # noqa: E402
from bench_contenders import DEFAULT_VENV, PROGRAM, Contender, Place  # noqa: E402
from bench_load import StreamLoad, chat_request  # noqa: E402
from bench_process import (  # noqa: E402
    BenchmarkError,
    Child,
    cpu_seconds,
    free_port,
    proxy_and_load_cores,
    wait_until,
)
from testbed.sshd import SSHD, SshServer, descendants  # noqa: E402

from agent_infra_core.host import http_get, is_listening  # noqa: E402
from agent_infra_core.settings import ClusterConfig, SshConfig  # noqa: E402
from agent_infra_core.ssh.links import Link, TunnelTarget  # noqa: E402
from agent_infra_core.ssh.login_host import LoginHost  # noqa: E402
from agent_infra_core.ssh.tunnels import TunnelSet  # noqa: E402

WAYS = ("direct", "sshtunnel", "openssh")
EVENT_INTERVAL_MS = 33
FOREVER = 1_000_000
BLOCK = b"x" * (1 << 16)


@dataclass(frozen=True)
class Sizes:
    """How much is measured in one round."""

    requests: int = 1_000
    stream_s: float = 6.0
    megabytes: int = 192
    held: int = 200


QUICK = Sizes(100, 2.0, 32, 50)


class Bulk:
    """Sends as many bytes as a connection asks for; owns its listener and thread."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    for _ in range(int(connection.recv(64) or b"0") * 1_000_000 // len(BLOCK)):
                        connection.sendall(BLOCK)

    def close(self) -> None:
        self._listener.close()


def megabytes_per_second(port: int, megabytes: int) -> float:
    """How fast a download through ``port`` goes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        started, received = time.monotonic(), 0
        sock.sendall(b"%d" % megabytes)
        buffer = bytearray(1 << 20)
        while count := sock.recv_into(buffer):
            received += count
    return received / 1e6 / (time.monotonic() - started)


def new_connection_ms(port: int, count: int = 100) -> float:
    """The median time from connecting to the answer of GET /health, each time on a new connection."""
    times = []
    for _ in range(count):
        started = time.monotonic()
        status, _body = http_get("127.0.0.1", port, "/health")
        if status == 0:
            raise BenchmarkError("no answer through the tunnel")
        times.append((time.monotonic() - started) * 1000)
    return statistics.median(times)


class Way:
    """One way to the engine, with its proxy; owns both."""

    def __init__(self, name: str, place: Place, ends: Sequence[int], ssh: SshConfig) -> None:
        """``ends`` are the ports of the engine and of the bulk server."""
        self.name, self.place = name, place
        self._login: LoginHost | None = None
        self._link: Link | None = None
        self.ports: tuple[int, ...] = tuple(ends)
        self.tunnel: list[int] = []  # processes
        place.folder.mkdir(parents=True, exist_ok=True)
        if name != "direct":
            cluster = ClusterConfig(ssh=ssh, tunnel="login", tunnel_driver=name)
            self._login = LoginHost(cluster, os.environ, str(place.folder))
            self._login.lead()
            tunnels = TunnelSet(cluster, self._login, "", ())
            target = TunnelTarget("r", "m", "", 0, "n", "127.0.0.1", ends[0], ends[1], False, "login")
            before = set(descendants(os.getpid()))
            self._link = tunnels.links.open(target, lambda: False)
            self.ports = self._link.ports
            self.tunnel = [pid for pid in descendants(os.getpid()) if pid not in before]
        # The proxy has one backend: this side's end.
        self.proxy = Contender("agent-infra", Place(**{**vars(place), "replica_ports": self.ports[:1]}))

    def tunnel_cpu(self) -> float:
        return cpu_seconds([pid for pid in self.tunnel if "sshd" not in _name(pid)])

    def close(self) -> None:
        self.proxy.stop()
        if self._link is not None:
            self._link.close()
        if self._login is not None:
            self._login.close()


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return "sshd"  # gone: nothing to count


class Bench:
    """One run; ``samples[metric][way]`` has a figure a round."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        self.proxy_cores, self.load_cores = proxy_and_load_cores()
        self.samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._turn = 0

    def run(self, rounds: int) -> None:
        os.sched_setaffinity(0, self.load_cores)
        engine_port = free_port()
        command = [sys.executable, bench_engine.__file__, str(engine_port)]
        with SshServer(self.folder / "sshd") as server, Child(command, self.load_cores, self.folder / "engine.log"):
            wait_until(lambda: is_listening("127.0.0.1", engine_port), "the fake engine")
            bulk = Bulk()
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
                with self._ways((engine_port, bulk.port), server.ssh(), number) as ways:
                    for measure in (self._latency, self._throughput, self._chunks, self._held):
                        for way in ways:
                            measure(way)
            bulk.close()

    @contextlib.contextmanager
    def _ways(self, ends: Sequence[int], ssh: SshConfig, number: int) -> Iterator[list[Way]]:
        order = WAYS[number % 3 :] + WAYS[: number % 3]
        ways: list[Way] = []
        try:
            for name in order:
                folder = self.folder / f"{name}-{number}"
                place = Place(folder, free_port(), self.proxy_cores, (), DEFAULT_VENV, PROGRAM)
                ways.append(Way(name, place, ends, ssh))
            for way in ways:
                way.proxy.wait_until_ready()
            yield ways
        finally:
            for way in ways:
                way.close()

    def _latency(self, way: Way) -> None:
        request = chat_request(1_000, session="latency")
        times = []
        with socket.create_connection(("127.0.0.1", way.proxy.port), timeout=10) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(self.sizes.requests):
                started = time.monotonic()
                sock.sendall(request)
                received = b""
                while not (end := received.find(b"\r\n\r\n") + 4) > 3 or len(received) < end + _length(received[:end]):
                    received += sock.recv(1 << 16)
                times.append((time.monotonic() - started) * 1000)
        times.sort()
        self._add("latency p50, ms, kept connection", way, statistics.median(times))
        self._add("latency p99, ms, kept connection", way, times[int(len(times) * 0.99)])
        self._add("latency p50, ms, new connection", way, new_connection_ms(way.ports[0]))

    def _throughput(self, way: Way) -> None:
        self._add("MB/s, one download", way, megabytes_per_second(way.ports[1], self.sizes.megabytes))

    def _streams(self, way: Way, count: int, chunks: int) -> StreamLoad:
        load = StreamLoad(way.proxy.port)
        requests = []
        for _ in range(count):
            self._turn += 1
            directive = f"turn{self._turn} 0 {chunks} {EVENT_INTERVAL_MS}"
            requests.append(chat_request(1_000, session=f"s{self._turn}", stream=True, directive=directive))
        load.open(requests)
        return load

    def _chunks(self, way: Way) -> None:
        load = self._streams(way, 40, FOREVER)
        try:
            if not load.wait_for_first_events(5):
                raise BenchmarkError(f"{way.name}: 40 streams did not begin")
            relay, tunnel, first = way.proxy.usage().part_cpu_s, way.tunnel_cpu(), load.events
            load.pump(self.sizes.stream_s)
            events = load.events - first
            self._add("relay CPU, µs a chunk", way, (way.proxy.usage().part_cpu_s - relay) * 1e6 / events)
            self._add("tunnel CPU, µs a chunk", way, (way.tunnel_cpu() - tunnel) * 1e6 / events)
        finally:
            load.close()

    def _held(self, way: Way) -> None:
        """Open many at once; those count that all bring events together and end whole."""
        load = self._streams(way, self.sizes.held, 150)
        try:
            load.wait_for_first_events(3, 20.0)
            together = sum(stream.events >= 3 and stream.outcome is None for stream in load.streams)
            load.pump(60.0, lambda: all(stream.outcome for stream in load.streams))
            whole = sum(stream.outcome == "complete" for stream in load.streams)
            if whole < self.sizes.held:
                odd = next(stream for stream in load.streams if stream.outcome != "complete")
                print(f"{way.name}: {odd.outcome} after {odd.events} events: {odd.last[-300:]!r}", file=sys.stderr)
            self._add(f"of {self.sizes.held} streams at once, held and ended whole", way, min(together, whole))
        finally:
            load.close()

    def _add(self, metric: str, way: Way, value: float) -> None:
        self.samples[metric][way.name].append(value)

    def table(self) -> str:
        lines = [
            "| | direct | sshtunnel | OpenSSH | sshtunnel ÷ direct | OpenSSH ÷ direct |",
            "|---|---|---|---|---|---|",
        ]
        for metric, by_way in self.samples.items():
            medians = [rounded(statistics.median(by_way[name])) for name in WAYS]
            ratios = []
            for name in WAYS[1:]:
                pairs = [a / b for a, b in zip(by_way[name], by_way["direct"], strict=True) if b]
                ratios.append(f"{statistics.median(pairs):.2f} ({min(pairs):.2f}–{max(pairs):.2f})" if pairs else "")
            lines.append(f"| {metric} | {' | '.join([*medians, *ratios])} |")
        return "\n".join(lines)


def _length(head: bytes) -> int:
    return int(head.lower().partition(b"content-length:")[2].split()[0])


def rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.2g}"


def main() -> int:
    """Run as the command line says; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if SSHD is None or shutil.which("ssh") is None:
        print("error: apt-get install openssh-server openssh-client", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-tunnel-") as folder:
        bench = Bench(QUICK if options.quick else Sizes(), Path(folder))
        try:
            bench.run(1 if options.quick else options.rounds)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(bench.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
