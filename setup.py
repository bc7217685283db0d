"""Build `ospo_fast._C` without torch, and install the Triton kernels of `kernels/` as `ospo_fast.kernels`.

Environment:
    OSPO_FAST_NATIVE      1: compile, fail without a C++ compiler; 0: pure Python, whose operations run the PyTorch
                          references; unset: compile if a C++ compiler works, and never on Windows
    OSPO_FAST_CUDA        1: compile the CUDA sources, fail without nvcc; 0: skip them; unset: compile them if nvcc is
                          found, in CUDA_HOME if that is set, else on the PATH or in /usr/local/cuda
    OSPO_FAST_CUDA_ARCHS  architectures to compile for, such as "80+PTX 90 100", or "native": those of the cards of this
                          machine, without CUDA where nvidia-smi finds none
    OSPO_FAST_SANITIZE    1: compile C++ with GCC's AddressSanitizer and UndefinedBehaviorSanitizer, without CUDA; the
                          module loads only where their libraries are preloaded (`make sanitize`)
    MAX_JOBS              parallel compilers (default: one per core)
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME: as usual
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
# Code for 80 runs on all of 8.x, and so on. What is after them runs the PTX of one: of 100, the newest that both data
# center cards and others are after, or of the newest that nvcc knows.
DEFAULT_ARCHS = ("80", "90", "100", "120")
PTX_ARCH = "100"


def sources(suffix: str) -> list[str]:
    """List the sources in csrc/ with this suffix, relative to the root."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(f"*{suffix}"))


def switch(name: str, meaning: str) -> bool | None:
    """Return a variable of the environment that is 1, 0 or unset."""
    setting = os.environ.get(name, "")
    if setting not in {"", "0", "1"}:
        sys.exit(f"{name} is {setting!r}; expected {meaning}")
    return {"": None, "0": False, "1": True}[setting]


def find_cxx() -> str | None:
    """Find the C++ compiler; None to install pure Python. A compiler that CXX names must be there."""
    wanted = switch("OSPO_FAST_NATIVE", "1 (compile), 0 (pure Python) or unset (compile if a C++ compiler works)")
    if wanted is False:
        for name, value in {"OSPO_FAST_CUDA": wants_cuda(), "OSPO_FAST_SANITIZE": sanitize()}.items():
            if value:
                sys.exit(f"OSPO_FAST_NATIVE is 0 but {name} is 1; set only one of them")
        stale = sorted(path.name for path in (ROOT / "ospo_fast").glob("_C.*"))
        if stale and "editable_wheel" in sys.argv:
            sys.exit(f"OSPO_FAST_NATIVE is 0 but ospo_fast/{stale[0]} of an earlier build would be used; delete it")
        return None
    if sys.platform == "win32":
        if wanted:
            sys.exit("OSPO_FAST_NATIVE is 1, but ospo-fast compiles on Linux and macOS only; on Windows use WSL")
        return None
    if cxx := os.environ.get("CXX"):
        if not (words := shlex.split(cxx)) or shutil.which(words[0]) is None:
            sys.exit(f"CXX is {cxx!r}, which was not found; expected a C++ compiler, such as g++")
        return cxx
    # macOS has a c++ that only asks to install a compiler.
    cxx = next((name for name in ("c++", "g++", "clang++") if shutil.which(name) and accepts(name)), None)
    if cxx is None and (wanted or wants_cuda() or sanitize()):
        name = "OSPO_FAST_NATIVE" if wanted else "OSPO_FAST_CUDA" if wants_cuda() else "OSPO_FAST_SANITIZE"
        sys.exit(f"{name} is 1 but no C++ compiler was found; install g++ or clang++, or set CXX")
    return cxx


def wants_cuda() -> bool | None:
    """Return OSPO_FAST_CUDA."""
    return switch("OSPO_FAST_CUDA", "1 (compile CUDA), 0 (skip it) or unset (if nvcc is found)")


def find_nvcc() -> str | None:
    """Find the nvcc to use; None to skip the CUDA sources."""
    setting = wants_cuda()
    if setting is False or sanitize():
        return None
    if setting is None and requested_archs() == []:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else [None, "/usr/local/cuda/bin"]  # None is the PATH
    nvcc = next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)
    if setting and nvcc is None:
        sys.exit("OSPO_FAST_CUDA is 1 but no nvcc was found; set CUDA_HOME, or unset OSPO_FAST_CUDA to skip CUDA")
    return nvcc


def sanitize() -> bool:
    """Return whether to compile with sanitizers."""
    return bool(switch("OSPO_FAST_SANITIZE", "1 (compile with sanitizers), or 0 or unset (without)"))


def sanitizer_flags(cxx: str) -> list[str]:
    """Return the flags that compile and link with sanitizers: an error ends the process."""
    command = [*shlex.split(cxx), "--version"]
    version = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        sys.exit(f"OSPO_FAST_SANITIZE needs GCC, but {cxx} is {version.partition(chr(10))[0]!r}; set CXX=g++")
    flags = ["-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    if not accepts(cxx, *flags):
        sys.exit(f"{cxx} cannot link with {' '.join(flags)}; install the libraries libasan and libubsan of this GCC")
    return flags


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def requested_archs() -> list[str] | None:
    """List the architectures of OSPO_FAST_CUDA_ARCHS, those of the cards of this machine for "native"; None: unset."""
    words = os.environ.get("OSPO_FAST_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if words != ["native"]:
        return words or None
    try:
        found = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError):  # no driver, or no card
        return []
    return sorted(
        {line.strip().replace(".", "") for line in found.splitlines()} - {""}, key=lambda arch: (len(arch), arch)
    )


def cuda_archs(nvcc: str) -> list[str]:
    """List the architectures to compile for: the requested ones, or those of DEFAULT_ARCHS that this nvcc supports."""
    requested = requested_archs()
    if requested == []:
        sys.exit("OSPO_FAST_CUDA_ARCHS is 'native' but nvidia-smi lists no card; name architectures, such as '80 90'")
    supported = set(re.findall(r"sm_(\d+)", output(nvcc, "--list-gpu-code")))
    for arch in requested or ():
        match = re.fullmatch(r"(\d+)(\+PTX)?", arch)
        if match is None or match[1] not in supported:
            sys.exit(
                f"OSPO_FAST_CUDA_ARCHS has {arch!r}; expected numbers such as 80 or 90+PTX that this nvcc supports: "
                f"{' '.join(sorted(supported, key=int))}"
            )
    if requested:
        return requested
    archs = [arch for arch in DEFAULT_ARCHS if arch in supported]
    if not archs:
        sys.exit(f"{nvcc} supports none of the architectures {' '.join(DEFAULT_ARCHS)}; set OSPO_FAST_CUDA_ARCHS")
    ptx = PTX_ARCH if PTX_ARCH in archs else archs[-1]
    return [f"{arch}+PTX" if arch == ptx else arch for arch in archs]


def gencode(archs: list[str]) -> list[str]:
    """Return nvcc's -gencode flags."""
    flags = []
    for arch in archs:
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def accepts(compiler: str, *flags: str) -> bool:
    """Return whether the compiler can build and link a program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*shlex.split(compiler), *flags, str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


class BuildExtension(build_ext):
    """Compile with ninja: C++ by the host compiler, CUDA by nvcc. Links neither torch nor the CUDA driver."""

    def build_extension(self, ext: Extension) -> None:
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
        cxx = CXX

        def joined(words: list[str]) -> str:
            return " ".join(shlex.quote(word) for word in words).replace("$", "$$")

        def escaped(path: Path | str) -> str:
            return re.sub(r"([$ :])", r"$\1", str(path))

        ccache = f"{shutil.which('ccache')} " if shutil.which("ccache") else ""
        user = {name: " " + os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")}
        include = [f"-I{path}" for path in (pybind11.get_include(), *self.include_dirs)]
        openmp = ["-fopenmp"] if accepts(cxx, "-fopenmp") else []
        # Without contraction to FMA, thresholds equal those of numpy to the last bit on every machine. Without trapping
        # math, loops that select one of two results are vectorized.
        sanitizers = sanitizer_flags(cxx) if sanitize() else []
        flags = ["-std=c++17", "-O1" if sanitizers else "-O3", "-fPIC", "-fvisibility=hidden"]
        flags += ["-ffp-contract=off", "-fno-trapping-math"]
        # The time of a short loop depends on the cache lines that its code is in: up to a third, by where the linker
        # puts it.
        flags += ["-falign-loops=64"] if accepts(cxx, "-falign-loops=64") else []
        flags += ["-Wall", "-Wextra", *openmp, *sanitizers]
        files, lines = list(ext.sources), []
        if nvcc := find_nvcc():
            archs = cuda_archs(nvcc)
            print(f"ospo-fast: C++ by {cxx}, CUDA by {nvcc} for {' '.join(archs)}")
            files += sources(".cu")
            release = re.search(r"release .*?V([\d.]+)", output(nvcc, "--version"))
            flags += ["-DOSPO_CUDA=1", f'-DOSPO_CUDA_ARCHS="{" ".join(archs)}"']
            flags += [f'-DOSPO_NVCC="{release[1] if release else "unknown"}"']
            cuda = ["-std=c++17", "-O3", "-cudart=static", "--threads=0", "--resource-usage", f"-ccbin={cxx}"]
            cuda += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *gencode(archs)]
            cuda += ["--compress-mode=size"] if "--compress-mode" in output(nvcc, "--help") else []
            lines += ["rule cuda", f"  command = {ccache}{nvcc} -MD -MF $out.d {joined(cuda)} -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc"]
            # nvcc of the package nvidia-cuda-nvcc looks for its libraries in lib64 only.
            library = Path(nvcc).resolve().parents[1] / "lib"
            link = [
                nvcc,
                *([f"-L{library}"] if (library / "libcudart_static.a").exists() else []),
                "-cudart=static",
                f"-ccbin={cxx}",
                "-shared",
                "-Xlinker=-s",
            ]
            link += [f"-Xcompiler={flag}" for flag in openmp]
        else:
            print(
                f"ospo-fast: C++ by {cxx}; no CUDA kernels, because OSPO_FAST_CUDA is 0, or no nvcc or card was found"
            )
            shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
            if sys.platform != "darwin" and not sanitizers:
                shared.append("-Wl,-s")  # sanitizers name the lines of their findings by the debug information
            link = [*shlex.split(cxx), *shared, *openmp, *sanitizers]
        compile_cxx = f"{ccache}{cxx} -MMD -MF $out.d {joined(flags + include)}{user['CXXFLAGS']} $size -c $in -o $out"
        lines += ["rule cxx", f"  command = {compile_cxx}", "  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", f"  command = {joined(link)} $in{user['LDFLAGS']} -o $out"]
        objects = {file: Path(file).name + ".o" for file in files}
        for file, name in objects.items():
            lines.append(f"build {name}: {'cuda' if file.endswith('.cu') else 'cxx'} {escaped(ROOT / file)}")
            if name == "bindings.cpp.o" and not sanitizers:  # without loops, and the largest file
                lines.append("  size = -Os")
        lines += [f"build {escaped(target)}: link {' '.join(objects.values())}", f"default {escaped(target)}", ""]
        return "\n".join(lines)


# Benchmarks that need a checkout: its history of results, its README, its tests, or hours.
CHECKOUT_ONLY = {
    "_forked", "_gpu_day", "ablations", "code_metrics", "demo", "families", "figures", "mask_gradients", "mask_layers",
    "packing", "plan", "readme_pictures", "real_size", "stages", "workers",
}  # fmt: skip


class BuildPy(build_py):
    """Add the kernel files at the root to `ospo_fast.kernels`, and the benchmarks as scripts to ospo_fast/bench/."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        if package == "ospo_fast.kernels":
            modules += [(package, path.stem, str(path)) for path in sorted(Path("kernels").glob("*.py"))]
        return modules

    def build_packages(self) -> None:
        super().build_packages()
        for path in sorted(Path("bench").glob("*.py")):
            if path.stem not in CHECKOUT_ONLY:
                self.build_module(path.stem, str(path), "ospo_fast.bench")


CXX = find_cxx()
if CXX is None:
    print("ospo-fast: pure Python; the operations run the PyTorch references, because OSPO_FAST_NATIVE is 0, no C++")
    print("compiler was found, or this is Windows")
native = [Extension("ospo_fast._C", sources(".cpp"), depends=sources(".h") + sources(".cuh"))]
setup(
    ext_modules=native if CXX else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
)
