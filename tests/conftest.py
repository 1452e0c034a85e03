"""Hermetic tests: neither the user's state nor the machine's proxies leak in, and on CI nothing may be skipped."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
IS_CI = os.environ.get("CI") == "true"
# How long an example takes is the machine's business, and new examples are for those who are there to look at them.
settings.register_profile(
    "patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=IS_CI
)
settings.load_profile("patient")

# A shell has jobs in the background ignore Ctrl-C, and so would the processes under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tier too")
    parser.addoption("--screenshots", action="store_true", help="the browser tests write docs/page-*.png anew")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if IS_CI:  # real parts on a busy machine: such a test has a second try, and the summary says so
        for item in items:
            if item.path.is_relative_to(TESTS / "integration") or item.path.is_relative_to(TESTS / "browser"):
                item.add_marker(pytest.mark.flaky(reruns=1))
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if IS_CI and report.skipped and not item.get_closest_marker("slow"):
        report.outcome = "failed"
        report.longrepr = f"skipped on CI, where every real part must be there: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def hermetic(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every test has a state directory of its own and sees none of the user's settings."""
    state: Path = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "OPENAI_API_KEY", "OPENAI_BASE_URL", "AGENT_INFRA_BACKEND_KEY"):
        monkeypatch.delenv(name, raising=False)
