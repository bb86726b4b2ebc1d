// Element-level arithmetic of stage 2: where a row lies, how an older K is turned, what is summed, in which order.
//
// What a thread does on its own is here; block_distance.cuh adds shuffles, barriers and the grid. The specification is
// trtllm_memshare/search/block_distance.py.
#pragma once

#include "kv_elements.h"

namespace memshare {

// Pool [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], 0 = K (after RoPE), 1 = V.
struct PoolShape {
    int num_layers;
    int num_kv_heads;
    int tokens_per_block;
    int head_dim;
    int rotary_dim; // 0 = K is compared as stored
};

// Sums over rows and heads of |K_new - K_old|^2, |K_new|^2, |V_new - V_old|^2, |V_new|^2.
struct Sums {
    float dk, k, dv, v;
};

MEMSHARE_HD Sums operator+(Sums const& a, Sums const& b)
{
    return {a.dk + b.dk, a.k + b.k, a.dv + b.dv, a.v + b.v};
}

enum class RowPair { kAbsent, kPresent, kInvalid };

// A row outside the pool is never read; a pair of rows is left out only if both are -1.
MEMSHARE_HD RowPair classify(int new_row, int old_row, long long num_rows)
{
    if (new_row == -1 && old_row == -1) {
        return RowPair::kAbsent;
    }
    bool const inside = new_row >= 0 && new_row < num_rows && old_row >= 0 && old_row < num_rows;
    return inside ? RowPair::kPresent : RowPair::kInvalid;
}

// First element of head 0 of a row's K in `layer`; V lies num_kv_heads * tokens_per_block * head_dim further.
// With 16-token blocks, row 35 is slot 3 of block 2.
MEMSHARE_HD long long row_offset(PoolShape const& shape, int row, int layer)
{
    long long const block = row / shape.tokens_per_block;
    int const slot = row % shape.tokens_per_block;
    long long const unit = (block * shape.num_layers + layer) * 2;
    return (unit * shape.num_kv_heads * shape.tokens_per_block + slot) * shape.head_dim;
}

// cos and sin of 2 pi `turns`. The reduction to one turn happens in float64: at 32k positions a float32 angle is off by
// a thousandth of a turn.
MEMSHARE_HD void cos_sin_of_turns(double turns, float& cosine, float& sine)
{
#if defined(__CUDA_ARCH__)
    sincospif(2.0f * static_cast<float>(turns - rint(turns)), &sine, &cosine);
#else
    double const angle = 6.283185307179586476925 * (turns - __builtin_rint(turns));
    cosine = static_cast<float>(__builtin_cos(angle));
    sine = static_cast<float>(__builtin_sin(angle));
#endif
}

MEMSHARE_HD float fused_multiply_add(float a, float b, float c)
{
#if defined(__CUDA_ARCH__)
    return fmaf(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

// Where one thread reads a row: two vectors of kCount elements whose partners under RoPE are among themselves.
//
//   half-split, rotary part     a = [u, u + kCount), b = [rotary_dim / 2 + u, ...): a[i] turns with b[i]
//   half-split, the rest        a, b neighbours, not turned
//   interleaved                 a, b neighbours: element 2i turns with element 2i + 1
template <int kCount, bool kInterleaved> struct Unit {
    int first, second; // element offsets in a head
    bool turns;
    float frequency[kCount]; // radians per token

    MEMSHARE_HD Unit(PoolShape const& shape, int unit, float const* inv_freq)
    {
        turns = unit * kCount < shape.rotary_dim / 2;
        bool const split = turns && !kInterleaved;
        first = split ? unit * kCount : 2 * unit * kCount;
        second = split ? shape.rotary_dim / 2 + unit * kCount : first + kCount;
MEMSHARE_UNROLL
        for (int i = 0; i < kCount; ++i) {
            frequency[i] = turns ? inv_freq[unit * kCount + i] : 0.0f;
        }
    }
};

// The rotation that brings an older K of a unit to the newer one's position.
template <int kCount, bool kInterleaved> struct Rotation {
    bool turns;
    float cosine[kCount], sine[kCount];

    MEMSHARE_HD Rotation(Unit<kCount, kInterleaved> const& unit, int position_delta)
        : turns(unit.turns)
    {
        if (turns) {
MEMSHARE_UNROLL
            for (int i = 0; i < kCount; ++i) {
                double const turns_per_token = unit.frequency[i] * 0.15915494309189533577;
                cos_sin_of_turns(position_delta * turns_per_token, cosine[i], sine[i]);
            }
        }
    }

    MEMSHARE_HD void apply(float (&a)[kCount], float (&b)[kCount]) const
    {
        if (!turns) {
            return;
        }
MEMSHARE_UNROLL
        for (int i = 0; i < kCount; ++i) {
            // Interleaved: the 2 * kCount elements are a followed by b; pair i is their elements 2i and 2i + 1.
            float& x = kInterleaved ? (2 * i < kCount ? a[(2 * i) % kCount] : b[(2 * i) % kCount]) : a[i];
            float& y = kInterleaved ? (2 * i + 1 < kCount ? a[(2 * i + 1) % kCount] : b[(2 * i + 1) % kCount]) : b[i];
            float const turned = fused_multiply_add(x, cosine[i], -(y * sine[i]));
            y = fused_multiply_add(y, cosine[i], x * sine[i]);
            x = turned;
        }
    }
};

template <int kCount>
MEMSHARE_HD void add_squares(float const (&newer)[kCount], float const (&older)[kCount], float& difference)
{
MEMSHARE_UNROLL
    for (int i = 0; i < kCount; ++i) {
        float const d = newer[i] - older[i];
        difference = fused_multiply_add(d, d, difference);
    }
}

// |values|^2, where `packed` holds the same values.
template <class Element, int kCount>
MEMSHARE_HD void add_norm(Packed<Element, kCount> const&, float const (&values)[kCount], float& norm)
{
MEMSHARE_UNROLL
    for (int i = 0; i < kCount; ++i) {
        norm = fused_multiply_add(values[i], values[i], norm);
    }
}

// The same of int8 in integers: exact, and a quarter of the instructions.
MEMSHARE_HD void add_norm(Packed<Int8, 16> const& packed, float const (&)[16], float& norm)
{
    int sum = 0;
MEMSHARE_UNROLL
    for (int i = 0; i < 4; ++i) {
        sum = dot_bytes(packed.words[i], packed.words[i], sum);
    }
    norm += static_cast<float>(sum);
}

// The eight vectors of one token, layer and head that a thread compares: K and V, newer and older, both of its unit's.
template <class Element, int kCount> struct HeadVectors {
    using Bits = typename Element::Bits;
    Packed<Element, kCount> new_k[2], old_k[2], new_v[2], old_v[2];

    // newer, older: the head's row of K; V lies value_stride elements further.
    template <bool kInterleaved>
    MEMSHARE_HD void load(
        Bits const* newer, Bits const* older, long long value_stride, Unit<kCount, kInterleaved> const& unit)
    {
        new_k[0].load(newer + unit.first);
        new_k[1].load(newer + unit.second);
        old_k[0].load(older + unit.first);
        old_k[1].load(older + unit.second);
        new_v[0].load(newer + value_stride + unit.first);
        new_v[1].load(newer + value_stride + unit.second);
        old_v[0].load(older + value_stride + unit.first);
        old_v[1].load(older + value_stride + unit.second);
    }

    template <bool kInterleaved> MEMSHARE_HD void add_to(Sums& sums, Rotation<kCount, kInterleaved> const& rotation) const
    {
        float newer[2][kCount], older[2][kCount];
MEMSHARE_UNROLL
        for (int part = 0; part < 2; ++part) {
            new_k[part].decode(newer[part]);
            old_k[part].decode(older[part]);
        }
        rotation.apply(older[0], older[1]);
MEMSHARE_UNROLL
        for (int part = 0; part < 2; ++part) {
            add_squares(newer[part], older[part], sums.dk);
            add_norm(new_k[part], newer[part], sums.k);
        }
MEMSHARE_UNROLL
        for (int part = 0; part < 2; ++part) {
            add_unturned(new_v[part], old_v[part], sums.dv, sums.v);
        }
    }
};

// |newer - older|^2 and |newer|^2 of two vectors that no rotation stands between.
template <class Element, int kCount>
MEMSHARE_HD void add_unturned(
    Packed<Element, kCount> const& newer, Packed<Element, kCount> const& older, float& difference, float& norm)
{
    float a[kCount], b[kCount];
    newer.decode(a);
    older.decode(b);
    add_squares(a, b, difference);
    add_norm(newer, a, norm);
}

// The same of int8 in integers: exact, and a tenth of the instructions. |a - b|^2 = a.a - 2 a.b + b.b is at most
// 16 * 255^2, which a float holds exactly.
MEMSHARE_HD void add_unturned(
    Packed<Int8, 16> const& newer, Packed<Int8, 16> const& older, float& difference, float& norm)
{
    int aa = 0, ab = 0, bb = 0;
MEMSHARE_UNROLL
    for (int i = 0; i < 4; ++i) {
        aa = dot_bytes(newer.words[i], newer.words[i], aa);
        ab = dot_bytes(newer.words[i], older.words[i], ab);
        bb = dot_bytes(older.words[i], older.words[i], bb);
    }
    difference += static_cast<float>(aa - 2 * ab + bb);
    norm += static_cast<float>(aa);
}

// Threads of a block: as many as there are units in a block's rows, in whole warps, at most 256; never fewer than rows.
MEMSHARE_HD int num_threads(PoolShape const& shape, int count)
{
    int const units = shape.tokens_per_block * (shape.head_dim / 2 / count);
    return units >= 256 ? 256 : (units + 31) / 32 * 32;
}

// Most layers that one thread block takes in turn.
constexpr int kMaxLayersOfBlock = 32;

// Height of the grid: into how many groups the layers of a pair are dealt. A thread block starts once for all layers of
// its group and then keeps the memory busy, so that the best grid fills the device once, or a whole number of times, with
// blocks that are as long as that allows. num_slots: blocks that the device runs at a time. No sum depends on it.
MEMSHARE_HD int num_layer_groups(int num_pairs, int num_layers, int num_slots)
{
    int best = num_layers;
    long long least = -1;
    for (int layers = kMaxLayersOfBlock; layers > 0; --layers) {
        int const groups = (num_layers + layers - 1) / layers;
        long long const rounds = (static_cast<long long>(num_pairs) * groups + num_slots - 1) / num_slots;
        long long const cost = rounds * (2 * layers + 1); // a start takes about as long as half a layer
        if (layers <= num_layers && (least < 0 || cost < least)) {
            best = groups;
            least = cost;
        }
    }
    return best;
}

// Shapes that the kernels take: tokens_per_block 8 to 128, head_dim 32 to 256 and even, rotary_dim even and no larger.
MEMSHARE_HD constexpr bool is_supported(PoolShape const& shape)
{
    return shape.num_layers > 0 && shape.num_kv_heads > 0 && shape.tokens_per_block >= 8
        && shape.tokens_per_block <= 128 && shape.head_dim >= 32 && shape.head_dim <= 256 && shape.head_dim % 2 == 0
        && shape.rotary_dim >= 0 && shape.rotary_dim <= shape.head_dim && shape.rotary_dim % 2 == 0;
}

// Elements of one vector for this shape: a full one if RoPE partners and the rest divide into them, else one element.
template <class Element> MEMSHARE_HD int vector_elements(PoolShape const& shape, bool interleaved)
{
    int const full = kFullVector<Element>;
    bool const fits = interleaved || shape.rotary_dim / 2 % full == 0;
    return fits && shape.head_dim % (2 * full) == 0 && shape.rotary_dim % (2 * full) == 0 ? full : 1;
}

} // namespace memshare
