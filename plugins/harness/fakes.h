// The parts of TensorRT that a plugin meets, small enough to see through. Nothing of libnvinfer is linked.
#pragma once

#include <NvInferRuntime.h>

#include <deque>
#include <string>
#include <vector>

namespace harness {

// Collects what the plugin says to its logger.
class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, char const* message) noexcept override;

    std::vector<std::string> messages;
};

class LoggerFinder final : public nvinfer1::ILoggerFinder {
public:
    nvinfer1::ILogger* findLogger() override;

    Logger logger;
};

class ErrorRecorder final : public nvinfer1::IErrorRecorder {
public:
    int32_t getNbErrors() const noexcept override;
    nvinfer1::ErrorCode getErrorCode(int32_t index) const noexcept override;
    ErrorDesc getErrorDesc(int32_t index) const noexcept override;
    bool hasOverflowed() const noexcept override;
    void clear() noexcept override;
    bool reportError(nvinfer1::ErrorCode code, ErrorDesc description) noexcept override;
    RefCount incRefCount() noexcept override;
    RefCount decRefCount() noexcept override;

private:
    std::vector<std::pair<nvinfer1::ErrorCode, std::string>> mErrors;
};

class ResourceContext final : public nvinfer1::IPluginResourceContext {
public:
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override;
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override;

    mutable ErrorRecorder recorder;
};

// A dimension: a constant, or a name for one that is known at run time only.
class Dimension final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
public:
    explicit Dimension(int64_t value, bool constant = true);
    Dimension(Dimension const&) = delete;

private:
    bool isConstant() const override;
    int64_t getConstantValue() const override;
    bool isSizeTensor() const override;

    int64_t mValue;
    bool mConstant;
};

class ExprBuilder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
public:
    ExprBuilder();

private:
    nvinfer1::IDimensionExpr const* constant(int64_t value) override;
    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation op, nvinfer1::IDimensionExpr const& first,
        nvinfer1::IDimensionExpr const& second) override;
    nvinfer1::IDimensionExpr const* declareSizeTensor(
        int32_t outputIndex, nvinfer1::IDimensionExpr const& opt, nvinfer1::IDimensionExpr const& upper) override;

    std::deque<Dimension> mDimensions;
};

} // namespace harness
