// Attention maps to object masks to token weights. Otsu's threshold has the bits of scikit-image, because it decides
// which cells belong to an object.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

namespace ospo {
namespace {

// Room for one map's histogram, reused by all maps of a thread.
struct Workspace {
    Workspace(int bins, int64_t cells)
        : edges(bins + 1), counts(bins), weight1(bins), weight2(bins), mass1(bins), mass2(bins), variance(bins),
          index(cells) {}
    std::vector<float> edges, counts, weight1, weight2, mass1, mass2, variance;
    std::vector<int> index;
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

// The bins that the range alone gives: what `histogram` starts from.
OSPO_CLONES void guess_bins(const float* map, int64_t cells, float low, float range, int bins, int* index) {
    const float whole = static_cast<float>(bins);
    for (int64_t i = 0; i < cells; ++i) index[i] = static_cast<int>((map[i] - low) / range * whole);
}

// numpy.histogram's rule for equal bins: an estimate from the range, then one step where an edge says otherwise.
void histogram(const float* map, int64_t cells, float low, float high, int bins, Workspace& space) {
    const float* const edges = space.edges.data();
    float* const counts = space.counts.data();
    guess_bins(map, cells, low, high - low, bins, space.index.data());
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

// w1·w2·(m1 − m2)² of each cut between two bins, from the running sums of either side.
OSPO_CLONES void variances(const Workspace& space, int bins, float* out) {
    const float *const weight1 = space.weight1.data(), *const weight2 = space.weight2.data();
    const float *const mass1 = space.mass1.data(), *const mass2 = space.mass2.data();
    for (int i = 0; i + 1 < bins; ++i) {
        const float gap = mass1[i] / weight1[i] - mass2[i + 1] / weight2[i + 1];
        out[i] = weight1[i] * weight2[i + 1] * (gap * gap);
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

// The threshold of a map whose cells reach from low to high.
float otsu(const float* map, int64_t cells, float low, float high, int bins, Workspace& space) {
    if (low == high) return map[0];
    float* const edges = space.edges.data();
    if (!bin_edges(low, high, bins, edges)) return NAN;
    histogram(map, cells, low, high, bins, space);

    const auto center = [edges](int i) { return (edges[i] + edges[i + 1]) / 2.0f; };
    float weight1 = 0.0f, weight2 = 0.0f, mass1 = 0.0f, mass2 = 0.0f;
    for (int i = 0, j = bins - 1; i < bins; ++i, --j) {  // from both ends, in the order of scikit-image's sums
        space.weight1[i] = weight1 += space.counts[i];
        space.weight2[j] = weight2 += space.counts[j];
        space.mass1[i] = mass1 += space.counts[i] * center(i);
        space.mass2[j] = mass2 += space.counts[j] * center(j);
    }
    variances(space, bins, space.variance.data());
    int best = 0;
    for (int i = 1; i + 1 < bins; ++i) {
        if (space.variance[i] > space.variance[best]) best = i;
    }
    return center(best);
}

OSPO_CLONES void normalise(const float* map, int64_t cells, float low, float range, float* out) {
    for (int64_t i = 0; i < cells; ++i) out[i] = (map[i] - low) / range;
}

OSPO_CLONES void binarise(const float* map, int64_t cells, float threshold, uint8_t* mask, uint8_t* any) {
    for (int64_t i = 0; i < cells; ++i) {
        mask[i] = map[i] > threshold;
        any[i] |= mask[i];
    }
}

// One axis of the blur. Cells at the same distance are added first, so that a mirrored map gives mirrored bits.
void blur_axis(const double* in, double* out, int64_t lines, int64_t line, int64_t length, int64_t step,
               const Blur& blur) {
    for (int64_t l = 0; l < lines; ++l) {
        for (int64_t i = 0; i < length; ++i) {
            const int64_t at = l * line + i * step;
            double sum = in[at] * blur.tap[0];
            for (int t = 1; t <= blur.radius; ++t) {
                const double before = i >= t ? in[at - t * step] : 0.0;
                const double after = i + t < length ? in[at + t * step] : 0.0;
                sum += (before + after) * blur.tap[t];
            }
            out[at] = sum;
        }
    }
}

}  // namespace

void otsu_threshold(const float* maps, float* thresholds, int64_t count, int64_t cells, int bins, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
    {
        Workspace space(bins, cells);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const float* const map = maps + i * cells;
            float low, high;
            thresholds[i] = extrema(map, cells, &low, &high) ? otsu(map, cells, low, high, bins, space) : NAN;
        }
    }
    (void)threads;
}

void object_masks(const MaskTensors& t, int64_t images, int64_t objects, int64_t cells, float scaler, int bins,
                  int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && images > 1)
    {
        Workspace space(bins, cells);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < images; ++b) {
            uint8_t* const any = t.any + b * cells;
            std::memset(any, 0, cells);
            for (int64_t n = b * objects; n < (b + 1) * objects; ++n) {
                float* const map = t.maps + n * cells;
                float low, high;
                t.thresholds[n] = 0.0f;
                if (t.valid != nullptr && !t.valid[n]) {
                    std::fill(map, map + cells, 0.0f);
                } else if (extrema(t.raw + n * cells, cells, &low, &high)) {
                    const float range = high - low + 1e-8f;
                    normalise(t.raw + n * cells, cells, low, range, map);
                    // The map is monotone, so its extrema are those of the raw one, normalised.
                    t.thresholds[n] = otsu(map, cells, 0.0f, (high - low) / range, bins, space);
                } else {
                    std::fill(map, map + cells, NAN);
                    t.thresholds[n] = NAN;
                }
                binarise(map, cells, t.thresholds[n] * scaler, t.masks + n * cells, any);
            }
        }
    }
    (void)threads;
}

void token_weights(const float* masks, float* weights, int64_t images, int64_t height, int64_t width, double alpha,
                   double gamma, const Blur& blur, int threads) {
    const int64_t cells = height * width;
#pragma omp parallel num_threads(threads) if (threads > 1 && images > 1)
    {
        std::vector<double> grid(cells), half(cells);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < images; ++b) {
            for (int64_t i = 0; i < cells; ++i) grid[i] = masks[b * cells + i];
            if (blur.radius > 0) {
                blur_axis(grid.data(), half.data(), height, width, width, 1, blur);
                blur_axis(half.data(), grid.data(), width, 1, height, width, blur);
            }
            double low = grid[0], high = grid[0];
            for (const double value : grid) {
                low = std::min(low, value);
                high = std::max(high, value);
            }
            const double range = high - low + 1e-8;
            for (int64_t i = 0; i < cells; ++i) {
                double value = (grid[i] - low) / range;
                if (gamma != 1.0) value = std::pow(value, gamma);
                weights[b * cells + i] = static_cast<float>(1.0 + alpha * value);
            }
        }
    }
    (void)threads;
}

Blur gaussian(int size, double sigma) {
    Blur blur{size / 2, {}};
    double sum = 0.0;
    for (int t = 0; t <= blur.radius; ++t) {
        blur.tap[t] = std::exp(-0.5 * (t / sigma) * (t / sigma));
        sum += t ? 2 * blur.tap[t] : blur.tap[t];
    }
    for (int t = 0; t <= blur.radius; ++t) blur.tap[t] /= sum;
    return blur;
}

}  // namespace ospo
