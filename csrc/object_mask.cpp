// Otsu's threshold with the bits of scikit-image, whose thresholds decide which cells belong to an object.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "common.h"

namespace ospo {
namespace {

// Room for one map's histogram, reused by all maps of a thread.
struct Workspace {
    explicit Workspace(int bins)
        : edges(bins + 1), counts(bins), weight1(bins), weight2(bins), mean1(bins), mean2(bins) {}
    std::vector<float> edges, counts, weight1, weight2, mean1, mean2;
};

// bins + 1 edges from low to high, rounded as numpy.linspace rounds float32; false when the range is too small for them.
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

// numpy.histogram's rule for equal bins: an estimate from the range, then one step where an edge says otherwise.
void histogram(const float* map, int64_t cells, float low, float high, int bins, const float* edges, float* counts) {
    const float range = high - low;
    std::fill(counts, counts + bins, 0.0f);
    for (int64_t i = 0; i < cells; ++i) {
        const float value = map[i];
        int bin = static_cast<int>((value - low) / range * static_cast<float>(bins));
        bin -= bin == bins;
        bin -= value < edges[bin];
        bin += value >= edges[bin + 1] && bin != bins - 1;
        counts[bin] += 1.0f;
    }
}

// Least and greatest cell; false when a cell, or their range, is not finite.
OSPO_CLONES bool extrema(const float* map, int64_t cells, float* low, float* high) {
    float least = map[0], most = map[0];
    int wrong = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(| : wrong)
    for (int64_t i = 0; i < cells; ++i) {
        least = std::min(least, map[i]);
        most = std::max(most, map[i]);
        wrong |= !(std::fabs(map[i]) <= FLT_MAX);
    }
    *low = least;
    *high = most;
    return wrong == 0 && most - least <= FLT_MAX;
}

float otsu(const float* map, int64_t cells, int bins, Workspace& space) {
    float low, high;
    if (!extrema(map, cells, &low, &high)) return NAN;
    if (low == high) return map[0];
    float* const edges = space.edges.data();
    float* const counts = space.counts.data();
    if (!bin_edges(low, high, bins, edges)) return NAN;
    histogram(map, cells, low, high, bins, edges, counts);

    const auto center = [edges](int i) { return (edges[i] + edges[i + 1]) / 2.0f; };
    float weight = 0.0f, mass = 0.0f;
    for (int i = 0; i < bins; ++i) {
        weight += counts[i];
        mass += counts[i] * center(i);
        space.weight1[i] = weight;
        space.mean1[i] = mass / weight;
    }
    weight = mass = 0.0f;
    for (int i = bins - 1; i >= 0; --i) {
        weight += counts[i];
        mass += counts[i] * center(i);
        space.weight2[i] = weight;
        space.mean2[i] = mass / weight;
    }
    int best = 0;
    float most = -1.0f;
    for (int i = 0; i + 1 < bins; ++i) {
        const float gap = space.mean1[i] - space.mean2[i + 1];
        const float variance = space.weight1[i] * space.weight2[i + 1] * (gap * gap);
        if (variance > most) {
            most = variance;
            best = i;
        }
    }
    return center(best);
}

}  // namespace

void otsu_threshold(const float* maps, float* thresholds, int64_t count, int64_t cells, int bins, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
    {
        Workspace space(bins);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) thresholds[i] = otsu(maps + i * cells, cells, bins, space);
    }
    (void)threads;
}

}  // namespace ospo
