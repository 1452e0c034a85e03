#!/usr/bin/env python3
"""Where the relay's microseconds of a request or of a streamed chunk go, stage by stage, with system calls counted.

    python benchmarks/stages.py                   # requests of 1 KB, 16 clients
    python benchmarks/stages.py --size 100000     # requests of 100 KB
    python benchmarks/stages.py --streams 40      # chunks of 40 streams

The relay's functions are timed while it serves, without the time in which they wait; what a stage calls is counted
once, in its own stage.  Timing costs something, too: compare the shares, and take the sum from proxy.py.  System
calls are counted in a second run, with strace if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_contenders import PROGRAM
from bench_load import RequestLoad, StreamLoad, chat_request
from bench_process import Child, cpu_seconds, free_port, process_tree, proxy_and_load_cores, wait_until

ENGINE = Path(__file__).with_name("bench_engine.py")
STAGES = {  # function → stage
    "connection.ClientConnection.read_head": "read: the head",
    "requests.HeadReader.plan": "read: parse the head",
    "connection.ClientConnection.read_body": "read: the body",
    "access.AccessControl.authorize": "authorise",
    "book.TurnBook.open": "identify: the body's fields and messages",
    "admission.Admission.acquire": "admit, choose",
    "upstream.Upstream.send": "send",
    "requests.HeadReader.answer": "relay: parse the answer's head",
    "turn.Exchange._relay_body": "relay: the answer's body",
    "turn.Exchange._relay_events": "relay: events, received, checked",
    "turn.Exchange._send": "relay: events, sent",
    "connection.ClientConnection.send_all": "relay: the answer, sent",
    "book.TurnBook.finish": "record",
    "turn.Exchange._receive": "relay: receive",
    "turn.serve_turn": "everything between",
}

# The program with a relay that notes what its functions took, and writes it when it ends.
TIMED_PROGRAM = """
import sys

sys.path.insert(0, {folder!r})
from agent_infra_core import host

host.self_command = lambda role: [sys.executable, __file__, role]
import agent_infra
if "relay" in sys.argv:
    import atexit, functools, importlib, json, time
    from collections import defaultdict
    taken, stacks, now = defaultdict(float), defaultdict(list), time.thread_time

    def timed(function, stage, current):
        @functools.wraps(function)
        def run(*arguments):
            stack, start = stacks[current()], now()
            if stack:
                taken[stack[-1][0]] += start - stack[-1][1]
            stack.append([stage, start])
            try:
                return function(*arguments)
            finally:
                end = now()
                stage_now, since = stack.pop()
                taken[stage_now] += end - since
                if stack:
                    stack[-1][1] = end
        return run

    def parking(park, current):
        def run(client):
            stack = stacks[current()]
            if stack:
                taken[stack[-1][0]] += now() - stack[-1][1]
            try:
                park(client)
            finally:
                if stack:
                    stack[-1][1] = now()
        return run

    def patch():
        import gevent
        current = gevent.getcurrent
        for name, stage in {stages!r}.items():
            module, *path = name.split(".")
            owner = importlib.import_module("agent_infra_core.relay." + module)
            for part in path[:-1]:
                owner = getattr(owner, part)
            setattr(owner, path[-1], timed(getattr(owner, path[-1]), stage, current))
        connection = importlib.import_module("agent_infra_core.relay.connection")
        connection.serve_turn = importlib.import_module("agent_infra_core.relay.turn").serve_turn
        client = connection.ClientConnection
        client.park = parking(client.park, current)

    atexit.register(lambda: open({result!r}, "w").write(json.dumps(taken)))
    start = agent_infra.allow_many_descriptors
    agent_infra.allow_many_descriptors = lambda: (patch(), start())
sys.exit(agent_infra.main())
"""


class Run:
    """One proxy in front of one engine; ended with ``close``, after which ``taken_s`` has the stages' seconds."""

    def __init__(self, folder: Path, program: Path) -> None:
        self.folder, self.result = folder, folder / "stages.json"
        cores, load_cores = proxy_and_load_cores()
        engine_port, self.port = free_port(), free_port()
        self._engine = Child([sys.executable, str(ENGINE), str(engine_port)], load_cores, folder / "engine.log")
        command = [sys.executable, str(program), "proxy", "--port", str(self.port)]
        command += ["--backend", f"bench=127.0.0.1:{engine_port}"]
        environment = {"XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(PROGRAM.parent)}
        self._proxy = Child(command, cores, folder / "proxy.log", environment, folder)
        os.sched_setaffinity(0, load_cores)
        wait_until(self._answers, "the first answer", 60)

    def relay(self) -> int | None:
        """The relay's pid."""
        found = [
            pid for pid in process_tree(self._proxy.pid) if b"\0relay\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return found[0] if found else None

    def _answers(self) -> bool:
        """Whether all that a turn needs has started."""
        with contextlib.suppress(OSError):
            return RequestLoad(self.port, lambda _: chat_request(1_000), 50, 100, connections=16).run(5).succeeded == 50
        return False

    def load(self, options: argparse.Namespace) -> int:
        """Offer the load; the number of requests that were answered, or of chunks."""
        if options.streams:
            load = StreamLoad(self.port)
            load.open(
                [chat_request(1_000, stream=True, directive=f"s{i} 0 1000000 33") for i in range(options.streams)]
            )
            load.pump(options.seconds)
            load.close()
            return load.events
        requests = [chat_request(options.size, session=f"session-{number}") for number in range(64)]
        return (
            RequestLoad(self.port, lambda number: requests[number % 64], options.count, 0, connections=16)
            .run()
            .succeeded
        )

    def close(self) -> None:
        self._proxy.stop()
        self._engine.stop()


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000, help="bytes of a request's body (%(default)s)")
    parser.add_argument("--count", type=int, default=10_000, help="requests (%(default)s)")
    parser.add_argument("--streams", type=int, default=0, help="stream instead, this many at once")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long to stream (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agent-infra-bench-") as name:
        folder = Path(name)
        program = folder / "agent_infra.py"
        program.write_text(
            TIMED_PROGRAM.format(folder=str(PROGRAM.parent), stages=STAGES, result=str(folder / "stages.json"))
        )
        run = Run(folder, program)
        relay = run.relay() or 0
        before = cpu_seconds([relay])
        units = run.load(options)
        cpu_us = (cpu_seconds([relay]) - before) / units * 1e6
        run.close()
        taken = {stage: seconds / units * 1e6 for stage, seconds in json.loads(run.result.read_text()).items()}
        print("| stage | µs | share |\n|---|---|---|")
        for stage in dict.fromkeys(STAGES.values()):
            if stage in taken:
                print(f"| {stage} | {taken[stage]:.1f} | {taken[stage] / cpu_us:.0%} |")
        rest = cpu_us - sum(taken.values())
        print(f"| event loop, wake-ups, the controller's frames | {rest:.1f} | {rest / cpu_us:.0%} |")
        print(f"| CPU of the timed relay | {cpu_us:.1f} | 100% |")
    if shutil.which("strace"):
        with tempfile.TemporaryDirectory(prefix="agent-infra-bench-") as name:
            print("\nsystem calls: " + _system_calls(Run(Path(name), PROGRAM), options))


def _system_calls(run: Run, options: argparse.Namespace) -> str:
    """Count the relay's system calls a request or chunk."""
    log = run.folder / "strace.log"
    tracer = subprocess.Popen(["strace", "-c", "-qq", "-p", str(run.relay()), "-o", str(log)])
    time.sleep(1.0)
    units = run.load(options)
    tracer.terminate()
    tracer.wait(10)
    run.close()
    rows = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+)(?: +\d+)? +([a-z]\w+)$", log.read_text(), re.MULTILINE)
    return ", ".join(
        f"{int(calls) / units:.2f} {name}" for calls, name in rows if int(calls) > units / 100 and name != "total"
    )


if __name__ == "__main__":
    main()
