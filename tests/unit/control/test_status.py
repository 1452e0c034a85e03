"""What the operator's verbs decide: which replicas go, what is missing, when an engine is idle, what `stop` goes by."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

from agent_infra import (
    config_from_json,
    describe_accounting,
    describe_model,
    describe_succession,
    kept_config,
    load_config,
)
from agent_infra_core.control.discovery import Discovery
from agent_infra_core.control.status import cheapest_to_end, summarize, what_is_amiss
from agent_infra_core.errors import ConfigError, RefusedError
from agent_infra_core.fleet.doctor import CHECKS, judge_probe
from agent_infra_core.fleet.engines import check_engine_args
from agent_infra_core.fleet.parse import describe_span, slurm_limit_s
from agent_infra_core.fleet.weights import fetched_path
from agent_infra_core.node.health import IdleWatch
from agent_infra_core.node.hub import describe_hub_failure, is_hub_id
from agent_infra_core.protocol import EngineLoad, ReplicaRecord
from agent_infra_core.settings import Config, ModelConfig

ROOT = Path(__file__).parents[3]


def replica(name: str, state: str = "ready", **fields: Any) -> ReplicaRecord:
    return ReplicaRecord(name, name.rpartition("-")[0], state, "vllm", "node", 1, "stamp", **fields)


def names(records: list[ReplicaRecord]) -> list[str]:
    return [record.replica for record in records]


def test_what_serves_nobody_yet_is_taken_away_first() -> None:
    records = [replica("m-1"), replica("m-2", "loading"), replica("m-3", "pending"), replica("m-4", "starting")]
    assert names(cheapest_to_end(records, {}, 3)) == ["m-3", "m-4", "m-2"]


def test_of_the_ready_ones_the_least_loaded_goes_first_and_of_equals_the_latest() -> None:
    records = [replica(f"m-{number}", started_at=float(number)) for number in (1, 2, 3, 4)]
    rows = {
        "m-1": {"inflight": 2, "sessions": 0},
        "m-2": {"inflight": 0, "sessions": 5},
        "m-3": {"inflight": 0, "sessions": 1},
        "m-4": {"inflight": 0, "sessions": 1},
    }
    assert names(cheapest_to_end(records, rows, 4)) == ["m-4", "m-3", "m-2", "m-1"]
    assert cheapest_to_end(records, rows, 0) == []


def test_one_that_drains_already_goes_before_an_idle_one() -> None:
    rows = {"m-1": {"inflight": 3, "state": "draining"}, "m-2": {"inflight": 0, "state": "ready"}}
    assert names(cheapest_to_end([replica("m-1"), replica("m-2")], rows, 1)) == ["m-1"]


def test_a_model_is_summed_up_with_those_that_ended_by_themselves() -> None:
    records = [replica("m-1"), replica("m-2", "stopped", is_idle=True), replica("m-3", "failed"), replica("m-4")]
    row = summarize("m", 4, records)
    assert row == {"name": "m", "wanted": 4, "running": 2, "ready": 2, "idle": 1, "in_flight": None, "sessions": None}
    assert describe_model(row) == "m  2 of 4 ready, 1 ended for want of turns"


def test_what_the_proxy_knows_of_a_model_is_summed_over_its_replicas() -> None:
    rows: list[dict[str, Any]] = [
        {"model": "m", "inflight": 2, "sessions": 3},
        {"model": "m", "inflight": None, "sessions": 1},
    ]
    row = summarize("m", 1, [replica("m-1")], [*rows, {"model": "other", "inflight": 9, "sessions": 9}])
    assert describe_model(row) == "m  1 of 1 ready, 2 turns in flight, 4 sessions"


def test_gpu_hours_are_told_where_a_gpu_was_held() -> None:
    hours = {"pending": 0.0, "loading": 0.25, "ready_busy": 1.5, "ready_idle": 0.25}
    told = describe_accounting({"since": 0.0, "gpu_hours": hours})
    assert told is not None
    assert told.startswith("GPU-hours  2.00 since 19")
    assert told.endswith(": 0.00 pending, 0.25 loading, 1.50 ready busy, 0.25 ready idle")
    assert describe_accounting({"since": 0.0, "gpu_hours": dict.fromkeys(hours, 0.0)}) is None
    assert describe_accounting(None) is None


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


IDLE = EngineLoad(running=0, waiting=0, prompt_tokens=10, generation_tokens=5)


def looks(minutes: float | None, *readings: tuple[float, EngineLoad | None]) -> list[bool]:
    """What an IdleWatch says at each (time in s, what the engine says)."""
    clock = Clock()
    watch = IdleWatch(minutes, clock)
    said = []
    for at, load in readings:
        clock.now = at
        said.append(watch.is_over(lambda load=load: load))  # type: ignore[misc]
    return said


def test_an_engine_without_turns_is_idle_once_the_minutes_are_over() -> None:
    assert looks(1, (0, IDLE), (59, IDLE), (60, IDLE)) == [False, False, True]


@pytest.mark.parametrize(
    "sign",
    [
        dataclasses.replace(IDLE, running=1),
        dataclasses.replace(IDLE, waiting=1),
        dataclasses.replace(IDLE, generation_tokens=6),  # a whole turn between two looks
        dataclasses.replace(IDLE, running=None),
        None,
    ],
)
def test_any_sign_of_a_turn_and_any_silence_starts_the_minutes_anew(sign: EngineLoad | None) -> None:
    assert looks(1, (0, IDLE), (50, sign), (90, sign or IDLE), (100, sign or IDLE))[1:] == [False, False, False]


def test_without_a_limit_the_engine_is_not_even_asked() -> None:
    def never() -> EngineLoad:
        raise AssertionError

    assert IdleWatch(None, Clock()).is_over(never) is False


def test_idle_shutdown_is_refused_where_nobody_can_tell() -> None:
    model = ModelConfig("m", "p", engine="command", command=("x", "{port}"), idle_shutdown_minutes=5)
    with pytest.raises(RefusedError, match="idle_shutdown_minutes: nobody can tell"):
        check_engine_args(model)


def test_a_kept_configuration_is_the_very_one(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "example.yaml")
    model = dataclasses.replace(config.models[0], env={"A": "${NOT_EXPANDED_TWICE}"}, idle_shutdown_minutes=3.0)
    config = dataclasses.replace(config, models=(model,))
    assert config_from_json(json.dumps(dataclasses.asdict(config))) == config


@pytest.mark.parametrize("text", ["", "[]", '{"models": []}', '{"models": [{"name": "m"}]}'])
def test_what_is_no_configuration_is_refused_and_not_taken_up(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        config_from_json(text)


def test_a_configuration_that_was_kept_by_another_version_is_left_alone(tmp_path: Path) -> None:
    from agent_infra_core.fleet.state import DeploymentPaths

    paths = DeploymentPaths(tmp_path)
    assert kept_config(paths) is None
    text = json.dumps({**dataclasses.asdict(Config((ModelConfig("m", "p"),))), "unknown": 1})
    paths.config.write_text(text)
    assert kept_config(paths) is None


class OfflineModeIsEnabled(ConnectionError):  # noqa: N818 (huggingface_hub's own name)
    """As huggingface_hub calls it: told by name, since it may not be installed."""


def test_failures_of_the_hub_are_told_by_the_name_of_their_class_and_a_full_disk_by_its_number() -> None:
    assert describe_hub_failure(OfflineModeIsEnabled("x")) == "HF_HUB_OFFLINE is set; unset it for `pull` (x)"
    assert "the hub cannot be reached" in describe_hub_failure(ValueError("some\npages"))
    full = RuntimeError("writing failed")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert describe_hub_failure(full).startswith("the disk is full")


@pytest.mark.parametrize(
    ("path", "is_id"), [("org/model", True), ("model", False), ("/a/b", False), ("./a", False), ("a/b/c", False)]
)
def test_an_id_of_the_hub_is_told_from_a_path(path: str, is_id: bool) -> None:
    assert is_hub_id(path) is is_id


@pytest.mark.parametrize("output", [b"", b"Traceback", b"[]", b'{"other": 1}'])
def test_a_fetch_that_ended_without_a_word_is_an_error(output: bytes) -> None:
    with pytest.raises(RefusedError, match="model m: fetching org/x ended with exit status 137 and no word"):
        fetched_path(ModelConfig("m", "org/x"), output, 137)


def test_what_a_fetch_printed_before_does_not_hide_its_outcome() -> None:
    assert fetched_path(ModelConfig("m", "org/x"), b'warning: ...\n{"path": "/cache"}\n', 0) == "/cache"


def test_no_two_rows_of_the_doctors_table_have_one_name_on_one_kind_of_cluster() -> None:
    rows = [(check.name, cluster) for check in CHECKS for cluster in check.clusters]
    assert len(set(rows)) == len(rows)
    assert {cluster for _, cluster in rows} == {"local", "slurm"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("8:00:00", 28800), ("2-00:00:00", 172800), ("1-12", 129600), ("UNLIMITED", math.inf)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(text: str, seconds: float) -> None:
    assert slurm_limit_s(text) == seconds


@pytest.mark.parametrize(
    ("seconds", "words"), [(45, "45 s"), (119, "119 s"), (5400, "90 min"), (28800, "8 h"), (math.inf, "no limit")]
)
def test_a_span_of_time_is_told_in_the_unit_that_people_use(seconds: float, words: str) -> None:
    assert describe_span(seconds) == words


SEEN = {"node": "gpu07", "python": "3.11.2", "package": "0.32.0", "gpus": ["H100"], "model": "cached", "hub": False}


@pytest.mark.parametrize(
    ("change", "levels"),
    [
        ({}, ["ok", "ok", "ok"]),
        ({"package": None}, ["error", "ok", "ok"]),
        ({"gpus": []}, ["ok", "warning", "ok"]),
        ({"model": "missing"}, ["ok", "ok", "error"]),
        ({"model": "remote"}, ["ok", "ok", "error"]),  # offline, and not fetched
        ({"model": "remote", "hub": True}, ["ok", "ok", "ok"]),
    ],
)
def test_what_a_node_sees_is_judged_for_the_model_that_is_to_run_there(
    change: dict[str, Any], levels: list[str]
) -> None:
    findings = list(judge_probe(ModelConfig("m", "org/m"), "model m on gpu07", {**SEEN, **change}))
    assert [finding.level for finding in findings] == levels
    assert all(finding.fix for finding in findings if finding.level != "ok")


def test_a_replica_that_is_on_its_way_is_amiss_only_where_it_is_missed() -> None:
    records = [replica("m-1"), replica("m-2", "loading")]
    assert what_is_amiss([summarize("m", 1, records)], records) == []
    assert what_is_amiss([summarize("m", 2, records)], records) == ["m-2 is LOADING"]
    assert what_is_amiss([summarize("m", 3, records)], records)[1:] == [
        "2 of 3 replicas of m run; `start` starts what is missing"
    ]


def test_one_that_failed_is_always_amiss_and_one_that_was_idle_never() -> None:
    records = [replica("m-1"), replica("m-2", "failed"), replica("m-3", "stopped", is_idle=True)]
    assert what_is_amiss([summarize("m", 2, records)], records) == ["m-2 is FAILED"]


def test_a_handover_is_told_with_its_gap() -> None:
    row = {"successor": "m-2", "note": "", "is_after": False}
    assert describe_succession("m-1", row) == "m-2 takes over from m-1"
    assert "there will be a gap" in describe_succession("m-1", {**row, "is_after": True})
    assert "there will be a gap" in describe_succession("m-1", {**row, "successor": "", "note": "cannot be submitted"})


def test_a_look_that_fails_is_told_of_once_and_the_last_one_stands() -> None:
    seen = [replica("m-1")]
    answers: list[Any] = [
        seen,
        RefusedError("no way in"),
        RefusedError("no way in"),
        KeyError("x"),
        seen,
        KeyError("x"),
    ]
    told: list[str] = []

    def look() -> list[ReplicaRecord]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    discovery = Discovery(look, 1.0, told.append)
    while answers:
        discovery.look()
        assert names(list(discovery.records)) == ["m-1"]
    assert [words.rpartition(": ")[2] for words in told] == ["no way in", "'x'", "'x'"]
