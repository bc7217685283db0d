"""The kernels of csrc/object_masks.cu on host threads: their arithmetic and synchronisation without a GPU.

Not tested so: what the compiler for the GPU makes of them, and the launch.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ospo_fast import object_masks, otsu_threshold, token_weights

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ENTRY = """
}  // namespace
extern "C" void otsu(const float* maps, float* thresholds, int count, int cells, int bins) {
    launch(count, OTSU_THREADS, 1, [=] { otsu_threshold_kernel(maps, thresholds, cells, bins); });
}
extern "C" void run(const float* raw, const uint8_t* valid, float* maps, float* thresholds, uint8_t* masks,
                    uint8_t* any, int images, int objects, int teams, int height, int width, float scaler, int bins,
                    float* weights, double gamma, const double* taps, int radius) {
    const MaskTensors t{raw, valid, maps, thresholds, masks, any};
    Blur blur{radius, {}};
    for (int i = 0; i <= radius; ++i) blur.tap[i] = taps[i];
    launch(images, THREADS, teams, [=] {
        object_masks_kernel(t, objects, teams, height, width, scaler, bins, weights, 1.0, gamma, blur);
    });
}
}  // namespace ospo
"""

Run = Callable[..., tuple[list[Tensor], Tensor]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler and POSIX barriers")
    folder = tmp_path_factory.mktemp("object_mask")
    source = (CSRC / "object_masks.cu").read_text()
    kernels = source[: source.index("}  // namespace\n\nint otsu_threshold_cuda")].replace(
        "extern __shared__ double room[];", "double* room = shared_room;"
    )
    kernels = re.sub(r'#include "(device_guard|shared_memory)\.h"\n', "", kernels)
    (folder / "kernels.cpp").write_text('#include "cuda_block.h"\n' + kernels + ENTRY)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-gnu-unique", "-fPIC", "-shared", "-pthread"]
    flags += [f"-I{HERE}", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, folder / "kernels.cpp", "-o", folder / "kernels.so"], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.fixture(scope="module")
def run(library: ctypes.CDLL) -> Run:
    def call(
        maps: Tensor, valid: Tensor | None = None, *, bins: int = 256, teams: int = 1
    ) -> tuple[list[Tensor], Tensor]:
        B, objects, H, W = maps.shape
        shapes = [(maps.shape, torch.float32), ((B, objects), torch.float32), (maps.shape, torch.uint8)]
        out = [torch.full(shape, 77, dtype=dtype) for shape, dtype in [*shapes, ((B, H, W), torch.uint8)]]
        weights, half = torch.full((B, H * W), torch.nan), torch.exp(-0.5 * torch.arange(3.0).double() ** 2)
        taps = half / (2 * half.sum() - half[0])
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (maps, valid, *out)]
        library.run(
            *pointers, B, objects, teams, H, W, ctypes.c_float(0.8), bins, ctypes.c_void_p(weights.data_ptr()),
            ctypes.c_double(0.5), ctypes.c_void_p(taps.data_ptr()), 2,
        )  # fmt: skip
        return out, weights

    return call


def hard_maps(B: int, H: int, W: int) -> Tensor:
    """Six objects: empty bins, two values, tiny and huge ranges, a constant map, and one like any other."""
    maps = torch.rand(B, 6, H, W) ** 2
    maps[:, 0] = (maps[:, 0] * 6).round()
    maps[:, 1] = (maps[:, 1] < 0.5).float() * 3 - 1
    maps[:, 2] = maps[:, 2] * 1e-12 + 1e-3
    maps[:, 3] = 1e30 * maps[:, 3] - 7e29
    maps[:, 4] = 0.25
    return maps


@pytest.mark.parametrize(
    ("shape", "bins", "teams"),
    [
        ((2, 6, 24, 24), 256, 1),
        ((2, 6, 24, 24), 256, 8),  # more teams than objects, of one warp each
        ((1, 6, 24, 24), 40, 4),  # fewer teams than objects, sums of two batches and a rest
        ((2, 3, 13, 7), 17, 2),
        ((1, 1, 1, 1), 256, 1),
        ((1, 0, 5, 5), 7, 1),
    ],
)
def test_the_same_bits_as_on_the_cpu(run: Run, shape: tuple[int, ...], bins: int, teams: int) -> None:
    maps = hard_maps(shape[0], *shape[2:])[:, -shape[1] :] if shape[1] else torch.rand(shape)
    maps, valid = maps.contiguous(), torch.rand(shape[:2]) < 0.8
    for given in (None, valid):
        ours, weights = run(maps, None if given is None else given.to(torch.uint8), bins=bins, teams=teams)
        expected = object_masks(maps, valid=given, bins=bins)
        for tensor, name in zip(ours, ("maps", "thresholds", "masks", "union"), strict=True):
            assert torch.equal(tensor, getattr(expected, name)), name
        torch.testing.assert_close(weights, token_weights(expected.union, gamma=0.5), rtol=1e-7, atol=0)


@pytest.mark.parametrize("teams", [1, 4])
def test_what_is_not_finite_is_marked(run: Run, teams: int) -> None:
    maps = torch.rand(1, 3, 6, 6)
    maps[0, 1, 2, 2], maps[0, 2, 0, 0] = torch.nan, torch.inf
    (_, thresholds, masks, union), _ = run(maps, teams=teams)
    assert thresholds[0].isnan().tolist() == [False, True, True]
    assert not masks[0, 1:].any()
    assert torch.equal(union, masks.amax(1))


def otsu_of(library: ctypes.CDLL, maps: Tensor, bins: int) -> Tensor:
    thresholds = torch.full(maps.shape[:1], 77.0)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (maps, thresholds)]
    library.otsu(*pointers, len(maps), maps[0].numel(), bins)
    return thresholds


@pytest.mark.parametrize(("size", "bins"), [((24, 24), 256), ((13, 7), 17), ((24, 24), 1), ((1, 1), 256)])
def test_otsu_has_the_same_bits_as_on_the_cpu(library: ctypes.CDLL, size: tuple[int, int], bins: int) -> None:
    maps = hard_maps(1, *size)[0]
    maps = maps[[0, 1, 3, 4, 5]].contiguous()  # the range of the third is too small for the bins
    assert torch.equal(otsu_of(library, maps, bins), otsu_threshold(maps, bins=bins))


def test_otsu_marks_maps_that_have_no_threshold(library: ctypes.CDLL) -> None:
    maps = torch.rand(6, 6, 6)
    maps[1, 2, 2], maps[2, 0, 0], maps[3, 5, 5] = torch.nan, torch.inf, -torch.inf
    maps[4] = 1 + 2.0**-20 * maps[4].round()  # too few floats between its extrema
    maps[5] = (maps[5] - 0.5) * 6.8e38  # a range beyond the largest float
    assert otsu_of(library, maps, 256).isnan().tolist() == [False, True, True, True, True, True]
