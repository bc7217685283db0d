"""Every kernel compiles as it is launched: without spills, within the card's shared memory, with IEEE divisions."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is only there on Linux")

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("launches.py")
ARCHS = (80, 90, 100)


def kernels() -> set[str]:
    """The names of all that is launched: of functions with a grid."""
    sources = (path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return {name for source in sources for name in re.findall(r"(\w+_kernel)\[", source)}


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, "subprocess.Popen[str]"]]:
    """A process for each architecture, all at once. This one runs kernels in the interpreter where there is no GPU."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    begun = {}
    for arch in ARCHS:
        cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp(f"sm_{arch}"))}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun[arch] = subprocess.Popen([sys.executable, str(SCRIPT), str(arch)], env=env | cache, **streams)
    yield begun
    for process in begun.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_as_it_is_launched(
    arch: int, compilations: dict[int, "subprocess.Popen[str]"], capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = compilations[arch].communicate(timeout=900)
    assert compilations[arch].returncode == 0, out + err
    *lines, summary = out.splitlines()
    with capsys.disabled():  # what a reader of the whole run looks for
        print(f"\n{summary}")
    assert {line.split()[0] for line in lines} == kernels()
    assert all(f" sm_{arch} " in line for line in lines)
    assert not [line for line in lines if " 0 bytes of spills" not in line]
    # Threads of a split wait for one another after its blocks, not in each.
    assert not [line for line in lines if line.startswith("split_kernel") and "barriers in loops" in line]
    # Kernels of a decoder step divide as the PyTorch reference does.
    step = ("combine_", "store_", "add_rms_norm_", "silu_mul_", "skinny_linear_")
    assert not [line for line in lines if line.startswith(step) and "approximate" in line]
    assert re.fullmatch(
        rf"sm_{arch}: {len(lines)} kernels, 0 with spills; most shared memory \d+ of \d+ bytes .*", summary
    )


def test_a_kernel_that_needs_more_than_the_card_has_is_an_error(tmp_path: Path) -> None:
    """The stand-in refuses what a card would refuse; sm_120 has less than half of the shared memory of sm_90."""
    code = (
        "import launches, skinny_linear as bench\n"
        "from ospo_fast.kernels import skinny_linear as kernels\n"
        "kernels.COLUMNS, kernels.STAGES = 64, 5\n"
        "with launches.standing_in(launches.Card(120)):\n"
        "    launches.skinny(4096, 11008)\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), str(SCRIPT.parent)])
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "OutOfResources" in done.stderr
    assert "Hardware limit: 101376" in done.stderr
