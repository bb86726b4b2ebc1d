#include "search_attributes.h"

#include <algorithm>
#include <stdexcept>
#include <string_view>

namespace trtllm_memshare {

std::array<char const*, kNB_FIELDS> const kFIELD_NAMES{
    "num_layers", "num_kv_heads", "tokens_per_block", "head_dim", "rotary_dim", "kv_dtype", "interleaved"};

namespace {

[[noreturn]] void refuse(std::string const& message)
{
    throw std::invalid_argument(message);
}

void requireRange(char const* name, int32_t value, int32_t low, int32_t high)
{
    if (value < low || value > high) {
        refuse(std::string(name) + " must be between " + std::to_string(low) + " and " + std::to_string(high) + ", got "
            + std::to_string(value));
    }
}

} // namespace

bool SearchAttributes::operator==(SearchAttributes const& other) const noexcept
{
    auto mine = *this;
    auto theirs = other;
    auto const a = members(mine);
    auto const b = members(theirs);
    return std::equal(a.begin(), a.end(), b.begin(), [](int32_t const* x, int32_t const* y) { return *x == *y; });
}

std::array<int32_t*, kNB_FIELDS> members(SearchAttributes& a) noexcept
{
    return {&a.numLayers, &a.numKvHeads, &a.tokensPerBlock, &a.headDim, &a.rotaryDim, &a.kvDtype, &a.interleaved};
}

SearchAttributes parseFields(nvinfer1::PluginFieldCollection const& fields)
{
    SearchAttributes attributes;
    auto const targets = members(attributes);
    std::array<bool, kNB_FIELDS> seen{};
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        nvinfer1::PluginField const& field = fields.fields[i];
        std::string_view const name = field.name == nullptr ? "" : field.name;
        auto const known = std::find(kFIELD_NAMES.begin(), kFIELD_NAMES.end(), name);
        if (known == kFIELD_NAMES.end()) {
            refuse("unknown plugin field '" + std::string(name) + "'");
        }
        auto const index = static_cast<std::size_t>(known - kFIELD_NAMES.begin());
        if (seen[index]) {
            refuse("plugin field " + std::string(name) + " is given twice");
        }
        if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 || field.data == nullptr) {
            refuse("plugin field " + std::string(name) + " must be one int32, got type "
                + std::to_string(static_cast<int32_t>(field.type)) + " and length " + std::to_string(field.length));
        }
        *targets[index] = *static_cast<int32_t const*>(field.data);
        seen[index] = true;
    }
    for (std::size_t index = 0; index < seen.size(); ++index) {
        if (!seen[index]) {
            refuse(std::string("plugin field ") + kFIELD_NAMES[index] + " is missing");
        }
    }
    validate(attributes);
    return attributes;
}

void validate(SearchAttributes const& a)
{
    requireRange("num_layers", a.numLayers, 1, 4096);
    requireRange("num_kv_heads", a.numKvHeads, 1, 4096);
    requireRange("tokens_per_block", a.tokensPerBlock, 8, 128);
    requireRange("head_dim", a.headDim, 32, 256);
    requireRange("rotary_dim", a.rotaryDim, 0, a.headDim);
    requireRange("kv_dtype", a.kvDtype, 0, static_cast<int32_t>(memshare::KvDtype::kInt8));
    requireRange("interleaved", a.interleaved, 0, 1);
    if (!memshare::is_supported(a.shape())) {
        refuse("head_dim and rotary_dim must be even, got " + std::to_string(a.headDim) + " and "
            + std::to_string(a.rotaryDim));
    }
}

} // namespace trtllm_memshare
