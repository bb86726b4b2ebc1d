#include "diagnostics.h"

#include <atomic>

namespace trtllm_memshare {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> gFinder{nullptr};

} // namespace

void setFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gFinder.store(finder);
}

void report(nvinfer1::IErrorRecorder* recorder, nvinfer1::ErrorCode code, std::string const& message) noexcept
{
    try {
        if (nvinfer1::ILoggerFinder* const finder = gFinder.load(); finder != nullptr) {
            if (nvinfer1::ILogger* const logger = finder->findLogger(); logger != nullptr) {
                logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
            }
        }
        if (recorder != nullptr) {
            recorder->reportError(code, message.substr(0, nvinfer1::IErrorRecorder::kMAX_DESC_LENGTH).c_str());
        }
    } catch (...) {
        // The caller returns its failure code; there is nowhere left to say more.
    }
}

} // namespace trtllm_memshare
