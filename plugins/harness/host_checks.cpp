// The life of the plugin as far as it goes without a GPU.
#include <algorithm>
#include <array>
#include <cstring>

#include "checks.h"

using namespace nvinfer1;

namespace harness {
namespace {

constexpr std::array<char const*, 7> kNames{
    "num_layers", "num_kv_heads", "tokens_per_block", "head_dim", "rotary_dim", "kv_dtype", "interleaved"};
constexpr int32_t kInputs = 7;
constexpr int64_t kMaxPairs = 4096;

std::vector<int32_t> const kQwen7b{28, 4, 32, 128, 128, 2, 0};

std::vector<int32_t> values(PluginFieldCollection const& fields)
{
    std::vector<int32_t> out;
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        require(std::strcmp(fields.fields[i].name, kNames[static_cast<std::size_t>(i)]) == 0, "field order changed");
        out.push_back(*static_cast<int32_t const*>(fields.fields[i].data));
    }
    return out;
}

void creatorNames(Library const& library)
{
    auto& creator = *library.creator;
    require(std::string(creator.getPluginName()) == "MemShareBlockSearch", "name");
    require(std::string(creator.getPluginVersion()) == "1", "version");
    require(std::string(creator.getPluginNamespace()) == "trtllm_memshare", "namespace");
    PluginFieldCollection const& fields = *creator.getFieldNames();
    require(fields.nbFields == static_cast<int32_t>(kNames.size()), "number of fields");
    for (std::size_t i = 0; i < kNames.size(); ++i) {
        require(std::string(fields.fields[i].name) == kNames[i], "field name " + std::string(fields.fields[i].name));
        require(fields.fields[i].type == PluginFieldType::kINT32 && fields.fields[i].length == 1, "field type");
    }
}

void refuses(Library const& library, Fields& fields, std::string const& expected)
{
    auto& messages = library.finder->logger.messages;
    messages.clear();
    for (TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
        auto const plugin = std::unique_ptr<IPluginV3>(library.creator->createPlugin("x", fields.collection(), phase));
        require(plugin == nullptr, "accepted fields that should fail with: " + expected);
    }
    bool const said = messages.size() == 2 && messages[0].find(expected) != std::string::npos;
    require(said, "log should say '" + expected + "', says '" + (messages.empty() ? "" : messages[0]) + "'");
}

void badFields(Library const& library)
{
    for (char const* name : kNames) {
        Fields missing(kQwen7b);
        missing.remove(name);
        refuses(library, missing, "plugin field " + std::string(name) + " is missing");
        Fields twice(kQwen7b);
        twice.repeat(name);
        refuses(library, twice, "plugin field " + std::string(name) + " is given twice");
        Fields typed(kQwen7b);
        typed.field(name).type = PluginFieldType::kFLOAT32;
        refuses(library, typed, "plugin field " + std::string(name) + " must be one int32");
        Fields longer(kQwen7b);
        longer.field(name).length = 2;
        refuses(library, longer, "plugin field " + std::string(name) + " must be one int32");
        Fields empty(kQwen7b);
        empty.field(name).data = nullptr;
        refuses(library, empty, "plugin field " + std::string(name) + " must be one int32");
        Fields negative(kQwen7b);
        negative.set(name, -1);
        refuses(library, negative, std::string(name) + " must be between");
    }
    Fields unknown(kQwen7b);
    unknown.rename("head_dim", "head_size");
    refuses(library, unknown, "unknown plugin field 'head_size'");
    for (auto const& [name, value, expected] : std::initializer_list<std::tuple<char const*, int32_t, char const*>>{
             {"head_dim", 257, "head_dim must be between 32 and 256, got 257"},
             {"head_dim", 129, "must be even"},
             {"rotary_dim", 130, "rotary_dim must be between 0 and 128, got 130"},
             {"tokens_per_block", 256, "tokens_per_block must be between 8 and 128, got 256"},
             {"kv_dtype", 5, "kv_dtype must be between 0 and 4, got 5"}}) {
        Fields fields(kQwen7b);
        fields.set(name, value);
        refuses(library, fields, expected);
    }
    auto& messages = library.finder->logger.messages;
    messages.clear();
    require(library.creator->createPlugin("x", nullptr, TensorRTPhase::kBUILD) == nullptr, "accepted null fields");
    require(messages.size() == 1, "null fields were not reported");
}

void cloneAndSerialize(Library const& library)
{
    Fields fields(kQwen7b);
    auto plugin = create(library, fields, TensorRTPhase::kBUILD);
    auto copy = std::unique_ptr<IPluginV3>(plugin->clone());
    require(copy != nullptr, "clone failed");
    auto const* first = runtime(*plugin)->getFieldsToSerialize();
    auto const* second = runtime(*copy)->getFieldsToSerialize();
    for (int32_t i = 0; i < first->nbFields; ++i) {
        require(first->fields[i].data != second->fields[i].data, "a clone shares its fields with the original");
    }
    std::string const id = build(*plugin)->getTimingCacheID();
    plugin.reset();
    require(values(*runtime(*copy)->getFieldsToSerialize()) == kQwen7b, "fields changed in the clone");
    auto loaded = std::unique_ptr<IPluginV3>(library.creator->createPlugin(
        "loaded", runtime(*copy)->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    require(loaded != nullptr, "could not create from serialized fields");
    require(values(*runtime(*loaded)->getFieldsToSerialize()) == kQwen7b, "fields changed on the way");
    require(id == build(*loaded)->getTimingCacheID(), "timing-cache id changed on the way");
    Fields other(kQwen7b);
    other.set("num_layers", 29);
    auto different = create(library, other, TensorRTPhase::kBUILD);
    require(id != build(*different)->getTimingCacheID(), "two shapes have one timing-cache id");
}

void formats(Library const& library)
{
    Fields fields(kQwen7b);
    auto plugin = create(library, fields, TensorRTPhase::kBUILD);
    std::vector<std::vector<DataType>> const expected{
        {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}, {DataType::kINT64}, {DataType::kINT32},
        {DataType::kINT32}, {DataType::kINT32}, {DataType::kINT32}, {DataType::kFLOAT}, {DataType::kFLOAT}};
    for (int32_t pos = 0; pos < kInputs + 1; ++pos) {
        for (int32_t type = 0; type < EnumMax<DataType>(); ++type) {
            for (int32_t format = 0; format < EnumMax<TensorFormat>(); ++format) {
                std::array<DynamicPluginTensorDesc, kInputs + 1> descriptions{};
                auto& desc = descriptions[static_cast<std::size_t>(pos)].desc;
                desc.type = static_cast<DataType>(type);
                desc.format = static_cast<TensorFormat>(format);
                auto const& allowed = expected[static_cast<std::size_t>(pos)];
                bool const wanted = desc.format == TensorFormat::kLINEAR
                    && std::find(allowed.begin(), allowed.end(), desc.type) != allowed.end();
                bool const got = build(*plugin)->supportsFormatCombination(pos, descriptions.data(), kInputs, 1);
                require(got == wanted, "position " + std::to_string(pos) + ", type " + std::to_string(type)
                        + ", format " + std::to_string(format));
            }
        }
    }
    std::array<DynamicPluginTensorDesc, kInputs + 1> descriptions{};
    require(!build(*plugin)->supportsFormatCombination(kInputs + 1, descriptions.data(), kInputs, 1), "position 8");
    require(!build(*plugin)->supportsFormatCombination(0, descriptions.data(), kInputs - 1, 1), "six inputs");
}

void outputShapes(Library const& library)
{
    Fields fields(kQwen7b);
    auto plugin = create(library, fields, TensorRTPhase::kBUILD);
    Dimension const pairs(-1, false);
    Dimension const tokens(32);
    std::array<DimsExprs, kInputs> inputs{};
    for (auto& dims : inputs) {
        dims.nbDims = 2;
        dims.d[0] = &pairs;
        dims.d[1] = &tokens;
    }
    DimsExprs output{};
    ExprBuilder builder;
    require(build(*plugin)->getOutputShapes(inputs.data(), kInputs, nullptr, 0, &output, 1, builder) == 0, "failed");
    require(output.nbDims == 3 && output.d[0] == &pairs, "the first dimension must be that of new_rows");
    require(output.d[1]->getConstantValue() == 28 && output.d[2]->getConstantValue() == 4, "layers and sums");
    require(build(*plugin)->getOutputShapes(inputs.data(), kInputs - 1, nullptr, 0, &output, 1, builder) != 0, "six inputs");
    DataType type = DataType::kINT8;
    std::array<DataType, kInputs> const types{};
    require(build(*plugin)->getOutputDataTypes(&type, 1, types.data(), kInputs) == 0, "output type failed");
    require(type == DataType::kFLOAT && build(*plugin)->getNbOutputs() == 1, "output type");
    require(build(*plugin)->getWorkspaceSize(nullptr, kInputs, nullptr, 1) == 0, "workspace");
}

void shapeChanges(Library const& library)
{
    Fields fields(kQwen7b);
    auto plugin = create(library, fields, TensorRTPhase::kRUNTIME);
    ResourceContext context;
    ResourceContext other;
    auto attached = std::unique_ptr<IPluginV3>(runtime(*plugin)->attachToContext(&context));
    auto bystander = std::unique_ptr<IPluginV3>(runtime(*plugin)->attachToContext(&other));
    auto change = [&](std::vector<PluginTensorDesc> const& t) {
        return runtime(*attached)->onShapeChange(t.data(), kInputs, t.data() + kInputs, 1);
    };
    for (int64_t pairs : {int64_t{0}, int64_t{1}, kMaxPairs}) {
        require(change(tensors(pairs, 32, 64, 28)) == 0, std::to_string(pairs) + " pairs were refused");
    }
    require(context.recorder.getNbErrors() == 0, "errors for good shapes");
    int32_t errors = 0;
    auto refused = [&](std::vector<PluginTensorDesc> const& t, std::string const& expected) {
        require(change(t) != 0, "accepted, expected: " + expected);
        require(context.recorder.getNbErrors() == ++errors, "not recorded: " + expected);
        std::string const text = context.recorder.getErrorDesc(errors - 1);
        require(text.find(expected) != std::string::npos, "expected '" + expected + "', got '" + text + "'");
        require(context.recorder.getErrorCode(errors - 1) == ErrorCode::kINVALID_ARGUMENT, "error code");
    };
    for (std::size_t index : {3U, 4U, 5U}) {
        auto t = tensors(7, 32, 64, 28);
        t[index].dims.d[1] = 16;
        refused(t, "must be [7, 32], got input " + std::to_string(index) + " [7, 16]");
    }
    auto t = tensors(7, 32, 64, 28);
    t[4].dims.d[0] = 8;
    refused(t, "[8, 32]");
    refused(tensors(7, 32, 63, 28), "inv_freq must be [64], got [63]");
    t = tensors(7, 32, 64, 28);
    t[1].dims.d[0] = 2;
    refused(t, "one KV pool is supported: input 1 must be [1], got [2]");
    refused(tensors(7, 32, 64, 27), "block distances must be [pairs, 28, 4]");
    refused(tensors(1LL << 31, 32, 64, 28), "fewer than 2^31");
    require(other.recorder.getNbErrors() == 0, "one context's errors reached another");
}

void noRotary(Library const& library)
{
    Fields fields({4, 2, 16, 64, 0, 0, 0});
    auto plugin = create(library, fields, TensorRTPhase::kRUNTIME);
    auto const t = tensors(3, 16, 1, 4);
    require(runtime(*plugin)->onShapeChange(t.data(), kInputs, t.data() + kInputs, 1) == 0, "inv_freq [1] was refused");
}

void enqueueWithoutDevice(Library const& library)
{
    Fields fields(kQwen7b);
    for (TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
        auto plugin = create(library, fields, phase);
        ResourceContext context;
        auto attached = std::unique_ptr<IPluginV3>(runtime(*plugin)->attachToContext(&context));
        auto const t = tensors(1, 32, 64, 28);
        std::array<void const*, kInputs> const inputs{};
        std::array<void*, 1> const outputs{};
        require(runtime(*attached)->enqueue(t.data(), t.data() + kInputs, inputs.data(), outputs.data(), nullptr, nullptr)
                != 0, "a launch without a device succeeded");
        require(context.recorder.getNbErrors() == 1, "not recorded");
        require(context.recorder.getErrorCode(0) == ErrorCode::kFAILED_EXECUTION, "error code");
    }
}

} // namespace

Fields::Fields(std::vector<int32_t> values)
    : mValues(std::move(values))
{
    for (std::size_t i = 0; i < kNames.size(); ++i) {
        mFields.emplace_back(kNames[i], &mValues[i], PluginFieldType::kINT32, 1);
    }
}

PluginField& Fields::field(std::string const& name)
{
    return *std::find_if(mFields.begin(), mFields.end(), [&](PluginField const& f) { return name == f.name; });
}

void Fields::set(std::string const& name, int32_t value)
{
    *const_cast<int32_t*>(static_cast<int32_t const*>(field(name).data)) = value;
}

void Fields::remove(std::string const& name)
{
    mFields.erase(mFields.begin() + (&field(name) - mFields.data()));
}

void Fields::repeat(std::string const& name)
{
    mFields.push_back(field(name));
}

void Fields::rename(std::string const& name, char const* other)
{
    field(name).name = other;
}

PluginFieldCollection const* Fields::collection()
{
    mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    return &mCollection;
}

std::unique_ptr<IPluginV3> create(Library const& library, Fields& fields, TensorRTPhase phase)
{
    auto plugin = std::unique_ptr<IPluginV3>(library.creator->createPlugin("search", fields.collection(), phase));
    auto const& messages = library.finder->logger.messages;
    require(plugin != nullptr, "createPlugin failed: " + (messages.empty() ? "no message" : messages.back()));
    return plugin;
}

std::vector<PluginTensorDesc> tensors(int64_t pairs, int64_t tokensPerBlock, int64_t frequencies, int64_t layers)
{
    auto describe = [](DataType type, std::initializer_list<int64_t> dims) {
        PluginTensorDesc desc{};
        desc.type = type;
        desc.format = TensorFormat::kLINEAR;
        desc.dims.nbDims = static_cast<int32_t>(dims.size());
        std::copy(dims.begin(), dims.end(), desc.dims.d);
        return desc;
    };
    PluginTensorDesc const rows = describe(DataType::kINT32, {pairs, tokensPerBlock});
    return {describe(DataType::kBF16, {1, 8}), describe(DataType::kINT64, {1}), describe(DataType::kINT32, {1}), rows,
        rows, rows, describe(DataType::kFLOAT, {frequencies}), describe(DataType::kFLOAT, {pairs, layers, 4})};
}

std::vector<Check> hostChecks(Library const& library, bool hasGpu)
{
    std::vector<Check> checks{
        {"creator names and fields", [&library] { creatorNames(library); }},
        {"bad fields are refused by name", [&library] { badFields(library); }},
        {"clone, serialize, create again", [&library] { cloneAndSerialize(library); }},
        {"format combinations, all of them", [&library] { formats(library); }},
        {"output shapes and types", [&library] { outputShapes(library); }},
        {"shape changes with 0, 1 and 4096 pairs", [&library] { shapeChanges(library); }},
        {"no rotary embedding", [&library] { noRotary(library); }},
    };
    if (!hasGpu) {
        checks.push_back({"a launch without a device is reported", [&library] { enqueueWithoutDevice(library); }});
    }
    return checks;
}

} // namespace harness
