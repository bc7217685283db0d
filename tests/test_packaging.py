import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    "csrc",
    "kernels",
    "ospo_fast",
    "tests",
    "bench",
    "examples",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
)
SHIPPED += ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt")


def copy_tree(folder: Path) -> Path:
    """Copy the sources without anything built, so that no build touches the checkout."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OSPO_FAST_")}
    return subprocess.run(
        command, check=False, cwd=cwd, env=clean | {"MAX_JOBS": "1"} | env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def dist(tree: Path) -> Path:
    """A source distribution and the wheel built from it, without CUDA and without optimization, which takes longer."""
    done = run(sys.executable, "-m", "build", "--no-isolation", cwd=tree, OSPO_FAST_CUDA="0", CXXFLAGS="-O0")
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


@pytest.fixture(scope="module")
def site(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_source_distribution_is_complete(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*")}
    assert sources <= names
    assert {"kernels/scale_rows.py", "tests/conftest.py", "bench/run.py", "LICENSE", "constraints.txt"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_has_only_the_package(site: Path) -> None:
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"ospo_fast"}
    for name in ("py.typed", "_C.pyi", "kernels/__init__.py", "kernels/scale_rows.py"):
        assert (site / "ospo_fast" / name).is_file(), name
    assert len(list((site / "ospo_fast").glob("_C.*.so"))) == 1
    missing = [
        path
        for path in (ROOT / "ospo_fast").rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyc"} and not (site / path.relative_to(ROOT)).is_file()
    ]
    assert not missing


def test_the_wheel_imports_outside_the_tree_without_torch(site: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import importlib.util, ospo_fast, ospo_fast._C, ospo_fast.kernels\n"
        "assert ospo_fast.__file__.startswith(sys.argv[1]), ospo_fast.__file__\n"
        "assert importlib.util.find_spec('ospo_fast.kernels.scale_rows').origin.startswith(sys.argv[1])\n"
        "assert 'torch' not in sys.modules\n"
        "assert ospo_fast._C.build_info()['cuda'] is False and ospo_fast._C.cuda_versions() is None\n"
    )
    done = run(sys.executable, "-S", "-I", "-c", code, str(site), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs ldd")
def test_the_native_module_links_neither_torch_nor_cuda(site: Path) -> None:
    (module,) = (site / "ospo_fast").glob("_C.*.so")
    linked = run("ldd", str(module), cwd=site).stdout
    assert "libc." in linked
    assert "torch" not in linked
    assert "cuda" not in linked


def test_a_checkout_finds_its_kernels(tree: Path) -> None:
    assert not (tree / "kernels" / "__init__.py").exists()  # it would hide the package `kernels` of PyPI
    code = (
        "import importlib.util, ospo_fast.kernels\n"
        "print(importlib.util.find_spec('ospo_fast.kernels.scale_rows').origin)\n"
        "print(importlib.util.find_spec('kernels').origin)"
    )
    done = run(sys.executable, "-S", "-c", code, cwd=tree)
    assert done.stdout.split() == [str(tree / "kernels" / "scale_rows.py"), "None"], done.stderr


NVCC = """#!/bin/sh
case "$1" in
  --list-gpu-code) echo sm_80; echo sm_90 ;;
  --version) echo "Cuda compilation tools, release 99.0, V99.0.1" ;;
  --help) echo "--compress-mode" ;;
  *) echo "nvcc: broken" >&2; exit 1 ;;
esac
"""


def build(tree: Path, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run build_ext with a C++ compiler that does nothing and an nvcc that supports sm_80 and sm_90 but fails."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    env = {"CUDA_HOME": str(tmp_path / "cuda"), "CXX": "true"} | env
    folders = ("--build-temp", str(tmp_path), "--build-lib", str(tmp_path))
    return run(sys.executable, "setup.py", "-q", "build_ext", *folders, cwd=tree, **env)


def test_a_failing_nvcc_fails_the_build_for_the_architectures_that_it_supports(tree: Path, tmp_path: Path) -> None:
    done = build(tree, tmp_path)
    assert done.returncode != 0
    assert "nvcc: broken" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("_C*.so"))
    ninja = (tmp_path / "build.ninja").read_text()
    assert "-gencode=arch=compute_80,code=[sm_80,compute_80]" in ninja
    assert "-gencode=arch=compute_90,code=sm_90" in ninja
    assert "sm_100" not in ninja
    assert "--compress-mode=size" in ninja


def test_architectures_can_be_chosen(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path, OSPO_FAST_CUDA_ARCHS="90+PTX")
    ninja = (tmp_path / "build.ninja").read_text()
    assert "-gencode=arch=compute_90,code=[sm_90,compute_90]" in ninja
    assert "sm_80" not in ninja


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"OSPO_FAST_CUDA": "yes"}, "OSPO_FAST_CUDA is 'yes'; expected 1"),
        ({"OSPO_FAST_SANITIZE": "yes"}, "OSPO_FAST_SANITIZE is 'yes'; expected 1 (compile with sanitizers)"),
        ({"OSPO_FAST_CUDA_ARCHS": "80 banana"}, "OSPO_FAST_CUDA_ARCHS has 'banana'; expected numbers"),
        ({"OSPO_FAST_CUDA_ARCHS": "120"}, "OSPO_FAST_CUDA_ARCHS has '120'; expected numbers such as 80"),
    ],
)
def test_a_wrong_setting_is_refused(env: dict[str, str], message: str, tree: Path, tmp_path: Path) -> None:
    done = build(tree, tmp_path, **env)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_requested_cuda_without_nvcc_is_refused(tree: Path, tmp_path: Path) -> None:
    done = build(tree, tmp_path, OSPO_FAST_CUDA="1", CUDA_HOME=str(tmp_path / "none"))
    assert done.returncode != 0
    assert "OSPO_FAST_CUDA is 1 but no nvcc was found" in done.stderr


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (
            "echo clang version 17.0.0; echo Target: arm64",
            "needs GCC, but {} is 'clang version 17.0.0'; set CXX",
        ),
        ("exit 1", "needs GCC, but {} is ''; set CXX=g++"),
        ("echo g++ 15.1.0; echo Free Software Foundation", "install the libraries libasan and libubsan of this GCC"),
    ],
)
def test_sanitizers_need_gcc_and_its_libraries(version: str, message: str, tree: Path, tmp_path: Path) -> None:
    """A compiler that answers so to --version, and links nothing with sanitizers."""
    compiler = tmp_path / "cxx"
    compiler.write_text(
        f"""#!/bin/sh
case "$*" in
  --version) {version} ;;
  *-fsanitize*) exit 1 ;;
esac
"""
    )
    compiler.chmod(0o755)
    done = build(tree, tmp_path, OSPO_FAST_SANITIZE="1", CXX=str(compiler))
    assert done.returncode != 0
    assert message.format(compiler) in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("_C*.so"))


def test_a_missing_compiler_is_refused(tree: Path, tmp_path: Path) -> None:
    for number, setting in enumerate(("0", "1")):
        (folder := tmp_path / str(number)).mkdir()
        done = build(tree, folder, OSPO_FAST_SANITIZE=setting, CXX="no-such-compiler -m64")
        assert done.returncode != 0
        assert "CXX is 'no-such-compiler -m64', which was not found; expected a C++ compiler" in done.stderr
        assert "Traceback" not in done.stderr
