"""The `llama-cpp` role: the embedded engine, llama.cpp's own server in this process."""

from __future__ import annotations

import argparse
import os
import signal

from agent_infra_core.errors import AgentInfraError
from agent_infra_core.host import is_port_free, usable_cores
from agent_infra_core.node.chat_template import template_with_tools


def _wait_for_termination() -> None:
    """Wait for SIGTERM or SIGINT. Uses a pipe, because a signal handler must not wait for a lock."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    os.read(read_end, 1)


def run_llama_cpp(options: argparse.Namespace) -> int:
    """Run the embedded engine, llama.cpp's own server in this process, until SIGTERM. Returns the exit code.

    ``options`` are those of the role: ``context_tokens`` is per slot; ``threads`` 0 means half of the processors. Takes
    the key from AGENT_INFRA_API_KEY. Prints errors, which `serve` classifies.
    """
    model_path, port, slots = options.model_path, options.port, options.slots
    try:
        with open(model_path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise AgentInfraError(f"model file {model_path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise AgentInfraError(f"{model_path} is not a GGUF file")
    if not is_port_free(port):
        raise AgentInfraError(f"port {port}: address already in use")
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model_path
    parameters.model_alias = {options.name}
    parameters.hostnames, parameters.port = [options.host], port
    parameters.api_keys = [os.environ["AGENT_INFRA_API_KEY"]]
    parameters.n_parallel, parameters.n_ctx = slots, options.context_tokens * slots  # the slots share n_ctx
    parameters.cpuparams.n_threads = options.threads or max(1, usable_cores() // 2)
    parameters.cpuparams_batch.n_threads = parameters.cpuparams.n_threads
    parameters.endpoint_metrics = parameters.endpoint_slots = parameters.endpoint_props = True
    if template := template_with_tools(model_path):
        parameters.chat_template = template
    parameters.n_threads_http = slots + 64  # each waiting turn uses one, and the health probe needs one
    parameters.cache_ram_mib = 256  # the default of 8192 would fill a laptop's memory
    parameters.sse_ping_interval = 1  # at shutdown it waits for the next ping of every open stream
    parameters.fit_params, parameters.ui, parameters.offline = False, False, True
    parameters.verbosity = 2
    server = xllamacpp.Server(parameters)  # returns once the model is loaded and the port listens
    _wait_for_termination()
    del server  # cuts open streams and stops the server
    return 0
