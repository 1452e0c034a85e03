"""Stands in for the command line of agent_infra.py until it has the verbs `serve` and `llama-cpp`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import agent_infra

agent_infra.__file__ = __file__  # what `serve` starts the embedded engine by

parser = argparse.ArgumentParser()
verbs = parser.add_subparsers(dest="verb", required=True)
serve = verbs.add_parser("serve")
serve.add_argument("--run-dir", required=True)
serve.add_argument("--replica", required=True)
llama_cpp = verbs.add_parser("llama-cpp")
for name in ("--model-path", "--name", "--host"):
    llama_cpp.add_argument(name, required=True)
for name in ("--port", "--slots", "--threads", "--context-tokens"):
    llama_cpp.add_argument(name, type=int, required=True)
values = vars(parser.parse_args())
try:
    if values.pop("verb") == "serve":
        sys.exit(agent_infra.serve(values["run_dir"], values["replica"]))
    sys.exit(agent_infra.run_llama_cpp(**values))
except agent_infra.AgentInfraError as error:
    print(f"agent-infra: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
