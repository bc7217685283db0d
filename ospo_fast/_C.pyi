# Arguments are those of csrc/common.h: pointers and dtypes as integers, structs as sequences. All are positional.
# fmt: off
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
def otsu_threshold(maps: int, thresholds: int, count: int, cells: int, bins: int, threads: int, /) -> int: ...
def object_masks(
    raw: int, valid: int, maps: int, thresholds: int, masks: int, unions: int, images: int, objects: int, cells: int,
    scaler: float, bins: int, threads: int, /
) -> int: ...
def token_weights(
    masks: int, weights: int, images: int, height: int, width: int, alpha: float, gamma: float, blur_size: int,
    blur_sigma: float, threads: int, /
) -> None: ...
def attention_columns(
    tensors: Sequence[int], strides: Sequence[int], sizes: Sequence[int], scale: float, causal: bool, threads: int,
    /
) -> None: ...
def block_columns(
    tensors: Sequence[int], block: Sequence[int], sizes: Sequence[int], causal: bool, threads: int, /
) -> None: ...
def linear_columns() -> int: ...
def pack_linear(weight: int, packed: int, columns: int, depth: int, /) -> None: ...
def linear(
    x: int, ldx: int, packed: int, bias: int, out: int, ldo: int, rows: int, columns: int, depth: int, threads: int,
    /
) -> None: ...
def gelu(x: int, count: int, threads: int, /) -> None: ...
def add_rms_norm(
    delta: int, residual: int, weight: int, out: int, rows: int, width: int, eps: float, threads: int, /
) -> None: ...
def silu_mul(gate_up: int, out: int, rows: int, width: int, threads: int, /) -> None: ...
def decode_attention(
    qkv: int, cos: int, sin: int, keys: int, values: int, slots: int, lengths: int, out: int, rows: int, heads: int,
    kv_heads: int, width: int, slot_count: int, positions: int, slot_stride: int, head_stride: int, scale: float,
    shared_slots: bool, threads: int, /
) -> None: ...
def token_logprobs(
    logits: int, dtype: int, bias: int, labels: int, inverse_temperature: float, softcap: float, scales: int,
    others: int, entropy_scales: int, logps: int, entropies: int, statistics: int, out: int, out_dtype: int, rows: int,
    codes: int, threads: int, /
) -> None: ...
def count_labels(labels: int, rows: int, ignore_index: int, codes: int, /) -> int: ...
def scale_rows(
    dhidden: int, packed_row: int, scales: int, out: int, dtype: int, rows: int, width: int, threads: int, /
) -> None: ...
def sample_codes(
    cond: int, uncond: int, seeds: int, steps: int, tokens: int, token_stride: int, token_columns: int, current: int,
    error_steps: int, rows: int, codes: int, guidance: float, temperature: float, top_k: int, top_p: float, logps: int,
    threads: int, /
) -> int: ...
def otsu_threshold_cuda(
    maps: int, thresholds: int, count: int, cells: int, bins: int, device: int, stream: int, /
) -> None: ...
def object_masks_cuda(
    raw: int, valid: int, maps: int, thresholds: int, masks: int, unions: int, images: int, objects: int, cells: int,
    scaler: float, bins: int, device: int, stream: int, /
) -> None: ...
def token_weights_cuda(
    masks: int, weights: int, images: int, height: int, width: int, alpha: float, gamma: float, blur_size: int,
    blur_sigma: float, device: int, stream: int, /
) -> None: ...
def token_logprobs_cuda(
    logits: int, dtype: int, bias: int, labels: int, inverse_temperature: float, softcap: float, scales: int,
    others: int, entropy_scales: int, logps: int, entropies: int, statistics: int, out: int, out_dtype: int, rows: int,
    codes: int, device: int, stream: int, /
) -> None: ...
def sample_codes_cuda(
    dtype: int, cond: int, uncond: int, logit_stride: int, seeds: int, steps: int, tokens: int, token_stride: int,
    token_columns: int, current: int, error_steps: int, rows: int, codes: int, guidance: float, temperature: float,
    top_k: int, top_p: float, device: int, stream: int, /
) -> None: ...
