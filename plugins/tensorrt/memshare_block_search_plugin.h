// MemShareBlockSearch: the block-similarity search as a TensorRT plugin. Holds no CUDA of its own.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "search_attributes.h"

namespace trtllm_memshare {

inline constexpr char const* kPLUGIN_NAME = "MemShareBlockSearch";
inline constexpr char const* kPLUGIN_VERSION = "1";
inline constexpr char const* kPLUGIN_NAMESPACE = "trtllm_memshare";

// Inputs, all linear and on the device. The hidden states are not read: they make TensorRT run the plugin after every
// attention layer, when this step's K and V are in the pool.
enum InputIndex : int32_t {
    kHIDDEN_IDX = 0,          // fp32, fp16 or bf16, any shape
    kPOOL_POINTERS_IDX = 1,   // int64 [1]
    kNUM_BLOCKS_IDX = 2,      // int32 [1]
    kNEW_ROWS_IDX = 3,        // int32 [pairs, tokens_per_block]
    kOLD_ROWS_IDX = 4,        // int32 [pairs, tokens_per_block]
    kPOSITION_DELTA_IDX = 5,  // int32 [pairs, tokens_per_block]
    kINV_FREQ_IDX = 6,        // fp32 [rotary_dim / 2]; at least one element, unread when rotary_dim is 0
    kNB_INPUTS = 7,
};

// Output: fp32 [pairs, num_layers, 4], see plugins/kernels/block_distance.cuh.
enum OutputIndex : int32_t {
    kDISTANCES_IDX = 0,
    kNB_OUTPUTS = 1,
};

class MemShareBlockSearchPlugin final : public nvinfer1::IPluginV3,
                                        public nvinfer1::IPluginV3OneCore,
                                        public nvinfer1::IPluginV3OneBuild,
                                        public nvinfer1::IPluginV3OneRuntime {
public:
    MemShareBlockSearchPlugin(SearchAttributes const& attributes, nvinfer1::TensorRTPhase phase);
    MemShareBlockSearchPlugin(MemShareBlockSearchPlugin const&) = delete;
    MemShareBlockSearchPlugin& operator=(MemShareBlockSearchPlugin const&) = delete;
    ~MemShareBlockSearchPlugin() override = default;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override;
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
        nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
        nvinfer1::DimsExprs const* shapeInputs, int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
        nvinfer1::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override;
    int32_t getNbOutputs() const noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override;
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    int32_t fail(nvinfer1::ErrorCode code, std::string const& message) const noexcept;

    SearchAttributes mAttributes;
    nvinfer1::TensorRTPhase mPhase;
    std::string mTimingCacheId;
    // Of the execution context this instance is attached to; null before that.
    nvinfer1::IErrorRecorder* mErrorRecorder{nullptr};
    // Point at mAttributes of this instance, so a clone has its own.
    std::array<nvinfer1::PluginField, kNB_FIELDS> mFields;
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

} // namespace trtllm_memshare
