"""The relay's Flask app and its patched entry."""

from __future__ import annotations

import io
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from agent_infra_core import __version__
from agent_infra_core.host import resource
from agent_infra_core.http.errors import error_document, http_phrase
from agent_infra_core.http.heads import INFERENCE_PATHS, RequestHead, split_inference_path
from agent_infra_core.protocol import STATS_PREFIX
from agent_infra_core.relay.events import QUESTION_S

if TYPE_CHECKING:
    from agent_infra_core.relay.server import Relay

STATS_FRESH_S = 1.5  # a /stats document that is older is asked for; while somebody reads them, one comes every second


class RelayApp:
    """The Flask app: all that is not inference. Called with requests that the relay has read already."""

    def __init__(self, relay: Relay) -> None:
        import flask
        from werkzeug.exceptions import HTTPException
        from werkzeug.routing import BaseConverter

        class Anything(BaseConverter):
            """What a client calls its session: whatever it likes, with slashes too."""

            regex, part_isolating = ".+", False

        self._relay, self._flask = relay, flask
        self._wsgi = app = flask.Flask("agent_infra")
        app.url_map.merge_slashes = False
        app.url_map.converters["anything"] = Anything
        for rule, methods, view in (
            ("/", "GET", self._index),
            ("/health", "GET", self._health),
            ("/stats", "GET", self._stats),
            ("/stats/sessions/<anything:session>", "GET", self._session),
            ("/metrics", "GET", self._metrics),
            ("/queue/status", "GET", self._queue_status),
            ("/v1/models", "GET", self._models),
            ("/<path:model>/v1/models", "GET", self._models),
            ("/sessions/<anything:session>/end", "POST", self._end_session),
            ("/admin/backends/<path:backend>/<any(drain, undrain):operation>", "POST", self._drain),
        ):
            app.add_url_rule(rule, view.__name__, view, methods=[methods])
        app.register_error_handler(HTTPException, self._on_http_error)

    def answer(self, request: RequestHead, path: bytes, query: bytes, body: bytes) -> bytes:
        """The whole answer, ready to send."""
        environ = {
            "REQUEST_METHOD": request.method.decode("ascii"),
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": query.decode("latin-1"),
            "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": request.fields.get(b"content-type", b"").decode("latin-1"),
            "SERVER_NAME": "agent-infra",
            "SERVER_PORT": "0",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": False,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        started: list[Any] = []

        def start_response(status: str, fields: list[tuple[str, str]], _error: Any = None) -> None:
            started[:] = status, fields

        parts: Any = self._wsgi(environ, start_response)  # type: ignore[arg-type]  # nobody here writes piecemeal
        content = b"".join(parts)
        if hasattr(parts, "close"):
            parts.close()
        status, fields = started
        kept = [(name, value) for name, value in fields if name.lower() not in ("content-length", "connection")]
        length = {name.lower(): value for name, value in fields}.get("content-length", len(content))  # HEAD: as of GET
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in kept), f"content-length: {length}"]
        if not request.keeps_alive:
            lines.append("connection: close")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (b"" if request.method == b"HEAD" else content)

    def _index(self) -> Any:
        paths = sorted(path.decode() for path in INFERENCE_PATHS)
        rules = sorted(
            f"{method} {rule.rule}"
            for rule in self._wsgi.url_map.iter_rules()
            for method in (rule.methods or set()) & {"GET", "POST"}
            if rule.endpoint != "static"
        )
        return {
            "name": "agent-infra",
            "version": __version__,
            "models": self._relay.models,
            "inference": paths,
            "also": rules,
        }

    def _health(self) -> Any:
        relay = self._relay
        ready = {name: sum(r.accepts_work for r in relay.pools.get(name, ())) for name in relay.models}
        if not any(ready.values()) and relay.loading:
            status = "starting"
        elif all(ready.values()) and all(replica.health != "down" for replica in relay.replicas.values()):
            status = "ok"
        else:
            status = "degraded"
        return {"status": status, "models": {name: {"ready": count} for name, count in ready.items()}}

    def _stats(self) -> Any:
        relay = self._relay
        relay.stats_read += 1
        if relay.stats is None or time.monotonic() - relay.stats[1] > STATS_FRESH_S:
            relay.control.questions.ask("stats")  # the document comes ahead of the answer
        if relay.stats is None:
            return self._unanswered()
        document, at = relay.stats
        age = b'{"snapshot_age_ms":%d,' % ((time.monotonic() - at) * 1000)
        return self._flask.Response(age + document.removeprefix(STATS_PREFIX), mimetype="application/json")

    def _metrics(self) -> Any:
        return self._ask("metrics")

    def _session(self, session: str) -> Any:
        return self._ask("session", session=session[:256])

    def _ask(self, op: str, **details: Any) -> Any:
        """What the controller answers."""
        answer = self._relay.control.questions.ask(op, **details)
        if answer is None:
            return self._unanswered()
        return self._flask.Response(answer["body"], answer["status"], content_type=answer["type"])

    def _unanswered(self) -> Any:
        return self._error(503, f"no controller has answered within {QUESTION_S:g} s; `connect` starts one")

    def _queue_status(self) -> Any:
        return self._relay.book.queue_status()

    def _models(self, model: str | None = None) -> Any:
        names = [name for name in self._relay.models if model in (None, name)]
        if model is not None and not names:
            return self._error(404, f"the model {model[:100]!r} does not exist")
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "agent-infra"} for name in names]
        return {"object": "list", "data": rows}

    def _end_session(self, session: str) -> Any:
        self._relay.book.end_session(session[:256])
        return {"session": session[:256], "noted": True}  # whether it lives is known to the controller alone

    def _drain(self, backend: str, operation: str) -> Any:
        replica = self._relay.replicas.get(backend)
        if replica is None:
            return self._error(
                404, f"there is no backend {backend[:100]!r}; known: {', '.join(self._relay.replicas) or 'none'}"
            )
        replica.override = "draining" if operation == "drain" else "ready"
        replica.update(replica.backend)
        self._relay.control.add_request({"op": operation, "backend": backend})
        return {"backend": backend, "op": operation, "in_flight": replica.in_flight}

    def _error(self, status: int, message: str, is_anthropic: bool = False) -> Any:
        document = error_document(status, message, None, is_anthropic)
        return self._flask.Response(document, status, mimetype="application/json")

    def _on_http_error(self, error: Any) -> Any:
        method, path = self._flask.request.method, self._flask.request.path
        allowed = set(getattr(error, "valid_methods", None) or ())
        if method != "POST" and split_inference_path(path.encode("utf-8", "replace")):  # those are none of Flask's
            allowed = {"POST"}
        fix = f"{'POST' if 'POST' in allowed else 'GET'} it" if allowed else "GET / lists what there is"
        status = 405 if allowed else error.code or 500
        answer = self._error(status, f"{http_phrase(status)}: {method} {path[:100]}; {fix}", "/v1/messages" in path)
        if allowed:
            answer.headers["Allow"] = ", ".join(sorted(allowed))
        return answer


def run_relay(socket_path: str, listener_fd: int) -> int:
    """The relay's entry: serve on the inherited listening socket, controllers at ``socket_path``; its exit code."""
    from gevent import monkey

    monkey.patch_all()  # first of all, before any third-party import: they must see the patched library
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    from agent_infra_core.relay.server import Relay, calm_collector, release_free_memory

    relay = Relay(socket_path, listener_fd, RelayApp)
    calm_collector()
    release_free_memory()
    return relay.run()
