"""docs/grafana.json: every metric that it names is one of /metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from grafana import DASHBOARD, expressions

GOLDEN = Path(__file__).resolve().parents[2] / "golden"

FROZEN: Any = json.loads((GOLDEN / "frozen" / "metrics.json").read_text(encoding="utf-8"))
SAMPLES = {  # of /metrics and their labels; Prometheus adds the instance
    sample: {"instance", *filter(None, labels.split(", "))}
    for metric in FROZEN.values()
    for sample, labels in metric["samples"].items()
}


def test_every_metric_of_the_dashboard_is_served_with_the_labels_that_are_asked_for() -> None:
    selectors = [found for text in expressions() for found in re.findall(r"(agent_infra_\w+)(?:\{([^}]*)\})?", text)]
    assert len({name for name, _ in selectors}) >= 20
    assert sorted({name for name, _ in selectors} - SAMPLES.keys()) == []
    for name, selector in selectors:
        asked = set(re.findall(r"(\w+)=", selector))
        assert asked <= SAMPLES[name], (name, asked)
        assert "instance" in asked or name == "agent_infra_info"


def test_legends_name_labels_that_the_result_has() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    for target in (target for panel in panels for target in panel["targets"]):
        [names] = re.findall(r"sum by \(([^)]*)\)", target["expr"])[:1] or [""]
        labels = set(names.split(", "))
        if "sum" not in target["expr"]:
            labels = SAMPLES[re.findall(r"agent_infra_\w+", target["expr"])[0]]
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
