"""What a busy machine may do to a test that is no failure: be late, and stand still between two clocks' readings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 90.0  # for what comes at once on a quiet machine


def compares_clocks(test: Callable[..., None]) -> Callable[..., None]:
    """For a test that holds one process's clock against another's: when the machine stops one of them in between, the
    figures differ, and rightly. So it has three runs, each in a folder of its own, and one of them must hold."""

    @functools.wraps(test)
    def run(tmp_path: Path, **fixtures: Any) -> None:
        for attempt in range(3):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            try:
                test(tmp_path=folder, **fixtures)
            except AssertionError:
                if attempt == 2:
                    raise
            else:
                return

    return run
