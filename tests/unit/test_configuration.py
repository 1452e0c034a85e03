"""Configuration: what is refused, and that every refusal carries the fix."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import agent_infra
from agent_infra import load_config, parse_config
from agent_infra_core.errors import ConfigError
from agent_infra_core.settings import DEFAULT_CONFIG, Config

ROOT = Path(agent_infra.__file__).parent
MODEL = "models: [{name: m, model_path: org/m}]\n"


def slurm(keys: str) -> str:
    return MODEL + f"cluster: {{type: slurm, slurm: {{{keys}}}}}"


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, {})
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_only_a_models_name_and_path_are_required() -> None:
    config = parse_config(MODEL, {})
    assert dataclasses.replace(config, models=()) == Config(models=())
    assert config.models[0].engine == "vllm"


def test_the_embedded_default_equals_configs_local() -> None:
    assert load_config(ROOT / "configs" / "local.yaml") == DEFAULT_CONFIG


def test_example_yaml_shows_every_key_with_its_default() -> None:
    import yaml

    document = yaml.safe_load((ROOT / "configs" / "example.yaml").read_text())
    expected = dataclasses.asdict(parse_config("models: [{name: my_model, model_path: Qwen/Qwen2.5-7B-Instruct}]", {}))
    shown = dataclasses.asdict(load_config(ROOT / "configs" / "example.yaml"))
    assert {**shown, "models": shown["models"][:1]} == expected
    for section in ("proxy", "cluster", "headers", "analysis"):
        assert set(document[section]) == set(expected[section])
    assert set(document["cluster"]["slurm"]) == set(expected["cluster"]["slurm"])
    assert set(document["models"][0]) == set(expected["models"][0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MODEL + "proxy: {stratgy: least_load}", "proxy.stratgy: unknown key; did you mean strategy?"),
        (
            MODEL + "zebra: 1",
            "zebra: unknown key; known here: analysis, cluster, headers, models, otel, proxy, version",
        ),
        ("models: [{nam: m, model_path: p}]", "models[0].nam: unknown key; did you mean name?"),
        (MODEL + "proxy: {port: '5800'}", 'proxy.port: found "5800"; allowed: a whole number at least 0'),
        (
            MODEL + "proxy: {port: 70000}",
            "proxy.port: found 70000; allowed: a whole number at least 0 and at most 65535",
        ),
        (MODEL + "proxy: {port: true}", "proxy.port: found true; allowed: a whole number"),
        (MODEL + "proxy: {strategy: best}", "allowed: one of least_load, round_robin"),
        (MODEL + "proxy: {request_timeout: 0}", "proxy.request_timeout: found 0; allowed: a number above 0"),
        (MODEL + "proxy: {request_timeout: .nan}", "proxy.request_timeout: found NaN; allowed: a number above 0"),
        (MODEL + "proxy: null", "proxy: may not be null"),
        (MODEL + "proxy: 3", "proxy: a mapping of keys is needed"),
        ("models: {}", "models: a list is needed"),
        ("models: []", "models: at least one model is needed"),
        ("models: [{name: m}]", "models[0].model_path: is required"),
        ("models: [{name: 'a b', model_path: p}]", 'models[0].name: found "a b"; allowed: letters, digits'),
        ("models: [{name: m, model_path: p}, {name: m, model_path: q}]", "models[1].name: m is used twice"),
        ("models: [{name: m, model_path: p, env: {A: 1}}]", "models[0].env: found"),
        ("models: [{name: m, model_path: p, engine: command}]", "models[0].command: is required"),
        ("models: [{name: m, model_path: p, command: [x, '{port}']}]", "models[0].command: belongs to engine: command"),
        ("models: [{name: m, model_path: p, engine: command, command: [x]}]", "{port} must be part of it"),
        (MODEL + "cluster: {ssh: {user: me}}", "cluster.ssh.host: is required"),
        (MODEL + "cluster: {ssh: {host: l, prot: 22}}", "cluster.ssh.prot: unknown key; did you mean port?"),
        (MODEL + "cluster: {ssh: {host: -oProxyCommand=x}}", "cluster.ssh.host: found"),
        (MODEL + "cluster: {ssh: login}", "cluster.ssh: a mapping of keys is needed"),
        (MODEL + "cluster: {tunnel: maybe}", "allowed: one of auto, login, node, exec, none"),
        (MODEL + "cluster: {ssh: {host: login}}", "cluster.ssh: applies only to type: slurm"),
        (MODEL + "cluster: {tunnel: login}", "cluster.tunnel: applies only to type: slurm"),
        (MODEL + "cluster: {poll_interval: 5}", "cluster.poll_interval: applies only to type: slurm"),
        (MODEL + "cluster: {type: slurm}", "cluster.slurm.partitions: at least one is needed"),
        (slurm("partitions: [{nam: a}]"), "cluster.slurm.partitions[0].nam: unknown key; did you mean name?"),
        (slurm("partitions: [{name: a}, {}]"), "cluster.slurm.partitions[1].name: is required"),
        (slurm("partitions: {name: a}"), "cluster.slurm.partitions: a list is needed"),
        (slurm("partitions: [{name: a}, {name: a}]"), "cluster.slurm.partitions[1].name: a is used twice"),
        (slurm("partitions: [{name: a, gres: 'gpu:h100:4'}]"), "allowed: a GRES as name or name:type"),
        (slurm("partitions: [{name: a, time_limit: 2h}]"), "cluster.slurm.partitions[0].time_limit: found"),
        (slurm("partitions: [{name: a}], container: {runtime: docker, image: x}"), "one of apptainer, pyxis, podman"),
        (slurm("partitions: [{name: a}], container: {runtime: pyxis}"), "cluster.slurm.container.image: is required"),
        (
            slurm("partitions: [{name: a}], container: {runtime: podman, image: x, mounts: [data]}"),
            "cluster.slurm.container.mounts: found",
        ),
        (slurm("partitions: [{name: a}], work_dir: runs"), "cluster.slurm.work_dir: found"),
        (slurm("partitions: [{name: a}], sbatch: {output: x}"), "cluster.slurm.sbatch.output: is set by this program"),
        (slurm("partitions: [{name: a}], sbatch: {clusters: x}"), "clusters: set cluster.ssh to that cluster's own"),
        (slurm("partitions: [{name: a, sbatch: {qos: x}}]"), "cluster.slurm.partitions[0].sbatch.qos: is set by"),
        (slurm('partitions: [{name: a}], sbatch: {account: "a\\nrm x"}'), "cluster.slurm.sbatch: found"),
        (slurm("partitions: [{name: a}], sbatch: {Account: a}"), "cluster.slurm.sbatch: found"),
        (MODEL + "models: []", "models: appears twice (again at line 2)"),
        ("models: [{name: m, model_path: '${NOWHERE}/m'}]", "the environment variable NOWHERE is not set"),
        ("models: [", "not valid YAML"),
        ("- a", "a mapping of keys is needed"),
        ("", "models: is required"),
    ],
)
def test_a_wrong_key_names_its_path_and_what_is_allowed(text: str, message: str) -> None:
    assert message in problem(text)


def test_the_example_for_slurm_is_valid_and_keeps_every_kind_of_directive() -> None:
    first, second = load_config(ROOT / "configs" / "slurm.yaml").cluster.slurm.partitions
    assert (first.name, first.gpus_per_node, first.time_limit, first.qos) == ("gpu", 4, "8:00:00", None)
    assert (second.exclusive, second.qos, second.sbatch) == (True, "low", {"requeue": True})
    directives = {"account": "abc", "mem": None, "requeue": True, "cpus-per-task": 8}
    text = slurm("partitions: [{name: a}], sbatch: {account: abc, mem: null, requeue: true, cpus-per-task: 8}")
    assert parse_config(text, {}).cluster.slurm.sbatch == directives


def test_all_wrong_keys_are_named_at_once() -> None:
    message = problem(MODEL + "proxy: {port: -1, host: 5}\ncluster: {nam: x}")
    assert all(part in message for part in ("proxy.port", "proxy.host", "cluster.nam: unknown key; did you mean name?"))


def test_shell_lines_are_for_the_shell_that_runs_them() -> None:
    lines = ["source ${SLURM_TMPDIR}/env/bin/activate", "echo $${HOME}"]
    text = MODEL + f"cluster: {{type: slurm, slurm: {{partitions: [{{name: g}}], setup: {lines}, prologue: {lines}}}}}"
    slurm = parse_config(text, {}).cluster.slurm
    assert list(slurm.setup) == list(slurm.prologue) == lines
    model = parse_config("models: [{name: m, model_path: p, env: {A: '$${B}/$${C}$$', D: '$${E}${F}'}}]", {"F": "f"})
    assert model.models[0].env == {"A": "${B}/${C}$$", "D": "${E}f"}


def test_environment_variables_are_expanded_in_strings() -> None:
    config = parse_config("models: [{name: m, model_path: '${HOME}/m', env: {A: 'x${B}y'}}]", {"HOME": "/h", "B": "1"})
    assert (config.models[0].model_path, config.models[0].env) == ("/h/m", {"A": "x1y"})


def test_a_file_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read: No such file"):
        load_config("nowhere.yaml")


def test_a_file_that_is_no_configuration_is_refused_and_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\x00\xfe")
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "binary", "it is not text in UTF-8")):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value) == f"{path}: cannot be read: {reason}; name a YAML file such as configs/example.yaml"


def test_without_a_file_the_embedded_default_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config() == DEFAULT_CONFIG
    (tmp_path / "config.yaml").write_text(MODEL)
    assert load_config().models[0].name == "m"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cluster: {name: mine}\nmodels: [{nmae: m}]", "mine"),
        ("models: [{name: m, model_path: '${NOT_SET_HERE}'}]", "default"),
        ("cluster: {name: '${SOME_NAME}'}\nproxy: {port: many}", "told"),
        ("cluster: {name: '${NOT_SET_HERE}'}\nmodels: []", None),
        ("cluster: {nmae: mine}\nmodels: []", None),
        ("clutser: {name: mine}\nmodels: []", None),
        ("cluster: [mine]", None),
        ("- cluster", None),
        ("cluster: {name: mine", None),
    ],
)
def test_a_deployment_is_known_from_a_configuration_with_errors_elsewhere(
    text: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_NAME", "told")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    assert caught.value.deployment == name
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "nowhere.yaml")
    assert caught.value.deployment is None


def test_a_proxy_alone_takes_what_concerns_it_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("proxy: {port: 7000}\nanalysis: {latency_goal_s: 3}\ncluster: {name: other}\nmodels: 17\n")
    words = ["proxy", "--backend", "m=127.0.0.1:1", "--config", str(path), "--port", "7001"]
    config = agent_infra._proxy_config(agent_infra.build_parser().parse_args(words), ["m"])
    assert config.analysis.latency_goal_s == 3
    assert (config.proxy.port, config.cluster.name) == (7001, "proxy-7001")
    assert [model.name for model in config.models] == ["m"]
