// Attention maps to object masks: min-max normalization, Otsu's threshold, binarization and the union of the objects.
#include <algorithm>
#include <cmath>

#include "common.h"
#include "otsu.h"

namespace ospo {
namespace {

OSPO_CLONES void normalize(const float* raw, int64_t cells, float low, float range, float* map) {
    for (int64_t i = 0; i < cells; ++i) map[i] = (raw[i] - low) / range;
}

OSPO_CLONES void binarize(const float* map, int64_t cells, float threshold, uint8_t* mask, uint8_t* unions) {
    for (int64_t i = 0; i < cells; ++i) {
        mask[i] = map[i] > threshold;
        unions[i] |= mask[i];
    }
}

}  // namespace

int64_t object_masks(const float* raw, const uint8_t* valid, float* maps, float* thresholds, uint8_t* masks,
                     uint8_t* unions, int64_t images, int64_t objects, int64_t cells, float scaler, int bins,
                     int threads) {
    checked_product("object_masks: images x objects x cells", {images, objects, cells});
    check_range("object_masks: cells", cells, 1);
    const int team = team_size(threads, images);
    const OtsuWorkspaces spaces(team, bins, cells);
    int64_t without = 0;
#pragma omp parallel num_threads(team) reduction(+ : without)
    {
        const OtsuWorkspace space = spaces.get();
#pragma omp for schedule(static)
        for (int64_t b = 0; b < images; ++b) {
            std::fill_n(unions + b * cells, cells, uint8_t{0});
            for (int64_t n = b * objects; n < (b + 1) * objects; ++n) {
                const float* const raw_map = raw + n * cells;
                float* const map = maps + n * cells;
                float low, high;
                if (valid != nullptr && !valid[n]) {
                    std::fill_n(map, cells, 0.0f);
                    thresholds[n] = 0.0f;
                } else if (finite_extrema(raw_map, cells, &low, &high)) {
                    const float range = high - low + 1e-8f;
                    normalize(raw_map, cells, low, range, map);
                    // Normalization is monotone, so the extrema of the map follow from those of the raw one.
                    thresholds[n] = otsu(map, cells, 0.0f, (high - low) / range, bins, space);
                } else {
                    std::fill_n(map, cells, NAN);
                    thresholds[n] = NAN;
                }
                without += std::isnan(thresholds[n]);
                binarize(map, cells, thresholds[n] * scaler, masks + n * cells, unions + b * cells);
            }
        }
    }
    return without;
}

}  // namespace ospo
