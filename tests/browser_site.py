"""The page's server as the browser tests meet it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import stats_server as stats
from program import Running


@dataclass
class Site:
    """The page's server and what stands behind it."""

    server: stats.StatsServer
    url: str
    command: Running
    key: str
    browser: Any
    complaints: list[str] = field(default_factory=list)  # of the browser's console

    def open(self, document: Any = None, scheme: str = "light", width: int = 1280, height: int = 900) -> Any:
        """A new viewer of ``document``."""
        if document is not None:
            self.server.document = document
        tab = self.browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        tab.set_default_timeout(15_000)
        tab.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.goto(self.url)
        tab.wait_for_selector("[data-panel=cost], .ai-problem", timeout=60_000)
        return tab
