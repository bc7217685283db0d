// Otsu's threshold on the GPU, one block per map.
#include "otsu.cuh"

#include "common.h"
#include "launch.h"

namespace ospo {
namespace {

constexpr int THREADS = 64;  // the prefix sums take most of the time, and only three threads compute them

__global__ void __launch_bounds__(THREADS) otsu_kernel(const float* maps, float* thresholds, int cells, int bins) {
    extern __shared__ float shared[];
    __shared__ OtsuScratch scratch;
    const ThreadTeam<true> team(THREADS);
    const OtsuBuffers buffers(shared, cells, bins);
    const int64_t n = blockIdx.x;
    float low, high, threshold = NAN;
    if (load_map(team, maps + n * cells, cells, buffers.map, low, high, scratch)) {
        threshold = low == high ? low : otsu(team, buffers, cells, low, high, bins, scratch);
    }
    if (team.thread == 0) thresholds[n] = threshold;
}

}  // namespace

int otsu_threshold_cuda(const float* maps, float* thresholds, int64_t count, int cells, int bins, int device,
                        void* stream) {
    return launch<otsu_kernel>(count, THREADS, OtsuBuffers::bytes(cells, bins), device, stream, maps, thresholds, cells,
                               bins);
}

}  // namespace ospo
