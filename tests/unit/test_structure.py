"""The house rules that a machine can hold: reading order, sizes, and that docs and code say the same."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from patience import PATIENCE_S

import agent_infra
from agent_infra_core.settings import (
    ClusterConfig,
    ContainerConfig,
    HeadersConfig,
    ModelConfig,
    PartitionConfig,
    ProxyConfig,
    SlurmConfig,
    SshConfig,
)

SOURCE = Path(agent_infra.__file__)
ROOT = SOURCE.parent
TEXT = SOURCE.read_text()
TREE = ast.parse(TEXT)


def banners() -> list[tuple[int, str]]:
    """(line, name) of every section, in order."""
    lines = TEXT.splitlines()
    return [
        (number, re.split(r"[:(]", lines[number][2:])[0].strip())
        for number in range(1, len(lines))
        if lines[number - 1].startswith("# =====") and lines[number].startswith("# ")
    ]


def top_level() -> Iterator[tuple[str, ast.stmt]]:
    """Every name that the module defines, with the statement that does; imports are above everything."""
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node


def local_names(statement: ast.stmt) -> set[str]:
    """Arguments, fields and variables of a function or class: they may be called what something further down is."""
    if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return set()
    nodes = list(ast.walk(statement))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in nodes if isinstance(node, ast.arg)}


def test_sections_stand_in_the_designs_order() -> None:
    order = ["Errors", "Configuration", "Templates", "Engines", "Routing", "Wire", "Tracking", "Analysis", "History"]
    order += ["Node", "Clusters", "Tunnels", "Relay", "Controller", "Orchestration", "Client", "Command line"]
    found = [name for _, name in banners()]
    assert found == [name for name in order if name in found]
    assert len(found) >= 10


def test_every_section_refers_only_to_sections_above_it() -> None:
    starts = [line for line, _ in banners()]

    def section(line: int) -> int:
        return sum(start <= line for start in starts)

    defined = {name: section(node.lineno) for name, node in top_level()}
    upward = [
        f"line {node.lineno}: {node.id} is defined further down"
        for statement in TREE.body
        if not isinstance(statement, ast.If)  # the __main__ guard
        for local in [local_names(statement)]
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and node.id not in local
        if defined.get(node.id, 0) > section(node.lineno)
    ]
    assert upward == []


def test_functions_and_classes_stay_small() -> None:
    large = []
    for node in ast.walk(TREE):
        limit = {ast.FunctionDef: 45, ast.AsyncFunctionDef: 45, ast.ClassDef: 210}.get(type(node))
        if limit and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > limit:
                large.append(f"{node.name}: {length} lines")
    assert large == []


def test_only_main_exits() -> None:
    exits = re.findall(r"sys\.exit\(|raise SystemExit", TEXT)
    assert exits == ["sys.exit("]  # the __main__ guard
    assert "shell=True" not in TEXT


def test_importing_the_module_and_help_load_nothing_heavy() -> None:
    heavy = "gevent flask paramiko asyncio sqlite3 yaml marshmallow "
    heavy += "requests rich msgspec numpy prometheus_client http.server urllib.request"
    program = (
        "import sys, agent_infra\n"
        "try: agent_infra.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"found = [name for name in {heavy.split()!r} if name in sys.modules]\n"
        "sys.stdout.flush(); sys.exit(f'loaded: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def test_a_bare_python_without_site_packages_imports_the_module() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import agent_infra; agent_infra.build_parser()"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, timeout=PATIENCE_S)


def options_of_the_command_line() -> set[str]:
    """Every verb and option that --help shows to people."""
    import argparse

    parser = agent_infra.build_parser()
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    shown = {choice.dest for choice in verbs._choices_actions}
    found = set(shown)
    for name in shown:
        for action in verbs.choices[name]._actions:
            found.update(option for option in action.option_strings if option.startswith("--") and option != "--help")
    return found


def test_the_readme_names_every_verb_flag_and_key() -> None:
    import dataclasses

    readme = (ROOT / "README.md").read_text()
    words = set(re.findall(r"`([^`\n]+)`", readme))
    spoken = set(re.findall(r"--[a-z][a-z-]+|[a-z_]+", " ".join(words)))
    assert sorted(options_of_the_command_line() - spoken) == []
    for kind in (
        ProxyConfig,
        SshConfig,
        PartitionConfig,
        ContainerConfig,
        SlurmConfig,
        ClusterConfig,
        ModelConfig,
        HeadersConfig,
    ):
        assert sorted({item.name for item in dataclasses.fields(kind)} - spoken) == [], kind.__name__


def test_the_readme_names_no_flag_that_does_not_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"agent_infra\.py [^`\n]*", readme)
    flags = {flag for command in commands for flag in re.findall(r"(--[a-z][a-z-]+)", command)}
    assert sorted(flags - options_of_the_command_line() - {"--help", "--version"}) == []


def test_requirements_txt_says_what_pyproject_says() -> None:
    declared = re.search(r"\ndependencies = \[\n(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    assert declared is not None
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == re.findall(r'"([^"]+)"', declared[1])
