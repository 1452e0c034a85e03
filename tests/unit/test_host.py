"""What the machine says of itself, and what it cannot say: here, where the home directory is."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_infra_core.errors import RefusedError
from agent_infra_core.fleet.state import state_home
from agent_infra_core.fleet.weights import model_cache, resolve_model_path
from agent_infra_core.host import LocalCommands, absolute_path, printable_text, private_temp_directory
from agent_infra_core.insight.history import history_path
from agent_infra_core.node.hub import hub_cache, is_in_hub_cache
from agent_infra_core.settings import ModelConfig, SshConfig
from agent_infra_core.ssh.routes import LoginError, read_ssh_config

NOBODY = "~no-such-user-here/file"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs with a number that /etc/passwd does not know."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", dict[int, Any]().__getitem__)


def test_a_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert absolute_path("~/a") == absolute_path("a") == tmp_path / "a"


@pytest.mark.parametrize("find", [state_home, model_cache, hub_cache])
def test_an_empty_home_does_not_mean_the_folder_one_stands_in(
    find: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in find({"HOME": ""}).parents


@pytest.mark.parametrize("find", [state_home, model_cache])
def test_without_a_home_directory_nothing_is_written_elsewhere(
    find: Callable[[dict[str, str]], Path], homeless: None
) -> None:
    with pytest.raises(RefusedError, match=r"^~/\S+: no home directory is known for it; .* or set HOME$"):
        find({})


@pytest.mark.parametrize(
    ("find", "where"),
    [
        (lambda: history_path(NOBODY, Path("unused")), "proxy.history "),
        (lambda: resolve_model_path(ModelConfig("m", NOBODY, engine="vllm"), Path), "model m: model_path "),
    ],
    ids=["proxy.history", "model_path"],
)
def test_the_home_of_a_user_who_does_not_exist_is_refused(find: Callable[[], object], where: str) -> None:
    with pytest.raises(RefusedError, match=f"^{where}{NOBODY}: no home directory is known for it"):
        find()


def test_no_model_is_in_the_cache_of_a_user_without_a_home_directory(homeless: None) -> None:
    assert not is_in_hub_cache("org/model", {})


def test_ssh_goes_on_without_a_home_directory(homeless: None) -> None:
    assert read_ssh_config(SshConfig(host="login")) == ("~/.ssh/config", "")
    with pytest.raises(LoginError, match=f"^cluster.ssh.config_file: {NOBODY} cannot be read: No such file"):
        read_ssh_config(SshConfig(host="login", config_file=NOBODY))


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain “text” – 中文\t1\r\n2", "plain “text” – 中文\t1\r\n2"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("\x9b2J\x85\x7f\r", "\\x9b2J\\x85\\x7f\\x0d"),
    ],
)
def test_a_terminal_gets_no_control_characters(text: str, printed: str) -> None:
    assert printable_text(text) == printed


@pytest.mark.parametrize("spoiled", ["another mode", "a file", "a link", "missing"])
def test_a_directory_under_the_usual_name_that_is_not_ours_alone_blocks_nobody(
    spoiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usual = tmp_path / f"agent-infra-{os.getuid()}"
    if spoiled == "another mode":
        usual.mkdir()
        usual.chmod(0o777)
    elif spoiled == "a file":
        usual.touch()
    elif spoiled == "a link":
        usual.symlink_to(tmp_path)
    found = private_temp_directory()
    assert (found == usual) is (spoiled == "missing")
    assert stat.S_IMODE(found.lstat().st_mode) == 0o700
    assert private_temp_directory() == found  # all processes share their locks


def test_a_streamed_command_that_ends_without_reading_its_input_is_no_error() -> None:
    commands = LocalCommands({"PATH": os.environ["PATH"]})
    assert list(commands.stream(["sh", "-c", "exec <&-; echo done"], b"x" * (1 << 20))) == [b"done\n"]
