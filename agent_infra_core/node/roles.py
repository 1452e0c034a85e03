"""The command lines of the roles that run beside the engine, and the main program of node.pyz."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from agent_infra_core.errors import AgentInfraError, RefusedError
from agent_infra_core.node.hub import fetch_from_hub
from agent_infra_core.node.llama_cpp import run_llama_cpp
from agent_infra_core.node.ranks import run_rank
from agent_infra_core.node.replica import serve
from agent_infra_core.node.together import serve_together


def add_roles(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command line of each role; ``run`` in the parsed arguments executes it."""
    parser = verbs.add_parser("serve")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--replica", required=True, action="append")
    parser.set_defaults(run=_run_serve)
    parser = verbs.add_parser("fetch")
    parser.add_argument("repository")
    parser.set_defaults(run=_run_fetch)
    parser = verbs.add_parser("rank")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--replica", required=True)
    parser.set_defaults(run=lambda asked: run_rank(asked.run_dir, asked.replica))
    parser = verbs.add_parser("llama-cpp")
    for option in ("--model-path", "--name", "--host"):
        parser.add_argument(option, required=True)
    for option in ("--port", "--slots", "--threads", "--context-tokens"):
        parser.add_argument(option, type=int, required=True)
    parser.set_defaults(run=run_llama_cpp)


def _run_serve(arguments: argparse.Namespace) -> int:
    if len(arguments.replica) == 1:
        return serve(arguments.run_dir, arguments.replica[0])
    return serve_together(arguments.run_dir, arguments.replica)


def _run_fetch(arguments: argparse.Namespace) -> int:
    try:
        outcome = {"path": fetch_from_hub(arguments.repository)}
    except RefusedError as error:
        outcome = {"error": str(error)}
    print(json.dumps(outcome), flush=True)
    return 0 if "path" in outcome else 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a role of node.pyz. Returns the exit code: 0 ok, 1 failed, 2 refused, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="node.pyz")
    add_roles(parser.add_subparsers(required=True))
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except AgentInfraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
