// Launcher of the block distance for hosts that link compiled kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "block_distance.h"
#include "kv_dtype.h"

namespace memshare {

// Enqueues one kernel on `stream`; arguments as in block_distance.cuh, all addresses on the device. Does not allocate
// or synchronise, and can be captured. Returns cudaErrorInvalidValue for a shape or dtype that no kernel takes.
cudaError_t block_distance_launch(long long const* pool_pointers, int const* num_blocks, int const* new_rows,
    int const* old_rows, int const* position_delta, float const* inv_freq, float* distances, int num_pairs,
    PoolShape const& shape, KvDtype dtype, bool interleaved, cudaStream_t stream);

} // namespace memshare
