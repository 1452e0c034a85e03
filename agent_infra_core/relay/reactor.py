"""gevent's event loop, as much of it as the relay uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

READABLE, WRITABLE = 1, 2  # libev's bits


class ClientGone(Exception):  # noqa: N818 - not an error: the client left, and its turn ends with it
    """The client closed its connection, or takes no bytes."""


class Reactor:
    """Imported after the patch. A greenlet waits by parking, and only event-loop callbacks resume it. A wake-up is a
    hint: whoever parked looks again at what it waits for."""

    def __init__(self) -> None:
        import gevent
        import gevent.event
        import gevent.lock
        from gevent.monkey import get_original

        hub = gevent.get_hub()
        self.loop = hub.loop
        self.park: Callable[[], Any] = hub.switch  # run the loop until resumed
        self.current: Callable[[], Any] = gevent.getcurrent
        self.spawn: Callable[..., Any] = gevent.spawn
        self.sleep: Callable[[float], None] = gevent.sleep
        self.new_lock: Callable[[], Any] = gevent.lock.RLock
        self.new_event: Callable[[], Any] = gevent.event.Event
        self.new_result: Callable[[], Any] = gevent.event.AsyncResult
        self.new_socket: Any = get_original("socket", "socket")  # plain, non-blocking: watched by the loop directly

    def watch_reads(self, sock: Any, callback: Callable[[], None]) -> Any:
        """Return a started watcher that calls ``callback`` whenever ``sock`` can be read."""
        watcher = self.loop.io(sock.fileno(), READABLE)
        watcher.start(callback)
        return watcher

    def every(self, seconds: float, callback: Callable[[], None]) -> Any:
        """Return a started timer."""
        timer = self.loop.timer(seconds, seconds)
        timer.start(callback)
        return timer
