import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ospo_fast
from ospo_fast import ops, otsu_threshold
from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.decode_attention import decode_attention
from ospo_fast.ops.object_masks import soft_masks
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.silu_mul import silu_mul


def test_every_op_runs_its_reference_on_other_devices() -> None:
    """Such as MPS, which no kernel is for."""
    for op, rows in _dispatch.backends("mps").items():
        assert _dispatch.resolve(op, "auto", "mps", torch.float32) == "torch"
        assert [name for name, available, _ in rows if available] == ["torch"]
        for name, _, reason in rows[:-1]:
            assert reason.endswith("not on mps")
            with pytest.raises(OpError, match="not on mps; use 'auto' or 'torch'"):
                _dispatch.resolve(op, name, "mps")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_a_backend_and_reasons(device: str) -> None:
    table = _dispatch.backends(device)
    internal = {"linear", "skinny_linear", "add_rms_norm", "silu_mul", "decode_attention"}  # of the decoder
    assert set(table) - internal <= set(ospo_fast.__all__)
    for op, rows in table.items():
        assert rows[-1] == ("torch", True, "")
        assert all(bool(reason) != available for _, available, reason in rows)
        first = next(name for name, available, _ in rows if available)
        assert _dispatch.resolve(op, "auto", device) == first


def test_explicit_backends_are_never_replaced() -> None:
    assert _dispatch.resolve("otsu_threshold", "torch", "cpu") == "torch"
    assert _dispatch.resolve("otsu_threshold", "cpp", "cpu") == "cpp"
    with pytest.raises(OpError, match=r"'cpp' takes tensors on cpu, not on cuda; use 'auto' or 'torch'"):
        _dispatch.resolve("otsu_threshold", "cpp", "cuda")
    with pytest.raises(OpError, match="backend='mps' is unknown, expected one of 'auto', 'torch', 'cuda', 'cpp'"):
        _dispatch.resolve("otsu_threshold", "mps", "cpu")


@pytest.mark.parametrize(
    ("width", "dtype", "reason"),
    [
        (16, torch.bfloat16, r"got torch\.bfloat16, expected float32"),
        (16, torch.float64, r"got torch\.float64, expected float32"),
        (24, torch.float32, "the heads have width 24, expected a multiple of 16 up to 256"),
        (272, torch.float32, "the heads have width 272"),
    ],
)
def test_limits_of_the_kernels_of_the_decoder(width: int, dtype: torch.dtype, reason: str) -> None:
    x, slots = torch.randn(2, 3 * width, dtype=dtype), torch.tensor([0, 1])
    cache = torch.zeros(2, 1, 4, width, dtype=dtype)
    calls = {
        "decode_attention": lambda backend: decode_attention(
            x, *torch.ones(2, 4, width, dtype=dtype), cache, cache.clone(), slots, slots, heads=1, scale=1.0,
            backend=backend,
        ),
        "add_rms_norm": lambda backend: add_rms_norm(None, x.clone(), x[0], 1e-6, backend=backend),
        "silu_mul": lambda backend: silu_mul(x[:, : 2 * width].contiguous(), backend=backend),
    }  # fmt: skip
    for name, call in calls.items():
        if dtype == torch.float32 and name != "decode_attention":  # its width does not matter
            assert torch.equal(call("auto"), call("cpp"))
            continue
        assert torch.equal(call("auto"), call("torch"))
        with pytest.raises(OpError, match=f"{name}: backend='cpp' cannot run here: {reason}"):
            call("cpp")


def test_missing_requirements_of_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        return {name: why for name, _, why in _dispatch.backends("cuda")["token_logprobs"]}["cuda"]

    monkeypatch.setattr(_dispatch, "_native", lambda: (SimpleNamespace(build_info=lambda: {"cuda": True}), ""))
    monkeypatch.setattr(_dispatch, "_triton_error", lambda: "triton is not installed")
    assert reason() == "triton is not installed"
    monkeypatch.setattr(_dispatch, "_native", lambda: (SimpleNamespace(build_info=lambda: {"cuda": False}), ""))
    assert "built without CUDA; reinstall the package where nvcc is found" in reason()


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    maps = torch.rand(2, 5, 5)
    expected = otsu_threshold(maps)
    _dispatch._warn_once.cache_clear()
    monkeypatch.setattr(_dispatch, "_native", lambda: (None, "ospo_fast._C cannot be imported (gone)"))
    assert ("cpp", False, "ospo_fast._C cannot be imported (gone)") in _dispatch.backends()["otsu_threshold"]
    with caplog.at_level(logging.WARNING):
        assert torch.equal(otsu_threshold(maps), expected)
        assert torch.equal(otsu_threshold(maps), expected)
    assert [r.getMessage() for r in caplog.records] == [
        "PyTorch references run in place of the compiled ops: ospo_fast._C cannot be imported (gone)"
    ]
    with pytest.raises(OpError, match=r"backend='cpp' cannot run here: .* cannot be imported"):
        _dispatch.resolve("otsu_threshold", "cpp", "cpu")
    _dispatch._warn_once.cache_clear()


_HIDDEN, _HEAD, _MAPS = torch.randn(2, 3, 4), torch.nn.Linear(4, 7), torch.rand(2, 1, 3, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda wrong: ops.token_logprobs(_HIDDEN, _HEAD, wrong(2, 3)),
        lambda wrong: ops.cross_entropy(_HIDDEN, _HEAD, wrong(2, 3)),
        lambda wrong: ops.attention_columns(_MAPS, _MAPS, wrong(2, 1, 1), rows=(0, 1)),
        lambda wrong: ops.attention_columns(_MAPS, _MAPS, torch.zeros(2, 1, 1).long(), rows=(wrong(2), 1)),
        lambda wrong: ops.sample_codes(torch.randn(2, 9), seeds=wrong(2), step=0),
        lambda wrong: ops.sample_codes(torch.randn(2, 9), seeds=[0, 1], step=wrong(2)),
        lambda wrong: ops.token_weights(wrong(2, 3, 3)),
    ],
)
def test_no_imaginary_part_is_lost_on_the_way_to_an_integer(call: Any) -> None:
    """PyTorch drops it, with a warning only."""
    with pytest.raises(OpError, match="complex64"):
        call(lambda *shape: torch.zeros(shape, dtype=torch.complex64))


_ROWS = torch.randn(2)


@pytest.mark.parametrize(
    "wrong", ["x", "1", b"1", 1j, [1], (), torch.ones(2), torch.ones((), requires_grad=True), 10**400]
)
@pytest.mark.parametrize(
    ("op", "name", "call"),
    [
        *[
            ("token_weights", name, lambda **wrong: ops.token_weights(torch.ones(1, 2, 2), **wrong))
            for name in ("alpha", "gamma", "blur_sigma")
        ],
        ("object_masks", "scaler", lambda **wrong: ops.object_masks(_MAPS, **wrong)),
        *[
            ("soft_masks", name, lambda **wrong: soft_masks(ops.object_masks(_MAPS), **wrong))
            for name in ("scaler", "sharpness")
        ],
        *[
            ("sample_codes", name, lambda **wrong: ops.sample_codes(torch.randn(2, 9), seeds=0, step=0, **wrong))
            for name in ("guidance_scale", "temperature", "top_p")
        ],
        *[
            (
                "attention_columns",
                name,
                lambda **wrong: ops.attention_columns(_MAPS, _MAPS, torch.zeros(2, 1, 1).long(), rows=(0, 1), **wrong),
            )
            for name in ("scale", "weight")
        ],
        *[
            (
                "preference_loss",
                name,
                lambda **wrong: ops.preference_loss(_ROWS, _ROWS, **{"beta": 1.0, "gamma_beta_ratio": 0.0, **wrong}),
            )
            for name in ("beta", "gamma_beta_ratio", "beta_cond", "gamma_beta_ratio_cond", "label_smoothing")
        ],
        ("Head.guided", "scale", lambda scale: ops.Head(_MAPS[0, 0]).guided(_MAPS, _MAPS, scale)),
        ("add_rms_norm", "eps", lambda eps: add_rms_norm(None, torch.ones(2, 3), torch.ones(3), eps)),
        *[
            (
                "token_logprobs",
                name,
                lambda **wrong: ops.token_logprobs(_HIDDEN, _HEAD, torch.zeros(2, 3).long(), **wrong),
            )
            for name in ("temperature", "softcap")
        ],
    ],
)
def test_what_is_no_number_is_named(op: str, name: str, call: Any, wrong: Any) -> None:
    with pytest.raises(OpError, match=rf"^{op}: {name} is "):
        call(**{name: wrong})


def test_what_converts_to_a_number_is_one() -> None:
    mask = torch.tensor([[[0, 1]]])
    for two in (2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor([2]), True + 1):
        assert ops.token_weights(mask, alpha=two, blur_size=1).tolist() == [[1, 3]]
    for wrong in ("x", None, [1], 1.5):
        with pytest.raises(OpError, match=r"sample_codes: top_k is .*, expected an integer"):
            ops.sample_codes(torch.randn(2, 9), seeds=0, step=0, top_k=wrong)
