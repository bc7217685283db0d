// Otsu's threshold, bitwise equal to scikit-image: the threshold decides which cells belong to an object.
#include "otsu.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "common.h"

namespace ospo {
namespace {

// bins + 1 edges from low to high, rounded as numpy.linspace rounds float32; false if two edges coincide.
bool bin_edges(float low, float high, int bins, float* edges) {
    const float delta = high - low;
    const float step = delta / static_cast<float>(bins);
    for (int i = 0; i <= bins; ++i) {
        const float index = static_cast<float>(i);
        edges[i] = (step == 0.0f ? index / static_cast<float>(bins) * delta : index * step) + low;
    }
    edges[bins] = high;
    for (int i = 0; i < bins; ++i) {
        if (!(edges[i] < edges[i + 1])) return false;
    }
    return true;
}

// The power of two that brings the largest cell to about 1, within the normal floats. The variances of maps with very
// large or small cells would overflow or vanish; the scale changes no other bit.
float unit_scale(float low, float high) {
    const float size = std::max(std::fabs(low), std::fabs(high));
    int exponent;
    return std::min(std::max(std::frexp(size, &exponent) / size, 0x1p-126f), 0x1p126f);
}

OSPO_CLONES void estimate_bins(const float* map, int64_t cells, float low, float range, int bins, int* index) {
    const float bin_count = static_cast<float>(bins);
    for (int64_t i = 0; i < cells; ++i) index[i] = static_cast<int>((map[i] - low) / range * bin_count);
}

// numpy.histogram's rule for bins of equal width: an estimate from the range, then one step if an edge requires it.
void histogram(const float* map, int64_t cells, float low, float high, int bins, const OtsuWorkspace& space) {
    const float* const edges = space.edges;
    float* const counts = space.counts;
    estimate_bins(map, cells, low, high - low, bins, space.index);
    std::fill(counts, counts + bins, 0.0f);
    for (int64_t i = 0; i < cells; ++i) {
        const float value = map[i];
        int bin = space.index[i];
        bin -= bin == bins;
        bin -= value < edges[bin];
        bin += value >= edges[bin + 1] && bin != bins - 1;
        counts[bin] += 1.0f;
    }
}

// w1·w2·(m1 − m2)² of each cut between two bins.
OSPO_CLONES void variances(const OtsuWorkspace& space, int bins, float* out) {
    const float *const weight1 = space.weight1, *const weight2 = space.weight2;
    const float *const mass1 = space.mass1, *const mass2 = space.mass2;
    for (int i = 0; i + 1 < bins; ++i) {
        const float gap = mass1[i] / weight1[i] - mass2[i + 1] / weight2[i + 1];
        out[i] = weight1[i] * weight2[i + 1] * (gap * gap);
    }
}

}  // namespace

OSPO_CLONES bool finite_extrema(const float* map, int64_t cells, float* low, float* high) {
    float min = map[0], max = map[0];
    int invalid = 0;
#pragma omp simd reduction(min : min) reduction(max : max) reduction(| : invalid)
    for (int64_t i = 0; i < cells; ++i) {
        min = std::min(min, map[i]);
        max = std::max(max, map[i]);
        invalid |= !(std::fabs(map[i]) <= FLT_MAX);
    }
    *low = min;
    *high = max;
    return invalid == 0 && max - min <= FLT_MAX;
}

float otsu(const float* map, int64_t cells, float low, float high, int bins, const OtsuWorkspace& space) {
    if (low == high) return map[0];
    float* const edges = space.edges;
    if (!bin_edges(low, high, bins, edges)) return NAN;
    histogram(map, cells, low, high, bins, space);

    const float scale = unit_scale(low, high);
    const auto center = [edges, scale](int i) { return (edges[i] * scale + edges[i + 1] * scale) / 2.0f; };
    float weight1 = 0.0f, weight2 = 0.0f, mass1 = 0.0f, mass2 = 0.0f;
    for (int i = 0, j = bins - 1; i < bins; ++i, --j) {  // from both ends: the order of scikit-image's sums
        space.weight1[i] = weight1 += space.counts[i];
        space.weight2[j] = weight2 += space.counts[j];
        space.mass1[i] = mass1 += space.counts[i] * center(i);
        space.mass2[j] = mass2 += space.counts[j] * center(j);
    }
    variances(space, bins, space.variance);
    int best = 0;
    for (int i = 1; i + 1 < bins; ++i) {
        if (space.variance[i] > space.variance[best]) best = i;
    }
    return center(best) / scale;
}

int64_t otsu_threshold(const float* maps, float* thresholds, int64_t count, int64_t cells, int bins, int threads) {
    checked_product("otsu_threshold: count x cells", {count, cells});
    check_range("otsu_threshold: cells", cells, 1);
    const int team = team_size(threads, count);
    const OtsuWorkspaces spaces(team, bins, cells);
    int64_t without = 0;
#pragma omp parallel num_threads(team) reduction(+ : without)
    {
        const OtsuWorkspace space = spaces.get();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const float* const map = maps + i * cells;
            float low, high;
            thresholds[i] = finite_extrema(map, cells, &low, &high) ? otsu(map, cells, low, high, bins, space) : NAN;
            without += std::isnan(thresholds[i]);
        }
    }
    return without;
}

}  // namespace ospo
