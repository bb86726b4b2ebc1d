// Host run of the block distance, see block_distance_host.cpp.
#pragma once

#include "block_distance.h"
#include "kv_dtype.h"

namespace memshare {

// Arguments of the kernel (block_distance.cuh) with host addresses.
struct HostArguments {
    void const* pool;
    int num_blocks;
    int const* new_rows;
    int const* old_rows;
    int const* position_delta;
    float const* inv_freq;
    float* distances;
    int num_pairs;
    PoolShape shape;
    KvDtype dtype;
    bool interleaved;
};

// Returns false for an unknown dtype.
bool block_distance_host(HostArguments const& arguments);

} // namespace memshare
