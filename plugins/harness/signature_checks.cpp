// Signatures of pages by the library's C entry: refusals on every machine, results on a GPU against float64.
#include <array>
#include <cmath>
#include <cstring>
#include <random>

#include "device.h"
#include "inputs.h"
#include "signature_reference.h"

namespace harness {
namespace {

constexpr int kBlocks = 7;
constexpr double kTolerance = 5e-6; // of one number of a signature, whose length is 1
constexpr std::size_t kGuard = 64;  // numbers behind the last page that nobody writes

std::vector<int> const kPages{3, 0, kBlocks, 2, -1, kBlocks - 1, 2}; // two are out of the pool
std::vector<int> const kPositions{32000, 8, 5, 1024, 7, 131072, 0};

enum class Order {
    kOurs, // [blocks, layers, 2, heads, tokens, head_dim], every second layer chosen
    kVllm, // an allocation for each layer: [blocks, tokens, heads, K then V]
};

// A pool of random values, some of them zeros, and a random projection.
struct Case {
    MemShareSignatureShape shape;
    memshare::KvDtype dtype;
    std::vector<long long> offsets; // of each layer's field, elements
    std::vector<unsigned char> pool;
    std::vector<float> invFreq, matrix;

    Case(MemShareSignatureShape const& given, Order order)
        : shape(given)
        , dtype(static_cast<memshare::KvDtype>(given.dtype))
        , invFreq(frequencies(given.rotary_dim, given.head_dim))
    {
        long long const vector = shape.head_dim;
        long long const field = vector * shape.tokens_per_block * shape.num_kv_heads;
        bool const ours = order == Order::kOurs;
        shape.block_stride = ours ? 4 * field * shape.num_layers : 2 * field;
        shape.head_stride = ours ? vector * shape.tokens_per_block : 2 * vector;
        shape.token_stride = ours ? vector : 2 * vector * shape.num_kv_heads;
        for (int layer = 0; layer < shape.num_layers; ++layer) {
            offsets.push_back(ours ? field * (4 * layer + 2 + shape.field)
                                   : 2 * field * kBlocks * layer + vector * shape.field);
        }
        std::mt19937 random(23);
        pool = randomElements(random, dtype, static_cast<std::size_t>(4 * field * shape.num_layers * kBlocks));
        for (int layer = 0; layer < shape.num_layers; ++layer) {
            for (int head = 0; head < shape.num_kv_heads; ++head) {
                clear(layer, 3, head, 2); // a token of zeros
            }
            clear(layer, 2, 0, 1); // one head of a token
        }
        std::normal_distribution<float> normal;
        matrix.resize(static_cast<std::size_t>(shape.num_layers * shape.num_kv_heads * shape.head_dim * shape.width));
        std::generate(matrix.begin(), matrix.end(), [&] { return normal(random); });
    }

    void clear(int layer, int block, int head, int token)
    {
        long long const first = offsets[static_cast<std::size_t>(layer)] + block * shape.block_stride
            + head * shape.head_stride + token * shape.token_stride;
        std::size_t const bytes = elementBytes(dtype);
        std::memset(pool.data() + static_cast<std::size_t>(first) * bytes, 0,
            static_cast<std::size_t>(shape.head_dim) * bytes);
    }

    // Where each layer's field begins in a copy of the pool.
    [[nodiscard]] std::vector<unsigned char const*> fields(unsigned char const* base) const
    {
        std::vector<unsigned char const*> addresses;
        for (long long const offset : offsets) {
            addresses.push_back(base + offset * static_cast<long long>(elementBytes(dtype)));
        }
        return addresses;
    }

    [[nodiscard]] std::size_t numbers() const
    {
        return kPages.size() * static_cast<std::size_t>(shape.tokens_per_block * shape.width);
    }
};

void compare(std::vector<float> const& got, std::vector<double> const& expected)
{
    require(got.size() == expected.size() + kGuard, "the reference has another size");
    for (std::size_t i = 0; i < got.size(); ++i) {
        auto const number = "number " + std::to_string(i);
        if (i >= expected.size() || std::isnan(expected[i])) {
            require(std::isnan(got[i]), number + " should be NaN, or was not to be written");
            continue;
        }
        double const error = std::abs(static_cast<double>(got[i]) - expected[i]);
        require(error <= (expected[i] == 0.0 ? 0.0 : kTolerance),
            number + " is " + std::to_string(got[i]) + ", expected " + std::to_string(expected[i]));
    }
}

void sign(Library const& library, MemShareSignatureShape const& shape, Order order)
{
    Case const c(shape, order);
    DeviceArray<unsigned char> const pool(c.pool);
    DeviceArray<unsigned char const*> const fields(c.fields(pool.data()));
    DeviceArray<int> const numBlocks({kBlocks}), blockIds(kPages), positions(kPositions);
    DeviceArray<float> const invFreq(c.invFreq), matrix(c.matrix), signatures(std::vector<float>(c.numbers() + kGuard));
    Stream const stream;
    bool const turns = shape.field == 0; // V has no use for positions and frequencies: they may be null
    auto const enqueue = [&](std::size_t pages) {
        int const status = library.signPages(reinterpret_cast<long long const*>(fields.data()), numBlocks.data(),
            blockIds.data(), turns ? positions.data() : nullptr, turns ? invFreq.data() : nullptr, matrix.data(),
            signatures.data(), static_cast<int>(pages), &c.shape, stream);
        require(status == 0, "status " + std::to_string(status));
    };
    signatures.clear();
    enqueue(kPages.size());
    stream.synchronize();
    auto const first = signatures.read();
    compare(first,
        page_signatures({c.fields(c.pool.data()), kBlocks, kPages, kPositions, c.invFreq, c.matrix, c.shape}));

    signatures.clear();
    stream.runAsGraph([&] { enqueue(kPages.size()); });
    auto const second = signatures.read();
    require(std::memcmp(first.data(), second.data(), first.size() * sizeof(float)) == 0, "other bits in a graph");

    signatures.clear();
    enqueue(0);
    stream.synchronize();
    for (float value : signatures.read()) {
        require(std::isnan(value), "signatures of no pages wrote something");
    }
}

int signNothing(Library const& library, MemShareSignatureShape const* shape, int pages)
{
    return library.signPages(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, pages, shape, nullptr);
}

MemShareSignatureShape const kGood{2, 3, 4, 32, 128, 128, 1, 64, 0, 0, 0};

void refuses(Library const& library)
{
    using Shape = MemShareSignatureShape;
    for (auto const& [member, value] : std::initializer_list<std::pair<int Shape::*, int>>{{&Shape::dtype, 5},
             {&Shape::num_layers, 0}, {&Shape::num_kv_heads, 0}, {&Shape::tokens_per_block, 4}, {&Shape::head_dim, 258},
             {&Shape::rotary_dim, 130}, {&Shape::field, 2}, {&Shape::width, 0}, {&Shape::width, 6},
             {&Shape::width, 68}}) {
        Shape shape = kGood;
        shape.*member = value;
        require(signNothing(library, &shape, 1) == cudaErrorInvalidValue, "accepted " + std::to_string(value));
    }
    require(signNothing(library, nullptr, 1) == cudaErrorInvalidValue, "accepted no shape");
    require(signNothing(library, &kGood, -1) == cudaErrorInvalidValue, "accepted -1 pages");
    require(signNothing(library, &kGood, 0) == 0, "refused no pages");
}

} // namespace

std::vector<Check> signatureHostChecks(Library const& library, bool hasGpu)
{
    std::vector<Check> checks{{"signatures that no kernel takes are refused", [&library] { refuses(library); }}};
    if (!hasGpu) {
        checks.push_back({"signatures without a device are reported", [&library] {
            int const status = signNothing(library, &kGood, 1);
            require(status != 0 && status != cudaErrorInvalidValue, "status " + std::to_string(status));
        }});
    }
    return checks;
}

std::vector<Check> signatureGpuChecks(Library const& library)
{
    std::vector<Check> checks;
    for (int dtype = 0; dtype < 5; ++dtype) {
        for (int field = 0; field < 2; ++field) {
            // Whole and last partial groups of eight tokens; heads turned whole, in part and not; vectors that four
            // does not divide.
            for (auto const& [shape, order] : std::initializer_list<std::pair<MemShareSignatureShape, Order>>{
                     {{dtype, 3, 2, 16, 64, 64, field, 64, 0, 0, 0}, Order::kOurs},
                     {{dtype, 1, 5, 12, 72, 36, field, 20, 0, 0, 0}, Order::kVllm},
                     {{dtype, 2, 1, 9, 256, 0, field, 4, 0, 0, 0}, Order::kOurs}}) {
                std::string name = "signatures of " + std::string(field == 0 ? "K" : "V") + ", dtype ";
                name += std::to_string(dtype) + ", head_dim " + std::to_string(shape.head_dim) + ", rotary_dim ";
                name += std::to_string(shape.rotary_dim);
                checks.push_back({name, [&library, s = shape, o = order] { sign(library, s, o); }});
            }
        }
    }
    return checks;
}

} // namespace harness
