"""What users, scripts and deployments that run rely on, told by the program itself; tests/golden/frozen/ keeps it.

``PYTHONPATH=.:tests:benchmarks python tests/freeze.py`` writes that folder anew: only for a change that is meant, and
the diff shows to whom it matters.  With ``--former`` it writes tests/golden/v0.1.0/state anew, by 0.1.0's program.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import simulated
from former import FOLDER, FORMER, HOST, ROOT, unpack_former
from patience import PATIENCE_S
from program import Program, program, wait_for
from prometheus_client.parser import text_string_to_metric_families

from agent_infra import ROLES, build_parser, main
from agent_infra_core.control.handover import Succession
from agent_infra_core.insight.gpu_hours import ReplicaUse
from agent_infra_core.insight.history import HistoryFile
from agent_infra_core.insight.metrics import StatsMetrics, TurnMetrics, metrics_text
from agent_infra_core.insight.turns import TurnRecord
from agent_infra_core.protocol import ReplicaRecord, ServeSpec

FROZEN = ROOT / "tests" / "golden" / "frozen"
Files = Mapping[str, str]  # name in FROZEN → text


def as_json(document: Any) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


# --- Running the command line in this process. -----------------------------------------------------------------------

SCONTROL = """\
#!/bin/sh
for node in n1 n2 n3 n4; do
  echo "NodeName=$node Arch=x86_64 CPUAlloc=0 CPUEfctv=64 CPUTot=64 Gres=gpu:h100:4(S:0) NodeAddr=$node" \\
    "GresUsed=gpu:h100:0(IDX:N/A) State=IDLE ThreadsPerCore=1 Partitions=gpu,low CfgTRES=cpu=64 AllocTRES="
done
"""


@contextlib.contextmanager
def machine() -> Iterator[Path]:
    """An empty folder that is this user's home and state, on a machine whose Slurm has four idle nodes and no job."""
    with tempfile.TemporaryDirectory(prefix="frozen-") as name:
        folder = Path(name)
        for command, text in (("squeue", "#!/bin/sh\n"), ("scontrol", SCONTROL)):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / command).write_text(text)
            (folder / "bin" / command).chmod(0o755)
        told = {"HOME": name, "XDG_STATE_HOME": f"{name}/state", "PATH": f"{name}/bin:/usr/bin:/bin", "LC_ALL": "C"}
        with mock.patch.dict(os.environ, told):
            yield folder


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command line; FOLDER stands there for ``folder``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue().replace(str(folder), "FOLDER"), err.getvalue().replace(str(folder), "FOLDER")


# --- The command line. -----------------------------------------------------------------------------------------------


def told_action(action: argparse.Action) -> dict[str, Any]:
    """What is set of an option or an argument."""
    kind = type(action).__name__.strip("_").removesuffix("Action")
    names = ("option_strings", "dest", "nargs", "const", "default", "choices", "required", "metavar", "help")
    values = {name: getattr(action, name) for name in names}
    return {"kind": kind, **{name: value for name, value in values.items() if value not in (None, [])}}


def told_parser(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What a parser says to people and to scripts; not as text, whose form is the Python version's."""
    told: dict[str, Any] = {"description": parser.description, "epilog": parser.epilog, "options": []}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told["verb_help"] = {choice.dest: choice.help for choice in action._choices_actions}
            told["verbs"] = {name: told_parser(each) for name, each in action.choices.items()}
        elif not isinstance(action, argparse._HelpAction):
            told["options"].append(told_action(action))
    return told


def command_line() -> Files:
    every = told_parser(build_parser(with_roles=True))["verbs"]
    return {
        "command_line.json": as_json(told_parser(build_parser())),
        "roles.json": as_json(
            {"description": None, "epilog": None, "options": [], "verb_help": {}, "verbs": {n: every[n] for n in ROLES}}
        ),
    }


USAGES = (
    "--config some.yaml status",
    "up --replicas 0",
    "up --replicas many",
    "start --config",
    "connect --port 99999",
    "connect --port -1",
    "scale m",
    "scale m -1",
    "logs -n some",
    "status here",
    "export --since yesterday",
    "proxy",
    "proxy --backend m=127.0.0.1:1 --capture-text some",
)
REFUSALS = (
    "start --model gpt",
    "start --dry-run --model gpt",
    "scale gpt 1",
    "status",
    "stop",
    "stop --name gone",
    "logs",
    "export",
    "report",
    "export --history gone.db",
    "dashboard --proxy localhost",
    "proxy --backend m",
    "proxy --backend m=127.0.0.1:70000",
)


def refusals() -> Files:
    """What is said to a command line that cannot be followed; of a usage error the last line, as ours alone."""
    told: dict[str, Any] = {}
    with machine() as folder:
        for words in USAGES:
            code, _, err = run(folder, *words.split())
            told[words] = {"exit_code": code, "error": err.splitlines()[-1].partition("error: ")[2]}
        (folder / "config.yaml").write_text("models: [{name: m, model_path: org/m}]\n")
        for line in REFUSALS:
            verb, *rest = line.split()
            options = [] if verb == "proxy" else ["--config", str(folder / "config.yaml")]
            code, out, err = run(folder, verb, *options, *rest)
            told[line] = {"exit_code": code, "output": out, "error": err}
    return {"refusals.json": as_json(told)}


# --- Configurations that are wrong. ----------------------------------------------------------------------------------

MODEL = "models: [{name: m, model_path: org/m}]\n"


def _model(keys: str) -> str:
    return f"models: [{{name: m, model_path: org/m, {keys}}}]\n"


def _slurm(keys: str) -> str:
    return MODEL + f"cluster: {{type: slurm, slurm: {{{keys}}}}}\n"


BAD: Mapping[str, str] = {
    "unknown key, nearly one": MODEL + "proxy: {stratgy: least_load}\n",
    "unknown key, like none": MODEL + "zebra: 1\n",
    "unknown section, nearly one": MODEL + "clutser: {name: x}\n",
    "unknown key of a model": "models: [{nmae: m, model_path: p}]\n",
    "wrong type, a string": MODEL + "proxy: {port: '5800'}\n",
    "wrong type, a bool": MODEL + "proxy: {port: true}\n",
    "wrong type, a number": MODEL + "proxy: {host: 5}\n",
    "wrong type, a list": MODEL + "proxy: {strategy: [round_robin]}\n",
    "a section that is null": MODEL + "proxy: null\n",
    "a section that is a number": MODEL + "proxy: 3\n",
    "models that are a mapping": "models: {}\n",
    "no models": "models: []\n",
    "above the bounds": MODEL + "proxy: {port: 70000}\n",
    "below the bounds": MODEL + "proxy: {max_retries: -1}\n",
    "at an open bound": MODEL + "proxy: {request_timeout: 0}\n",
    "not a number": MODEL + "proxy: {request_timeout: .nan}\n",
    "no such choice": MODEL + "proxy: {strategy: best}\n",
    "no such version": MODEL + "version: '2.0'\n",
    "a key too short": MODEL + "proxy: {api_key: short}\n",
    "history without quotes": MODEL + "proxy: {history: off}\n",
    "a header's name with a blank": MODEL + "headers: {session: 'X Session'}\n",
    "a name with a blank": "models: [{name: 'a b', model_path: p}]\n",
    "a path is missing": "models: [{name: m}]\n",
    "no such engine": _model("engine: tgi"),
    "env that is no string": _model("env: {A: 1}"),
    "a long value": _model(f"env: [{', '.join('abcdefgh' for _ in range(12))}]"),
    "engine_args in one string": _model("engine_args: --max-num-seqs 4"),
    "models of one name": "models: [{name: m, model_path: p}, {name: m, model_path: q}]\n",
    "a key twice": MODEL + "models: []\n",
    "command is missing": _model("engine: command"),
    "command of another engine": _model("command: [x, '{port}']"),
    "command without the port": _model("engine: command, command: [x]"),
    "ssh of a local cluster": MODEL + "cluster: {ssh: {host: login}}\n",
    "ssh without a host": MODEL + "cluster: {type: slurm, ssh: {user: me}}\n",
    "ssh with an option for a host": MODEL + "cluster: {type: slurm, ssh: {host: -oProxyCommand=x}}\n",
    "tunnel of a local cluster": MODEL + "cluster: {tunnel: login}\n",
    "slurm without partitions": MODEL + "cluster: {type: slurm}\n",
    "a partition's name is missing": _slurm("partitions: [{name: a}, {}]"),
    "partitions of one name": _slurm("partitions: [{name: a}, {name: a}]"),
    "a time that YAML reads as a number": _slurm("partitions: [{name: a, time_limit: 8:00:00}]"),
    "a time of another form": _slurm("partitions: [{name: a, time_limit: 2h}]"),
    "a GRES with a count": _slurm("partitions: [{name: a, gres: 'gpu:h100:4'}]"),
    "a work_dir that is relative": _slurm("partitions: [{name: a}], work_dir: runs"),
    "a container of another kind": _slurm("partitions: [{name: a}], container: {runtime: docker, image: x}"),
    "a container without an image": _slurm("partitions: [{name: a}], container: {runtime: pyxis}"),
    "a directive that is reserved": _slurm("partitions: [{name: a}], sbatch: {output: x}"),
    "a partition's directive that is reserved": _slurm("partitions: [{name: a, sbatch: {qos: x}}]"),
    "a directive of two lines": _slurm('partitions: [{name: a}], sbatch: {account: "a\\nrm x"}'),
    "a directive in capitals": _slurm("partitions: [{name: a}], sbatch: {Account: a}"),
    "a partition that is not there": _slurm("partitions: [{name: gone}]"),
    "a replica larger than a node": _slurm("partitions: [{name: gpu}]").replace("/m}", "/m, tensor_parallel_size: 7}"),
    "several at once": "models: [{name: m}]\nproxy: {port: -1, host: 5}\ncluster: {nam: x}\n",
    "a variable that is not set": "models: [{name: m, model_path: '${NOT_SET_HERE}/m'}]\n",
    "a list that does not end": "models: [\n",
    "a tab": "models:\n\t- name: m\n",
    "a list": "- a\n",
    "a word": "models\n",
    "nothing": "",
    "vllm: an option that is ours": _model("engine_args: [--port=1]"),
    "vllm: a key on the command line": _model("engine_args: [--api_key, secret]"),
    "llama_cpp: an unknown option": _model("engine: llama_cpp, engine_args: [--mlock]"),
    "llama_cpp: a value is missing": _model("engine: llama_cpp, engine_args: [--threads]"),
    "llama_cpp: a value out of range": _model("engine: llama_cpp, engine_args: [--max-num-seqs, '999']"),
    "command: arguments apart": _model("engine: command, command: [x, '{port}'], engine_args: [--fast]"),
    "command: a shutdown when idle": _model("engine: command, command: [x, '{port}'], idle_shutdown_minutes: 5"),
}


def bad_configurations() -> Files:
    """What `start --dry-run` says to each: everything is checked before it would start something."""
    told = {}
    with machine() as folder:
        path = folder / "config.yaml"
        for name, text in BAD.items():
            path.write_text(text)
            code, _, message = run(folder, "start", "--dry-run", "--config", str(path))
            told[name] = {"yaml": text, "exit_code": code, "message": message}
        path.write_bytes(b"\xff\x00\xfe")
        for name, where in (("not text", path), ("a directory", folder), ("a missing file", folder / "gone.yaml")):
            code, _, message = run(folder, "start", "--dry-run", "--config", str(where))
            told[name] = {"yaml": None, "exit_code": code, "message": message}
    return {"bad_configurations.json": as_json(told)}


# --- Job scripts. ----------------------------------------------------------------------------------------------------

GPU = {"name": "gpu"}
SIXTEEN = {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}
COMMAND = {"engine": "command", "command": ["serve it", "--port", "{port}", "--name", "{name}"]}
OWN_TEMPLATE = """\
{% extends "vllm.sbatch.j2" %}
{% block setup %}
{{ super() | shell }}echo {{ model.name }} in {{ partition }} of {{ deployment }}: {{ nodes }} × {{ gpus }}
{% endblock %}
{% block environment %}
{{ super() | shell }}export NOTE={{ "it's $HOME" }}
{% endblock %}
"""
# Name → keys of cluster.slurm, keys of the model besides its name and path, keys of the cluster.
JOBS: Mapping[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({"partitions": [GPU]}, {}, {}),
    "directives": (
        {
            "partitions": [{**GPU, "sbatch": {"constraint": "h100&nvlink", "mem": "0", "signal": None}}],
            "sbatch": {"account": "abc", "cpus-per-task": 8, "requeue": None, "mem": "64G", "exclude": "n[7-9]"},
        },
        {},
        {},
    ),
    "time_limit_and_qos": (
        {"default_qos": "normal", "partitions": [{**GPU, "time_limit": "2-00:00:00", "qos": "fast"}]},
        {},
        {},
    ),
    "two_partitions": (
        {
            "default_qos": "normal",
            "partitions": [{"name": "low", "gpus_per_node": 4}, {**GPU, "priority": 9, "gres": "gpu:h100"}],
        },
        {"replicas": 5, "tensor_parallel_size": 4},
        {},
    ),
    "exclusive": ({"partitions": [{**GPU, "exclusive": True}]}, {"replicas": 3, "tensor_parallel_size": 2}, {}),
    "setup": ({"partitions": [GPU], "setup": ["module load cuda", 'export HF_HOME="$HOME/it\'s"']}, {}, {}),
    "apptainer": (
        {"partitions": [GPU], "container": {"runtime": "apptainer", "image": "/images/v$llm.sif"}},
        {"tensor_parallel_size": 2},
        {},
    ),
    "pyxis": ({"partitions": [GPU], "container": {"runtime": "pyxis", "image": "vllm/vllm-openai"}}, {}, {}),
    "multi_node": ({"partitions": [{**GPU, "time_limit": "8:00:00"}]}, SIXTEEN, {}),
    "multi_node_apptainer": (
        {"partitions": [GPU], "container": {"runtime": "apptainer", "image": "v.sif"}, "setup": ["module load mpi"]},
        SIXTEEN,
        {},
    ),
    "command": ({"partitions": [GPU], "sbatch": {"hint": "nomultithread"}}, COMMAND, {"tunnel": "node"}),
    "llama_cpp": ({"partitions": [GPU]}, {"engine": "llama_cpp", "engine_args": ["--threads", "3"]}, {}),
    "own_template": ({"partitions": [GPU], "setup": ["module load cuda"], "template": "mine.j2"}, {}, {}),
}


def job_script(
    slurm: dict[str, Any],
    model: dict[str, Any],
    cluster: dict[str, Any],
    run: Callable[..., tuple[int, str, str]] = run,
) -> str:
    """What `start --dry-run` prints of a configuration."""
    with machine() as folder:
        (folder / "mine.j2").write_text(OWN_TEMPLATE)
        (folder / "m.gguf").touch()
        path = str(folder / "m.gguf") if model.get("engine") == "llama_cpp" else "org/m"
        told = {"work_dir": str(folder / "work"), **slurm}
        if "template" in slurm:
            told["template"] = str(folder / slurm["template"])
        document = {
            "models": [{"name": "m", "model_path": path, **model}],
            "cluster": {"type": "slurm", "name": "frozen", "slurm": told, **cluster},
        }
        (folder / "config.yaml").write_text(json.dumps(document))
        code, out, err = run(folder, "start", "--dry-run", "--config", str(folder / "config.yaml"))
    assert code == 0, err
    text = re.sub(r"FOLDER/work/programs/[^/ ]+/[^/ ]+", "PROGRAM", out)
    return re.sub(r"(?m)^(# Made by Agent Infra) [^;]+;", r"\1 VERSION;", text)


def job_scripts() -> Files:
    return {f"{name}.sbatch": job_script(*keys) for name, keys in JOBS.items()}


# --- What is read of a proxy. ----------------------------------------------------------------------------------------


def metrics() -> Files:
    """Family → its type and the labels of its samples."""
    stats = json.loads((ROOT / "tests" / "golden" / "stats.json").read_text())
    record = TurnRecord(
        turn="t", finished_at=1.0, outcome="completed", status=200, model="m", backend="m-1", retries=1,
        pre_ms=1.0, queue_ms=1.0, ttft_ms=1.0, inference_ms=1.0, unaccounted_ms=1.0, post_ms=1.0, prompt_tokens=9,
        cached_tokens=4, completion_tokens=1, expected_cached_tokens=8, cache_miss="evicted from m-1",
    )  # fmt: skip
    turns = TurnMetrics()
    turns.add(record)
    text = metrics_text(turns, StatsMetrics(stats, {ReplicaUse("m-1", "m", "H100", 2, "ready_busy"): 50.0})).decode()
    told = {
        family.name: {
            "type": family.type,
            "samples": {sample.name: ", ".join(sorted(sample.labels)) for sample in family.samples},
        }
        for family in text_string_to_metric_families(text)
    }
    return {"metrics.json": as_json(dict(sorted(told.items())))}


KINDS = {
    type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"
}  # fmt: skip


def kinds(value: Any, path: str = "$") -> Iterator[tuple[str, str]]:
    """(path, type) of everything in a JSON document; a list's entries share one path."""
    yield path, KINDS[type(value)]
    if isinstance(value, dict):
        for key, item in value.items():
            yield from kinds(item, f"{path}.{key}" if re.fullmatch(r"[a-z_][a-z0-9_]*", key) else f"{path}.*")
    elif isinstance(value, list):
        for item in value:
            yield from kinds(item, f"{path}[]")


def shape(*documents: Any) -> dict[str, str]:
    """Path → the types found there."""
    found: dict[str, set[str]] = {}
    for document in documents:
        for path, kind in kinds(json.loads(json.dumps(document))):
            found.setdefault(path, set()).add(kind)
    return {path: " | ".join(sorted(types)) for path, types in sorted(found.items())}


def stats_shape() -> Files:
    """The shape of /stats with its analysis, of fleets with room, at their limit, and of one hardly used."""
    documents = [simulated.document(*told) for told in ((60, 4, 20.0), (60, 1, 2.0), (3, 2, 3.0, 100.0))]
    [version] = {document["schema_version"] for document in documents}
    return {"stats.json": as_json({"schema_version": version, "shape": shape(*documents)})}


# --- What is on disk. ------------------------------------------------------------------------------------------------


def history_schema() -> Files:
    """What a new history.db is made of."""
    with machine() as folder:
        HistoryFile(folder / "history.db").close()
        with contextlib.closing(sqlite3.connect(folder / "history.db")) as file:
            rows = file.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
            names = ("user_version", "application_id")
            told = {name: file.execute(f"PRAGMA {name}").fetchone()[0] for name in names}
            told["about"] = sorted(name for (name,) in file.execute("SELECT name FROM about"))
    return {"history.json": as_json({**told, "schema": sorted(" ".join(sql.split()) for (sql,) in rows)})}


def told_fields(kind: type) -> dict[str, Any]:
    """The fields that must be there, and what the others are where they are left out."""
    fields = dataclasses.fields(kind)
    required = [item.name for item in fields if item.default is dataclasses.MISSING]
    return {"required": required, "defaults": {item.name: item.default for item in fields if item.name not in required}}


def records() -> Files:
    """The fields of what processes of two versions leave for each other."""
    fields = {kind.__name__: told_fields(kind) for kind in (ReplicaRecord, ServeSpec, Succession)}
    return {"records.json": as_json(fields)}


# --- All of it. ------------------------------------------------------------------------------------------------------

PARTS: tuple[Callable[[], Files], ...] = (
    command_line,
    refusals,
    bad_configurations,
    job_scripts,
    metrics,
    stats_shape,
    history_schema,
    records,
)


def write_frozen() -> None:
    """Write the folder anew."""
    for path in FROZEN.iterdir():
        path.unlink()
    for part in PARTS:
        for name, text in part().items():
            (FROZEN / name).write_text(text, encoding="utf-8")


# --- A deployment of 0.1.0. ------------------------------------------------------------------------------------------


def take_turn(app: Program, session: str, words: str, **fields: Any) -> None:
    """A turn of a session, whatever comes of it."""
    body = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": words}], **fields}
    headers = {"Content-Type": "application/json", "X-Session-ID": session, "X-Task-ID": "task-1"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{app.port}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        answer.read()


def keep_state(app: Program, state: Path) -> None:
    """Copy the text files of a deployment that runs, with placeholders for folder and machine."""
    for source in sorted((app.state / "agent-infra").rglob("*")):
        if source.is_file() and ".db" not in source.name:
            target = state / source.relative_to(app.state)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8").replace(str(app.folder), FOLDER)
            text = text.replace(os.uname().nodename, HOST).replace(str(ROOT), FOLDER)
            target.write_text(text.replace(sys.executable, f"{FOLDER}/python"), encoding="utf-8")


HANDOVER = """
import dataclasses, json, agent_infra
succession = agent_infra.Succession("7", "m-2", True, 2, "waits for its job", 1795913640.0)
print(json.dumps({"m-1": dataclasses.asdict(succession)}))
"""


def write_former() -> None:
    """Run a deployment of 0.1.0, take some turns, and keep what it wrote: as it ran, and its history."""
    with tempfile.TemporaryDirectory(prefix="former-") as name, program(Path(name)) as app:
        (app.folder / "program").mkdir()
        app.module = unpack_former(app.folder / "program")
        shutil.copy(ROOT / "tests" / "fake_engine.py", app.folder)
        shutil.copy(ROOT / "tests" / "patience.py", app.folder)
        command = [sys.executable, str(app.folder / "fake_engine.py"), "--port", "{port}"]
        model = {"name": "m", "model_path": "none", "engine": "command", "command": command, "base_port": app.port + 1}
        app.configure(models=[model], name="former")
        for words in (("start",), ("connect", "--background")):
            done = app.run(*words)
            assert done.returncode == 0, done.stderr
        wait_for(lambda: app.get("/health")["models"]["m"]["ready"], "the replica in the proxy")
        for number in range(3):
            take_turn(app, "one", f"Step {number}", stream=True)
            take_turn(app, "two", f"Look at it again ({number})")
        take_turn(app, "two", "Who are you?", fake={"status": 400})
        wait_for(lambda: app.get("/stats")["history"]["turns"] == 7, "the turns in the history")
        shutil.rmtree(FORMER / "state", ignore_errors=True)
        keep_state(app, FORMER / "state")
        assert app.run("stop").returncode == 0
        shutil.copyfile(*(folder / "agent-infra/former/history.db" for folder in (app.state, FORMER / "state")))
        environment = {**os.environ, "PYTHONPATH": str(app.module.parent)}
        made = subprocess.run(
            [sys.executable, "-c", HANDOVER], env=environment, cwd=name, stdout=subprocess.PIPE, check=True, text=True
        )
        (FORMER / "handover.json").write_text(made.stdout)


if __name__ == "__main__":
    if sys.argv[1:] == ["--former"]:
        write_former()
    else:
        write_frozen()
