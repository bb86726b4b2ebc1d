// Signatures of pages in float64, written plainly: what the library's results are held against.
#pragma once

#include <vector>

#include "../tensorrt/page_signatures_export.h"

namespace harness {

// Arguments of memshare_page_signatures with host addresses.
struct SignatureArguments {
    std::vector<unsigned char const*> fields;
    int num_blocks;
    std::vector<int> const& block_ids;
    std::vector<int> const& positions;
    std::vector<float> const& inv_freq;
    std::vector<float> const& matrix;
    MemShareSignatureShape shape;
};

// float64 [pages, tokens_per_block, width], see trtllm_memshare/search/signatures.py; empty for an unknown dtype.
std::vector<double> page_signatures(SignatureArguments const& arguments);

} // namespace harness
