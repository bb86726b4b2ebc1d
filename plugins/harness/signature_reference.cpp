#include "signature_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "element_dispatch.h"
#include "reference.h"

namespace harness {
namespace {

void normalize(std::vector<double>& values)
{
    double square = 0.0;
    for (double value : values) {
        square += value * value;
    }
    double const norm = std::max(std::sqrt(square), 1e-12);
    for (double& value : values) {
        value /= norm;
    }
}

// One token's vector of one layer and head, un-rotated if it is K, [head_dim].
template <class Element>
std::vector<double> read(SignatureArguments const& a, std::size_t page, int layer, int head, int token)
{
    MemShareSignatureShape const& s = a.shape;
    auto const* first = reinterpret_cast<typename Element::Bits const*>(a.fields[static_cast<std::size_t>(layer)])
        + a.block_ids[page] * s.block_stride + head * s.head_stride + token * s.token_stride;
    std::vector<double> values;
    for (int d = 0; d < s.head_dim; ++d) {
        values.push_back(static_cast<double>(Element::decode(first[d])));
    }
    if (s.field == 0) {
        rotate(values, s.rotary_dim, false, a.inv_freq, -(a.positions[page] + token));
    }
    return values;
}

template <class Element> std::vector<double> sign(SignatureArguments const& a, std::size_t page, int token)
{
    MemShareSignatureShape const& s = a.shape;
    std::vector<double> sums(static_cast<std::size_t>(s.width));
    auto const* weight = a.matrix.data();
    for (int layer = 0; layer < s.num_layers; ++layer) {
        for (int head = 0; head < s.num_kv_heads; ++head) {
            auto unit = read<Element>(a, page, layer, head, token);
            normalize(unit);
            for (double const value : unit) {
                for (double& sum : sums) {
                    sum += value * static_cast<double>(*weight++);
                }
            }
        }
    }
    normalize(sums);
    return sums;
}

template <class Element> std::vector<double> sign_all(SignatureArguments const& a)
{
    std::vector<double> all;
    for (std::size_t page = 0; page < a.block_ids.size(); ++page) {
        bool const inside = a.block_ids[page] >= 0 && a.block_ids[page] < a.num_blocks;
        for (int token = 0; token < a.shape.tokens_per_block; ++token) {
            auto const sums = inside ? sign<Element>(a, page, token)
                                     : std::vector<double>(static_cast<std::size_t>(a.shape.width),
                                           std::numeric_limits<double>::quiet_NaN());
            all.insert(all.end(), sums.begin(), sums.end());
        }
    }
    return all;
}

} // namespace

std::vector<double> page_signatures(SignatureArguments const& arguments)
{
    return memshare::with_element(static_cast<memshare::KvDtype>(arguments.shape.dtype), std::vector<double>{},
        [&](auto element) { return sign_all<decltype(element)>(arguments); });
}

} // namespace harness
