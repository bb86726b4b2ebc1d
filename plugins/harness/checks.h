// What the harness checks, and how a check says that it failed.
#pragma once

#include <NvInferRuntime.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../tensorrt/page_signatures_export.h"
#include "fakes.h"

namespace harness {

struct Check {
    std::string name;
    std::function<void()> run; // throws std::runtime_error
};

inline void require(bool condition, std::string const& what)
{
    if (!condition) {
        throw std::runtime_error(what);
    }
}

// The loaded library.
struct Library {
    nvinfer1::IPluginCreatorV3One* creator;
    LoggerFinder* finder;
    decltype(&memshare_page_signatures) signPages;
};

// Owns a plugin's fields: names as the plugin expects them, int32 values.
class Fields {
public:
    // num_layers, num_kv_heads, tokens_per_block, head_dim, rotary_dim, kv_dtype, interleaved
    explicit Fields(std::vector<int32_t> values);

    void set(std::string const& name, int32_t value);
    void remove(std::string const& name);
    nvinfer1::PluginField& field(std::string const& name);
    void repeat(std::string const& name);
    void rename(std::string const& name, char const* other);
    nvinfer1::PluginFieldCollection const* collection();

private:
    std::vector<int32_t> mValues;
    std::vector<nvinfer1::PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

template <class Capability> Capability* capability(nvinfer1::IPluginV3& plugin, nvinfer1::PluginCapabilityType type)
{
    auto* const found = static_cast<Capability*>(plugin.getCapabilityInterface(type));
    require(found != nullptr, "a capability is missing");
    return found;
}

inline nvinfer1::IPluginV3OneBuild* build(nvinfer1::IPluginV3& plugin)
{
    return capability<nvinfer1::IPluginV3OneBuild>(plugin, nvinfer1::PluginCapabilityType::kBUILD);
}

inline nvinfer1::IPluginV3OneRuntime* runtime(nvinfer1::IPluginV3& plugin)
{
    return capability<nvinfer1::IPluginV3OneRuntime>(plugin, nvinfer1::PluginCapabilityType::kRUNTIME);
}

std::unique_ptr<nvinfer1::IPluginV3> create(Library const& library, Fields& fields, nvinfer1::TensorRTPhase phase);

// Descriptions of the plugin's seven inputs and of its output, in this order.
std::vector<nvinfer1::PluginTensorDesc> tensors(
    int64_t pairs, int64_t tokensPerBlock, int64_t frequencies, int64_t layers);

std::vector<Check> hostChecks(Library const& library, bool hasGpu);
std::vector<Check> gpuChecks(Library const& library);
std::vector<Check> signatureHostChecks(Library const& library, bool hasGpu);
std::vector<Check> signatureGpuChecks(Library const& library);

} // namespace harness
