#!/usr/bin/env python3
"""How long the program takes to start: ``agent_infra.py --help`` and ``import agent_infra``, of one version or two.

    python benchmarks/startup.py
    python benchmarks/startup.py --before PATH    # this version beside the one in another checkout

Each run is a process of its own, timed from its start to its end.  Figures are medians; versions are compared by the
ratio within a round, in alternating order.  One round before is not counted: from then on, bytecode is cached,
whatever PYTHONDONTWRITEBYTECODE says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench_contenders import PROGRAM
from bench_process import program_at

# What to run with Python, and how its output begins.
HELP = ("agent_infra.py --help", ("{program}", "--help"), "usage: ")
IMPORT = ("import agent_infra", ("-c", "import agent_infra; print(agent_infra.__file__)"), "{program}\n")


def milliseconds(python: str, program: Path, words: Sequence[str], begins: str) -> float:
    """How long a run took, in the program's folder and with its modules first; its output shows whether it worked."""
    command = [python, *(word.format(program=program) for word in words)]
    environment = {**os.environ, "PYTHONPATH": str(program.parent), "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=program.parent, env=environment, capture_output=True, text=True, timeout=60)
    took_ms = (time.perf_counter() - start) * 1000
    if done.returncode or not done.stdout.startswith(begins.format(program=program)):
        sys.exit(f"startup.py: {command} failed ({done.returncode}): {done.stdout[:300]}{done.stderr[-2000:]}")
    return took_ms


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=program_at, default=PROGRAM, help="the agent_infra.py to time (%(default)s)")
    parser.add_argument("--before", type=program_at, metavar="PATH", help="another checkout or agent_infra.py")
    parser.add_argument("--python", default=sys.executable, help="the interpreter (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    options = parser.parse_args()
    programs = [options.program, *([options.before] if options.before else [])]
    for what, words, begins in (HELP, IMPORT):
        taken: list[list[float]] = [[] for _ in programs]
        for number in range(options.rounds + 1):
            for index in sorted(range(len(programs)), reverse=number % 2 == 1):
                taken[index].append(milliseconds(options.python, programs[index], words, begins))
        now, *before = [values[1:] for values in taken]
        line = f"{what}: {statistics.median(now):.0f} ms"
        for other in before:
            ratios = [one / two for one, two in zip(now, other, strict=True)]
            line += f", before {statistics.median(other):.0f} ms, now / before {statistics.median(ratios):.2f}"
            line += f" ({min(ratios):.2f}–{max(ratios):.2f})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
