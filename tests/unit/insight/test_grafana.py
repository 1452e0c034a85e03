"""docs/grafana.json: every metric that it names is one of /metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from grafana import DASHBOARD, expressions

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def test_every_metric_of_the_dashboard_is_served() -> None:
    frozen: Any = json.loads((GOLDEN / "frozen" / "metrics.json").read_text(encoding="utf-8"))
    served = set(re.findall(r"agent_infra_\w+", json.dumps(frozen)))
    named = {name for text in expressions() for name in re.findall(r"agent_infra_\w+", text)}
    assert len(named) >= 20
    assert sorted(named - served) == []


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
