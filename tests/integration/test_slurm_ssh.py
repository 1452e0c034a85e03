"""A whole cluster that is not here, driven through SSH alone: login and compute nodes in namespaces of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, AuthenticationError, OpenAI
from patience import PATIENCE_S
from program import Program, is_listening, wait_for
from testbed.namespaces import FarCluster, missing_parts
from testbed.ports import free_port
from testbed.sshd import SshServer, public_key
from weights import packaged_gguf

from agent_infra import load_config
from agent_infra_core.settings import PACKAGED_MODEL, SshConfig


@pytest.fixture(scope="module")
def far() -> Iterator[FarCluster]:
    if missing := missing_parts():
        pytest.skip(f"a cluster in namespaces needs {', '.join(missing)} (tests/run.sh installs what is missing)")
    with FarCluster() as made:
        yield made


@pytest.fixture
def run(far: FarCluster, tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    # None of the user's keys and known hosts, but the weights that were fetched already.
    made.environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(packaged_gguf().parents[2])}
    yield made
    for pid, _ in made.processes():  # what a test that failed has left
        os.kill(pid, signal.SIGKILL)
    for each in made.running:
        each.close()
    far.slurm.run("scancel", "--user=root")
    wait_for(lambda: not far.slurm.jobs(), "an empty queue")


def configure(run: Program, far: FarCluster, replicas: int, ssh: dict[str, Any] | None = None, **cluster: Any) -> None:
    """Write the configuration: the embedded engine, two replicas a node at most, of two partitions a node each."""
    slurm = {
        "work_dir": str(far.folder / "work"),
        "partitions": [{"name": "only0", "priority": 2, "time_limit": "30"}, {"name": "only1", "time_limit": "30"}],
        "setup": [f"export AGENT_INFRA_PYTHON={sys.executable}"],
    }
    login = far.ssh()
    reached = {name: value for name, value in vars(login).items() if value is not None} if ssh is None else ssh
    document = {
        "proxy": {"port": run.port, "health_check_interval": 2},
        "cluster": {"type": "slurm", "name": "far", "poll_interval": 1, "ssh": reached, "slurm": slurm, **cluster},
        "models": [
            {
                "name": "smollm2",
                "model_path": PACKAGED_MODEL,
                "engine": "llama_cpp",
                "replicas": replicas,
                "engine_args": ["--threads", "1", "--max-num-seqs", "4"],
                "base_port": free_port(),
            }
        ],
    }
    run.config.write_text(json.dumps(document))


def backends(run: Program) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = run.get("/stats")["backends"]
    return rows


def all_up(run: Program, count: int) -> bool:
    rows = backends(run)
    return len(rows) == count and all(row["tunnel"] and row["tunnel"]["state"] == "up" for row in rows)


def reconnects(run: Program) -> int:
    return sum(row["tunnel"]["reconnects"] for row in backends(run) if row["tunnel"])


def client(run: Program, timeout: float = 90.0) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{run.port}/v1", api_key="unused", max_retries=0, timeout=timeout)


def ask(talker: OpenAI, content: str, tokens: int = 8) -> str:
    answer = talker.chat.completions.create(
        model="smollm2", temperature=0, max_tokens=tokens, messages=[{"role": "user", "content": content}]
    )
    return answer.choices[0].message.content or ""


def test_everything_an_operator_does_goes_through_the_login_node(run: Program, far: FarCluster) -> None:
    configure(run, far, replicas=3)
    assert_doctor_and_pull_reach_the_nodes(run, far)
    started = run.run("start")
    assert started.returncode == 0, started.stdout + started.stderr
    connected = run.spawn("connect")
    connected.wait_line(r"^proxy ")
    connected.wait_line(r"^tunnel login: the login host reaches the nodes")
    connected.wait_line(r"^driver sshtunnel: ")
    wait_for(lambda: all_up(run, 3), "three tunnels are up")
    placed = {(row["partition"], row["node"]) for row in backends(run)}
    assert placed == {("only0", far.nodes[0]), ("only1", far.nodes[1])}
    talker = client(run)
    assert ask(talker, "What is the capital of France?")
    stream = talker.chat.completions.create(
        model="smollm2", max_tokens=8, stream=True, messages=[{"role": "user", "content": "Count."}]
    )
    assert [choice.finish_reason for event in stream for choice in event.choices][-1] in ("stop", "length")
    assert_no_key_shows(run, far)
    assert_strangers_are_refused(run, far)
    assert_scale_goes_up_and_down_under_load(run, far)
    assert_stop_leaves_nothing(run, far)
    connected.process.wait(PATIENCE_S)


def assert_doctor_and_pull_reach_the_nodes(run: Program, far: FarCluster) -> None:
    """What is known before anything is started: of the login host, of Slurm, and by a job of a node."""
    done = run.run("doctor", "--job", "--json")
    findings = json.loads(done.stdout)
    assert [each for each in findings if each["level"] == "error"] == []
    assert done.returncode == 0, done.stderr
    said = [f"{each['check']}: {each['text']}" for each in findings]
    assert "login host: login, over SSH" in said
    assert "partitions: only0: 1 nodes" in said
    assert "partitions: only1: 1 nodes" in said
    # The job runs in the preferred partition.
    assert any(re.match(rf"node: model smollm2 on {far.nodes[0]}: work_dir is shared, Python 3", line) for line in said)
    assert any(
        re.match(rf"node: model smollm2 on {far.nodes[0]}: reached from here; tunnel (login|node): ", x) for x in said
    )
    pulled = run.run("pull")
    assert pulled.returncode == 0, pulled.stderr
    there = far.folder / "work" / "models" / packaged_gguf().name
    assert str(there) in pulled.stdout
    assert there.stat().st_size == packaged_gguf().stat().st_size
    wait_for(lambda: far.slurm.jobs() == [], "doctor's job is gone")


def assert_scale_goes_up_and_down_under_load(run: Program, far: FarCluster) -> None:
    """Tunnels come and go with the replicas, and none of four agents loses a turn."""
    agents = Agents(run, count=4)
    try:
        up = run.run("scale", "smollm2", "4")
        assert up.returncode == 0, up.stdout + up.stderr
        wait_for(lambda: all_up(run, 4), "the fourth tunnel is up")
        wait_for(lambda: all(row["requests"] for row in backends(run)), "turns on all four")
        down = run.run("scale", "smollm2", "2")
        assert down.returncode == 0, down.stdout + down.stderr
        assert len(far.slurm.jobs()) == 2
        wait_for(lambda: all_up(run, 2), "two tunnels are left")
        agents.settle()
    finally:
        agents.end()
    assert agents.errors == [], "\n".join(agents.errors)


def assert_stop_leaves_nothing(run: Program, far: FarCluster) -> None:
    """No job, no process here, no port, no SSH session."""
    stopped = run.run("stop")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert far.slurm.jobs() == []
    wait_for(lambda: run.processes() == [], "no process is left here")
    assert not is_listening(run.port)
    wait_for(lambda: far.sshds["login"].sessions() == [], "no SSH session is left")


def assert_no_key_shows(run: Program, far: FarCluster) -> None:
    """Neither the scheduler, nor a process list, nor a log holds a key."""
    work = far.folder / "work" / "far"
    keys = [path.read_text().strip() for path in (work / "replica_key", run.state / "agent-infra" / "far" / "api_key")]
    assert all(len(key) > 20 for key in keys)
    seen = far.slurm.run("squeue", "-o", "%all") + far.slurm.run("scontrol", "show", "job", "-o")
    for job in far.slurm.run("squeue", "-h", "-o", "%A").split():
        seen += far.slurm.run("scontrol", "write", "batch_script", job, "-")
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                seen += (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
    for path in [*work.rglob("*.log"), *run.state.rglob("*.log"), *work.rglob("*.out")]:
        seen += path.read_text(errors="replace")
    assert not [key for key in keys if key in seen]
    secret = [path for path in (work / "replica_key", *work.rglob("*.json")) if path.stat().st_mode & 0o077]
    assert secret == []


def assert_strangers_are_refused(run: Program, far: FarCluster) -> None:
    """Another user of a node gets nothing but 401 (and whether it lives) from the engine on it."""
    record = json.loads(next((far.folder / "work" / "far").glob("run/replicas/*.json")).read_text())
    program = (
        "import http.client, sys\n"
        "for word in sys.argv[2:]:\n"
        "    method, path = word.split(':', 1)\n"
        "    c = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]), timeout=10)\n"
        "    c.request(method, path, b'{}' if method == 'POST' else None, {'Content-Type': 'application/json'})\n"
        "    print(path, c.getresponse().status)\n"
    )
    paths = ["POST:/v1/chat/completions", "POST:/v1/completions", "POST:/completion", "POST:/infill", "POST:/tokenize"]
    paths += ["POST:/invocations", "POST:/v1/embeddings", "GET:/metrics", "GET:/slots", "GET:/props"]
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", program]
    for port, asked in ((record["port"], paths), (record["telemetry_port"], ["GET:/load"])):
        said = far.run_on(record["node"], *words, str(port), *asked).stdout
        answers = dict(line.split() for line in said.splitlines())
        assert len(answers) == len(asked)
        assert set(answers.values()) <= {"401", "404"}, answers
        assert sum(status == "401" for status in answers.values()) >= min(3, len(asked)), answers


def test_a_deployment_is_reached_by_openssh_through_a_jump_host(run: Program, far: FarCluster, tmp_path: Path) -> None:
    with SshServer(tmp_path / "jump") as jump:
        login = far.sshds["login"]
        known, config = tmp_path / "known", tmp_path / "ssh_config"
        known.write_text(jump.known_hosts.read_text() + f"{far.login_address} {public_key(login.host_keys[0])}\n")
        config.write_text(
            f"Host jump\n  HostName 127.0.0.1\n  Port {jump.port}\n  IdentityFile {jump.client_key}\n"
            f"Host far\n  HostName {far.login_address}\n  ProxyJump jump\n"
            f"Host *\n  IdentityFile {login.client_key}\n  IdentitiesOnly yes\n  UserKnownHostsFile {known}\n"
        )
        ssh = {"host": "far", "config_file": str(config)}
        configure(run, far, replicas=2, ssh=ssh, tunnel="node")
        assert run.run("doctor").returncode == 0
        assert run.run("start").returncode == 0
        connected = run.spawn("connect")
        connected.wait_line(r"^driver openssh: .* says proxyjump for far")
        wait_for(lambda: all_up(run, 2), "two tunnels are up")
        assert {(row["tunnel"]["driver"], row["tunnel"]["mode"]) for row in backends(run)} == {("openssh", "node")}
        assert ask(client(run), "What is the capital of France?")
        # What else is asked of the deployment meanwhile goes over the same connection.
        logins = len(re.findall("Accepted publickey", login.log.read_text()))
        assert run.run("status").returncode == 0
        assert len(re.findall("Accepted publickey", login.log.read_text())) == logins
        assert_stop_leaves_nothing(run, far)
        connected.process.wait(PATIENCE_S)
        wait_for(lambda: jump.sessions() == [], "no SSH session is left")


class Agents:
    """Agents that talk without pause, each a thread; keeps whatever went wrong. Owns the threads."""

    def __init__(self, run: Program, count: int = 8) -> None:
        self._stop = threading.Event()
        self.errors: list[str] = []
        self.turns = dict.fromkeys(range(count), 0)
        self.phase = "at first"
        self._talker = client(run)
        self._threads = [threading.Thread(target=self._talk, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _talk(self, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            try:
                assert ask(self._talker, f"Agent {number}, turn {turn}: say a word.", 12)
                self.turns[number] += 1
            except (APIError, AssertionError) as error:
                self.errors.append(f"{time.strftime('%H:%M:%S')} {self.phase}: agent {number}, turn {turn}: {error!r}")

    def settle(self, seconds: float = 90.0) -> None:
        """Return when every agent has had a turn that began after now."""
        before = dict(self.turns)
        wait_for(
            lambda: all(self.turns[agent] >= before[agent] + 2 for agent in before) or self.errors,
            f"two more turns of each ({self.turns}, {before})",
            seconds,
        )

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)


def assert_broken_stream_says_so(run: Program, far: FarCluster) -> None:
    nodes = {row["id"]: row["node"] for row in backends(run)}
    stream = long_story(client(run))
    node = nodes[stream.response.headers["x-agent-infra-backend"]]
    with pytest.raises(APIError):
        for index, _ in enumerate(stream):
            if index == 2:
                far.sshds[node].cut_sessions()


def test_init_asks_the_slurm_behind_a_login_host(run: Program, far: FarCluster, tmp_path: Path) -> None:
    login = far.ssh()
    (tmp_path / ".ssh").mkdir(mode=0o700)
    (tmp_path / ".ssh" / "config").write_text(
        f"Host front\n  HostName {login.host}\n  Port {login.port or 22}\n  User {login.user or 'root'}\n"
        f"  IdentityFile {login.identity_file}\n  UserKnownHostsFile {login.known_hosts_file}\n"
    )
    run.config.unlink()
    done = run.run("init", "--ssh", "front")
    assert done.returncode == 0, done.stderr
    config = load_config(run.config)
    assert config.cluster.ssh == SshConfig("front")
    assert [each.name for each in config.cluster.slurm.partitions]
    assert config.models[0].name == ("qwen3-8b" if config.cluster.slurm.partitions[0].gres != "gpu" else "smollm2")


def test_a_wrong_host_key_is_refused_before_anything_is_submitted(run: Program, far: FarCluster) -> None:
    configure(run, far, replicas=1)
    known = Path(json.loads(run.config.read_text())["cluster"]["ssh"]["known_hosts_file"])
    right = known.read_text()
    node_key = public_key(far.sshds[far.nodes[0]].host_keys[0])
    try:
        known.write_text(f"{far.login_address} {node_key}\n")
        refused = run.run("start")
        assert refused.returncode == 2
        assert "has changed" in refused.stderr
        assert f"ssh-keygen -R {far.login_address}" in refused.stderr
        known.write_text("")
        unknown = run.run("start")
        assert unknown.returncode == 2
        assert f"echo '{far.login_address} {public_key(far.sshds['login'].host_keys[0])}' >> {known}" in unknown.stderr
    finally:
        known.write_text(right)
    assert far.slurm.jobs() == []


# --- The operator on the login node, and the proxy in a job of its own. ----------------------------------------------


@pytest.fixture
def at_login(run: Program, far: FarCluster) -> Program:
    """The command line on the login node: another network, other processes and another host name than the nodes'."""
    run.prefix = far.on("login")
    run.environment = {**far.slurm.environment, **run.environment, "PATH": far.slurm.environment["PATH"]}
    return run


def configure_job(run: Program, far: FarCluster, host: str = "127.0.0.1", is_far: bool = False, **sbatch: str) -> None:
    configure(run, far, replicas=1, poll_interval=0.3)
    document = json.loads(run.config.read_text())
    if not is_far:
        del document["cluster"]["ssh"]
    document["proxy"]["host"] = host
    setup = [f"export AGENT_INFRA_PYTHON={sys.executable}"]
    job = {"partition": "only1", "cpus": 1, "time_limit": "30", "setup": setup, "sbatch": sbatch}
    document["cluster"]["slurm"] |= {"proxy": "job", "proxy_job": job}
    run.config.write_text(json.dumps(document))


def test_the_proxy_runs_in_a_job_and_the_login_node_finds_it(at_login: Program, far: FarCluster) -> None:
    run = at_login
    configure_job(run, far)
    assert run.run("start", "--detach").returncode == 0
    done = run.run("connect")
    assert done.returncode == 0, done.stdout + done.stderr
    [job] = [line.split()[0] for line in far.slurm.jobs() if line.endswith(" agent-infra:far:proxy")]
    told = rf"^it runs in job {job} on {far.nodes[1]}, until \w+ \d\d:\d\d; `stop` ends it"
    assert re.search(told, done.stdout, re.MULTILINE), done.stdout
    url = re.search(r"^export OPENAI_BASE_URL=(http://10\.\S+:\d+)/v1$", done.stdout, re.MULTILINE)
    assert url is not None, done.stdout
    key = (run.state / "agent-infra" / "far" / "api_key").read_text().strip()
    assert key not in far.slurm.run("scontrol", "write", "batch_script", job, "-") + done.stdout
    wait_for(lambda: run.status()["degraded"] == [], "a replica that the proxy reaches")
    assert_a_stream_needs_the_key(far, f"{url[1]}/v1/chat/completions", key)
    proxy = run.status()["proxy"]
    assert (proxy["job"], proxy["node"], f"http://{proxy['host']}:{proxy['port']}") == (job, far.nodes[1], url[1])
    assert f"it runs in job {job} on " in run.run("connect").stdout  # finds it, and submits nothing
    assert len(far.slurm.jobs()) == 2
    stopped = run.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert f"stopped proxy (job {job}), smollm2-1 (job " in stopped.stdout
    assert far.slurm.jobs() == []
    assert run.processes() == []


def assert_a_stream_needs_the_key(far: FarCluster, url: str, key: str) -> None:
    """From the login node."""
    body = {"model": "smollm2", "max_tokens": 4, "stream": True, "messages": [{"role": "user", "content": "Count."}]}
    words = ["curl", "-sS", "--max-time", "90", "-H", "Content-Type: application/json", "-d", json.dumps(body), url]
    assert "a key is needed" in far.run_on("login", *words).stdout
    said = far.run_on("login", *words, "-H", f"Authorization: Bearer {key}").stdout
    assert said.removeprefix(":\n\n").startswith("data: "), said  # the comment keeps a slow turn's connection alive
    assert said.rstrip().endswith("data: [DONE]"), said


def test_a_proxy_job_that_ends_says_why(at_login: Program, far: FarCluster) -> None:
    run = at_login
    configure_job(run, far, host="192.0.2.1")
    failed = run.run("connect")
    assert failed.returncode == 1
    assert re.search(r"the proxy's job \d+ failed: the proxy cannot listen on 192\.0\.2\.1:\d+: ", failed.stderr)
    configure_job(run, far, begin="now+1hour")
    waiting = run.spawn("connect")
    waiting.wait_line(r"^proxy  PENDING \(BeginTime")
    [pid] = [pid for pid, words in run.processes() if " connect " in words and not words.startswith("nsenter")]
    os.kill(pid, signal.SIGINT)
    waiting.wait_line("the proxy's job stays in the queue")
    assert waiting.process.wait(PATIENCE_S) == 130
    waiting = run.spawn("connect")
    waiting.wait_line(r"^proxy  PENDING \(BeginTime")
    [job] = [line.split()[0] for line in far.slurm.jobs()]
    far.slurm.run("scancel", job)  # as an administrator does
    waiting.wait_line(rf"the proxy's job {job} ended: unknown: its job was cancelled \(Slurm: CANCELLED")
    assert waiting.process.wait(PATIENCE_S) == 1


# --- The proxy in a job, and the operator on a machine that only reaches the login node. -----------------------------


def proxy_jobs(far: FarCluster) -> list[str]:
    return [line.split()[0] for line in far.slurm.jobs() if line.endswith(" agent-infra:far:proxy")]


def test_a_proxy_in_a_job_is_reached_through_one_tunnel(run: Program, far: FarCluster) -> None:
    configure_job(run, far, is_far=True)
    assert run.run("start", "--detach").returncode == 0
    connected = run.spawn("connect")
    connected.wait_line(rf"^proxy  http://127\.0\.0\.1:{run.port} ")
    [job] = proxy_jobs(far)
    connected.wait_line(rf"^it runs in job {job} on {far.nodes[1]}, until \w+ \d\d:\d\d; `stop` ends it")
    connected.wait_line(r"^inside the cluster it is http://10\.")
    connected.wait_line(r"^tunnel login: ")
    key = (run.state / "agent-infra" / "far" / "api_key").read_text().strip()
    talker = OpenAI(base_url=f"http://127.0.0.1:{run.port}/v1", api_key=key, timeout=90)
    wait_for(lambda: run.status()["degraded"] == [], "a replica that the proxy reaches")
    assert ask(talker, "What is the capital of France?")
    with pytest.raises(AuthenticationError):  # whoever is on this machine, and whatever the way
        ask(client(run), "Hi")
    assert_no_key_shows(run, far)
    # The SSH connection breaks under a stream: that ends with an error, and the next turn waits for the next tunnel.
    with pytest.raises(APIError):
        for index, _ in enumerate(long_story(talker)):
            if index == 2:
                far.sshds["login"].cut_sessions()
    assert ask(talker, "And of Spain?")
    # Requeued, the job gets a node again, and the port here leads to it.
    pid = run.status()["proxy"]["pid"]
    far.slurm.run("scontrol", "requeue", job)
    wait_for(lambda: (run.status()["proxy"] or {"pid": pid})["pid"] != pid, "the proxy in its next run", 240)
    assert ask(talker, "And of Italy?")
    assert proxy_jobs(far) == [job]
    assert "http://" in run.run("logs", "proxy").stdout
    assert_stop_leaves_nothing(run, far)
    connected.process.wait(PATIENCE_S)


def long_story(talker: OpenAI) -> Any:
    return talker.chat.completions.create(
        model="smollm2",
        max_tokens=400,
        stream=True,
        messages=[{"role": "user", "content": "Tell a long story."}],
        extra_body={"ignore_eos": True},
    )


def test_a_link_to_a_proxy_job_that_is_cancelled_ends_and_says_why(run: Program, far: FarCluster) -> None:
    configure_job(run, far, is_far=True)
    done = run.run("connect", "--background")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "degraded: 0 of 1 replicas of smollm2 are running" in done.stdout
    [job] = proxy_jobs(far)
    far.slurm.run("scancel", job)  # as an administrator does
    wait_for(lambda: run.processes() == [], "the link has ended")
    log = (run.state / "agent-infra" / "far" / "run" / "logs" / "link.log").read_text()
    assert re.search(rf"^error: the proxy's job {job} ended: .*Slurm: CANCELLED.*; `connect` starts another", log, re.M)
    assert "no proxy is running" in run.run("status").stdout


@pytest.mark.parametrize("is_far", [True, False], ids=["a laptop", "the login node"])
def test_run_has_the_proxy_in_a_job(run: Program, far: FarCluster, is_far: bool) -> None:
    if not is_far:
        run.prefix = far.on("login")
        run.environment = {**far.slurm.environment, **run.environment, "PATH": far.slurm.environment["PATH"]}
    configure_job(run, far, is_far=is_far)
    program = (
        "import openai; it = openai.OpenAI(max_retries=0).chat.completions.create(model='smollm2', max_tokens=4, "
        "messages=[{'role': 'user', 'content': 'Hi'}]); print(len(it.choices), 'answer'); raise SystemExit(7)"
    )
    done = run.run("run", "--tasks", "1", "--", sys.executable, "-c", program, seconds=240)
    assert done.returncode == 7, done.stdout + done.stderr
    assert done.stdout == "1 answer\n"
    assert re.search(r"^stopped proxy \(job \d+\), smollm2-1 ", done.stderr, re.MULTILINE), done.stderr
    assert "| turns | 1 |" in done.stderr  # the report
    assert re.search(r"\| turns \| \d+ \|", run.run("report").stdout)  # of all that the module's cluster has kept
    assert far.slurm.jobs() == []
    assert run.processes() == []


def test_up_has_the_proxy_in_a_job(run: Program, far: FarCluster) -> None:
    configure_job(run, far, is_far=True)
    up = run.spawn("up")
    up.wait_line(rf"^proxy  http://127\.0\.0\.1:{run.port} ", 240)
    up.wait_line("^Ctrl-C stops everything")
    assert run.status()["degraded"] == []
    told = far.folder / "work" / "far" / "agent-infra" / "far" / "wanted.json"
    assert (json.loads(told.read_text()), told.stat().st_mode & 0o077) == ({"smollm2": 1}, 0)
    assert "already run by `up`" in run.run("connect").stderr
    os.kill(run.find("up"), signal.SIGINT)
    up.wait_line(r"^stopped proxy \(job \d+\), smollm2-1 ")
    assert up.process.wait(PATIENCE_S) == 0
    assert far.slurm.jobs() == []


# The last one: a node has lost its power after it.
def test_agents_see_no_error_whatever_breaks_on_the_way(run: Program, far: FarCluster) -> None:
    configure(run, far, replicas=4, tunnel="node")
    assert run.run("start").returncode == 0
    run.spawn("connect").wait_line(r"^proxy ")
    wait_for(lambda: all_up(run, 4), "four tunnels are up")
    agents = Agents(run)
    try:
        agents.settle()
        first, second = sorted({row["node"] for row in backends(run)})
        # One SSH session is killed.
        agents.phase = "an SSH session killed"
        before = reconnects(run)
        os.kill(far.sshds[first].sessions()[0], 9)
        wait_for(lambda: reconnects(run) > before and all_up(run, 4), "its tunnel is replaced")
        agents.settle()
        # The scheduler's controller is away for a while.
        agents.phase = "no slurmctld"
        far.slurm.stop_controller()
        agents.settle()
        far.slurm.start_controller()
        # One node is silent for 20 s.
        agents.phase = "a silent node"
        far.disconnect(first)
        silent_until = time.monotonic() + 20
        agents.settle()
        wait_for(lambda: any((row["tunnel"] or {}).get("state") != "up" for row in backends(run)), "it is noticed")
        time.sleep(max(0.0, silent_until - time.monotonic()))
        far.reconnect(first)
        wait_for(lambda: all_up(run, 4), "the tunnels are back")
        agents.settle()
        # A stream through a tunnel that breaks ends with an error, not as if it were whole.
        agents.phase = "a broken stream"
        before = reconnects(run)
        assert_broken_stream_says_so(run, far)
        wait_for(lambda: reconnects(run) > before and all_up(run, 4), "the tunnels are back")
        agents.settle()
        # The other node loses its power.
        agents.phase = "a power cut"
        far.cut_power(second)
        agents.settle()
    finally:
        agents.end()
    assert agents.errors == [], "\n".join(agents.errors)
    # As Slurm does itself when the node has been silent for its SlurmdTimeout: else its jobs would end only then.
    far.slurm.run("scontrol", "update", f"nodename={second}", "state=down", "reason=dark")
    assert run.run("stop", "--now").returncode == 0
    wait_for(lambda: run.processes() == [], "no process is left here")
