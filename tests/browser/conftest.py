"""A real Chromium, axe-core, and the page's server in front of documents that a test sets."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stats_server as stats
from browser_site import Site
from program import MODULE, Running
from testbed.ports import free_port

AXE = (
    "axe-core",
    "4.14.1",
    "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser. While it is there, this thread has a running event loop, so it must not outlive its module."""
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("there is no Chromium: apt-get install chromium fonts-dejavu-core")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=binary,
            args=[
                *("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
                "--host-resolver-rules=MAP *.example 127.0.0.1",  # names of web pages that tests serve
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's program, fetched once through npm into the cache; its hash is checked."""
    name, version, digest = AXE
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agent-infra"
    tarball = cache / f"{name}-{version}.tgz"
    if not tarball.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"there is no npm to fetch {name} with: install Node.js, or put {tarball.name} into {cache}")
        cache.mkdir(parents=True, exist_ok=True)
        scratch = tmp_path_factory.mktemp("npm")
        command = [npm, "pack", f"{name}@{version}", "--pack-destination", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"npm does not give {name}: {done.stderr[-300:]}")
        shutil.move(scratch / tarball.name, tarball)
    assert hashlib.sha256(tarball.read_bytes()).hexdigest() == digest, f"{tarball} is not {name} {version}; delete it"
    with tarfile.open(tarball) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


@pytest.fixture(scope="module")
def site_of_module(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("page")
    environment = {**os.environ, "XDG_STATE_HOME": str(folder), "PYTHONUNBUFFERED": "1"}
    with stats.serving(stats.busy()) as server:
        port = free_port()
        command = [sys.executable, str(MODULE), "dashboard", "--proxy", server.url, "--port", str(port)]
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        running = Running(process)
        try:
            url = running.wait_line(r"page +(http://\S+)")[1]
            running.wait_line("Uvicorn server started")
            found = re.search(r"key=(\S+)", url)
            assert found is not None
            yield Site(server, url, running, found[1], chromium)
        finally:
            running.close()


@pytest.fixture
def site(site_of_module: Site) -> Iterator[Site]:
    """The page in front of a fleet at work; afterwards no viewer is left and the browser has complained of nothing."""
    site_of_module.server.show(stats.busy())
    site_of_module.server.status, site_of_module.server.turns = 200, 12
    site_of_module.server.said = site_of_module.server.history = None
    site_of_module.complaints.clear()
    yield site_of_module
    for context in site_of_module.browser.contexts:
        context.close()
    assert site_of_module.complaints == []
