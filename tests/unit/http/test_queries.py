"""Query strings of /history, /sessions and /stats/sessions/{id}: what is read, and what is refused with which words."""

from __future__ import annotations

import pytest

from agent_infra_core.http import queries
from agent_infra_core.http.errors import RequestError
from agent_infra_core.http.queries import PARAMETERS, read_query
from agent_infra_core.insight import series


def test_parameters_are_read_as_what_they_are_and_empty_ones_are_missing() -> None:
    given = {"from": "1795361400.5", "points": "2000", "model": "", "to": "1795365000"}
    assert read_query(given, PARAMETERS["history"]) == {"from": 1795361400.5, "points": 2000, "to": 1795365000.0}
    given = {"query": "a b", "sort": "queued_s", "descending": "0", "limit": "5"}
    assert read_query(given, PARAMETERS["sessions"]) == {
        "query": "a b",
        "sort": "queued_s",
        "descending": 0,
        "limit": 5,
    }


@pytest.mark.parametrize(
    ("path", "name", "text", "words"),
    [
        ("history", "points", "2001", "points: found '2001'; allowed: a whole number from 1 to 2,000"),
        ("history", "points", "ten", "allowed: a whole number"),
        ("history", "from", "nan", "allowed: a number, s since the epoch, from 0"),
        ("history", "from", "-1", "allowed: a number"),
        ("history", "form", "1", "form: unknown parameter; did you mean from?"),
        ("sessions", "xyzzy", "1", "known here: query, state, model"),
        ("sessions", "sort", "id; DROP TABLE turns", "allowed: one of id, state, model"),
        ("sessions", "state", "dead", "allowed: one of live, ended, all"),
        ("sessions", "query", "x" * 257, "allowed: text of at most 256 characters"),
        ("sessions", "offset", "1" * 400, "allowed: a whole number from 0 to 1,000,000"),
        ("session", "limit", "0", "allowed: a whole number from 1 to 1,000"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(path: str, name: str, text: str, words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        read_query({name: text}, PARAMETERS[path])
    assert refusal.value.status == 400
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_sessions_are_sorted_by_every_field_that_they_have() -> None:
    assert set(queries.SESSION_FIELDS) == set(series.SESSION_FIELDS)
