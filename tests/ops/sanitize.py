"""Run the tests of the C++ operations with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

The sanitized package is a copy in build/sanitize, and its build is refused without GCC. A finding ends the run with the
sanitizer's report. More arguments go to pytest.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "build" / "sanitize" / "lib"
# Files of tests/ops that call the C++ operations. The others test CUDA sources, Triton kernels or Python alone.
TESTS = ["tests/test_native.py"]
TESTS += [
    f"tests/ops/test_{name}.py"
    for name in (
        "attention_columns", "decode_attention", "extreme_sizes", "linear", "object_masks", "otsu", "rms_norm",
        "sample_codes", "silu_mul", "token_logprobs", "token_weights", "whole_range",
    )
]  # fmt: skip
# Left out is what runs the same code of these operations again: torch.compile, the backend "torch", the statistics of
# samples, and of tests over the range of float32 other numbers in the same shapes.
SKIPPED = "not compile and not opcheck and not [torch- and not [torch] and not test_distribution"
RANGE = "tests/ops/test_whole_range.py::test_"
SAME = [f"{RANGE}attention_columns[{scale}" for scale in ("0.333", "1e-12")]
SAME += [f"{RANGE}decode_attention[{cached}-values{i}]" for cached in (1, 6, 17) for i in (1, 2, 3)]
# An error of each kind that only a sanitized module reports: a read beyond an allocation, and a misaligned one.
PROOFS = {
    "heap-buffer-overflow": "m.count_labels(address, 101, 0, 4)",
    "misaligned address": "m.count_labels(address + 1, 1, 0, 4)",
}


def environment() -> dict[str, str]:
    """The variables with which Python loads the sanitized module."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    found = [
        subprocess.run([*compiler, f"-print-file-name={name}.so"], check=True, capture_output=True, text=True).stdout
        for name in ("libasan", "libubsan")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        # Python keeps memory until it ends. An allocation that is refused is an error of Python as without sanitizers.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # two processes run, on CI of two processors
        "PYTHONPATH": str(PACKAGE),
        "OSPO_FAST_SANITIZE": "1",
    }


def main(arguments: list[str]) -> int:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", "build/sanitize", "--build-lib", str(PACKAGE)]
    build = os.environ | {"OSPO_FAST_SANITIZE": "1"}
    if subprocess.run(command, cwd=ROOT, env=build, check=False).returncode:
        return 1
    variables = environment()
    for finding, call in PROOFS.items():
        program = "import array, ospo_fast._C as m; x = array.array('q', [0]) * 100; address = x.buffer_info()[0]\n"
        program += f"print(m.__file__, flush=True); {call}"
        run = subprocess.run(
            [sys.executable, "-c", program], cwd=PACKAGE, env=variables, check=False, capture_output=True, text=True
        )
        if run.returncode == 0 or finding not in run.stderr or str(PACKAGE) not in run.stdout:
            sys.exit(f"the sanitizers are not active: no {finding} was reported for {call}\n{run.stdout}{run.stderr}")
    print(f"sanitizers are active in {PACKAGE}", flush=True)
    # -s: a report must reach the terminal, also when it ends the process.
    pytest = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", SKIPPED]
    pytest += [*(f"--deselect={test}" for test in SAME), "-n", "2", "--dist", "loadfile"]
    pytest += ["-o", f"pythonpath={PACKAGE} . bench bench/pretraining", *TESTS, *arguments]
    return subprocess.run(pytest, cwd=ROOT, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
