"""Weights on a node's own disk: what is copied, once for all replicas, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.engines import serve_spec
from agent_infra_core.node import staging
from agent_infra_core.node.process import Watcher
from agent_infra_core.node.ranks import Rank
from agent_infra_core.node.replica import Replica, make_launch
from agent_infra_core.node.staging import StagingError, StagingStopped, find_source, list_files, stage_weights
from agent_infra_core.settings import ModelConfig

Usage = namedtuple("Usage", "total used free")


def model(folder: Path) -> Path:
    """A model of several files, in folders too."""
    source = folder / "shared" / "qwen"
    (source / "original").mkdir(parents=True)
    for name, content in (
        ("config.json", b"{}"),
        ("model-1.safetensors", b"a" * 100_000),
        ("original/x.bin", b"b" * 9),
    ):
        (source / name).write_bytes(content)
    return source


def stage(source: str | Path, folder: Path, **environment: str) -> Path:
    return Path(stage_weights(str(source), str(folder), environment, lambda *_: None, lambda: False))


def test_a_model_is_copied_as_it_is_into_a_folder_of_ones_own(tmp_path: Path) -> None:
    source = model(tmp_path)
    copy = stage(source, tmp_path / "local")
    assert copy.parent == tmp_path / "local" / f"agent-infra-{os.getuid()}"
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    assert copy.name.startswith("qwen-")
    assert {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()} == {
        str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()
    }
    assert [path.name for path in copy.parent.iterdir() if path.name.endswith(".partial")] == []


def test_a_single_file_is_staged_as_one(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    copy = stage(tmp_path / "m.gguf", tmp_path / "local")
    assert (copy.name, copy.read_bytes()) == ("m.gguf", b"GGUF")


def test_it_is_copied_once_and_again_only_when_it_changes(tmp_path: Path) -> None:
    source = model(tmp_path)
    first = stage(source, tmp_path / "local")
    written = (first / "config.json").stat().st_mtime_ns
    assert stage(source, tmp_path / "local") == first
    assert (first / "config.json").stat().st_mtime_ns == written
    (source / "config.json").write_text('{"a": 1}')
    second = stage(source, tmp_path / "local")
    assert second != first
    assert (second / "config.json").read_text() == '{"a": 1}'
    assert first.exists()  # its engine may still read it


def test_replicas_that_start_together_make_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, copies = model(tmp_path), list[str]()
    really = staging._copy_all

    def counted(*arguments: Any) -> None:
        copies.append("one")
        really(*arguments)

    monkeypatch.setattr(staging, "_copy_all", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(stage(source, tmp_path / "local"))) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(set(found)) == 1
    assert len(found) == 6
    assert copies == ["one"]


def test_what_a_copy_that_was_cut_off_has_left_is_made_whole(tmp_path: Path) -> None:
    source = model(tmp_path)
    copy = stage(source, tmp_path / "local")
    (copy / "model-1.safetensors").write_bytes(b"a" * 7)
    (copy.parent / f".{copy.name}.partial").mkdir()
    assert stage(source, tmp_path / "local") == copy
    assert (copy / "model-1.safetensors").stat().st_size == 100_000


def hub(folder: Path, content: bytes, name: str) -> dict[str, str]:
    """A cache of the hub with one model of one file, whose blob has this name."""
    cached = folder / "hub" / "models--org--m"
    for each in ("refs", "snapshots/abc", "blobs"):
        (cached / each).mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "blobs" / name).write_bytes(content)
    (cached / "snapshots" / "abc" / "model.safetensors").symlink_to(f"../../blobs/{name}")
    return {"HF_HOME": str(folder)}


def test_a_model_of_the_hub_is_taken_from_its_cache_and_checked(tmp_path: Path) -> None:
    environment = hub(tmp_path, b"weights", hashlib.sha256(b"weights").hexdigest())
    copy = stage("org/m", tmp_path / "local", **environment)
    assert (copy / "model.safetensors").read_bytes() == b"weights"
    assert not (copy / "model.safetensors").is_symlink()


def test_damaged_weights_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    environment = hub(tmp_path, b"w3ights", hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(RefusedError, match="doesn't match its SHA-256; .* `pull` it again"):
        stage("org/m", tmp_path / "local", **environment)
    assert [path.name for path in (tmp_path / "local").rglob("*") if not path.name.endswith(".lock")][1:] == []


def test_the_folder_may_name_variables_of_the_job(tmp_path: Path) -> None:
    source = model(tmp_path)
    where = str(tmp_path / "scratch")
    assert str(stage(source, Path("${TMPDIR}/x"), TMPDIR=where)).startswith(f"{where}/x/")
    assert str(stage(source, Path("$TMPDIR"), TMPDIR=where)).startswith(f"{where}/")
    for path, why in (("$NOPE/x", "NOPE is not set on this node"), ("$TMPDIR", "is not an absolute path")):
        with pytest.raises(RefusedError, match=why):
            stage(source, Path(path), TMPDIR="relative")


@pytest.mark.parametrize(
    ("path", "why"),
    [("org/model", "`pull` downloads it there first"), ("/no/such/model", "does not exist on this node")],
)
def test_what_is_not_there_cannot_be_staged(path: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=why):
        find_source(path, {"HF_HOME": str(tmp_path)})


def test_a_disk_that_is_too_small_is_refused_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1, 1, 1000))
    with pytest.raises(RefusedError, match=r"the weights need 0.0 GB, and .* free some space there"):
        stage(source, tmp_path / "local")


def test_a_disk_that_runs_full_meanwhile_is_told_and_the_rest_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StagingError, match="No space left on device; free some space there") as caught:
        stage(source, tmp_path / "local")
    assert caught.value.kind == "quota"
    assert list((tmp_path / "local").rglob("*.partial")) == []


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    ours = tmp_path / "local" / f"agent-infra-{os.getuid()}"
    ours.mkdir(parents=True)
    ours.chmod(0o777)
    with pytest.raises(RefusedError, match="not a directory of yours alone"):
        stage(model(tmp_path), tmp_path / "local")


@pytest.mark.parametrize("below", ["", "mine", "a/b"])
@pytest.mark.parametrize(
    ("owner", "mode", "is_safe"),
    [(0, 0o755, True), (0, 0o1777, True), (0, 0o777, False), (0, 0o775, False), (65534, 0o755, False)],
)
def test_a_folder_is_refused_if_another_user_can_replace_anything_on_the_way_to_it(
    owner: int, mode: int, is_safe: bool, below: str, tmp_path: Path
) -> None:
    if owner and os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    (tmp_path / "local" / below).mkdir(parents=True, mode=0o755)
    (tmp_path / "local").chmod(mode)
    if owner:
        os.chown(tmp_path / "local", owner, -1)
    if is_safe:
        assert stage(model(tmp_path), tmp_path / "local" / below).is_dir()
    else:
        with pytest.raises(StagingError, match=f"replace the weights in .*, because {tmp_path}/local is not yours"):
            stage(model(tmp_path), tmp_path / "local" / below)


def test_a_link_on_the_way_is_followed_once_so_nobody_can_change_it_later(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "disk").mkdir(mode=0o755)
    (tmp_path / "open" / "local").symlink_to(tmp_path / "disk")
    assert stage(model(tmp_path), tmp_path / "open" / "local").is_relative_to(tmp_path / "disk")


def test_folders_that_it_creates_are_its_own_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o002)
    try:
        assert stage(model(tmp_path), tmp_path / "local" / "a" / "b").is_dir()
    finally:
        os.umask(umask)


def test_a_model_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    with pytest.raises(StagingError, match="contains no file; correct model_path") as caught:
        stage(tmp_path / "empty", tmp_path / "local")
    assert caught.value.kind == "model_not_found"


def test_a_source_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path)
    really = os.scandir

    def stale(path: Any) -> Any:
        if Path(path).name == "original":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(StagingError, match="original: Stale file handle; make it readable on this node"):
        stage(source, tmp_path / "local")


def test_a_rank_stages_without_waiting_for_its_head(tmp_path: Path) -> None:
    config = ModelConfig("m", str(model(tmp_path)), stage=str(tmp_path / "local"))
    spec = serve_spec("m-1", config, str(tmp_path), str(tmp_path / "key"))
    (tmp_path / "key").write_text("secret-key")
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "m-1.json").write_text(json.dumps(dataclasses.asdict(spec)))
    signals: Any = SimpleNamespace(is_asked=False, is_urgent=False)
    signals.wait = lambda _: setattr(signals, "is_asked", True)
    watcher: Any = None  # no engine is started
    assert Rank(str(tmp_path), "m-1", 1).run(watcher, signals) == 0
    assert list((tmp_path / "local").rglob("model-1.safetensors"))


@pytest.mark.parametrize(("restarts", "kind"), [("0", "model_not_found"), ("1", "timed_out")])
def test_a_rank_that_cannot_stage_fails_its_replica_and_none_after_a_requeue(
    restarts: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = (sys.executable, "-c", "import time; time.sleep(300)", "{port}", "{model_path}")
    config = ModelConfig("m", str(model(tmp_path)), engine="command", command=engine, stage="$FAST_DISK")
    spec = serve_spec("m-1", config, str(tmp_path), str(tmp_path / "key"))
    spec = dataclasses.replace(spec, nodes=2, load_timeout=0.5 if restarts == "1" else 300.0)
    for folder in ("specs", "replicas", "logs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "key").write_text("secret-key")
    (tmp_path / "specs" / "m-1.json").write_text(json.dumps(dataclasses.asdict(spec)))
    signals: Any = SimpleNamespace(is_asked=False, is_urgent=False, wait=time.sleep)
    with contextlib.closing(Watcher()) as watcher:
        with pytest.raises(StagingError, match="FAST_DISK is not set"):
            Rank(str(tmp_path), "m-1", 1).run(watcher, signals)
        monkeypatch.setenv("FAST_DISK", str(tmp_path / "local"))  # on the head's node it is
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert Replica(spec, "secret-key", watcher, signals).run() == 1
    failure = json.loads((tmp_path / "replicas" / "m-1.json").read_text())["failure"]
    assert failure["kind"] == kind
    if kind == "model_not_found":
        assert failure["line"] == f"on {socket.gethostname()}: stage: $FAST_DISK: FAST_DISK is not set on this node"
        assert failure["hint"] == "name a folder on the nodes' own disks"


def test_a_signal_ends_the_copy_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StagingStopped):
        stage_weights(str(model(tmp_path)), str(tmp_path / "local"), {}, lambda *_: None, lambda: True)
    assert list((tmp_path / "local").rglob("*.partial")) == []


def test_progress_is_told_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "REPORT_S", -1.0)
    told: list[tuple[int, int]] = []
    source = model(tmp_path)
    stage_weights(str(source), str(tmp_path / "local"), {}, lambda *figures: told.append(figures), lambda: False)
    total = sum(each.size for each in list_files(source))
    assert told[-1] == (total, total)
    assert told == sorted(told)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama_cpp", "command"])
def test_every_engine_is_started_with_the_copy(engine: str) -> None:
    command = ("server", "{port}", "--weights={model_path}") if engine == "command" else None
    config = ModelConfig("m", "/shared/qwen", engine=engine, command=command, stage="/local")
    spec = serve_spec("m-1", config, "/run", "/key")
    assert (spec.model_path, spec.stage) == ("/shared/qwen", "/local")
    argv = make_launch(spec, "secret-key", 5900, weights="/local/agent-infra-1/qwen-0").argv
    assert any("/local/agent-infra-1/qwen-0" in word for word in argv)
    assert not any("/shared/qwen" in word or "{model_path}" in word for word in argv)
