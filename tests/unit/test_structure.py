"""The house rules that a machine can hold: who imports whom, sizes, and that docs and code say the same."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from patience import PATIENCE_S

import agent_infra
from agent_infra_core.node.failures import FAILURE_SIGNS
from agent_infra_core.settings import (
    ENGINE_NAMES,
    STRATEGY_NAMES,
    AnalysisConfig,
    ClusterConfig,
    ContainerConfig,
    HeadersConfig,
    ModelConfig,
    OtelConfig,
    PartitionConfig,
    ProxyConfig,
    ProxyJobConfig,
    SlurmConfig,
    SshConfig,
)

SOURCE = Path(agent_infra.__file__)
ROOT = SOURCE.parent
CORE = ROOT / "agent_infra_core"
FILES = sorted(CORE.rglob("*.py"))
DOCUMENTATION = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Heading in docs/configuration.md → the settings that its table has.
KINDS = {
    "proxy": ProxyConfig,
    "cluster": ClusterConfig,
    "ssh": SshConfig,
    "slurm": SlurmConfig,
    "partitions": PartitionConfig,
    "proxy_job": ProxyJobConfig,
    "container": ContainerConfig,
    "models": ModelConfig,
    "headers": HeadersConfig,
    "analysis": AnalysisConfig,
    "otel": OtelConfig,
}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [SOURCE, *FILES]}

# Which rooms of the core each room may import from, besides itself. Nobody imports agent_infra, but for one function.
BASE = {"protocol", "settings", "errors"}
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    "settings": {"errors"},
    "host": {"errors"},
    "protocol": {"settings", "errors"},
    "http": BASE,
    "routing": BASE | {"host"},
    "insight": BASE | {"host"},
    "node": BASE | {"host"},
    "relay": BASE | {"host", "http", "routing"},
    "ssh": BASE | {"host", "node"},
    "fleet": BASE | {"host", "node", "ssh"},
    "control": BASE | {"host", "node", "ssh", "fleet", "http", "routing", "insight"},
    "client": {"errors", "settings"},
    "bundle": {"errors", "settings"},
}
UPWARDS = {("client.py", "from_config")}  # (file, function) that may import agent_infra
# Third-party packages that a room may import; the standard library is open to all.
PACKAGES = {
    "host": {"psutil"},
    "insight": {"msgspec", "numpy", "prometheus_client"},
    "fleet": {"requests"},
    "protocol": {"msgspec"},
    "node": {"pynvml", "huggingface_hub", "xllamacpp"},
    "relay": {"gevent", "msgspec"},
    "ssh": {"paramiko", "cryptography"},
}


def room(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, function that imports it or nothing) for every import in a file, wherever it stands."""
    inside = {
        id(node): function.name
        for function in ast.walk(TREES[path])
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(TREES[path]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "agent_infra_core" else [module]
        for name in names:
            yield name, inside.get(id(node), "")


def test_every_room_is_in_the_table() -> None:
    assert {room(path) for path in FILES} == set(MAY_IMPORT)


def test_every_room_imports_only_from_the_rooms_that_the_table_allows() -> None:
    wrong = []
    for path in FILES:
        for module, function in imports(path):
            parts = module.split(".")
            if parts[0] == "agent_infra_core":
                other = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "__init__"
                if other not in MAY_IMPORT[room(path)] | {room(path), "__init__"}:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
            elif parts[0] == "agent_infra" and (path.name, function) not in UPWARDS:
                wrong.append(f"{path.relative_to(ROOT)} imports agent_infra, which is above it")
    assert wrong == []


def test_every_room_imports_only_its_own_packages() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES
        for module, _ in imports(path)
        if (name := module.partition(".")[0]) not in sys.stdlib_module_names
        if name not in {"agent_infra_core", "agent_infra", *PACKAGES.get(room(path), ())}
    ]
    assert wrong == []


def test_no_two_files_of_the_core_import_each_other() -> None:
    """But for annotations: those look at each other under TYPE_CHECKING."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    needs: dict[str, set[str]] = {}
    for name, path in names.items():
        at_runtime = [node for node in TREES[path].body if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = {node.module or "" for node in at_runtime if isinstance(node, ast.ImportFrom)}
        needs[name] = modules & set(names)
    while free := [name for name, others in needs.items() if not others]:
        for name in free:
            del needs[name]
        for others in needs.values():
            others.difference_update(free)
    assert needs == {}


def test_files_and_functions_stay_small() -> None:
    large = []
    for path, tree in TREES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (2600 if path == SOURCE else 700):
            large.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 45:
                    large.append(f"{path.relative_to(ROOT)}: {node.name}: {length} lines")
    assert large == []


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_sections_of_the_program_stand_in_the_designs_order() -> None:
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    found = [
        re.split(r"[:.]", lines[number + 1][2:])[0]
        for number in range(len(lines) - 1)
        if lines[number].startswith("# =====") and lines[number + 1].startswith("# ") and "===" not in lines[number + 1]
    ]
    assert found == ["Configuration", "Job scripts", "SSH forwarding", "The proxy", "Deployment", "Command line"]


def test_only_the_main_programs_exit() -> None:
    """agent_infra.py's, with its word on a missing folder, and that of the archive that unpacks itself."""
    exits = {
        path.name: found
        for path in TREES
        if (found := re.findall(r"sys\.exit\(|raise SystemExit", path.read_text(encoding="utf-8")))
    }
    exits["bundle.py"].remove("sys.exit(")  # in the text of node.pyz's main program
    assert exits == {"agent_infra.py": ["raise SystemExit", "sys.exit("], "bundle.py": ["sys.exit("]}
    assert not any("shell=True" in path.read_text(encoding="utf-8") for path in TREES)


def subparsers(with_roles: bool = False) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    parser = agent_infra.build_parser(with_roles)
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def test_a_role_that_has_a_parser_is_known_as_one() -> None:
    everything, verbs = (set(subparsers(with_roles).choices) for with_roles in (True, False))
    assert everything - verbs == set(agent_infra.ROLES)


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


def parsers_of_the_verbs() -> dict[str, argparse.ArgumentParser]:
    """The verbs that --help shows to people."""
    verbs = subparsers()
    return {choice.dest: verbs.choices[choice.dest] for choice in verbs._choices_actions}


def options_of_the_command_line() -> set[str]:
    """Every verb and long option that --help shows to people."""
    parsers = parsers_of_the_verbs()
    options = {option for parser in parsers.values() for action in parser._actions for option in action.option_strings}
    return {*parsers, *(option for option in options if option.startswith("--") and option != "--help")}


def documentation() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in DOCUMENTATION)


def sections(page: str) -> dict[str, str]:
    """Heading → the text below it, up to the next heading of any level."""
    parts = re.split(r"^#+ (.+)\n", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(section: str) -> list[list[str]]:
    """The cells of every row of a section's tables, without their heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    rules = [number for number, row in enumerate(rows) if set(row[0]) == {"-"}]
    return [row for number, row in enumerate(rows) if number not in rules and number + 1 not in rules]


def test_the_documentation_names_every_verb_flag_and_key() -> None:
    words = set(re.findall(r"`([^`\n]+)`", documentation()))
    spoken = set(re.findall(r"--[a-z][a-z-]+|[a-z_]+", " ".join(words)))
    assert sorted(options_of_the_command_line() - spoken) == []
    for kind in KINDS.values():
        assert sorted({item.name for item in dataclasses.fields(kind)} - spoken) == [], kind.__name__


def test_the_documentation_names_no_verb_and_no_flag_that_does_not_exist() -> None:
    commands = re.findall(r"agent_infra\.pyz? ([^`\n]*)", documentation())
    used = {word for command in commands for word in re.findall(r"^[a-z]+|--[a-z][a-z-]+", command.partition("#")[0])}
    assert sorted(used - options_of_the_command_line() - {"--help", "--version"}) == []


def test_the_documentation_names_every_engine_strategy_and_class_of_failure() -> None:
    configuration = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [name for name in (*ENGINE_NAMES, *STRATEGY_NAMES) if f"`{name}`" not in configuration] == []
    documented = {row[0].strip("`") for row in table(sections("operations.md")["Classes of failure"])}
    assert documented == {sign.kind for sign in FAILURE_SIGNS} | {"timed_out", "unknown"}


def test_every_verb_has_a_section_with_exactly_its_options() -> None:
    documented = sections("commands.md")
    for name, parser in parsers_of_the_verbs().items():
        options = {option for action in parser._actions for option in action.option_strings}
        rows = {option for row in table(documented[name]) for option in re.findall(r"`(--?[a-z-]+)", row[0])}
        assert rows == options - {"-h", "--help", "--config"}, name
        assert ("--config" in options) == (name not in ("bundle", "completion", "init", "launch")), name
    assert sorted(set(documented) - {"Commands"}) == sorted(parsers_of_the_verbs())


def test_every_key_stands_in_its_table_with_its_default() -> None:
    documented = sections("configuration.md")
    for heading, kind in KINDS.items():
        rows = {row[0].strip("`"): row[1].strip("`") for row in table(documented[heading])}
        assert list(rows) == [item.name for item in dataclasses.fields(kind)], heading
        for item in dataclasses.fields(kind):
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            if item.name == "partitions":  # the only key that has a default and may not keep it
                default = dataclasses.MISSING
            if dataclasses.is_dataclass(default):
                assert rows[item.name] == ""
            elif default is dataclasses.MISSING:
                assert rows[item.name] == "required", item.name
            else:
                plain = list(default) if isinstance(default, tuple) else default
                assert yaml.safe_load(rows[item.name]) == plain, item.name


def test_the_readme_and_the_pages_stay_short() -> None:
    lengths = {page.name: len(page.read_text(encoding="utf-8").splitlines()) for page in DOCUMENTATION}
    assert lengths.pop("README.md") <= 250
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_every_relative_link_leads_somewhere() -> None:
    broken = []
    for page in [*DOCUMENTATION, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]:
        for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" in link:
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([^)#\s]+\.md)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in DOCUMENTATION} - {"README.md"}


def test_the_contributors_guide_names_every_file_of_the_core() -> None:
    named = set(re.findall(r"\w+\.py", (ROOT / "CONTRIBUTING.md").read_text()))
    assert sorted({path.name for path in FILES} - {"__init__.py"} - named) == []


def test_the_contributors_guide_names_no_constant_that_does_not_exist() -> None:
    named = set(re.findall(r"`(_?[A-Z]+_[A-Z_]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named
    known = {node.id for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not named - known


def declared_dependencies() -> list[str]:
    declared = re.search(r"\ndependencies = \[\n(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    assert declared is not None
    return re.findall(r'"([^"]+)"', declared[1])


def test_requirements_txt_says_what_pyproject_says() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == declared_dependencies()


def test_the_documented_limits_are_those_of_the_code() -> None:
    import agent_infra
    from agent_infra_core import protocol
    from agent_infra_core.control import reader
    from agent_infra_core.http import events, heads
    from agent_infra_core.insight import tracker
    from agent_infra_core.relay import admission, bodies, book, connection, control, requests, server, sessions, turn
    from agent_infra_core.routing import affinity

    rows = {row[0]: row[1] for row in table(documentation().partition("\n## Limits\n")[2].partition("\n## ")[0])}
    assert {
        "a request's first line": f"{heads.MAX_REQUEST_LINE_BYTES >> 10} KB",
        "a request's head": f"{heads.MAX_HEAD_BYTES >> 10} KB; {connection.HEAD_S:g} s from first to last byte",
        "a body": f"`max_body_mb`; {connection.BODY_S:g} s without a byte",
        "a body of anything but inference": f"{turn.APP_BODY_BYTES >> 10} KB",
        f"JSON values in a body larger than {bodies.HEAVY_BODY_BYTES >> 20} MB": f"{bodies.MAX_SKIPPED_VALUES:,}",
        "all bodies that may still be sent": (
            f"`max_buffered_mb`, of which one client may hold {connection.CLIENT_SHARE * 100:g} %"
        ),
        "time for replicas that answer 429 or 503": (
            f"{admission.PATIENCE_WITH_BUSY_S:g} s; none if their `Retry-After` is longer"
        ),
        "a connection without a request that was let pass": f"{connection.STRANGER_S:g} s",
        "a connection between two requests": f"{connection.IDLE_CLIENT_S:g} s",
        "a replica's head": f"{heads.MAX_HEAD_BYTES >> 10} KB",
        "a non-streaming answer kept for a retry": f"{turn.BUFFERED_ANSWER_BYTES >> 20} MB",
        "a body whose conversation is followed": (
            f"{events.MAX_TRACED_BYTES >> 20} MB and {bodies.MAX_READ_VALUES:,} values"
        ),
        "requests sent again": f"{book.RETRY_SHARE * 100:g} % of all, and {book.RETRY_FLOOR:g} more at the start",
        "a non-streaming answer that is read for the statistics": f"{turn.DIGESTED_ANSWER_BYTES >> 20} MB",
        "an event of a stream that is read": f"{events.MAX_HELD_EVENT_BYTES >> 20} MB",
        "an answer whose conversation is followed": f"{events.MAX_TRACED_BYTES >> 20} MB",
        "answers of `/v1/responses` whose replica is known": f"{sessions.HELD_RESPONSES:,}",
        "bodies that are known when a client library sends them again": f"{protocol.MAX_TRIES:,}",
        "answers by which the session of a turn without a header is found": f"{protocol.MAX_CONVERSATIONS:,}",
        "live sessions in the statistics": f"{tracker.MAX_LIVE_SESSIONS:,}",
        "time in which a turn waits for room in a KV cache": f"{affinity.LONGEST_HOLD_S:g} s",
        "finished turns kept without a controller": (
            f"{control.MAX_BUFFERED_EVENTS:,} and {control.MAX_BUFFERED_BYTES >> 20} MB"
        ),
        "time for the controller to answer": (
            f"{agent_infra.QUESTION_S:g} s; {protocol.HISTORY_QUESTION_S:g} s for the history"
        ),
        "waiting questions about the history": f"{reader.MAX_QUESTIONS}",
        "tasks of a run": f"{protocol.MAX_RUN_TASKS:,}",
        "names of sessions, tasks and clients": f"{requests.MAX_NAME} characters",
        "refusals in the log": f"{server.REFUSALS_LOGGED_A_SECOND} a second",
    }.items() <= rows.items()


FIRST_SAFE_VERSIONS = {  # package → first version without a published advisory
    "flask": (3, 1, 3),  # CVE-2026-27205
    "gevent": (23, 9),  # CVE-2023-41419
    "jinja2": (3, 1, 6),  # CVE-2025-27516
    "marshmallow": (4, 1, 2),  # CVE-2025-68480
    "paramiko": (5, 0),  # CVE-2026-44405
    "requests": (2, 33),  # CVE-2026-25645
}


def test_no_version_with_a_published_advisory_is_accepted() -> None:
    lowest = dict(re.findall(r"^([a-z0-9-]+)>=([\d.]+)", "\n".join(declared_dependencies()), re.M))
    for package, version in FIRST_SAFE_VERSIONS.items():
        assert tuple(map(int, lowest[package].split("."))) >= version, package
