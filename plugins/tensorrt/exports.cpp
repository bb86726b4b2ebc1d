// The two functions that TensorRT looks up when it loads a plugin library (IPluginRegistry::loadLibrary).
#include <NvInferRuntime.h>

#include "diagnostics.h"
#include "memshare_block_search_creator.h"

#define MEMSHARE_EXPORT __attribute__((visibility("default")))

extern "C" MEMSHARE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    trtllm_memshare::setFinder(finder);
}

extern "C" MEMSHARE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static trtllm_memshare::MemShareBlockSearchCreator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    nbCreators = 1;
    return creators;
}
