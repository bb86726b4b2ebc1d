// Memory and graphs of a GPU, every status checked.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"

namespace harness {

inline void cuda(cudaError_t status, char const* what)
{
    require(status == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(status));
}

template <class T> class DeviceArray {
public:
    explicit DeviceArray(std::vector<T> const& values)
        : mCount(values.size())
    {
        cuda(cudaMalloc(&mData, std::max<std::size_t>(1, mCount) * sizeof(T)), "cudaMalloc");
        cuda(cudaMemcpy(mData, values.data(), mCount * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
    }
    DeviceArray(DeviceArray const&) = delete;
    ~DeviceArray() { cudaFree(mData); }

    [[nodiscard]] T* data() const { return static_cast<T*>(mData); }

    [[nodiscard]] std::vector<T> read() const
    {
        std::vector<T> values(mCount);
        cuda(cudaMemcpy(values.data(), mData, mCount * sizeof(T), cudaMemcpyDeviceToHost), "copy to the host");
        return values;
    }

    // All bits set: NaN of a float.
    void clear() const { cuda(cudaMemset(mData, 0xff, mCount * sizeof(T)), "clear"); }

private:
    void* mData{nullptr};
    std::size_t mCount;
};

class Stream {
public:
    Stream() { cuda(cudaStreamCreate(&mStream), "stream"); }
    Stream(Stream const&) = delete;
    ~Stream() { cudaStreamDestroy(mStream); }

    operator cudaStream_t() const { return mStream; }
    void synchronize() const { cuda(cudaStreamSynchronize(mStream), "synchronise"); }

    // Captures what `enqueue` asks of this stream, launches it once and waits for it.
    template <class Enqueue> void runAsGraph(Enqueue&& enqueue) const
    {
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t executable = nullptr;
        cuda(cudaStreamBeginCapture(mStream, cudaStreamCaptureModeThreadLocal), "capture");
        enqueue();
        cuda(cudaStreamEndCapture(mStream, &graph), "end of capture");
        cuda(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
        cuda(cudaGraphLaunch(executable, mStream), "launch");
        synchronize();
        cuda(cudaGraphExecDestroy(executable), "destroy");
        cuda(cudaGraphDestroy(graph), "destroy");
    }

private:
    cudaStream_t mStream{nullptr};
};

} // namespace harness
