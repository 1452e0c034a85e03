"""The API for agents: SessionContext and attach.

Uses the standard library only and never patches the agent's process."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from agent_infra_core.errors import AgentInfraError
from agent_infra_core.settings import DEFAULT_CONFIG, Config, HeadersConfig, proxy_url, shorten

__all__ = ["SessionContext", "attach"]


class ClientError(AgentInfraError, ValueError):
    """A session got an invalid argument or an unsupported client; the message says what is allowed."""


# Printable ASCII without blanks at the ends: no CR or LF reaches the wire, and every HTTP library can encode it.
_HEADER_VALUE = r"[!-~]([ -~]{0,198}[!-~])?"


def _checked_header(what: str, value: str) -> str:
    """Return ``value``. Raises ClientError if it can't be sent as a header."""
    if isinstance(value, str) and re.fullmatch(_HEADER_VALUE, value):
        return value
    allowed = "1 to 200 printable ASCII characters, with no blank at the ends"
    raise ClientError(f"{what}: {shorten(value)} cannot be sent as a header; allowed: {allowed}")


def describe_client() -> str:
    """Return the value of ``X-Client-ID`` for this process: ``user@host:pid command``, at most 200 ASCII characters.

    The part before the first blank identifies the process; the command is for people.
    """
    import getpass
    import platform

    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a uid without a passwd entry; the error type depends on the Python
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    identity = f"{user}@{platform.node()}:{os.getpid()}".replace(" ", "_")
    command = os.path.basename(sys.argv[0] if sys.argv else "") or "python"
    return re.sub(r"[^ -~]", "?", f"{identity} {command}")[:200].strip()


class SessionContext:
    """One session of an agent: headers that identify its requests and report the agent's time between turns.

    *post* is time spent acting on the previous answer, *pre* is time spent observing before the next request.  The
    next request carries both, once: ``get_headers()`` resets them.  Call it once per request and pass the result to
    the SDK as ``extra_headers``; the SDK sends the same headers again when it retries.

    Ids are 1 to 200 printable ASCII characters (ClientError otherwise); ``session_id`` defaults to a new UUID and
    ``client_id`` to ``user@host:pid command``.  ``base_url`` is the OpenAI client's URL; ``close()`` needs it to
    notify the proxy.

    The turns of a session run one after another: threads and tasks may share a context, but not run turns at once.
    """

    def __init__(
        self,
        session_id: str | None = None,
        task_id: str | None = None,
        client_id: str | None = None,
        headers: HeadersConfig = DEFAULT_CONFIG.headers,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
    ) -> None:
        import uuid

        if base_url is not None and not re.match(r"https?://[^/\s]", base_url):
            raise ClientError(f"base_url: found {shorten(base_url)}; allowed: a URL such as http://127.0.0.1:5800/v1")
        self.session_id = _checked_header("session_id", str(uuid.uuid4()) if session_id is None else session_id)
        self._headers = headers
        self._identity = {
            headers.session: self.session_id,
            headers.client: _checked_header("client_id", describe_client() if client_id is None else client_id),
        }
        if task_id is not None:
            self._identity[headers.task] = _checked_header("task_id", task_id)
        self._base_url = base_url
        self._api_key = api_key
        self._closed = False
        self._lock = threading.Lock()  # owns all attributes below
        self._timings_ms: dict[str, float] = {}  # header name → ms, until the next request takes them
        self._open_blocks: list[str] = []  # header names of the open blocks; time counts for the innermost
        self._settled_at = 0.0  # time up to here was added to blocks; monotonic s
        self._answered_at: float | None = None  # end of the latest answer, with attach(); monotonic s

    @classmethod
    def from_config(
        cls,
        config: Config | str | os.PathLike[str] | None = None,
        session_id: str | None = None,
        task_id: str | None = None,
        client_id: str | None = None,
    ) -> SessionContext:
        """Return a session with the header names, address and key from a configuration (or its file).

        With ``proxy.port: 0`` the address isn't known beforehand, so ``close()`` cannot notify the proxy.
        """
        from agent_infra import load_config  # the only upward import: only configuration files need the parser

        loaded = config if isinstance(config, Config) else load_config(config)
        proxy = loaded.proxy
        base_url = f"{proxy_url(proxy.host, proxy.port)}/v1" if proxy.port else None
        return cls(session_id, task_id, client_id, loaded.headers, base_url=base_url, api_key=proxy.api_key)

    def get_headers(self) -> dict[str, str]:
        """Return the headers for the next request and reset the timings."""
        return self._identity | self._take_timings()

    def set_timing(self, pre_ms: float | None = None, post_ms: float | None = None) -> None:
        """Set the next request's timings, in place of those measured by blocks; None leaves a timing unchanged."""
        for name, value in ((self._headers.timing_pre, pre_ms), (self._headers.timing_post, post_ms)):
            if value is None:
                continue
            try:
                is_allowed = 0 <= value < math.inf
            except TypeError:  # not a number
                is_allowed = False
            if not is_allowed:
                raise ClientError(f"{name}: found {shorten(value)}; allowed: milliseconds, 0 or more")
            with self._lock:
                self._timings_ms[name] = float(value)

    def observing(self) -> contextlib.AbstractContextManager[None]:
        """Time a block as *pre*: observing the world before the next request.

        Times of several blocks add up until the next request.  In nested blocks, only the inner one counts.
        """
        return self._timed(self._headers.timing_pre)

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """Time a block as *post*: acting on the previous answer. See ``observing()``."""
        return self._timed(self._headers.timing_post)

    def close(self) -> None:
        """Tell the proxy that the session is over, so that it can free the session's resources at once.

        Only the first call does anything.  Waits at most 2 s, and doesn't raise if the proxy is gone or refuses: the
        proxy ends idle sessions itself.
        """
        with self._lock:
            closed, self._closed = self._closed, True
        if closed or self._base_url is None:
            return
        import http.client
        import urllib.parse
        import urllib.request

        url = urllib.parse.urlsplit(self._base_url)
        session = urllib.parse.quote(self.session_id, safe="")
        key = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        # Ignore http_proxy for the loopback: a forward proxy can't reach this machine's own.
        is_loopback = url.hostname in ("localhost", "::1") or (url.hostname or "").startswith("127.")
        opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * is_loopback)
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            request = urllib.request.Request(  # noqa: S310 (the constructor admits http and https only)
                f"{url.scheme}://{url.netloc}/sessions/{session}/end", method="POST", headers=key
            )
            opener.open(request, timeout=2).close()

    def __enter__(self) -> SessionContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        with self._lock:
            self._settle()
            self._open_blocks.append(name)
        try:
            yield
        finally:
            with self._lock:
                self._settle()
                self._open_blocks.pop()

    def _settle(self) -> float:
        """Add the time since the last call to the innermost open block. Returns monotonic s. Needs the lock."""
        now = time.monotonic()
        if self._open_blocks:
            name = self._open_blocks[-1]
            self._timings_ms[name] = self._timings_ms.get(name, 0.0) + 1000 * (now - self._settled_at)
        self._settled_at = now
        return now

    def _take_timings(self) -> dict[str, str]:
        """Return the timing headers for the next request and reset them; a gap without timings counts as *pre*."""
        with self._lock:
            now = self._settle()
            if not self._timings_ms and self._answered_at is not None:
                self._timings_ms[self._headers.timing_pre] = 1000 * (now - self._answered_at)
            taken, self._timings_ms, self._answered_at = self._timings_ms, {}, None
        return {name: f"{value:.3f}" for name, value in taken.items()}


class _AttachedSession(SessionContext):
    """The session of an OpenAI client, which hooks on its HTTP client send and time. Owns those hooks.

    The client's default headers identify its requests. Clients that share an HTTP client, such as copies by
    ``with_options()``, also share its hooks, so each session's hooks ignore requests without its id.
    """

    def __init__(
        self, client: Any, session_id: str | None, task_id: str | None, client_id: str | None, headers: HeadersConfig
    ) -> None:
        key = client.api_key or None  # empty if the client gets it from a function
        super().__init__(session_id, task_id, client_id, headers, base_url=str(client.base_url), api_key=key)
        self._client = weakref.ref(client)  # weak: the client refers to the hooks, and a cycle delays closing
        self._origin = _origin_of(client.base_url)
        self._headers_before: Mapping[str, Any] = {}
        self._turn = 0
        self._sent: dict[str, str] = {}  # timings of the latest turn; retries by the SDK send them again

    def close(self) -> None:
        client = self._client()
        if client is not None:
            self.detach(client._client)
        super().close()

    def install(self, client: Any) -> None:
        """Add the headers to ``client`` and the hooks to its HTTP client; detaches sessions that this one replaces."""
        hooks = client._client.event_hooks  # change it in place only: another thread may be iterating over it
        for earlier in [getattr(hook, "__self__", None) for hook in hooks["request"]]:
            if isinstance(earlier, _AttachedSession) and earlier._is_replaced_by(client, self.session_id):
                earlier.detach(client._client)
        self._headers_before = client._custom_headers
        client._custom_headers = {**client._custom_headers, **self._identity}
        is_async = hasattr(client._client, "aclose")
        hooks["request"].append(self._before_request_async if is_async else self._before_request)
        hooks["response"].append(self._after_head_async if is_async else self._after_head)

    def detach(self, http_client: Any) -> None:
        """Remove the hooks from ``http_client`` and the headers from the client. Safe to call again."""
        client, was_attached = self._client(), False
        for hooks in http_client.event_hooks.values():
            for hook in [hook for hook in hooks if getattr(hook, "__self__", None) is self]:
                hooks.remove(hook)
                was_attached = True
        if client is not None and was_attached:
            client._custom_headers = self._headers_before

    def _is_replaced_by(self, client: Any, session_id: str) -> bool:
        """Whether attaching ``session_id`` to ``client``, on the same HTTP client, replaces this session."""
        return self._client() in (None, client) or self.session_id == session_id

    def _before_request(self, request: Any) -> None:
        if request.headers.get(self._headers.session) != self.session_id:
            return
        if _origin_of(request.url) != self._origin:  # an absolute URL, a redirect, or a copy with another base_url
            for name in vars(self._headers).values():
                request.headers.pop(name, None)
        elif request.method == "POST" and "agent_infra" not in request.extensions:  # a redirect inherits it
            is_retry = request.headers.get("x-stainless-retry-count", "0") != "0"
            timings = self._take_timings()
            self._sent = self._sent if is_retry else timings
            self._turn += 1
            request.headers.update(self._sent)
            request.extensions = {**request.extensions, "agent_infra": (self, self._turn)}

    def _after_head(self, response: Any) -> None:
        self._watch(response, "close")

    async def _before_request_async(self, request: Any) -> None:
        self._before_request(request)

    async def _after_head_async(self, response: Any) -> None:
        self._watch(response, "aclose")

    def _watch(self, response: Any, closer: str) -> None:
        """Record when the answer ends: reading it to the end or dropping it calls the response's ``closer``."""
        session, turn = response.request.extensions.get("agent_infra", (None, 0))
        if session is not self:
            return

        def close() -> Any:
            vars(response).pop(closer, None)  # restore the class's method; leaves no reference cycle
            self._answered(turn)
            return getattr(response, closer)()

        setattr(response, closer, close)

    def _answered(self, turn: int) -> None:
        with self._lock:
            if turn == self._turn:  # the garbage collector may close an abandoned stream in a later turn
                self._answered_at = self._settled_at = time.monotonic()


def _origin_of(url: Any) -> tuple[str, str, int | None]:
    """Return scheme, host and port of an httpx URL; the port is None if it is the scheme's default."""
    return url.scheme, url.host, url.port


def attach(
    client: Any,
    session_id: str | None = None,
    task_id: str | None = None,
    client_id: str | None = None,
    headers: HeadersConfig = DEFAULT_CONFIG.headers,
) -> SessionContext:
    """Make every request of an ``openai.OpenAI`` or ``AsyncOpenAI`` client (SDK 2 and 3) a turn of one session.

    ::

        with attach(client, task_id="demo") as session:
            client.chat.completions.create(...)

    The time from the end of an answer, streamed or not, to the next request counts as *pre*, unless the agent splits it
    with the session's ``observing()`` and ``acting()`` or with ``set_timing()``.  Copies that ``client.with_options()``
    makes from now on belong to the session too.  Attaching a client again replaces its session; ``close()`` detaches
    it.  Requests to a server other than the client's ``base_url`` carry none of the headers.

    Raises ClientError for any other kind of client.
    """
    hooks = getattr(getattr(client, "_client", None), "event_hooks", None)
    if not isinstance(hooks, dict) or not isinstance(getattr(client, "_custom_headers", None), Mapping):
        kind = f"{type(client).__module__}.{type(client).__qualname__}"
        raise ClientError(
            f"attach() knows openai.OpenAI and openai.AsyncOpenAI of SDK 2 and 3, and {kind} is built differently; "
            "send SessionContext().get_headers() as extra_headers with each request instead"
        )
    session = _AttachedSession(client, session_id, task_id, client_id, headers)
    session.install(client)
    return session
