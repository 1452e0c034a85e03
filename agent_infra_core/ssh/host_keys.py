"""Host keys: which ones a known_hosts file promises, and what to do when a host shows another."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from agent_infra_core.host import CommandRunner, HostUnreachableError
from agent_infra_core.ssh.routes import LoginError, SshRoute


def known_host_keys(text: str, name: str) -> Iterator[tuple[str, str, str]]:
    """(marker, type, base64) of the lines of a known_hosts file that speak of ``name``; the marker is mostly empty."""
    for line in text.splitlines():
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) >= 3 and not words[0].startswith("#") and _names_host(words[0], name):
            yield marker, words[1], words[2]


def _names_host(patterns: str, name: str) -> bool:
    """Whether the first field of a known_hosts line means ``name``: plain, hashed, with wildcards, with exceptions."""
    import base64
    import fnmatch

    if patterns.startswith("|1|"):
        with contextlib.suppress(ValueError):  # not base64: a broken line, which names nobody
            salt, digest = (base64.b64decode(part) for part in patterns[3:].split("|"))
            return hmac.compare_digest(hmac.new(salt, name.encode(), "sha1").digest(), digest)
        return False
    # In known_hosts only * and ? are special; brackets stand around a name with a port.
    found = False
    for pattern in patterns.split(","):
        glob = re.sub(r"[\[\]]", lambda bracket: f"[{bracket[0]}]", pattern.removeprefix("!"))
        if fnmatch.fnmatchcase(name.lower(), glob.lower()):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def read_host_keys(route: SshRoute) -> list[tuple[str, str, str]]:
    """(marker, type, base64) of all that is known of the host of ``route``."""
    found = [("", kind, key) for kind, key in route.host_keys]
    for name in route.known_hosts:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LoginError(f"{name} cannot be read: {error.strerror}; make it readable") from error
        found += known_host_keys(text, route.key_name)
    return found


def key_fingerprint(key: str) -> str:
    """``SHA256:…`` of a base64 key, as ssh and administrators write it."""
    import base64

    digest = hashlib.sha256(base64.b64decode(key)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def explain_unknown_host(route: SshRoute, kind: str, key: str) -> str:
    """What to do about a host that known_hosts does not know."""
    file = Path(route.known_hosts[0]).expanduser()
    return (
        f"host key of {route.key_name} is not known: it shows {kind} {key_fingerprint(key)}. Compare that with what "
        "the administrators publish (there: ssh-keygen -lf /etc/ssh/ssh_host_*.pub); if it is the same, add it:\n"
        f"  echo '{route.key_name} {kind} {key}' >> {shlex.quote(str(file))}"
    )


def explain_changed_host(route: SshRoute, shown: str) -> str:
    """What to do about a host whose key is not the one that known_hosts has."""
    forget = " && ".join(
        f"ssh-keygen -R {shlex.quote(route.key_name)} -f {shlex.quote(str(path))}"
        for name in route.known_hosts
        if (path := Path(name).expanduser()).exists()
        and any(known_host_keys(path.read_text(encoding="utf-8", errors="replace"), route.key_name))
    )
    return (
        f"host key of {route.key_name} has changed: it shows {shown}, known_hosts has another. Somebody may be "
        "listening in: ask the cluster's administrators. Only if they confirm the new key, forget the old one:\n"
        f"  {forget or 'ssh-keygen -R ' + shlex.quote(route.key_name)}"
    )


def scan_host_keys(route: SshRoute, runner: CommandRunner) -> list[tuple[str, str]]:
    """(type, base64) of the keys that a host shows to ``runner``'s host; none where it does not answer."""
    done = runner.run(["ssh-keyscan", "-T", "5", "-p", str(route.port), "--", route.host], timeout_s=30.0)
    lines = (line.split() for line in done.output.decode("ascii", "replace").splitlines())
    found = [(words[1], words[2]) for words in lines if len(words) == 3 and not words[0].startswith("#")]
    return sorted(found, key=lambda entry: "ed25519" not in entry[0])


def node_keys(route: SshRoute, login: CommandRunner) -> tuple[tuple[str, str], ...]:
    """The keys of a compute node unknown to known_hosts, as the login host sees them, whose own key was checked."""
    if read_host_keys(route):
        return ()
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", route.host):
        raise LoginError(f"{route.host!r} is no name of a node")
    keys = scan_host_keys(route, login)
    if not keys:
        raise HostUnreachableError(
            f"no SSH answers on node {route.host}:{route.port}, as the login host sees it. If compute nodes run no "
            "sshd here, set cluster.tunnel to login"
        )
    return tuple(keys)
