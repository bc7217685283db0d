"""The report of `ospo-fast env`: versions, system, devices, the native module, and the backend of each operation."""

import ctypes.util
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ospo_fast._version import __version__
from ospo_fast.packages import import_error

PACKAGES = (
    "torch", "numpy", "triton", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "diffusers",
    "flash-attn", "xformers", "bitsandbytes", "torchao", "liger-kernel", "cut-cross-entropy", "quack-kernels",
    "scikit-image",
)  # fmt: skip
# Oldest and newest versions that the tests have run with. Others are not refused.
TESTED = {"python": ("3.10", "3.13"), "torch": ("2.9.0", "2.15.0"), "transformers": ("5.17.0", "5.24.0")}
# Import names of packages whose binaries or kernels may not fit the installed torch, driver or Python.
_COMPILED = {
    "triton": "triton", "tokenizers": "tokenizers", "safetensors": "safetensors", "flash-attn": "flash_attn",
    "xformers": "xformers", "liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy",
    "quack-kernels": "quack", "bitsandbytes": "bitsandbytes", "torchao": "torchao",
}  # fmt: skip


def collect() -> dict[str, Any]:
    """Collect the report as plain values, ready for JSON. A probe that fails leaves its error in place of its values.

    Returns:
        versions: package → version, None where it is not installed; "2.8.3, broken: …" where it cannot be imported.
        tested: package → {"oldest", "newest": tested versions, "installed": "tested", "older" or "newer", or None}.
        system: os, machine, cpu, cores, threads, memory_gb.
        cuda: torch's CUDA version, driver, devices.
        native: `ospo_fast._C.build_info()`.
        ops: operation → device type → {"backend": the one that "auto" takes, "others": {backend: why not}}.

    """
    return {
        "versions": {"ospo-fast": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "tested": {name: _probe(functools.partial(_tested, name)) for name in TESTED},
        "system": {name: _probe(read) for name, read in _SYSTEM.items()},
        "cuda": _probe(_cuda),
        "native": _probe(_native),
        "ops": _probe(_ops),
    }


def render(info: dict[str, Any]) -> str:
    """Return `collect()` as text."""
    lines: list[str] = []
    for title, part in info.items():
        rows = [(name, _text(value)) for name, value in part.items()]
        if title == "ops" and "error" not in part:
            rows = _op_rows(part)
        elif title == "tested":
            rows = [(name, _tested_text(value)) for name, value in part.items()]
        width = max((len(name) for name, _ in rows), default=0)
        lines += [title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows), ""]
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


def _tested_text(found: dict[str, str | None]) -> str:
    if "error" in found:
        return _text(found)
    notes = {None: "", "tested": "", "older": ": the installed one is older", "newer": ": the installed one is newer"}
    return f"{found['oldest']} to {found['newest']}{notes[found['installed']]}"


def _op_rows(ops: dict[str, dict[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    rows = []
    for op, devices in ops.items():
        for device, choice in devices.items():
            others = "; ".join(f"{name}: {reason}" for name, reason in choice["others"].items())
            rows.append((op, f"{device:<4}  {choice['backend']:<6}  {others}"))
    return rows


def _probe(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # a broken driver or package must not prevent the report
        return {"error": f"{type(error).__name__}: {error}"}


def _version(name: str) -> str | None:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    broken = import_error(_COMPILED[name]) if name in _COMPILED else ""
    return f"{version}, broken: {broken}" if broken else version


def _tested(name: str) -> dict[str, str | None]:
    """Compare the installed version of a package with those of TESTED; a bug fix release is a tested version."""
    oldest, newest = TESTED[name]
    installed = platform.python_version() if name == "python" else _version(name)
    answer = None
    if installed is not None:
        number, first, last = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (installed, oldest, newest))
        answer = "older" if number < first else "newer" if number > last else "tested"
    return {"oldest": oldest, "newest": newest, "installed": answer}


def cpu_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or "unknown"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


_SYSTEM: dict[str, Callable[[], Any]] = {
    "os": platform.platform,
    "machine": platform.machine,
    "cpu": cpu_name,
    "cores": lambda: len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
    "threads": _threads,
    "memory_gb": lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
}


def _cuda() -> dict[str, Any]:
    import torch

    devices = [
        {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return {
        "torch built for": torch.version.cuda or "CPU only",
        "libcuda": ctypes.util.find_library("cuda") or "not found",
        "available": torch.cuda.is_available(),
        "devices": devices,
    }


def _native() -> dict[str, Any]:
    importlib.import_module("torch")  # first, so that the process loads torch's OpenMP runtime
    if importlib.util.find_spec("ospo_fast._C") is None:
        return {"built": "no: pure Python, the operations run the PyTorch references"}
    native = importlib.import_module("ospo_fast._C")
    info: dict[str, Any] = {**native.build_info()}
    info["nvcc"] = info["nvcc"] or "built without"
    info["openmp"] = info["openmp"] or "built without"
    if info["cuda"]:
        info["driver"], info["runtime"] = (
            f"{version // 1000}.{version % 1000 // 10}" if version else "none" for version in native.cuda_versions()
        )
    return info


def _ops() -> dict[str, dict[str, dict[str, Any]]]:
    import torch

    from ospo_fast.ops._dispatch import backends

    table: dict[str, dict[str, dict[str, Any]]] = {}
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for device in (name for name, available in present.items() if available):
        for op, rows in backends(device).items():
            chosen = next(name for name, available, _ in rows if available)
            others = {name: reason or "lower priority" for name, _, reason in rows if name != chosen}
            table.setdefault(op, {})[device] = {"backend": chosen, "others": others}
    return table
