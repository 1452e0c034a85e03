"""Stands in for llama.cpp in benchmarks/tunnel_idle.py, so that dozens of idle replicas fit on one small machine."""

import http.server
import threading
import types


class CommonParams(types.SimpleNamespace):
    """Takes every parameter."""

    def __init__(self) -> None:
        super().__init__(model=types.SimpleNamespace(), cpuparams=types.SimpleNamespace())
        self.cpuparams_batch = types.SimpleNamespace()


class Handler(http.server.BaseHTTPRequestHandler):
    """Is healthy, and has nothing to report."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


class Server:
    """Listens where llama.cpp's own server would."""

    def __init__(self, parameters: CommonParams) -> None:
        self._server = http.server.ThreadingHTTPServer((parameters.hostnames[0], parameters.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(3600.0,), daemon=True).start()
