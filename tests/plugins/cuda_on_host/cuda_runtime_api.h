// A stand-in for CUDA's header and runtime: kernels run on the host, each thread of a block as a fiber.
//
// What it knows is what plugins/ uses: grids and blocks of up to three dimensions, static shared memory, block barriers,
// warp shuffles, read-only loads, cudaLaunchKernelEx, and as much of memory, streams and graphs as the harness needs. Blocks run one after the other. A thread runs until
// it waits for others; so a missing barrier shows as another result when the threads run in another order
// (memshare_run_backwards), and a barrier that some threads never reach ends the launch with an error. Shared memory
// holds NaN patterns when a block starts, as it holds rubbish on a GPU. Inline PTX is not known: kernels keep a plain
// form of it for compilers other than nvcc.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One section for all of it, so that it can be filled before each block.
#define __shared__ static __attribute__((section("memshare_shared")))

enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
};
using cudaStream_t = void*;
using cudaEvent_t = void*;

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1)
        : x(x)
        , y(y)
        , z(z)
    {
    }
};

struct float4 {
    float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w)
{
    return {x, y, z, w};
}

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned int numAttrs;
};

namespace cuda_on_host {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr unsigned int kWarp = 32;

// A place where threads wait for one another: round n is over once all of them have come n times.
struct Meeting {
    unsigned int members = 0, arrived = 0, rounds = 0;
    std::uint64_t values[2][kWarp] = {}; // of two rounds: nobody writes round n + 2 before all have read round n
    int any = 0, last_any = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Meeting* waits = nullptr;
    unsigned int round = 0;
    bool ended = true;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    ucontext_t scheduler;
    unsigned int current = 0;
    std::function<void()> const* body = nullptr;
    bool backwards = false;
    cudaError_t last_error = cudaSuccess;
};

inline Block block;

inline void meet(Meeting& meeting)
{
    unsigned int const round = meeting.rounds;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.rounds;
        meeting.last_any = std::exchange(meeting.any, 0);
        return;
    }
    Fiber& fiber = block.fibers[block.current];
    fiber.waits = &meeting;
    fiber.round = round;
    swapcontext(&fiber.context, &block.scheduler);
}

inline void enter()
{
    (*block.body)();
    block.fibers[block.current].ended = true;
}

// Runs one block; false if threads wait for others that have ended or wait elsewhere.
bool run_block(unsigned int threads);

cudaError_t run_grid(dim3 grid, dim3 threads, std::function<void()> const& body);

template <class T> T shuffle(T value, unsigned int source)
{
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    Meeting& warp = block.warps[block.current / kWarp];
    auto& values = warp.values[warp.rounds % 2];
    std::memcpy(&values[block.current % kWarp], &value, sizeof value);
    meet(warp);
    std::memcpy(&value, &values[source % kWarp], sizeof value);
    return value;
}

} // namespace cuda_on_host

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

inline cudaError_t cudaGetLastError()
{
    return std::exchange(cuda_on_host::block.last_error, cudaSuccess);
}

inline cudaError_t cudaPeekAtLastError()
{
    return cuda_on_host::block.last_error;
}

// What a stream is asked to do: at once, or when the graph that is being captured is launched.
struct HostGraph {
    std::vector<std::function<cudaError_t()>> work;
};

namespace cuda_on_host {

inline HostGraph* captured = nullptr;

inline cudaError_t enqueue(std::function<cudaError_t()> work)
{
    if (captured == nullptr) {
        return work();
    }
    captured->work.push_back(std::move(work));
    return cudaSuccess;
}

} // namespace cuda_on_host

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* config, void (*kernel)(Expected...), Given&&... given)
{
    dim3 const grid = config->gridDim;
    dim3 const threads = config->blockDim;
    return cuda_on_host::enqueue([=] {
        return cuda_on_host::run_grid(grid, threads, [&] { kernel(Expected(given)...); });
    });
}

inline void __syncthreads()
{
    cuda_on_host::meet(cuda_on_host::block.all);
}

inline int __syncthreads_or(int predicate)
{
    cuda_on_host::block.all.any |= predicate != 0;
    cuda_on_host::meet(cuda_on_host::block.all);
    return cuda_on_host::block.all.last_any;
}

inline void __syncwarp(unsigned int = ~0U)
{
    cuda_on_host::meet(cuda_on_host::block.warps[cuda_on_host::block.current / cuda_on_host::kWarp]);
}

// Only whole warps shuffle here, as in the kernels: a mask other than all lanes is refused by never being met.
template <class T> T __shfl_down_sync(unsigned int, T value, unsigned int offset)
{
    unsigned int const lane = cuda_on_host::block.current % cuda_on_host::kWarp;
    return cuda_on_host::shuffle(value, lane + offset < cuda_on_host::kWarp ? lane + offset : lane);
}

template <class T> T __shfl_xor_sync(unsigned int, T value, unsigned int offset)
{
    return cuda_on_host::shuffle(value, cuda_on_host::block.current ^ offset);
}

template <class T> T __ldg(T const* address)
{
    return *address;
}

// Memory, streams and graphs. There is one device; whatever is enqueued has ended when the call returns.
using cudaGraph_t = HostGraph*;
using cudaGraphExec_t = HostGraph*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };

inline cudaError_t cudaGetDeviceCount(int* count)
{
    *count = 1;
    return cudaSuccess;
}

// Of a small device, so that grids are dealt out in every way at sizes that the host can run.
constexpr int kMultiprocessors = 4;
constexpr int kBlocksOfMultiprocessor = 2;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

inline cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int)
{
    *value = kMultiprocessors;
    return cudaSuccess;
}

inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void const*, int, std::size_t)
{
    *blocks = kBlocksOfMultiprocessor;
    return cudaSuccess;
}

inline char const* cudaGetErrorString(cudaError_t status)
{
    return status == cudaSuccess ? "no error" : "an error of the host run";
}

inline cudaError_t cudaMalloc(void** address, std::size_t bytes)
{
    *address = ::operator new(bytes, std::align_val_t{256});
    return cudaSuccess;
}

inline cudaError_t cudaFree(void* address)
{
    ::operator delete(address, std::align_val_t{256});
    return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* target, void const* source, std::size_t bytes, cudaMemcpyKind)
{
    std::memcpy(target, source, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemset(void* target, int value, std::size_t bytes)
{
    std::memset(target, value, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t)
{
    return cuda_on_host::enqueue([=] { return cudaMemset(target, value, bytes); });
}

inline cudaError_t cudaStreamCreate(cudaStream_t* stream)
{
    *stream = nullptr;
    return cudaSuccess;
}

inline cudaError_t cudaStreamDestroy(cudaStream_t)
{
    return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return cudaSuccess;
}

inline cudaError_t cudaDeviceSynchronize()
{
    return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode)
{
    cuda_on_host::captured = new HostGraph;
    return cudaSuccess;
}

inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph)
{
    *graph = std::exchange(cuda_on_host::captured, nullptr);
    return cudaSuccess;
}

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long)
{
    *executable = new HostGraph(*graph);
    return cudaSuccess;
}

inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t)
{
    cudaError_t status = cudaSuccess;
    for (auto const& work : executable->work) {
        status = status == cudaSuccess ? work() : status;
    }
    return status;
}

inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable)
{
    delete executable;
    return cudaSuccess;
}

inline cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}
