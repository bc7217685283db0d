// The Python module ospo_fast._C. Pointers come as integers from tensors that the caller keeps alive and has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "common.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

// The version of the multiversioned functions that this processor runs.
std::string simd() {
#ifdef OSPO_HAS_CLONES
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return "avx512f";
    if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
    return "baseline";
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = compiler();
#ifdef _OPENMP
    info["openmp"] = _OPENMP;
#else
    info["openmp"] = py::none();
#endif
    info["simd"] = simd();
#ifdef OSPO_CUDA
    info["cuda"] = true;
    info["cuda_archs"] = py::str(OSPO_CUDA_ARCHS).attr("split")();
    info["nvcc"] = OSPO_NVCC;
#else
    info["cuda"] = false;
    info["cuda_archs"] = py::list();
    info["nvcc"] = py::none();
#endif
    return info;
}

#ifdef OSPO_CUDA
void check(const char* what, int status) {
    if (status != 0) throw std::runtime_error(std::string(what) + ": " + ospo::cuda_error_name(status));
}
#endif

py::object cuda_versions() {
#ifdef OSPO_CUDA
    int driver = 0, runtime = 0;
    check("cuda_versions", ospo::cuda_versions(&driver, &runtime));
    return py::make_tuple(driver, runtime);
#else
    return py::none();
#endif
}

// Below, arguments are those of the functions in common.h, a dtype as its number there, a null pointer as 0.
class Pointer {
public:
    explicit Pointer(uintptr_t address) : address_(address) {}
    template <class T>
    operator T*() const {  // NOLINT(google-explicit-constructor): to whatever the function takes
        return reinterpret_cast<T*>(address_);
    }

private:
    uintptr_t address_;
};

Pointer at(uintptr_t address) { return Pointer{address}; }

void otsu_threshold(uintptr_t maps, uintptr_t thresholds, int64_t count, int64_t cells, int bins, int threads) {
    ospo::otsu_threshold(at(maps), at(thresholds), count, cells, bins, threads);
}

ospo::MaskTensors mask_tensors(uintptr_t raw, uintptr_t valid, uintptr_t maps, uintptr_t thresholds, uintptr_t masks,
                               uintptr_t any) {
    return {at(raw), at(valid), at(maps), at(thresholds), at(masks), at(any)};
}

void object_masks(uintptr_t raw, uintptr_t valid, uintptr_t maps, uintptr_t thresholds, uintptr_t masks, uintptr_t any,
                  int64_t images, int64_t objects, int64_t cells, float scaler, int bins, int threads) {
    ospo::object_masks(mask_tensors(raw, valid, maps, thresholds, masks, any), images, objects, cells, scaler, bins,
                       threads);
}

void token_weights(uintptr_t masks, uintptr_t weights, int64_t images, int64_t height, int64_t width, double alpha,
                   double gamma, int blur_size, double blur_sigma, int threads) {
    ospo::token_weights(at(masks), at(weights), images, height, width, alpha, gamma,
                        ospo::gaussian(blur_size, blur_sigma), threads);
}

#ifdef OSPO_CUDA
void otsu_threshold_cuda(uintptr_t maps, uintptr_t thresholds, int64_t count, int cells, int bins, int device,
                         uintptr_t stream) {
    check("otsu_threshold",
          ospo::otsu_threshold_cuda(at(maps), at(thresholds), count, cells, bins, device, at(stream)));
}

void object_masks_cuda(uintptr_t raw, uintptr_t valid, uintptr_t maps, uintptr_t thresholds, uintptr_t masks,
                       uintptr_t any, int64_t images, int objects, int height, int width, float scaler, int bins,
                       uintptr_t weights, double alpha, double gamma, int blur_size, double blur_sigma, int device,
                       uintptr_t stream) {
    check("object_masks", ospo::object_masks_cuda(mask_tensors(raw, valid, maps, thresholds, masks, any), images,
                                                  objects, height, width, scaler, bins, at(weights), alpha, gamma,
                                                  ospo::gaussian(blur_size, blur_sigma), device, at(stream)));
}

void token_weights_cuda(uintptr_t masks, uintptr_t weights, int64_t images, int height, int width, double alpha,
                        double gamma, int blur_size, double blur_sigma, int device, uintptr_t stream) {
    check("token_weights", ospo::token_weights_cuda(at(masks), at(weights), images, height, width, alpha, gamma,
                                                    ospo::gaussian(blur_size, blur_sigma), device, at(stream)));
}
#endif

ospo::ColumnSizes column_sizes(const std::array<int64_t, 7>& n) { return {n[0], n[1], n[2], n[3], n[4], n[5], n[6]}; }

void attention_columns(const std::array<uintptr_t, 10>& p, const std::array<int64_t, 9>& s,
                       const std::array<int64_t, 7>& sizes, float scale, bool causal, int threads) {
    const ospo::ColumnTensors tensors{at(p[0]), at(p[1]), at(p[2]), at(p[3]), at(p[4]), at(p[5]), at(p[6]),
                                      at(p[7]), at(p[8]), at(p[9]), s[0],     s[1],     s[2],     s[3],
                                      s[4],     s[5],     s[6],     s[7],     s[8]};
    ospo::attention_columns(tensors, column_sizes(sizes), scale, causal, threads);
}

void block_columns(const std::array<uintptr_t, 8>& p, const std::array<int64_t, 4>& block,
                   const std::array<int64_t, 7>& sizes, float scale, bool causal, int threads) {
    const ospo::ColumnBlock tensors{at(p[0]), at(p[1]), at(p[2]), at(p[3]), at(p[4]), at(p[5]),
                                    at(p[6]), at(p[7]), block[0], block[1], block[2], block[3]};
    ospo::block_columns(tensors, column_sizes(sizes), scale, causal, threads);
}

void token_logprobs(uintptr_t logits, int dtype, uintptr_t bias, uintptr_t labels, uintptr_t scales, uintptr_t logps,
                   int out, bool write, int64_t rows, int64_t codes, int threads) {
    ospo::token_logprobs(at(logits), ospo::Dtype{dtype}, at(bias), at(labels), at(scales), at(logps), ospo::Dtype{out},
                        write, rows, codes, threads);
}

#ifdef OSPO_CUDA
void token_logprobs_cuda(uintptr_t logits, int dtype, uintptr_t bias, uintptr_t labels, uintptr_t scales,
                        uintptr_t logps, int out, bool write, int64_t rows, int64_t codes, int device,
                        uintptr_t stream) {
    check("token_logprobs",
          ospo::token_logprobs_cuda(at(logits), ospo::Dtype{dtype}, at(bias), at(labels), at(scales), at(logps),
                                   ospo::Dtype{out}, write, rows, codes, device, at(stream)));
}
#endif

void scale_rows(uintptr_t dhidden, uintptr_t packed_row, uintptr_t scales, uintptr_t out, int dtype, int64_t rows,
                int64_t width, int threads) {
    ospo::scale_rows(at(dhidden), at(packed_row), at(scales), at(out), ospo::Dtype{dtype}, rows, width, threads);
}

void pack_linear(uintptr_t weight, uintptr_t packed, int64_t columns, int64_t depth) {
    ospo::pack_linear(at(weight), at(packed), columns, depth);
}

void linear(uintptr_t x, int64_t ldx, uintptr_t packed, uintptr_t bias, uintptr_t out, int64_t ldo, int64_t rows,
            int64_t columns, int64_t depth, int threads) {
    ospo::linear(at(x), ldx, at(packed), at(bias), at(out), ldo, rows, columns, depth, threads);
}

void add_rms_norm(uintptr_t delta, uintptr_t stream, uintptr_t weight, uintptr_t out, int64_t rows, int64_t width,
                  float eps, int threads) {
    ospo::add_rms_norm(at(delta), at(stream), at(weight), at(out), rows, width, eps, threads);
}

void silu_mul(uintptr_t gate_up, uintptr_t out, int64_t rows, int64_t width, int threads) {
    ospo::silu_mul(at(gate_up), at(out), rows, width, threads);
}

void gelu(uintptr_t x, int64_t count, int threads) { ospo::gelu(at(x), count, threads); }

void draw_codes(uintptr_t cond, uintptr_t uncond, uintptr_t seeds, uintptr_t steps, uintptr_t tokens,
                int64_t token_stride, uintptr_t current, uintptr_t bad, int64_t rows, int64_t codes, float guidance,
                float temperature, int64_t top_k, double top_p, int threads) {
    ospo::draw_codes(at(cond), at(uncond), at(seeds), at(steps), at(tokens), token_stride, at(current), at(bad), rows,
                     codes, guidance, temperature, top_k, top_p, threads);
}

#ifdef OSPO_CUDA
void draw_codes_cuda(int dtype, uintptr_t cond, uintptr_t uncond, int64_t logit_stride, uintptr_t seeds,
                     uintptr_t steps, uintptr_t tokens, int64_t token_stride, uintptr_t current, uintptr_t bad,
                     int64_t rows, int64_t codes, float guidance, float temperature, int64_t top_k, double top_p,
                     int device, uintptr_t stream) {
    check("draw_codes", ospo::draw_codes_cuda(ospo::Dtype{dtype}, at(cond), at(uncond), logit_stride, at(seeds),
                                              at(steps), at(tokens), token_stride, at(current), at(bad), rows, codes,
                                              guidance, temperature, top_k, top_p, device, at(stream)));
}
#endif

void decode_attention(uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t keys, uintptr_t values, uintptr_t slots,
                      uintptr_t lengths, uintptr_t out, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width,
                      int64_t slot_stride, int64_t head_stride, float scale, bool shared_slots, int threads) {
    ospo::decode_attention(at(qkv), at(cos), at(sin), at(keys), at(values), at(slots), at(lengths), at(out), rows,
                           heads, kv_heads, width, slot_stride, head_stride, scale, shared_slots, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    const py::call_guard<py::gil_scoped_release> release;
    m.doc() = "Compiled operations of ospo_fast, on raw pointers.";
    m.def("build_info", &build_info, "How this module was built, and the vector instructions that it uses here.");
    m.def("cuda_versions", &cuda_versions,
          "(driver, runtime) such as (13000, 13000), driver 0 where there is none; None in a build without CUDA.");
    m.def("otsu_threshold", &otsu_threshold, py::arg("maps"), py::arg("thresholds"), py::arg("count"), py::arg("cells"),
          py::arg("bins"), py::arg("threads"), release,
          "Otsu's threshold of each of count contiguous float32 maps, into thresholds; NaN where there is none.");
    m.def("object_masks", &object_masks, py::arg("raw"), py::arg("valid"), py::arg("maps"), py::arg("thresholds"),
          py::arg("masks"), py::arg("union"), py::arg("images"), py::arg("objects"), py::arg("cells"),
          py::arg("scaler"), py::arg("bins"), py::arg("threads"), release,
          "Normalised maps, thresholds, masks and union of contiguous float32 maps; valid 0 means all.");
    m.def("token_weights", &token_weights, py::arg("masks"), py::arg("weights"), py::arg("images"), py::arg("height"),
          py::arg("width"), py::arg("alpha"), py::arg("gamma"), py::arg("blur_size"), py::arg("blur_sigma"),
          py::arg("threads"), release, "Weights of contiguous float32 masks; the blur reaches at most 15 cells.");
#ifdef OSPO_CUDA
    m.def("otsu_threshold_cuda", &otsu_threshold_cuda, py::arg("maps"), py::arg("thresholds"), py::arg("count"),
          py::arg("cells"), py::arg("bins"), py::arg("device"), py::arg("stream"), release,
          "otsu_threshold on a CUDA stream; count is not 0.");
    m.def("object_masks_cuda", &object_masks_cuda, py::arg("raw"), py::arg("valid"), py::arg("maps"),
          py::arg("thresholds"), py::arg("masks"), py::arg("union"), py::arg("images"), py::arg("objects"),
          py::arg("height"), py::arg("width"), py::arg("scaler"), py::arg("bins"), py::arg("weights"), py::arg("alpha"),
          py::arg("gamma"), py::arg("blur_size"), py::arg("blur_sigma"), py::arg("device"), py::arg("stream"), release,
          "object_masks on a CUDA stream, with the weights of the union where weights is not 0.");
    m.def("token_weights_cuda", &token_weights_cuda, py::arg("masks"), py::arg("weights"), py::arg("images"),
          py::arg("height"), py::arg("width"), py::arg("alpha"), py::arg("gamma"), py::arg("blur_size"),
          py::arg("blur_sigma"), py::arg("device"), py::arg("stream"), release, "token_weights on a CUDA stream.");
#endif
    m.def(
        "attention_columns", &attention_columns, py::arg("pointers"), py::arg("strides"), py::arg("sizes"),
        py::arg("scale"), py::arg("causal"), py::arg("threads"), release,
        "Pointers: q, k, lse, share, columns, row start and count, key start and end, out. Strides: item, head, row of "
        "q, k, lse. Sizes: items, heads, key heads, objects, columns, width, length.");
    m.def(
        "block_columns", &block_columns, py::arg("pointers"), py::arg("block"), py::arg("sizes"), py::arg("scale"),
        py::arg("causal"), py::arg("threads"), release,
        "Pointers: scores, share, columns, row start and count, key start and end, out. Block: rows, keys, first row, "
        "first key. Sizes as of attention_columns.");
    m.def("linear_columns", &ospo::linear_columns, "Columns of a panel of packed weights on this processor.");
    m.def("pack_linear", &pack_linear, py::arg("weight"), py::arg("packed"), py::arg("columns"), py::arg("depth"),
          release, "Weights (columns, depth) into whole panels (panel, depth, column).");
    m.def("linear", &linear, py::arg("x"), py::arg("ldx"), py::arg("packed"), py::arg("bias"), py::arg("out"),
          py::arg("ldo"), py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("threads"), release,
          "out = x · weightᵀ + bias with packed weights; bias 0 means none.");
    m.def("add_rms_norm", &add_rms_norm, py::arg("delta"), py::arg("stream"), py::arg("weight"), py::arg("out"),
          py::arg("rows"), py::arg("width"), py::arg("eps"), py::arg("threads"), release,
          "stream += delta (0 means none), out = weight · RMS norm of stream.");
    m.def("silu_mul", &silu_mul, py::arg("gate_up"), py::arg("out"), py::arg("rows"), py::arg("width"),
          py::arg("threads"), release, "out = silu(gate) · up.");
    m.def("gelu", &gelu, py::arg("x"), py::arg("count"), py::arg("threads"), release, "x = x · Φ(x), in place.");
    m.def("decode_attention", &decode_attention, py::arg("qkv"), py::arg("cos"), py::arg("sin"), py::arg("keys"),
          py::arg("values"), py::arg("slots"), py::arg("lengths"), py::arg("out"), py::arg("rows"), py::arg("heads"),
          py::arg("kv_heads"), py::arg("width"), py::arg("slot_stride"), py::arg("head_stride"), py::arg("scale"),
          py::arg("shared_slots"), py::arg("threads"), release,
          "One new token per row: rotary embedding, cache write, attention; shared_slots: all are written first.");
    m.def(
        "draw_codes", &draw_codes, py::arg("cond"), py::arg("uncond"), py::arg("seeds"), py::arg("steps"),
        py::arg("tokens"), py::arg("token_stride"), py::arg("current"), py::arg("bad"), py::arg("rows"),
        py::arg("codes"), py::arg("guidance"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
        py::arg("threads"), release,
        "A code for each contiguous float32 row of logits, also into column steps[row] of tokens; uncond and tokens 0 "
        "mean none. Wrong rows get code 0, and bad their step.");
#ifdef OSPO_CUDA
    m.def("draw_codes_cuda", &draw_codes_cuda, py::arg("dtype"), py::arg("cond"), py::arg("uncond"),
          py::arg("logit_stride"), py::arg("seeds"), py::arg("steps"), py::arg("tokens"), py::arg("token_stride"),
          py::arg("current"), py::arg("bad"), py::arg("rows"), py::arg("codes"), py::arg("guidance"),
          py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("device"), py::arg("stream"), release,
          "draw_codes on a CUDA stream.");
#endif
    m.def("token_logprobs", &token_logprobs, py::arg("logits"), py::arg("dtype"), py::arg("bias"), py::arg("labels"),
          py::arg("scales"), py::arg("logps"), py::arg("out"), py::arg("write"), py::arg("rows"), py::arg("codes"),
          py::arg("threads"), release,
          "Log-probabilities of contiguous rows of logits, and scale * (onehot - softmax) in their place.");
#ifdef OSPO_CUDA
    m.def("token_logprobs_cuda", &token_logprobs_cuda, py::arg("logits"), py::arg("dtype"), py::arg("bias"),
          py::arg("labels"), py::arg("scales"), py::arg("logps"), py::arg("out"), py::arg("write"), py::arg("rows"),
          py::arg("codes"), py::arg("device"), py::arg("stream"), release, "token_logprobs on a CUDA stream.");
#endif
    m.def("scale_rows", &scale_rows, py::arg("dhidden"), py::arg("packed_row"), py::arg("scales"), py::arg("out"),
          py::arg("dtype"), py::arg("rows"), py::arg("width"), py::arg("threads"), release,
          "out[i] = scales[i] * dhidden[packed_row[i]], 0 for a negative packed_row.");
}
