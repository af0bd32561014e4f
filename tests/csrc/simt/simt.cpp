// Runs CUDA kernels on the CPU in a way that shows what a GPU would only sometimes.
//
// A thread is a fiber: it runs until it waits at a barrier or ends, and then any other that can goes on, at
// random. Threads of a warp are not in step but where an operation of the warp puts them in step, and blocks
// follow one another in random order. What relies on an order that no barrier makes then gives wrong numbers
// with one seed or another. Shared memory is poison at first, and has gaps on either side that no thread may
// have written to when its block ends (with AddressSanitizer, its own gaps).
#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "saek.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

using simt::Wait;

constexpr unsigned kMostThreads = 1024, kWarp = 32, kAllLanes = 0xffffffffu;
constexpr std::size_t kMostShared = 227 << 10, kStack = 256 << 10;
constexpr unsigned char kPoison = 0xCD;
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kGap = 0;
#else
constexpr std::size_t kGap = 256;
#endif

struct Fiber {
  unsigned thread = 0;
  bool started = false;
  std::unique_ptr<char[]> memory;
  const void* stack = nullptr;
  std::size_t size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  jmp_buf place;
};

struct Barrier {
  std::size_t size = 0;
  std::vector<Fiber*> waiting;
  Wait wait = {};
};

struct Warp {
  Barrier barrier;
  uint64_t brought[kWarp], given[kWarp];
};

struct Array {
  const char* function;
  int line;
  const char* name;
  std::size_t bytes;
  std::unique_ptr<unsigned char[]> memory;  // gap, array, gap
  void* begin() const { return memory.get() + kGap; }
};

unsigned seed = 0;
std::mt19937 randomness(seed);
thread_local std::string message;
thread_local cudaError_t error = cudaSuccess;

// The launch that runs: one at a time.
std::mutex launching;
const char* kernel;
const std::function<void()>* body;
Fiber host, *running = &host, *left;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> ready;
std::size_t ended;
Barrier block;
std::vector<Warp> warps;
std::vector<Array> arrays;  // dynamic shared memory first

template <class... Parts>
void record(const Parts&... parts) {
  const auto text = [](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) return std::to_string(part);
    else return std::string(part);
  };
  message = text(kernel) + ", block " + text(blockIdx.x) + ", seed " + text(seed) + ": ";
  message += (... + text(parts));
  error = cudaErrorLaunchFailure;
}

std::string text(const Wait& wait) {
  return std::string(wait.operation) + " (" + wait.file + ":" + std::to_string(wait.line) + ")";
}

// ---- Fibers -----------------------------------------------------------------------------------------

// What comes first after a switch, on the stack switched to.
void arrive() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(running->fake_stack, &left->stack, &left->size);
#endif
  threadIdx.x = running->thread;
}

void proceed();

void live() {
  arrive();
  for (;; proceed()) {  // once for every block
    (*body)();
    ++ended;
  }
}

// swapcontext would ask the kernel for the signal mask each time, which takes 20 times as long.
void switch_to(Fiber& fiber) {
  left = running;
  running = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&left->fake_stack, fiber.stack, fiber.size);
#endif
  if (_setjmp(left->place) == 0) {
    if (std::exchange(fiber.started, true)) _longjmp(fiber.place, 1);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.memory.get();
    context.uc_stack.ss_size = fiber.size;
    makecontext(&context, live, 0);
    setcontext(&context);
  }
  arrive();
}

// Lets any thread go on that can; where none can, the host.
void proceed() {
  if (ready.empty()) return switch_to(host);
  std::swap(ready[randomness() % ready.size()], ready.back());
  Fiber& next = *ready.back();
  ready.pop_back();
  if (&next != running) switch_to(next);
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  record(parts...);
  switch_to(host);
  __builtin_unreachable();  // the launch is given up
}

// ---- Barriers and shared memory ---------------------------------------------------------------------

// Whether the barrier opens.
bool join(Barrier& barrier, const Wait& wait) {
  if (barrier.waiting.empty()) barrier.wait = wait;
  if (wait.operation != barrier.wait.operation || wait.line != barrier.wait.line)
    fail("threads wait for one another in different places: ", text(barrier.wait), " and ", text(wait));
  barrier.waiting.push_back(running);
  if (barrier.waiting.size() < barrier.size) return false;
  ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
  return true;
}

void check_all_ended(std::size_t threads) {
  if (ended == threads) return;
  std::string met;
  const auto look = [&](const Barrier& barrier, const char* of) {
    if (!barrier.waiting.empty())
      met += ", " + std::to_string(barrier.waiting.size()) + " of " + std::to_string(barrier.size) +
             " threads of a " + of + " wait at " + text(barrier.wait);
  };
  look(block, "block");
  for (const Warp& warp : warps) look(warp.barrier, "warp");
  record("deadlock: ", ended, " threads have ended", met);
}

void check_gaps() {
  const auto written = [](unsigned char byte) { return byte != kPoison; };
  for (const Array& array : arrays) {
    const unsigned char *before = array.memory.get(), *after = before + kGap + array.bytes;
    if (std::any_of(before, before + kGap, written) || std::any_of(after, after + kGap, written))
      return record("a thread has written outside ", array.name);
  }
}

void run_block(unsigned threads, std::size_t shared_bytes) {
  ended = 0;
  block = Barrier();
  block.size = threads;
  warps.assign((threads + kWarp - 1) / kWarp, Warp());
  for (unsigned w = 0; w < warps.size(); ++w) {
    warps[w].barrier.size = std::min(kWarp, threads - w * kWarp);
    std::memset(warps[w].brought, kPoison, sizeof(warps[w].brought));
  }
  arrays.clear();
  simt::shared(nullptr, 0, "dynamic shared memory", shared_bytes);
  for (unsigned i = 0; i < threads; ++i) ready.push_back(fibers[i].get());
  proceed();
  if (error == cudaSuccess) check_all_ended(threads);
  if (error == cudaSuccess) check_gaps();
}

}  // namespace

namespace simt {

void wait_for_block(const Wait& wait) {
  join(block, wait);
  proceed();
}

Lanes wait_for_warp(const Wait& wait, unsigned mask, uint64_t brought) {
  if (mask != kAllLanes) fail(text(wait), " without all lanes in its mask");
  Warp& warp = warps[threadIdx.x / kWarp];
  warp.brought[threadIdx.x % kWarp] = brought;
  // Copied, because a lane that goes on at once may bring its next value before another has read this one.
  if (join(warp.barrier, wait)) std::memcpy(warp.given, warp.brought, sizeof(warp.given));
  proceed();
  return warp.given;
}

void* shared(const char* function, int line, const char* name, std::size_t bytes) {
  std::size_t all = bytes;
  for (const Array& array : arrays) {
    if (array.function == function && array.line == line) return array.begin();
    all += array.bytes;
  }
  if (all > kMostShared) fail(all, " bytes of shared memory, with ", name);
  arrays.push_back({function, line, name, bytes, std::make_unique<unsigned char[]>(bytes + 2 * kGap)});
  std::memset(arrays.back().memory.get(), kPoison, bytes + 2 * kGap);
  return arrays.back().begin();
}

void* dynamic_shared() { return arrays.front().begin(); }

void run(const char* name, dim3 grid, int threads, std::size_t shared_bytes,
         const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(launching);
  if (error != cudaSuccess) return;
  kernel = name;
  body = &thread;
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  blockIdx = threadIdx = dim3(0, 0, 0);
  if (blockDim.x < 1 || blockDim.x > kMostThreads || shared_bytes > kMostShared || grid.x < 1 ||
      grid.x > INT32_MAX || grid.y < 1 || grid.y > UINT16_MAX || grid.z != 1)
    return record("cannot run ", grid.x, " x ", grid.y, " x ", grid.z, " blocks of ", threads,
                  " threads with ", shared_bytes, " bytes of shared memory");
  while (fibers.size() < blockDim.x) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    fiber.thread = static_cast<unsigned>(fibers.size() - 1);
    fiber.memory.reset(new char[kStack]);
    fiber.stack = fiber.memory.get();
    fiber.size = kStack;
  }
  host.started = true;
  std::vector<uint64_t> order(uint64_t(1) * grid.x * grid.y);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), randomness);
  for (std::size_t i = 0; i < order.size() && error == cudaSuccess; ++i) {
    blockIdx = dim3(static_cast<unsigned>(order[i] % grid.x), static_cast<unsigned>(order[i] / grid.x), 0);
    run_block(blockDim.x, shared_bytes);
  }
  ready.clear();
  arrays.clear();
  if (error != cudaSuccess) fibers.clear();  // some were left in the middle of the kernel
}

}  // namespace simt

cudaError_t cudaGetLastError() { return std::exchange(error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return message.c_str(); }

extern "C" {

__attribute__((visibility("default"))) void saek_simt_seed(unsigned value) {
  seed = value;
  randomness.seed(value);
}

// In the place of device.cu.
int saek_cuda_count(int* devices, int* driver_version, int* runtime_version) {
  *devices = *driver_version = *runtime_version = 0;
  return SAEK_NO_DEVICE;
}
int saek_cuda_describe(int, saek_cuda_device*) { return SAEK_NO_DEVICE; }
const char* saek_cuda_error(void) { return message.c_str(); }

}  // extern "C"
