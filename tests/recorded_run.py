"""A history of one run, as reports are made of: hostile text, failures, replica time and a verdict that changed."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

from agent_infra_core.insight.gpu_hours import ReplicaUse
from agent_infra_core.insight.history import HistoryBatch, HistoryFile
from agent_infra_core.insight.runs import Announcement
from agent_infra_core.insight.turns import TurnRecord

START = 1_795_305_600.0
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def write_run(path: Path) -> None:
    """240 turns of three sessions in 40 minutes."""
    file = HistoryFile(path)
    for number in range(240):
        at = START + 10 * number
        fields: dict[str, Any] = {"session": f"s{number % 3}{HOSTILE}", "task": f"task{number % 2}", "model": "m"}
        fields |= {"stream": True, "backend": "m-1", "started_at": at - 2, "queue_ms": 10.0, "ttft_ms": 50.0}
        fields |= {"inference_ms": 1000.0 + number, "prompt_tokens": 100, "completion_tokens": 20, "cached_tokens": 60}
        fields |= {"finish_reason": HOSTILE if number == 5 else "stop", "prompt": f"q{number} {HOSTILE}"}
        fields |= {"answer": f"a{number} {HOSTILE}", "think_ms": 500.0, "post_ms": 250.0}
        outcome = "error" if number % 40 == 7 else "completed"
        if outcome == "error":
            fields["error"] = f"it broke {HOSTILE}"
        file.write(HistoryBatch(deque([TurnRecord(f"t{number}", at, outcome, 200, **fields)])))
    busy, at_slot = ReplicaUse("m-1", "m", "H100", 2, "ready_busy"), int(START // 300) * 300
    entry = json.loads((Path(__file__).parent / "golden/analysis.json").read_text())[0]
    of_m = ("m", "H100")
    analyses = {of_m: json.dumps({**entry, "model": "m", "gpu": "H100", "computed_at": START + 2400}).encode()}
    verdicts = [
        (
            START + 60 * minute,
            *of_m,
            verdict,
            0.9,
            f"It is {verdict}.",
            "",
            60.0 + 5 * minute,
            2e4 + 600 * minute,
            147.0,
        )
        for minute in range(40)
        for verdict in ["GPU-BOUND" if minute >= 25 else "AGENT-BOUND"]
    ]
    gauges = [
        (START + 5 * step, model, 5.0, 3.0, 1.0, 0.5, 0.8, step % 2) for step in range(1, 480) for model in ("", "m")
    ]
    runs = {"night": Announcement(f"night {HOSTILE}", 100, START + 600)}
    file.write(
        HistoryBatch(
            replica_time={(busy, at_slot): 1800.0}, verdicts=verdicts, analyses=analyses, gauges=gauges, runs=runs
        )
    )
    file.close()
