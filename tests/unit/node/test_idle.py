"""Idle shutdown: when an engine counts as idle."""

from __future__ import annotations

import dataclasses

import pytest
from clock import Clock

from agent_infra_core.node.health import IdleWatch
from agent_infra_core.protocol import EngineLoad

IDLE = EngineLoad(running=0, waiting=0, prompt_tokens=10, generation_tokens=5)


def looks(minutes: float | None, *readings: tuple[float, EngineLoad | None]) -> list[bool]:
    """What an IdleWatch says at each (time in s, what the engine says)."""
    clock = Clock(0.0)
    watch = IdleWatch(minutes, clock)
    said = []
    for at, load in readings:
        clock.now = at
        said.append(watch.is_over(lambda load=load: load))  # type: ignore[misc]
    return said


def test_an_engine_without_turns_is_idle_once_the_minutes_are_over() -> None:
    assert looks(1, (0, IDLE), (59, IDLE), (60, IDLE)) == [False, False, True]


@pytest.mark.parametrize(
    "sign",
    [
        dataclasses.replace(IDLE, running=1),
        dataclasses.replace(IDLE, waiting=1),
        dataclasses.replace(IDLE, generation_tokens=6),  # a whole turn between two looks
        dataclasses.replace(IDLE, running=None),
        None,
    ],
)
def test_any_sign_of_a_turn_and_any_silence_starts_the_minutes_anew(sign: EngineLoad | None) -> None:
    assert looks(1, (0, IDLE), (50, sign), (90, sign or IDLE), (100, sign or IDLE))[1:] == [False, False, False]


def test_without_a_limit_the_engine_is_not_even_asked() -> None:
    def never() -> EngineLoad:
        raise AssertionError

    assert IdleWatch(None, Clock(0.0)).is_over(never) is False
