"""The sessions' tests once more, with the OpenAI SDK 2 of another environment (SDK 3 is in the tests' own)."""

import os
import subprocess
from pathlib import Path

import pytest
from patience import PATIENCE_S

import agent_infra

ROOT = Path(agent_infra.__file__).parent


def test_sessions_work_with_sdk_2_as_well() -> None:
    python = os.environ.get("AGENT_INFRA_OPENAI2_PYTHON")
    if not python and not os.environ.get("CI"):
        pytest.skip("AGENT_INFRA_OPENAI2_PYTHON is not set: a Python with openai>=2,<3 and pytest")
    assert python, "AGENT_INFRA_OPENAI2_PYTHON must be set in CI"
    version = [python, "-c", "import openai; print(openai.VERSION)"]
    assert subprocess.check_output(version, text=True, timeout=PATIENCE_S).startswith("2.")
    tests = [
        python,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "tests/integration/test_client_openai.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout[-8000:]
    assert "skipped" not in finished.stdout
