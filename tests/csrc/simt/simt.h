// CUDA's kernel language for a C++ compiler, as far as the kernels here use it. How it runs: see simt.cpp.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

// What a thread waits for, and where. As a default argument it takes the line of the call.
struct Wait {
  const char *operation, *file;
  int line;
};
#define SIMT_WAIT(operation) simt::Wait wait = {operation, __builtin_FILE(), __builtin_LINE()}

using Lanes = const uint64_t*;  // what each of the 32 lanes brought along; poison where there is no lane

void wait_for_block(const Wait& wait);
Lanes wait_for_warp(const Wait& wait, unsigned mask, uint64_t brought);
void* shared(const char* function, int line, const char* name, std::size_t bytes);
void* dynamic_shared();
void run(const char* kernel, dim3 grid, int threads, std::size_t shared_bytes,
         const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
void launch(const char* name, dim3 grid, int threads, std::size_t shared_bytes,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  const std::tuple<Parameters...> copies(arguments...);
  run(name, grid, threads, shared_bytes, [&] { std::apply(kernel, copies); });
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <class T>
T shuffle(const Wait& wait, unsigned mask, T value, int from) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles no such type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  const Lanes lanes = wait_for_warp(wait, mask, bits);
  std::memcpy(&value, &lanes[from >= 0 && from < 32 ? from : lane()], sizeof(value));
  return value;
}

}  // namespace simt

inline void __syncthreads(SIMT_WAIT("__syncthreads")) { simt::wait_for_block(wait); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_WAIT("__syncwarp")) {
  simt::wait_for_warp(wait, mask, 0);
}

// As in the hardware only the low five bits of a lane or a distance count.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, SIMT_WAIT("__shfl_sync")) {
  return simt::shuffle(wait, mask, value, from & 31);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, SIMT_WAIT("__shfl_up_sync")) {
  return simt::shuffle(wait, mask, value, simt::lane() - static_cast<int>(by & 31));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, SIMT_WAIT("__shfl_down_sync")) {
  return simt::shuffle(wait, mask, value, simt::lane() + static_cast<int>(by & 31));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, SIMT_WAIT("__shfl_xor_sync")) {
  return simt::shuffle(wait, mask, value, simt::lane() ^ (bits & 31));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_WAIT("__ballot_sync")) {
  const simt::Lanes lanes = simt::wait_for_warp(wait, mask, predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(lanes[i] == 1) << i;
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }

inline int atomicAdd(int* where, int value) { return std::exchange(*where, *where + value); }
inline unsigned long long atomicAdd(unsigned long long* where, unsigned long long value) {
  return std::exchange(*where, *where + value);
}

// A function's shared array is one and the same wherever the function is called in a block.
#define SAEK_SHARED(type, name, count) \
  type* const name =                   \
      static_cast<type*>(simt::shared(__PRETTY_FUNCTION__, __LINE__, #name, sizeof(type) * (count)))
#define SAEK_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(simt::dynamic_shared())

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

// Whether a launch has failed since the last call. Launches after the failed one did nothing.
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

inline cudaError_t cudaMemsetAsync(void* where, int value, std::size_t bytes, cudaStream_t) {
  std::memset(where, value, bytes);
  return cudaSuccess;
}

#define SAEK_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  (static_cast<void>(stream), simt::launch(#kernel, grid, threads, shared_bytes, kernel, __VA_ARGS__))
