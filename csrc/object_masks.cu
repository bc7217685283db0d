// Object masks on the GPU: one block per image, in which teams of warps compute several objects at once. Float
// operations that decide a bit of a mask are intrinsics, as in otsu.cuh: the results are those of object_masks.cpp.
#include "common.h"
#include "launch.h"
#include "otsu.cuh"

namespace ospo {
namespace {

constexpr int THREADS = 256;
constexpr size_t MAX_SHARED = 96 * 1024;  // bytes for the maps that a block has at once; every device allows it

struct Arguments {
    const float* raw;      // (B, O, cells)
    const uint8_t* valid;  // (B, O), or null
    float* maps;           // (B, O, cells)
    float* thresholds;     // (B, O)
    uint8_t* masks;        // (B, O, cells)
    uint8_t* unions;       // (B, cells)
    int objects, teams, cells;
    float scaler;
    int bins;
};

__global__ void __launch_bounds__(THREADS) object_masks_kernel(const Arguments a) {
    extern __shared__ float shared[];
    __shared__ OtsuScratch scratch;
    const int cells = a.cells;
    const ThreadTeam<false> team(THREADS / a.teams);
    const OtsuBuffers buffers(shared + team.index * (OtsuBuffers::bytes(cells, a.bins) / sizeof(float)), cells, a.bins);
    float* const map = buffers.map;
    const int64_t image = blockIdx.x;
    uint8_t* const unions = a.unions + image * cells;

    for (int i = threadIdx.x; i < cells; i += THREADS) unions[i] = 0;
    __syncthreads();
    for (int64_t n = image * a.objects + team.index; n < (image + 1) * a.objects; n += a.teams) {
        const bool valid = a.valid == nullptr || a.valid[n];
        float low, high;
        const bool finite = load_map(team, valid ? a.raw + n * cells : nullptr, cells, map, low, high, scratch);
        const float span = __fsub_rn(high, low), range = __fadd_rn(span, 1e-8f);
        for (int i = team.thread; i < cells; i += team.threads) {
            map[i] = finite ? __fdiv_rn(__fsub_rn(map[i], low), range) : NAN;
        }
        team.sync();
        float threshold = finite ? 0.0f : NAN;
        if (finite && span > 0.0f) {
            threshold = otsu(team, buffers, cells, 0.0f, __fdiv_rn(span, range), a.bins, scratch);
        }
        const float cut = __fmul_rn(threshold, a.scaler);
        for (int i = team.thread; i < cells; i += team.threads) {
            const bool inside = map[i] > cut;
            a.maps[n * cells + i] = map[i];
            a.masks[n * cells + i] = inside;
            if (inside) unions[i] = 1;
        }
        if (team.thread == 0) a.thresholds[n] = threshold;
        team.sync();
    }
}

}  // namespace

int object_masks_cuda(const float* raw, const uint8_t* valid, float* maps, float* thresholds, uint8_t* masks,
                      uint8_t* unions, int64_t images, int objects, int cells, float scaler, int bins, int device,
                      void* stream) {
    const size_t bytes = OtsuBuffers::bytes(cells, bins);
    int teams = 1;
    while (teams < objects && teams < MAX_WARPS && 2 * teams * bytes <= MAX_SHARED) teams *= 2;
    const Arguments arguments{raw, valid, maps, thresholds, masks, unions, objects, teams, cells, scaler, bins};
    return launch<object_masks_kernel>(images, THREADS, teams * bytes, device, stream, arguments);
}

}  // namespace ospo
