"""Commands in a form that every login shell can read, and their output among whatever that shell prints. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from agent_infra_core.host import CommandResult, HostUnreachableError

# One line, without anything that tcsh, fish or zsh would read in another way than sh does.
LINE = """sh -c 'read -r size; script=$(head -c "$size"); eval "$script"'"""


def framed_input(argv: Sequence[str], stdin: bytes, nonce: str) -> bytes:
    """What to send to LINE, to run ``argv`` with ``stdin``. Its output is marked with ``nonce``."""
    script = (
        f"printf @{nonce}@; printf @{nonce}@ >&2\n({shlex.join(argv)}\n)\n"
        f'status=$?; printf "@{nonce} %d@" "$status"; printf @{nonce}- >&2; exit "$status"'
    ).encode()
    return b"%d\n" % len(script) + script + stdin


def unframed(done: CommandResult, nonce: str, host: str) -> CommandResult:
    """The command's own result. HostUnreachableError if the login shell didn't run it."""
    mark = nonce.encode()
    output = re.search(rb"@%b@(.*?)(?:@%b (\d+)@|\Z)" % (mark, mark), done.output, re.DOTALL)
    errors = re.search(rb"@%b@(.*?)(?:@%b-|\Z)" % (mark, mark), done.errors, re.DOTALL)
    if output is None:
        said = (done.output + done.errors).decode("utf-8", "replace").strip().splitlines()
        raise HostUnreachableError(
            f"the login shell on {host} ran no command (exit code {done.status}); it printed: "
            f"{'; '.join(said[:3]) or 'nothing'}; look at its start-up files there (.bashrc, .cshrc, config.fish)"
        )
    status = int(output[2]) if output[2] else done.status
    return CommandResult(status, output[1], errors[1] if errors else done.errors)


def unframed_chunks(chunks: Iterable[bytes], nonce: str) -> Iterator[bytes]:
    """What a command prints that runs until it is ended, without what the login shell printed before."""
    mark, before = f"@{nonce}@".encode(), b""
    for chunk in chunks:
        if mark not in before:
            before += chunk
            chunk = before.partition(mark)[2]
        if chunk:
            yield chunk
