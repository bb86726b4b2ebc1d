// The sums of the block distance in float64, written plainly: what the plugin's results are held against.
#pragma once

#include <vector>

#include "block_distance.h"
#include "kv_dtype.h"

namespace harness {

// Arguments of the kernel (block_distance.cuh) with host addresses.
struct SearchArguments {
    void const* pool;
    int num_blocks;
    std::vector<int> const& new_rows;
    std::vector<int> const& old_rows;
    std::vector<int> const& position_delta;
    std::vector<float> const& inv_freq;
    memshare::PoolShape shape;
    memshare::KvDtype dtype;
    bool interleaved;
};

// Turns K of one head, [head_dim], on by `tokens` positions.
void rotate(std::vector<double>& k, int rotary_dim, bool interleaved, std::vector<float> const& inv_freq, int tokens);

// float64 [pairs, num_layers, 4], see trtllm_memshare/search/block_distance.py; empty for an unknown dtype.
std::vector<double> block_distance(SearchArguments const& arguments);

} // namespace harness
