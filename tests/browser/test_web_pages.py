"""Web pages in a real Chromium that call the proxy: one that may, one that may not, and one that rebinds its name."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from program import wait_for
from relay_harness import KEY, Client, RelayProcess, backend

# What a page does: it asks, and reads the answer piece by piece. Returns what it may know of the answer.
ASK = """async ({url, method, headers, body, mode}) => {
  try {
    const answer = await fetch(url, {method, headers, body, mode});
    const pieces = [], decoder = new TextDecoder();
    if (answer.body)
      for (const reader = answer.body.getReader(); ; ) {
        const {done, value} = await reader.read();
        if (done) break;
        pieces.push(decoder.decode(value, {stream: true}));
      }
    return {status: answer.status, text: pieces.join(""), id: answer.headers.get("x-request-id")};
  } catch (error) {
    return {status: 0, text: String(error), id: null};
  }
}"""


class EmptyPage(http.server.BaseHTTPRequestHandler):
    """A web page without anything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Web:
    """A browser, pages of any name that ends in ``.example``, and the proxy that allows one of them."""

    browser: Any
    pages_port: int
    relay: RelayProcess
    engine: FakeEngine

    @property
    def proxy(self) -> str:
        return f"http://127.0.0.1:{self.relay.port}"

    def open(self, name: str, port: int | None = None) -> Any:
        """A page of the site ``name``."""
        tab = self.browser.new_page()
        tab.set_default_timeout(1000 * PATIENCE_S)
        tab.goto(f"http://{name}:{port or self.pages_port}/")
        return tab

    def ask(self, tab: Any, path: str, body: str | None = None, **options: Any) -> dict[str, Any]:
        """What the page gets; ``options`` as fetch() takes them."""
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        call = {"url": self.proxy + path, "method": "POST" if body is not None else "GET", "headers": headers}
        answer: dict[str, Any] = tab.evaluate(ASK, {**call, "body": body, "mode": "cors", **options})
        return answer


@pytest.fixture(scope="module")
def web(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    pages = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyPage)
    threading.Thread(target=pages.serve_forever, args=(0.1,), daemon=True).start()
    folder: Path = tmp_path_factory.mktemp("relay")
    with FakeEngine() as engine, RelayProcess(folder, REFUSALS_LOGGED_A_SECOND=1000) as relay:
        origin = f"http://chat.example:{pages.server_port}"
        relay.controller.send_table([backend(1, engine.port)], proxy={"cors_origins": [origin]})
        yield Web(chromium, pages.server_port, relay, engine)
    pages.shutdown()
    pages.server_close()


CHAT = '{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
STREAM = '{"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": true}'


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {KEY}"}], ids=["without the key", "with the key"])
def test_a_web_ui_that_is_allowed_asks_and_reads_answers_streams_and_refusals(
    web: Web, headers: dict[str, str]
) -> None:
    tab = web.open("chat.example")
    plain = web.ask(tab, "/v1/chat/completions", CHAT, headers=headers)
    assert (plain["status"], '"word0 word1 word2"' in plain["text"]) == (200, True)
    streamed = web.ask(tab, "/v1/chat/completions", STREAM, headers=headers)
    assert (streamed["status"], streamed["text"].endswith("data: [DONE]\n\n")) == (200, True)
    refused = web.ask(tab, "/v1/chat/completions", '{"model": "other"}', headers=headers)
    assert (refused["status"], "does not exist" in refused["text"]) == (404, True)
    assert all(answer["id"] for answer in (plain, streamed, refused))
    tab.close()


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {KEY}"}], ids=["without the key", "with the key"])
def test_another_sites_page_reads_nothing_and_reaches_no_engine(web: Web, headers: dict[str, str]) -> None:
    tab = web.open("attacker.example")
    before = web.engine.call()["requests"]
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/models", None), ("/stats", None)):
        answer = web.ask(tab, path, body, headers=headers)
        assert (answer["status"], "Failed to fetch" in answer["text"]) == (0, True)
    assert web.engine.call()["requests"] == before
    tab.close()


def test_another_sites_page_does_nothing_by_requests_that_browsers_send_unasked(web: Web) -> None:
    tab = web.open("attacker.example")
    before, text = web.engine.call()["requests"], {"Content-Type": "text/plain"}
    refused = web.relay.log().count("a web page of another site")
    for path, body in (("/admin/backends/r1/drain", ""), ("/v1/chat/completions", CHAT)):
        web.ask(tab, path, body, headers=text, mode="no-cors")
    wait_for(lambda: web.relay.log().count("a web page of another site") == refused + 2, "both refusals")
    assert web.engine.call()["requests"] == before
    with Client(web.relay.port) as client:
        assert client.chat().status == 200  # nothing is drained
    tab.close()


def test_a_page_that_gives_its_name_this_machines_address_reads_nothing(web: Web) -> None:
    """DNS rebinding: for the browser, page and proxy are then one site, and it sends no Origin."""
    tab = web.browser.new_page()
    tab.set_default_timeout(1000 * PATIENCE_S)
    shown = tab.goto(f"http://rebind.example:{web.relay.port}/stats")
    assert shown.status == 403
    for path in ("/stats", "/v1/models"):
        call: dict[str, Any] = {"url": path, "method": "GET", "headers": {}, "mode": "cors"}
        answer = tab.evaluate(ASK, call)
        assert (answer["status"], "Host header" in answer["text"]) == (403, True)
    tab.close()
