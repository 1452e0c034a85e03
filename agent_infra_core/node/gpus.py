"""The GPUs of this machine: lists and allocates them, and samples their load (NVML)."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from agent_infra_core.errors import RefusedError
from agent_infra_core.protocol import GpuSample, ServeSpec


class GpuSampler:
    """Samples GPUs, named as in CUDA_VISIBLE_DEVICES; without a driver or pynvml there are none.

    Owns the NVML library's initialisation. ``ids`` None: all GPUs of the machine.
    """

    def __init__(self, ids: Sequence[str] | None) -> None:
        self._ids = ids
        self._nvml: Any = None
        self._errors: tuple[type[BaseException], ...] = ()
        with contextlib.suppress(ImportError):
            import pynvml

            # An old driver raises NVMLLibraryMismatchError, which isn't an NVMLError; an old pynvml doesn't have it.
            self._errors = (pynvml.NVMLError, getattr(pynvml, "NVMLLibraryMismatchError", pynvml.NVMLError))
            with contextlib.suppress(*self._errors):
                pynvml.nvmlInit()
                self._nvml = pynvml

    def sample(self) -> tuple[GpuSample, ...]:
        """Return a sample of each GPU; omits GPUs that NVML cannot open."""
        if self._nvml is None:
            return ()
        return tuple(self._read(handle) for handle in self._handles())

    def close(self) -> None:
        if self._nvml is not None:
            self._ask(self._nvml.nvmlShutdown)
            self._nvml = None

    def _handles(self) -> Iterator[Any]:
        ids = self._ids
        if ids is None:
            ids = [str(index) for index in range(self._ask(self._nvml.nvmlDeviceGetCount) or 0)]
        for name in ids:
            if name.isdecimal():
                handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, int(name))
            else:
                handle = self._ask(self._nvml.nvmlDeviceGetHandleByUUID, name)
            if handle is not None:
                yield from self._mig_devices(handle) or [handle]

    def _mig_devices(self, handle: Any) -> list[Any]:
        """Return the MIG devices of a GPU in MIG mode, which itself reports nothing useful; else empty."""
        mode = self._ask(self._nvml.nvmlDeviceGetMigMode, handle)
        if not mode or mode[0] != self._nvml.NVML_DEVICE_MIG_ENABLE:
            return []
        count = self._ask(self._nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        devices = [self._ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index) for index in range(count)]
        return [device for device in devices if device is not None]

    def _read(self, handle: Any) -> GpuSample:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        return GpuSample(
            name=self._ask(nvml.nvmlDeviceGetName, handle) or "GPU",
            utilization=None if rates is None else float(rates.gpu),
            memory_used=None if memory is None else int(memory.used),
            memory_total=None if memory is None else int(memory.total),
            power_w=None if milliwatts is None else milliwatts / 1000,
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        )

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call an NVML function; None if the device or the driver doesn't support it."""
        try:
            return function(*arguments)
        except self._errors:
            return None


def sampled_gpus(spec: ServeSpec, environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the ids of the GPUs that a replica may use; None: all of the machine."""
    if not spec.engine.uses_gpus:
        return ()
    if spec.gpu_ids:
        return spec.gpu_ids
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return None if named is None else tuple(word.strip() for word in named.split(",") if word.strip())


def list_gpus(environment: Mapping[str, str]) -> str:
    """Return the output of `nvidia-smi -L`; empty without a driver or a usable device."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpu_pool(listing: str, visible: str | None) -> tuple[str, ...]:
    """Return the GPUs in ``listing`` (`nvidia-smi -L`), named as in CUDA_VISIBLE_DEVICES and limited to ``visible``.

    Whole GPUs are named by index (older engines can't read UUIDs), MIG devices by UUID. As in CUDA, an entry of
    ``visible`` that matches no GPU ends the list.
    """
    gpus: dict[str, str] = {}  # name → UUID
    whole = ""
    for line in listing.splitlines():
        if found := re.match(r"GPU (\d+): .*\(UUID: (GPU-[^)]+)\)", line):
            whole = found[1]
            gpus[whole] = found[2]
        elif found := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line):
            gpus.pop(whole, None)
            gpus[found[1]] = found[1]
    if visible is None:
        return tuple(gpus)
    chosen = []
    for entry in visible.split(","):
        name = entry.strip()
        by_uuid = [gpu for gpu, uuid in gpus.items() if name.startswith(("GPU-", "MIG-")) and uuid.startswith(name)]
        match = [name] if name in gpus else by_uuid
        if len(match) != 1:
            break
        chosen += match
    return tuple(dict.fromkeys(chosen))


def allocate_gpus(wanted: int, pool: Sequence[str], held: Mapping[str, str]) -> tuple[str, ...]:
    """Return ``wanted`` free GPUs of ``pool``; ``held`` maps each GPU in use to its user, ``deployment/replica``.

    Raises RefusedError if there are too few.
    """
    free = [gpu for gpu in pool if gpu not in held]
    if len(free) >= wanted:
        return tuple(free[:wanted])
    holders = "".join(f"; {gpu} is held by {held[gpu]}" for gpu in pool if gpu in held)
    raise RefusedError(
        f"{wanted} GPU(s) needed, {len(free)} of {len(pool)} free{holders}; stop a holder, lower "
        "replicas or tensor_parallel_size, or choose yourself with the model's env: {CUDA_VISIBLE_DEVICES: ...}"
    )
