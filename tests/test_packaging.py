import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = ROOT / "tests" / "installed_wheel.py"
SHIPPED = (
    "csrc",
    "docs",
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
SHIPPED += ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "SECURITY.md", "constraints.txt")


def copy_tree(folder: Path) -> Path:
    """Copy the sources without anything built, so that no build touches the checkout."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
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
    folder = tmp_path_factory.mktemp("site") / "site-packages"
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
    # Golden values and results would be two thirds of it.
    assert not [name for name in names if name.startswith("bench/results") or name.endswith(".npz")]
    golden = {name for name in names if name.startswith("tests/golden/")}
    assert golden == {"tests/golden/README.md", "tests/golden/make.py"}


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
    assert {path.parent.name for path in missing} == {"checkpoint-large"}, missing


def test_the_compiled_operations_of_the_wheel_agree_with_the_references(site: Path, tmp_path: Path) -> None:
    done = run_installed(site, CHECK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10 operations run compiled kernels" in done.stdout


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


@pytest.fixture(scope="module")
def pure(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of a machine without a C++ compiler."""
    folder = tmp_path_factory.mktemp("pure")
    command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder))
    done = run(*command, cwd=tree, PATH=str(tmp_path_factory.mktemp("empty")), CXX="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pure Python; the operations run the PyTorch references" in done.stdout
    (wheel,) = folder.glob("*-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site-packages")
    return folder / "site-packages"


def run_installed(site: Path, script: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with the package of an unpacked wheel, and not with an editable install of this environment."""
    code = (
        "import runpy, sys; site, script = sys.argv[1:3]; sys.argv = sys.argv[2:]; sys.path.insert(0, site)\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]\n"
        "runpy.run_path(script, run_name='__main__')"
    )
    return run(sys.executable, "-I", "-c", code, str(site), str(script), *arguments, cwd=cwd)


def test_wheels_leave_out_the_checkpoint_of_the_second_world(pure: Path, tmp_path: Path) -> None:
    assert not (pure / "ospo_fast" / "shapes" / "checkpoint-large").exists()
    (tmp_path / "find.py").write_text("from ospo_fast.models import find_model\nfind_model('shapes-large')\n")
    done = run_installed(pure, tmp_path / "find.py", cwd=tmp_path)
    assert "wheels leave out the checkpoint of shapes-large; install from a clone of the repository" in done.stderr


def test_without_a_compiler_the_wheel_is_pure_python_and_runs_the_references(pure: Path, tmp_path: Path) -> None:
    assert not list(pure.rglob("*.so"))
    done = run_installed(pure, CHECK, "--native", "no", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0 operations run compiled kernels: none, pure Python" in done.stdout
    # The warning and the report say so.
    assert "a pure-Python install" in done.stderr
    done = run_installed(pure, pure / "ospo_fast" / "__main__.py", "env", cwd=tmp_path)
    assert "built  no: pure Python, the operations run the PyTorch references" in done.stdout
    assert "a pure-Python install" in done.stdout


def test_the_check_of_installed_wheels_finds_what_is_missing(pure: Path, tmp_path: Path) -> None:
    assert run_installed(pure, CHECK, cwd=tmp_path).returncode != 0  # it should be native
    (pure / "ospo_fast" / "shapes" / "checkpoint" / "model.safetensors").rename(tmp_path / "moved")
    try:
        done = run_installed(pure, CHECK, "--native", "no", cwd=tmp_path)
    finally:
        (tmp_path / "moved").rename(pure / "ospo_fast" / "shapes" / "checkpoint" / "model.safetensors")
    assert "the checkpoint is missing" in done.stderr


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
    assert "-gencode=arch=compute_80,code=sm_80 " in ninja
    assert "-gencode=arch=compute_90,code=[sm_90,compute_90]" in ninja  # for what is after the newest
    assert "sm_100" not in ninja
    assert "--compress-mode=size" in ninja


def test_architectures_can_be_chosen(tree: Path, tmp_path: Path) -> None:
    build(tree, tmp_path, OSPO_FAST_CUDA_ARCHS="90+PTX")
    ninja = (tmp_path / "build.ninja").read_text()
    assert "-gencode=arch=compute_90,code=[sm_90,compute_90]" in ninja
    assert "sm_80" not in ninja


@pytest.mark.parametrize(
    ("cards", "archs"), [("9.0\\n8.0\\n9.0\\n", ["80", "90"]), ("", []), ("[N/A]\\n", None), (None, [])]
)
def test_cuda_is_compiled_for_the_cards_of_this_machine(
    cards: str | None, archs: list[str] | None, tree: Path, tmp_path: Path
) -> None:
    """No card, or no driver: no CUDA. An answer that is no architecture is refused."""
    if cards is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{cards}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = build(tree, tmp_path, OSPO_FAST_CUDA_ARCHS="native", PATH=path)
    if archs is None:
        assert "OSPO_FAST_CUDA_ARCHS has '[N/A]'; expected numbers" in done.stderr
        return
    ninja = (tmp_path / "build.ninja").read_text()
    assert re.findall(r"code=sm_(\d+)", ninja) == archs
    assert ("-cudart=static" in ninja) == bool(archs)


def test_requested_cuda_without_a_card_to_compile_for_is_refused(tree: Path, tmp_path: Path) -> None:
    done = build(tree, tmp_path, OSPO_FAST_CUDA="1", OSPO_FAST_CUDA_ARCHS="native")
    assert done.returncode != 0
    assert "OSPO_FAST_CUDA_ARCHS is 'native' but nvidia-smi lists no card; name architectures" in done.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"OSPO_FAST_CUDA": "yes"}, "OSPO_FAST_CUDA is 'yes'; expected 1"),
        ({"OSPO_FAST_NATIVE": "yes"}, "OSPO_FAST_NATIVE is 'yes'; expected 1 (compile), 0 (pure Python)"),
        ({"OSPO_FAST_NATIVE": "0", "OSPO_FAST_CUDA": "1"}, "OSPO_FAST_NATIVE is 0 but OSPO_FAST_CUDA is 1"),
        ({"OSPO_FAST_NATIVE": "0", "OSPO_FAST_SANITIZE": "1"}, "OSPO_FAST_NATIVE is 0 but OSPO_FAST_SANITIZE is 1"),
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


@pytest.mark.parametrize("name", ["OSPO_FAST_NATIVE", "OSPO_FAST_CUDA", "OSPO_FAST_SANITIZE"])
@pytest.mark.parametrize("works", [True, False])
def test_a_required_compiler_that_is_missing_or_broken_is_refused(
    name: str, works: bool, tree: Path, tmp_path: Path
) -> None:
    """The c++ of macOS without its tools exists and fails."""
    if not works:
        (tmp_path / "c++").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "c++").chmod(0o755)
    done = build(tree, tmp_path, CXX="", PATH=str(tmp_path), **{name: "1"})
    assert done.returncode != 0
    assert f"{name} is 1 but no C++ compiler was found; install g++ or clang++, or set CXX" in done.stderr
    assert "Traceback" not in done.stderr


def setup(tree: Path, *arguments: str, platform: str = sys.platform, **env: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py as on another platform."""
    code = (
        "import runpy, sys, pybind11, setuptools.command.build_ext\n"
        "sys.platform, sys.argv = sys.argv[1], ['setup.py', *sys.argv[2:]]\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    return run(sys.executable, "-c", code, platform, *arguments, cwd=tree, **env)


def test_windows_gets_pure_python_even_with_a_compiler(tree: Path) -> None:
    done = setup(tree, "--name", platform="win32", CXX="true")
    assert "pure Python" in done.stdout, done.stderr
    done = setup(tree, "--name", platform="win32", CXX="true", OSPO_FAST_NATIVE="1")
    assert "OSPO_FAST_NATIVE is 1, but ospo-fast compiles on Linux and macOS only; on Windows use WSL" in done.stderr


def test_an_editable_install_without_kernels_does_not_use_those_of_an_earlier_build(tree: Path) -> None:
    stale = tree / "ospo_fast" / "_C.cpython-311.so"
    stale.touch()
    try:
        done = setup(tree, "editable_wheel", OSPO_FAST_NATIVE="0")
        assert done.returncode != 0
        assert "ospo_fast/_C.cpython-311.so of an earlier build would be used; delete it" in done.stderr
        assert setup(tree, "--name", OSPO_FAST_NATIVE="0").returncode == 0  # a wheel does not hold it
    finally:
        stale.unlink()


def ranges() -> dict[str, tuple[str, str]]:
    from ospo_fast.env import TESTED

    return TESTED


def test_the_workflow_builds_and_tests_the_versions_that_env_names() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    tested, matrix = ranges(), workflow["jobs"]["test"]["strategy"]["matrix"]
    assert tuple(matrix["torch"]) == tested["torch"]
    assert (matrix["python"][0], matrix["python"][-1]) == tested["python"]
    assert {(row["runner"].split("-")[0], row["pure"]) for row in matrix["include"] if "pure" in row} == {
        ("windows", True),
        ("macos", True),
    }
    project = (ROOT / "pyproject.toml").read_text()
    builds = re.findall(r'^build = "(.*)"', project, re.MULTILINE)[0].split()
    classified = re.findall(r"Python :: (3\.\d+)", project)
    assert [f"cp{minor.replace('.', '')}-*" for minor in classified] == builds
    assert matrix["python"] == classified


def test_tested_versions_hold_those_of_the_constraints_and_of_ci() -> None:
    def number(text: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", text)))

    constraints = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "transformers"):
        oldest, newest = ranges()[name]
        pinned = re.findall(rf"^{name}==([\d.]+)", constraints, re.MULTILINE)
        assert pinned
        assert all(number(oldest) <= number(version) <= number(newest) for version in pinned), name
    script = (ROOT / ".ci" / "run").read_text()
    assert f'versions="{" ".join(ranges()["transformers"])}"' in script
    # No version above the tested ones is refused by pip.
    assert not re.findall(r'"(?:torch|transformers|trl|numpy)[^"]*<', (ROOT / "pyproject.toml").read_text())


def test_make_says_what_it_installs_before_it_does() -> None:
    """pip's own output follows, also of the build."""
    done = run("make", "--dry-run", "--always-make", "install", cwd=ROOT)
    lines = done.stdout.splitlines()
    said = next(i for i, line in enumerate(lines) if "minutes" in line)
    pip = next(i for i, line in enumerate(lines) if "pip install" in line)
    assert said < pip, lines
    assert "GB" in "".join(lines[:pip])
    assert "--quiet" not in lines[pip]
    assert "OSPO_FAST_CUDA_ARCHS=${OSPO_FAST_CUDA_ARCHS-native}" in lines[pip]


def wheels() -> Any:
    spec = importlib.util.spec_from_file_location("wheels", ROOT / ".ci" / "wheels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_wheels_finds_each_python_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one on the PATH that runs; a shim that fails is passed over."""

    def interpreter(folder: str, minor: str, code: str) -> str:
        path = tmp_path / folder / f"python{minor}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{code}\n")
        path.chmod(0o755)
        return str(path)

    interpreter("shims", "3.12", "exit 127")
    interpreter("shims", "3.9", "echo 3.9")
    newest = interpreter("bin", "3.13", "echo 3.13")
    interpreter("other", "3.13", "echo 3.13")
    pyenv = interpreter("pyenv/versions/3.12.1/bin", "3.12", "echo 3.12")
    monkeypatch.setenv("PATH", ":".join(str(tmp_path / name) for name in ("shims", "bin", "other")))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    assert [str(path) for path in wheels().pythons()] == [pyenv, newest]


def test_make_wheels_refuses_a_wheel_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = wheels()
    monkeypatch.setattr(module.sys, "platform", "darwin")  # no auditwheel
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for size, name in ((9_000_000, "small.whl"), (9_000_001, "large.whl")):
        with (tmp_path / "in" / name).open("wb") as file:
            file.truncate(size)
    assert module.repaired(tmp_path / "in" / "small.whl", tmp_path / "out").name == "small.whl"
    with pytest.raises(SystemExit, match=r"large\.whl has 9\.0 MB, expected at most 9 MB"):
        module.repaired(tmp_path / "in" / "large.whl", tmp_path / "out")
