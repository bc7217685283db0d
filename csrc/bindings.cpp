// The Python module ospo_fast._C. Pointers come as integers from tensors that the caller keeps alive and has checked.
#include <pybind11/pybind11.h>

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

py::object cuda_versions() {
#ifdef OSPO_CUDA
    int driver = 0, runtime = 0;
    const int status = ospo::cuda_versions(&driver, &runtime);
    if (status != 0) throw std::runtime_error(ospo::cuda_error_name(status));
    return py::make_tuple(driver, runtime);
#else
    return py::none();
#endif
}

void otsu_threshold(uintptr_t maps, uintptr_t thresholds, int64_t count, int64_t cells, int bins, int threads) {
    ospo::otsu_threshold(reinterpret_cast<const float*>(maps), reinterpret_cast<float*>(thresholds), count, cells, bins,
                         threads);
}

void sample_codes(uintptr_t cond, uintptr_t uncond, uintptr_t seeds, uintptr_t steps, uintptr_t out, int64_t rows,
                  int64_t codes, float guidance, float temperature, int threads) {
    ospo::sample_codes(reinterpret_cast<const float*>(cond), reinterpret_cast<const float*>(uncond),
                       reinterpret_cast<const int64_t*>(seeds), reinterpret_cast<const int64_t*>(steps),
                       reinterpret_cast<int64_t*>(out), rows, codes, guidance, temperature, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled operations of ospo_fast, on raw pointers.";
    m.def("build_info", &build_info, "How this module was built, and the vector instructions that it uses here.");
    m.def("cuda_versions", &cuda_versions,
          "(driver, runtime) such as (13000, 13000), driver 0 where there is none; None in a build without CUDA.");
    m.def("otsu_threshold", &otsu_threshold, py::arg("maps"), py::arg("thresholds"), py::arg("count"),
          py::arg("cells"), py::arg("bins"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
          "Otsu's threshold of each of count contiguous float32 maps, into thresholds; NaN where there is none.");
    m.def("sample_codes", &sample_codes, py::arg("cond"), py::arg("uncond"), py::arg("seeds"), py::arg("steps"),
          py::arg("out"), py::arg("rows"), py::arg("codes"), py::arg("guidance"), py::arg("temperature"),
          py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
          "One code for each contiguous float32 row of logits, -1 where they are wrong; uncond 0 means none.");
}
