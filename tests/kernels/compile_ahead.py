"""Compiles every Triton kernel for every architecture, without a GPU; prints registers, spills, barriers of loops and
approximations.

A module of `kernels/` lists what there is to compile in VARIANTS: kernel → [(argument types, constants)], each with
options of the compiler as a third where it has any. They are compiled as a launch with aligned pointers, and strides
and sizes that are multiples of 16, compiles them; sizes of 1 are among the constants, as a launch has them.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import ospo_fast.kernels

ARCHS = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(cubin: bytes) -> str:
    """Registers and bytes spilled to local memory, of the one function in the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return f"{found['REG']} registers, {found['STACK'] + found['LOCAL']} bytes of spills, {found['SHARED']} shared"


def approximations(ptx: str) -> str:
    """Divisions and roots that are not rounded as IEEE 754 rounds them."""
    found = sorted(set(re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.(?:full|approx)[.\w]*", ptx)))
    return f", approximate {' '.join(found)}" if found else ""


def barriers(ptx: str) -> str:
    """Barriers of a block between a label and a branch back to it: each loop waits for all its threads there."""
    labels = {found[1]: found.start() for found in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    back = [(labels[found[1]], found.start()) for found in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx)]
    waits = [found.start() for found in re.finditer(r"\b(?:bar|barrier)\.(?:cta\.)?sync\b", ptx)]
    count = sum(any(first < wait < last for first, last in back) for wait in waits)
    return f", {count} barriers in loops" if count else ""


def aligned(kernel: triton.JITFunction, arguments: dict[str, str]) -> dict[tuple[int], list[list[object]]]:
    """The attributes of all pointers and integers that the kernel lets Triton specialise on."""
    never = [*(kernel.do_not_specialize or ()), *(kernel.do_not_specialize_on_alignment or ())]
    never = [kernel.arg_names[name] if isinstance(name, int) else name for name in never]
    names = [name for name, kind in arguments.items() if kind[0] in "*i" and name not in never]
    return {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}


def main() -> int:
    count = 0
    for info in pkgutil.iter_modules(ospo_fast.kernels.__path__):
        module = importlib.import_module(f"ospo_fast.kernels.{info.name}")
        for kernel, variants in module.VARIANTS.items():
            for arguments, constants, *options in variants:
                kinds = arguments | dict.fromkeys(constants, "constexpr")
                signature = {name: kinds[name] for name in kernel.arg_names}
                for arch in ARCHS:
                    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned(kernel, arguments))
                    compiled = triton.compile(
                        source, target=GPUTarget("cuda", arch, 32), options=options[0] if options else None
                    )
                    types = " ".join(arguments.values())
                    ptx = compiled.asm["ptx"]
                    used = resources(compiled.asm["cubin"]) + barriers(ptx) + approximations(ptx)
                    print(f"{kernel.__name__} ({types}) sm_{arch}: {used}")
                    count += 1
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
