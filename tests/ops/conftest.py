"""Golden values (tests/golden/README.md) and the error bound of the ops."""

import ctypes
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
CSRC = Path(__file__).parents[2] / "csrc"
ON_HOST = Path(__file__).with_name("cuda_on_host")
C_TYPES = {"bool": ctypes.c_bool, "int": ctypes.c_int, "int64_t": ctypes.c_int64, "Dtype": ctypes.c_int}
C_TYPES |= {"float": ctypes.c_float, "double": ctypes.c_double}


@pytest.fixture
def golden() -> Callable[[str], Any]:
    """Load a file of golden values by name: the arrays of an .npz as a dict, or the contents of a .json."""

    def load(name: str) -> Any:
        if name.endswith(".json"):
            return json.loads((GOLDEN / name).read_text())
        with np.load(GOLDEN / name) as arrays:
            return dict(arrays)

    return load


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """Assert error(ours) <= 2 · error(eager) + a few roundings of the results, both against float64."""

    def check(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert ours.shape == exact.shape
        bound = 2 * (eager.double() - exact).abs().max() + 4 * torch.finfo(ours.dtype).eps * exact.abs().max()
        error = (ours.double() - exact).abs().max()
        assert error <= bound, f"error {error:.3e} above the bound {bound:.3e}"

    return check


@pytest.fixture
def poisoned() -> Any:
    """Fill memory that torch allocates uninitialized with NaN, or with the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # the filling needs this mode
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


class HostKernel:
    """A CUDA function of csrc/common.h on the host. Calls pass tensors for pointers, without device and stream."""

    def __init__(self, library: ctypes.CDLL, types: list[Any]) -> None:
        self.library, self.run = library, library.run
        self.run.argtypes = types

    def __call__(self, *arguments: Any, device: int = 0, reverse: bool = False) -> None:
        """reverse: the threads run in descending order between two barriers, so that a missing barrier shows."""
        self.variable("reverse_threads", ctypes.c_bool).value = reverse
        given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        assert self.run(*given, device, None) == 0

    def variable(self, name: str, kind: Any) -> Any:
        """A variable of cuda_on_host.h, with an attribute `value`."""
        return kind.in_dll(self.library, name)


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HostKernel]:
    """Compile a CUDA function and the sources that it needs for the host (cuda_on_host.h).

    Its arithmetic and synchronization are tested, but neither what nvcc makes of them nor the launch.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")

    @functools.cache
    def build(function: str, source: str, *others: str) -> HostKernel:
        folder = tmp_path_factory.mktemp(function)
        text = re.sub(r"#include <cuda_\w+\.h>\n", "", (CSRC / source).read_text())
        shared = r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];"
        text = re.sub(shared, r"\1* const \2 = host::dynamic_shared<\1>();", text)
        text = re.sub(r'asm\("ex2\.approx\.ftz\.f32 .*"f"\((.*)\)\);', r"y = host::exp2(\1);", text)
        declared = re.search(rf"int {function}\(([^)]*)\);", (CSRC / "common.h").read_text())
        assert declared is not None
        names = ", ".join(re.findall(r"(\w+)(?:,|$)", declared[1]))
        text += f'using namespace ospo;\nextern "C" int run({declared[1]}) {{ return {function}({names}); }}\n'
        (folder / "kernel.cpp").write_text(text)
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-fno-gnu-unique"]
        flags += ["-U_FORTIFY_SOURCE", "-DOSPO_CUDA=1", f"-I{ON_HOST}", f"-I{CSRC}", "-include", "cuda_on_host.h"]
        library = folder / "kernel.so"
        files = [folder / "kernel.cpp", *(CSRC / other for other in others)]
        subprocess.run([compiler, *flags, *files, "-o", library], check=True)
        types = [part.split() for part in declared[1].split(",")]
        return HostKernel(
            ctypes.CDLL(str(library)),
            [ctypes.c_void_p if "*" in "".join(words) else C_TYPES[words[0]] for words in types],
        )

    return build


@pytest.fixture
def hard_maps() -> Callable[..., Tensor]:
    """Maps (B, objects, H, W): empty bins, two values, tiny and huge ranges, a constant map, a random map."""

    def make(B: int, objects: int, H: int, W: int) -> Tensor:
        maps = torch.rand(B, 6, H, W) ** 2
        maps[:, 0] = (maps[:, 0] * 6).round()
        maps[:, 1] = (maps[:, 1] < 0.5).float() * 3 - 1
        maps[:, 2] = maps[:, 2] * 1e-12 + 1e-3
        maps[:, 3] = 1e30 * maps[:, 3] - 7e29
        maps[:, 4] = 0.25
        return maps[:, 6 - objects :].contiguous()

    return make
