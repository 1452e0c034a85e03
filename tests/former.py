"""Version 0.1.0 of the program and what it left on disk, as tests/golden/v0.1.0/ keeps them: neither ever changes."""

from __future__ import annotations

import lzma
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORMER = ROOT / "tests" / "golden" / "v0.1.0"
# What stands in the kept files for the folder that the deployment ran in, and for the machine.
FOLDER, HOST = "@FOLDER@", "@HOST@"


def unpack_former(folder: Path) -> Path:
    """Put 0.1.0's program into ``folder``, with the folders that it needs beside it; the path of the program."""
    program = folder / "agent_infra.py"
    program.write_bytes(lzma.decompress((FORMER / "agent_infra.py.xz").read_bytes()))
    for name in ("configs", "slurm_templates"):
        shutil.copytree(ROOT / name, folder / name)
    return program


def place_former_state(folder: Path) -> None:
    """Put what a deployment of 0.1.0 left behind into ``folder``/state, as if it had run there, on this machine."""
    for source in sorted((FORMER / "state").rglob("*")):
        target = folder / "state" / source.relative_to(FORMER / "state")
        if source.is_dir():
            target.mkdir(mode=0o700, parents=True)
        elif source.suffix == ".db":
            shutil.copyfile(source, target)
        else:
            text = source.read_text(encoding="utf-8").replace(FOLDER, str(folder)).replace(HOST, os.uname().nodename)
            target.write_text(text, encoding="utf-8")
