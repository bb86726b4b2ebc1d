// Random inputs of checks.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "kv_dtype.h"

namespace harness {

inline std::size_t elementBytes(memshare::KvDtype dtype)
{
    static constexpr std::array<std::size_t, 5> kBytes{4, 2, 2, 1, 1};
    return kBytes[static_cast<std::size_t>(dtype)];
}

// The bytes of `count` elements: no infinity, no NaN, values of like size.
inline std::vector<unsigned char> randomElements(std::mt19937& random, memshare::KvDtype dtype, std::size_t count)
{
    std::size_t const bytes = elementBytes(dtype);
    std::vector<unsigned char> elements(count * bytes);
    for (std::size_t i = 0; i < elements.size(); ++i) {
        bool const top = i % bytes == bytes - 1; // with a middling exponent
        unsigned int const value = random();
        elements[i] = static_cast<unsigned char>(!top || bytes == 1 ? value & 0xbfU : (value & 0x81U) | 0x3eU);
    }
    return elements;
}

// Radians per token of each pair of rotated elements; one that nobody reads where none is rotated.
inline std::vector<float> frequencies(int rotaryDim, int headDim)
{
    std::vector<float> values;
    for (int i = 0; i < std::max(1, rotaryDim / 2); ++i) {
        values.push_back(std::pow(1e6F, -2.0F * static_cast<float>(i) / static_cast<float>(headDim)));
    }
    return values;
}

} // namespace harness
