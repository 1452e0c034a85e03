"""The page's server as the browser tests meet it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import stats_server as stats
from patience import PATIENCE_S
from program import Running


def collect_complaints(tab: Any, complaints: list[str]) -> None:
    """Put into ``complaints`` what the browser's console calls an error."""

    def hear(said: Any) -> None:
        if said.type == "error":
            complaints.append(said.text)

    tab.on("console", hear)
    tab.on("pageerror", lambda error: complaints.append(str(error)))


def wait_text(tab: Any, text: str, selector: str = ".stMainBlockContainer") -> None:
    tab.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)", arg=[selector, text]
    )


def status(tab: Any) -> str:
    """What the status line says."""
    return str(tab.inner_text(".st-key-status"))


@dataclass
class Site:
    """The page's server and what stands behind it."""

    server: stats.StatsServer
    url: str
    command: Running
    key: str
    browser: Any
    complaints: list[str] = field(default_factory=list)  # of the browser's console

    def open(
        self, document: Any = None, scheme: str = "light", width: int = 1280, height: int = 900, **parameters: str
    ) -> Any:
        """A new viewer of ``document``; ``parameters`` of the address, such as tab="Sessions"."""
        if document is not None:
            self.server.show(document)
        tab = self.browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        tab.set_default_timeout(1000 * PATIENCE_S)
        collect_complaints(tab, self.complaints)
        tab.goto(self.url + "".join(f"&{name}={quote(value)}" for name, value in parameters.items()))
        tab.wait_for_selector(".st-key-phases ul")
        return tab
