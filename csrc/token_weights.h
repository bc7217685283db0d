// The Gaussian blur of token_weights.cpp and token_weights.cu.
#pragma once

namespace ospo {

// One half of a symmetric kernel, the center first.
struct Blur {
    int radius;
    double tap[16];
};

// size is odd and at most 31.
Blur gaussian_blur(int size, double sigma);

}  // namespace ospo
