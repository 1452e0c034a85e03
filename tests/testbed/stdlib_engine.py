"""An OpenAI-shaped server of the standard library for `engine: command`, argv: PORT. POST /behave/... makes it ill."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

is_hung = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    """Chat answers tell who answered; /behave/exit/CODE ends the process, /behave/hang stops all answers."""

    def do_GET(self) -> None:
        while is_hung.is_set():
            time.sleep(0.1)
        self._answer({"status": "ok"})

    def do_POST(self) -> None:
        if self.path.startswith("/behave/exit/"):
            print(self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
            os._exit(int(self.path.rpartition("/")[2]))
        if self.path == "/behave/hang":
            is_hung.set()
        key = os.environ.get("AGENT_INFRA_API_KEY")
        self._answer(
            {
                "pid": os.getpid(),
                "argv": sys.argv[1:],
                "is_key_right": self.headers["Authorization"] == f"Bearer {key}",
                "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            }
        )

    def _answer(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    if os.environ.get("WITH_HELPER"):  # a worker in the engine's process group that does not end by itself
        subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
    time.sleep(float(os.environ.get("LOADING_S", "0")))
    if "FAIL_WITH" in os.environ:
        print(os.environ["FAIL_WITH"], flush=True)
        sys.exit(int(os.environ.get("FAIL_CODE", "1")))
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
