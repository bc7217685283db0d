"""Check an installed wheel: python -I tests/installed_wheel.py [--native yes|no] [--cuda yes|no].

The release workflow, `make wheels` and CI run this in a new environment without a compiler. With torch in it, every
operation runs and agrees with its PyTorch reference.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any


def check_files(native: bool, cuda: bool) -> None:
    """Check that the package is installed, whole, and imports without torch."""
    import ospo_fast
    import ospo_fast.kernels

    folder = Path(ospo_fast.__file__).parent
    assert "site-packages" in folder.parts, f"{folder} is not installed"
    assert importlib.util.find_spec("ospo_fast.kernels.attention_columns") is not None, "kernels are missing"
    assert (folder / "shapes" / "checkpoint" / "model.safetensors").is_file(), "the checkpoint is missing"
    assert (importlib.util.find_spec("ospo_fast._C") is not None) == native
    assert "torch" not in sys.modules
    print(f"ospo_fast {ospo_fast.__version__} in {folder}")
    if native and importlib.util.find_spec("torch") is None:
        import ospo_fast._C

        info = ospo_fast._C.build_info()
        assert info["cuda"] is cuda, info
        print(info)


def check_operations(native: bool, cuda: bool) -> None:
    """Compare every operation on the CPU with its reference: those of compiled kernels, forward and backward."""
    import torch

    import ospo_fast as of
    from ospo_fast.ops import _dispatch

    print(f"torch {torch.__version__}")
    if native:
        assert _dispatch.native().build_info()["cuda"] is cuda
    chosen = {op: next(name for name, there, _ in rows if there) for op, rows in _dispatch.backends("cpu").items()}
    compiled = {op for op, name in chosen.items() if name == "cpp"}
    assert len(compiled) == (10 if native else 0), chosen

    torch.manual_seed(0)
    hidden, head = torch.randn(40, 32), torch.nn.Linear(32, 64)
    labels, maps = torch.randint(64, (40,)), torch.rand(2, 3, 24, 24)
    q, k = torch.randn(2, 1, 4, 30, 16)

    def close(name: str, ours: Any, reference: Any) -> None:
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")

    gradients = {}
    for backend in ("auto", "torch"):
        x = hidden.clone().requires_grad_()
        logps = of.token_logprobs(x, head, labels, backend=backend)
        gradients[backend] = (logps.detach(), *torch.autograd.grad(logps.square().sum(), [x, *head.parameters()]))
    for ours, reference in zip(*gradients.values(), strict=True):
        close("token_logprobs", ours, reference)
    columns = torch.tensor([[[1, 2], [3, -1]]])
    attention = [of.attention_columns(q, k, columns, rows=(10, 20), backend=name) for name in ("auto", "torch")]
    close("attention_columns", *attention)
    masks = of.object_masks(maps)
    close("otsu_threshold", of.otsu_threshold(masks.maps), masks.thresholds)
    weights = of.token_weights(masks.union)
    scores = of.sequence_logprobs(-torch.rand(2, 576), torch.ones(2, 576, dtype=torch.bool), weights)
    assert of.preference_loss(scores[:1], scores[1:], beta=5.0, gamma_beta_ratio=0.5).simpo.isfinite().all()
    codes = of.sample_codes(torch.randn(3, 64), seeds=torch.arange(3), step=0)
    assert codes.shape == (3,)
    out = of.OSPOLoss(of.OSPOLossConfig.preset("v3"))(
        torch.randn(2, 30, 32, requires_grad=True), torch.randint(64, (2, 30)), head
    )
    out.loss.backward()
    assert out.loss.isfinite()
    print(f"{len(compiled)} operations run compiled kernels: {' '.join(sorted(compiled)) or 'none, pure Python'}")


def main() -> None:
    """Run the checks that the installed packages allow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("native", "cuda"):
        parser.add_argument(f"--{name}", choices=("yes", "no"), default="yes" if name == "native" else "no")
    options = parser.parse_args()
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    native, cuda = options.native == "yes", options.cuda == "yes"
    check_files(native, cuda)
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: the operations are not checked")
    else:
        check_operations(native, cuda)


if __name__ == "__main__":
    main()
