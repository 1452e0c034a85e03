"""Slurm as other Debian releases have it: a cluster whose daemons, commands and jobs run in a chroot.

Needs root, debootstrap and patchelf, and apt's mirror. A chroot takes a minute to make and 800 MB; it is kept in
AGENT_INFRA_TEST_ROOTS (default /var/tmp/agent-infra-roots) for the next run.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from testbed.slurm import SlurmBed

RELEASES = {"20.11": "bullseye", "24.11": "trixie", "26.05": "forky"}
MINUTES = 900.0
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "openssh-server", "openssh-client", "procps", "python3", "libgomp1")
PYTHON = "/opt/python/bin/python3"  # in a chroot whose own Python is too old
ENGINE = "/opt/engine"  # the embedded engine, for the chroot's Python
# Slurm 23.11 and later refuse these plugins; none is the default.
_FORMER_SETTINGS = re.compile(r"^(AccountingStorageType|SwitchType|JobAcctGatherType)=.*\n", re.MULTILINE)
# Each process gets a mount namespace of its own, so nothing has to be unmounted.
_ENTER = """\
root=$1; shift
for path in /proc /sys /dev "$1"; do mkdir -p "$root$path"; mount --rbind "$path" "$root$path"; done; shift
mkdir -p "$root/run/sshd"
echo "127.0.0.1 localhost $(uname -n)" > "$root/etc/hosts"
exec chroot "$root" "$@"
"""


def missing_parts() -> list[str]:
    """What keeps a chroot from being made here; nothing when all is there."""
    missing = [name for name in ("debootstrap", "patchelf", "munged") if shutil.which(name) is None]
    return missing + ([] if os.getuid() == 0 else ["root"])


def make_root(suite: str) -> Path:
    """The chroot of a Debian release, with Slurm, sshd, a Python and the embedded engine; makes what is missing."""
    folder = Path(os.environ.get("AGENT_INFRA_TEST_ROOTS", "/var/tmp/agent-infra-roots"))
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    root = folder / suite
    with (folder / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / ".complete").exists():
            shutil.rmtree(root, ignore_errors=True)
            _bootstrap(suite, root)
            _install_packages(root)
            version = _python_version(root)
            is_old = version < (3, 10)
            _install_engine(root, sys.version_info[:2] if is_old else version)
            if is_old:
                _copy_python(root)
            (root / ".complete").touch()
    return root


def python_in(root: Path) -> str:
    return PYTHON if (root / PYTHON.lstrip("/")).exists() else "/usr/bin/python3"


def _run(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=MINUTES)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def _bootstrap(suite: str, root: Path) -> None:
    targets = _run("apt-get", "indextargets", "--format", "$(SITE)").splitlines()
    mirror = next(line for line in targets if line.rstrip("/").endswith("/debian"))
    scripts = Path("/usr/share/debootstrap/scripts")
    # A release that is newer than this host's debootstrap and keyring: its script is sid's.
    is_known = (scripts / suite).exists() and suite != "forky"
    words = ["--variant=minbase", *([] if is_known else ["--no-check-gpg"]), suite, str(root), mirror]
    _run("debootstrap", *words, str(scripts / (suite if is_known else "sid")))


def _install_packages(root: Path) -> None:
    for settings in Path("/etc/apt/apt.conf.d").glob("*proxy*"):
        shutil.copy(settings, root / "etc/apt/apt.conf.d")
    for name in ("resolv.conf", "hosts"):
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    dates = 'Acquire::Check-Valid-Until "false";\nAcquire::Check-Date "false";\n'
    (root / "etc/apt/apt.conf.d/99dates").write_text(dates)
    policy = root / "usr/sbin/policy-rc.d"  # packages start no daemons
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    inside = ["unshare", "--mount", "--pid", "--fork", f"--mount-proc={root}/proc", "chroot", str(root)]
    inside += ["env", "DEBIAN_FRONTEND=noninteractive"]
    _run(*inside, "apt-get", "update", "-qq")
    _run(*inside, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES)
    _run(*inside, "apt-get", "clean")


def _python_version(root: Path) -> tuple[int, ...]:
    said = _run("chroot", root, "python3", "-c", "import sys; print(*sys.version_info[:2])")
    return tuple(map(int, said.split()))


def _copy_python(root: Path) -> None:
    """This host's Python with all libraries that it and the engine need, for a chroot whose own is too old."""
    real = Path("/usr/bin/python3").resolve()
    library = Path("/usr/lib") / real.name
    home = root / PYTHON.lstrip("/").removesuffix("/bin/python3")
    (home / "bin").mkdir(parents=True)
    shutil.copy(real, home / "bin" / real.name)
    shutil.copytree(library, home / "lib" / real.name, symlinks=True, ignore_dangling_symlinks=True)
    engine = (root / ENGINE.lstrip("/")).rglob("*.so*")
    linked = _run("ldd", real, *(library / "lib-dynload").glob("*.so"), *engine)
    for needed in set(re.findall(r"^\t(?:.* => )?(/\S+) \(", linked, re.MULTILINE)):
        if not needed.startswith(str(root)):
            shutil.copy(needed, home / "lib")
    loader = Path(_run("patchelf", "--print-interpreter", real).strip()).name
    words = ["--set-interpreter", f"/opt/python/lib/{loader}", "--force-rpath", "--set-rpath", "/opt/python/lib"]
    _run("patchelf", *words, home / "bin" / real.name)
    (home / "bin" / "python3").symlink_to(real.name)
    _run("chroot", root, PYTHON, "-c", "import ssl, sqlite3, ctypes")


def _install_engine(root: Path, version: Sequence[int]) -> None:
    words = ["--quiet", "--target", f"{root}{ENGINE}", "--only-binary=:all:"]
    words += ["--python-version", ".".join(map(str, version)), "--implementation", "cp"]
    _run(sys.executable, "-m", "pip", "install", *words, "xllamacpp")


class ReleaseBed(SlurmBed):
    """A Slurm in the chroot ``root``. What runs there sees the bed's folder, and none of the host's other files."""

    def __init__(self, root: Path, nodes: int = 2) -> None:
        super().__init__(nodes, node_prefix=lambda _: self.prefix)
        self.prefix = ("unshare", "--mount", "sh", "-ec", _ENTER, "sh", str(root), str(self.folder))
        self._controller_prefix = self.prefix
        self.environment["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        path = self.folder / "slurm.conf"
        path.write_text(_FORMER_SETTINGS.sub("", path.read_text()))

    def run(self, *argv: str, check: bool = True, stdin: str = "") -> str:
        return super().run(*self.prefix, *argv, check=check, stdin=stdin)
