// What the sources of ospo_fast._C share. No torch headers: tensors come as raw pointers and sizes.
#pragma once

#include <cstdint>

// One build for every x86-64: the compiler makes these versions of a function, the loader picks one. Contraction to
// FMA is off (setup.py), so that all versions give the same bits.
#if defined(__linux__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define OSPO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define OSPO_HAS_CLONES 1
#else
#define OSPO_CLONES
#endif

namespace ospo {

// Of tensors; the same numbers as in ospo_fast/ops/_dispatch.py.
enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// object_masks.cpp ----------------------------------------------------------------------------------------------------

// Otsu's threshold of each of `count` maps of `cells` floats, with the bits of scikit-image in float32; NaN for a map
// with a cell that is not finite, or with a range that float32 cannot divide into so many bins.
void otsu_threshold(const float* maps, float* thresholds, int64_t count, int64_t cells, int bins, int threads);

// The tensors of object_masks, contiguous: raw and maps (B, O, cells), valid (B, O) or null, thresholds (B, O), masks
// (B, O, cells), any (B, cells).
struct MaskTensors {
    const float* raw;
    const uint8_t* valid;
    float* maps;
    float* thresholds;
    uint8_t* masks;
    uint8_t* any;
};

// Maps to min-max normalised maps, thresholds, masks and their union, as ospo_fast.object_masks. An object with a cell
// that is not finite has the threshold NaN, a map of NaN and an empty mask.
void object_masks(const MaskTensors& tensors, int64_t images, int64_t objects, int64_t cells, float scaler, int bins,
                  int threads);

// One half of a Gaussian's taps, the middle one first.
struct Blur {
    int radius;
    double tap[16];
};
Blur gaussian(int size, double sigma);

// Masks (B, height, width) to weights, as ospo_fast.token_weights.
void token_weights(const float* masks, float* weights, int64_t images, int64_t height, int64_t width, double alpha,
                   double gamma, const Blur& blur, int threads);

// object_masks.cu: the same on the GPU, on a stream, without waiting; a cudaError_t. Where weights is not null
// object_masks_cuda also makes the weights of the union, in the same launch.
#ifdef OSPO_CUDA
int otsu_threshold_cuda(const float* maps, float* thresholds, int64_t count, int cells, int bins, int device,
                        void* stream);
int object_masks_cuda(const MaskTensors& tensors, int64_t images, int objects, int height, int width, float scaler,
                      int bins, float* weights, double alpha, double gamma, const Blur& blur, int device, void* stream);
int token_weights_cuda(const float* masks, float* weights, int64_t images, int height, int width, double alpha,
                       double gamma, const Blur& blur, int device, void* stream);
#endif

// attention_columns.cpp ----------------------------------------------------------------------------------------------

// Tensors of both functions: columns (B, O, C), share (B, O) and out (B, O, length) are contiguous, the bounds (B,).
// Strides in elements; the width of q and k has stride 1.
struct ColumnTensors {
    const float *q, *k, *lse, *share;
    const int64_t *columns, *row_start, *row_count, *key_start, *key_end;
    float* out;
    int64_t q_item, q_head, q_row, k_item, k_head, k_row, lse_item, lse_head, lse_row;
};
struct ColumnSizes {
    int64_t items, heads, kv_heads, objects, columns, width, length;
};

// share · sum over heads and columns of exp(scale · q·k - lse), 0 where a row does not see the column.
void attention_columns(const ColumnTensors& tensors, const ColumnSizes& sizes, float scale, bool causal, int threads);

// Scores (items, heads, rows, keys), not scaled, of the rows from first_row on and the keys from first_key on: no wanted
// row sees one before.
struct ColumnBlock {
    const float *scores, *share;
    const int64_t *columns, *row_start, *row_count, *key_start, *key_end;
    float* out;
    int64_t rows, keys, first_row, first_key;
};

// The same from a block of scores, with their own log-sum-exp, added to the rows of out that the block holds.
void block_columns(const ColumnBlock& block, const ColumnSizes& sizes, float scale, bool causal, int threads);

// linear.cpp, rms_norm.cpp, silu_mul.cpp, decode_attention.cpp: one step of a Llama decoder in float32 ----------------

// Weights (columns, depth) in panels of linear_columns() columns: packed holds whole panels, (panel, depth, column).
int64_t linear_columns();
void pack_linear(const float* weight, float* packed, int64_t columns, int64_t depth);
// out (rows, columns) = x (rows, depth) · weightᵀ + bias; bias may be null. A row's bits depend on the row alone.
void linear(const float* x, int64_t ldx, const float* packed, const float* bias, float* out, int64_t ldo, int64_t rows,
            int64_t columns, int64_t depth, int threads);
// x = x · Φ(x), in place.
void gelu(float* x, int64_t count, int threads);
// stream (rows, width) += delta, which may be null; out = weight · stream / sqrt(mean(stream²) + eps).
void add_rms_norm(const float* delta, float* stream, const float* weight, float* out, int64_t rows, int64_t width,
                  float eps, int threads);
// out (rows, width) = silu(gate) · up, from rows (gate, up) of 2 · width.
void silu_mul(const float* gate_up, float* out, int64_t rows, int64_t width, int threads);
// Rows (q heads, k heads, v heads) of one new token each, at position lengths[row] of slot slots[row]: rotates q and k by
// the rows of cos and sin (positions, width), writes k and v to the caches, attends to positions 0 … lengths[row]. A row
// of length -1 gets zeros, and its slot is left alone. width is a multiple of 16 up to 256. shared_slots: rows may share
// a slot at different lengths; all keys and values are written before any is read.
void decode_attention(const float* qkv, const float* cos, const float* sin, float* keys, float* values,
                      const int64_t* slots, const int64_t* lengths, float* out, int64_t rows, int64_t heads,
                      int64_t kv_heads, int64_t width, int64_t slot_stride, int64_t head_stride, float scale,
                      bool shared_slots, int threads);

// token_logprobs.cpp --------------------------------------------------------------------------------------------------

// For each of (rows, codes) contiguous logits z, of `dtype`, with labels in [0, codes): logps = log softmax(z + bias) at
// the label, and, if `write`, scale·(onehot - softmax) in `out` in the place of the row, which else is destroyed: each
// row of `out` begins where that of z did. bias and scales may be null; out is dtype or narrower.
void token_logprobs(void* logits, Dtype dtype, const float* bias, const int64_t* labels, const float* scales,
                   float* logps, Dtype out, bool write, int64_t rows, int64_t codes, int threads);

// out[i] = scales[i]·dhidden[packed_row[i]]; zeros where packed_row[i] < 0 or scales[i] is 0, even for NaN in dhidden.
void scale_rows(const void* dhidden, const int64_t* packed_row, const float* scales, void* out, Dtype dtype,
                int64_t rows, int64_t width, int threads);

// token_logprobs.cu ---------------------------------------------------------------------------------------------------

#ifdef OSPO_CUDA
// `token_logprobs` on a device and one of its streams, with a bias in `dtype`; returns a cudaError_t, 0 for a launch.
int token_logprobs_cuda(void* logits, Dtype dtype, const void* bias, const int64_t* labels, const float* scales,
                       float* logps, Dtype out, bool write, int64_t rows, int64_t codes, int device, void* stream);
#endif

// sample_codes.cpp ---------------------------------------------------------------------------------------------------

// One code for each row of (rows, codes) logits, as ospo_fast.sample_codes draws it at steps[row], into current[row] and
// tokens[row · token_stride + steps[row]]; uncond and tokens may be null; temperature 0 takes the likeliest, top_k 0 and
// top_p 1 keep all codes. A row with NaN, +inf or nothing but -inf gets code 0, and bad[row] its step where it was
// negative.
void draw_codes(const float* cond, const float* uncond, const int64_t* seeds, const int64_t* steps, int64_t* tokens,
                int64_t token_stride, int64_t* current, int64_t* bad, int64_t rows, int64_t codes, float guidance,
                float temperature, int64_t top_k, double top_p, int threads);

// sample_codes.cu ----------------------------------------------------------------------------------------------------

#ifdef OSPO_CUDA
// draw_codes on a device, for logits of any `Dtype` in rows `logit_stride` apart; enqueues one kernel on `stream`,
// nothing else, so that it can be captured. Returns a cudaError_t.
int draw_codes_cuda(Dtype dtype, const void* cond, const void* uncond, int64_t logit_stride, const int64_t* seeds,
                    const int64_t* steps, int64_t* tokens, int64_t token_stride, int64_t* current, int64_t* bad,
                    int64_t rows, int64_t codes, float guidance, float temperature, int64_t top_k, double top_p,
                    int device, void* stream);
#endif

// device.cu ----------------------------------------------------------------------------------------------------------

#ifdef OSPO_CUDA
// Versions such as 13000; a driver of 0 means that there is none. Returns a cudaError_t, 0 when all is well.
int cuda_versions(int* driver, int* runtime);
// The name of a cudaError_t.
const char* cuda_error_name(int status);
#endif

}  // namespace ospo
