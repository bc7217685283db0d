from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    openmp: int | None
    simd: str
    cuda: bool
    cuda_archs: list[str]
    nvcc: str | None

def build_info() -> BuildInfo: ...
def cuda_versions() -> tuple[int, int] | None: ...
def otsu_threshold(maps: int, thresholds: int, count: int, cells: int, bins: int, threads: int) -> None: ...
def sample_codes(
    cond: int,
    uncond: int,
    seeds: int,
    steps: int,
    out: int,
    rows: int,
    codes: int,
    guidance: float,
    temperature: float,
    threads: int,
) -> None: ...
