// The launcher and its kernels as they are, for callers without C++.
#include "cuda_runtime_api.h"

#include "block_distance_launch.cu"

extern "C" int memshare_block_distance(void const* pool, int num_blocks, int const* new_rows, int const* old_rows,
    int const* position_delta, float const* inv_freq, float* distances, int num_pairs, int num_layers,
    int num_kv_heads, int tokens_per_block, int head_dim, int rotary_dim, int dtype, int interleaved)
{
    auto const address = reinterpret_cast<long long>(pool);
    return memshare::block_distance_launch(&address, &num_blocks, new_rows, old_rows, position_delta, inv_freq,
        distances, num_pairs, {num_layers, num_kv_heads, tokens_per_block, head_dim, rotary_dim},
        static_cast<memshare::KvDtype>(dtype), interleaved != 0, nullptr);
}

namespace {

template <class Element, int kCount> void decode_all(void const* elements, float* values, int count)
{
    auto const* source = static_cast<typename Element::Bits const*>(elements);
    for (int i = 0; i < count / kCount; ++i) {
        memshare::Packed<Element, kCount> packed;
        float decoded[kCount];
        packed.load(source + i * kCount);
        packed.decode(decoded);
        std::memcpy(values + i * kCount, decoded, sizeof decoded);
    }
}

template <class Element> void decode_either(void const* elements, float* values, int count, bool vectors)
{
    vectors ? decode_all<Element, memshare::kFullVector<Element>>(elements, values, count)
            : decode_all<Element, 1>(elements, values, count);
}

} // namespace

// Elements as the kernels decode them, in whole vectors (16 elements divide `count`) or one by one.
extern "C" void memshare_decode(void const* elements, float* values, int count, int dtype, int vectors)
{
    switch (static_cast<memshare::KvDtype>(dtype)) {
    case memshare::KvDtype::kFp32: return decode_either<memshare::Fp32>(elements, values, count, vectors != 0);
    case memshare::KvDtype::kFp16: return decode_either<memshare::Fp16>(elements, values, count, vectors != 0);
    case memshare::KvDtype::kBf16: return decode_either<memshare::Bf16>(elements, values, count, vectors != 0);
    case memshare::KvDtype::kFp8E4M3: return decode_either<memshare::Fp8E4M3>(elements, values, count, vectors != 0);
    case memshare::KvDtype::kInt8: return decode_either<memshare::Int8>(elements, values, count, vectors != 0);
    }
}

// What one layer group and one thread count of the kernel would be, for the Python host to agree with.
extern "C" int memshare_num_layer_groups(int num_pairs, int num_layers, int num_slots)
{
    return memshare::num_layer_groups(num_pairs, num_layers, num_slots);
}
