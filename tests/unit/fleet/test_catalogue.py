"""Configurations that the program writes: the catalogue of models, what a site offers, and what comes of both."""

from __future__ import annotations

import dataclasses

import pytest

from agent_infra import parse_config
from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.catalogue import CATALOGUE, CatalogueModel, catalogue_text, find_model
from agent_infra_core.fleet.draft import draft_config, draft_for, parse_login
from agent_infra_core.fleet.engines import check_engine_args, render_engine
from agent_infra_core.fleet.place import replica_shape
from agent_infra_core.fleet.site import Site, SitePartition, gpu_memory_gb, parse_survey
from agent_infra_core.protocol import GpuSample
from agent_infra_core.settings import ClusterConfig, Config, SshConfig

H100 = SitePartition("gpu", 12, "gpu:h100", (), 4, 30, 16, 250_000, "2-00:00:00", True)
H200 = SitePartition("big", 4, "gpu:h200", (), 8, 0, 12, 240_000, None, False)
CPUS = SitePartition("cpu", 90, "", (), 0, 0, None, None, "1-00:00:00", False)
SITE = Site((H100, H200, CPUS), ("proj", "other"), ("high", "normal"))

# What Slurm 22.05 printed, shortened; the accounts as sacctmgr prints them.
SURVEY = """\
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES MaxTime=1-00:00:00 State=UP
PartitionName=gpu AllowGroups=ALL AllowAccounts=proj,x AllowQos=ALL Default=NO MaxTime=UNLIMITED State=UP
PartitionName=theirs AllowGroups=ALL AllowAccounts=x AllowQos=ALL Default=NO MaxTime=UNLIMITED State=UP
PartitionName=old AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=NO MaxTime=60 State=DOWN
@nodes@
NodeName=c1 CPUAlloc=0 CPUEfctv=64 CPUTot=64 Gres=(null) GresUsed= RealMemory=256000 AllocMem=0 State=IDLE \
Partitions=cpu
NodeName=g1 CPUAlloc=8 CPUTot=64 Gres=gpu:a100_80gb:4(S:0-1) GresUsed=gpu:a100_80gb:1(IDX:0) RealMemory=512000 \
AllocMem=1000 State=MIXED Partitions=gpu,theirs
NodeName=g2 CPUAlloc=0 CPUTot=48 Gres=gpu:v100:4(S:0-1) GresUsed=gpu:v100:0(IDX:N/A) RealMemory=192000 State=IDLE \
Partitions=gpu
NodeName=g3 CPUAlloc=0 CPUTot=64 Gres=gpu:a100_80gb:4(S:0-1) GresUsed=gpu:a100_80gb:0(IDX:N/A) RealMemory=480000 \
AllocMem=0 State=IDLE Partitions=gpu
@accounting@
accounting_storage/slurmdbd
@accounts@
proj
other|cpu|normal
proj||high,normal
"""


def drafted(row: CatalogueModel, site: Site, replicas: int = 1) -> Config:
    return parse_config(draft_config(row, site, row.name, replicas), {})


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.name)
def test_every_model_of_the_catalogue_makes_a_configuration_that_can_be_started(row: CatalogueModel) -> None:
    config = drafted(row, SITE, replicas=3)
    [model] = config.models
    check_engine_args(model)
    assert render_engine(model).argv
    assert (model.name, model.model_path, model.replicas) == (row.name, row.repository, 3)
    for partition in config.cluster.slurm.partitions:
        assert replica_shape(model, partition, config.cluster.slurm).nodes == 1
    gpus = {"gpu": 80, "big": 141}
    smallest = min(gpus.get(partition.name, 0) for partition in config.cluster.slurm.partitions)
    assert model.tensor_parallel_size * smallest >= row.memory_gb


def test_every_row_names_the_page_that_documents_it_and_is_found_by_name_and_id() -> None:
    for row in CATALOGUE:
        assert all(page.startswith("https://") for page in row.source.split())
        assert find_model(row.name) is find_model(row.repository.upper()) is row
    assert len({row.name for row in CATALOGUE}) == len(CATALOGUE) >= 20
    assert len(catalogue_text().splitlines()) == len(CATALOGUE)


def test_an_unknown_model_is_refused_with_the_nearest_and_with_what_to_do() -> None:
    with pytest.raises(RefusedError, match=r"no model qwen3-8; did you mean qwen3-8b\?.*`init` writes one"):
        find_model("qwen3-8")


def test_a_survey_of_slurm_finds_the_partitions_that_take_the_users_jobs() -> None:
    site = parse_survey(SURVEY)
    assert [partition.name for partition in site.partitions] == ["cpu", "gpu"]
    cpu, gpu = site.partitions
    assert (cpu.gres, cpu.time_limit, cpu.is_default) == ("", "1-00:00:00", True)
    assert (gpu.gres, gpu.other_gres, gpu.gpus_per_node, gpu.idle_gpus) == ("gpu:a100_80gb", ("gpu:v100",), 4, 7)
    assert (gpu.cpus_per_gpu, gpu.memory_per_gpu_mb, gpu.time_limit, gpu.memory_gb) == (16, 120_000, None, 80)
    assert site.accounts == ("proj", "other")
    assert site.qos == ("high", "normal")


@pytest.mark.parametrize(
    ("was", "now", "names"),
    [
        ("gpu AllowGroups=ALL", "gpu AllowGroups=chem,staff", ["cpu"]),
        ("gpu AllowGroups=ALL", "gpu AllowGroups=chem,users", ["cpu", "gpu"]),
        ("AllowAccounts=proj,x", "DenyAccounts=proj,other", ["cpu"]),
        ("AllowAccounts=proj,x", "DenyAccounts=proj", ["cpu", "gpu"]),
        ("AllowAccounts=proj,x AllowQos=ALL", "DenyQos=high,normal", ["cpu"]),
        ("AllowAccounts=proj,x AllowQos=ALL", "DenyQos=high", ["cpu", "gpu"]),
    ],
)
def test_a_partition_that_excludes_the_user_is_left_out(was: str, now: str, names: list[str]) -> None:
    text = SURVEY.replace(was, now).replace("@accounting@", "@groups@\nme users\n@accounting@")
    assert was not in text
    assert [partition.name for partition in parse_survey(text).partitions] == names


def test_without_accounting_slurm_asks_for_no_account() -> None:
    site = parse_survey(SURVEY.replace("accounting_storage/slurmdbd", "accounting_storage/none"))
    assert site.accounts == ()
    assert "account:" not in draft_config(find_model("qwen3-8b"), site, "d")


def test_a_site_that_takes_no_jobs_is_refused() -> None:
    with pytest.raises(RefusedError, match="no partition that takes your jobs"):
        parse_survey(SURVEY.replace("State=UP", "State=DOWN"))


def test_a_site_where_all_is_known_gets_every_key_that_it_needs() -> None:
    config = parse_config(draft_config(find_model("qwen3-32b"), SITE, "d", 2, SshConfig("login.x", "me", 2222)), {})
    slurm = config.cluster.slurm
    assert config.cluster.ssh == SshConfig("login.x", "me", 2222)
    assert (slurm.account, slurm.cpus_per_gpu, slurm.memory_per_gpu) == ("proj", 12, "216000M")
    assert [(each.name, each.gres, each.gpus_per_node, each.priority) for each in slurm.partitions] == [
        ("gpu", "gpu:h100", 4, 2),
        ("big", "gpu:h200", 8, 1),
    ]
    assert [each.time_limit for each in slurm.partitions] == ["2-00:00:00", None]
    assert config.models[0].tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("name", "site", "partitions", "gpus"),
    [
        ("qwen3-8b", SITE, ["gpu", "big"], 1),
        ("glm-4.7", SITE, ["big"], 4),  # 8 of the H100, 2 nodes
        ("glm-4.7", Site((H100,)), ["gpu"], 8),
        ("smollm2", SITE, ["gpu"], 1),  # the default partition
        ("smollm2", Site((CPUS, H200)), ["cpu"], 1),
        ("qwen3-32b", Site((dataclasses.replace(H100, gres="gpu"),)), ["gpu"], 2),  # a size that nobody tells
    ],
)
def test_a_model_gets_the_partitions_and_the_gpus_that_hold_it(
    name: str, site: Site, partitions: list[str], gpus: int
) -> None:
    config = drafted(find_model(name), site)
    assert [each.name for each in config.cluster.slurm.partitions] == partitions
    assert config.models[0].tensor_parallel_size == gpus


def test_a_model_that_no_partition_and_no_gpu_can_hold_is_refused() -> None:
    with pytest.raises(RefusedError, match="qwen3-8b needs GPUs, and no partition has any"):
        drafted(find_model("qwen3-8b"), Site((CPUS,)))
    with pytest.raises(RefusedError, match=r"needs 20 GB .* this machine shows none"):
        drafted(find_model("qwen3-8b"), Site())
    small = GpuSample("NVIDIA L4", None, None, 24 * 10**9, None, None)
    with pytest.raises(RefusedError, match="this machine shows 1 with 24 GB each"):
        drafted(find_model("qwen3-8b"), Site(gpus=(small,)))
    assert drafted(find_model("qwen3-8b"), Site(gpus=(small, small))).models[0].tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("h100", 80),
        ("a100", 40),
        ("a100_80gb", 80),
        ("a100-sxm4-40gb", 40),
        ("NVIDIA L40S", 48),
        ("l4", 24),
        ("h200", 141),
        ("gh200", 96),
        ("NVIDIA GH200 480GB", 96),
        ("a100_3g.20gb", 20),
        ("nvidia_h100_80gb_hbm3_1g.10gb", 10),
        ("x", None),
    ],
)
def test_the_memory_of_a_gpu_follows_from_its_type(kind: str, size: int | None) -> None:
    assert gpu_memory_gb(kind) == size


def test_init_on_a_machine_without_slurm_says_what_to_do() -> None:
    with pytest.raises(RefusedError, match="init --ssh HOST"):
        draft_for(None, 1, ClusterConfig(), None)


def test_local_and_a_login_host_exclude_each_other() -> None:
    with pytest.raises(RefusedError, match="--local and --ssh"):
        draft_for("smollm2", 1, ClusterConfig(type="slurm", ssh=SshConfig("x")), None)


@pytest.mark.parametrize(
    ("text", "login"),
    [("host", SshConfig("host")), ("me@h.x:22", SshConfig("h.x", "me", 22)), (None, None)],
)
def test_a_login_host_is_read_as_ssh_reads_it(text: str | None, login: SshConfig | None) -> None:
    assert parse_login(text) == login


@pytest.mark.parametrize("text", ["", "a b", "me@", "h:port", "a:1:2"])
def test_a_login_host_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(RefusedError, match=r"USER@"):
        parse_login(text)
