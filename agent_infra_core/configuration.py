"""Configuration: YAML → marshmallow → the frozen dataclasses of settings.py."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent_infra_core.errors import ConfigError
from agent_infra_core.fleet.state import DeploymentPaths
from agent_infra_core.settings import (
    _SCALARS,
    DEFAULT_CONFIG,
    RESERVED_DIRECTIVES,
    ClusterConfig,
    Config,
    ContainerConfig,
    HeadersConfig,
    ModelConfig,
    PartitionConfig,
    ProxyConfig,
    Rule,
    SlurmConfig,
    SshConfig,
    _shorten,
)


def load_config(path: str | os.PathLike[str] | None = None) -> Config:
    """Read and validate a YAML configuration.

    Without ``path``: ``./config.yaml`` where there is one, else the embedded default (the packaged model on this
    machine).  ``${NAME}`` in a string is replaced by that environment variable.

    Raises ConfigError, naming every wrong path, when the file cannot be read or does not say a valid configuration.
    """
    if path is None:
        if not Path("config.yaml").exists():
            return DEFAULT_CONFIG
        path = "config.yaml"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ConfigError(f"{path}: cannot be read: {reason}; name a YAML file such as configs/example.yaml") from error
    try:
        return parse_config(text, os.environ)
    except ConfigError as error:
        raise ConfigError(f"{path}:{'' if str(error).startswith(chr(10)) else ' '}{error}") from None


def deployment_of(path: str | os.PathLike[str] | None = None) -> str | None:
    """The ``cluster.name`` of a configuration file that has errors; None where one of them may concern it."""
    try:
        document = _read_yaml(Path(path or "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError):
        return None
    document = _expand_environment(document, os.environ, "", [])
    wrong = _schema_of(Config)().validate(document)
    if wrong.keys() - {"version", "proxy", "models", "headers"}:  # in `cluster`, or a key that may be meant for it
        return None
    name: str = document.get("cluster", {}).get("name", DEFAULT_CONFIG.cluster.name)
    return name


def parse_config(text: str, environment: Mapping[str, str]) -> Config:
    """The configuration that a YAML text says, with ``${NAME}`` taken from ``environment``; raises ConfigError."""
    document = _read_yaml(text)
    if not isinstance(document, dict):
        raise ConfigError("a mapping of keys is needed, such as `models: [...]`; see configs/example.yaml")
    problems: list[str] = []
    return _validated(_expand_environment(document, environment, "", problems), problems)


def config_from_json(text: str) -> Config:
    """The configuration that ``json.dumps(dataclasses.asdict(config))`` wrote; ConfigError when it is none."""
    try:
        return _validated(json.loads(text), [])
    except ValueError as error:
        raise ConfigError(f"not a configuration: {error}") from error


def _validated(document: Any, problems: list[str]) -> Config:
    """The configuration that a document says, unless there are ``problems`` already; raises ConfigError."""
    import marshmallow

    try:
        loaded = _schema_of(Config)().load(document)
    except marshmallow.ValidationError as error:
        problems += _describe_errors(error.messages, "", Config)
        loaded = None
    if loaded is not None and not problems:
        config: Config = _build(Config, loaded)
        problems = list(_contradictions(config))
        if not problems:
            return config
    raise ConfigError("; ".join(problems) if len(problems) == 1 else "\n  " + "\n  ".join(problems))


def _read_yaml(text: str) -> Any:
    """The document in ``text``; a key that stands twice in one mapping is an error, which PyYAML alone lets pass."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        _refuse_duplicates(node)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("not valid YAML: " + " ".join(str(error).split())) from error


def _refuse_duplicates(node: Any) -> None:
    """Raise ConfigError for the first key that a YAML mapping under ``node`` says twice."""
    children = node.value if isinstance(node.value, list) else []
    if node.id == "mapping":
        seen: set[str] = set()
        for key, _ in children:
            if key.value in seen:
                raise ConfigError(f"{key.value}: stands twice (again at line {key.start_mark.line + 1}); delete one")
            seen.add(key.value if isinstance(key.value, str) else "")
        children = [child for _, child in children]
    for child in children:
        _refuse_duplicates(child)


def _expand_environment(value: Any, environment: Mapping[str, str], path: str, problems: list[str]) -> Any:
    """``value`` with ``${NAME}`` replaced in all its strings; a variable that is not set is noted in ``problems``."""
    if isinstance(value, dict):
        return {key: _expand_environment(item, environment, _join(path, key), problems) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_environment(item, environment, _join(path, i), problems) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match[1] not in environment:
            problems.append(f"{path}: the environment variable {match[1]} is not set; export it or write the value")
        return environment.get(match[1], match[0])

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", replace, value)


def _join(path: str, key: object) -> str:
    """``models`` + 0 → ``models[0]``; ``models[0]`` + ``name`` → ``models[0].name``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


# The sections of the configuration by their annotation, and the scalar kinds: what one is called and how it is told.
_SECTIONS: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (
        *(ProxyConfig, SshConfig, PartitionConfig, ContainerConfig, SlurmConfig, ClusterConfig),
        *(ModelConfig, HeadersConfig),
    )
}


def _section_of(annotation: str) -> tuple[type | None, bool]:
    """The section that ``X``, ``X | None`` or ``tuple[X, ...]`` names, and whether it is a list of them."""
    plain = annotation.removesuffix(" | None")
    element = plain.removeprefix("tuple[").removesuffix(", ...]")
    return _SECTIONS.get(element), element != plain


@functools.cache
def _schema_of(kind: type) -> Any:
    """The marshmallow schema class of a configuration dataclass, derived from its annotations and rules."""
    import marshmallow

    entries = {item.name: _field_of(item, marshmallow.fields) for item in dataclasses.fields(kind)}
    entries["error_messages"] = {"unknown": _UNKNOWN_KEY, "type": "a mapping of keys is needed"}
    return types.new_class(f"{kind.__name__}Schema", (marshmallow.Schema,), exec_body=lambda body: body.update(entries))


_UNKNOWN_KEY = "unknown key"


def _field_of(item: dataclasses.Field[Any], fields: Any) -> Any:
    """The marshmallow field for one dataclass field: a section is a nested schema, a scalar is checked by its rule."""
    annotation = str(item.type).removesuffix(" | None")
    is_optional = annotation != str(item.type)
    messages = {"required": "is required", "null": "may not be null; leave it out for its default"}
    options: dict[str, Any] = {
        "required": item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING,
        "error_messages": messages,
    }
    section, is_list = _section_of(annotation)
    if section is not None and is_list:
        messages["invalid"] = "a list is needed, with one entry each"
        return fields.List(fields.Nested(_schema_of(section)), **options)
    if section is not None:
        return fields.Nested(_schema_of(section), allow_none=is_optional, **options)
    check = functools.partial(_check_scalar, annotation, item.metadata.get("rule", Rule()))
    return fields.Raw(validate=check, allow_none=is_optional, **options)


def _check_scalar(annotation: str, rule: Rule, value: Any) -> None:
    """Raise marshmallow's ValidationError when ``value`` has the wrong type or breaks its rule."""
    import marshmallow

    words, is_kind = _SCALARS[annotation]
    if is_kind(value) and rule.accepts(value):
        return
    described = rule.describe()
    bounded = rule.choices is None and not rule.allowed and described
    allowed = f"{words} {described}" if bounded else described or words
    raise marshmallow.ValidationError(f"found {_shorten(value)}; allowed: {allowed}")


def _describe_errors(messages: Any, path: str, kind: type | None) -> Iterator[str]:
    """marshmallow's nested messages as lines ``path: message``; an unknown key names the nearest valid one."""
    if isinstance(messages, list):
        for message in messages:
            yield f"{path}: {message}{_nearest_key(path, kind) if message == _UNKNOWN_KEY else ''}"
        return
    for key, below in messages.items():
        if key == "_schema":
            yield from _describe_errors(below, path, kind)
            continue
        annotation = next((str(f.type) for f in dataclasses.fields(kind or Config) if f.name == key), "")
        inner = kind if isinstance(key, int) else _section_of(annotation)[0]
        yield from _describe_errors(below, _join(path, key), inner if isinstance(below, dict) else kind)


def _nearest_key(path: str, kind: type | None) -> str:
    """``; did you mean strategy?`` for a key that nearly is one of ``kind``, else the list of its keys."""
    import difflib

    names = [item.name for item in dataclasses.fields(kind or Config)]
    near = difflib.get_close_matches(path.rpartition(".")[2], names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sorted(names))}"


def _build(kind: type, loaded: Mapping[str, Any]) -> Any:
    """The frozen dataclass that validated keys say; lists become tuples, whole numbers become floats where due."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        if item.name not in loaded:
            continue
        value = loaded[item.name]
        section, is_list = _section_of(str(item.type))
        if value is None:
            pass
        elif section is not None:
            value = tuple(_build(section, entry) for entry in value) if is_list else _build(section, value)
        elif isinstance(value, list):
            value = tuple(value)
        elif str(item.type).startswith("float"):
            value = float(value)
        values[item.name] = value
    return kind(**values)


def _contradictions(config: Config) -> Iterator[str]:
    """What is wrong with keys that are each valid: lines ``path: message``."""
    if not config.models:
        yield "models: at least one model is needed"
    if config.cluster.type == "local":
        for item in dataclasses.fields(ClusterConfig):
            if item.name not in ("type", "name") and getattr(config.cluster, item.name) != item.default:
                yield f"cluster.{item.name}: belongs to a cluster that is not here; delete it, or set cluster.type"
    else:
        yield from _slurm_contradictions(config.cluster.slurm)
    for index, model in enumerate(config.models):
        path = f"models[{index}]"
        if model.name in [earlier.name for earlier in config.models[:index]]:
            yield f"{path}.name: {model.name} stands twice; every model needs a name of its own"
        if model.engine == "command" and not model.command:
            yield f"{path}.command: is required with engine: command; an argv such as [my-server, --port, '{{port}}']"
        if model.engine != "command" and model.command:
            yield f"{path}.command: belongs to engine: command, not to {model.engine}; delete it or change engine"
        if model.command and not any("{port}" in word for word in model.command):
            yield f"{path}.command: {{port}} must stand in it, so that the server listens where it is looked for"


def _slurm_contradictions(slurm: SlurmConfig) -> Iterator[str]:
    """The same of cluster.slurm."""
    if not slurm.partitions:
        yield "cluster.slurm.partitions: at least one is needed, such as [{name: gpu}]; `sinfo` lists them"
    for index, partition in enumerate(slurm.partitions):
        if partition.name in [earlier.name for earlier in slurm.partitions[:index]]:
            yield f"cluster.slurm.partitions[{index}].name: {partition.name} stands twice"
    scopes = {"cluster.slurm.sbatch": slurm.sbatch}
    scopes |= {f"cluster.slurm.partitions[{i}].sbatch": each.sbatch for i, each in enumerate(slurm.partitions)}
    for path, directives in scopes.items():
        for name in directives:
            if name in RESERVED_DIRECTIVES:
                yield f"{path}.{name}: is set by this program (see the keys of cluster.slurm and of its partitions)"


def kept_config(paths: DeploymentPaths) -> Config | None:
    """The configuration that the deployment was started with; None when nothing, or nothing readable, was kept."""
    with contextlib.suppress(OSError, ConfigError):
        return config_from_json(paths.config.read_text(encoding="utf-8"))
    return None
