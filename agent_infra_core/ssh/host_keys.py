"""Host keys: reads known_hosts files, scans hosts, and explains unknown and changed keys."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from agent_infra_core.host import CommandRunner, HostUnreachableError
from agent_infra_core.ssh.routes import LoginError, SshRoute


def known_host_keys(text: str, name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (marker, type, base64) for each line of a known_hosts file that matches ``name``; most have no marker."""
    for line in text.splitlines():
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) >= 3 and not words[0].startswith("#") and _names_host(words[0], name):
            yield marker, words[1], words[2]


def _names_host(patterns: str, name: str) -> bool:
    """Whether the first field of a known_hosts line matches ``name``; it may be hashed, or have wildcards and !."""
    import base64
    import fnmatch

    if patterns.startswith("|1|"):
        with contextlib.suppress(ValueError):  # invalid base64: a broken line matches nothing
            salt, digest = (base64.b64decode(part) for part in patterns[3:].split("|"))
            return hmac.compare_digest(hmac.new(salt, name.encode(), "sha1").digest(), digest)
        return False
    # In known_hosts only * and ? are wildcards; [name]:port has literal brackets.
    found = False
    for pattern in patterns.split(","):
        glob = re.sub(r"[\[\]]", lambda bracket: f"[{bracket[0]}]", pattern.removeprefix("!"))
        if fnmatch.fnmatchcase(name.lower(), glob.lower()):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def read_host_keys(route: SshRoute) -> list[tuple[str, str, str]]:
    """Return (marker, type, base64) of all known keys for the host of ``route``. Raises LoginError."""
    found = [("", kind, key) for kind, key in route.host_keys]
    for name in route.known_hosts:
        try:
            text = Path(os.path.expanduser(name)).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LoginError(f"{name} cannot be read: {error.strerror}; make it readable") from error
        found += known_host_keys(text, route.key_name)
    return found


def key_fingerprint(key: str) -> str:
    """Return a base64 key's fingerprint as ssh prints it: ``SHA256:…``."""
    import base64

    digest = hashlib.sha256(base64.b64decode(key)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def explain_unknown_host(route: SshRoute, kind: str, key: str) -> str:
    """Return the message, with the fix, for a host that isn't in known_hosts."""
    file = Path(os.path.expanduser(route.known_hosts[0]))
    return (
        f"host key of {route.key_name} is not known: it shows {kind} {key_fingerprint(key)}. Compare that with what "
        "the administrators publish (there: ssh-keygen -lf /etc/ssh/ssh_host_*.pub); if it is the same, add it:\n"
        f"  echo '{route.key_name} {kind} {key}' >> {shlex.quote(str(file))}"
    )


def explain_changed_host(route: SshRoute, shown: str) -> str:
    """Return the message, with the fix, for a host whose key differs from known_hosts."""
    forget = " && ".join(
        f"ssh-keygen -R {shlex.quote(route.key_name)} -f {shlex.quote(str(path))}"
        for name in route.known_hosts
        if (path := Path(os.path.expanduser(name))).exists()
        and any(known_host_keys(path.read_text(encoding="utf-8", errors="replace"), route.key_name))
    )
    return (
        f"host key of {route.key_name} has changed: it shows {shown}, known_hosts has another. Somebody may be "
        "listening in: ask the cluster's administrators. Only if they confirm the new key, forget the old one:\n"
        f"  {forget or 'ssh-keygen -R ' + shlex.quote(route.key_name)}"
    )


def scan_host_keys(route: SshRoute, runner: CommandRunner) -> list[tuple[str, str]]:
    """Return (type, base64) of a host's keys, as seen from ``runner``'s host; empty if it doesn't answer."""
    done = runner.run(["ssh-keyscan", "-T", "5", "-p", str(route.port), "--", route.host], timeout_s=30.0)
    lines = (line.split() for line in done.output.decode("ascii", "replace").splitlines())
    found = [(words[1], words[2]) for words in lines if len(words) == 3 and not words[0].startswith("#")]
    return sorted(found, key=lambda entry: "ed25519" not in entry[0])


def node_keys(route: SshRoute, login: CommandRunner) -> tuple[tuple[str, str], ...]:
    """Return a compute node's keys as the login host (whose key was checked) sees them; empty if already known."""
    if read_host_keys(route):
        return ()
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", route.host):
        raise LoginError(f"{route.host!r} is not the name of a node")
    keys = scan_host_keys(route, login)
    if not keys:
        raise HostUnreachableError(
            f"no SSH answers on node {route.host}:{route.port}, as the login host sees it. If compute nodes run no "
            "sshd here, set cluster.tunnel to login"
        )
    return tuple(keys)
