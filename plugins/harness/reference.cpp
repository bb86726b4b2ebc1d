#include "reference.h"

#include <cmath>
#include <limits>

#include "element_dispatch.h"

namespace harness {
namespace {

using memshare::PoolShape;

// One row's K or V of one head, [head_dim].
template <class Element>
std::vector<double> read(SearchArguments const& a, int row, int layer, int field, int head)
{
    auto const* pool = static_cast<typename Element::Bits const*>(a.pool);
    auto const size = static_cast<long long>(a.shape.tokens_per_block);
    long long const block = row / size;
    long long const unit = (block * a.shape.num_layers + layer) * 2 + field;
    auto const* first = pool + ((unit * a.shape.num_kv_heads + head) * size + row % size) * a.shape.head_dim;
    std::vector<double> values;
    for (int i = 0; i < a.shape.head_dim; ++i) {
        values.push_back(static_cast<double>(Element::decode(first[i])));
    }
    return values;
}

void add(std::vector<double> const& newer, std::vector<double> const& older, double* sums)
{
    for (std::size_t i = 0; i < newer.size(); ++i) {
        sums[0] += (newer[i] - older[i]) * (newer[i] - older[i]);
        sums[1] += newer[i] * newer[i];
    }
}

template <class Element> std::vector<double> all_sums(SearchArguments const& a)
{
    PoolShape const& shape = a.shape;
    auto const size = static_cast<std::size_t>(shape.tokens_per_block);
    long long const num_rows = static_cast<long long>(a.num_blocks) * shape.tokens_per_block;
    auto const num_layers = static_cast<std::size_t>(shape.num_layers);
    std::vector<double> all(a.new_rows.size() / size * num_layers * 4);
    for (std::size_t place = 0; place < a.new_rows.size(); ++place) {
        auto const rows = memshare::classify(a.new_rows[place], a.old_rows[place], num_rows);
        for (int layer = 0; layer < shape.num_layers; ++layer) {
            double* sums = all.data() + (place / size * num_layers + static_cast<std::size_t>(layer)) * 4;
            if (rows == memshare::RowPair::kInvalid) {
                for (int i = 0; i < 4; ++i) {
                    sums[i] = std::numeric_limits<double>::quiet_NaN();
                }
            }
            for (int head = 0; rows == memshare::RowPair::kPresent && head < shape.num_kv_heads; ++head) {
                auto older = read<Element>(a, a.old_rows[place], layer, 0, head);
                rotate(older, shape.rotary_dim, a.interleaved, a.inv_freq, a.position_delta[place]);
                add(read<Element>(a, a.new_rows[place], layer, 0, head), older, sums);
                add(read<Element>(a, a.new_rows[place], layer, 1, head),
                    read<Element>(a, a.old_rows[place], layer, 1, head), sums + 2);
            }
        }
    }
    return all;
}

} // namespace

void rotate(std::vector<double>& k, int rotary_dim, bool interleaved, std::vector<float> const& inv_freq, int tokens)
{
    auto const half = static_cast<std::size_t>(rotary_dim / 2);
    for (std::size_t i = 0; i < half; ++i) {
        double& x = k[interleaved ? 2 * i : i];
        double& y = k[interleaved ? 2 * i + 1 : half + i];
        double const angle = static_cast<double>(tokens) * static_cast<double>(inv_freq[i]);
        double const turned = x * std::cos(angle) - y * std::sin(angle);
        y = y * std::cos(angle) + x * std::sin(angle);
        x = turned;
    }
}

std::vector<double> block_distance(SearchArguments const& arguments)
{
    return memshare::with_element(arguments.dtype, std::vector<double>{},
        [&](auto element) { return all_sums<decltype(element)>(arguments); });
}

} // namespace harness
