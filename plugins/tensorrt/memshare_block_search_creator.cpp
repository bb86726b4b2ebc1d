#include "memshare_block_search_creator.h"

#include <stdexcept>

#include "diagnostics.h"
#include "memshare_block_search_plugin.h"

using namespace nvinfer1;

namespace trtllm_memshare {

MemShareBlockSearchCreator::MemShareBlockSearchCreator()
{
    for (std::size_t i = 0; i < mFields.size(); ++i) {
        mFields[i] = PluginField(kFIELD_NAMES[i], nullptr, PluginFieldType::kINT32, 1);
    }
    mFieldCollection = {kNB_FIELDS, mFields.data()};
}

IPluginV3* MemShareBlockSearchCreator::createPlugin(
    char const* name, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept
{
    return guarded<IPluginV3*>(nullptr, "createPlugin", nullptr, [&]() -> IPluginV3* {
        try {
            if (fields == nullptr) {
                throw std::invalid_argument("no plugin fields were given");
            }
            return new MemShareBlockSearchPlugin(parseFields(*fields), phase);
        } catch (std::invalid_argument const& error) {
            report(nullptr, ErrorCode::kINVALID_ARGUMENT, std::string("MemShareBlockSearch ")
                    + (name == nullptr ? "" : name) + ": " + error.what());
            return nullptr;
        }
    });
}

PluginFieldCollection const* MemShareBlockSearchCreator::getFieldNames() noexcept
{
    return &mFieldCollection;
}

char const* MemShareBlockSearchCreator::getPluginName() const noexcept
{
    return kPLUGIN_NAME;
}

char const* MemShareBlockSearchCreator::getPluginVersion() const noexcept
{
    return kPLUGIN_VERSION;
}

char const* MemShareBlockSearchCreator::getPluginNamespace() const noexcept
{
    return kPLUGIN_NAMESPACE;
}

} // namespace trtllm_memshare
