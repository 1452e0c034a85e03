"""The way from this machine to the proxy in a job: follows the job, and leads a local port to it through a tunnel."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence

from agent_infra_core.control.discovery import Discovery
from agent_infra_core.control.proxy_job import ProxyJob
from agent_infra_core.errors import AgentInfraError
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.host import listen_on, process_stamp, write_atomically
from agent_infra_core.node.forwarder import Forwarder, answer, cut, pass_on
from agent_infra_core.node.guard import error_body
from agent_infra_core.protocol import ReplicaRecord
from agent_infra_core.settings import Config, proxy_url
from agent_infra_core.ssh.login_host import LoginHost
from agent_infra_core.ssh.tunnels import RECONNECT_WAIT_S, TunnelSet

HOST = "127.0.0.1"
OVER_S = 15.0  # from the end of the job until check() raises: `stop` may be about to end this process, too
FOLLOW_S = 0.2  # interval between looks at the tunnel
CONNECT_S = 5.0  # to reach the tunnel's end here, or the node


class ProxyLink:
    """Leads a port of this machine to the proxy in a job, wherever that runs. Owns the port, the tunnel and threads.

    While there is no tunnel, new connections wait for up to RECONNECT_WAIT_S. For commands that run until a signal, it
    stands where the Controller does if the proxy runs here.
    """

    def __init__(
        self,
        job: ProxyJob,
        config: Config,
        login: LoginHost | None,
        key: str,
        paths: DeploymentPaths,
        options: Sequence[str],
        warn: Callable[[str], None],
    ) -> None:
        """Take the port; connections to it wait for begin(). RefusedError if it is taken.

        ``key`` is the replicas', ``options`` are those of the job's role. ``warn`` takes lines for the operator.
        """
        listen_on(HOST, config.proxy.port).close()  # for its message
        # On the login host, cluster.tunnel is about the replicas alone.
        tunnel = config.cluster.tunnel if login is not None else "none"
        tunnels = TunnelSet(dataclasses.replace(config.cluster, tunnel=tunnel), login, key, ())
        self._forwarder = Forwarder(HOST, config.proxy.port)
        self._job, self._tunnels, self._config, self._options = job, tunnels, config, options
        self._record = paths.link_record
        self._discovery = Discovery(self._look, config.cluster.poll_interval, warn)
        self.is_new = False  # whether begin() has submitted the job
        self._stop, self._changed = threading.Event(), threading.Condition()  # the latter guards what follows
        self._end: tuple[str, int] | None = None  # where the tunnel begins; None: there is none for new connections
        self._through: tuple[str, int] | None = None  # the same for those in it, which may end in a silent one
        self._servers: set[socket.socket] = set()  # connections through it
        self._message: str | None = None  # on the tunnel's state
        self._ended: tuple[float, str] | None = None  # when the job was seen to have ended (monotonic s), and why
        self._thread = threading.Thread(target=self._run, name="proxy link", daemon=True)

    @property
    def port(self) -> int:
        return self._forwarder.port

    @property
    def url(self) -> str:
        return proxy_url(HOST, self.port)

    def routes(self) -> list[str]:
        """Lines on where the proxy runs and how it is reached, for the operator."""
        found = self._job.find()[0]
        return (self._job.describe(found) if found else []) + self._tunnels.describe()

    def begin(self) -> None:
        """Submit the job, unless there is one, and follow it. Raises as ProxyJob.submit() does."""
        self.is_new = self._job.submit(self._config, *self._options)
        me = {"pid": os.getpid(), "process": process_stamp(os.getpid()), "host": HOST, "port": self.port}
        write_atomically(self._record, json.dumps(me))
        self._discovery.start()
        self._thread.start()
        self._forwarder.start(self._serve)

    def settle(self, show: Callable[[Sequence[ReplicaRecord]], None], should_stop: Callable[[], bool]) -> bool:
        """Show the job, which begin() has submitted or this does, until its proxy is reached.

        False after ``should_stop``. AgentInfraError if it fails.
        """
        if not self._thread.is_alive():
            self.begin()
        if self._job.wait(show, should_stop) is None:
            return False
        self._discovery.hurry()
        deadline = time.monotonic() + RECONNECT_WAIT_S
        while self._end is None:
            if should_stop():
                return False
            if time.monotonic() > deadline:
                raise AgentInfraError(f"the proxy serves in its job, but {self._trouble()}; `stop` ends it")
            self.check()
            time.sleep(FOLLOW_S)
        return True

    def check(self) -> None:
        """Raise AgentInfraError, with the reason, once the job has ended.

        Not at once: `stop`, which ends the job, may use this process's connection to the login host until it ends that.
        """
        if self._ended is not None and time.monotonic() - self._ended[0] > OVER_S:
            raise AgentInfraError(f"{self._ended[1]}; `connect` starts another")
        if not self._thread.is_alive():
            raise AgentInfraError("the proxy's job is no longer followed: a bug; run `connect` again")

    def end_turns(self) -> None:
        """Have a stop() of the job cut the turns in flight."""
        self._job.is_urgent = True

    def stop(self, _grace_s: float = 0.0) -> None:
        """Close everything here; the job goes on."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._discovery.stop()
        self._forwarder.close()
        self._tunnels.close()
        self._record.unlink(missing_ok=True)

    def _look(self) -> list[ReplicaRecord]:
        """The proxy's record while it is to be reached. Called by discovery's thread."""
        job, record = self._job.look()
        if not self._job.is_over(job):
            self._ended = None
        elif self._ended is None:
            self._ended = time.monotonic(), self._job.explain(job)
        return [record] if record is not None else []

    def _run(self) -> None:
        """Follow the tunnel. Its thread's main loop."""
        while not self._stop.wait(FOLLOW_S):
            record = next(iter(self._tunnels.follow(self._discovery.records)), None)
            end = (record.host, record.port) if record is not None and record.port is not None else None
            with self._changed:
                is_lost, self._through = self._through not in (None, end), end
                self._end = end if record is not None and record.state == "ready" else None
                self._message = record.message if record is not None else None
                self._changed.notify_all()
                for server in self._servers if is_lost else ():  # a node that lost its power doesn't close them
                    cut(server)
            if is_lost:
                self._discovery.hurry()  # the job may have ended, or moved

    def _serve(self, client: socket.socket) -> None:
        """Serve a connection, in its own thread."""
        server = self._connected()
        if server is None:
            answer(client, 503, error_body(f"{self._trouble()}; try again", "api_error", "proxy_unreachable"))
            return
        with self._forwarder.held(server), server:
            try:
                pass_on(client, server)
            finally:
                with self._changed:
                    self._servers.discard(server)

    def _connected(self) -> socket.socket | None:
        """Connect to the proxy as soon as there is a tunnel; None if there is none in time."""
        deadline = time.monotonic() + RECONNECT_WAIT_S
        while not self._stop.is_set() and (left_s := deadline - time.monotonic()) > 0:
            with self._changed:
                self._changed.wait_for(lambda: self._end is not None or self._stop.is_set(), left_s)
                end = self._end
            try:
                server = socket.create_connection(end, CONNECT_S) if end is not None else None
            except OSError:  # it is just breaking
                self._stop.wait(FOLLOW_S)
                continue
            if server is not None:
                server.settimeout(None)
                with self._changed:
                    self._servers.add(server)
                    if end == self._through:
                        return server
                    self._servers.discard(server)
                server.close()
        return None

    def _trouble(self) -> str:
        """Why the proxy isn't reached."""
        why = (self._ended and self._ended[1]) or self._message or self._discovery.error or "its job waits or starts"
        return f"this machine doesn't reach it: {why}"
