// The kernel's threads run one after the other on the host: the oracle of the tests and of the harness.
#include "block_distance_host.h"

#include <cmath>
#include <limits>
#include <vector>

#include "block_distance.h"

namespace memshare {
namespace {

// The order of block_sum in block_distance.cuh.
Sums sum_in_order(std::vector<Sums> partial)
{
    for (std::size_t warp = 0; warp < partial.size(); warp += 32) {
        for (std::size_t offset = 16; offset > 0; offset /= 2) {
            for (std::size_t lane = 0; lane < offset; ++lane) {
                partial[warp + lane] = partial[warp + lane] + partial[warp + lane + offset];
            }
        }
    }
    Sums total = partial[0];
    for (std::size_t warp = 32; warp < partial.size(); warp += 32) {
        total = total + partial[warp];
    }
    return total;
}

template <class Element, int kCount, bool kInterleaved> void run(HostArguments const& a)
{
    int const threads = num_threads(a.shape, kCount);
    long long const num_rows = static_cast<long long>(a.num_blocks) * a.shape.tokens_per_block;
    for (int pair = 0; pair < a.num_pairs; ++pair) {
        int const first = pair * a.shape.tokens_per_block;
        bool present = false;
        bool invalid = false;
        for (int token = 0; token < a.shape.tokens_per_block; ++token) {
            RowPair const rows = classify(a.new_rows[first + token], a.old_rows[first + token], num_rows);
            present |= rows == RowPair::kPresent;
            invalid |= rows == RowPair::kInvalid;
        }
        for (int layer = 0; layer < a.shape.num_layers; ++layer) {
            float const empty = invalid ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
            Sums sums{empty, empty, empty, empty};
            if (present && !invalid) {
                std::vector<Sums> partial(static_cast<std::size_t>(threads));
                for (int thread = 0; thread < threads; ++thread) {
                    partial[static_cast<std::size_t>(thread)] = thread_sums<Element, kCount, kInterleaved>(a.shape,
                        static_cast<typename Element::Bits const*>(a.pool), layer, a.new_rows + first,
                        a.old_rows + first, a.position_delta + first, a.inv_freq, thread, threads);
                }
                sums = sum_in_order(std::move(partial));
            }
            float* out = a.distances + 4 * (static_cast<long long>(pair) * a.shape.num_layers + layer);
            out[0] = sums.dk, out[1] = sums.k, out[2] = sums.dv, out[3] = sums.v;
        }
    }
}

template <class Element> void run_layout(HostArguments const& a)
{
    bool const full = vector_elements<Element>(a.shape, a.interleaved) > 1;
    if (a.interleaved) {
        full ? run<Element, kFullVector<Element>, true>(a) : run<Element, 1, true>(a);
    } else {
        full ? run<Element, kFullVector<Element>, false>(a) : run<Element, 1, false>(a);
    }
}

} // namespace

bool block_distance_host(HostArguments const& arguments)
{
    switch (arguments.dtype) {
    case KvDtype::kFp32: run_layout<Fp32>(arguments); return true;
    case KvDtype::kFp16: run_layout<Fp16>(arguments); return true;
    case KvDtype::kBf16: run_layout<Bf16>(arguments); return true;
    case KvDtype::kFp8E4M3: run_layout<Fp8E4M3>(arguments); return true;
    case KvDtype::kInt8: run_layout<Int8>(arguments); return true;
    }
    return false;
}

} // namespace memshare

// For callers without C++, such as the tests. Returns 0, or 1 for an unknown dtype.
extern "C" int memshare_block_distance_host(void const* pool, int num_blocks, int const* new_rows, int const* old_rows,
    int const* position_delta, float const* inv_freq, float* distances, int num_pairs, int num_layers,
    int num_kv_heads, int tokens_per_block, int head_dim, int rotary_dim, int dtype, int interleaved)
{
    memshare::HostArguments const arguments{pool, num_blocks, new_rows, old_rows, position_delta, inv_freq, distances,
        num_pairs, {num_layers, num_kv_heads, tokens_per_block, head_dim, rotary_dim},
        static_cast<memshare::KvDtype>(dtype), interleaved != 0};
    return memshare::block_distance_host(arguments) ? 0 : 1;
}
