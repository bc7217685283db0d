"""Backend selection of every op, and the table of backends that `ospo-fast env` prints."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import operator
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ospo_fast.errors import OpError
from ospo_fast.packages import import_error

logger = logging.getLogger(__name__)
T = TypeVar("T")
Op = TypeVar("Op", bound=Callable[..., Any])
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

# op → its compiled backends and the device type each one runs on, in the order in which backend="auto" tries them.
# The PyTorch reference, "torch", comes last for every op and runs on every device.
_KERNELS: dict[str, dict[str, str]] = {
    "token_logprobs": {"cuda": "cuda", "cpp": "cpu"},
    "token_weights": {"cuda": "cuda", "cpp": "cpu"},
    "sequence_logprobs": {},
    "preference_loss": {},
    "attention_columns": {"triton": "cuda", "cpp": "cpu"},
    "otsu_threshold": {"cuda": "cuda", "cpp": "cpu"},
    "object_masks": {"cuda": "cuda", "cpp": "cpu"},
    "sample_codes": {"cuda": "cuda", "cpp": "cpu"},
    "linear": {"cpp": "cpu"},
    "add_rms_norm": {"triton": "cuda", "cpp": "cpu"},
    "silu_mul": {"triton": "cuda", "cpp": "cpu"},
    "decode_attention": {"triton": "cuda", "cpp": "cpu"},
}
_INTEGERS = frozenset(
    (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)
# Tags of ops that synchronize with the host: torch.compile then captures no CUDA graph over them.
HOST_SYNC_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
_PLAIN_TYPES = frozenset((Tensor, nn.Parameter, type(None), int, bool, float, str))  # of arguments that nothing traces
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the numbers of csrc/common.h


def register_kernels(op: str, kernels: dict[str, str]) -> None:
    """Add an op from outside `ospo_fast.ops`, with its compiled backends as in `_KERNELS`."""
    _KERNELS[op] = kernels


def backends(device: str = "cpu") -> dict[str, list[tuple[str, bool, str]]]:
    """List the backends of every op for tensors on a device type: (name, available, reason if not), best first.

    `auto` takes the first available one.
    """
    table = {}
    for op, kernels in _KERNELS.items():
        reasons = [(name, _why_unavailable(op, name, device)) for name in kernels]
        table[op] = [*((name, not reason, reason) for name, reason in reasons), ("torch", True, "")]
    return table


def resolve(
    op: str, backend: str, device: str, dtype: torch.dtype | None = None, *, refused: Mapping[str, str] | None = None
) -> str:
    """Choose the backend that runs `op` on a device type and, where compiled kernels read the inputs, a dtype.

    "auto" takes the first backend that can run, an explicit name is never replaced: OpError if it cannot run.

    refused: backend → why it does not take these inputs; the limits of the op's own kernels.
    """
    kernels, supported, refused = _KERNELS[op], dtype is None or dtype in DTYPES, refused or {}
    if backend == "auto":
        for name, runs_on in kernels.items():
            if runs_on == device and supported and name not in refused:
                if not (reason := _why_unavailable(op, name, device)):
                    return name
                _warn_once(reason)
        return "torch"
    if backend != "torch":
        if backend not in kernels:
            expected = ", ".join(repr(name) for name in ("auto", "torch", *kernels))
            raise OpError(f"{op}: backend={backend!r} is unknown, expected one of {expected}")
        reason = _why_unavailable(op, backend, device)
        if not supported:
            reason = f"got {dtype}, expected float32, float16 or bfloat16"
        reason = reason or refused.get(backend, "")
        if reason:
            raise OpError(f"{op}: backend={backend!r} cannot run here: {reason}; use 'auto' or 'torch'")
    return backend


# What torch.compiler.assume_constant_result sets. That function would import torch._dynamo, which takes a second.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def register_op(schema: str, *, fake: Callable[..., Any], synchronizes: bool = False) -> Callable[[Op], Op]:
    """Replace a function by the registered op torch.ops.ospo_fast.<name>, one opaque call for torch.compile.

    schema: "name(arguments) -> results". fake: computes empty results from the arguments. synchronizes: the op reads
    values on the host.
    """

    def register(function: Op) -> Op:
        name, arguments = schema.split("(", 1)
        torch.library.define(f"ospo_fast::{name}", f"({arguments}", tags=HOST_SYNC_TAGS if synchronizes else ())
        torch.library.impl(f"ospo_fast::{name}", "CompositeExplicitAutograd")(function)
        torch.library.register_fake(f"ospo_fast::{name}")(fake)
        op: Any = getattr(torch.ops.ospo_fast, name)

        # The dispatcher costs more than a small op. Only what traces programs or replaces tensors needs it.
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return function(*arguments) if runs_directly(*arguments) else op(*arguments)

        return cast(Op, call)

    return register


def runs_directly(*arguments: Any) -> bool:
    """Return whether nothing traces this program or replaces its tensors, so that kernels may read their memory."""
    if torch.compiler.is_compiling():  # first: torch.compile does not know the rest
        return False
    for x in arguments:
        kind = type(x)
        if kind in _PLAIN_TYPES:
            continue
        if isinstance(x, Tensor) or (isinstance(x, (tuple, list)) and not runs_directly(*x)):
            return False
    return nothing_traces()


def nothing_traces() -> bool:
    """Return whether no mode, tracer or transform is active, for tensors of plain types outside torch.compile."""
    traced = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() or forward_ad._current_level >= 0
    return not traced and torch._C._functorch.peek_interpreter_stack() is None


def fp32_only(dtype: torch.dtype) -> dict[str, str]:
    """Return what C++ kernels for float32 alone refuse of a dtype; see `resolve`."""
    return {} if dtype == torch.float32 else {"cpp": f"got {dtype}, expected float32"}


def native() -> ModuleType:
    """Return the compiled module; to be called only after `resolve` has answered "cpp" or "cuda"."""
    module = _native()[0]
    assert module is not None
    return module


def triton(name: str) -> ModuleType:
    """Import the Triton kernels of kernels/<name>.py."""
    return importlib.import_module(f"ospo_fast.kernels.{name}")


def pointer(tensor: Tensor | None, dtype: torch.dtype | None = None) -> int:
    """Return the address of a tensor for the compiled module, 0 for None.

    dtype: what the kernel reads there. It would read another one as garbage, and perhaps beyond its end.

    Raises TypeError for a tensor that cannot be read there: a bug of the caller, or a tensor subclass without memory.
    """
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if (dtype is not None and tensor.dtype is not dtype) or (not address and tensor.numel()) or tensor.is_neg():
        what = "in plain memory" if dtype is None else f"{dtype} in plain memory"
        raise TypeError(f"a kernel got {type(tensor).__name__} of {tensor.dtype}, expected {what}")
    return address


def check_plain(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise OpError for a tensor that is not contiguous, of this shape and on the device of `like`.

    A kernel that only gets its address would read or write beyond its end.
    """
    if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != like.device:
        got = f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        raise OpError(f"{op}: {name} is {got}, expected contiguous {shape} on {like.device}")


def device_and_stream(device: torch.device) -> tuple[int, int]:
    """Return the ordinal and the current stream of a CUDA device: the last arguments of the compiled CUDA functions."""
    stream = torch.cuda.current_stream(device)
    return int(stream.device_index), int(stream.cuda_stream)


def run_checked(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of the compiled module that checks values which only it reads: what it refuses is an OpError."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise OpError(str(error)) from None


def check_int(op: str, name: str, value: Any, low: int, high: int = INT64_MAX, hint: str = "") -> int:
    """Return an integer argument from `low` to `high`, by default any that a kernel can take. Raises OpError."""
    try:
        number = value if isinstance(value, int) else operator.index(value)  # of numpy, for example
    except TypeError:
        raise OpError(f"{op}: {name} is {value!r}, expected an integer{hint}") from None
    if not low <= number <= high:
        limits = f"{low} or more" if high == INT64_MAX and number < low else f"{low} to {high}"
        raise OpError(f"{op}: {name} is {number}, expected {limits}{hint}")
    return number


def check_float(op: str, name: str, value: Any) -> float:
    """Return a number as float. Raises OpError for texts, complex numbers, lists and tensors that require grad."""
    if isinstance(value, float):
        return value
    if not isinstance(value, (str, bytes, bytearray)) and not (isinstance(value, Tensor) and value.requires_grad):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # of a tensor of two numbers: RuntimeError
            pass
    raise OpError(f"{op}: {name} is {value!r:.100}, expected a number")


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds integers: no bool, no complex and no quantized values, which conversions would change."""
    return tensor.dtype in _INTEGERS


def as_int64(op: str, name: str, tensor: Tensor) -> Tensor:
    """Return an integer tensor as int64. Raises OpError for numbers of uint64 above it, which would become negative."""
    if tensor.dtype == torch.uint64 and not tensor.is_meta and bool((tensor.view(torch.int64) < 0).any()):
        raise OpError(f"{op}: {name} holds a uint64 number of 2^63 or more, expected numbers of at most {INT64_MAX}")
    return tensor.long()


def result_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of results: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def readable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy that kernels can read by address: contiguous, with its signs in memory."""
    return tensor if tensor.is_contiguous() and not tensor.is_neg() else tensor.resolve_neg().contiguous()


def describe(tensor: Tensor) -> str:
    """Return dtype and shape of a tensor, for error messages."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _why_unavailable(op: str, name: str, device: str) -> str:
    """Why a backend cannot run on a device type; empty if it can."""
    runs_on = _KERNELS[op][name]
    if device != runs_on:
        return f"{name!r} takes tensors on {runs_on}, not on {device}"
    if name == "triton":
        return _triton_error()
    module, reason = _native()
    if module is None or name == "cpp":
        return reason
    if not module.build_info()["cuda"]:
        return "ospo_fast._C was built without CUDA; reinstall the package where nvcc is found"
    # GELU and the backward of token_logprobs are Triton kernels.
    return _triton_error() if op == "token_logprobs" else ""


@functools.cache
def _triton_error() -> str:
    reason = import_error("triton")
    return reason and f"triton cannot be imported ({reason}); install triton"


@functools.cache
def _native() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("ospo_fast._C") is None:
        return None, "this is a pure-Python install of ospo_fast; reinstall it where a C++ compiler is found"
    try:
        return importlib.import_module("ospo_fast._C"), ""
    except Exception as error:
        return None, f"ospo_fast._C cannot be imported ({error}); reinstall the package where a C++ compiler is found"


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("PyTorch references run in place of the compiled ops: %s", reason)
