"""Doctor: its table, and what a node reports."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from agent_infra_core.fleet.doctor import CHECKS, judge_probe
from agent_infra_core.fleet.parse import describe_span, slurm_limit_s
from agent_infra_core.node.replica import import_problem
from agent_infra_core.settings import ModelConfig


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
        ({"import_error": "Traceback\nOSError: libgomp.so.1: cannot open shared object file"}, ["error", "ok", "ok"]),
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


def test_a_package_that_is_there_but_cannot_be_imported_is_told_from_one_that_can(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import ctypes\nctypes.CDLL('libno-such.so.1')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert import_problem("json", environment) is None
    problem = import_problem("broken", environment)
    assert problem is not None
    assert "libno-such.so.1: cannot open shared object file" in problem.splitlines()[-1]
