// What the launchers share: an error of theirs is theirs alone.
#pragma once

#include <cuda_runtime_api.h>

namespace memshare {

// Hands on the status of a call of ours. An error is taken back from the runtime, so that whoever asks it next is not
// told of ours.
inline cudaError_t own_status(cudaError_t status)
{
    if (status != cudaSuccess) {
        static_cast<void>(cudaGetLastError());
    }
    return status;
}

// Enqueues one kernel. The status is of this launch alone: an error of an earlier one, which cudaPeekAtLastError would
// go on returning, is not ours.
template <class... Expected, class... Given>
cudaError_t launch_kernel(void (*kernel)(Expected...), dim3 grid, int threads, cudaStream_t stream, Given... given)
{
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned int>(threads));
    config.stream = stream;
    return own_status(cudaLaunchKernelEx(&config, kernel, given...));
}

} // namespace memshare
