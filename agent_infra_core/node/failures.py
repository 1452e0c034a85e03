"""Classifies why an engine failed: one row per sign of a failure, with its fix."""

from __future__ import annotations

import re
from dataclasses import dataclass

from agent_infra_core.protocol import ReplicaFailure


@dataclass(frozen=True)
class FailureSign:
    """Positive evidence of one class of failure: a log line, or only the exit code if the pattern is empty."""

    kind: str
    pattern: str
    hint: str
    exit_code: int | None = None  # the row matches only with this code; negative = ended by that signal


_GGUF_HINT = "model_path must name a GGUF file of llama.cpp; check that it was downloaded whole"

# The first row that matches wins, so specific rows come before general ones. `offline` comes last: programs complain
# about the network, go on without it, and fail for another reason.
FAILURE_SIGNS = (
    FailureSign(
        "out_of_memory",
        r"larger than the available KV cache memory|No available memory for the cache blocks",
        "the context does not fit beside the weights: lower max_model_len, raise gpu_memory_utilization, "
        "or raise tensor_parallel_size",
    ),
    FailureSign(
        "out_of_memory",
        r"Free memory on device .* is less than desired GPU memory utilization",
        "another process holds memory of this GPU: end it (nvidia-smi), or lower gpu_memory_utilization",
    ),
    FailureSign(
        "out_of_memory",
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|HIP out of memory",
        "the GPU is too small for the weights: lower gpu_memory_utilization or max_model_len, raise "
        "tensor_parallel_size, or take a quantised model",
    ),
    FailureSign(
        "out_of_memory",
        r"std::bad_alloc|\bMemoryError\b|Cannot allocate memory|failed to allocate|[Oo]om[-_ ]kill",
        "the machine has too little memory: lower max_model_len or --max-num-seqs, or take a smaller model",
    ),
    FailureSign(
        "gated_model",
        r"GatedRepoError|gated repo|Access to model .* is restricted|403 Client Error.*huggingface",
        "accept the model's licence on huggingface.co, then export HF_TOKEN (or set it under env) and start again",
    ),
    FailureSign(
        "quota",
        r"Disk quota exceeded|No space left on device",
        "the disk or your quota is full: free space, or point HF_HOME (under env) at a larger file system",
    ),
    FailureSign(
        "model_not_found", r"is not a GGUF file|invalid magic|failed to load model|gguf_init_from_file", _GGUF_HINT
    ),
    FailureSign(
        "model_not_found",
        r"RepositoryNotFoundError|Repository Not Found|is not a valid model identifier|Repo id must be in the form"
        r"|Invalid repository ID or local directory|does not appear to have a file named config\.json"
        r"|model file .* cannot be read",
        "check model_path: a Hugging Face id as on huggingface.co, or a path that this node can read",
    ),
    FailureSign(
        "rate_limited",
        r"429 Client Error|Too Many Requests|had to rate limit",
        "the hub limits the rate of requests: fetch the model once with `pull`, or log in (HF_TOKEN under env)",
    ),
    FailureSign(
        "port_in_use",
        r"[Aa]ddress already in use|EADDRINUSE|Errno 98\b|couldn't bind",
        "another server took the port; the next start moves on to another. If it happens often, set another base_port",
    ),
    FailureSign(
        "driver",
        r"driver on your system is too old|driver version is insufficient|unsupported display driver"
        r"|forward compatibility was attempted|PTX was compiled with an unsupported toolchain",
        "the node's NVIDIA driver is older than this engine needs: install the engine's build for an older CUDA, or "
        "choose nodes with a newer driver (cluster.slurm.constraint)",
    ),
    FailureSign(
        "node_failure",
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError|ncclRemoteError",
        "GPUs or nodes of this replica cannot reach each other: NCCL_DEBUG=INFO under env says more; if only one node "
        "does it, keep away from it and tell its administrators",
    ),
    FailureSign(
        "node_failure",
        r"uncorrectable ECC|fallen off the bus|\bXid\b|No CUDA GPUs are available|CUDA driver initialization failed"
        r"|CUDA-capable device\(s\) is/are busy|Failed to initialize NVML|libcuda\.so\.1: cannot open",
        "the node's GPU or driver does not work (nvidia-smi): avoid this node, and tell its administrators",
    ),
    FailureSign(
        "bad_argument",
        r"trust_remote_code=True",
        "the model brings its own code: read it, then set trust_remote_code: true",
    ),
    FailureSign(
        "bad_argument",
        r"can't open file .*No such file",
        "the program named in command does not exist: give its full path",
        exit_code=2,
    ),
    FailureSign(
        "bad_argument",
        r"error: (unrecognized arguments|argument |the following arguments|ambiguous option)",
        "the engine does not know this option: correct engine_args (or command); its --help lists them",
        exit_code=2,
    ),
    FailureSign(
        "bad_argument",
        r"greater than the derived max_model_len|must be divisible by tensor parallel|validation errors? for \w*Config",
        "correct this key of the model's configuration",
    ),
    FailureSign(
        "bad_argument",
        r"cannot open shared object file|error while loading shared libraries",
        "a library is missing on the node: load the module that has it, or extend LD_LIBRARY_PATH, under "
        "cluster.slurm.setup",
    ),
    FailureSign(
        "bad_argument",
        r"No module named",
        "install it for the Python that runs the engine, named first in the log (vllm: pip install 'agent-infra[gpu]')",
    ),
    FailureSign(
        "offline",
        r"OfflineModeIsEnabled|outgoing traffic has been disabled|LocalEntryNotFoundError|couldn't connect to 'https"
        r"|Temporary failure in name resolution|Name or service not known|Network is unreachable",
        "this node has no network: fetch the model where there is one, and set model_path to its folder",
    ),
    FailureSign("node_failure", "", "the engine was built for another processor; install one built for it", -4),
    FailureSign(
        "node_failure", "", "the node's shared memory or disk failed; look at /dev/shm and the kernel's log", -7
    ),
)

# A restart cannot fix these, unless the replica was ready before.
PERMANENT_FAILURES = ("model_not_found", "gated_model", "quota", "bad_argument", "driver", "timed_out")

# What a program logs and survives: levels below error, and requests that the hub's client sends again.
_HARMLESS = re.compile(
    r"^(\([^)]*\) )?(\d{4}-\d\d-\d\d\S* \S+ )?\[?(DEBUG|INFO|WARNING)\b"
    r"|thrown while requesting|^Retrying in"
)


def classify_failure(log: str, exit_code: int | None) -> ReplicaFailure:
    """Return why an engine failed; ``exit_code`` as in subprocess, None if it wasn't ready in time.

    Call it only for an engine that ended or missed its deadline: an engine whose health probe answers hasn't failed,
    whatever its log contains.
    """
    lines = [line.strip()[:400] for line in re.split(r"[\r\n]+", log) if line.strip()]
    evidence = [line for line in lines if not _HARMLESS.search(line)]
    ended = describe_exit(exit_code)
    for sign in FAILURE_SIGNS:
        if sign.exit_code is not None and sign.exit_code != exit_code:
            continue
        line = next((line for line in evidence if sign.pattern and re.search(sign.pattern, line)), None)
        if line is not None or not sign.pattern:
            return ReplicaFailure(sign.kind, line or ended, sign.hint)
    last = lines[-1] if lines else "it wrote nothing"
    if exit_code is None:
        return ReplicaFailure("timed_out", last, "it was not ready in time; read its log, or give it more time")
    if exit_code == -9:
        hint = "someone killed it, or the kernel did when memory ran out (see dmesg): then lower max_model_len"
        return ReplicaFailure("unknown", ended, hint)
    return ReplicaFailure("unknown", f"{ended}: {last}", "read its log; the cause is above its last lines")


def describe_exit(exit_code: int | None) -> str:
    """Describe an exit code of subprocess for a message."""
    if exit_code is None:
        return "still running"
    return f"ended by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
