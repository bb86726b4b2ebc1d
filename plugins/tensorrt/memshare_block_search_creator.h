// Creates MemShareBlockSearch from plugin fields, for a network under construction or an engine being loaded.
#pragma once

#include <NvInferRuntime.h>

#include <array>

#include "search_attributes.h"

namespace trtllm_memshare {

class MemShareBlockSearchCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    MemShareBlockSearchCreator();

    // Null, with the reason in TensorRT's log, if the fields do not describe a pool.
    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override;
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

private:
    std::array<nvinfer1::PluginField, kNB_FIELDS> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

} // namespace trtllm_memshare
