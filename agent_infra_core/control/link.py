"""The controller's side of the relay: starts it, talks to it, adopts a running one, replaces a dead one."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time

from agent_infra_core.errors import SERVING_PACKAGES, AgentInfraError, require_packages
from agent_infra_core.fleet.state import DeploymentPaths, read_relay_record
from agent_infra_core.host import end_process, listen_on, process_stamp, self_command, unix_address, write_atomically
from agent_infra_core.protocol import FRAME_HELLO, SUPPORTED_PROTOCOLS, FrameReader, encode_frame

RELAY_START_S = 15.0  # time a relay has to import gevent and Flask and open its control socket
RELAY_SILENCE_S = 15.0  # it reports every second; after this much silence it is replaced as hung
RELAY_END_S = 5.0  # time a relay has to exit after its turns end or run out of time
RELAY_RETRY_S = 2.0  # between starts of a relay that dies at once
DRAIN_S = 30.0  # time turns in flight have to end before a relay or replica is stopped


class RelayGoneError(AgentInfraError):
    """The relay's process or its control socket is gone; the controller starts another."""


class RelayLink:
    """Owns the relay process, its control socket, and the listening socket, which outlives any relay."""

    def __init__(self, paths: DeploymentPaths, host: str, port: int) -> None:
        self._paths, self._host, self.port = paths, host, port
        self._listener: socket.socket | None = None
        self._control: socket.socket | None = None
        self._send_lock = threading.Lock()  # one frame at a time: the controller and the reader of the history send
        self._frames = FrameReader()
        self._early: list[tuple[bytes, bytes]] = []  # frames received with the hello
        self.pid = 0
        self.retired: int | None = None  # pid of a relay of another version that is finishing its turns
        self._protocol = 0  # spoken by the connected relay
        self._is_recorded = True  # unless a relay's record could not be written
        self._stamp: str | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        """Adopt the relay left by an earlier controller, or listen and start one."""
        require_packages(SERVING_PACKAGES)  # without them it would exit at once and report it only in its log
        if self._adopt():
            return
        if self._listener is None:
            self._listener = listen_on(self._host, self.port)
        self.port = self._listener.getsockname()[1]
        self.spawn()

    def _adopt(self) -> bool:
        """Connect to a relay that still serves this address, recorded or not; end one that serves another address.

        A relay with another protocol finishes its turns and exits; its listening socket is kept for the next relay.
        """
        left = read_relay_record(self._paths)
        try:
            self._greet(time.monotonic() + (2.0 if left is not None else 0.0))
        except RelayGoneError:
            if left is not None:
                end_process(left["pid"], left["process"], DRAIN_S + RELAY_END_S)
            return False
        host, port = self._listener.getsockname()[:2] if self._listener is not None else ("", 0)
        if self.port in (0, port) and host in _addresses(self._host):
            self.port = port
            if self._protocol in SUPPORTED_PROTOCOLS:
                return True
            self._retire()
            return False
        if self._stamp is not None:
            end_process(self.pid, self._stamp, DRAIN_S + RELAY_END_S)
        self.close()
        return False

    def _retire(self) -> None:
        """Let a relay of another version finish its turns. Its events can't be read."""
        control, self._control, self._stamp = self._control, None, None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        if control is not None:
            control.close()
        self.retired = self.pid

    def spawn(self) -> None:
        """Start a relay on the listening socket and wait for its hello. RelayGoneError if none comes."""
        listener = self._listener
        if listener is None:
            raise RelayGoneError("there is no listening socket; open() comes first")
        self.abandon()
        command = [
            *self_command("relay"),
            "--socket",
            str(self._paths.relay_socket),
            "--listener-fd",
            str(listener.fileno()),
        ]
        with open(self._paths.log("proxy"), "ab") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        self._greet(time.monotonic() + RELAY_START_S)

    def _greet(self, deadline: float) -> None:
        """Connect to the control socket and read the hello, which carries the listening socket."""
        self._frames = FrameReader()
        while True:
            control = socket.socket(socket.AF_UNIX)
            descriptors: list[int] = []
            control.settimeout(5.0)
            try:
                with unix_address(str(self._paths.relay_socket)) as address:
                    control.connect(address)
                data, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
                frames = self._frames.feed(data)
                if frames and descriptors and frames[0][0] == FRAME_HELLO:
                    break
                error: object = "it hung up"
            except (OSError, ValueError) as problem:
                error = problem
            control.close()
            for descriptor in descriptors:
                os.close(descriptor)
            child = self._child  # close() may come from another thread, here and below
            exited = child is not None and child.poll() is not None
            if exited or time.monotonic() > deadline:
                raise RelayGoneError(f"the relay does not answer ({error}); see {self._paths.log('proxy')}")
            time.sleep(0.02)
        received = socket.socket(fileno=descriptors[0])
        if self._listener is None:
            self._listener = received
        else:
            received.close()
        self._early = frames[1:]
        hello = json.loads(frames[0][1])
        self._control, self.pid, self._protocol = control, int(hello["pid"]), hello.get("protocol", 0)
        self._stamp = process_stamp(self.pid)
        self._is_recorded = False
        self.keep_record()

    def keep_record(self) -> None:
        """Write the relay's record, by which `status` and `stop` find it; on a full disk, the next call tries again."""
        if self._is_recorded or self._listener is None:
            return
        port = self._listener.getsockname()[1]
        record = {"pid": self.pid, "process": self._stamp, "host": self._host, "port": port}
        with contextlib.suppress(OSError):
            write_atomically(self._paths.relay_record, json.dumps(record))
            self._is_recorded = True

    def reconnect(self) -> bool:
        """Open a new control connection to the running relay. Returns whether it answered."""
        control = self._control
        if control is None or process_stamp(self.pid) != self._stamp:
            return False
        control.close()
        self._control = None
        with contextlib.suppress(RelayGoneError):
            self._greet(time.monotonic() + 2.0)
            return True
        return False

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send a frame, in any thread. RelayGoneError if the connection is gone."""
        control = self._control  # close() may come from another thread
        try:
            if control is None:
                raise OSError("not connected")
            with self._send_lock:
                control.sendall(encode_frame(kind, payload))
        except OSError as error:
            if control is not None:
                with contextlib.suppress(OSError):
                    control.shutdown(socket.SHUT_RDWR)  # half a frame may have been sent; nothing may follow it
            raise RelayGoneError(f"the relay (pid {self.pid}) is gone: {error}") from error

    def receive(self, timeout: float) -> list[tuple[bytes, bytes]]:
        """Frames that arrive within ``timeout`` seconds, perhaps none. RelayGoneError at the end of the stream."""
        control = self._control
        if control is None:
            raise RelayGoneError("the relay is not connected")
        if self._early:
            frames, self._early = self._early, []
            return frames
        try:
            if not select.select([control], [], [], timeout)[0]:
                return []
            data = control.recv(1 << 20)
            if not data:
                raise OSError("it hung up")
            return self._frames.feed(data)
        except (OSError, ValueError) as error:
            raise RelayGoneError(f"the relay (pid {self.pid}) is gone: {error}") from error

    def rest(self) -> list[tuple[bytes, bytes]]:
        """Frames that have arrived but weren't received yet, even from a relay that is gone."""
        frames, self._early = self._early, []
        control = self._control
        with contextlib.suppress(OSError, ValueError):
            while control is not None and select.select([control], [], [], 0.0)[0]:
                data = control.recv(1 << 20)
                if not data:
                    break
                frames += self._frames.feed(data)
        return frames

    def abandon(self) -> None:
        """Close the control socket and make sure the relay's process is gone."""
        control, self._control = self._control, None
        stamp, self._stamp = self._stamp, None
        child, self._child = self._child, None
        if control is not None:
            control.close()
        if stamp is not None:
            end_process(self.pid, stamp, 0.0)
        if child is not None:
            child.kill()
            child.wait()

    def terminate(self) -> None:
        """Stop listening and ask the relay to finish its turns and exit. A second call makes it exit at once."""
        if self._listener is not None:
            self._listener.close()  # otherwise connections would queue for a relay that never comes
            self._listener = None
        if self._stamp is not None and process_stamp(self.pid) == self._stamp:
            with contextlib.suppress(ProcessLookupError):  # it may end at this moment
                os.kill(self.pid, signal.SIGTERM)

    def close(self) -> None:
        """End the relay, close the sockets, and remove the relay's record and socket file.

        A relay that was never connected to isn't this controller's: its files stay.
        """
        self.abandon()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for path in (self._paths.relay_record, self._paths.relay_socket) if self.pid else ():
            path.unlink(missing_ok=True)


def _addresses(host: str) -> set[str]:
    """The addresses that a listener on ``host`` may have."""
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()


def end_relay(pid: int, stamp: str, grace_s: float) -> None:
    """End a relay that has no controller. Turns in flight have ``grace_s``; with none, clients get an error at once."""
    deadline = time.monotonic() + RELAY_END_S
    while not grace_s and process_stamp(pid) == stamp and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)  # the second one ends its patience
        time.sleep(0.1)
    end_process(pid, stamp, grace_s and grace_s + RELAY_END_S)
