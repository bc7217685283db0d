from collections.abc import Sequence
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
def object_masks(
    raw: int,
    valid: int,
    maps: int,
    thresholds: int,
    masks: int,
    union: int,
    images: int,
    objects: int,
    cells: int,
    scaler: float,
    bins: int,
    threads: int,
) -> None: ...
def token_weights(
    masks: int,
    weights: int,
    images: int,
    height: int,
    width: int,
    alpha: float,
    gamma: float,
    blur_size: int,
    blur_sigma: float,
    threads: int,
) -> None: ...
def object_masks_cuda(
    raw: int,
    valid: int,
    maps: int,
    thresholds: int,
    masks: int,
    union: int,
    images: int,
    objects: int,
    height: int,
    width: int,
    scaler: float,
    bins: int,
    weights: int,
    alpha: float,
    gamma: float,
    blur_size: int,
    blur_sigma: float,
    device: int,
    stream: int,
) -> None: ...
def token_weights_cuda(
    masks: int,
    weights: int,
    images: int,
    height: int,
    width: int,
    alpha: float,
    gamma: float,
    blur_size: int,
    blur_sigma: float,
    device: int,
    stream: int,
) -> None: ...
def attention_columns(
    pointers: Sequence[int], strides: Sequence[int], sizes: Sequence[int], scale: float, causal: bool, threads: int
) -> None: ...
def block_columns(
    pointers: Sequence[int], block: Sequence[int], sizes: Sequence[int], scale: float, causal: bool, threads: int
) -> None: ...
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
def token_logprob(
    logits: int,
    dtype: int,
    bias: int,
    labels: int,
    scales: int,
    logps: int,
    out: int,
    write: bool,
    rows: int,
    codes: int,
    threads: int,
) -> None: ...
def token_logprob_cuda(
    logits: int,
    dtype: int,
    bias: int,
    labels: int,
    scales: int,
    logps: int,
    out: int,
    write: bool,
    rows: int,
    codes: int,
    device: int,
    stream: int,
) -> int: ...
def cuda_error_name(status: int) -> str: ...
def scale_rows(
    unit: int, places: int, scales: int, out: int, dtype: int, rows: int, width: int, threads: int
) -> None: ...
