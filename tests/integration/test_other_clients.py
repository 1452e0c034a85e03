"""litellm and Anthropic's SDK against a real deployment, on the three APIs, plain and streamed.

They are installed apart (``pip install anthropic litellm``), in the Python that AGENT_INFRA_CLIENTS_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from program import program

PYTHON = os.environ.get("AGENT_INFRA_CLIENTS_PYTHON", "")
SCRIPT = Path(__file__).parents[1] / "testbed" / "other_clients.py"
HEADERS = ["x-agent-infra-backend", "x-agent-infra-queue-ms", "x-request-id"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="AGENT_INFRA_CLIENTS_PYTHON names no Python that has anthropic and litellm"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the clients found; everyone needs the key there."""
    with program(tmp_path_factory.mktemp("clients"), proxy={"require_key": True}) as app:
        up = app.spawn("up")
        up.wait_line("Ctrl-C stops everything")
        key = (app.state / "agent-infra" / "default" / "api_key").read_text().strip()
        command = [PYTHON, str(SCRIPT), f"http://127.0.0.1:{app.port}", key]
        environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3 * PATIENCE_S)
        assert done.returncode == 0, done.stderr
        assert up.end() == 0
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # litellm prints more
    return answers


CLIENTS = ["anthropic", "litellm openai", "litellm anthropic", "litellm responses"]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("way", ["plain", "streamed"])
def test_answers_are_read_and_carry_the_proxys_headers(found: dict[str, Any], client: str, way: str) -> None:
    text, *headers = found[f"{client} smollm2 {way}"]
    assert text == (True if (client, way) != ("litellm responses", "streamed") else "response.completed")
    assert headers in ([HEADERS], [[]], [])  # litellm keeps them of some answers only
    assert client != "anthropic" or headers == [HEADERS]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_refusal_is_the_clients_own_exception_with_the_reason_plain_or_streamed(
    found: dict[str, Any], client: str
) -> None:
    for way in ("plain", "streamed"):
        name, status, text = found[f"{client} nope {way}"]
        assert (name, status) == ("NotFoundError", 404)
        assert "does not exist; served here: smollm2" in text


@pytest.mark.parametrize("client", ["anthropic", "litellm openai"])
def test_a_wrong_key_is_an_authentication_error(found: dict[str, Any], client: str) -> None:
    plain, streamed = (found[f"{client} wrong key {way}"] for way in ("plain", "streamed"))
    assert plain == streamed
    assert plain[:2] == ["AuthenticationError", 401]
    assert "send the proxy's key" in plain[2]


def test_what_the_engine_refuses_is_no_error_that_clients_try_again(found: dict[str, Any]) -> None:
    assert found["litellm openai too long plain"][:2] == ["ContextWindowExceededError", 400]
    assert found["litellm openai a picture plain"][:2] == ["BadRequestError", 400]
