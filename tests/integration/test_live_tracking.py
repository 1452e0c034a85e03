"""What the proxy says of real agents: whose turns they are, and where their time went, beside what was planted."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from openai.types.chat import ChatCompletionMessageParam
from patience import PATIENCE_S, compares_clocks
from program import Program, once_told, wait_for
from relay_harness import Client
from stats_schema import check_stats

from agent_infra_core.client import SessionContext
from agent_infra_core.control.controller import Controller
from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.insight.tracker import Tracker, encode_stats
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import Config, ModelConfig, ProxyConfig


def wait_turns(app: Program, count: int) -> Any:
    """The /stats document, once so many turns are in it."""
    return wait_for(
        lambda: app.get("/stats") if app.get("/stats")["totals"]["requests"] == count else None, "all turns"
    )


def sessions(document: Any) -> dict[str, Any]:
    return {session["id"]: session for client in document["clients"] for session in client["sessions"]}


# --- one session


def test_a_session_can_be_looked_at_and_ended_whatever_it_is_called(app: Program, engine: FakeEngine) -> None:
    app.bring_up_proxy(engine.port, model="m")
    names = ["task-17", "größe/ü 😀", "/a//b/", "a?b#c%2F", "end", "x/end"]
    with Client(app.port) as client:
        for name in names * 2:
            assert client.chat({"X-Session-ID": name.encode().decode("latin-1")}).status == 200
        wait_turns(app, 2 * len(names))
        for name in names:
            path = urllib.parse.quote(name, safe="")
            document = app.get(f"/stats/sessions/{path}")
            check_stats(document, "session_document")
            assert (document["session"]["id"], len(document["turns"])) == (name, 2)
            assert client.post(f"/sessions/{path}/end", {}).json() == {"session": name, "noted": True}
        wait_for(lambda: app.get("/stats")["sessions"]["ended"] == len(names), "their ends")
        assert app.get("/stats/sessions/x%2Fend")["session"]["state"] == "ended"
        missing = wait_for(lambda: [said for said in [client.get("/stats/sessions/nobody")] if said.status != 503])[0]
        assert (missing.status, missing.json()["error"]["type"]) == (404, "not_found_error")


def test_an_announced_run_is_followed_to_its_end(app: Program, engine: FakeEngine) -> None:
    app.bring_up_proxy(engine.port, model="m")
    with Client(app.port) as client:
        refused: list[Any] = [{}, {"name": "night"}, {"name": "night", "tasks": 0}, {"name": "", "tasks": 3}, []]
        for wrong in refused:
            assert client.post("/runs", wrong).status == 400
        assert client.post("/runs", {"name": "night", "tasks": 3}).status == 200
        for number in range(3):
            headers = {"X-Session-ID": f"s{number}", "X-Task-ID": f"night-{number}"}
            assert client.chat(headers).status == 200
            assert client.post(f"/sessions/s{number}/end", {}).status == 200
        wait_for(lambda: [run["done"] for run in app.get("/stats")["runs"]] == [3], "the end of its tasks")
        [run] = app.get("/runs")["runs"]
        assert (run["name"], run["tasks"], run["model"], run["remaining_s"]["value"]) == ("night", 3, "m", 0.0)


def test_a_run_that_a_header_announced_goes_on_under_the_next_controller(app: Program, engine: FakeEngine) -> None:
    proxy = app.bring_up_proxy(engine.port, model="m")
    with Client(app.port) as client:
        for number in range(3):
            headers = {"X-Session-ID": f"s{number}", "X-Run-Tasks": "night=4", "X-Session-End": str(number < 2)}
            assert client.chat(headers).status == 200

        def run() -> tuple[int, int, int] | None:
            return next(((row["tasks"], row["done"], row["running"]) for row in app.get("/stats")["runs"]), None)

        wait_for(lambda: run() == (4, 2, 1), "the tasks of the run")
        assert proxy.end() == 0
        app.bring_up_proxy(engine.port, model="m")
    with Client(app.port) as client:
        wait_for(lambda: run() == (4, 2, 1), "the run under the next controller")
        assert client.chat({"X-Session-ID": "s2", "X-Session-End": "true"}).status == 200
        wait_for(lambda: run() == (4, 3, 0), "the end of a task that began under the one before")


# --- an agent that sends no header at all


def answer(client: openai.OpenAI, messages: list[ChatCompletionMessageParam], stream: bool, **fake: Any) -> Any:
    """The answer as an agent would put it into its next request."""
    if not stream:
        done = client.chat.completions.create(model="m", messages=messages, extra_body={"fake": fake})
        return done.choices[0].message.model_dump(exclude_none=True)
    words, calls = "", []
    with client.chat.completions.create(model="m", messages=messages, stream=True, extra_body={"fake": fake}) as events:
        for event in events:
            for choice in event.choices:
                words += choice.delta.content or ""
                calls += [call.model_dump(exclude={"index"}) for call in choice.delta.tool_calls or ()]
    return {"role": "assistant", "content": words, **({"tool_calls": calls} if calls else {})}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streaming"])
def test_agents_without_any_header_are_sessions_of_their_own(app: Program, engine: FakeEngine, stream: bool) -> None:
    app.bring_up_proxy(engine.port, model="m")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{app.port}/v1", api_key="unused", max_retries=0)
    histories: list[list[Any]] = [[{"role": "user", "content": "Begin."}] for _ in range(3)]
    with client:
        for turn in range(4):
            for agent, messages in enumerate(histories):
                call = f"call_{agent}_{turn}"
                said = answer(client, messages, stream, say=f"Agent {agent} – turn {turn}\n", calls=[call])
                messages += [said, {"role": "tool", "tool_call_id": call, "content": "done"}]
    found = sessions(wait_turns(app, 12))
    assert sorted(session["turns"] for session in found.values()) == [4, 4, 4]
    assert all(name.startswith("auto-") for name in found)


def test_samples_of_one_prompt_are_sessions_that_are_each_continued_once(app: Program, engine: FakeEngine) -> None:
    app.bring_up_proxy(engine.port, model="m")
    for _ in range(3):
        app.chat("Begin.", model="m", fake={"say": "the same"})
    said = [{"role": "user", "content": "Begin."}, {"role": "assistant", "content": "the same"}]
    for _ in range(2):
        app.chat(model="m", messages=[*said, {"role": "user", "content": "So?"}], fake={"say": "other"})
    assert sorted(session["turns"] for session in sessions(wait_turns(app, 5)).values()) == [1, 2, 2]


def test_an_agent_without_headers_is_the_same_session_after_a_kill_of_all(app: Program, engine: FakeEngine) -> None:
    app.bring_up_proxy(engine.port, model="m")
    said = [{"role": "user", "content": "Begin."}]
    app.chat(model="m", messages=said, fake={"say": "begun"})
    [before] = sessions(wait_turns(app, 1))
    wait_for(lambda: app.get("/stats")["history"]["turns"] == 1, "the turn in the history")
    pids = [pid for pid, _ in app.processes()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not app.processes(), "the end of all")
    app.bring_up_proxy(engine.port, model="m")
    said += [{"role": "assistant", "content": "begun"}, {"role": "user", "content": "Go on."}]
    app.chat(model="m", messages=said, fake={"say": "gone on"})
    assert [(name, session["turns"]) for name, session in sessions(wait_turns(app, 2)).items()] == [(before, 2)]


# --- where the time went


@dataclass(frozen=True)
class SetUp:
    """Engines whose answers take ``base_s + each_s · n`` with n of ``slots`` in the works."""

    base_s: float
    each_s: float
    slots: int
    engines: int = 1


class Planted:
    """A proxy of its own before the engines of each model."""

    def __init__(self, folder: Path, **models: SetUp) -> None:
        self._stack = ExitStack()
        self.engines: list[FakeEngine] = []
        records = []
        for model, set_up in models.items():
            for number in range(1, set_up.engines + 1):
                behaviour: dict[str, Any] = {"base_s": set_up.base_s, "each_s": set_up.each_s, "slots": set_up.slots}
                engine = self._stack.enter_context(FakeEngine(**behaviour, tokens=20))
                self.engines.append(engine)
                name = f"{model}-{number}"
                records.append(
                    ReplicaRecord(name, model, "ready", "command", "here", 1, "p", port=engine.port, slots=set_up.slots)
                )
        configured = tuple(ModelConfig(name=model, model_path=model, engine="command") for model in models)
        config = Config(models=configured, proxy=ProxyConfig(port=0))
        paths = deployment_paths("default", {"XDG_STATE_HOME": str(folder), "HOME": str(folder)})
        self._controller = Controller(config, paths, lambda: records, keys=("client-key", None))

    def __enter__(self) -> Planted:
        with ExitStack() as undone:
            undone.push(self.__exit__)
            self._controller.start()
            self.url = self._controller.url
            wait_for(self._is_ready, "the engines in the proxy")
            undone.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        with self._stack:
            self._controller.stop(1.0)

    def _is_ready(self) -> bool:
        return bool(sum(model["ready"] for model in self.get("/health")["models"].values()) == len(self.engines))

    def get(self, path: str) -> Any:
        return once_told(lambda: self._get(path))

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as answer:
            return json.load(answer)

    def client(self) -> Client:
        """A client that costs next to nothing: what it spends itself is in nobody's figures."""
        return Client(int(self.url.rpartition(":")[2]), timeout=PATIENCE_S)


class Truth(dict[str, float]):
    """Milliseconds that an agent spent, by what it did, on its own clock."""

    def spend(self, what: str, seconds: float) -> None:
        started = time.perf_counter()
        time.sleep(seconds)
        self.add(what, started)

    def add(self, what: str, started: float) -> None:
        self[what] = self.get(what, 0.0) + (time.perf_counter() - started) * 1000


def test_stats_are_made_ahead_only_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_infra_core.control.controller.WATCHED_S", 2.0)
    monkeypatch.setattr("agent_infra_core.control.controller.SNAPSHOT_INTERVAL_S", 0.2)
    made: list[float] = []
    heard: list[Mapping[str, Any]] = []
    sample = Tracker.sample

    def encode(document: dict[str, Any]) -> bytes:
        made.append(document["now"])
        return encode_stats(document)

    def note_gauges(tracker: Tracker, gauges: Mapping[str, Any]) -> None:
        heard.append(gauges)
        sample(tracker, gauges)

    monkeypatch.setattr("agent_infra_core.control.controller.encode_stats", encode)
    monkeypatch.setattr(Tracker, "sample", note_gauges)
    with Planted(tmp_path, m=SetUp(0.01, 0.0, slots=8)) as proxy:
        wait_for(lambda: len(heard) >= 3, "the relay's gauges, which say that nobody has read")
        assert made == []

        def are_made_ahead() -> bool:
            """Whether documents follow one that was read; where the machine stood still meanwhile, read again."""
            proxy.get("/stats")
            before, end = len(made), time.monotonic() + 1.5
            while len(made) < before + 3 and time.monotonic() < end:
                time.sleep(0.01)
            return len(made) >= before + 3

        wait_for(are_made_ahead, "documents that are made ahead")
        wait_for(lambda: time.time() > made[-1] + 3.0, "the last of them")
        count = len(made)
        with proxy.client() as client:
            assert client.chat().status == 200
        assert wait_for(lambda: proxy.get("/stats")["totals"]["requests"], "the turn") == 1
        assert len(made) > count
        assert proxy.get("/stats")["now"] > made[count - 1] + 3.0


TURNS = 5
PRE_S, POST_S = 0.25, 0.15


def agent_with_headers(proxy: Planted, name: str) -> Truth:
    """Says what it does in its think time."""
    truth, session = Truth(), SessionContext(name, client_id="me@here:1 agent.py")
    with proxy.client() as client:
        for turn in range(TURNS):
            with session.observing():
                truth.spend("pre", PRE_S)
            started = time.perf_counter()
            assert client.chat(session.get_headers(), stream=turn % 2 == 0).is_complete
            truth.add("answers", started)
            if turn < TURNS - 1:  # what comes after the last answer is told to nobody
                with session.acting():
                    truth.spend("post", POST_S)
    return truth


def agent_without_headers(proxy: Planted, name: str) -> Truth:
    """Says nothing of itself."""
    truth, messages = Truth(), [{"role": "user", "content": name}]
    with proxy.client() as client:
        for turn in range(TURNS):
            if turn:
                truth.spend("pre", PRE_S + POST_S)
            started, words = time.perf_counter(), f"{name} did {turn}"
            assert client.chat(stream=turn % 2 == 0, messages=messages, fake={"say": words}).is_complete
            truth.add("answers", started)
            messages += [{"role": "assistant", "content": words}, {"role": "user", "content": "go on"}]
    return truth


@compares_clocks
def test_times_are_recovered_as_they_were_planted(tmp_path: Path) -> None:
    with Planted(tmp_path, m=SetUp(0.2, 0.05, slots=1, engines=2)) as proxy, ThreadPoolExecutor(8) as pool:
        kinds = [agent_with_headers] * 4 + [agent_without_headers] * 4
        running = [pool.submit(kind, proxy, f"agent-{number}") for number, kind in enumerate(kinds)]
        truths = [each.result(PATIENCE_S) for each in running]
        document = wait_for(
            lambda: document if (document := proxy.get("/stats"))["totals"]["requests"] == 8 * TURNS else None,
            "all turns",
        )
        computed_ms = sum(engine.call()["seconds"] for engine in proxy.engines) * 1000
    check_stats(document)
    found = list(sessions(document).values())
    assert sorted(session["turns"] for session in found) == [TURNS] * 8
    assert sum(session["id"].startswith("auto-") for session in found) == 4

    def told(what: str) -> float:
        return sum(session[what] or 0.0 for session in found)

    def planted(what: str) -> float:
        return sum(truth.get(what, 0.0) for truth in truths)

    assert told("pre_ms") == pytest.approx(planted("pre"), rel=0.05)
    assert told("post_ms") == pytest.approx(planted("post"), rel=0.05)
    assert told("inference_ms") == pytest.approx(computed_ms, rel=0.05)
    assert told("wait_ms") == pytest.approx(planted("answers") - computed_ms, rel=0.05)
    assert told("wait_ms") > 0.3 * told("inference_ms")  # else there was nothing to recover
    assert told("unaccounted_ms") < 0.05 * (planted("pre") + planted("post"))


# --- what holds the run back


RUN_S = 10.0
SET_UPS = {"busy": SetUp(0.1, 0.04, 64), "idle": SetUp(0.1, 0.01, 64), "slow": SetUp(0.4, 0.01, 64)}
AGENTS = {"busy": (24, 0.2), "idle": (6, 1.0), "slow": (4, 0.1)}  # how many, and how long each thinks, s


def agent_that_thinks(proxy: Planted, model: str, number: int, until: float) -> None:
    """One of a growing number of agents on a model; its think times are exponential."""
    count, think_s = AGENTS[model]
    chance, session = random.Random(f"{model} {number}"), SessionContext(f"{model}-{number}")
    time.sleep(RUN_S / 3 * number / count)
    with proxy.client() as client:
        while time.monotonic() < until:
            with session.observing():
                time.sleep(chance.expovariate(1 / think_s))
            assert client.chat(session.get_headers(), model=model).status == 200


@compares_clocks
def test_verdict_and_suggestion_follow_what_was_planted(tmp_path: Path) -> None:
    agents = [(model, number) for model, (count, _) in AGENTS.items() for number in range(count)]
    with Planted(tmp_path, **SET_UPS) as proxy, ThreadPoolExecutor(len(agents)) as pool:
        until = time.monotonic() + RUN_S
        running = [pool.submit(agent_that_thinks, proxy, *agent, until) for agent in agents]
        for each in running:
            each.result(PATIENCE_S)
        over = time.time()

        def analysed() -> Any:
            document = proxy.get("/stats")
            fresh = [entry for entry in document["analysis"] if entry["computed_at"] > over]
            return document if len(fresh) == len(SET_UPS) else None

        document = wait_for(analysed, "the analysis of all turns")
    check_stats(document)
    found = {entry["model"]: entry for entry in document["analysis"]}
    verdicts = {model: entry["verdict"]["name"] for model, entry in found.items()}
    assert verdicts == {"busy": "GPU-BOUND", "idle": "AGENT-BOUND", "slow": "LATENCY-BOUND"}
    for model, set_up in SET_UPS.items():
        base_s, each_s = found[model]["fit"]["base_latency_s"], found[model]["fit"]["per_request_s"]
        assert base_s["low"] < 1.1 * set_up.base_s
        assert base_s["high"] > 0.9 * set_up.base_s
        assert each_s["low"] < 1.1 * set_up.each_s + 0.002  # an engine answers late by a millisecond or two
        assert each_s["high"] > 0.9 * set_up.each_s - 0.002
    suggested = {model: entry["suggestion"]["agents"] for model, entry in found.items()}
    # Seventy per cent busy: N = ρ/B · (Z + A / (1 − ρ)) = 0.7 / 0.04 · (0.2 + 0.1 / 0.3) = 9.3.
    assert 5 <= suggested["busy"]["low"] <= suggested["busy"]["high"] <= 12
    assert suggested["idle"]["low"] > AGENTS["idle"][0]
    assert suggested["slow"]["low"] > AGENTS["slow"][0]
