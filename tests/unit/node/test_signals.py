"""Signals to `serve`: they ask it to drain, and do no harm once everything has ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_S

import agent_infra

PROGRAM = """
import contextlib, os, signal
from agent_infra_core.node.process import StopSignals
with contextlib.closing(StopSignals()) as signals:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.is_asked and not signals.is_urgent
class AtTheEnd:
    def __del__(self):  # after Python has given signals their defaults back
        os.kill(os.getpid(), signal.SIGUSR1)
import sys
sys.modules["kept"] = AtTheEnd()
"""


def test_a_signal_that_is_repeated_while_the_process_exits_does_not_end_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=Path(agent_infra.__file__).parent, timeout=PATIENCE_S)
    assert done.returncode == 0
