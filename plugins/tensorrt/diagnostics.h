// Where the plugin's errors go: TensorRT's error recorder and its logger, never an exception across the boundary.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace trtllm_memshare {

// Kept for the life of the library; TensorRT calls this through `setLoggerFinder`.
void setFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Writes `message` to the logger that the finder gives, if there is one, and to `recorder`, if there is one. The
// recorder takes 127 characters of it.
void report(nvinfer1::IErrorRecorder* recorder, nvinfer1::ErrorCode code, std::string const& message) noexcept;

// Runs `body`; an exception becomes a report and `failure`.
template <class Result, class Body>
Result guarded(nvinfer1::IErrorRecorder* recorder, char const* where, Result failure, Body&& body) noexcept
{
    try {
        return body();
    } catch (std::exception const& error) {
        report(recorder, nvinfer1::ErrorCode::kINTERNAL_ERROR, std::string("MemShareBlockSearch::") + where + ": " + error.what());
    } catch (...) {
        report(recorder, nvinfer1::ErrorCode::kINTERNAL_ERROR, std::string("MemShareBlockSearch::") + where + " failed");
    }
    return failure;
}

} // namespace trtllm_memshare
