"""Every integer argument of the ops with its extreme values. As a program: run the cases from a given number on.

It prints the number of each case that ended well, so that its caller knows which one ended the process. What a case
may take is limited: memory, by RLIMIT_AS, and time, by an alarm that ends the process.
"""

import ast
import functools
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ospo_fast import ops
from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.attention_columns import ColumnRequest
from ospo_fast.ops.decode_attention import decode_attention
from ospo_fast.ops.sample_codes import sample_codes_into

MAX_BYTES = 2 * 2**30  # beyond what the process has after its imports
MAX_SECONDS = 60
EXTREMES = (-(2**64), -(2**63) - 1, -(2**63), -(2**31) - 1, -1, 0, 1, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**64)
INT64 = (-(2**63), 2**63 - 1)
UNLIMITED = 2**70
HUGE = (2**20 + 1, 2**31)
STUB = Path(_dispatch.__file__).parents[1] / "_C.pyi"


@dataclass(frozen=True)
class Argument:
    """An argument that takes low ≤ value ≤ high, and how to call its op with it."""

    name: str  # op.argument; a refusal names the last part
    call: Callable[[Any], Any]
    low: int
    high: int
    step: int = 1  # valid values are low, low + step, …
    values: tuple[int, ...] = EXTREMES

    def cases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        limits = {self.low - 1, self.low, self.high, self.high + (self.high < UNLIMITED)}
        if self.values is not EXTREMES:
            limits = set()
        for value in sorted({*self.values, *limits}):
            yield f"{self.name}={value}", functools.partial(self.check, value)

    def check(self, value: int) -> None:
        """A valid value runs, and an error that names the argument refuses each other one."""
        valid = self.low <= value <= self.high and (value - self.low) % self.step == 0
        try:
            self.call(value)
        except OpError as error:
            if valid or self.name.split(".")[1] not in str(error):
                raise
        else:
            assert valid, "was not refused"


def into(steps: torch.Tensor, columns: int = 3) -> None:
    made = [torch.full((2,), -1) for _ in range(2)]
    seeds, tokens = torch.arange(2), torch.zeros(2, columns, dtype=torch.int64)
    sample_codes_into(torch.rand(2, 5), seeds=seeds, steps=steps, codes=made[0], error_steps=made[1], tokens=tokens)


def decode(**change: Any) -> torch.Tensor:
    """2 rows, 2 heads of width 16, 3 slots of 5 positions."""
    given = {"slots": torch.tensor([2, 0]), "lengths": torch.tensor([4, 0]), "heads": 2, **change}
    cache, table = torch.rand(2, 3, 2, 5, 16), torch.rand(2, 9, 16)
    return decode_attention(torch.rand(2, 96), *table, *cache, scale=1.0, **given)


def columns(**change: Any) -> torch.Tensor:
    """2 sequences of 6 positions."""
    given = {"columns": torch.zeros(2, 1, 1, dtype=torch.int64), "rows": (0, 6), **change}
    return ops.attention_columns(*torch.rand(2, 2, 2, 6, 16), **given)


def rows_of_nothing(count: int) -> torch.Tensor:
    nothing = torch.zeros(0, 1, 1, dtype=torch.int64)
    return ops.attention_columns(*torch.rand(2, 0, 2, 6, 16), nothing, rows=(0, count))


def request(positions: int) -> ColumnRequest:
    return ColumnRequest.from_args(torch.zeros(1, 1, 1, dtype=torch.int64), 1, positions, rows=(0, 1))


def public() -> list[Argument]:
    maps, logits, hidden, head = torch.rand(1, 2, 4, 4), torch.rand(2, 5), torch.rand(3, 4), nn.Linear(4, 7)
    labels = torch.tensor([0, 6, 1])
    sampled = {"seeds": [0, 1], "step": 0}

    def in_tensor(name: str, call: Callable[[torch.Tensor], Any], low: int, high: int, other: int = 0) -> Argument:
        values = {*EXTREMES, low - 1, high, high + 1}
        held = tuple(value for value in values if INT64[0] <= value <= INT64[1])
        return Argument(name, lambda value: call(torch.tensor([other, value])), low, high, values=held)

    heads: list[Argument] = []
    for op in (ops.token_logprobs, ops.cross_entropy):
        for name, limits in (("chunk_rows", (1, UNLIMITED)), ("ignore_index", INT64)):
            call = functools.partial(lambda op, name, value: op(hidden, head, labels, **{name: value}), op, name)
            heads.append(Argument(f"{op.__name__}.{name}", call, *limits))
    return [
        *heads,
        in_tensor("token_logprobs.labels", lambda t: ops.token_logprobs(hidden[:2], head, t), 0, 6),
        Argument("otsu_threshold.bins", lambda v: ops.otsu_threshold(maps, bins=v), 1, 2**16),
        Argument("object_masks.bins", lambda v: ops.object_masks(maps, bins=v), 1, 2**16),
        Argument("token_weights.blur_size", lambda v: ops.token_weights(maps[0], blur_size=v), 1, 1023, 2),
        Argument("sample_codes.top_k", lambda v: ops.sample_codes(logits, top_k=v, **sampled), 0, UNLIMITED),
        Argument("sample_codes.seeds", lambda v: ops.sample_codes(logits, seeds=[v, 0], step=0), -(2**63), 2**64 - 1),
        Argument("sample_codes.step", lambda v: ops.sample_codes(logits, seeds=[0, 1], step=v), *INT64),
        in_tensor("sample_codes_into.steps", into, 0, 2),
        in_tensor("attention_columns.columns", lambda t: columns(columns=t.view(2, 1, 1)), -1, 5),
        Argument("attention_columns.rows", lambda v: columns(rows=(v, 2)), 0, 4),
        Argument("attention_columns.rows", lambda v: columns(rows=(1, v)), 0, 5),
        in_tensor("attention_columns.rows", lambda t: columns(rows=(t, 2)), 0, 4),
        in_tensor("attention_columns.rows", lambda t: columns(rows=(1, t)), 0, 5),
        Argument("attention_columns.rows", rows_of_nothing, 0, 6),
        Argument("attention_columns.key_range", lambda v: columns(key_range=(v, 5)), 0, 5),
        Argument("attention_columns.key_range", lambda v: columns(key_range=(1, v)), 1, 6),
        Argument("attention_columns.positions", request, 1, 2**63 - 1, values=(-(2**63), -1, 1, 2**63 - 1, 2**64)),
        Argument("decode_attention.heads", lambda v: decode(heads=v), 2, 2),
        in_tensor("decode_attention.slots", lambda t: decode(slots=t), 0, 2, other=1),
        in_tensor("decode_attention.lengths", lambda t: decode(lengths=t), -(2**63), 4),
        # Empty tensors, of sizes that no memory holds.
        Argument("otsu_threshold.maps", lambda v: ops.otsu_threshold(torch.empty(0, v, v)), 1, 2**31, values=HUGE),
        Argument("object_masks.maps", lambda v: ops.object_masks(torch.empty(0, 1, v, 9)), 1, 2**31, values=HUGE),
        Argument("token_weights.mask", lambda v: ops.token_weights(torch.empty(0, v, 9)), 1, 2**31, values=HUGE),
    ]


# Small valid sizes of the compiled functions, by the names of _C.pyi. Their other integers are pointers.
SIZES = {
    "count": 2, "cells": 4, "bins": 8, "images": 1, "objects": 1, "height": 4, "width": 16, "blur_size": 3,
    "ldx": 4, "ldo": 4, "rows": 2, "columns": 4, "depth": 4, "heads": 1, "kv_heads": 1, "slot_count": 1, "positions": 1,
    "codes": 8, "top_k": 2, "token_columns": 1,
}  # fmt: skip
OPTIONS = {"dtype": 0, "out_dtype": 0, "slot_stride": 16, "head_stride": 16, "token_stride": 1, "ignore_index": 0}
OPTIONS |= {"bias": 0, "uncond": 0, "valid": 0, "threads": 2}
COLUMN_SIZES = {
    "items": 1,
    "heads": 1,
    "kv_heads": 1,
    "objects": 1,
    "columns": 1,
    "width": 1,
    "length": 2,
    "positions": 2,
}
BLOCK = {"rows": 2, "keys": 2, "first_row": 0, "first_key": 0}


def native_sizes() -> Iterator[tuple[str, Callable[[], None]]]:
    """The compiled functions cannot know what a pointer holds, but refuse sizes that no memory holds."""
    functions = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        kinds = {argument.arg: ast.unparse(argument.annotation or argument) for argument in function.args.posonlyargs}
        if function.name.endswith("_cuda") or not kinds or any("Sequence" in kind for kind in kinds.values()):
            continue
        for size in SIZES.keys() & kinds.keys():
            for value in (-(2**63), -1, 2**63 - 1):
                valid = size in ("top_k", "token_columns") and value > 0
                if not valid and (function.name, size) != ("count_labels", "codes"):
                    call = functools.partial(call_native, function.name, kinds, size, value)
                    yield f"_C.{function.name}.{size}={value}", functools.partial(check_refused, call)
        for value in (-(2**31), 0, 2**31 - 1):
            if "threads" in kinds:
                yield (
                    f"_C.{function.name}.threads={value}",
                    functools.partial(call_native, function.name, kinds, "threads", value),
                )
    for size in COLUMN_SIZES:
        for value in (-(2**63), -1, 2**63 - 1):
            call = functools.partial(call_columns, COLUMN_SIZES | {size: value}, BLOCK)
            yield f"_C.attention_columns.{size}={value}", functools.partial(check_refused, call)
    for size in BLOCK:
        for value in (-(2**63), -1, 3, 2**63 - 1):
            call = functools.partial(call_columns, COLUMN_SIZES, BLOCK | {size: value})
            yield f"_C.block_columns.{size}={value}", functools.partial(check_refused, call)
    yield "_C.attention_columns", functools.partial(call_columns, COLUMN_SIZES, BLOCK)


def check_refused(call: Callable[[], None]) -> None:
    try:
        call()
    except (ValueError, TypeError, MemoryError):
        return
    raise AssertionError("was not refused")


def call_native(function: str, kinds: dict[str, str], name: str, value: int) -> None:
    memory = [torch.zeros(4096, dtype=torch.int64) for _ in kinds]
    arguments = []
    for (argument, kind), tensor in zip(kinds.items(), memory, strict=True):
        default = (SIZES | OPTIONS).get(argument, tensor.data_ptr()) if kind == "int" else 1.0
        arguments.append(value if argument == name else False if kind == "bool" else default)
    getattr(_dispatch.native(), function)(*arguments)


def call_columns(sizes: dict[str, int], block: dict[str, int]) -> None:
    floats, bounds = torch.zeros(8, 64), [torch.tensor([v]) for v in (0, 0, 2, 0, 2)]
    q, k, lse, scores, share, out = (t.data_ptr() for t in floats[:6])
    request, native = [t.data_ptr() for t in bounds], _dispatch.native()
    native.block_columns([scores, share, *request, out], [*block.values()], [*sizes.values()], False, 2)
    native.attention_columns([q, k, lse, share, *request, out], [1] * 9, [*sizes.values()], 1.0, True, 2)


def all_cases() -> list[tuple[str, Callable[[], None]]]:
    return [*(case for argument in public() for case in argument.cases()), *sorted(native_sizes(), key=lambda c: c[0])]


def main(first: int) -> None:
    torch.manual_seed(0)
    if os.environ.get("OSPO_FAST_SANITIZE") != "1":  # whose shadow memory takes all addresses
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number, (_, check) in enumerate(all_cases()[first:], first):
        signal.alarm(MAX_SECONDS)
        try:
            check()
            print(number, "ok", flush=True)
        except BaseException as error:
            print(number, f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
