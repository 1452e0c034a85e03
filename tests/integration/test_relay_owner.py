"""Who may pass without the key: the user's own processes, told by the socket's owner, over IPv4 and IPv6."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from relay_harness import KEY, Client, RelayProcess, another_user, backend
from testbed.ports import free_port

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.fixture(params=["127.0.0.1", "::1"])
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def relay(tmp_path: Path, host: str, engine: FakeEngine) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path, host=host) as relay:
        relay.controller.send_table([backend(1, engine.port)])
        yield relay


def test_a_key_is_not_asked_of_the_same_user(relay: RelayProcess, host: str) -> None:
    with Client(relay.port, host=host) as client:
        assert client.chat({"Authorization": "Bearer whatever"}).status == 200
        assert client.get("/stats").status == 503  # there is no snapshot; the door is open


@needs_root
def test_another_user_needs_the_key_for_everything_but_health(relay: RelayProcess, host: str) -> None:
    with ExitStack() as stack:
        with another_user():
            first, second, third, fourth = (stack.enter_context(Client(relay.port, host=host)) for _ in range(4))
        assert [first.get("/health").status, first.get("/stats").status] == [200, 401]
        assert second.chat().status == 401
        assert third.chat({"Authorization": "Bearer wrong"}).status == 401
        assert fourth.chat({"Authorization": f"Bearer {KEY}"}).status == 200
        assert fourth.chat({"X-Api-Key": KEY}).status == 200


@needs_root
@pytest.mark.parametrize("name", ["Authorization", "X-Api-Key"])
def test_a_key_lets_its_own_request_pass_and_none_behind_it(relay: RelayProcess, host: str, name: str) -> None:
    key = {"Authorization": f"Bearer {KEY}", "X-Api-Key": KEY}[name]
    with ExitStack() as stack:
        with another_user():
            first, second = (stack.enter_context(Client(relay.port, host=host)) for _ in range(2))
        assert first.chat().status == 401  # its head is known from here on
        assert [second.chat({name: key}).status for _ in range(3)] == [200] * 3
        assert second.chat().status == 401


@needs_root
def test_a_refused_head_has_no_body(relay: RelayProcess, host: str) -> None:
    with another_user(), Client(relay.port, host=host) as client:
        client.sock.sendall(b"HEAD /stats HTTP/1.1\r\nHost: t\r\n\r\nGET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        while not client.buffer.endswith(b"}\n"):
            client.buffer += client.sock.recv(65536)
    refused, health = client.buffer.split(b"\r\n\r\n", 1)
    assert refused.startswith(b"HTTP/1.1 401 ")
    assert health.startswith(b"HTTP/1.1 200 ")


@needs_root
@pytest.mark.parametrize("host", ["127.0.0.1"], indirect=True)
def test_another_user_at_a_port_that_this_one_uses_to_call_elsewhere_is_not_this_one(
    relay: RelayProcess, host: str
) -> None:
    """Two sockets may have one address and port, as long as they call different servers."""
    port = free_port()

    def call(server: str) -> socket.socket:
        sock = stack.enter_context(socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(PATIENCE_S)
        sock.bind((host, port))
        sock.connect((server, relay.port))
        return sock

    with socket.create_server(("127.0.0.2", relay.port)), ExitStack() as stack:
        with another_user():
            other = call(host)
        call("127.0.0.2")
        other.sendall(b"GET /v1/models HTTP/1.1\r\nHost: t\r\n\r\n")
        assert other.recv(65536).startswith(b"HTTP/1.1 401 ")


@needs_root
@pytest.mark.parametrize("host", ["127.0.0.1"], indirect=True)
def test_a_listener_of_this_user_on_the_callers_port_does_not_vouch_for_the_caller(
    relay: RelayProcess, host: str
) -> None:
    """Bound to a device, the caller's socket is hidden from the kernel's look-up, which then finds the listener."""
    with ExitStack() as stack:
        with another_user():
            caller = stack.enter_context(socket.socket())
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
            caller.settimeout(PATIENCE_S)
            caller.bind((host, free_port()))
            caller.connect((host, relay.port))
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(caller.getsockname())
        listener.listen()
        caller.sendall(b"GET /v1/models HTTP/1.1\r\nHost: t\r\n\r\n")
        assert caller.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_where_the_kernel_does_not_say_who_calls_everyone_needs_the_key(
    tmp_path: Path, host: str, engine: FakeEngine
) -> None:
    with RelayProcess(tmp_path, host=host, prelude="import testbed.no_netlink") as relay:
        relay.controller.send_table([backend(1, engine.port)])
        with Client(relay.port, host=host) as one, Client(relay.port, host=host) as other:
            assert one.chat().status == 401
            assert other.chat({"Authorization": f"Bearer {KEY}"}).status == 200
