"""Stands in for `serve` where no engine is needed: reports ready, then stopped after SIGTERM. Serves nothing.

With AGENT_INFRA_TEST_DIES set it says that and ends without a word in its record; with ..._STUBBORN it ignores SIGTERM.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from agent_infra_core.host import process_stamp, write_atomically
from agent_infra_core.protocol import ReplicaRecord, spec_from_json

directory, replica = Path(sys.argv[2]), sys.argv[4]
spec = spec_from_json((directory / "specs" / f"{replica}.json").read_text())
if "AGENT_INFRA_TEST_DIES" in os.environ:
    sys.exit("the engine's last words")


def tell(state: str) -> None:
    record = ReplicaRecord(
        replica=replica,
        model=spec.model,
        state=state,
        engine=spec.engine.name,
        node=os.uname().nodename,
        pid=os.getpid(),
        process=process_stamp(os.getpid()) or "",
        gpu_ids=spec.gpu_ids,
    )
    write_atomically(directory / "replicas" / f"{replica}.json", json.dumps(dataclasses.asdict(record)))


signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
tell("ready")
while "AGENT_INFRA_TEST_STUBBORN" in os.environ:
    signal.sigwait([signal.SIGTERM])
signal.sigwait([signal.SIGTERM])
tell("stopped")
