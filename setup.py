"""Builds `ospo_fast._C` without torch, and installs the Triton kernels of `kernels/` as `ospo_fast.kernels`.

Environment:
    OSPO_FAST_CUDA        1: compile the CUDA sources, fail without nvcc; 0: leave them out; unset: compile them when
                          nvcc is found: in CUDA_HOME if that is set, else on the PATH or in /usr/local/cuda
    OSPO_FAST_CUDA_ARCHS  such as "80+PTX 90 100": the architectures to compile for, +PTX to add PTX
    MAX_JOBS              compilers at once (default: one per core)
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME as everywhere
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80+PTX 90 100+PTX 120"


def sources(suffix: str) -> list[str]:
    """The sources in csrc/ with this suffix, as setuptools wants them: relative to the root."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(f"*{suffix}"))


def find_nvcc() -> str | None:
    """The nvcc to use, or None when the CUDA sources are to be left out."""
    wanted = os.environ.get("OSPO_FAST_CUDA", "")
    if wanted not in {"", "0", "1"}:
        sys.exit(
            f"OSPO_FAST_CUDA is {wanted!r}; expected 1 (compile CUDA), 0 (leave it out) or unset (if nvcc is found)"
        )
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin"] if home else [None, "/usr/local/cuda/bin"]  # None is the PATH
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if wanted == "1" and nvcc is None:
        sys.exit("OSPO_FAST_CUDA is 1 but no nvcc was found; set CUDA_HOME, or unset OSPO_FAST_CUDA to leave CUDA out")
    return nvcc


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to compile for: those asked for, or those of the default list that this nvcc knows."""
    asked = os.environ.get("OSPO_FAST_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    known = set(re.findall(r"sm_(\d+)", output(nvcc, "--list-gpu-code")))
    for arch in asked:
        match = re.fullmatch(r"(\d+)(\+PTX)?", arch)
        if match is None or match[1] not in known:
            sys.exit(
                f"OSPO_FAST_CUDA_ARCHS has {arch!r}; expected numbers such as 80 or 90+PTX, "
                f"of those that this nvcc knows: {' '.join(sorted(known, key=int))}"
            )
    archs = asked or [arch for arch in DEFAULT_ARCHS.split() if arch.removesuffix("+PTX") in known]
    if not archs:
        sys.exit(f"{nvcc} knows none of the architectures {DEFAULT_ARCHS}; set OSPO_FAST_CUDA_ARCHS")
    return archs


def gencode(archs: list[str]) -> list[str]:
    """nvcc's -gencode flags."""
    flags = []
    for arch in archs:
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def accepts(compiler: str, *flags: str) -> bool:
    """Whether the compiler can build and link a program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*shlex.split(compiler), *flags, str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


class BuildExtension(build_ext):
    """Compiles with ninja: C++ by the host compiler, CUDA by nvcc, and links no library of torch or of the driver."""

    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32":
            sys.exit("ospo-fast builds on Linux and macOS; on Windows use WSL")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file(ext, target))
        jobs = os.environ.get("MAX_JOBS") or str(self.parallel or os.cpu_count() or 1)
        subprocess.run([self.ninja(), "-C", str(folder), "-j", jobs], check=True)

    @staticmethod
    def ninja() -> str:
        try:
            import ninja

            path = shutil.which("ninja", path=ninja.BIN_DIR)
        except ImportError:
            path = None
        path = path or shutil.which("ninja")
        if path is None:
            sys.exit("ninja is needed to build ospo-fast: pip install ninja")
        return path

    def ninja_file(self, ext: Extension, target: Path) -> str:
        cxx = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        if cxx is None:
            sys.exit("no C++ compiler was found; install g++ or clang++, or set CXX")
        ccache = f"{shutil.which('ccache')} " if shutil.which("ccache") else ""
        include = [f"-I{path}" for path in (pybind11.get_include(), *self.include_dirs)]
        openmp = ["-fopenmp"] if accepts(cxx, "-fopenmp") else []
        # Thresholds must equal those of numpy to the last bit on every machine: no contraction to FMA. Nothing traps:
        # loops that choose between two results are vectorised.
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math"]
        flags += ["-Wall", "-Wextra", *openmp]
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]
        nvcc = find_nvcc()
        archs = cuda_archs(nvcc) if nvcc else []
        if nvcc:
            release = re.search(r"release .*?V([\d.]+)", output(nvcc, "--version"))
            flags += ["-DOSPO_CUDA=1", f'-DOSPO_CUDA_ARCHS="{" ".join(archs)}"']
            flags += [f'-DOSPO_NVCC="{release[1] if release else "unknown"}"']
            nvcc_flags = ["-std=c++17", "-O3", "-cudart=static", "--threads=0", "--resource-usage", f"-ccbin={cxx}"]
            nvcc_flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
            nvcc_flags += gencode(archs)
            nvcc_flags += ["--compress-mode=size"] if "--compress-mode" in output(nvcc, "--help") else []
            print(f"ospo-fast: C++ by {cxx}, CUDA by {nvcc} for {' '.join(archs)}")
        else:
            print(f"ospo-fast: C++ by {cxx}; without CUDA kernels, because OSPO_FAST_CUDA is 0 or no nvcc was found")

        def joined(words: list[str]) -> str:
            return " ".join(shlex.quote(word) for word in words).replace("$", "$$")

        def escaped(path: Path | str) -> str:
            return re.sub(r"([$ :])", r"$\1", str(path))

        link = [*shlex.split(cxx), *shared, *openmp]
        if nvcc:
            link = [nvcc, "-cudart=static", f"-ccbin={cxx}", "-shared", "-Xlinker=-s"]
            link += [f"-Xcompiler={flag}" for flag in openmp]
        user = {name: " " + os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")}
        lines = [
            "rule cxx",
            f"  command = {ccache}{cxx} -MMD -MF $out.d {joined(flags + include)}{user['CXXFLAGS']} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {joined(link)} $in{user['LDFLAGS']} -o $out",
        ]
        if nvcc:
            lines += [
                "rule cuda",
                f"  command = {ccache}{nvcc} -MD -MF $out.d {joined(nvcc_flags)} -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        objects = []
        for source in [*ext.sources, *(sources(".cu") if nvcc else [])]:
            objects.append(Path(source).name + ".o")
            rule = "cuda" if source.endswith(".cu") else "cxx"
            lines.append(f"build {objects[-1]}: {rule} {escaped(ROOT / source)}")
        lines += [f"build {escaped(target)}: link {' '.join(objects)}", f"default {escaped(target)}", ""]
        return "\n".join(lines)


class BuildPy(build_py):
    """Adds the kernel files at the root to the package `ospo_fast.kernels`."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        if package == "ospo_fast.kernels":
            modules += [(package, path.stem, str(path)) for path in sorted(Path("kernels").glob("*.py"))]
        return modules


setup(
    ext_modules=[Extension("ospo_fast._C", sources(".cpp"), depends=sources(".h") + sources(".cuh"))],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
)
