// The launcher and its kernels as they are; the plugin library's entry is their door for callers without C++.
#include "cuda_runtime_api.h"

#include "page_signatures_launch.cu"
