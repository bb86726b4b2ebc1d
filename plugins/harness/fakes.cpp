#include "fakes.h"

namespace harness {

void Logger::log(Severity, char const* message) noexcept
{
    messages.emplace_back(message);
}

nvinfer1::ILogger* LoggerFinder::findLogger()
{
    return &logger;
}

int32_t ErrorRecorder::getNbErrors() const noexcept
{
    return static_cast<int32_t>(mErrors.size());
}

nvinfer1::ErrorCode ErrorRecorder::getErrorCode(int32_t index) const noexcept
{
    return mErrors.at(static_cast<std::size_t>(index)).first;
}

ErrorRecorder::ErrorDesc ErrorRecorder::getErrorDesc(int32_t index) const noexcept
{
    return mErrors.at(static_cast<std::size_t>(index)).second.c_str();
}

bool ErrorRecorder::hasOverflowed() const noexcept
{
    return false;
}

void ErrorRecorder::clear() noexcept
{
    mErrors.clear();
}

bool ErrorRecorder::reportError(nvinfer1::ErrorCode code, ErrorDesc description) noexcept
{
    mErrors.emplace_back(code, description);
    return true;
}

ErrorRecorder::RefCount ErrorRecorder::incRefCount() noexcept
{
    return 1;
}

ErrorRecorder::RefCount ErrorRecorder::decRefCount() noexcept
{
    return 1;
}

nvinfer1::IGpuAllocator* ResourceContext::getGpuAllocator() const noexcept
{
    return nullptr;
}

nvinfer1::IErrorRecorder* ResourceContext::getErrorRecorder() const noexcept
{
    return &recorder;
}

Dimension::Dimension(int64_t value, bool constant)
    : mValue(value)
    , mConstant(constant)
{
    mImpl = this;
}

bool Dimension::isConstant() const
{
    return mConstant;
}

int64_t Dimension::getConstantValue() const
{
    return mValue;
}

bool Dimension::isSizeTensor() const
{
    return false;
}

ExprBuilder::ExprBuilder()
{
    mImpl = this;
}

nvinfer1::IDimensionExpr const* ExprBuilder::constant(int64_t value)
{
    return &mDimensions.emplace_back(value);
}

nvinfer1::IDimensionExpr const* ExprBuilder::operation(
    nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&)
{
    return nullptr; // the plugin needs none: an unexpected call ends in a null dimension
}

nvinfer1::IDimensionExpr const* ExprBuilder::declareSizeTensor(
    int32_t, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&)
{
    return nullptr;
}

} // namespace harness
