"""What an agent imports: SessionContext and attach.

Standard library only, and it never patches the host process."""

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
    """What an agent asked of its session cannot be done; the message says what is allowed."""


# Printable ASCII, no blank at the ends: no CR or LF reaches the wire, and every HTTP library can encode it.
_HEADER_VALUE = r"[!-~]([ -~]{0,198}[!-~])?"


def _checked_header(what: str, value: str) -> str:
    """``value`` if it can be sent as a header, else ClientError."""
    if isinstance(value, str) and re.fullmatch(_HEADER_VALUE, value):
        return value
    allowed = "1 to 200 printable ASCII characters, with no blank at the ends"
    raise ClientError(f"{what}: {shorten(value)} cannot be sent as a header; allowed: {allowed}")


def describe_client() -> str:
    """Who this process is, as ``X-Client-ID`` says it: ``user@host:pid command``, at most 200 ASCII characters.

    The part before the first blank identifies the process; the command is there for people.
    """
    import getpass
    import platform

    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's uid without a passwd entry; the kind depends on the Python
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    identity = f"{user}@{platform.node()}:{os.getpid()}".replace(" ", "_")
    command = os.path.basename(sys.argv[0] if sys.argv else "") or "python"
    return re.sub(r"[^ -~]", "?", f"{identity} {command}")[:200].strip()


class SessionContext:
    """One session of an agent: the headers that say whose turn a request is, and how long the agent observed and acted.

    *post* is acting on the previous answer, *pre* is observing before the next request; both travel with that next
    request, once.  ``get_headers()`` therefore spends them: call it once a request and hand the result to the SDK as
    ``extra_headers``, which sends the same headers again when it retries.

    Ids are 1 to 200 printable ASCII characters (ClientError otherwise); ``session_id`` defaults to a fresh UUID and
    ``client_id`` to ``user@host:pid command``.  ``base_url`` is the URL that the OpenAI client got; with it ``close()``
    can tell the proxy that the session is over.

    A session is one line of turns: threads and tasks may take turns on one context, not run turns at once.
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
        self._lock = threading.Lock()  # owns all below
        self._timings_ms: dict[str, float] = {}  # by header name, until the next request takes them
        self._open_blocks: list[str] = []  # header names of the blocks entered and not left; time goes to the innermost
        self._settled_at = 0.0  # up to when time was given to blocks; monotonic s
        self._answered_at: float | None = None  # end of the latest answer, where attach() sees it; monotonic s

    @classmethod
    def from_config(
        cls,
        config: Config | str | os.PathLike[str] | None = None,
        session_id: str | None = None,
        task_id: str | None = None,
        client_id: str | None = None,
    ) -> SessionContext:
        """A session with the header names, the address and the key that a configuration (or its file) says.

        With ``proxy.port: 0`` the address is known to nobody beforehand, and ``close()`` has nobody to tell.
        """
        from agent_infra import load_config  # the one look upwards: a program that reads no file needs no parser

        loaded = config if isinstance(config, Config) else load_config(config)
        proxy = loaded.proxy
        base_url = f"{proxy_url(proxy.host, proxy.port)}/v1" if proxy.port else None
        return cls(session_id, task_id, client_id, loaded.headers, base_url=base_url, api_key=proxy.api_key)

    def get_headers(self) -> dict[str, str]:
        """The headers of the next request; the timings among them are spent by this call."""
        return self._identity | self._take_timings()

    def set_timing(self, pre_ms: float | None = None, post_ms: float | None = None) -> None:
        """Say the next request's timings, in place of what the blocks measured; None leaves one as it is."""
        for name, value in ((self._headers.timing_pre, pre_ms), (self._headers.timing_post, post_ms)):
            if value is None:
                continue
            try:
                is_allowed = 0 <= value < math.inf
            except TypeError:  # no number at all
                is_allowed = False
            if not is_allowed:
                raise ClientError(f"{name}: found {shorten(value)}; allowed: milliseconds, 0 or more")
            with self._lock:
                self._timings_ms[name] = float(value)

    def observing(self) -> contextlib.AbstractContextManager[None]:
        """Time a block as *pre*: looking at the world before the next request.

        Blocks add up until a request takes them.  Inside another block, time belongs to the inner one only.
        """
        return self._timed(self._headers.timing_pre)

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """Time a block as *post*: acting on the previous answer. See ``observing()``."""
        return self._timed(self._headers.timing_post)

    def close(self) -> None:
        """Tell the proxy that the session is over; what it holds for the session is free at once.

        Done once, later calls do nothing.  Never raises because the proxy is gone or refuses (it ends idle sessions by
        itself), and waits for it 2 s at most.
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
        # http_proxy is for the way out: a forward proxy never reaches this machine's own loopback.
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
        """Give the time since the last call to the innermost open block, and return the time; the lock is held."""
        now = time.monotonic()
        if self._open_blocks:
            name = self._open_blocks[-1]
            self._timings_ms[name] = self._timings_ms.get(name, 0.0) + 1000 * (now - self._settled_at)
        self._settled_at = now
        return now

    def _take_timings(self) -> dict[str, str]:
        """The timing headers of the next request, spent by this call; a gap that nobody split counts as *pre*."""
        with self._lock:
            now = self._settle()
            if not self._timings_ms and self._answered_at is not None:
                self._timings_ms[self._headers.timing_pre] = 1000 * (now - self._answered_at)
            taken, self._timings_ms, self._answered_at = self._timings_ms, {}, None
        return {name: f"{value:.3f}" for name, value in taken.items()}


class _AttachedSession(SessionContext):
    """The session of an OpenAI client that is sent and timed by hooks on the client's HTTP client; owns those hooks.

    Who a request belongs to is said by the client's own default headers: clients that share one HTTP client (copies by
    ``with_options()`` do) share its hooks too, and each session's hook leaves alone what does not carry its id.
    """

    def __init__(
        self, client: Any, session_id: str | None, task_id: str | None, client_id: str | None, headers: HeadersConfig
    ) -> None:
        key = client.api_key or None  # empty where the client asks a function for it
        super().__init__(session_id, task_id, client_id, headers, base_url=str(client.base_url), api_key=key)
        self._client = weakref.ref(client)  # weak, as the client holds the hooks: no cycle keeps its sockets open
        self._origin = _origin_of(client.base_url)
        self._headers_before: Mapping[str, Any] = {}
        self._turn = 0
        self._sent: dict[str, str] = {}  # timings of the latest turn; the SDK's retry of it sends them again

    def close(self) -> None:
        client = self._client()
        if client is not None:
            self.detach(client._client)
        super().close()

    def install(self, client: Any) -> None:
        """Put the headers on ``client`` and the hooks on its HTTP client, in the place of sessions that were there."""
        hooks = client._client.event_hooks  # changed in place only: another thread may be going through them
        for earlier in [getattr(hook, "__self__", None) for hook in hooks["request"]]:
            if isinstance(earlier, _AttachedSession) and earlier._is_replaced_by(client, self.session_id):
                earlier.detach(client._client)
        self._headers_before = client._custom_headers
        client._custom_headers = {**client._custom_headers, **self._identity}
        is_async = hasattr(client._client, "aclose")
        hooks["request"].append(self._before_request_async if is_async else self._before_request)
        hooks["response"].append(self._after_head_async if is_async else self._after_head)

    def detach(self, http_client: Any) -> None:
        """Take the hooks off ``http_client`` and the headers off the client; harmless when they are off already."""
        client, was_attached = self._client(), False
        for hooks in http_client.event_hooks.values():
            for hook in [hook for hook in hooks if getattr(hook, "__self__", None) is self]:
                hooks.remove(hook)
                was_attached = True
        if client is not None and was_attached:
            client._custom_headers = self._headers_before

    def _is_replaced_by(self, client: Any, session_id: str) -> bool:
        """Whether attaching ``session_id`` to ``client``, on the same HTTP client, leaves nothing for this session."""
        return self._client() in (None, client) or self.session_id == session_id

    def _before_request(self, request: Any) -> None:
        if request.headers.get(self._headers.session) != self.session_id:
            return
        if _origin_of(request.url) != self._origin:  # an absolute URL, a redirect, a copy with another base_url
            for name in vars(self._headers).values():
                request.headers.pop(name, None)
        elif request.method == "POST" and "agent_infra" not in request.extensions:  # it is in those of a redirect
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
        """Note the end of the answer: whoever reads it, or gives it up, calls the response's ``closer``."""
        session, turn = response.request.extensions.get("agent_infra", (None, 0))
        if session is not self:
            return

        def close() -> Any:
            vars(response).pop(closer, None)  # the class's own method again, and no cycle
            self._answered(turn)
            return getattr(response, closer)()

        setattr(response, closer, close)

    def _answered(self, turn: int) -> None:
        with self._lock:
            if turn == self._turn:  # a stream left open may be closed, by the garbage collector, in a later turn
                self._answered_at = self._settled_at = time.monotonic()


def _origin_of(url: Any) -> tuple[str, str, int | None]:
    """What tells one server from another in an httpx URL, which has no port where it is the scheme's own."""
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

    The gap between the end of an answer and the next request is measured here, streams included, and counts as *pre*,
    unless the agent split it with the session's ``observing()`` and ``acting()`` or ``set_timing()``.  Copies made by
    ``client.with_options()`` from now on belong to the session too.  Attaching a client again replaces its session;
    ``close()`` detaches it.  Requests to another server than the client's ``base_url`` carry none of the headers.

    Raises ClientError where the client is of another kind.
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
