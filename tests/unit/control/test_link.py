"""The controller's end of the control socket."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from patience import PATIENCE_S

from agent_infra_core.control.link import RelayGoneError, RelayLink
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.protocol import FRAME_HELLO


def test_nothing_follows_half_a_frame(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = RelayLink(DeploymentPaths(tmp_path), "127.0.0.1", 0)
        link._control = ours
        ours.settimeout(0.2)
        with pytest.raises(RelayGoneError):
            link.send(FRAME_HELLO, b"x" * (8 << 20))  # nobody reads
        with pytest.raises(RelayGoneError, match="Broken pipe"):
            link.send(FRAME_HELLO, b"next")
        theirs.settimeout(PATIENCE_S)
        while theirs.recv(1 << 20):
            pass  # what had been sent; then the end
