"""A stand-in for the Hugging Face hub, spoken to by the real huggingface_hub; argv: none, prints its port."""

from __future__ import annotations

import hashlib
import http.server
import json
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors": b"safetensors" * 1000,
    "pytorch_model.bin": b"the same weights again",
    "original/consolidated.00.pth": b"and again",
}
TOKEN = "hf_the-right-token"


class Handler(http.server.BaseHTTPRequestHandler):
    """org/open is for all, org/gated for who sends TOKEN, everything else does not exist."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        repository = "/".join(path.split("/")[:2])
        if repository == "org/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if repository not in ("org/open", "org/gated"):
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        kind, _, rest = path.removeprefix(repository).strip("/").partition("/")
        if kind == "resolve":
            name = rest.partition("/")[2]
            if name not in FILES:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha256(FILES[name]).hexdigest()
            return self.answer(200, FILES[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if kind == "tree":
            rows = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in FILES.items()]
            return self.answer(200, json.dumps(rows).encode(), {})
        siblings = [{"rfilename": name} for name in FILES]
        return self.answer(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode(), {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
