"""What users, scripts and deployments that run rely on is as it was: see tests/freeze.py, which tells and keeps it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import freeze
import pytest
from former import FORMER, place_former_state
from freeze import FROZEN, Files

from agent_infra import ROLES, config_from_json, main
from agent_infra_core.control.handover import Succession
from agent_infra_core.protocol import ReplicaRecord, record_from_json, spec_from_json

REMEDY = "PYTHONPATH=.:tests:benchmarks python tests/freeze.py"
VERBS = json.loads((FROZEN / "command_line.json").read_text())["verbs"]
KEPT = FORMER / "state" / "agent-infra" / "former"


def assert_frozen(files: Files) -> None:
    for name, text in files.items():
        assert text == (FROZEN / name).read_text(encoding="utf-8"), f"{name}; if that is meant: {REMEDY}"


def test_every_verb_and_role_takes_the_options_that_it_took() -> None:
    assert_frozen(freeze.command_line())


@pytest.mark.parametrize("verb", [*VERBS, *ROLES])
def test_every_verb_and_role_tells_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: agent_infra.py {verb} ")


def test_a_command_line_that_cannot_be_followed_is_answered_in_the_same_words() -> None:
    assert_frozen(freeze.refusals())


def test_a_bad_configuration_is_refused_in_the_same_words() -> None:
    assert_frozen(freeze.bad_configurations())


def test_the_jobs_of_a_configuration_are_the_same_scripts() -> None:
    assert_frozen(freeze.job_scripts())


def test_metrics_have_the_same_names_types_and_labels() -> None:
    assert_frozen(freeze.metrics())


def test_the_stats_document_has_the_same_shape() -> None:
    assert_frozen(freeze.stats_shape())


def test_a_new_history_has_the_same_schema() -> None:
    assert_frozen(freeze.history_schema())


def test_replicas_and_their_operators_tell_each_other_the_same_fields() -> None:
    assert_frozen(freeze.records())


def test_nothing_is_kept_that_no_test_compares() -> None:
    kept = {path.name for path in FROZEN.iterdir()}
    assert kept == {name for part in freeze.PARTS for name in part()}


# --- What 0.1.0 wrote. -----------------------------------------------------------------------------------------------


def written_by_0_1_0(name: str) -> Any:
    return json.loads((KEPT / name).read_text())


def test_the_record_of_a_replica_of_0_1_0_is_read_and_would_be_written_again_as_it_is() -> None:
    record = record_from_json((KEPT / "run/replicas/m-1.json").read_text())
    assert (record.replica, record.state, type(record)) == ("m-1", "ready", ReplicaRecord)
    was = written_by_0_1_0("run/replicas/m-1.json")
    again = json.loads(json.dumps(dataclasses.asdict(record)))
    assert known_of(again, was) == was
    assert again["format"] == 0  # 0.1.0 wrote no number


def test_what_0_1_0_told_a_replica_is_refused_by_a_serve_that_could_not_follow_it() -> None:
    """The jobs and processes of 0.1.0 read it with their own program, which stays where it is."""
    with pytest.raises(ValueError, match="another version of agent_infra wrote this specification"):
        spec_from_json((KEPT / "run/specs/m-1.json").read_text())


def test_a_record_of_a_newer_version_is_read_without_what_is_not_known_of_it() -> None:
    record = record_from_json(json.dumps({**written_by_0_1_0("run/replicas/m-1.json"), "mood": "good"}))
    assert record == record_from_json((KEPT / "run/replicas/m-1.json").read_text())


def test_the_configuration_that_0_1_0_kept_is_read_and_would_be_kept_again_as_it_is() -> None:
    was, config = written_by_0_1_0("config.json"), config_from_json((KEPT / "config.json").read_text())
    assert known_of(json.loads(json.dumps(dataclasses.asdict(config))), was) == was


def known_of(document: Any, was: Any) -> Any:
    """``document`` without the keys that ``was`` doesn't have: keys may be added."""
    if isinstance(was, dict):
        return {key: known_of(value, was[key]) for key, value in document.items() if key in was}
    if isinstance(was, list):
        return [known_of(value, each) for value, each in zip(document, was, strict=True)]
    return document


def test_a_handover_that_0_1_0_began_is_told_by_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place_former_state(tmp_path)
    noted = (FORMER / "handover.json").read_text()
    (tmp_path / "state/agent-infra/former/handover.json").write_text(noted)
    (tmp_path / "config.yaml").write_text(json.dumps(written_by_0_1_0("config.json")))  # JSON is YAML
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert main(["status", "--json", "--config", str(tmp_path / "config.yaml")]) == 3
    told = json.loads(capsys.readouterr().out)["handover"]
    assert told == json.loads(noted)
    assert {name: dataclasses.asdict(Succession(**each)) for name, each in told.items()} == told
