// Entry point for NVRTC, which compiles the kernel for one model: arguments as in page_signatures.cuh. Given on the
// command line: MEMSHARE_ELEMENT, the five numbers of MEMSHARE_SHAPE, whose layers are the chosen ones, the three of
// MEMSHARE_STRIDES, and MEMSHARE_CHOSEN: field, width. Without the last three it is the plugin library's kernel, to see
// what that needs.
#include "page_signatures.cuh"

#if defined(MEMSHARE_SHAPE)
#define MEMSHARE_BOUNDS memshare::kSignatureThreads
#define MEMSHARE_SHAPE_ARGUMENTS
#else
#define MEMSHARE_BOUNDS memshare::kSignatureThreads, memshare::kMinSignatureBlocksAnyShape
#define MEMSHARE_SHAPE_ARGUMENTS                                                                                       \
    , memshare::PoolShape shape, memshare::FieldStrides strides, memshare::SignatureShape chosen
#endif

extern "C" __global__ void __launch_bounds__(MEMSHARE_BOUNDS) page_signatures(
    long long const* __restrict__ fields, int const* __restrict__ num_blocks, int const* __restrict__ block_ids,
    int const* __restrict__ positions, float const* __restrict__ inv_freq, float const* __restrict__ matrix,
    float* __restrict__ signatures MEMSHARE_SHAPE_ARGUMENTS)
{
#if defined(MEMSHARE_SHAPE)
    constexpr memshare::PoolShape shape{MEMSHARE_SHAPE};
    constexpr memshare::FieldStrides strides{MEMSHARE_STRIDES};
    constexpr memshare::SignatureShape chosen{MEMSHARE_CHOSEN};
    static_assert(memshare::is_supported(shape) && memshare::is_supported(chosen), "no kernel takes this shape");
#endif
    memshare::sign_tokens<memshare::MEMSHARE_ELEMENT>(
        fields, num_blocks, block_ids, positions, inv_freq, matrix, signatures, shape, strides, chosen);
}
