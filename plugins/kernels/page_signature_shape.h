// What a signature is taken of, and where it lies.
#pragma once

#include "block_distance.h"

namespace memshare {

constexpr int kSignatureTokens = 8; // of a page, by one thread block
constexpr int kSignatureParts = 4;  // vectors of a token that a thread block takes side by side
constexpr int kMaxWidth = 64;       // numbers of a signature
constexpr int kSignatureThreads = kSignatureParts * kMaxWidth;

// Elements from one block, KV head and token of a layer's field to the next; those of a vector lie side by side.
//
//   our pool         block num_layers * 2 * num_kv_heads * tokens_per_block * head_dim, head tokens_per_block * head_dim
//   vLLM's cache     [blocks, heads, tokens, K then V] in any order: token 2 * head_dim, or num_kv_heads times that
struct FieldStrides {
    long long block, head, token;
};

struct SignatureShape {
    int field; // 0 = K, un-rotated; 1 = V
    int width; // a multiple of 4, at most kMaxWidth
};

MEMSHARE_HD constexpr bool is_supported(SignatureShape const& chosen)
{
    return (chosen.field == 0 || chosen.field == 1) && chosen.width > 0 && chosen.width <= kMaxWidth
        && chosen.width % 4 == 0;
}

// Height of the grid.
MEMSHARE_HD constexpr int num_token_groups(PoolShape const& shape)
{
    return (shape.tokens_per_block + kSignatureTokens - 1) / kSignatureTokens;
}

} // namespace memshare
