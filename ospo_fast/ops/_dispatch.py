"""Which backend runs an op: the one place where that is decided, and the table that `ospo-fast env` shows."""

from __future__ import annotations

from ..errors import OpError

# op → backends in the order in which backend="auto" takes them, each with the reason why it cannot run ("" = it can).
# A backend enters here together with its kernel.
_TABLE: dict[str, tuple[tuple[str, str], ...]] = {
    op: (*((name, f"this version has no {kind} kernel for it") for name, kind in kernels), ("torch", ""))
    for op, kernels in {
        "token_logprobs": (("cuda", "CUDA"), ("cpp", "C++")),
        "attention_columns": (("triton", "Triton"),),
        "object_masks": (("cuda", "CUDA"), ("cpp", "C++")),
        "otsu_threshold": (("cuda", "CUDA"), ("cpp", "C++")),
        "token_weights": (),
        "sequence_logprobs": (),
        "preference_loss": (),
        "sample_codes": (("cuda", "CUDA"), ("cpp", "C++")),
    }.items()
}


def backends() -> dict[str, list[tuple[str, bool, str]]]:
    """For every op its backends, best first: (name, available, reason). `auto` takes the first available one."""
    chosen = {op: next(name for name, missing in rows if not missing) for op, rows in _TABLE.items()}
    return {
        op: [(name, not missing, missing or ("used by auto" if name == chosen[op] else "")) for name, missing in rows]
        for op, rows in _TABLE.items()
    }


def resolve(op: str, backend: str) -> str:
    """The backend that runs `op`. An explicit name is taken as it is or refused, never replaced by another."""
    rows = _TABLE[op]
    if backend == "auto":
        return next(name for name, missing in rows if not missing)
    names = ", ".join(repr(name) for name, missing in rows if not missing)
    for name, missing in rows:
        if name == backend:
            if missing:
                raise OpError(f"{op}: backend={backend!r} is not available: {missing}; use 'auto' or one of {names}")
            return name
    raise OpError(f"{op}: backend={backend!r} is unknown; expected 'auto' or one of {names}")
