"""A Slurm with accounting: MariaDB and slurmdbd, and limits that are enforced. Debian's slurmdbd and mariadb-server."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from testbed.ports import free_port
from testbed.slurm import SlurmBed, missing_programs

PROGRAMS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db", "mariadb")
NONE = "AccountingStorageType=accounting_storage/none"
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.sock
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu"""
SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
"""


def missing_accounting() -> list[str]:
    """What keeps such a Slurm from being started here; nothing when all is there."""
    return missing_programs() + [name for name in PROGRAMS if shutil.which(name) is None]


class AccountedBed(SlurmBed):
    """A SlurmBed with an account for root, ``proj``, and whatever else ``sacctmgr`` is told before the controller."""

    def __init__(self, told: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self._told = told
        self._port, self._database_port, self._password = free_port(), free_port(), secrets.token_hex(8)
        path = self.folder / "slurm.conf"
        path.write_text(path.read_text().replace(NONE, ACCOUNTING.format(folder=self.folder, port=self._port)))

    def start_controller(self) -> None:
        """With the database before it, the first time."""
        if "slurmdbd" not in self._daemons:
            self._start_database()
        super().start_controller()

    def _start_database(self) -> None:
        data = self.folder / "data"
        data.mkdir()
        shutil.chown(data, "mysql")
        words = ["--no-defaults", "--user=mysql", f"--datadir={data}"]
        self.run("mariadb-install-db", *words, "--auth-root-authentication-method=normal", "--skip-test-db")
        words += [f"--socket={data}/my.sock", f"--pid-file={data}/my.pid", "--bind-address=127.0.0.1"]
        words += [f"--port={self._database_port}", "--skip-name-resolve", "--innodb-buffer-pool-size=64M"]
        words += ["--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0", "--performance-schema=off"]
        self._spawn("mariadbd", ["mariadbd", *words])
        client, socket = ("mariadb", "--no-defaults", "-uroot"), data / "my.sock"
        self._wait(lambda: self._succeeds(*client, "-S", str(socket), "-e", "select 1"), "mariadbd", 120.0)
        grant = f"create user slurm@127.0.0.1 identified by '{self._password}'; create database slurm_acct_db; "
        self.run(*client, "-S", str(socket), "-e", grant + "grant all on slurm_acct_db.* to slurm@127.0.0.1")
        path = self.folder / "slurmdbd.conf"
        path.touch(mode=0o600)
        ports = {"port": self._port, "database_port": self._database_port}
        path.write_text(SLURMDBD.format(folder=self.folder, password=self._password, **ports))
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        self._wait(lambda: self._succeeds("sacctmgr", "-n", "show", "cluster"), "slurmdbd", 120.0)
        for line in ("add cluster bed", "add account proj", "add user root account=proj", *self._told):
            self.run("sacctmgr", "-i", *line.split())

    def _succeeds(self, *argv: str) -> bool:
        return subprocess.run(argv, env=self.environment, capture_output=True, timeout=60.0).returncode == 0


@contextmanager
def accounted_bed(*told: str, **options: Any) -> Iterator[AccountedBed]:
    """A running one, ended afterwards whatever happened; ``told`` are lines for sacctmgr."""
    bed = AccountedBed(told, **options)
    try:
        bed.start()
        yield bed
    finally:
        bed.close()
