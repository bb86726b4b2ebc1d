// Element types of a KV pool, decoded to float from their bits.
//
// Includes nothing: the same text compiles under NVRTC, nvcc and a plain C++ compiler, so that tests without a GPU run
// the kernels as they are (tests/plugins/cuda_on_host). `decode` is exact for every type.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define MEMSHARE_HD __host__ __device__ __forceinline__
#else
#define MEMSHARE_HD inline
#endif

// Host compilers do not know the pragma, and nvcc hands them this text as well.
#if defined(__CUDA_ARCH__)
#define MEMSHARE_UNROLL _Pragma("unroll")
#define MEMSHARE_ROLLED _Pragma("unroll 1")
#else
#define MEMSHARE_UNROLL
#define MEMSHARE_ROLLED
#endif

namespace memshare {

MEMSHARE_HD float float_of_bits(unsigned int bits)
{
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

struct Fp32 {
    using Bits = unsigned int;

    static MEMSHARE_HD float decode(Bits bits) { return float_of_bits(bits); }
};

struct Bf16 {
    using Bits = unsigned short;

    static MEMSHARE_HD float decode(Bits bits) { return float_of_bits(static_cast<unsigned int>(bits) << 16); }
};

struct Fp16 {
    using Bits = unsigned short;

    static MEMSHARE_HD float decode(Bits bits)
    {
#if defined(__CUDA_ARCH__)
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
#else
        unsigned int const sign = (bits & 0x8000u) << 16;
        unsigned int const magnitude = bits & 0x7fffu;
        if (magnitude >= 0x7c00u) { // infinity and NaN
            return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
        }
        // Moving the exponent by a multiplication keeps subnormals exact: 2^112 = 2^(127 - 15).
        float const value = float_of_bits(magnitude << 13) * 5192296858534827628530496329220096.0f;
        return sign != 0 ? -value : value;
#endif
    }
};

struct Fp8E4M3 {
    using Bits = unsigned char;

    // 4 exponent bits with bias 7 become fp16's 5 with bias 15 by a factor of 2^8; the only NaN is 0x7f of either sign.
    static MEMSHARE_HD float decode(Bits bits)
    {
        if ((bits & 0x7fu) == 0x7fu) {
            return float_of_bits(0x7fc00000u);
        }
        unsigned int const half = (bits & 0x80u) << 8 | (bits & 0x7fu) << 7;
        return Fp16::decode(static_cast<unsigned short>(half)) * 256.0f;
    }
};

struct Int8 {
    using Bits = unsigned char;

    // 2^23 + 128 + x as a float carries x in its low mantissa bits; three full-rate instructions, where the conversion
    // instruction runs at a quarter of the rate.
    static MEMSHARE_HD float decode(Bits bits)
    {
        return float_of_bits(0x4b000000u | (bits ^ 0x80u)) - 8388736.0f;
    }
};

// Elements of a full 16-byte vector.
template <class Element> constexpr int kFullVector = 16 / static_cast<int>(sizeof(typename Element::Bits));

// Byte i of the result is byte number `selector`'s i-th hexadecimal digit of the eight in `low`, then `high`.
MEMSHARE_HD unsigned int pick_bytes(unsigned int low, unsigned int high, unsigned int selector)
{
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, selector);
#else
    unsigned int result = 0;
    for (unsigned int i = 0; i < 4; ++i) {
        unsigned int const byte = selector >> 4 * i & 7u;
        result |= ((byte < 4 ? low >> 8 * byte : high >> 8 * (byte - 4)) & 0xffu) << 8 * i;
    }
    return result;
#endif
}

// Decodes the elements of one 32-bit word, the first in its low bits.
template <class Element> MEMSHARE_HD void decode_word(unsigned int word, float* values)
{
    constexpr int kCount = kFullVector<Element> / 4;
MEMSHARE_UNROLL
    for (int i = 0; i < kCount; ++i) {
        values[i] = Element::decode(static_cast<typename Element::Bits>(word >> 32 / kCount * i));
    }
}

// Int8::decode with the sign bits of four elements turned at once and each put into place by one instruction: reading
// int8 is bound by instructions where memory is fast.
template <> MEMSHARE_HD void decode_word<Int8>(unsigned int word, float* values)
{
    unsigned int const turned = word ^ 0x80808080u;
MEMSHARE_UNROLL
    for (int i = 0; i < 4; ++i) {
        unsigned int const bits = pick_bytes(turned, 0x4b000000u, 0x7540u + static_cast<unsigned int>(i));
        values[i] = float_of_bits(bits) - 8388736.0f;
    }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
// Two e4m3 in one instruction: decoding them one by one would take longer than reading them.
template <> MEMSHARE_HD void decode_word<Fp8E4M3>(unsigned int word, float* values)
{
    unsigned int halves[2];
    // The unpacking is part of the conversion (R.H1), where a shift of the word would be an instruction of its own.
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
        : "=r"(halves[0]), "=r"(halves[1])
        : "r"(word));
MEMSHARE_UNROLL
    for (int i = 0; i < 2; ++i) {
        values[2 * i] = Fp16::decode(static_cast<unsigned short>(halves[i]));
        values[2 * i + 1] = Fp16::decode(static_cast<unsigned short>(halves[i] >> 16));
    }
}
#endif

// kCount elements as the pool holds them. Loading and decoding are apart, so that loads can be under way while a thread
// works out angles. Not a full vector: element by element.
template <class Element, int kCount, bool kFull = kCount == kFullVector<Element>> struct Packed {
    typename Element::Bits elements[kCount];

    MEMSHARE_HD void load(typename Element::Bits const* source)
    {
MEMSHARE_UNROLL
        for (int i = 0; i < kCount; ++i) {
            elements[i] = source[i];
        }
    }

    MEMSHARE_HD void decode(float (&values)[kCount]) const
    {
MEMSHARE_UNROLL
        for (int i = 0; i < kCount; ++i) {
            values[i] = Element::decode(elements[i]);
        }
    }
};

// A full vector: one 16-byte load from an aligned address, on a GPU through the read-only path.
template <class Element, int kCount> struct Packed<Element, kCount, true> {
    unsigned int words[4];

    MEMSHARE_HD void load(typename Element::Bits const* source)
    {
#if defined(__CUDA_ARCH__)
        uint4 const loaded = __ldg(reinterpret_cast<uint4 const*>(source));
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
#else
        __builtin_memcpy(words, source, sizeof words);
#endif
    }

    MEMSHARE_HD void decode(float (&values)[kCount]) const
    {
MEMSHARE_UNROLL
        for (int i = 0; i < 4; ++i) {
            decode_word<Element>(words[i], values + kCount / 4 * i);
        }
    }
};

// Dot product of four signed bytes with four others, added to `sum`; exact.
MEMSHARE_HD int dot_bytes(unsigned int a, unsigned int b, int sum)
{
#if defined(__CUDA_ARCH__)
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#else
    for (int i = 0; i < 4; ++i) {
        sum += static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i);
    }
    return sum;
#endif
}

} // namespace memshare
