// Otsu's threshold of one map on the CPU, for otsu.cpp and object_masks.cpp.
#pragma once

#include <cstdint>
#include <vector>

namespace ospo {

// Buffers of one histogram. A thread reuses them for all its maps.
struct OtsuWorkspace {
    OtsuWorkspace(int bins, int64_t cells)
        : edges(bins + 1), counts(bins), weight1(bins), weight2(bins), mass1(bins), mass2(bins), variance(bins),
          index(cells) {}
    std::vector<float> edges, counts, weight1, weight2, mass1, mass2, variance;
    std::vector<int> index;
};

// Smallest and largest cell; false if a cell or their range is not finite.
bool finite_extrema(const float* map, int64_t cells, float* low, float* high);

// The threshold of a map with these extrema; NaN if the range is too small for the bins.
float otsu(const float* map, int64_t cells, float low, float high, int bins, OtsuWorkspace& space);

}  // namespace ospo
