#include "block_distance_launch.h"

#include "block_distance.cuh"
#include "element_dispatch.h"
#include "kernel_launch.h"

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

// Blocks of a kernel that the current device runs at a time. Only asks the driver, which a capture allows.
cudaError_t count_slots(void const* kernel, int threads, int& slots)
{
    int device = 0, multiprocessors = 0, resident = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) {
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (status == cudaSuccess) {
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0);
    }
    slots = multiprocessors * resident > 0 ? multiprocessors * resident : 1;
    return status;
}

template <class Element, int kCount, bool kInterleaved> cudaError_t launch(Arguments const& a)
{
    auto const kernel = block_distance<Element, kCount, kInterleaved>;
    int const threads = num_threads(a.shape, kCount);
    int slots = 1;
    cudaError_t const status = own_status(count_slots(reinterpret_cast<void const*>(kernel), threads, slots));
    if (status != cudaSuccess) {
        return status;
    }
    dim3 const grid(static_cast<unsigned int>(a.num_pairs),
        static_cast<unsigned int>(num_layer_groups(a.num_pairs, a.shape.num_layers, slots)));
    return launch_kernel(kernel, grid, threads, a.stream, a.pool_pointers, a.num_blocks, a.new_rows, a.old_rows,
        a.position_delta, a.inv_freq, a.distances, a.shape);
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
    return with_element(dtype, cudaErrorInvalidValue,
        [&](auto element) { return launch_layout<decltype(element)>(arguments, interleaved); });
}

} // namespace memshare
