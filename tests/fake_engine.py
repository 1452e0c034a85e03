"""A scriptable engine for tests: a real process with a real socket that does on request what real engines do.

Run it: ``python tests/fake_engine.py [--port N]`` prints its port and serves until it is killed.  What one request
shall do stands in its body, under ``"fake"``; what all of them shall do is set by ``POST /fake`` with the same keys:

``tokens`` (3), ``say`` (in their place), ``calls`` (ids of tool calls), ``delay`` (s before the answer), ``base_s``
with ``each_s`` and ``slots`` (an answer takes base_s + each_s · n seconds with n in the works, ``slots`` of them at
most, as in continuous batching), ``gap`` (s between events), ``hang`` (never answer), ``held`` (answer once ``release``
was set), ``until`` (answer once there is a file of this name), ``held_after`` (that many events and one, go on
likewise), ``status`` (answer with it), ``retry_after``, ``head`` (begin with a header of so many bytes), ``usage``
(stream it even if nobody asked), ``finish_reason``, ``die`` (kill the process: "before" the answer, in its "middle", or
after that many events), ``cut`` (close the connection, likewise; "reset": reset it in the middle of a whole answer),
``no_done``, ``close`` (after the answer, with or without saying so: "silently"), ``linger`` (s between a stream's last
event and its end), ``size`` (bytes of content), ``framing`` ("length", "close", "chunked"), ``split`` (send the answer
in pieces of so many bytes), ``health`` (status of /health), ``health_s`` (that its answer takes), ``load`` (the /load
digest), ``models`` (rows of its list).

``GET /fake`` tells what it saw: requests, aborted (whose client left first), running, probes (of /health, answered),
loads (reads of /load), the heads and the last body, and the seconds that answers took it in all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from patience import PATIENCE_S

CLOSE_S = 5.0  # for a killed engine's port


class ClientLeftError(Exception):
    """The client closed its connection before its answer was complete."""


class Works:
    """Turns that are computed together. Owns the condition on which they wait for each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._done, self._at = 0.0, 0.0  # answers that each of them has got since the start, up to this moment
        self._answer_s = 1.0

    def run(self, base_s: float, each_s: float, slots: int) -> None:
        """Take as long as a turn takes."""
        with self._changed:
            while self._running >= slots:
                self._changed.wait()
            self._advance(+1, base_s, each_s)
            end = self._done + 1.0
            while self._done < end - 1e-9:
                self._changed.wait((end - self._done) * self._answer_s)
                self._advance(0, base_s, each_s)
            self._advance(-1, base_s, each_s)

    def _advance(self, change: int, base_s: float, each_s: float) -> None:
        now = time.monotonic()
        self._done += (now - self._at) / self._answer_s if self._running else 0.0
        self._at, self._running = now, self._running + change
        self._answer_s = base_s + each_s * self._running
        if change:
            self._changed.notify_all()


class Engine:
    """What all connections share; ``lock`` guards every field."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.behaviour: dict[str, Any] = {}
        self.requests = self.running = self.aborted = self.probes = self.loads = self.responses = 0
        self.seconds = 0.0
        self.works = Works()
        self.heads: list[str] = []
        self.body = ""

    def snapshot(self) -> dict[str, Any]:
        with self.lock:
            names = ("requests", "running", "aborted", "probes", "loads", "heads", "body", "seconds")
            return {name: getattr(self, name) for name in names}


class Connection:
    """One client's connection and the thread that serves it."""

    def __init__(self, engine: Engine, sock: socket.socket) -> None:
        self.engine, self.sock, self.buffer = engine, sock, b""
        self.split = 0

    def serve(self) -> None:
        with contextlib.suppress(OSError, ClientLeftError), self.sock:
            while self.serve_one():
                pass

    def serve_one(self) -> bool:
        while b"\r\n\r\n" not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                return False
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        text = head.decode("latin-1")
        length = 0
        for line in text.split("\r\n")[1:]:
            name, _, value = line.partition(":")
            if name.lower() == "content-length":
                length = int(value)
        while len(self.buffer) < length:
            data = self.sock.recv(1 << 20)
            if not data:
                return False
            self.buffer += data
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        method, path, _ = text.split(" ", 2)
        return self.answer(method, path.partition("?")[0], text, body)

    def answer(self, method: str, path: str, head: str, body: bytes) -> bool:
        engine = self.engine
        if path == "/fake":
            if method == "POST":
                with engine.lock:
                    engine.behaviour = json.loads(body)
            self.send_json(200, engine.snapshot())
        elif path == "/health":
            self.pause(engine.behaviour.get("health_s", 0.0))
            self.send_json(engine.behaviour.get("health", 200), {})
            with engine.lock:
                engine.probes += 1
        elif path == "/load":
            with engine.lock:
                engine.loads += 1
            self.send_json(200, engine.behaviour.get("load", {}))
        elif path == "/v1/models":
            self.send_json(200, {"object": "list", "data": engine.behaviour.get("models", [])})
        else:
            with engine.lock:
                engine.requests += 1
                engine.running += 1
                engine.heads = [*engine.heads[-19:], head]
                engine.body = body[:100_000].decode("utf-8", "replace")
            started = time.monotonic()
            try:
                return self.infer(path, body)
            except (OSError, ClientLeftError):
                with engine.lock:
                    engine.aborted += 1
                raise
            finally:
                with engine.lock:
                    engine.running -= 1
                    engine.seconds += time.monotonic() - started
        return "connection: close" not in head.lower()

    def infer(self, path: str, body: bytes) -> bool:
        document = json.loads(body) if body[:1] == b"{" else {}
        how = {**self.engine.behaviour, **document.get("fake", {})}
        self.split = how.get("split", 0)
        if how.get("die") == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if how.get("cut") == "before":
            return False
        if how.get("hang"):
            self.pause(3600.0)
        if "head" in how:
            self.send(b"HTTP/1.1 200 OK\r\nx-long: " + b"x" * how["head"])
        while how.get("held") and not self.engine.behaviour.get("release"):
            self.pause(0.02)
        while "until" in how and not os.path.exists(how["until"]):
            self.pause(0.02)
        self.pause(how.get("delay", 0.0))
        if "base_s" in how:
            self.engine.works.run(how["base_s"], how["each_s"], how["slots"])
        if how.get("status", 200) != 200:
            extra = {"retry-after": str(how["retry_after"])} if "retry_after" in how else {}
            self.send_json(how["status"], {"error": {"message": "as asked", "type": "fake"}}, extra)
        elif document.get("stream") and path == "/v1/responses":
            self.stream_response(self.completion(path, document, how))
        elif document.get("stream"):
            self.stream(document, how)
        else:
            self.send_json(200, self.completion(path, document, how), framing=how.get("framing", "length"), how=how)
        return "close" not in how and how.get("framing") != "close"

    def completion(self, path: str, document: Mapping[str, Any], how: Mapping[str, Any]) -> dict[str, Any]:
        text = "x" * how["size"] if "size" in how else " ".join(f"word{i}" for i in range(how.get("tokens", 3)))
        text = how.get("say", text)
        reason = how.get("finish_reason", "stop")
        if path == "/v1/messages":
            usage = {"input_tokens": 7, "output_tokens": how.get("tokens", 3), "cache_read_input_tokens": 5}
            content = [{"type": "text", "text": text}]
            content += [{"type": "tool_use", "id": name, "name": "run", "input": {}} for name in how.get("calls", ())]
            return {"type": "message", "role": "assistant", "content": content, "usage": usage}
        if path == "/v1/responses":
            return self.response(document, text, how)
        if path == "/v1/embeddings":
            usage = {"prompt_tokens": 7, "total_tokens": 7}
            return {"object": "list", "data": [{"embedding": [0.5] * 8, "index": 0}], "usage": usage}
        message = {"role": "assistant", "content": text, **self.tool_calls(how)}
        return {
            "id": "fake",
            "object": "chat.completion",
            "created": 1,
            "model": document.get("model"),
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": self.usage(how),
            "pid": os.getpid(),
        }

    def response(self, document: Mapping[str, Any], text: str, how: Mapping[str, Any]) -> dict[str, Any]:
        """An answer of /v1/responses, which this engine keeps; 404 for one that continues an answer it doesn't."""
        engine = self.engine
        with engine.lock:
            engine.responses += 1
            name = f"resp_{os.getpid()}_{engine.responses}"
        previous = document.get("previous_response_id")
        if previous is not None and not previous.startswith(f"resp_{os.getpid()}_"):
            return {"error": {"message": f"response {previous} not found", "type": "invalid_request_error"}}
        calls = [{"type": "function_call", "call_id": call, "name": "run"} for call in how.get("calls", ())]
        message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
        usage = {"input_tokens": 7, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 5}}
        return {
            "id": name,
            "object": "response",
            "status": "completed",
            "output": [{"type": "reasoning", "id": "rs_1", "summary": []}, message, *calls],
            "usage": usage,
        }

    def tool_calls(self, how: Mapping[str, Any]) -> dict[str, Any]:
        """The field ``tool_calls`` of a message or a delta, where there is something to call."""
        function = {"name": "run", "arguments": "{}"}
        names = enumerate(how.get("calls", ()))
        calls = [{"index": index, "id": name, "type": "function", "function": function} for index, name in names]
        return {"tool_calls": calls} if calls else {}

    def usage(self, how: Mapping[str, Any]) -> dict[str, Any]:
        tokens = how.get("tokens", 3)
        details = {"cached_tokens": 5}
        return {
            "prompt_tokens": 7,
            "completion_tokens": tokens,
            "total_tokens": 7 + tokens,
            "prompt_tokens_details": details,
        }

    def stream(self, document: Mapping[str, Any], how: Mapping[str, Any]) -> None:
        framing = how.get("framing", "chunked")
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        head += "transfer-encoding: chunked\r\n" if framing == "chunked" else ""
        if "close" in how and how["close"] != "silently":
            head += "connection: close\r\n"
        self.send(head.encode() + b"\r\n")
        words = [f"word{index} " for index in range(how.get("tokens", 3))]
        if "say" in how:
            words = [how["say"][at : at + 5] for at in range(0, len(how["say"]), 5)]
        for index, word in enumerate(words):
            if how.get("die") == index:
                os.kill(os.getpid(), signal.SIGKILL)
            if how.get("cut") == index:
                raise OSError("cut, as asked")
            self.send_event({"delta": {"content": word}, "finish_reason": None}, document, framing)
            self.pause(how.get("gap", 0.0))
            while how.get("held_after") == index and not self.engine.behaviour.get("release"):
                self.pause(0.02)
        if how.get("calls"):
            self.send_event({"delta": self.tool_calls(how), "finish_reason": None}, document, framing)
        self.send_event({"delta": {}, "finish_reason": how.get("finish_reason", "stop")}, document, framing)
        if how.get("usage") or (document.get("stream_options") or {}).get("include_usage"):
            self.send_event(None, document, framing, self.usage(how))
        if not how.get("no_done"):
            self.send_payload(b"data: [DONE]\n\n", framing)
        self.pause(how.get("linger", 0.0))
        if framing == "chunked":
            self.send(b"0\r\n\r\n")

    def stream_response(self, response: Mapping[str, Any]) -> None:
        events: list[dict[str, Any]] = [{"type": "response.created", "response": {**response, "output": []}}]
        for index, item in enumerate(response["output"]):
            texts = [part["text"] for part in item.get("content", ())]
            events += [{"type": "response.output_text.delta", "output_index": index, "delta": text} for text in texts]
            events.append({"type": "response.output_item.done", "output_index": index, "item": item})
        events.append({"type": "response.completed", "response": response})
        self.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in events:
            self.send_payload(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode(), "chunked")
        self.send(b"0\r\n\r\n")

    def send_event(self, choice: Any, document: Mapping[str, Any], framing: str, usage: Any = None) -> None:
        event = {"id": "fake", "object": "chat.completion.chunk", "created": 1, "model": document.get("model")}
        event["choices"] = [] if choice is None else [{"index": 0, **choice}]
        if usage is not None:
            event["usage"] = usage
        self.send_payload(b"data: %b\n\n" % json.dumps(event, separators=(",", ":")).encode(), framing)

    def send_payload(self, payload: bytes, framing: str) -> None:
        self.send(b"%x\r\n%b\r\n" % (len(payload), payload) if framing == "chunked" else payload)

    def send_json(
        self,
        status: int,
        document: Any,
        extra: Mapping[str, str] | None = None,
        framing: str = "length",
        how: Mapping[str, Any] | None = None,
    ) -> None:
        body = json.dumps(document).encode()
        lines = [f"HTTP/1.1 {status} Fake", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in (extra or {}).items()]
        lines += {"length": [f"content-length: {len(body)}"], "chunked": ["transfer-encoding: chunked"]}.get(
            framing, []
        )
        if how and how.get("close") not in (None, "silently"):
            lines.append("connection: close")
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n")
        half = len(body) // 2
        if framing == "chunked":
            self.send_payload(body[:half], framing)
        else:
            self.send(body[:half])
        if how and how.get("cut") == "middle":
            raise OSError("cut, as asked")
        if how and how.get("cut") == "reset":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.pause(0.1)  # so that the half arrives
            raise OSError("reset, as asked")
        if how and how.get("die") == "middle":
            os.kill(os.getpid(), signal.SIGKILL)
        if framing == "chunked":
            self.send_payload(body[half:], framing)
            self.send(b"0\r\n\r\n")
        else:
            self.send(body[half:])

    def send(self, data: bytes) -> None:
        if not self.split:
            self.sock.sendall(data)
            return
        for start in range(0, len(data), self.split):
            self.sock.sendall(data[start : start + self.split])
            time.sleep(0.0002)  # so that the pieces arrive as pieces

    def pause(self, seconds: float) -> None:
        """Wait, but notice at once when the client leaves, as real engines do."""
        if seconds > 0 and select.select([self.sock], [], [], seconds)[0] and not self.sock.recv(1, socket.MSG_PEEK):
            raise ClientLeftError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--behaviour", type=json.loads, default={})
    options = parser.parse_args()
    engine = Engine()
    engine.behaviour = options.behaviour
    listener = socket.create_server(("127.0.0.1", options.port), backlog=512)
    print(listener.getsockname()[1], flush=True)
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=Connection(engine, sock).serve, daemon=True).start()


class FakeEngine:
    """A fake engine as a child process of the test: ``with FakeEngine() as engine: engine.port``."""

    def __init__(self, port: int = 0, **behaviour: Any) -> None:
        command = [sys.executable, __file__, "--port", str(port), "--behaviour", json.dumps(behaviour)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL, and reap. Then its listening socket, which may close a little later, is closed, too."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
            deadline = time.monotonic() + CLOSE_S
            with contextlib.suppress(OSError):  # refused
                while time.monotonic() < deadline:
                    socket.create_connection(("127.0.0.1", self.port), timeout=CLOSE_S).close()

    def call(self, behaviour: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What it saw so far; with ``behaviour``, what it shall do from now on."""
        body = json.dumps(behaviour).encode() if behaviour is not None else b""
        method = "GET" if behaviour is None else "POST"
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as sock:
            head = f"{method} /fake HTTP/1.1\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            sock.sendall(head.encode() + body)
            received = b""
            while data := sock.recv(65536):
                received += data
        answer: dict[str, Any] = json.loads(received.partition(b"\r\n\r\n")[2])
        return answer

    def wait_for(self, what: str, value: int, seconds: float = PATIENCE_S) -> dict[str, Any]:
        """Wait until the count ``what`` is ``value``; AssertionError when it does not come."""
        deadline = time.monotonic() + seconds
        while (seen := self.call())[what] != value:
            assert time.monotonic() < deadline, f"{what} is {seen[what]}, not {value}"
            time.sleep(0.02)
        return seen


if __name__ == "__main__":
    main()
