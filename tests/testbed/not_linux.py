"""The program as on a system without /proc: what it runs sees none, and psutil, which does not need one there, sees it.

Needs root. psutil for Linux reads the real /proc at another place. Calls that no Linux has are not replaced, but for
`sysctl`: who sent on a Unix socket (LOCAL_PEERPID) can't be tried here.
"""

from __future__ import annotations

from pathlib import Path

import agent_infra

_HIDE = """\
mount --rbind /proc "$1"; mount -t tmpfs none /proc; shift
exec "$@"
"""
_AS_ELSEWHERE = """\
import sys
sys.path.insert(0, {root!r})
import psutil
psutil.PROCFS_PATH = {proc!r}
import agent_infra_core.host
agent_infra_core.host.IS_LINUX = False
"""
_SYSCTL = """\
#!/bin/sh
[ "$*" = "-n kern.bootsessionuuid" ] && echo 5B0C2A52-0000-4B0E-8D51-0123456789AB
"""


def not_linux(folder: Path, environment: dict[str, str]) -> tuple[str, ...]:
    """Words to put before a command, which makes its files in ``folder``; changes the environment for it."""
    proc, programs, modules = folder / "proc", folder / "programs", folder / "modules"
    for each in (proc, programs, modules):
        each.mkdir()
    root = str(Path(agent_infra.__file__).parent)
    (modules / "sitecustomize.py").write_text(_AS_ELSEWHERE.format(root=root, proc=str(proc)))
    (programs / "sysctl").write_text(_SYSCTL)
    (programs / "sysctl").chmod(0o755)
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    environment["PYTHONPATH"] = f"{modules}:{environment.get('PYTHONPATH', '')}"
    return ("unshare", "--mount", "sh", "-ec", _HIDE, "sh", str(proc))
