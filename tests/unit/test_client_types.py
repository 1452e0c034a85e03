"""The stubs: checked against the running code by stubtest, against its annotations by reading both, and by a user."""

import ast
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import agent_infra

ROOT = Path(agent_infra.__file__).parent
STUBS = ROOT / "agent_infra-stubs"


def run(arguments: list[str], directory: Path, **environment: str) -> str:
    finished = subprocess.run(
        arguments, cwd=directory, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    return finished.stdout + finished.stderr


def signatures(path: Path) -> dict[str, str]:
    """The functions and annotated fields of a module's top level and its classes, without their defaults."""
    found = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    classes += [(f"{item.name}.", item) for item in tree.body if isinstance(item, ast.ClassDef)]
    for prefix, body in classes:
        for item in body.body:
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                item.args.defaults = [ast.Constant(...) for _ in item.args.defaults]
                item.args.kw_defaults = [default and ast.Constant(...) for default in item.args.kw_defaults]
                returns = ast.unparse(item.returns) if item.returns else "nothing said"
                found[prefix + item.name] = f"{type(item).__name__} ({ast.unparse(item.args)}) -> {returns}"
            elif isinstance(item, ast.AnnAssign):
                found[prefix + ast.unparse(item.target)] = ast.unparse(item.annotation)
    return found


def test_the_stubs_agree_with_the_running_code(tmp_path: Path) -> None:
    shutil.copytree(STUBS, tmp_path / "stubs" / "agent_infra")
    output = run(
        [sys.executable, "-m", "mypy.stubtest", "--concise", "agent_infra"],
        tmp_path,
        MYPYPATH=str(tmp_path / "stubs"),
        PYTHONPATH=str(ROOT),
    )
    assert output == ""


def test_the_stubs_say_the_types_that_the_code_says() -> None:
    code = signatures(ROOT / "agent_infra.py")
    stubs = signatures(STUBS / "__init__.pyi")
    assert set(stubs) > {"load_config", "ConnectionManager.start"}
    only_in_stubs = {"ConnectionManager.config"}  # assigned in the constructor
    assert {name: said for name, said in stubs.items() if code.get(name) != said and name not in only_in_stubs} == {}


def test_a_users_file_is_checked_against_the_installed_library(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    shutil.copytree(STUBS, site_packages / STUBS.name)
    shutil.copy(ROOT / "agent_infra.py", site_packages)
    shutil.copytree(ROOT / "agent_infra_core", site_packages / "agent_infra_core")
    user_file = tmp_path / "user.py"
    user_file.write_text('from agent_infra.client import SessionContext\nx: int = SessionContext("s").get_headers()\n')
    output = run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", "venv/bin/python", user_file.name], tmp_path
    )
    assert 'user.py:2: error: Incompatible types in assignment (expression has type "dict[str, str]"' in output
    assert "Found 1 error" in output
