"""`doctor` and `pull`: what is looked at before anything starts, and weights from a hub, with the real client of it."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from program import Program
from testbed.hub import COMMIT, TOKEN
from testbed.slurm import missing_programs
from weights import packaged_gguf


def findings(app: Program) -> dict[str, list[dict[str, Any]]]:
    """What `doctor --json` says, by check."""
    said: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(app.run("doctor", "--json").stdout):
        said.setdefault(finding["check"], []).append(finding)
    return said


def served_from(hub: str, app: Program, repository: str, **env: str) -> None:
    """Configure a model of the hub; the cache is the test's own."""
    app.environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(app.folder / "hf"), "HF_HUB_DISABLE_XET": "1", **env}
    app.environment.pop("HF_TOKEN", None) if "HF_TOKEN" not in env else None
    command = [sys.executable, "-m", "http.server", "{port}"]
    app.configure(models=[{"name": "m", "model_path": repository, "engine": "command", "command": command}])


def test_a_healthy_deployment_has_nothing_to_mend(app: Program) -> None:
    packaged_gguf()
    done = app.run("doctor")
    assert done.returncode == 0, done.stdout
    assert f"ok       proxy port: 127.0.0.1:{app.port} is free" in done.stdout
    assert "weights: model smollm2: smollm2-135m-instruct is fetched" in done.stdout
    assert "errors: 0" in done.stdout.splitlines()[-1]


def test_each_line_that_is_wrong_says_what_to_do_and_the_exit_code_tells(app: Program) -> None:
    missing = {"name": "m", "model_path": "/nowhere/model.gguf", "engine": "llama_cpp"}
    app.configure(models=[missing])
    with socket.socket() as other:
        other.bind(("127.0.0.1", app.port))
        other.listen()
        done = app.run("doctor")
    assert done.returncode == 1
    assert "error    proxy port: the proxy cannot listen" in done.stdout
    assert "error    weights: model m: model_path /nowhere/model.gguf does not exist" in done.stdout
    assert "ok       packages:" in done.stdout  # one wrong line hides no other


def test_a_command_whose_program_is_not_there_is_said_to_and_refused(app: Program) -> None:
    (app.folder / "bin").mkdir()
    model = {"name": "m", "model_path": "x", "engine": "command", "command": ["my-server", "{port}"]}
    app.configure(models=[model | {"env": {"PATH": str(app.folder / "bin")}}])
    missing = "model m: command: my-server was not found; install it, or give its path"
    said = findings(app)
    assert [(each["level"], each["text"]) for each in said["engines"]] == [("error", missing)]
    assert "weights" not in said  # what the command makes of x, it alone knows
    assert (refused := app.run("start")).returncode == 2
    assert refused.stderr == f"error: {missing}\n"
    server = app.folder / "bin" / "my-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    assert findings(app)["engines"][0]["text"] == f"model m: engine command found: {server}"


def test_the_deployments_own_proxy_is_no_foreign_one(app: Program) -> None:
    packaged_gguf()
    assert app.run("connect", "--background").returncode == 0
    assert "is served by this deployment's proxy" in findings(app)["proxy port"][0]["text"]
    assert app.run("stop").returncode == 0


def test_a_configuration_that_cannot_be_read_is_refused(app: Program) -> None:
    app.config.write_text("models: []")
    assert app.run("doctor").returncode == 2


def test_a_machine_with_slurms_commands_and_no_cluster_is_told_as_what_it_is(app: Program) -> None:
    if missing_programs() or Path("/etc/slurm/slurm.conf").exists():
        pytest.skip("needs Slurm's commands (tests/run.sh installs them) on a machine that is in no cluster")
    app.environment.pop("SLURM_CONF", None)
    slurm = {"work_dir": str(app.folder / "work"), "partitions": [{"name": "gpu"}]}
    models = [{"name": "m", "model_path": "org/m"}]
    app.config.write_text(json.dumps({"cluster": {"type": "slurm", "slurm": slurm}, "models": models}))
    finding = findings(app)["Slurm"][0]
    assert finding["level"] == "error"
    assert finding["text"].endswith("Could not establish a configuration source")
    assert not finding["text"].startswith(";")
    assert finding["fix"] == "set cluster.ssh to the cluster's login host, or SLURM_CONF to its slurm.conf"


def test_pull_fetches_what_engines_read_and_nothing_twice(app: Program, hub: str) -> None:
    served_from(hub, app, "org/open")
    assert (
        findings(app)["weights"][0]["text"]
        == "org/open is not fetched yet; the hub has it; `pull` downloads it in advance"
    )
    done = app.run("pull")
    assert done.returncode == 0, done.stderr
    snapshot = app.folder / "hf" / "hub" / "models--org--open" / "snapshots" / COMMIT
    assert str(snapshot) in done.stdout
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json", "model.safetensors"]
    assert findings(app)["weights"][0]["text"].startswith("model m: org/open is in ")


def test_a_gated_model_needs_a_token(app: Program, hub: str) -> None:
    served_from(hub, app, "org/gated")
    assert "set HF_TOKEN" in findings(app)["weights"][0]["fix"]
    refused = app.run("pull")
    assert refused.returncode == 2
    assert "it is gated: ask for access on its page, then set HF_TOKEN" in refused.stderr
    served_from(hub, app, "org/gated", HF_TOKEN=TOKEN)
    assert findings(app)["weights"][0]["level"] == "ok"
    done = app.run("pull", "--model", "m")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_model_that_does_not_exist_is_said_to(app: Program, hub: str) -> None:
    served_from(hub, app, "org/missing")
    assert "it does not exist or is private" in findings(app)["weights"][0]["fix"]
    assert "it does not exist or is private" in app.run("pull").stderr


def test_a_hub_that_cannot_be_reached_is_a_warning_for_doctor_and_the_end_of_pull(app: Program) -> None:
    served_from("http://127.0.0.1:9", app, "org/open")
    finding = findings(app)["weights"][0]
    assert (finding["level"], "cannot be reached from here" in finding["fix"]) == ("warning", True)
    refused = app.run("pull")
    assert refused.returncode == 2
    assert "the hub cannot be reached from here" in refused.stderr


def test_pull_of_the_packaged_model_says_where_it_is(app: Program) -> None:
    path = packaged_gguf()
    done = app.run("pull")
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
