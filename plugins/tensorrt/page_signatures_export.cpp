#include "page_signatures_export.h"

#include "page_signatures_launch.h"

extern "C" __attribute__((visibility("default"))) int memshare_page_signatures(long long const* fields,
    int const* num_blocks, int const* block_ids, int const* positions, float const* inv_freq, float const* matrix,
    float* signatures, int num_pages, MemShareSignatureShape const* shape, void* stream)
{
    if (shape == nullptr) {
        return cudaErrorInvalidValue;
    }
    return memshare::page_signatures_launch(fields, num_blocks, block_ids, positions, inv_freq, matrix, signatures,
        num_pages,
        {shape->num_layers, shape->num_kv_heads, shape->tokens_per_block, shape->head_dim, shape->rotary_dim},
        {shape->block_stride, shape->head_stride, shape->token_stride}, {shape->field, shape->width},
        static_cast<memshare::KvDtype>(shape->dtype), static_cast<cudaStream_t>(stream));
}
