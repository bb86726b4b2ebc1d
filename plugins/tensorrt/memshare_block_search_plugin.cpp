#include "memshare_block_search_plugin.h"

#include <cuda_runtime_api.h>

#include <memory>

#include "block_distance_launch.h"
#include "diagnostics.h"

using namespace nvinfer1;

namespace trtllm_memshare {
namespace {

constexpr int32_t kSUMS = 4;            // |dK|^2, |K_new|^2, |dV|^2, |V_new|^2
constexpr int64_t kMAX_GRID = 1LL << 31; // one thread block for each pair and layer

std::string toString(Dims const& dims)
{
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

bool isTypeOf(int32_t pos, DataType type)
{
    switch (pos) {
    case kHIDDEN_IDX: return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
    case kPOOL_POINTERS_IDX: return type == DataType::kINT64;
    case kINV_FREQ_IDX:
    case kNB_INPUTS + kDISTANCES_IDX: return type == DataType::kFLOAT;
    default: return type == DataType::kINT32;
    }
}

} // namespace

MemShareBlockSearchPlugin::MemShareBlockSearchPlugin(SearchAttributes const& attributes, TensorRTPhase phase)
    : mAttributes(attributes)
    , mPhase(phase)
    , mTimingCacheId("MemShareBlockSearch")
{
    auto const values = members(mAttributes);
    for (std::size_t i = 0; i < values.size(); ++i) {
        mFields[i] = PluginField(kFIELD_NAMES[i], values[i], PluginFieldType::kINT32, 1);
        mTimingCacheId += "_" + std::to_string(*values[i]);
    }
    mFieldCollection = {kNB_FIELDS, mFields.data()};
}

IPluginCapability* MemShareBlockSearchPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept
{
    switch (type) {
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    }
    return nullptr;
}

IPluginV3* MemShareBlockSearchPlugin::clone() noexcept
{
    return guarded<IPluginV3*>(mErrorRecorder, "clone", nullptr, [this]() -> IPluginV3* {
        auto copy = std::make_unique<MemShareBlockSearchPlugin>(mAttributes, mPhase);
        copy->mErrorRecorder = mErrorRecorder;
        return copy.release();
    });
}

char const* MemShareBlockSearchPlugin::getPluginName() const noexcept
{
    return kPLUGIN_NAME;
}

char const* MemShareBlockSearchPlugin::getPluginVersion() const noexcept
{
    return kPLUGIN_VERSION;
}

char const* MemShareBlockSearchPlugin::getPluginNamespace() const noexcept
{
    return kPLUGIN_NAMESPACE;
}

int32_t MemShareBlockSearchPlugin::configurePlugin(
    DynamicPluginTensorDesc const*, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept
{
    return nbInputs == kNB_INPUTS && nbOutputs == kNB_OUTPUTS ? 0 : -1;
}

int32_t MemShareBlockSearchPlugin::getOutputDataTypes(
    DataType* outputTypes, int32_t nbOutputs, DataType const*, int32_t nbInputs) const noexcept
{
    if (nbInputs != kNB_INPUTS || nbOutputs != kNB_OUTPUTS) {
        return -1;
    }
    outputTypes[kDISTANCES_IDX] = DataType::kFLOAT;
    return 0;
}

int32_t MemShareBlockSearchPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
    DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& exprBuilder) noexcept
{
    if (nbInputs != kNB_INPUTS || nbOutputs != kNB_OUTPUTS || inputs[kNEW_ROWS_IDX].nbDims != 2) {
        return fail(ErrorCode::kINVALID_ARGUMENT,
            "MemShareBlockSearch takes " + std::to_string(kNB_INPUTS) + " inputs with new_rows [pairs, "
            "tokens_per_block], got " + std::to_string(nbInputs) + " inputs");
    }
    DimsExprs& out = outputs[kDISTANCES_IDX];
    out.nbDims = 3;
    out.d[0] = inputs[kNEW_ROWS_IDX].d[0];
    out.d[1] = exprBuilder.constant(mAttributes.numLayers);
    out.d[2] = exprBuilder.constant(kSUMS);
    return 0;
}

bool MemShareBlockSearchPlugin::supportsFormatCombination(
    int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    if (nbInputs != kNB_INPUTS || nbOutputs != kNB_OUTPUTS || pos < 0 || pos >= kNB_INPUTS + kNB_OUTPUTS) {
        return false;
    }
    return inOut[pos].desc.format == TensorFormat::kLINEAR && isTypeOf(pos, inOut[pos].desc.type);
}

int32_t MemShareBlockSearchPlugin::getNbOutputs() const noexcept
{
    return kNB_OUTPUTS;
}

size_t MemShareBlockSearchPlugin::getWorkspaceSize(
    DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    return 0;
}

char const* MemShareBlockSearchPlugin::getTimingCacheID() noexcept
{
    return mTimingCacheId.c_str();
}

char const* MemShareBlockSearchPlugin::getMetadataString() noexcept
{
    return mTimingCacheId.c_str();
}

int32_t MemShareBlockSearchPlugin::onShapeChange(
    PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    return guarded<int32_t>(mErrorRecorder, "onShapeChange", -1, [&]() -> int32_t {
        if (nbInputs != kNB_INPUTS || nbOutputs != kNB_OUTPUTS) {
            return fail(ErrorCode::kINVALID_ARGUMENT, "MemShareBlockSearch: wrong number of inputs or outputs");
        }
        Dims const& rows = in[kNEW_ROWS_IDX].dims;
        for (int32_t index : {kNEW_ROWS_IDX, kOLD_ROWS_IDX, kPOSITION_DELTA_IDX}) {
            Dims const& dims = in[index].dims;
            if (dims.nbDims != 2 || dims.d[0] != rows.d[0] || dims.d[1] != mAttributes.tokensPerBlock) {
                return fail(ErrorCode::kINVALID_ARGUMENT, "rows and deltas must be [" + std::to_string(rows.d[0]) + ", "
                        + std::to_string(mAttributes.tokensPerBlock) + "], got input " + std::to_string(index) + " "
                        + toString(dims));
            }
        }
        Dims const& frequencies = in[kINV_FREQ_IDX].dims;
        bool const unused = mAttributes.rotaryDim == 0;
        if (frequencies.nbDims != 1 || (!unused && frequencies.d[0] != mAttributes.rotaryDim / 2)) {
            return fail(ErrorCode::kINVALID_ARGUMENT,
                "inv_freq must be [" + std::to_string(mAttributes.rotaryDim / 2) + "], got " + toString(frequencies));
        }
        for (int32_t index : {kPOOL_POINTERS_IDX, kNUM_BLOCKS_IDX}) {
            if (in[index].dims.nbDims != 1 || in[index].dims.d[0] != 1) {
                return fail(ErrorCode::kINVALID_ARGUMENT, "one KV pool is supported: input " + std::to_string(index)
                        + " must be [1], got " + toString(in[index].dims));
            }
        }
        Dims const& sums = out[kDISTANCES_IDX].dims;
        bool const fits = sums.nbDims == 3 && sums.d[0] == rows.d[0] && sums.d[1] == mAttributes.numLayers
            && sums.d[2] == kSUMS;
        if (!fits || rows.d[0] * mAttributes.numLayers >= kMAX_GRID) {
            return fail(ErrorCode::kINVALID_ARGUMENT, "block distances must be [pairs, "
                    + std::to_string(mAttributes.numLayers) + ", 4] with fewer than 2^31 pairs and layers, got "
                    + toString(sums));
        }
        return 0;
    });
}

int32_t MemShareBlockSearchPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*,
    void const* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept
{
    return guarded<int32_t>(mErrorRecorder, "enqueue", -1, [&]() -> int32_t {
        auto const pairs = static_cast<int32_t>(inputDesc[kNEW_ROWS_IDX].dims.d[0]);
        cudaError_t status = cudaSuccess;
        if (mPhase == TensorRTPhase::kBUILD) {
            // TensorRT times layers with made-up buffers: an address in one of them leads nowhere. NaN, so that nobody
            // takes what was not compared for a distance.
            std::size_t const sums = static_cast<std::size_t>(pairs) * static_cast<std::size_t>(mAttributes.numLayers);
            status = cudaMemsetAsync(outputs[kDISTANCES_IDX], 0xff, sums * kSUMS * sizeof(float), stream);
        } else {
            status = memshare::block_distance_launch(static_cast<long long const*>(inputs[kPOOL_POINTERS_IDX]),
                static_cast<int const*>(inputs[kNUM_BLOCKS_IDX]), static_cast<int const*>(inputs[kNEW_ROWS_IDX]),
                static_cast<int const*>(inputs[kOLD_ROWS_IDX]), static_cast<int const*>(inputs[kPOSITION_DELTA_IDX]),
                static_cast<float const*>(inputs[kINV_FREQ_IDX]), static_cast<float*>(outputs[kDISTANCES_IDX]), pairs,
                mAttributes.shape(), static_cast<memshare::KvDtype>(mAttributes.kvDtype), mAttributes.interleaved != 0,
                stream);
        }
        if (status != cudaSuccess) {
            return fail(ErrorCode::kFAILED_EXECUTION, "block distance of " + std::to_string(pairs)
                    + " pairs was not launched: " + cudaGetErrorString(status));
        }
        return 0;
    });
}

IPluginV3* MemShareBlockSearchPlugin::attachToContext(IPluginResourceContext* context) noexcept
{
    return guarded<IPluginV3*>(mErrorRecorder, "attachToContext", nullptr, [&]() -> IPluginV3* {
        auto attached = std::make_unique<MemShareBlockSearchPlugin>(mAttributes, mPhase);
        attached->mErrorRecorder = context == nullptr ? nullptr : context->getErrorRecorder();
        return attached.release();
    });
}

PluginFieldCollection const* MemShareBlockSearchPlugin::getFieldsToSerialize() noexcept
{
    return &mFieldCollection;
}

int32_t MemShareBlockSearchPlugin::fail(ErrorCode code, std::string const& message) const noexcept
{
    report(mErrorRecorder, code, message);
    return -1;
}

} // namespace trtllm_memshare
