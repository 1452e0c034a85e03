"""A live relay between clients that send nonsense and a real engine: afterwards it serves, and owes nobody anything."""

from __future__ import annotations

import contextlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fake_engine import FakeEngine
from nonsense import EXPECTED, assail
from program import wait_for
from relay_harness import Answer, Client, RelayProcess, backend

SEED = 20_261_122
CLIENTS = 12
REQUESTS_PER_CLIENT = 100


def assail_often(port: int, seed: int) -> set[int]:
    """The statuses that came back."""
    chance = random.Random(seed)
    return set[int]().union(*(assail(port, chance) for _ in range(REQUESTS_PER_CLIENT)))


def test_nonsense_leaves_no_trace(tmp_path: Path) -> None:
    timeouts: dict[str, Any] = {"HEAD_S": 0.3, "BODY_S": 0.3, "LINGER_S": 0.1, "IDLE_CLIENT_S": 0.3}
    with RelayProcess(tmp_path, **timeouts) as relay, FakeEngine() as engine:
        relay.controller.send_table([backend(1, engine.port)], proxy={"queue_timeout": 1.0, "request_timeout": 5.0})

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{relay.process.pid}/fd"))

        def ask(stream: bool) -> Answer:
            with Client(relay.port) as client, contextlib.suppress(ConnectionResetError, BrokenPipeError):
                return client.chat(stream=stream)
            return Answer(0, {}, b"")  # an idle connection has 0.3 s only

        with Client(relay.port) as client:
            assert client.get("/health").status == 200  # Flask and all are loaded
        wait_for(lambda: relay.controller.gauges and relay.controller.gauges[-1]["connections"] == 0)
        before = descriptors()
        with ThreadPoolExecutor(CLIENTS) as pool:
            found = set[int]().union(*pool.map(assail_often, [relay.port] * CLIENTS, range(SEED, SEED + CLIENTS)))
        assert found <= EXPECTED
        assert {200, 400, 404, 408} <= found

        wait_for(lambda: ask(stream=False).status == 200)
        wait_for(lambda: ask(stream=True).events()[-1:] == ["[DONE]"])
        turns = wait_for(lambda: balanced(relay), what="a balance of turns begun and ended")
        assert turns > CLIENTS
        engine.kill()  # and the idle connections to it are closed
        wait_for(lambda: descriptors() <= before, what="the closing of all connections")
        assert relay.process.poll() is None
        assert "a connection failed" not in relay.log()
        assert "Traceback" not in relay.log()


def balanced(relay: RelayProcess) -> int:
    """The number of turns, once all that began have ended and nothing is held for any of them."""
    gauge = relay.controller.gauges[-1]
    is_idle = not gauge["connections"] and not gauge["queue"]["pending"] and not gauge["queue"]["in_flight"]
    turns: int = gauge["counters"]["requests"]
    ended = [event["turn"] for event in relay.controller.finished(1)]
    assert len(set(ended)) == len(ended)
    return turns if is_idle and not gauge["backends"]["r1"]["in_flight"] and len(ended) == turns else 0
