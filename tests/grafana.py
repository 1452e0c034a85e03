"""What docs/grafana.json asks of Prometheus."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parent.parent / "docs" / "grafana.json"


def expressions() -> list[str]:
    """Every expression of the dashboard, with Grafana's variables as Prometheus would get them."""
    document: Any = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in document["panels"] for target in panel["targets"]]
    found += [
        re.sub(r"label_values\((.+), \w+\)", r"\1", each["definition"]) for each in document["templating"]["list"][1:]
    ]
    return [re.sub(r"\$(instance|model)", ".*", text.replace("$__rate_interval", "1m")) for text in found]
