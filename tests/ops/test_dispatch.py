import logging
from types import SimpleNamespace

import pytest
import torch

import ospo_fast
from ospo_fast import otsu_threshold
from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch


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
