// Declarations shared by the sources of ospo_fast._C. No torch headers: tensors are raw pointers and sizes, so that one
// build works with every version of torch. The Python ops check all arguments before they call these functions, which
// check sizes and the values that only they read again (parallel.h).
//
// Functions ending in _cuda enqueue their kernels on `stream` of `device` without synchronizing, and return a
// cudaError_t. The others run on `threads` host threads; their results do not depend on that number.
#pragma once

#include <cstdint>

// Compile a function for several x86-64 instruction sets; the loader picks one at run time. setup.py turns FMA
// contraction off, so that all versions give the same bits.
#if defined(__linux__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define OSPO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define OSPO_HAS_CLONES 1
#else
#define OSPO_CLONES
#endif
#define OSPO_INLINE inline __attribute__((always_inline))

namespace ospo {

// The numbers are those of DTYPES in ospo_fast/ops/_dispatch.py.
enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// otsu ----------------------------------------------------------------------------------------------------------------

// Otsu's threshold of each of (count, cells) maps, bitwise equal to scikit-image in float32 where its variances neither
// overflow nor vanish. NaN for a map with a cell that is not finite, or with a range that float32 cannot divide into
// `bins` bins. Returns the number of these maps.
int64_t otsu_threshold(const float* maps, float* thresholds, int64_t count, int64_t cells, int bins, int threads);

// object_masks --------------------------------------------------------------------------------------------------------

// See ospo_fast.object_masks. raw and maps (B, O, cells), valid (B, O) or null for all, thresholds (B, O), masks
// (B, O, cells), unions (B, cells). An object with a cell that is not finite gets threshold and map NaN and an empty
// mask. Returns the number of objects without a threshold.
int64_t object_masks(const float* raw, const uint8_t* valid, float* maps, float* thresholds, uint8_t* masks,
                     uint8_t* unions, int64_t images, int64_t objects, int64_t cells, float scaler, int bins,
                     int threads);

// token_weights -------------------------------------------------------------------------------------------------------

// See ospo_fast.token_weights. masks (B, height, width), weights (B, height·width); blur_size is odd and at most 31.
void token_weights(const float* masks, float* weights, int64_t images, int64_t height, int64_t width, double alpha,
                   double gamma, int blur_size, double blur_sigma, int threads);

// attention_columns ---------------------------------------------------------------------------------------------------

// columns (B, O, C), share (B, O), 1 / the number of columns of an object, and out (B, O, length) are contiguous; the bounds have B elements. Strides count
// elements; the last dimension of q and k has stride 1.
struct ColumnTensors {
    const float *q, *k, *lse, *share;
    const int64_t *columns, *row_start, *row_count, *key_start, *key_end;
    float* out;
};
struct ColumnStrides {
    int64_t q_item, q_head, q_row, k_item, k_head, k_row, lse_item, lse_head, lse_row;
};
struct ColumnSizes {
    int64_t items, heads, kv_heads, objects, columns, width, length, positions;
};

// out = share · Σ over heads and columns of exp(scale · q·k − lse), without columns that a row does not attend to.
void attention_columns(const ColumnTensors& tensors, const ColumnStrides& strides, const ColumnSizes& sizes,
                       float scale, bool causal, int threads);

// Scaled scores (items, heads, rows, keys) of the rows from first_row and the keys from first_key on. Earlier keys
// are not attended to by any requested row.
struct ScoreBlock {
    int64_t rows, keys, first_row, first_key;
};
struct BlockTensors {
    const float *scores, *share;
    const int64_t *columns, *row_start, *row_count, *key_start, *key_end;
    float* out;
};

// As attention_columns, from precomputed scores. Computes the log-sum-exp from them. Adds to the rows of out that are
// in the block.
void block_columns(const BlockTensors& tensors, const ScoreBlock& block, const ColumnSizes& sizes, bool causal,
                   int threads);

// linear, gelu, rms_norm, silu_mul, decode_attention: one step of a Llama decoder in float32 --------------------------

// Weights (columns, depth) are packed in panels of linear_columns() columns: (panel, depth, column), zero-padded.
int64_t linear_columns();
void pack_linear(const float* weight, float* packed, int64_t columns, int64_t depth);
// out (rows, columns) = x (rows, depth) · weightᵀ + bias; bias may be null. The bits of a row depend on that row only.
void linear(const float* x, int64_t ldx, const float* packed, const float* bias, float* out, int64_t ldo, int64_t rows,
            int64_t columns, int64_t depth, int threads);

// x = x · Φ(x), in place.
void gelu(float* x, int64_t count, int threads);

// residual (rows, width) += delta, which may be null; out = weight · residual / sqrt(mean(residual²) + eps).
void add_rms_norm(const float* delta, float* residual, const float* weight, float* out, int64_t rows, int64_t width,
                  float eps, int threads);

// out (rows, width) = silu(gate) · up; a row of gate_up is gate (width), then up (width).
void silu_mul(const float* gate_up, float* out, int64_t rows, int64_t width, int threads);

// One new token per row of qkv (q, k, v heads), at position lengths[row] of cache slot slots[row]. Rotates q
// and k by that row of cos and sin (positions, width), writes k and v to the cache, and attends to positions
// 0 … lengths[row]. A row of length -1 gets zeros and leaves its slot unchanged. width: a multiple of 16, at most 256.
// The cache has slot_count slots, and the cache, cos and sin have `positions` positions.
// shared_slots: rows may share a slot at different lengths; all keys and values are written before any is read.
void decode_attention(const float* qkv, const float* cos, const float* sin, float* keys, float* values,
                      const int64_t* slots, const int64_t* lengths, float* out, int64_t rows, int64_t heads,
                      int64_t kv_heads, int64_t width, int64_t slot_count, int64_t positions, int64_t slot_stride,
                      int64_t head_stride, float scale, bool shared_slots, int threads);

// token_logprobs ------------------------------------------------------------------------------------------------------

// The softmax step on (rows, codes) contiguous logits of `dtype`. With scores s = cap · tanh((logits + bias) / cap) /
// temperature (softcap 0 leaves the tanh out), p = softmax(s), H the entropy of p and labels in [0, codes):
//     logps = log p[label], entropies = H
//     statistics (rows, 4) = max s, Σ e, Σ e · (s − max s), s[label], where e = exp(s − max s)
//     out = ∂s/∂logits · (scale · onehot(label) − p · (other + entropy_scale · (s − max s)))
// other is scale + entropy_scale · (H − log Σ e) unless given; then out is the gradient of scale · logp + entropy_scale ·
// H. With statistics of all codes it makes the gradient for a part of them, where a label of −1 is not in this part.
// scale is 1 without `scales`. All pointers but logits and labels may be null; out may be the logits. A row of out, in
// `out_dtype` (dtype or narrower), starts where that row of logits would.
void token_logprobs(const void* logits, Dtype dtype, const float* bias, const int64_t* labels,
                    float inverse_temperature, float softcap, const float* scales, const float* others,
                    const float* entropy_scales, float* logps, float* entropies, float* statistics, void* out,
                    Dtype out_dtype, int64_t rows, int64_t codes, int threads);

// The number of labels that are not ignored; −1 if one of them is not in [0, codes).
int64_t count_labels(const int64_t* labels, int64_t rows, int64_t ignore_index, int64_t codes);

// scale_rows ----------------------------------------------------------------------------------------------------------

// out[i] = scales[i] · dhidden[packed_row[i]]; zeros, even of NaN, where packed_row[i] < 0 or scales[i] is 0.
void scale_rows(const void* dhidden, const int64_t* packed_row, const float* scales, void* out, Dtype dtype,
                int64_t rows, int64_t width, int threads);

// sample_codes --------------------------------------------------------------------------------------------------------

// Sample one code per row of (rows, codes) logits at steps[row], as ospo_fast.sample_codes does, into current[row] and
// tokens[row · token_stride + steps[row]], where steps are below token_columns. uncond and tokens may be null.
// temperature 0 takes the most likely code; top_k 0 and top_p 1 keep all codes. A row with NaN, +inf or only -inf gets
// code 0, and its step in error_steps[row] if that was negative. Returns the number of these rows. logps (rows) may be
// null, and is written with top_k or top_p and a temperature alone: the log-probability of each code among those that
// they keep, NaN for these rows.
int64_t sample_codes(const float* cond, const float* uncond, const int64_t* seeds, const int64_t* steps,
                     int64_t* tokens, int64_t token_stride, int64_t token_columns, int64_t* current,
                     int64_t* error_steps, int64_t rows, int64_t codes, float guidance, float temperature,
                     int64_t top_k, double top_p, float* logps, int threads);

#ifdef OSPO_CUDA
int otsu_threshold_cuda(const float* maps, float* thresholds, int64_t count, int cells, int bins, int device,
                        void* stream);
int object_masks_cuda(const float* raw, const uint8_t* valid, float* maps, float* thresholds, uint8_t* masks,
                      uint8_t* unions, int64_t images, int objects, int cells, float scaler, int bins, int device,
                      void* stream);
int token_weights_cuda(const float* masks, float* weights, int64_t images, int height, int width, double alpha,
                       double gamma, int blur_size, double blur_sigma, int device, void* stream);
// bias has `dtype`.
int token_logprobs_cuda(const void* logits, Dtype dtype, const void* bias, const int64_t* labels,
                        float inverse_temperature, float softcap, const float* scales, const float* others,
                        const float* entropy_scales, float* logps, float* entropies, float* statistics, void* out,
                        Dtype out_dtype, int64_t rows, int64_t codes, int device, void* stream);
// Logits have `dtype`, and rows that are logit_stride apart. Enqueues one kernel, so that it can be captured.
int sample_codes_cuda(Dtype dtype, const void* cond, const void* uncond, int64_t logit_stride, const int64_t* seeds,
                      const int64_t* steps, int64_t* tokens, int64_t token_stride, int64_t token_columns,
                      int64_t* current, int64_t* error_steps, int64_t rows, int64_t codes, float guidance,
                      float temperature, int64_t top_k, double top_p, int device, void* stream);

// device --------------------------------------------------------------------------------------------------------------

// Versions such as 13000; driver 0 means that there is none. Returns a cudaError_t.
int cuda_versions(int* driver, int* runtime);
// The name of a cudaError_t.
const char* cuda_error_name(int status);
#endif

}  // namespace ospo
