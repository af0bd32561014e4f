// What all CUDA kernels share: number formats, rows in 16-byte pieces, sums within a block, launches.
//
// With SAEK_SIMT the same kernels are compiled by a C++ compiler against the tests' simt.h, which runs
// their threads one at a time on the CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../saek.h"

#ifdef SAEK_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
// `kernel` in parentheses where it is a template with commas.
#define SAEK_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__)
#define SAEK_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define SAEK_DYNAMIC_SHARED(type, name)                          \
  extern __shared__ __align__(16) unsigned char saek_dynamic[]; \
  type* name = reinterpret_cast<type*>(saek_dynamic)
#endif

namespace saek {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Numbers ----------------------------------------------------------------------------------------

struct Bf16 {
  uint16_t bits;
};

template <class T>
__device__ __forceinline__ T to(float v) {
  return static_cast<T>(v);
}
template <class T>
__device__ __forceinline__ T to(double v) {
  return static_cast<T>(v);
}
template <class T>
__device__ __forceinline__ T to(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}
template <>
__device__ __forceinline__ Bf16 to<Bf16>(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  if (v != v) return {0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to the even one
  return {static_cast<uint16_t>(bits >> 16)};
}

__device__ __forceinline__ float magnitude(float v) { return fabsf(v); }
__device__ __forceinline__ double magnitude(double v) { return fabs(v); }
__device__ __forceinline__ float square_root(float v) { return sqrtf(v); }
__device__ __forceinline__ double square_root(double v) { return sqrt(v); }

// A weight that may be absent.
template <class T>
__device__ __forceinline__ double weight_at(const T* weights, int64_t i) {
  return weights ? static_cast<double>(weights[i]) : 1.0;
}

// ---- Rows, N numbers at a time ----------------------------------------------------------------------

constexpr int piece_bytes(int bytes) { return bytes < 16 ? bytes : 16; }

template <class E, int N>
struct alignas(piece_bytes(N * sizeof(E))) Pack {
  E at[N];
};

template <class T, int N, class E>
__device__ __forceinline__ Pack<T, N> load(const E* from) {
  const Pack<E, N> raw = *reinterpret_cast<const Pack<E, N>*>(from);
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.at[i] = to<T>(raw.at[i]);
  return out;
}

template <class E, int N, class T>
__device__ __forceinline__ void store(E* where, const Pack<T, N>& values) {
  Pack<E, N> raw;
#pragma unroll
  for (int i = 0; i < N; ++i) raw.at[i] = to<E>(values.at[i]);
  *reinterpret_cast<Pack<E, N>*>(where) = raw;
}

// The same for global memory. Written as words, since the compiler takes structures apart into single
// numbers, a write each.
template <class E, int N, class T>
__device__ __forceinline__ void store_global(E* where, const Pack<T, N>& values) {
#ifdef SAEK_SIMT
  store(where, values);
#else
  Pack<E, N> raw;
#pragma unroll
  for (int i = 0; i < N; ++i) raw.at[i] = to<E>(values.at[i]);
  if constexpr (sizeof(raw) % 16 == 0) {
    uint4 words[sizeof(raw) / 16];
    memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(raw) / 16); ++i)
      __stwb(reinterpret_cast<uint4*>(where) + i, words[i]);
  } else if constexpr (sizeof(raw) == 8) {
    uint2 words;
    memcpy(&words, &raw, sizeof(raw));
    __stwb(reinterpret_cast<uint2*>(where), words);
  } else {
    *reinterpret_cast<Pack<E, N>*>(where) = raw;
  }
#endif
}

template <int N, class T>
__device__ __forceinline__ void add_scaled(Pack<T, N>& sum, T factor, const Pack<T, N>& values) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum.at[i] += factor * values.at[i];
}

// Numbers in a 16-byte piece.
template <class M>
constexpr int kPiece = 16 / static_cast<int>(sizeof(M));

// Rows of d numbers from these addresses on may be read N at a time.
template <int N, class... E>
bool in_pieces(int64_t d, const E*... rows) {
  return d % N == 0 &&
         (... && (reinterpret_cast<std::uintptr_t>(rows) % piece_bytes(N * sizeof(E)) == 0));
}

// Columns c .. c+N-1 of sum_k weight[k] matrix[index[k]]. Four rows are under way at once.
template <int N, class T, class M>
__device__ __forceinline__ Pack<T, N> weighted_rows(const int32_t* index, const T* weight, int64_t n,
                                                    const M* __restrict__ matrix, int64_t d,
                                                    int64_t c) {
  Pack<T, N> sum = {};
  const M* column = matrix + c;
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    const Pack<T, N> r0 = load<T, N>(column + index[k] * d), r1 = load<T, N>(column + index[k + 1] * d);
    const Pack<T, N> r2 = load<T, N>(column + index[k + 2] * d), r3 = load<T, N>(column + index[k + 3] * d);
    add_scaled(sum, weight[k], r0);
    add_scaled(sum, weight[k + 1], r1);
    add_scaled(sum, weight[k + 2], r2);
    add_scaled(sum, weight[k + 3], r3);
  }
  for (; k < n; ++k) add_scaled(sum, weight[k], load<T, N>(column + index[k] * d));
  return sum;
}

// ---- Threads of a block -----------------------------------------------------------------------------

// Whether an earlier kernel has asked for everything after it to be left undone.
__device__ __forceinline__ bool skipped(const int64_t* skip) { return skip != nullptr && *skip != 0; }

__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int warps() { return blockDim.x / kWarp; }

// The same where a block of this very launch may ask: its threads must agree. `shared` has one place.
__device__ __forceinline__ bool block_skipped(const int64_t* skip, int* shared) {
  if (threadIdx.x == 0) *shared = skipped(skip);
  __syncthreads();
  return *shared != 0;
}

// The sum over a warp, in every lane.
template <class S>
__device__ __forceinline__ S warp_sum(S v) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) v += __shfl_xor_sync(kAllLanes, v, apart);
  return v;
}

// The sum over a block, in every thread; `shared` has kWarp + 1 places.
template <class S>
__device__ __forceinline__ S block_sum(S v, S* shared) {
  v = warp_sum(v);
  if (lane() == 0) shared[warp()] = v;
  __syncthreads();
  if (warp() == 0) {
    v = warp_sum(lane() < warps() ? shared[lane()] : S(0));
    if (lane() == 0) shared[kWarp] = v;
  }
  __syncthreads();
  return shared[kWarp];
}

// The sum over all threads before this one, and the sum over all; `shared` has kWarp + 1 places.
template <class S>
__device__ __forceinline__ S block_sum_before(S v, S* shared, S* total) {
  S upto = v;
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const S other = __shfl_up_sync(kAllLanes, upto, apart);
    if (lane() >= apart) upto += other;
  }
  if (lane() == kWarp - 1) shared[warp()] = upto;
  __syncthreads();
  S before = 0;
  for (int w = 0; w < warp(); ++w) before += shared[w];
  if (threadIdx.x == blockDim.x - 1) shared[kWarp] = before + upto;
  __syncthreads();
  *total = shared[kWarp];
  return before + upto - v;
}

// <a, b> by one warp, in every lane.
template <int N, class T, class A, class B>
__device__ __forceinline__ T warp_dot(const A* a, const B* b, int64_t d) {
  T sum = 0;
  for (int64_t c = lane() * N; c < d; c += kWarp * N) {
    const Pack<T, N> left = load<T, N>(a + c), right = load<T, N>(b + c);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += left.at[i] * right.at[i];
  }
  return warp_sum(sum);
}

// ---- Adam -------------------------------------------------------------------------------------------

template <class T>
struct AdamScalars {
  T keep, scale, rate, one_minus_beta1, beta2, one_minus_beta2, v_scale, eps;

  __device__ explicit AdamScalars(const saek_adam& a)
      : keep(static_cast<T>(a.numbers->keep)),
        scale(static_cast<T>(a.grad_scale ? *a.grad_scale : 1.0)),
        rate(static_cast<T>(a.numbers->rate)),
        one_minus_beta1(static_cast<T>(1 - a.numbers->beta1)),
        beta2(static_cast<T>(a.numbers->beta2)),
        one_minus_beta2(static_cast<T>(1 - a.numbers->beta2)),
        v_scale(static_cast<T>(a.numbers->v_scale)),
        eps(static_cast<T>(a.numbers->eps)) {}

  __device__ __forceinline__ T moved(T value, T& m, T& v, T gradient) const {
    const T g = scale * gradient;
    m += one_minus_beta1 * (g - m);
    v = beta2 * v + one_minus_beta2 * (g * g);
    return keep * value - rate * m / (square_root(v) * v_scale + eps);
  }
};

// ---- Launches ---------------------------------------------------------------------------------------

inline thread_local cudaError_t last_error = cudaSuccess;

// What a function of saek.h returns once its kernels are queued.
inline int outcome(cudaError_t error) {
  if (error == cudaSuccess) return SAEK_OK;
  last_error = error;
  return SAEK_CUDA_FAILED;
}
inline int launched() { return outcome(cudaGetLastError()); }

// Lets a kernel have this much dynamic shared memory. Without being asked a device gives 48 KB, what the
// kernel declares by itself included.
template <class Kernel>
int allow_shared(Kernel* kernel, int bytes) {
#ifdef SAEK_SIMT
  (void)kernel, (void)bytes;
  return SAEK_OK;
#else
  if (bytes == 0) return SAEK_OK;
  return outcome(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
#endif
}

inline cudaStream_t stream_of(const saek_exec& exec) { return static_cast<cudaStream_t>(exec.stream); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads that share out d numbers, N each.
inline int threads_for(int64_t d, int n) {
  const int64_t warps = ceil_div(ceil_div(d, n), kWarp);
  return static_cast<int>(kWarp * (warps < 2 ? 2 : warps > 8 ? 8 : warps));
}

template <class T>
const T* of(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* of(void* p) {
  return static_cast<T*>(p);
}

// Defines a function of the table from its template over <T, M>.
#define SAEK_ENTRY(name)                                                \
  int name(const saek_exec& exec, const saek_##name##_args& args) {     \
    switch (exec.dtype) {                                               \
      case SAEK_FLOAT32: return name##_of<float, float>(exec, args);    \
      case SAEK_FLOAT64: return name##_of<double, double>(exec, args);  \
      default: return name##_of<float, Bf16>(exec, args);               \
    }                                                                   \
  }

}  // namespace cuda
}  // namespace saek
