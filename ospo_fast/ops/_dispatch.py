"""Which backend runs an op: the one place where that is decided, and the table that `ospo-fast env` shows."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Literal

import torch

from ospo_fast.errors import OpError

logger = logging.getLogger(__name__)

# op → its compiled backends in the order in which backend="auto" tries them: name → (is it in this version, device).
# The PyTorch twin, "torch", stands behind them all and runs everywhere.
_KERNELS: dict[str, dict[str, tuple[bool, str]]] = {
    "token_logprobs": {"cuda": (True, "cuda"), "cpp": (True, "cpu")},
    "token_weights": {"cuda": (True, "cuda"), "cpp": (True, "cpu")},
    "sequence_logprobs": {},
    "preference_loss": {},
    "attention_columns": {"triton": (True, "cuda"), "cpp": (True, "cpu")},
    "otsu_threshold": {"cuda": (True, "cuda"), "cpp": (True, "cpu")},
    "object_masks": {"cuda": (True, "cuda"), "cpp": (True, "cpu")},
    "sample_codes": {"cuda": (True, "cuda"), "cpp": (True, "cpu")},
    "linear": {"cpp": (True, "cpu")},
    "skinny_linear": {"triton": (True, "cuda")},
    "add_rms_norm": {"triton": (True, "cuda"), "cpp": (True, "cpu")},
    "silu_mul": {"triton": (True, "cuda"), "cpp": (True, "cpu")},
    "decode_attention": {"triton": (True, "cuda"), "flash_attn": (True, "cuda"), "cpp": (True, "cpu")},
}
_BESIDE = {"token_logprobs": "triton"}  # what an op's CUDA kernels need besides
_KINDS = {"cuda": "CUDA", "cpp": "C++", "triton": "Triton", "flash_attn": "flash-attn"}
# Tags of an op that waits for the GPU to look at numbers: torch.compile then captures no CUDA graph over it.
HOST_SYNC_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in csrc/common.h


def backends(device: str = "cpu") -> dict[str, list[tuple[str, bool, str]]]:
    """For every op its backends for tensors on that type of device: (name, available, reason), best first.

    `auto` takes the first available one; the reason of one that is not available says what is missing.
    """
    table = {}
    for op, kernels in _KERNELS.items():
        missing = [(name, _missing(op, name, device)) for name in kernels]
        table[op] = [*((name, not reason, reason) for name, reason in missing), ("torch", True, "")]
    return table


def resolve(op: str, backend: str, device: str) -> str:
    """The backend that runs `op`. An explicit name is taken as it is or refused, never replaced by another."""
    if backend == "torch":
        return backend
    if backend == "auto":
        for name, (exists, runs_on) in _KERNELS[op].items():
            if exists and runs_on == device:
                if not (reason := _missing(op, name, device)):
                    return name
                _warn_once(reason)
        return "torch"
    if backend not in _KERNELS[op]:
        expected = ", ".join(repr(name) for name in ("auto", "torch", *_KERNELS[op]))
        raise OpError(f"{op}: backend={backend!r} is unknown, expected one of {expected}")
    if reason := _missing(op, backend, device):
        raise OpError(f"{op}: backend={backend!r} cannot run here: {reason}; use 'auto' or 'torch'")
    return backend


def native() -> ModuleType:
    """The compiled module, where `resolve` has answered "cpp"."""
    module = _native()[0]
    assert module is not None
    return module


def triton(name: str) -> ModuleType:
    """The Triton kernels of kernels/<name>.py."""
    return importlib.import_module(f"ospo_fast.kernels.{name}")


def device_and_stream(device: torch.device) -> tuple[int, int]:
    """What a CUDA function of the compiled module needs to know: the device's ordinal and its current stream."""
    stream = torch.cuda.current_stream(device)
    return int(stream.device_index), int(stream.cuda_stream)


def _missing(op: str, name: str, device: str) -> str:
    exists, runs_on = _KERNELS[op][name]
    if not exists:
        return f"this version has no {_KINDS[name]} kernel for it"
    if device != runs_on:
        return f"its {_KINDS[name]} kernel takes tensors on {runs_on}, not on {device}"
    if name in ("triton", "flash_attn"):
        return _package(name)
    module, reason = _native()
    if module is not None and name == "cuda":
        if not module.build_info()["cuda"]:
            return "ospo_fast._C was built without CUDA; install the package again where nvcc is found"
        if op in _BESIDE:
            return _package(_BESIDE[op])
    return reason


@functools.cache
def _package(name: str) -> str:
    """Empty, or why a package that kernels need cannot be had."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error}); install {name.replace('_', '-')}"
    return ""


@functools.cache
def _native() -> tuple[ModuleType | None, Literal[""]] | tuple[None, str]:
    try:
        return importlib.import_module("ospo_fast._C"), ""
    except ImportError as error:
        return None, f"ospo_fast._C cannot be imported ({error}); reinstall the package with a C++ compiler at hand"


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("the PyTorch twins run in place of the compiled operations: %s", reason)
