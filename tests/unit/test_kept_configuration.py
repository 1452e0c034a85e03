"""The configuration that a deployment keeps for `stop`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from agent_infra import (
    config_from_json,
    load_config,
    saved_config,
)
from agent_infra_core.errors import ConfigError
from agent_infra_core.settings import Config, ModelConfig

ROOT = Path(__file__).parents[2]


def test_a_kept_configuration_is_the_very_one(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "example.yaml")
    model = dataclasses.replace(config.models[0], env={"A": "${NOT_EXPANDED_TWICE}"}, idle_shutdown_minutes=3.0)
    config = dataclasses.replace(config, models=(model,))
    assert config_from_json(json.dumps(dataclasses.asdict(config))) == config


@pytest.mark.parametrize("text", ["", "[]", '{"models": []}', '{"models": [{"name": "m"}]}'])
def test_what_is_no_configuration_is_refused_and_not_taken_up(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        config_from_json(text)


def test_a_configuration_that_was_kept_by_another_version_is_left_alone(tmp_path: Path) -> None:
    from agent_infra_core.fleet.state import DeploymentPaths

    paths = DeploymentPaths(tmp_path)
    assert saved_config(paths) is None
    text = json.dumps({**dataclasses.asdict(Config((ModelConfig("m", "p"),))), "unknown": 1})
    paths.config.write_text(text)
    assert saved_config(paths) is None
