// Launcher of the page signatures for hosts that link compiled kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "kv_dtype.h"
#include "page_signature_shape.h"

namespace memshare {

// Enqueues one kernel on `stream`; arguments as in page_signatures.cuh, all addresses on the device. Does not allocate
// or synchronise, and can be captured. No pages: a success that launches nothing. Returns cudaErrorInvalidValue for a
// shape, field, width or dtype that no kernel takes.
cudaError_t page_signatures_launch(long long const* fields, int const* num_blocks, int const* block_ids,
    int const* positions, float const* inv_freq, float const* matrix, float* signatures, int num_pages,
    PoolShape const& shape, FieldStrides const& strides, SignatureShape const& chosen, KvDtype dtype,
    cudaStream_t stream);

} // namespace memshare
