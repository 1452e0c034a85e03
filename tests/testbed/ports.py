"""Ports for what a test starts by itself a moment later.

A port that the kernel gives away (bind to 0) lies in the range from which it also takes the near ends of outgoing
connections, of any test: it may be in use again before the test's own program listens on it.
"""

import itertools
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

FIRST = 10_000
# What is told a port may take the next ones too (a replica each from ``base_port`` on).
ROOM = 16
PROCESSES = 8


def _own_ports() -> Iterator[int]:
    """The ports of this process of the test run, round and round; no other process of the run is given them."""
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    number = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "0"))) % PROCESSES
    share = (int(ephemeral[0]) - FIRST) // PROCESSES
    return itertools.cycle(range(FIRST + number * share, FIRST + (number + 1) * share - ROOM, ROOM))


_ports = _own_ports()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port that nothing listens on, that no connection is given and that no other test is told at this time."""
    return next(port for port in _ports if _is_free(port))
