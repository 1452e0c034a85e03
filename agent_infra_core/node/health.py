"""Queries a running engine: whether it is healthy, whether it is ours, and its load."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent_infra_core.host import http_get, is_only_ours
from agent_infra_core.node.guard import CHALLENGE_PATH, answer_challenge
from agent_infra_core.protocol import EngineLoad, EngineProbe
from agent_infra_core.settings import connect_address

_METRIC_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def read_engine_load(engine: EngineProbe, text: str) -> EngineLoad:
    """Parse an engine's Prometheus page; sums the values of data-parallel engines, but averages kv_usage."""
    wanted = {name for names in engine.metrics.values() for name in names}
    wanted |= {name for name in (engine.cache_info_metric, engine.sleep_metric) if name}
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.splitlines():
        name = re.split(r"[ {]", line, maxsplit=1)[0]
        if name in wanted:
            value = parse_number(line.rpartition(" ")[2])
            if value is not None:
                samples.setdefault(name, []).append((dict(_METRIC_LABEL.findall(line)), value))
    loads: dict[str, Any] = {}
    for key, names in engine.metrics.items():
        values = [value for name in names for _, value in samples.get(name, ())]
        if values:
            loads[key] = sum(values) / len(values) if key == "kv_usage" else int(sum(values))
    caches = [_cache_tokens(labels) for labels, _ in samples.get(engine.cache_info_metric or "", ())]
    awake = [value for labels, value in samples.get(engine.sleep_metric or "", ()) if labels["sleep_state"] == "awake"]
    if caches:
        loads["kv_capacity_tokens"] = sum(caches) or None
    return EngineLoad(**loads, is_sleeping=not all(awake) if awake else None)


def parse_number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        value = float(text)
        return value if math.isfinite(value) else None
    return None


def _cache_tokens(labels: Mapping[str, str]) -> int:
    """Return the capacity of one engine's KV cache in tokens; 0 if unknown. Older vLLM reports only blocks."""
    tokens, blocks, block = (labels.get(key, "") for key in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
    if tokens.isdecimal():
        return int(tokens)
    return int(blocks) * int(block) if blocks.isdecimal() and block.isdecimal() else 0


METRICS_PATH = "/metrics"


@dataclass(frozen=True)
class EngineClient:
    """Queries one running engine; every request has a timeout."""

    engine: EngineProbe
    host: str
    port: int
    key: str
    identity: str = ""

    def answers(self) -> bool:
        """Whether its health probe succeeds."""
        return 200 <= self._get(self.engine.health_path)[0] < self.engine.healthy_below

    def is_ours(self) -> bool:
        """Whether the server on the port knows the key; of an engine that can't prove it, whether we or root run it."""
        if not self.engine.is_guarded:
            return is_only_ours(self.port)
        nonce = os.urandom(16).hex()
        status, body = self._get(f"{CHALLENGE_PATH}?nonce={nonce}")
        return status == 200 and answer_challenge(self.key, f"{nonce}:{self.identity}").encode() in body

    def load(self) -> EngineLoad | None:
        """Return the engine's load; None if it has no metrics or doesn't answer. Another user's server gets no key."""
        if not self.engine.metrics or not is_only_ours(self.port):
            return None
        status, body = self._get(METRICS_PATH, self.key)
        return read_engine_load(self.engine, body.decode("utf-8", "replace")) if status == 200 else None

    def _get(self, path: str, key: str | None = None) -> tuple[int, bytes]:
        return http_get(connect_address(self.host), self.port, path, key)


class IdleWatch:
    """Detects that an engine had no turn for ``minutes``, from its own counters; None: never."""

    def __init__(self, minutes: float | None, clock: Callable[[], float]) -> None:
        self.limit_s = math.inf if minutes is None else minutes * 60
        self._clock = clock
        self._busy_at = clock()
        self._totals: tuple[int | None, ...] = ()

    def is_over(self, load: Callable[[], EngineLoad | None]) -> bool:
        """Check the engine's load and return whether it was idle for too long; missing values count as activity."""
        if self.limit_s == math.inf:
            return False
        now = load()
        totals = (now.prompt_tokens, now.generation_tokens) if now else ()
        if now is None or now.running != 0 or now.waiting != 0 or totals != self._totals:
            self._busy_at = self._clock()
        self._totals = totals
        return self._clock() - self._busy_at >= self.limit_s
