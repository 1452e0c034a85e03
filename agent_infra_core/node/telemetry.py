"""``GET /load`` of `serve`: a summary of the engine's metrics and of NVML, on a separate port."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from agent_infra_core.host import PROBE_TIMEOUT_S
from agent_infra_core.node.gpus import GpuSampler
from agent_infra_core.node.guard import CHALLENGE_PATH, KEY_NEEDED, carries_key, challenge_reply, error_body
from agent_infra_core.node.health import EngineClient
from agent_infra_core.protocol import EngineLoad

DIGEST_MAX_AGE_S = 0.5


class Telemetry:
    """Serves ``GET /load`` and the keyed challenge on its own port, in threads; owns them and the socket."""

    def __init__(self, host: str, key: str, name: str, digest: Callable[[], Mapping[str, Any]]) -> None:
        """``name``: <replica>@<node>, the identity in answers to the challenge."""
        import http.server
        import socketserver

        self._key, self._name, self._digest = key, name, digest
        body = {
            "do_GET": lambda request: self._answer(request),
            "log_message": lambda *_: None,
            "timeout": 30,
            "protocol_version": "HTTP/1.1",
            "wbufsize": -1,  # head and body in one packet: through a tunnel, each costs
        }
        handler = type("LoadHandler", (http.server.BaseHTTPRequestHandler,), body)
        # Not an HTTPServer, which resolves the host's name first.
        family = {"address_family": socket.AF_INET6 if ":" in host else socket.AF_INET}
        self._server = type("LoadServer", (socketserver.ThreadingTCPServer,), family)((host, 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="telemetry", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def _answer(self, request: Any) -> None:
        path, _, query = request.path.partition("?")
        if path == CHALLENGE_PATH:
            status, body = challenge_reply(self._key, f"{self._name}:{self.port}", query)
        elif not carries_key(request.headers.get("Authorization", ""), self._key):
            status, body = 401, KEY_NEEDED
        elif path == "/load":
            status, body = 200, json.dumps(self._digest()).encode()
        else:
            status, body = 404, error_body("only GET /load is served here", "invalid_request_error", "not_found")
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


class LoadSampler:
    """Samples the engine's load and its GPUs; a sample is at most DIGEST_MAX_AGE_S old while the engine answers."""

    def __init__(self, gpus: GpuSampler) -> None:
        self.client: EngineClient | None = None  # of the running engine; set by the main thread
        self._gpus = gpus
        self._lock = threading.Lock()  # one thread at a time queries the engine and NVML
        self._sampled: dict[str, Any] = {}
        self._sampled_at = -math.inf  # monotonic s

    def sample(self) -> Mapping[str, Any]:
        """Return the fields of EngineLoad, ``gpus`` and ``at``; the previous ones if the engine takes too long."""
        if self._lock.acquire(timeout=PROBE_TIMEOUT_S):
            try:
                if time.monotonic() - self._sampled_at > DIGEST_MAX_AGE_S:
                    client = self.client
                    load = (client.load() if client else None) or EngineLoad()
                    gpus = [dataclasses.asdict(gpu) for gpu in self._gpus.sample()]
                    self._sampled = {**dataclasses.asdict(load), "gpus": gpus, "at": time.time()}
                    self._sampled_at = time.monotonic()
            finally:
                self._lock.release()
        return self._sampled
