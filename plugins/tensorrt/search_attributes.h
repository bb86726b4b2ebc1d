// What a plugin instance is built with: the pool's shape and element type, as plugin fields.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "block_distance.h"
#include "kv_dtype.h"

namespace trtllm_memshare {

// int32 members, since plugin fields of type kINT32 point at them. Names of the fields are those of kFIELD_NAMES.
struct SearchAttributes {
    int32_t numLayers{0};
    int32_t numKvHeads{0};
    int32_t tokensPerBlock{0};
    int32_t headDim{0};
    int32_t rotaryDim{0}; // 0 = K is compared as stored
    int32_t kvDtype{-1};  // memshare::KvDtype
    int32_t interleaved{0};

    [[nodiscard]] memshare::PoolShape shape() const noexcept
    {
        return {numLayers, numKvHeads, tokensPerBlock, headDim, rotaryDim};
    }

    bool operator==(SearchAttributes const& other) const noexcept;
};

constexpr int32_t kNB_FIELDS = 7;
extern std::array<char const*, kNB_FIELDS> const kFIELD_NAMES;

// The members in the order of kFIELD_NAMES.
std::array<int32_t*, kNB_FIELDS> members(SearchAttributes& attributes) noexcept;

// Reads every field once. Throws std::invalid_argument naming the field, the value and what was expected for a field
// that is missing, unknown, given twice, of another type or length, or out of range.
SearchAttributes parseFields(nvinfer1::PluginFieldCollection const& fields);

// Throws std::invalid_argument for a pool that no kernel takes.
void validate(SearchAttributes const& attributes);

} // namespace trtllm_memshare
