"""No integer argument ends the process, hangs or takes all memory, with any value (extreme_sizes.py)."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ospo_fast import ops
from ospo_fast.errors import OpError
from ospo_fast.ops.decode_attention import decode_attention
from ospo_fast.ops.linear import PackedLinear, gelu_
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.sample_codes import sample_codes_into
from ospo_fast.ops.silu_mul import silu_mul

PROGRAM = Path(__file__).with_name("extreme_sizes.py")
if sys.platform != "linux":
    pytest.skip("the cases limit their memory by what /proc tells", allow_module_level=True)


def case_names() -> list[str]:
    spec = importlib.util.spec_from_file_location("extreme_sizes", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [name for name, _ in module.all_cases()]


NAMES = case_names()


@pytest.fixture(scope="module")
def results() -> list[str]:
    """Result of each case. One process runs them all, and the next one runs those after a case that ended it."""
    found: list[str] = []
    while len(found) < len(NAMES):
        command = [sys.executable, str(PROGRAM), str(len(found))]
        run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=PROGRAM.parents[2])
        found += [line.split(" ", 1)[1] for line in run.stdout.splitlines()]
        if len(found) < len(NAMES):
            found.append(f"ended the process with code {run.returncode}: {run.stderr[-2000:]}")
    return found


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_extreme_sizes(number: int, results: list[str]) -> None:
    assert results[number] == "ok"


def outputs(rows: int) -> list[torch.Tensor]:
    """Results of every compiled op on a CPU."""
    torch.manual_seed(0)
    maps, logits, hidden = torch.rand(rows, 2, 9, 7), torch.randn(2, rows, 333), torch.randn(rows, 48)
    labels, head, linear = torch.arange(rows), nn.Linear(48, 333).requires_grad_(False), nn.Linear(48, 70)
    masks, leaf = ops.object_masks(maps), hidden.clone().requires_grad_()
    found = [ops.otsu_threshold(maps), masks.masks, masks.union, ops.token_weights(maps[:, 0])]
    sampling: tuple[dict[str, Any], ...] = ({}, {"top_k": 9}, {"top_p": 0.7})
    found += [ops.sample_codes(*logits, guidance_scale=3.0, seeds=range(rows), step=1, **o) for o in sampling]
    found += ops.token_logprobs(leaf, head, labels, softcap=3.0, return_entropy=True)
    ops.token_logprobs(leaf, head, labels).sum().backward()
    assert leaf.grad is not None
    q, k, lse = torch.randn(rows, 4, 50, 16), torch.randn(rows, 2, 50, 16), torch.full((rows, 4, 50), 4.0)
    columns = torch.randint(0, 50, (rows, 2, 3))
    found += [leaf.grad, *(ops.attention_columns(q, k, columns, rows=(3, 45), lse=x) for x in (None, lse))]
    cache, table, slots = torch.randn(2, rows, 2, 40, 16), torch.randn(2, 40, 16), torch.arange(rows)
    found.append(decode_attention(q[:, :, :2].flatten(1), *table, *cache, slots, slots % 40, heads=4, scale=0.25))
    norm = add_rms_norm(None, hidden.clone(), torch.randn(48), 1e-6)
    return [x.detach() for x in (*found, PackedLinear([linear])(hidden), norm, silu_mul(hidden), gelu_(hidden.clone()))]


@pytest.mark.parametrize("rows", [3, 37])  # fewer rows than threads, and more
def test_results_do_not_depend_on_the_number_of_threads(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(threads: int) -> list[torch.Tensor]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # of the compiled ops alone, not of torch
        return outputs(rows)

    expected = run(1)
    for threads in (2, 8, 1000):
        for result, single in zip(run(threads), expected, strict=True):
            assert torch.equal(result, single)


def decode(**change: Any) -> None:
    """2 rows, 2 heads of width 16, 3 slots of 5 positions."""
    cache = torch.zeros(2, 3, 2, 5, 16)
    given = {
        "qkv": torch.zeros(2, 96), "cos": torch.zeros(9, 16), "sin": torch.zeros(9, 16), "keys": cache[0],
        "values": cache[1], "slots": torch.tensor([0, 2]), "lengths": torch.tensor([4, 0]), "heads": 2,
    }  # fmt: skip
    decode_attention(**given | change, scale=1.0)


def sample_into(**change: Any) -> None:
    given: dict[str, Any] = {name: torch.zeros(2, dtype=torch.int64) for name in ("seeds", "steps", "codes")}
    given |= {"error_steps": torch.tensor([-1, -1]), "tokens": torch.zeros(2, 3, dtype=torch.int64)}
    sample_codes_into(torch.rand(2, 5), **given | change)


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (decode, {"lengths": torch.tensor([5, 0])}, "lengths is 5, expected 0 to 4"),
        (decode, {"cos": torch.zeros(4, 16), "sin": torch.zeros(4, 16)}, "lengths is 4, expected 0 to 3"),
        (decode, {"slots": torch.tensor([0, 3])}, "slots is 3, expected 0 to 2"),
        (decode, {"slots": torch.zeros(1, dtype=torch.int64)}, r"slots and lengths are \(1,\) and \(2,\)"),
        (decode, {"qkv": torch.zeros(2, 95)}, r"qkv is \(2, 95\), expected contiguous \(2, 96\) for 2 heads"),
        (decode, {"heads": 3}, "heads is 3, expected a multiple of the 2 heads"),
        (decode, {"values": torch.zeros(3, 2, 4, 16)}, r"keys and values are \(3, 2, 5, 16\) and \(3, 2, 4, 16\)"),
        (decode, {"keys": torch.zeros(3, 2, 16, 5).mT, "values": torch.zeros(3, 2, 16, 5).mT}, "keys have strides"),
        (decode, {"sin": torch.zeros(9, 8)}, r"cos and sin are \(9, 16\) and \(9, 8\)"),
        (decode, {"out": torch.zeros(2, 31)}, r"out is \(2, 31\), expected contiguous \(2, 32\)"),
        (sample_into, {"steps": torch.tensor([0, 3])}, "steps is 3, expected 0 to 2"),
        (sample_into, {"steps": torch.tensor([-1, 0])}, "steps is -1, expected 0 to 2"),
        (sample_into, {"steps": torch.tensor([0])}, r"error_steps are \(2,\), \(1,\), \(2,\), \(2,\); expected \(2,\)"),
        (sample_into, {"tokens": torch.zeros(3, 2, dtype=torch.int64).T}, r"tokens are \(2, 3\) with strides \(1, 2\)"),
    ],
)
def test_what_would_leave_the_tensors_is_refused(call: Callable[..., None], change: Any, message: str) -> None:
    with pytest.raises(OpError, match=message):
        call(**change)


def test_linear_refuses_other_shapes() -> None:
    linear = PackedLinear([nn.Linear(4, 6)])
    for x, out in ((torch.zeros(2, 5), None), (torch.zeros(2, 4), torch.zeros(2, 5)), (torch.zeros(4, 2).T, None)):
        with pytest.raises(OpError, match=r"linear: x is .* expected"):
            linear(x, out)
