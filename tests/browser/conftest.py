"""A real Chromium, axe-core, and the page's server in front of documents that a test sets."""

from __future__ import annotations

import contextlib
import ctypes
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
from patience import PATIENCE_S
from program import MODULE, Running
from testbed.ports import free_port

AXE = (
    "axe-core",
    "4.14.1",
    "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
)


CLONE_NEWNET = 0x4000_0000  # <linux/sched.h>


@pytest.fixture(scope="module", autouse=True)
def own_network(axe_tarball: Path) -> Iterator[None]:
    """A loopback device of its own for this thread, its browser and servers.

    Chromium drops its connections (ERR_NETWORK_CHANGED) when any address of the machine changes, and the testbed of
    other tests changes them. It takes root, as the testbed does.
    """
    if os.getuid() != 0 or shutil.which("ip") is None:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    former = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=PATIENCE_S)
            yield
        finally:
            assert libc.setns(former, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(former)


@pytest.fixture(scope="module")
def chromium(own_network: None) -> Iterator[Any]:
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
def axe_tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """axe-core's package, fetched once through npm into the cache. There is none without npm or its registry."""
    name, version, _ = AXE
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agent-infra"
    tarball = cache / f"{name}-{version}.tgz"
    npm = shutil.which("npm")
    if not tarball.exists() and npm is not None:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = tmp_path_factory.mktemp("npm")
        command = [npm, "pack", f"{name}@{version}", "--pack-destination", str(scratch)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            if subprocess.run(command, timeout=120).returncode == 0:
                shutil.move(scratch / tarball.name, tarball)
    return tarball


@pytest.fixture(scope="session")
def axe(axe_tarball: Path) -> str:
    """axe-core's program; its package's hash is checked."""
    name, version, digest = AXE
    if not axe_tarball.exists():
        pytest.skip(f"npm gave no {name}: install Node.js, or put {axe_tarball.name} into {axe_tarball.parent}")
    assert hashlib.sha256(axe_tarball.read_bytes()).hexdigest() == digest, (
        f"{axe_tarball} is not {name} {version}; delete it"
    )
    with tarfile.open(axe_tarball) as archive:
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
