// Loads the plugin library as TensorRT does and walks its life: plugin_harness LIBRARY [--gpu auto|require|never].
// One line a check; exit status 0 if all held, 1 if one failed, 2 for a wrong command line.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "checks.h"

namespace {

using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
using SetLoggerFinder = void (*)(nvinfer1::ILoggerFinder*);

int usage(char const* problem)
{
    std::fprintf(stderr, "error: %s (plugin_harness LIBRARY [--gpu auto|require|never])\n", problem);
    return 2;
}

} // namespace

int main(int argc, char** argv)
{
    std::string mode = "auto";
    if (argc != 2 && !(argc == 4 && std::strcmp(argv[2], "--gpu") == 0)) {
        return usage("wrong arguments");
    }
    if (argc == 4) {
        mode = argv[3];
    }
    if (mode != "auto" && mode != "require" && mode != "never") {
        return usage("--gpu must be auto, require or never");
    }
    void* const handle = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        return usage(dlerror());
    }
    auto const getCreators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    auto const setLoggerFinder = reinterpret_cast<SetLoggerFinder>(dlsym(handle, "setLoggerFinder"));
    auto const signPages
        = reinterpret_cast<decltype(&memshare_page_signatures)>(dlsym(handle, "memshare_page_signatures"));
    if (getCreators == nullptr || setLoggerFinder == nullptr || signPages == nullptr) {
        return usage("the library must export getCreators, setLoggerFinder and memshare_page_signatures");
    }
    harness::LoggerFinder finder;
    setLoggerFinder(&finder);
    int32_t count = 0;
    auto* const* const creators = getCreators(count);
    if (count != 1) {
        return usage("the library must export one creator");
    }
    harness::Library const library{static_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]), &finder, signPages};

    int devices = 0;
    bool const hasGpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
    if (mode == "require" && !hasGpu) {
        return usage("--gpu require needs a CUDA device");
    }
    std::vector<harness::Check> checks;
    auto const take = [&checks](std::vector<harness::Check> const& more) {
        checks.insert(checks.end(), more.begin(), more.end());
    };
    take(harness::hostChecks(library, hasGpu));
    take(harness::signatureHostChecks(library, hasGpu));
    if (hasGpu && mode != "never") {
        take(harness::gpuChecks(library));
        take(harness::signatureGpuChecks(library));
    } else {
        std::printf("not run: the checks on a GPU (%s)\n", hasGpu ? "--gpu never" : "no CUDA device");
    }
    std::size_t failures = 0;
    for (auto const& check : checks) {
        try {
            check.run();
            std::printf("ok: %s\n", check.name.c_str());
        } catch (std::exception const& error) {
            ++failures;
            std::printf("FAILED: %s: %s\n", check.name.c_str(), error.what());
        }
    }
    std::printf("%zu of %zu checks held\n", checks.size() - failures, checks.size());
    setLoggerFinder(nullptr);
    return failures == 0 ? 0 : 1;
}
