// Enqueues on a GPU, against the sums in float64.
#include <array>
#include <cmath>
#include <cstring>
#include <random>

#include "device.h"
#include "inputs.h"
#include "reference.h"

using namespace nvinfer1;

namespace harness {
namespace {

constexpr int32_t kInputs = 7;
constexpr int kBlocks = 9;
constexpr int kPairs = 6;
constexpr double kTolerance = 1e-5; // of float32 sums against float64, relative to the newer side

// A pool of random finite values and pairs of rows over it: shifted runs, an absent row, padding, a row out of the pool.
struct Case {
    memshare::PoolShape shape;
    memshare::KvDtype dtype;
    bool interleaved;
    std::vector<unsigned char> pool;
    std::vector<int> newRows, oldRows, delta;
    std::vector<float> invFreq;

    Case(std::vector<int32_t> const& f)
        : shape{f[0], f[1], f[2], f[3], f[4]}
        , dtype(static_cast<memshare::KvDtype>(f[5]))
        , interleaved(f[6] != 0)
        , invFreq(frequencies(f[4], f[3]))
    {
        std::mt19937 random(17);
        pool = randomElements(random, dtype,
            static_cast<std::size_t>(kBlocks) * static_cast<std::size_t>(f[0]) * 2 * static_cast<std::size_t>(f[1])
                * static_cast<std::size_t>(f[2]) * static_cast<std::size_t>(f[3]));
        int const size = shape.tokens_per_block;
        int const rows = kBlocks * size;
        for (int pair = 0; pair < kPairs; ++pair) {
            int const newest = static_cast<int>(random() % static_cast<unsigned int>(rows - size));
            int const oldest = static_cast<int>(random() % static_cast<unsigned int>(rows - size));
            for (int token = 0; token < size; ++token) {
                newRows.push_back(newest + token);
                oldRows.push_back(oldest + token);
                delta.push_back(static_cast<int>(random() % 65536U) - 32768);
            }
        }
        newRows[1] = oldRows[1] = -1;
        std::fill_n(newRows.begin() + 2 * size, size, -1);
        std::fill_n(oldRows.begin() + 2 * size, size, -1);
        newRows[static_cast<std::size_t>(3 * size + 4)] = rows;
        oldRows[static_cast<std::size_t>(4 * size)] = -5;
    }

    [[nodiscard]] std::vector<double> expected() const
    {
        return block_distance(
            {pool.data(), kBlocks, newRows, oldRows, delta, invFreq, shape, dtype, interleaved});
    }
};

// The inputs of one enqueue on the device.
struct DeviceCase {
    DeviceArray<unsigned char> pool, hidden;
    DeviceArray<long long> pointer;
    DeviceArray<int> numBlocks, newRows, oldRows, delta;
    DeviceArray<float> invFreq, distances;
    std::vector<PluginTensorDesc> descriptions;

    explicit DeviceCase(Case const& c)
        : pool(c.pool)
        , hidden(std::vector<unsigned char>(16))
        , pointer({reinterpret_cast<long long>(pool.data())})
        , numBlocks({kBlocks})
        , newRows(c.newRows)
        , oldRows(c.oldRows)
        , delta(c.delta)
        , invFreq(c.invFreq)
        , distances(std::vector<float>(static_cast<std::size_t>(kPairs * c.shape.num_layers) * 4, -1.0F))
        , descriptions(tensors(kPairs, c.shape.tokens_per_block, static_cast<int64_t>(c.invFreq.size()),
              c.shape.num_layers))
    {
    }

    int32_t enqueue(
        IPluginV3OneRuntime& plugin, cudaStream_t stream, void const* pointers = nullptr, int64_t pairs = kPairs)
    {
        for (auto index : {3U, 4U, 5U, 7U}) { // new_rows, old_rows, position_delta, block distances
            descriptions[index].dims.d[0] = pairs;
        }
        std::array<void const*, kInputs> const inputs{hidden.data(), pointers ? pointers : pointer.data(),
            numBlocks.data(), newRows.data(), oldRows.data(), delta.data(), invFreq.data()};
        std::array<void*, 1> const outputs{distances.data()};
        auto const* output = descriptions.data() + kInputs;
        require(plugin.onShapeChange(descriptions.data(), kInputs, output, 1) == 0, "onShapeChange");
        return plugin.enqueue(descriptions.data(), output, inputs.data(), outputs.data(), nullptr, stream);
    }
};

void compare(std::vector<float> const& got, std::vector<double> const& expected)
{
    require(got.size() == expected.size(), "the reference has another size");
    for (std::size_t i = 0; i < got.size(); ++i) {
        if (std::isnan(expected[i])) {
            require(std::isnan(got[i]), "sum " + std::to_string(i) + " should be NaN");
            continue;
        }
        double const norm = std::max(1e-30, expected[i | 1U]);
        double const error = std::abs(static_cast<double>(got[i]) - expected[i]) / norm;
        require(error < kTolerance, "sum " + std::to_string(i) + " is " + std::to_string(got[i]) + ", expected "
                + std::to_string(expected[i]));
    }
}

void runPhase(Library const& library, std::vector<int32_t> const& values)
{
    Fields fields(values);
    auto plugin = create(library, fields, TensorRTPhase::kRUNTIME);
    ResourceContext context;
    auto attached = std::unique_ptr<IPluginV3>(runtime(*plugin)->attachToContext(&context));
    Case const c(values);
    DeviceCase device(c);
    Stream const stream;
    require(device.enqueue(*runtime(*attached), stream) == 0, "enqueue failed");
    stream.synchronize();
    auto const first = device.distances.read();
    compare(first, c.expected());

    // Again, inside a captured graph: the same bits.
    device.distances.clear();
    stream.runAsGraph(
        [&] { require(device.enqueue(*runtime(*attached), stream) == 0, "enqueue failed under capture"); });
    auto const second = device.distances.read();
    require(std::memcmp(first.data(), second.data(), first.size() * sizeof(float)) == 0, "other bits in a graph");
    // No pairs: a success that writes nothing.
    device.distances.clear();
    require(device.enqueue(*runtime(*attached), stream, nullptr, 0) == 0, "enqueue of no pairs failed");
    stream.synchronize();
    for (float value : device.distances.read()) {
        require(std::isnan(value), "a search of no pairs wrote something");
    }
    require(context.recorder.getNbErrors() == 0, "errors were recorded");
}

void buildPhase(Library const& library)
{
    std::vector<int32_t> const values{2, 2, 16, 64, 64, 2, 0};
    Fields fields(values);
    auto plugin = create(library, fields, TensorRTPhase::kBUILD);
    Case c(values);
    std::mt19937 random(3);
    for (auto* rows : {&c.newRows, &c.oldRows, &c.delta}) {
        for (int& row : *rows) {
            row = static_cast<int>(random());
        }
    }
    DeviceCase device(c);
    DeviceArray<long long> const nowhere({0x7eadbeef00LL});
    require(device.enqueue(*runtime(*plugin), nullptr, nowhere.data()) == 0, "enqueue failed");
    cuda(cudaDeviceSynchronize(), "a made-up address was read");
    for (float value : device.distances.read()) {
        require(std::isnan(value), "what was not compared must be NaN, which no policy accepts");
    }
    require(device.enqueue(*runtime(*plugin), nullptr, nowhere.data(), 0) == 0, "enqueue of no pairs failed");
    cuda(cudaDeviceSynchronize(), "an enqueue of no pairs left an error");
}

} // namespace

std::vector<Check> gpuChecks(Library const& library)
{
    std::vector<Check> checks{{"build phase reads no address", [&library] { buildPhase(library); }}};
    for (int32_t dtype = 0; dtype < 5; ++dtype) {
        for (int32_t interleaved = 0; interleaved < 2; ++interleaved) {
            for (auto const& shape : {std::array<int32_t, 5>{3, 2, 16, 64, 64}, {2, 4, 32, 128, 64}, {1, 1, 8, 72, 36},
                     {2, 1, 128, 256, 256}, {2, 2, 64, 32, 0}}) {
                std::vector<int32_t> values(shape.begin(), shape.end());
                values.push_back(dtype);
                values.push_back(interleaved);
                std::string name = "run phase, dtype " + std::to_string(dtype) + (interleaved ? ", interleaved" : "");
                name += ", head_dim " + std::to_string(shape[3]) + ", rotary_dim " + std::to_string(shape[4]);
                checks.push_back({name, [&library, values] { runPhase(library, values); }});
            }
        }
    }
    return checks;
}

} // namespace harness
