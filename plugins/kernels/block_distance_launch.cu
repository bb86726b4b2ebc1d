#include "block_distance_launch.h"

#include "block_distance.cuh"

namespace memshare {
namespace {

struct Arguments {
    long long const* pool_pointers;
    int const* num_blocks;
    int const* new_rows;
    int const* old_rows;
    int const* position_delta;
    float const* inv_freq;
    float4* distances;
    int num_pairs;
    PoolShape shape;
    cudaStream_t stream;
};

template <class Element, int kCount, bool kInterleaved> cudaError_t launch(Arguments const& a)
{
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned int>(a.num_pairs),
        static_cast<unsigned int>(num_layer_groups(a.num_pairs, a.shape.num_layers)));
    config.blockDim = dim3(static_cast<unsigned int>(num_threads(a.shape, kCount)));
    config.stream = a.stream;
    // The status of this launch alone. An error of an earlier one, which cudaPeekAtLastError would go on returning, is
    // not ours; and ours is taken back from the runtime, so that whoever asks next is not told of it.
    cudaError_t const status = cudaLaunchKernelEx(&config, block_distance<Element, kCount, kInterleaved>,
        a.pool_pointers, a.num_blocks, a.new_rows, a.old_rows, a.position_delta, a.inv_freq, a.distances, a.shape);
    if (status != cudaSuccess) {
        static_cast<void>(cudaGetLastError());
    }
    return status;
}

template <class Element> cudaError_t launch_layout(Arguments const& a, bool interleaved)
{
    bool const full = vector_elements<Element>(a.shape, interleaved) > 1;
    if (interleaved) {
        return full ? launch<Element, kFullVector<Element>, true>(a) : launch<Element, 1, true>(a);
    }
    return full ? launch<Element, kFullVector<Element>, false>(a) : launch<Element, 1, false>(a);
}

} // namespace

cudaError_t block_distance_launch(long long const* pool_pointers, int const* num_blocks, int const* new_rows,
    int const* old_rows, int const* position_delta, float const* inv_freq, float* distances, int num_pairs,
    PoolShape const& shape, KvDtype dtype, bool interleaved, cudaStream_t stream)
{
    if (num_pairs == 0) {
        return cudaSuccess;
    }
    if (num_pairs < 0 || !is_supported(shape)) {
        return cudaErrorInvalidValue;
    }
    Arguments const arguments{pool_pointers, num_blocks, new_rows, old_rows, position_delta, inv_freq,
        reinterpret_cast<float4*>(distances), num_pairs, shape, stream};
    switch (dtype) {
    case KvDtype::kFp32: return launch_layout<Fp32>(arguments, interleaved);
    case KvDtype::kFp16: return launch_layout<Fp16>(arguments, interleaved);
    case KvDtype::kBf16: return launch_layout<Bf16>(arguments, interleaved);
    case KvDtype::kFp8E4M3: return launch_layout<Fp8E4M3>(arguments, interleaved);
    case KvDtype::kInt8: return launch_layout<Int8>(arguments, interleaved);
    }
    return cudaErrorInvalidValue;
}

} // namespace memshare
