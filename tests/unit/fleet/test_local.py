"""Clusters, the parts without processes: ids, GPUs, logs, records, keys, model paths."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.cluster import KEPT_LOGS, surplus_logs
from agent_infra_core.fleet.state import free_replica_id, is_gone, read_or_make_key
from agent_infra_core.fleet.weights import resolve_model_path
from agent_infra_core.host import HostUnreachableError, LocalCommands
from agent_infra_core.node.gpus import allocate_gpus, gpu_pool
from agent_infra_core.protocol import REPLICA_STATES, GpuSample, ReplicaFailure, ReplicaRecord, decode_record
from agent_infra_core.settings import PACKAGED_MODEL, ModelConfig

FOUR_GPUS = "".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}aaa-bbbb)\n" for i in range(4))
MIG = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0aaa)
  MIG 3g.40gb     Device  0: (UUID: MIG-1111)
  MIG 3g.40gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1aaa)
"""
RECORD = ReplicaRecord(
    replica="m-1",
    model="m",
    state="ready",
    engine="vllm",
    node="here",
    pid=7,
    process="boot:1",
    port=5900,
    failure=ReplicaFailure("unknown", "line", "hint"),
    gpus=(GpuSample("H100", None, 1, 2, 3.5, None),),
    gpu_ids=("0", "1"),
)


def test_a_replica_gets_the_lowest_number_that_is_free() -> None:
    assert free_replica_id("m", []) == "m-1"
    assert free_replica_id("m", ["m-1", "m-3", "other-2"]) == "m-2"


@pytest.mark.parametrize(
    ("listing", "visible", "pool"),
    [
        (FOUR_GPUS, None, ("0", "1", "2", "3")),
        (FOUR_GPUS, "2,3", ("2", "3")),
        (FOUR_GPUS, " 3 , 1 ", ("3", "1")),
        (FOUR_GPUS, "GPU-2aaa", ("2",)),
        (FOUR_GPUS, "1,9,2", ("1",)),  # CUDA stops at an entry that names no GPU
        (FOUR_GPUS, "1,1", ("1",)),
        (FOUR_GPUS, "", ()),
        (FOUR_GPUS, "-1", ()),
        ("", "0", ()),
        (MIG, None, ("MIG-1111", "MIG-2222", "1")),
        (MIG, "MIG-2222,1", ("MIG-2222", "1")),
    ],
)
def test_the_pool_is_what_cuda_would_show(listing: str, visible: str | None, pool: tuple[str, ...]) -> None:
    assert gpu_pool(listing, visible) == pool


def test_gpus_that_somebody_holds_are_not_handed_out() -> None:
    assert allocate_gpus(2, ("0", "1", "2", "3"), {"1": "a/m-1"}) == ("0", "2")


def test_too_few_gpus_are_refused_with_how_many_and_who_holds_them() -> None:
    with pytest.raises(RefusedError, match=r"2 GPU.*1 of 2 free; 1 is held by a/m-1"):
        allocate_gpus(2, ("0", "1"), {"1": "a/m-1"})


def test_only_the_newest_logs_of_former_replicas_are_kept(tmp_path: Path) -> None:
    for number in range(1, KEPT_LOGS + 6):
        log = tmp_path / f"m-{number}.log"
        log.touch()
        os.utime(log, (number, number))
    for name in ("relay.log", "m-3.log.old"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    surplus = surplus_logs(tmp_path.iterdir(), ["m-1"])
    assert {log.name for log in surplus} == {"m-2.log", "m-3.log", "m-4.log", "m-5.log", "m-3.log.old"}


def test_a_record_comes_back_as_it_was_written() -> None:
    assert decode_record("m-1", json.dumps(dataclasses.asdict(RECORD))) == RECORD


def test_keys_of_a_newer_version_are_left_out() -> None:
    document = {
        **dataclasses.asdict(RECORD),
        "numa_node": 1,
        "gpus": [{**dataclasses.asdict(RECORD.gpus[0]), "ecc": 0}],
    }
    assert decode_record("m-1", json.dumps(document)) == RECORD


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"ready"',
        "[" * 100_000,
        json.dumps({"replica": "m-1"}),
        json.dumps({**dataclasses.asdict(RECORD), "pid": "7"}),
        json.dumps({**dataclasses.asdict(RECORD), "gpus": [1]}),
        json.dumps({**dataclasses.asdict(RECORD), "failure": {"kind": "unknown"}}),
        json.dumps({**dataclasses.asdict(RECORD), "state": "levitating"}),
    ],
)
def test_a_record_that_cannot_be_read_is_a_failed_replica_with_the_reason(text: str) -> None:
    record = decode_record("m-1", text)
    assert (record.replica, record.model, record.state) == ("m-1", "m", "failed")
    assert record.failure is not None
    assert "cannot be read" in record.failure.line


def test_a_record_that_cannot_be_read_still_tells_which_process_to_stop() -> None:
    record = decode_record("m-1", json.dumps({"pid": 7, "process": "boot:1", "state": "levitating"}))
    assert (record.pid, record.process) == (7, "boot:1")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([item.name for item in dataclasses.fields(ReplicaRecord)]), JSON))
def test_no_record_whatsoever_raises(changes: dict[str, Any]) -> None:
    record = decode_record("m-1", json.dumps({**dataclasses.asdict(RECORD), **changes}))
    assert record.state in REPLICA_STATES
    is_gone(record)


def test_processes_that_race_for_a_key_get_the_same_one(tmp_path: Path) -> None:
    keys: list[str] = []
    barrier = threading.Barrier(8)

    def make() -> None:
        barrier.wait(timeout=PATIENCE_S)
        keys.append(read_or_make_key(tmp_path / "key"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE_S)
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert os.listdir(tmp_path) == ["key"]
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_key_file_without_a_usable_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("two words\n")
    with pytest.raises(RefusedError, match="contains no key"):
        read_or_make_key(tmp_path / "key")


def never() -> Path:
    raise AssertionError("nothing is to be fetched")


def resolve(engine: str, model_path: str) -> str:
    command = ("server", "{port}") if engine == "command" else None
    return resolve_model_path(ModelConfig("m", model_path, engine=engine, command=command), never)


def test_a_hugging_face_id_passes_through_for_vllm() -> None:
    assert resolve("vllm", "Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"


def test_whatever_a_command_is_given_passes_through() -> None:
    assert resolve("command", "./anything") == "./anything"


def test_a_directory_that_exists_is_a_path_for_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("vllm", "org/model") == str(tmp_path / "org" / "model")


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert resolve("llama_cpp", "~/m.gguf") == str(tmp_path / "m.gguf")


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere", "~nobody-of-that-name/model"])
@pytest.mark.parametrize("engine", ["vllm", "llama_cpp"])
def test_a_path_that_does_not_exist_is_refused(engine: str, path: str) -> None:
    with pytest.raises(RefusedError, match=f"model_path {path}.*(does not exist|home directory)"):
        resolve(engine, path)


def test_the_packaged_model_is_refused_for_vllm() -> None:
    with pytest.raises(RefusedError, match="set engine: llama_cpp"):
        resolve("vllm", PACKAGED_MODEL)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(RefusedError, match="is not a GGUF file"):
        resolve("llama_cpp", str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(RefusedError, match="is not a GGUF file"):
        resolve("llama_cpp", str(tmp_path / "m.gguf"))


def test_a_directory_is_refused_where_a_gguf_is_needed(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is a directory"):
        resolve("llama_cpp", str(tmp_path))


def test_a_pipe_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(RefusedError, match="is not a GGUF file"):
        resolve("llama_cpp", str(tmp_path / "m.gguf"))


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "m.gguf").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root reads everything
    try:
        with pytest.raises(RefusedError, match="cannot be read: Permission denied"):
            resolve("llama_cpp", str(tmp_path / "m.gguf"))
    finally:
        os.seteuid(user)


def test_a_command_that_fails_is_told_from_a_host_that_does() -> None:
    here = LocalCommands(os.environ)
    done = here.run(["sh", "-c", "cat; echo wrong >&2; exit 3"], stdin=b"in\x00\n")
    assert (done.status, done.output, done.errors) == (3, b"in\x00\n", b"wrong\n")
    assert here.run(["no-such-program"]).status == 127
    with pytest.raises(HostUnreachableError, match=r"`sh` gave no answer within 0\.1 s"):
        here.run(["sh", "-c", "sleep 60; true"], timeout_s=0.1)
