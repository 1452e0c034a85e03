"""The proxy in a job of its own, seen from outside: what is submitted, where it is found, how it ends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from slurm_stand_in import CONFIG, JOB, PENDING, RUN, SLURM, StandIn, make_job

from agent_infra import parse_config, render_proxy_job
from agent_infra_core import __version__
from agent_infra_core.control.lock import DeploymentLock
from agent_infra_core.control.proxy_job import ProxyJob, ServedProxy, explain_end, job_host
from agent_infra_core.errors import AgentInfraError, ConfigError, RefusedError
from agent_infra_core.fleet.directives import proxy_directives
from agent_infra_core.fleet.doctor import CHECKS
from agent_infra_core.fleet.parse import JobEnd, SlurmJob
from agent_infra_core.fleet.slurm_host import SlurmHost
from agent_infra_core.fleet.state import deployment_paths
from agent_infra_core.host import CommandResult, process_stamp
from agent_infra_core.settings import ProxyJobConfig, SshConfig

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def host(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.fixture
def job(host: StandIn) -> ProxyJob:
    return make_job(host, CONFIG.cluster)


@pytest.fixture
def served(host: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedProxy]:
    """The proxy of job 7 on n1, which has told where it is."""
    monkeypatch.setenv("AGENT_INFRA_ADDRESS", "10.0.0.5")
    environment = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
    made = ServedProxy(str(host.folder), environment, "k" * 40, ("0.0.0.0", 5800))
    yield made
    made.close()


# --- What is submitted. ----------------------------------------------------------------------------------------------


def test_the_script_of_the_proxys_job() -> None:
    own = ProxyJobConfig(partition="cpu", time_limit="2-00:00:00", sbatch={"nice": 10, "requeue": None})
    slurm = dataclasses.replace(SLURM, constraint="a100", default_qos="gpus", sbatch={"mem": 0}, proxy_job=own)
    script = render_proxy_job(
        {
            "directives": proxy_directives("d", slurm, RUN, "/home/me/.local/state/agent-infra/d/run/logs/proxy.log"),
            "run_dir": RUN,
            "replicas": ("proxy",),
            "setup": ["module load python"],
            "state": "/home/me/.local/state/agent-infra/d",
            "state_home": "/home/me/.local/state",
            "is_far": False,
            "python": "/opt/my env/bin/python",
            "program": "/home/me/agent_infra.py",
            "words": ["proxy-job", "--name", "d"],
        }
    )
    assert script.replace(__version__, "VERSION") == (GOLDEN / "proxy.sbatch").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=PATIENCE_S)


def test_it_has_the_program_the_state_directory_and_no_secret(job: ProxyJob, host: StandIn) -> None:
    job.submit(CONFIG, "--log-format", "json")
    [script] = host.submitted
    assert f"export XDG_STATE_HOME={os.environ['XDG_STATE_HOME']}\n" in script
    assert script.rstrip().endswith("agent_infra.py proxy-job --name d --log-format json")
    assert "k" * 40 not in script


def test_behind_a_login_host_it_gets_program_configuration_and_key_there(host: StandIn) -> None:
    cluster = dataclasses.replace(CONFIG.cluster, ssh=SshConfig("login"), tunnel="node")
    job = make_job(host, cluster)
    assert job.submit(dataclasses.replace(CONFIG, cluster=cluster))
    program = f"/w/programs/{hashlib.sha256(b'the program').hexdigest()[:16]}/agent_infra.pyz"
    assert host.written[program] == b"the program"
    config = json.loads(host.written["/w/d/agent-infra/d/config.json"])
    assert (config["cluster"]["ssh"], config["cluster"]["tunnel"]) == (None, "auto")  # there, the cluster is here
    assert config["proxy"]["require_key"]  # sshd connects as its user, who would need none
    key = deployment_paths("d", os.environ).client_key.read_text().strip()
    assert host.written["/w/d/agent-infra/d/api_key"].decode() == key
    [script] = host.submitted
    assert key not in script
    assert f"--output={RUN}/logs/proxy.log\n" in script
    assert "export XDG_STATE_HOME=/w/d\n" in script
    assert f"mkdir -p /w/d/agent-infra/d && ln -sfn {RUN} /w/d/agent-infra/d/run\n" in script
    assert script.rstrip().endswith(f'exec "$python" {program} proxy-job --name d')
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=PATIENCE_S)


def test_there_is_never_a_second_one(job: ProxyJob, host: StandIn) -> None:
    job.submit(CONFIG)
    assert not job.submit(CONFIG)
    assert len(host.submitted) == 1
    host.jobs = [dataclasses.replace(PENDING, name="agent-infra:other:proxy"), dataclasses.replace(JOB, work_dir="/x")]
    job.submit(CONFIG)
    assert len(host.submitted) == 2


def test_one_of_which_sbatch_did_not_tell_the_number_is_found_by_its_name(job: ProxyJob, host: StandIn) -> None:
    host.said = CommandResult(1, b"sbatch: error: Batch job submission failed: Socket timed out on send/recv", b"")
    job.submit(CONFIG)
    assert len(host.submitted) == 1


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("No partition specified or system default partition", "proxy_job.partition to one that takes jobs without"),
        ("invalid partition specified: x", "proxy_job.partition to one that takes jobs without"),
        ("jobs in gpu must ask for a GPU", "proxy_job.partition to one that takes jobs without"),
        ("Invalid qos specification", "correct cluster.slurm.proxy_job.qos"),
        ("Requested time limit is invalid", "lower cluster.slurm.proxy_job.time_limit"),
        ("Requested node configuration is not available", "lower cpus or memory of cluster.slurm.proxy_job"),
    ],
)
def test_what_slurm_refuses_has_what_to_do(job: ProxyJob, host: StandIn, said: str, hint: str) -> None:
    host.said, host.accepts = CommandResult(1, f"sbatch: error: {said}\n".encode(), b""), None
    with pytest.raises(RefusedError, match=f"Slurm refused: {said}; .*{hint}"):
        job.submit(CONFIG)


def test_none_is_submitted_beside_a_process_that_runs_the_proxy(job: ProxyJob, host: StandIn) -> None:
    lock = DeploymentLock(deployment_paths("d", os.environ).lock)
    lock.acquire("connect")
    try:
        with pytest.raises(RefusedError, match="already run by `connect`"):
            job.submit(CONFIG)
    finally:
        lock.release()
    assert host.submitted == []


def test_doctor_tests_the_job_before_anything_is_submitted(job: ProxyJob, host: StandIn) -> None:
    host.said, host.accepts = CommandResult(0, b"", b"sbatch: Job 9 to start at 2026-11-29T12:00:00 on n1"), None
    paths = deployment_paths("d", os.environ)
    examined: Any = types.SimpleNamespace(config=CONFIG, cluster=job._cluster, planned_job=job, login=None, paths=paths)
    checks = {check.name: check.run for check in CHECKS if "slurm" in check.clusters}
    assert [finding.text for finding in checks["proxy port"](examined)] == [
        "5800 of the node that the proxy's job runs on"
    ]
    assert [finding.text for finding in checks["submission"](examined)][-1].startswith("the proxy: Job 9 to start")
    assert "--job-name=agent-infra:d:proxy" in host.submitted[-1]
    assert host.jobs == []


@pytest.mark.parametrize(("configured", "host"), [("127.0.0.1", "0.0.0.0"), ("::1", "0.0.0.0"), ("10.0.0.5",) * 2])
def test_the_proxy_in_a_job_never_listens_on_loopback_alone(configured: str, host: str) -> None:
    assert job_host(configured) == host


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ("slurm: {proxy: there, partitions: [{name: a}]}", "cluster.slurm.proxy: found"),
        ("slurm: {partitions: [{name: a}], proxy_job: {sbatch: {time: 5}}}", "proxy_job.sbatch.time: is set by this"),
    ],
)
def test_configurations_that_cannot_work_are_refused(cluster: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(f"{{cluster: {{type: slurm, {cluster}}}, models: [{{name: m, model_path: o/m}}]}}", {})


# --- Where it is. ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("served")
def test_it_is_found_once_it_serves(job: ProxyJob, host: StandIn) -> None:
    host.jobs = [JOB]
    found, trouble = job.find()
    assert trouble is None
    assert found == {"job": "7", "node": "n1", "host": "10.0.0.5", "port": 5800, "pid": os.getpid()}
    shown: list[Any] = []
    assert job.wait(shown.extend, lambda: False) == found
    assert [(each.replica, each.state, each.node) for each in shown] == [("proxy", "starting", "n1")]


@pytest.mark.parametrize(
    ("jobs", "trouble"),
    [
        ([], "no proxy is running; `connect` starts one"),
        ([PENDING], "the proxy does not serve: its job 7 is PENDING (Priority)"),
        # Requeued to another node, where it hasn't written yet; and the next job after that one.
        ([dataclasses.replace(JOB, node="n2")], "the proxy does not serve: its job 7 is RUNNING"),
        ([dataclasses.replace(JOB, id="8")], "the proxy does not serve: its job 8 is RUNNING"),
        ([dataclasses.replace(JOB, id="6", state="COMPLETED")], "no proxy is running; `connect` starts one"),
    ],
)
@pytest.mark.usefixtures("served")
def test_it_is_not_found_where_it_no_longer_is(
    job: ProxyJob, host: StandIn, jobs: list[SlurmJob], trouble: str
) -> None:
    host.jobs = jobs
    assert job.find() == (None, trouble)


def test_it_is_not_found_any_more_while_it_ends(job: ProxyJob, host: StandIn, served: ServedProxy) -> None:
    host.jobs = [JOB]
    served.drain()
    assert job.find() == (None, "the proxy does not serve: its job 7 is RUNNING")
    assert job.look()[1] is not None  # a tunnel to it stays, for its turns in flight
    served.close()
    assert job.look() == (JOB, None)


@pytest.mark.usefixtures("served")
def test_behind_a_login_host_it_is_found_where_a_tunnel_to_it_begins(host: StandIn) -> None:
    job = make_job(host, dataclasses.replace(CONFIG.cluster, ssh=SshConfig("login")))
    host.jobs = [JOB]
    told = "the proxy serves in job 7 on n1, but no tunnel leads there from this machine; `connect` opens one"
    assert job.find() == (None, told)
    link = {"pid": os.getpid(), "process": process_stamp(os.getpid()), "host": "127.0.0.1", "port": 5801}
    deployment_paths("d", os.environ).link_record.write_text(json.dumps(link))
    assert job.find() == ({"job": "7", "node": "n1", "host": "127.0.0.1", "port": 5801, "pid": os.getpid()}, None)


def test_what_it_has_noted_behind_a_login_host_is_known_here(host: StandIn) -> None:
    job = make_job(host, dataclasses.replace(CONFIG.cluster, ssh=SshConfig("login")))
    paths = deployment_paths("d", os.environ)
    host.jobs, host.noted = [JOB], '@wanted.json@{"m": 3}@handover.json@{"m-1": {}}'
    job._cluster.replicas()
    job.fetch_state()
    assert (paths.wanted.read_text(), paths.handover.read_text()) == ('{"m": 3}', '{"m-1": {}}')
    host.noted = "@wanted.json@@handover.json@"  # none yet; the last handover is over
    job.fetch_state()
    assert (paths.wanted.read_text(), paths.handover.exists()) == ('{"m": 3}', False)
    job.share(paths.wanted, '{"m": 4}')
    assert host.written["/w/d/agent-infra/d/wanted.json"] == b'{"m": 4}'


@pytest.mark.usefixtures("served")
def test_while_slurm_is_silent_nothing_is_said_of_it(job: ProxyJob, host: StandIn) -> None:
    host.is_silent = True
    assert job.find() == (None, None)


def test_one_that_served_and_ended_says_why(job: ProxyJob, host: StandIn, served: ServedProxy) -> None:
    host.jobs = [dataclasses.replace(JOB, state="TIMEOUT")]
    host.end = "JobId=7 JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15"
    served.close()
    found, trouble = job.find()
    assert found is None
    assert trouble is not None
    assert trouble.startswith("no proxy is running: the proxy's job 7 ended: timed_out: its job reached its walltime")
    assert "(Slurm: TIMEOUT, TimeLimit); raise cluster.slurm.proxy_job.time_limit; `connect` starts" in trouble
    with pytest.raises(AgentInfraError, match=r"timed_out: .* \(`logs proxy` has its log"):
        job.wait(lambda _: None, lambda: False)


@pytest.mark.parametrize(
    ("end", "said", "told"),
    [
        (None, "", "is no longer known to Slurm"),
        (JobEnd("FAILED", 2), "error: the proxy cannot listen on x", "the proxy's job 7 failed: the proxy cannot"),
        (JobEnd("FAILED", 127), "x: not found", "failed: it ended with exit code 127; its log ends with: x: not found"),
        (JobEnd("FAILED", -53), "", "failed: its node doesn't see the state directory (XDG_STATE_HOME)"),
        (JobEnd("COMPLETED", 0), "any", "ended in order, before its walltime or by a signal"),
        (JobEnd("CANCELLED", 0, "by 0"), "", "unknown: its job was cancelled (Slurm: CANCELLED, by 0); somebody ran"),
        (JobEnd("OUT_OF_MEMORY", 125), "", "(Slurm: OUT_OF_MEMORY); raise cluster.slurm.proxy_job.memory"),
    ],
)
def test_an_end_is_explained(end: JobEnd | None, said: str, told: str) -> None:
    assert told in explain_end("7", end, said)


# --- How it ends. ----------------------------------------------------------------------------------------------------


def test_stop_ends_it_wherever_it_is(job: ProxyJob, host: StandIn, served: ServedProxy) -> None:
    assert job.stop(now=False) == []
    served.drain()
    host.jobs = [JOB]
    job._cluster.replicas()
    assert job.stop(now=False) == ["proxy (job 7)"]
    assert host.cancelled == ["scancel --state=PENDING 7; scancel --state=RUNNING --batch --signal=TERM 7"]
    assert list(host.folder.glob("replicas/*")) == []


@pytest.mark.parametrize("now", [True, False])
def test_turns_in_flight_are_cut_only_on_request(
    job: ProxyJob, host: StandIn, monkeypatch: pytest.MonkeyPatch, now: bool
) -> None:
    """A second TERM cuts them. The request may come while they end."""
    asked: list[Sequence[str]] = []

    def cancel(_: SlurmHost, jobs: Sequence[str], now: bool, signal: str) -> None:
        asked.append(jobs)
        job.is_urgent = True
        host.jobs = host.jobs if len(asked) < 3 else []

    monkeypatch.setattr(SlurmHost, "cancel", cancel)
    host.jobs = [JOB]
    assert job.stop(now) == ["proxy (job 7)"]
    assert asked == [["7"]] * 3


@pytest.mark.usefixtures("served")
def test_the_record_is_private(host: StandIn) -> None:
    path = host.folder / "replicas" / "proxy.json"
    assert path.stat().st_mode & 0o077 == 0
    assert json.loads(path.read_text())["port"] == 5800
