"""Discovery: looks at the replicas."""

from __future__ import annotations

from typing import Any

from agent_infra_core.control.discovery import Discovery
from agent_infra_core.errors import RefusedError
from agent_infra_core.protocol import ReplicaRecord


def names(records: list[ReplicaRecord]) -> list[str]:
    return [record.replica for record in records]


def replica(name: str, state: str = "ready", **fields: Any) -> ReplicaRecord:
    return ReplicaRecord(name, name.rpartition("-")[0], state, "vllm", "node", 1, "stamp", **fields)


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
