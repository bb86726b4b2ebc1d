// Kernels with one fault each, to show that the host run finds it.
#include "cuda_runtime_api.h"

namespace {

// Each thread reads what its neighbour wrote, with no barrier between.
void no_barrier(int* out)
{
    __shared__ int values[64];
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x] = values[threadIdx.x ^ 1U];
}

// Half of the threads leave before a barrier.
void half_a_barrier(int* out)
{
    if (threadIdx.x < 32) {
        __syncthreads();
    }
    out[threadIdx.x] = 0;
}

// Half of a warp shuffles.
void half_a_shuffle(int* out)
{
    if (threadIdx.x % 32 < 16) {
        out[threadIdx.x] = __shfl_xor_sync(~0U, 1, 8);
    }
}

// Shared memory is read before it is written.
void unset_shared(int* out)
{
    __shared__ int values[64];
    out[threadIdx.x] = values[threadIdx.x];
    values[threadIdx.x] = 7;
}

} // namespace

extern "C" int memshare_fault(int which, int* out)
{
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(2);
    config.blockDim = dim3(64);
    void (*const kernels[])(int*) = {no_barrier, half_a_barrier, half_a_shuffle, unset_shared};
    return cudaLaunchKernelEx(&config, kernels[which], out);
}
