"""The whole story on Slurm 20.11, 24.11 and 26.05; all other tests run on the host's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai import OpenAI
from patience import PATIENCE_S
from program import program, wait_for
from testbed.ports import free_port
from testbed.releases import ENGINE, RELEASES, ReleaseBed, make_root, missing_parts, python_in
from testbed.sshd import SshServer
from weights import packaged_gguf

from agent_infra_core.settings import PACKAGED_MODEL


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_doctor_start_connect_a_client_scale_and_stop(release: str, tmp_path: Path) -> None:
    if missing := missing_parts():
        pytest.skip(f"a chroot needs {', '.join(missing)}")
    root = make_root(RELEASES[release])
    bed = ReleaseBed(root)
    options = {"SetEnv": f"SLURM_CONF={bed.folder}/slurm.conf"}
    server = SshServer(bed.folder / "ssh", prefix=bed.prefix, options=options)
    try:
        bed.start()
        assert f" {release}." in bed.run("sbatch", "--version")
        with server, program(tmp_path) as run:
            run.environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(packaged_gguf().parents[2])}
            slurm = {
                "work_dir": str(bed.folder / "work"),
                "partitions": [{"name": "high", "priority": 2}, {"name": "low"}],
                "setup": [f"export AGENT_INFRA_PYTHON={python_in(root)} PYTHONPATH={ENGINE}"],
            }
            ssh = {name: value for name, value in vars(server.ssh()).items() if value is not None}
            cluster = {"type": "slurm", "name": "story", "poll_interval": 1, "ssh": ssh, "tunnel": "login"}
            model = {"name": "smollm2", "model_path": PACKAGED_MODEL, "engine": "llama_cpp", "replicas": 2}
            model |= {"base_port": free_port(), "engine_args": ["--threads", "1"]}
            document = {"proxy": {"port": run.port}, "cluster": {**cluster, "slurm": slurm}, "models": [model]}
            run.config.write_text(json.dumps(document))

            doctor = run.run("doctor", "--job", "--json", seconds=PATIENCE_S * 4)
            findings = json.loads(doctor.stdout)
            assert [each for each in findings if each["level"] == "error"] == [], findings
            assert any("reached from here" in each["text"] for each in findings)

            started = run.run("start", seconds=PATIENCE_S * 4)
            assert started.returncode == 0, started.stdout + started.stderr
            connected = run.spawn("connect")
            connected.wait_line("^proxy  http")
            wait_for(lambda: run.get("/health")["models"]["smollm2"]["ready"] == 2, "both replicas are reached")
            talker = OpenAI(base_url=f"http://127.0.0.1:{run.port}/v1", api_key="unused", timeout=PATIENCE_S)
            stream = talker.chat.completions.create(
                model="smollm2", max_tokens=8, stream=True, messages=[{"role": "user", "content": "Count."}]
            )
            assert [choice.finish_reason for event in stream for choice in event.choices][-1] in ("stop", "length")

            scaled = run.run("scale", "smollm2", "3", seconds=PATIENCE_S * 4)
            assert scaled.returncode == 0, scaled.stdout + scaled.stderr
            wait_for(lambda: run.get("/health")["models"]["smollm2"]["ready"] == 3, "the third is reached")
            stopped = run.run("stop", seconds=PATIENCE_S * 4)
            assert stopped.returncode == 0, stopped.stdout + stopped.stderr
            assert bed.jobs() == []
            connected.process.wait(PATIENCE_S)
    finally:
        server.stop()
        bed.close()
