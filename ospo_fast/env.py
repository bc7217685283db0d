"""What `ospo-fast env` tells: versions, machine, devices, the native module, and which backend runs each operation."""

import ctypes.util
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ospo_fast._version import __version__

PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "accelerate",
    "flash-attn",
    "xformers",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "scikit-image",
)


def collect() -> dict[str, Any]:
    """Everything as plain values, ready for JSON. A probe that fails says so in its place; the others go on.

    versions: package → version, None where it is not installed. system: os, machine, cpu, cores, threads, memory_gb.
    cuda: torch's CUDA version, driver, devices. native: `ospo_fast._C.build_info()`, or the reason why it is missing.
    ops: op → device type → {"backend": the one taken by "auto", "others": {backend: why not}}.
    """
    return {
        "versions": {"ospo-fast": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "system": {name: _probe(read) for name, read in _SYSTEM.items()},
        "cuda": _probe(_cuda),
        "native": _probe(_native),
        "ops": _probe(_ops),
    }


def render(info: dict[str, Any]) -> str:
    """The text form of `collect()`."""
    lines: list[str] = []
    for title, part in info.items():
        lines.append(title)
        if title == "ops" and "error" not in part:
            lines += _render_ops(part)
        else:
            width = max(map(len, part), default=0)
            lines += [f"  {name:<{width}}  {_text(value)}" for name, value in part.items()]
        lines.append("")
    return "\n".join(lines)


def _text(value: object) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value)) or "none"
    return str(value)


def _render_ops(ops: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    width = max(map(len, ops), default=0)
    lines = []
    for op, devices in ops.items():
        for device, choice in devices.items():
            others = "; ".join(f"{name}: {reason}" for name, reason in choice["others"].items())
            lines.append(f"  {op:<{width}}  {device:<4}  {choice['backend']:<6}  {others}".rstrip())
    return lines


def _probe(read: Callable[[], Any]) -> Any:
    # Broad by intent: a broken driver or package must not keep the report from being printed.
    try:
        return read()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


_SYSTEM: dict[str, Callable[[], Any]] = {
    "os": platform.platform,
    "machine": platform.machine,
    "cpu": _cpu,
    "cores": _cores,
    "threads": _threads,
    "memory_gb": _memory_gb,
}


def _cuda() -> dict[str, Any]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gb": round(properties.total_memory / 1e9, 1),
            }
        )
    return {
        "torch built for": torch.version.cuda or "CPU only",
        "libcuda": ctypes.util.find_library("cuda") or "not found",
        "available": torch.cuda.is_available(),
        "devices": devices,
    }


def _native() -> dict[str, Any]:
    importlib.import_module("torch")  # first, so that its OpenMP runtime is the one that is loaded

    native = importlib.import_module("ospo_fast._C")
    info: dict[str, Any] = {**native.build_info()}
    info["nvcc"] = info["nvcc"] or "built without"
    info["openmp"] = info["openmp"] or "built without"
    if info["cuda"]:
        info["driver"], info["runtime"] = (_dotted(version) for version in native.cuda_versions())
    return info


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}" if version else "none"


def _ops() -> dict[str, dict[str, dict[str, Any]]]:
    import torch

    from ospo_fast.ops._dispatch import backends

    table: dict[str, dict[str, dict[str, Any]]] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op, rows in backends(device).items():
            chosen = next(name for name, available, _ in rows if available)
            others = {name: reason or "stands behind it" for name, _, reason in rows if name != chosen}
            table.setdefault(op, {})[device] = {"backend": chosen, "others": others}
    return table
