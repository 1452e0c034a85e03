"""The port of this machine that leads to a proxy in a job, with the tunnel's proofs and servers on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from patience import PATIENCE_S
from program import wait_for
from slurm_stand_in import CONFIG, JOB, StandIn, make_job

from agent_infra_core.control import proxy_link
from agent_infra_core.control.proxy_job import ServedProxy
from agent_infra_core.control.proxy_link import ProxyLink
from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.fleet.state import deployment_paths

KEY = "k" * 40  # the replicas'


@contextmanager
def server(name: str) -> Iterator[int]:
    """An HTTP server that answers with its name. Yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(name)))
            self.end_headers()
            self.wfile.write(name.encode())

        def log_message(self, *_: object) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield made.server_port
    finally:
        made.shutdown()
        made.server_close()
        thread.join(PATIENCE_S)


Serve = Callable[..., ServedProxy]


@pytest.fixture
def serve(host: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Has the proxy of job 7 on n1 serve on a port of this machine."""
    monkeypatch.setenv("AGENT_INFRA_ADDRESS", "127.0.0.1")
    with ExitStack() as ended:

        def begin(port: int, key: str = KEY) -> ServedProxy:
            told = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
            made = ServedProxy(str(host.folder), told, key, ("0.0.0.0", port))
            ended.callback(made.close)
            return made

        yield begin


@pytest.fixture
def host(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.fixture
def link(host: StandIn) -> Iterator[ProxyLink]:
    config = dataclasses.replace(CONFIG, proxy=dataclasses.replace(CONFIG.proxy, port=0))
    job, paths = make_job(host, config.cluster), deployment_paths("d", os.environ)
    made = ProxyLink(job, config, None, KEY, paths, (), print)
    yield made
    made.stop()


def get(link: ProxyLink) -> str:
    with urllib.request.urlopen(link.url, timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())


def comes_from(link: ProxyLink, name: str) -> bool:
    """Whether an answer comes from that server. A connection made just before a break is noticed is closed."""
    with contextlib.suppress(ConnectionError):
        return get(link) == name
    return False


def test_the_port_stays_when_the_job_moves(link: ProxyLink, host: StandIn, serve: Serve) -> None:
    with server("first") as first, server("second") as second:
        host.accepts = JOB
        before = serve(first)
        assert link.settle(lambda _: None, lambda: False)
        assert len(host.submitted) == 1
        assert get(link) == "first"
        told = json.loads(deployment_paths("d", os.environ).link_record.read_text())
        assert (told["pid"], told["port"]) == (os.getpid(), link.port)
        before.close()
        serve(second)
        wait_for(lambda: comes_from(link, "second"), "the proxy where it is now")
        link.check()
        assert len(host.submitted) == 1
    link.stop()
    assert not deployment_paths("d", os.environ).link_record.exists()


def test_a_server_without_the_key_gets_nothing(
    link: ProxyLink, host: StandIn, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_link, "RECONNECT_WAIT_S", 2.0)
    with server("stranger") as port:
        host.accepts = JOB
        serve(port, key="x" * 40)
        with pytest.raises(AgentInfraError, match="doesn't reach it: tunnel .*another program's server answers on n1"):
            link.settle(lambda _: None, lambda: False)
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            get(link)
        error = json.loads(refused.value.read())["error"]
        refused.value.close()
    assert error["code"] == "proxy_unreachable"
    assert "another program's server answers on n1" in error["message"]


def test_it_ends_with_the_job_and_says_why(
    link: ProxyLink, host: StandIn, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_link, "OVER_S", 0.5)
    with server("it") as port:
        host.accepts = JOB
        serve(port)
        assert link.settle(lambda _: None, lambda: False)
        link.check()
        host.jobs = [dataclasses.replace(JOB, state="TIMEOUT")]
        host.end = "JobId=7 JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15"

        def is_over() -> bool:
            try:
                link.check()
            except AgentInfraError as error:
                return "timed_out" in str(error) and "`connect` starts another" in str(error)
            return False

        wait_for(is_over, "the end")


def test_a_port_that_is_taken_is_refused_before_anything_is_submitted(host: StandIn) -> None:
    with server("other") as port:
        config = dataclasses.replace(CONFIG, proxy=dataclasses.replace(CONFIG.proxy, port=port))
        job, paths = make_job(host, config.cluster), deployment_paths("d", os.environ)
        with pytest.raises(RefusedError, match=f"cannot listen on 127.0.0.1:{port}: .* set proxy.port"):
            ProxyLink(job, config, None, KEY, paths, (), print)
    assert host.submitted == []
