"""The `fetch` role: downloads a model from the Hugging Face hub."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from agent_infra_core.errors import RefusedError
from agent_infra_core.settings import base_directory

# Formats that no engine of ours loads; skipped if a repository has safetensors.
_SUPERFLUOUS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "original/*")

# Class of a huggingface_hub error, or one of its base classes → meaning and fix. The first match wins.
HUB_FAILURES: Mapping[str, str] = {
    "GatedRepoError": "it is gated: ask for access on its page, then set HF_TOKEN to a token of that account",
    "RepositoryNotFoundError": "it does not exist or is private: correct model_path, or set HF_TOKEN",
    "HFValidationError": "it is not an id of the Hugging Face hub, such as org/model; correct model_path",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it for `pull`",
    "HfHubHTTPError": "the hub refused; read its message, or try later",
}
HUB_UNREACHABLE = "the hub cannot be reached from here: check the network, https_proxy and HF_ENDPOINT"


def is_hub_id(model_path: str) -> bool:
    """Whether ``model_path`` has the form of a Hugging Face id, ``org/model``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model_path) is not None


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Return the folder in which huggingface_hub caches downloads."""
    home = base_directory(environment, "XDG_CACHE_HOME", ".cache")
    base = environment.get("HF_HOME") or os.path.join(home, "huggingface")
    return Path(os.path.expanduser(environment.get("HF_HUB_CACHE") or os.path.join(base, "hub")))


def hub_folder(repository: str, environment: Mapping[str, str]) -> Path:
    """Return the folder of the cache that holds a model of the hub."""
    return hub_cache(environment) / f"models--{repository.replace('/', '--')}"


def is_in_hub_cache(repository: str, environment: Mapping[str, str]) -> bool:
    """Whether a model of the hub is in the cache that this environment uses."""
    return any(hub_folder(repository, environment).glob("snapshots/*"))


def fetch_from_hub(repository: str) -> str:
    """Download a model to the engines' cache (HF_HOME). Returns its directory. Raises RefusedError with the fix."""
    where = f"{repository} (on {socket.gethostname()})"
    try:
        import huggingface_hub
    except ImportError as error:
        raise RefusedError(
            f"{where}: huggingface_hub is not installed for {sys.executable}; it comes with vLLM, or pip install it"
        ) from error
    try:
        files = huggingface_hub.HfApi().model_info(repository).siblings or []
        has_safetensors = any(file.rfilename.endswith(".safetensors") for file in files)
        ignored = list(_SUPERFLUOUS) if has_safetensors else None
        return str(huggingface_hub.snapshot_download(repository, ignore_patterns=ignored))
    except Exception as error:
        raise RefusedError(f"{where}: {describe_hub_failure(error)}") from error


def describe_hub_failure(error: BaseException) -> str:
    """Return meaning and fix of an error from huggingface_hub or its dependencies, then the error's first line."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    words = next((line for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in chain):
        return f"the disk is full: free some space, or set HF_HOME to another disk ({words})"
    names = {kind.__name__ for kind in type(error).__mro__}
    meaning = next((meaning for name, meaning in HUB_FAILURES.items() if name in names), HUB_UNREACHABLE)
    return f"{meaning} ({words})"
