"""Failures: which class an engine's end is of."""

from __future__ import annotations

import pytest

from agent_infra_core.node.failures import FAILURE_SIGNS, PERMANENT_FAILURES, classify_failure

FAILURES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", 1, "out_of_memory"),
    (
        "ValueError: Free memory on device (3.1/79.2 GiB) on startup is less than desired GPU memory utilization",
        1,
        "out_of_memory",
    ),
    (
        "ValueError: 16.0 GiB KV cache is needed, which is larger than the available KV cache memory (9 GiB).",
        1,
        "out_of_memory",
    ),
    ("terminate called after throwing an instance of 'std::bad_alloc'", -6, "out_of_memory"),
    (
        "OSError: org/nope is not a local folder and is not a valid model identifier listed on 'https://x'",
        1,
        "model_not_found",
    ),
    ("agent-infra: /tmp/x.bin is not a GGUF file", 2, "model_not_found"),
    ("agent-infra: model file /tmp/x.gguf cannot be read: No such file or directory", 1, "model_not_found"),
    ("huggingface_hub.errors.GatedRepoError: 401 Client Error.", 1, "gated_model"),
    ("Access to model meta-llama/L is restricted and you are not in the authorized list.", 1, "gated_model"),
    ("huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the disk cache", 1, "offline"),
    ("socket.gaierror: [Errno -3] Temporary failure in name resolution", 1, "offline"),
    ("OSError: [Errno 122] Disk quota exceeded: '/home/u/.cache'", 1, "quota"),
    ("OSError: [Errno 28] No space left on device", 1, "quota"),
    (
        "OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', 5900): address already in use",
        1,
        "port_in_use",
    ),
    ("vllm serve: error: unrecognized arguments: --nonsense", 2, "bad_argument"),
    ("ValueError: User-specified max_model_len (99999) is greater than the derived max_model_len", 1, "bad_argument"),
    ("Please pass the argument `trust_remote_code=True` to allow custom code to be run.", 1, "bad_argument"),
    ("/usr/bin/python: No module named vllm", 1, "bad_argument"),
    ("RuntimeError: No CUDA GPUs are available", 1, "node_failure"),
    ("CUDA error: uncorrectable ECC error encountered", 1, "node_failure"),
    ("RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)", 1, "node_failure"),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 11080).", 1, "driver"),
    ("CUDA error: CUDA driver version is insufficient for CUDA runtime version", 1, "driver"),
    (
        "python3: error while loading shared libraries: libgomp.so.1: cannot open shared object file",
        127,
        "bad_argument",
    ),
    ("ImportError: libgomp.so.1: cannot open shared object file: No such file or directory", 1, "bad_argument"),
    ("ImportError: libcuda.so.1: cannot open shared object file: No such file or directory", 1, "node_failure"),
    (
        "huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests for url: https://x",
        1,
        "rate_limited",
    ),
    ("loading", -4, "node_failure"),
    ("loading", None, "timed_out"),
    ("something odd", 1, "unknown"),
    ("", -9, "unknown"),
]


@pytest.mark.parametrize(("line", "exit_code", "kind"), FAILURES)
def test_a_failure_is_classed_by_its_decisive_line(line: str, exit_code: int | None, kind: str) -> None:
    failure = classify_failure(f"INFO starting\n{line}\nINFO last words\n" if line else "", exit_code)
    assert failure.kind == kind
    assert failure.hint


def test_every_class_is_shown_by_an_example() -> None:
    assert {sign.kind for sign in FAILURE_SIGNS} <= {kind for _, _, kind in FAILURES}


def test_the_decisive_line_is_told_and_not_the_traceback_around_it() -> None:
    log = "Traceback:\n  File x\ntorch.OutOfMemoryError: CUDA out of memory.\nRuntimeError: Engine core failed.\n"
    assert classify_failure(log, 1).line == "torch.OutOfMemoryError: CUDA out of memory."


def test_an_option_error_in_the_log_counts_only_with_its_exit_code() -> None:
    assert classify_failure("client: error: unrecognized arguments: -x\n", -11).kind == "unknown"


def test_a_lone_signal_is_no_evidence_of_a_class() -> None:
    failure = classify_failure("all is well\n", -9)
    assert (failure.kind, failure.line) == ("unknown", "ended by signal 9")


HARMLESS = """\
DEBUG 11-02 09:14:01 [__init__.py:153] XPU platform is not available because: No module named 'intel_extension'
WARNING 11-02 09:14:05 [_custom_ops.py:20] Failed to import from vllm._rocm_C with ImportError("No module named")
(Worker pid=7) INFO 11-02 09:14:09 [memory.py:4] an earlier profile ended with CUDA out of memory
'[Errno -3] Temporary failure in name resolution' thrown while requesting HEAD https://huggingface.co/org/m/config.json
Retrying in 1s [Retry 1/5].
"""


def test_what_a_program_survived_is_not_why_it_ended() -> None:
    nccl = (
        "(Worker_TP1 pid=4188) ERROR 11-02 09:15:02 [executor.py:597] RuntimeError: NCCL error: unhandled system error"
    )
    failure = classify_failure(HARMLESS + nccl + "\n(APIServer pid=1) RuntimeError: Engine core failed.\n", 1)
    assert (failure.kind, failure.line) == ("node_failure", nccl)
    assert classify_failure(HARMLESS + "RuntimeError: something odd\n", 1).kind == "unknown"
    offline = "OSError: We couldn't connect to 'https://huggingface.co' to load the files\n"
    assert classify_failure(HARMLESS + offline, 1).kind == "offline"
    assert classify_failure(offline + "ImportError: No module named 'flash_attn'\n", 1).kind == "bad_argument"


def test_a_hub_that_limits_the_rate_is_a_network_that_is_there() -> None:
    log = """HTTP Error 429 thrown while requesting HEAD https://huggingface.co/org/m/resolve/main/config.json
Retrying in 1s [Retry 1/5].
(APIServer pid=9) huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests for url: https://x
(APIServer pid=9) OSError: We couldn't connect to 'https://huggingface.co' to load the files
"""
    failure = classify_failure(log, 1)
    assert failure.kind == "rate_limited"
    assert "429" in failure.line
    assert "`pull`" in failure.hint
    assert failure.kind not in PERMANENT_FAILURES
