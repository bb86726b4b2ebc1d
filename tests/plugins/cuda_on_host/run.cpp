// Runs grids of fibers, see cuda_runtime_api.h.
#include "cuda_runtime_api.h"

// The bounds of the section that shared memory lies in; the linker makes them.
extern "C" char __start_memshare_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_memshare_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_on_host {

bool run_block(unsigned int threads)
{
    if (__start_memshare_shared != nullptr) {
        std::memset(__start_memshare_shared, 0xff, static_cast<std::size_t>(__stop_memshare_shared - __start_memshare_shared));
    }
    if (block.fibers.size() < threads) {
        block.fibers.resize(threads);
    }
    block.warps.assign((threads + kWarp - 1) / kWarp, Meeting{});
    for (unsigned int thread = 0; thread < threads; ++thread) {
        ++block.warps[thread / kWarp].members;
    }
    block.all = Meeting{};
    block.all.members = threads;
    for (unsigned int thread = 0; thread < threads; ++thread) {
        Fiber& fiber = block.fibers[thread];
        if (!fiber.stack) {
            fiber.stack = std::make_unique<char[]>(kStackBytes);
        }
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = &block.scheduler;
        fiber.waits = nullptr;
        fiber.ended = false;
        makecontext(&fiber.context, enter, 0);
    }
    for (unsigned int left = threads; left > 0;) {
        bool progress = false;
        for (unsigned int turn = 0; turn < threads; ++turn) {
            block.current = block.backwards ? threads - 1 - turn : turn;
            Fiber& fiber = block.fibers[block.current];
            if (fiber.ended || (fiber.waits != nullptr && fiber.waits->rounds == fiber.round)) {
                continue;
            }
            progress = true;
            fiber.waits = nullptr;
            threadIdx.x = block.current % blockDim.x;
            threadIdx.y = block.current / blockDim.x % blockDim.y;
            threadIdx.z = block.current / blockDim.x / blockDim.y;
            swapcontext(&block.scheduler, &fiber.context);
            left -= fiber.ended ? 1 : 0;
        }
        if (!progress) {
            std::fprintf(stderr, "block (%u, %u, %u): %u threads wait for others that never come\n", blockIdx.x,
                blockIdx.y, blockIdx.z, left);
            return false;
        }
    }
    return true;
}

cudaError_t run_grid(dim3 grid, dim3 threads, std::function<void()> const& body)
{
    auto const refuse = [](cudaError_t status) { return block.last_error = status; };
    bool const fits = grid.x > 0 && grid.x < 1U << 31 && grid.y > 0 && grid.y < 1U << 16 && grid.z > 0 && grid.z < 1U << 16;
    unsigned long long const count = 1ULL * threads.x * threads.y * threads.z;
    if (!fits || count == 0 || count > 1024) {
        return refuse(cudaErrorInvalidConfiguration);
    }
    block.body = &body;
    gridDim = grid;
    blockDim = threads;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                if (!run_block(static_cast<unsigned int>(count))) {
                    return refuse(cudaErrorLaunchFailure);
                }
            }
        }
    }
    return cudaSuccess;
}

} // namespace cuda_on_host

extern "C" void memshare_run_backwards(int backwards)
{
    cuda_on_host::block.backwards = backwards != 0;
}
