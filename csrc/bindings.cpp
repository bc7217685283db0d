// The Python module ospo_fast._C. Signatures are those of common.h; ospo_fast/_C.pyi repeats them for type checkers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

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

// The version of the OSPO_CLONES functions that runs on this processor.
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
void check(const char* name, int status) {
    if (status != 0) throw std::runtime_error(std::string(name) + ": " + ospo::cuda_error_name(status));
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

// How Python passes an argument of type T: a pointer as an integer (0 for null), a dtype as its number, a struct of
// pointers or of sizes as a sequence of integers.
template <class T>
auto passed() {
    if constexpr (std::is_pointer_v<T>) return uintptr_t{};
    else if constexpr (std::is_enum_v<T>) return int{};
    else if constexpr (std::is_class_v<T>) return std::array<int64_t, sizeof(T) / sizeof(int64_t)>{};
    else return T{};
}

template <class T>
T received(decltype(passed<T>()) value) {
    if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(value);
    else if constexpr (std::is_class_v<T>) {
        T fields;
        static_assert(sizeof fields == sizeof value && std::is_trivially_copyable_v<T>);
        std::memcpy(&fields, &value, sizeof fields);
        return fields;
    } else return static_cast<T>(value);
}

// Define `name` as a call of `function` that releases the GIL.
template <class Result, class... Arguments>
void define(py::module_& m, const char* name, Result (*function)(Arguments...), const char* doc) {
    m.def(
        name,
        [function](decltype(passed<std::decay_t<Arguments>>())... arguments) {
            return function(received<std::decay_t<Arguments>>(arguments)...);
        },
        py::call_guard<py::gil_scoped_release>(), doc);
}

#ifdef OSPO_CUDA
// The same for a function that returns a cudaError_t: an error raises RuntimeError.
template <class... Arguments>
void define_cuda(py::module_& m, const char* name, int (*function)(Arguments...), const char* doc) {
    m.def(
        name,
        [name, function](decltype(passed<Arguments>())... arguments) {
            check(name, function(received<Arguments>(arguments)...));
        },
        py::call_guard<py::gil_scoped_release>(), doc);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled operations of ospo_fast on raw pointers. Sizes are checked, pointers cannot be: use "
              "ospo_fast.ops.";
    m.def("build_info", &build_info, "Compiler, OpenMP version, instruction set in use, and CUDA architectures.");
    m.def("cuda_versions", &cuda_versions,
          "(driver, runtime) such as (13000, 13000), driver 0 without a driver; None in a build without CUDA.");
    define(m, "otsu_threshold", ospo::otsu_threshold, "Otsu's threshold of each float32 map, NaN where it has none.");
    define(m, "object_masks", ospo::object_masks, "Normalized maps, thresholds, masks and their union.");
    define(m, "token_weights", ospo::token_weights, "Token weights of float32 masks.");
    define(m, "attention_columns", ospo::attention_columns,
           "Attention probabilities of key columns. The first three arguments are the structs ColumnTensors, "
           "ColumnStrides and ColumnSizes of csrc/common.h as sequences.");
    define(m, "block_columns", ospo::block_columns,
           "The same from a block of scores. The first three arguments are BlockTensors, ScoreBlock and ColumnSizes.");
    define(m, "linear_columns", ospo::linear_columns, "Columns per panel of packed weights on this processor.");
    define(m, "pack_linear", ospo::pack_linear, "Pack weights (columns, depth) into panels (panel, depth, column).");
    define(m, "linear", ospo::linear, "out = x · weightᵀ + bias with packed weights.");
    define(m, "gelu", ospo::gelu, "x = x · Φ(x), in place.");
    define(m, "add_rms_norm", ospo::add_rms_norm, "residual += delta; out = weight · RMS norm of the residual.");
    define(m, "silu_mul", ospo::silu_mul, "out = silu(gate) · up.");
    define(m, "decode_attention", ospo::decode_attention,
           "Rotary embedding, cache write and attention of one new token per row.");
    define(m, "token_logprobs", ospo::token_logprobs,
           "Log-probabilities of the labels; writes scale · (onehot − softmax) over the logits.");
    define(m, "count_labels", ospo::count_labels, "Number of labels that are not ignored; -1 for an invalid label.");
    define(m, "scale_rows", ospo::scale_rows, "out[i] = scales[i] · dhidden[packed_row[i]].");
    define(m, "sample_codes", ospo::sample_codes, "Sample one code per row of float32 logits.");
#ifdef OSPO_CUDA
    define_cuda(m, "otsu_threshold_cuda", ospo::otsu_threshold_cuda, "otsu_threshold on a CUDA stream.");
    define_cuda(m, "object_masks_cuda", ospo::object_masks_cuda, "object_masks on a CUDA stream.");
    define_cuda(m, "token_weights_cuda", ospo::token_weights_cuda, "token_weights on a CUDA stream.");
    define_cuda(m, "token_logprobs_cuda", ospo::token_logprobs_cuda, "token_logprobs on a CUDA stream.");
    define_cuda(m, "sample_codes_cuda", ospo::sample_codes_cuda, "sample_codes on a CUDA stream.");
#endif
}
