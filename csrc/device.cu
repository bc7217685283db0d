// Versions and error names of the CUDA runtime, without creating a context.
#include "common.h"

namespace ospo {

int cuda_versions(int* driver, int* runtime) {
    const cudaError_t status = cudaDriverGetVersion(driver);
    return static_cast<int>(status == cudaSuccess ? cudaRuntimeGetVersion(runtime) : status);
}

const char* cuda_error_name(int status) { return cudaGetErrorName(static_cast<cudaError_t>(status)); }

}  // namespace ospo
