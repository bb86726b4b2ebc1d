// From an element type's number to its struct: the one place where the two are put side by side.
#pragma once

#include "kv_dtype.h"
#include "kv_elements.h"

namespace memshare {

// use(Element{}) for the element type of that number; `otherwise` if there is none.
template <class Result, class Use> Result with_element(KvDtype dtype, Result otherwise, Use&& use)
{
    switch (dtype) {
    case KvDtype::kFp32: return use(Fp32{});
    case KvDtype::kFp16: return use(Fp16{});
    case KvDtype::kBf16: return use(Bf16{});
    case KvDtype::kFp8E4M3: return use(Fp8E4M3{});
    case KvDtype::kInt8: return use(Int8{});
    }
    return otherwise;
}

} // namespace memshare
