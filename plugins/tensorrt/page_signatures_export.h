// Signatures of pages for programs that load the plugin library, beside the two names that TensorRT looks up in it.
//
// Plain C. Nothing of TensorRT is needed, neither to compile nor to call. What a signature is:
// trtllm_memshare/search/signatures.py.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// What a signature is taken of, and where it lies. Strides are elements from one block, KV head and token of a layer's
// field to the next; the elements of a vector lie side by side. In a pool [num_blocks, pool_layers, 2, num_kv_heads,
// tokens_per_block, head_dim]: block_stride pool_layers * 2 * num_kv_heads * tokens_per_block * head_dim, head_stride
// tokens_per_block * head_dim, token_stride head_dim.
struct MemShareSignatureShape {
    int dtype;            // 0 = fp32, 1 = fp16, 2 = bf16, 3 = fp8 e4m3, 4 = int8
    int num_layers;       // that a signature is taken of
    int num_kv_heads;
    int tokens_per_block; // 8 to 128
    int head_dim;         // 32 to 256, even
    int rotary_dim;       // even, at most head_dim; halves turn (i, i + rotary_dim / 2); 0 = K is taken as stored
    int field;            // 0 = K, un-rotated; 1 = V
    int width;            // numbers of a signature: a multiple of 4, at most 64
    long long block_stride, head_stride, token_stride;
};

// Enqueues the signatures of some pages on a stream of the current device. All addresses but `shape` are the device's,
// and are read when the kernel runs, so that a captured launch serves other pages later. Does not allocate or
// synchronise.
//
// fields       int64 [num_layers], address of each chosen layer's field in block 0
// num_blocks   int32 [1], blocks of the pool
// block_ids    int32 [num_pages]; a block out of the pool is not read
// positions    int32 [num_pages], position at which a page's first token was written; null for V
// inv_freq     float32 [rotary_dim / 2], radians per token; null for V
// matrix       float32 [num_layers, num_kv_heads, head_dim, width], the projection
// signatures   float32 [num_pages, tokens_per_block, width], written: of length 1, or zero; NaN for a block out of the
//              pool
// stream       a cudaStream_t; null = the default stream
//
// Returns a cudaError_t: 0 once the kernel is enqueued, or with no pages; 1 (cudaErrorInvalidValue) for a shape that no
// kernel takes or a null `shape`; otherwise what the launch said. Nothing is enqueued then, and cudaGetLastError does not
// say it again.
int memshare_page_signatures(long long const* fields, int const* num_blocks, int const* block_ids,
    int const* positions, float const* inv_freq, float const* matrix, float* signatures, int num_pages,
    struct MemShareSignatureShape const* shape, void* stream);

#ifdef __cplusplus
}
#endif
