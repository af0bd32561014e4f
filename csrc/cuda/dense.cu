// The dense phase: what matrix products leave over where about half of all features fire.
//
// Sums over rows are made in `threads` parts of the rows, then over the parts in order. Contracts: see saek.h.

#include "common.cuh"
#include "../table.h"

namespace saek {
namespace cuda {
namespace {

// A warp takes 64 columns, the word of `passes`: each lane one of either half.
constexpr int kThreads = 256, kWarps = kThreads / kWarp, kColumns = 64;
constexpr int kAtOnce = 4;  // rows a warp reads before it writes the first

// Adds up what the warps of a block have of each column and writes it for this part of the rows.
__device__ __forceinline__ void sum_warps(double low, double high, double* shared, double* out, int64_t n) {
  shared[warp() * kColumns + lane()] = low;
  shared[warp() * kColumns + kWarp + lane()] = high;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared[w * kColumns + i];
    out[i] = sum;
  }
  __syncthreads();
}

// What one row adds in one column.
struct Column {
  double z = 0, weighted = 0;
  int active = 0, saturated = 0;
};

template <class T, class M>
__device__ __forceinline__ bool activate(M* at, T pre, T clip, double weight, Column* column) {
  const bool active = !(pre <= T(0)), over = pre > clip;
  const T z = over ? clip : active ? pre : T(0);
  *at = to<M>(z);
  column->z += static_cast<double>(z);
  column->weighted += weight * static_cast<double>(z);
  column->active += active;
  column->saturated += over;
  return active && !over;
}

template <class T, class M>
__global__ void __launch_bounds__(kThreads) activate_rows(saek_dense_activate_args a, const int64_t* skip) {
  SAEK_SHARED(double, shared, kWarps * kColumns);
  if (skipped(skip)) return;
  const int64_t c0 = static_cast<int64_t>(blockIdx.x) * kColumns, words = (a.d_sae + 63) / 64;
  const int64_t part = blockIdx.y, parts = gridDim.y, low = c0 + lane(), high = low + kWarp;
  const T *bias = static_cast<const T*>(a.b_enc), *r = static_cast<const T*>(a.row_weight);
  const T clip = static_cast<T>(a.clip), zero = 0;
  const T low_bias = low < a.d_sae ? bias[low] : zero, high_bias = high < a.d_sae ? bias[high] : zero;
  Column first, second;
  const int64_t end = a.rows * (part + 1) / parts;
  for (int64_t b0 = a.rows * part / parts + warp(); b0 < end; b0 += kWarps * kAtOnce) {
    T pre[kAtOnce][2] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const M* row = static_cast<const M*>(a.pre) + (b0 + i * kWarps) * a.d_sae;
      if (b0 + i * kWarps < end && low < a.d_sae) pre[i][0] = to<T>(row[low]) + low_bias;
      if (b0 + i * kWarps < end && high < a.d_sae) pre[i][1] = to<T>(row[high]) + high_bias;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t b = b0 + i * kWarps;
      if (b >= end) break;  // the whole warp
      M* row = static_cast<M*>(a.pre) + b * a.d_sae;
      const double weight = weight_at(r, b);
      const bool one = low < a.d_sae && activate(row + low, pre[i][0], clip, weight, &first);
      const bool other = high < a.d_sae && activate(row + high, pre[i][1], clip, weight, &second);
      const uint64_t bits = __ballot_sync(kAllLanes, one);
      const uint64_t more = __ballot_sync(kAllLanes, other);
      if (lane() == 0) a.passes[b * words + blockIdx.x] = bits | more << kWarp;
    }
  }
  const int64_t n = a.d_sae - c0 < kColumns ? a.d_sae - c0 : kColumns;
  double* out = a.scratch + part * 4 * a.d_sae + c0;
  sum_warps(first.z, second.z, shared, out, n);
  sum_warps(first.weighted, second.weighted, shared, out + a.d_sae, n);
  sum_warps(first.active, second.active, shared, out + 2 * a.d_sae, n);
  sum_warps(first.saturated, second.saturated, shared, out + 3 * a.d_sae, n);
}

__global__ void __launch_bounds__(kThreads)
    add_activations(saek_dense_activate_args a, int64_t parts, const int64_t* skip) {
  SAEK_SHARED(int64_t, sums, kWarp + 1);
  if (skipped(skip)) return;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  double total[4] = {};
  if (j < a.d_sae)
    for (int64_t part = 0; part < parts; ++part)
      for (int i = 0; i < 4; ++i) total[i] += a.scratch[(part * 4 + i) * a.d_sae + j];
  if (j < a.d_sae) {
    a.z_sum[j] += total[0];
    a.z_sum[a.d_sae + j] += total[1];
    a.fired[j] += static_cast<int64_t>(total[2]);
  }
  const int64_t saturated = block_sum(static_cast<int64_t>(total[3]), sums);
  // Whole numbers: their sum is the same in any order.
  if (threadIdx.x == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(a.saturated), static_cast<unsigned long long>(saturated));
}

template <class T, class M>
int dense_activate_of(const saek_exec& exec, const saek_dense_activate_args& a) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.d_sae, kColumns)), static_cast<unsigned>(exec.threads));
  SAEK_LAUNCH((activate_rows<T, M>), grid, kThreads, 0, stream_of(exec), a, exec.skip);
  SAEK_LAUNCH(add_activations, dim3(static_cast<unsigned>(ceil_div(a.d_sae, kThreads))), kThreads, 0,
              stream_of(exec), a, static_cast<int64_t>(exec.threads), exec.skip);
  return launched();
}

template <class T, class M, int N>
__global__ void residual_in_place(saek_dense_residual_args a, const int64_t* skip) {
  SAEK_SHARED(double, sums, kWarp + 1);
  if (skipped(skip)) return;
  const int64_t row = blockIdx.x, d = a.d_in;
  M* grad = static_cast<M*>(a.grad) + row * d;
  const T *x = static_cast<const T*>(a.x) + row * d, *b_dec = static_cast<const T*>(a.b_dec);
  const T scale = static_cast<T>(a.recon_scale * weight_at(static_cast<const T*>(a.recon_weight), row));
  double squared = 0;
  for (int64_t c = threadIdx.x * N; c < d; c += static_cast<int64_t>(blockDim.x) * N) {
    Pack<T, N> e = load<T, N>(grad + c);
    if (b_dec) add_scaled(e, T(1), load<T, N>(b_dec + c));
    add_scaled(e, T(-1), load<T, N>(x + c));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      squared += static_cast<double>(e.at[i]) * static_cast<double>(e.at[i]);
      e.at[i] *= scale;
    }
    store_global(grad + c, e);
  }
  squared = block_sum(squared, sums);
  if (threadIdx.x == 0) a.row_sums[row] = squared;
}

constexpr int kSumThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kSumThreads) add_residuals(saek_dense_residual_args a, const int64_t* skip) {
  SAEK_SHARED(double, sums, kWarp + 1);
  if (skipped(skip)) return;
  double plain = 0, weighted = 0;
  for (int64_t b = threadIdx.x; b < a.rows; b += kSumThreads) {
    plain += a.row_sums[b];
    weighted += weight_at(static_cast<const T*>(a.recon_weight), b) * a.row_sums[b];
  }
  plain = block_sum(plain, sums);
  weighted = block_sum(weighted, sums);
  if (threadIdx.x != 0) return;
  a.sums[0] += plain;
  a.sums[1] += weighted;
  if (a.halt && !(isfinite(plain) && isfinite(weighted))) *a.halt = SAEK_NOT_FINITE;
}

template <class T, class M, int N>
int launch_residual(const saek_exec& exec, const saek_dense_residual_args& a) {
  SAEK_LAUNCH((residual_in_place<T, M, N>), dim3(static_cast<unsigned>(a.rows)), threads_for(a.d_in, N), 0,
              stream_of(exec), a, exec.skip);
  SAEK_LAUNCH((add_residuals<T>), dim3(1), kSumThreads, 0, stream_of(exec), a, exec.skip);
  return launched();
}

template <class T, class M>
int dense_residual_of(const saek_exec& exec, const saek_dense_residual_args& a) {
  constexpr int N = kPiece<M>;
  return in_pieces<N>(a.d_in, of<M>(a.grad), of<T>(a.x), of<T>(a.b_dec))
             ? launch_residual<T, M, N>(exec, a)
             : launch_residual<T, M, 1>(exec, a);
}

template <class T, class M>
__global__ void __launch_bounds__(kThreads, 3) mask_rows(saek_dense_mask_args a, const int64_t* skip) {
  SAEK_SHARED(double, shared, kWarps * kColumns);
  if (skipped(skip)) return;
  const int64_t c0 = static_cast<int64_t>(blockIdx.x) * kColumns, words = (a.d_sae + 63) / 64;
  const int64_t part = blockIdx.y, parts = gridDim.y;
  const T *s = static_cast<const T*>(a.l1_weight), *q = static_cast<const T*>(a.feature_weight);
  double sums[2] = {};
  T price[2] = {1, 1};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t c = c0 + half * kWarp + lane();
    if (q && c < a.d_sae) price[half] = q[c];
  }
  const int64_t end = a.rows * (part + 1) / parts;
  for (int64_t b0 = a.rows * part / parts + warp(); b0 < end; b0 += kWarps * kAtOnce) {
    T dz[kAtOnce][2] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t b = b0 + i * kWarps;
      if (b >= end) break;
      const uint64_t bits = a.passes[b * words + blockIdx.x];
      const T penalty = static_cast<T>(*a.l1_scale * weight_at(s, b));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t c = c0 + half * kWarp + lane();
        if (c < a.d_sae && bits >> (half * kWarp + lane()) & 1)
          dz[i][half] = to<T>(static_cast<const M*>(a.dz)[b * a.d_sae + c]) + penalty * price[half];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t b = b0 + i * kWarps;
      if (b >= end) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t c = c0 + half * kWarp + lane();
        if (c < a.d_sae) static_cast<M*>(a.dz)[b * a.d_sae + c] = to<M>(dz[i][half]);
        sums[half] += static_cast<double>(dz[i][half]);
      }
    }
  }
  const int64_t n = a.d_sae - c0 < kColumns ? a.d_sae - c0 : kColumns;
  sum_warps(sums[0], sums[1], shared, a.scratch + part * a.d_sae + c0, n);
}

__global__ void __launch_bounds__(kThreads)
    add_masked(saek_dense_mask_args a, int64_t parts, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= a.d_sae) return;
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) total += a.scratch[part * a.d_sae + j];
  a.grad_b_enc[j] += total;
}

template <class T, class M>
int dense_mask_of(const saek_exec& exec, const saek_dense_mask_args& a) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.d_sae, kColumns)), static_cast<unsigned>(exec.threads));
  SAEK_LAUNCH((mask_rows<T, M>), grid, kThreads, 0, stream_of(exec), a, exec.skip);
  SAEK_LAUNCH(add_masked, dim3(static_cast<unsigned>(ceil_div(a.d_sae, kThreads))), kThreads, 0,
              stream_of(exec), a, static_cast<int64_t>(exec.threads), exec.skip);
  return launched();
}

}  // namespace

SAEK_ENTRY(dense_activate)
SAEK_ENTRY(dense_residual)
SAEK_ENTRY(dense_mask)

}  // namespace cuda
}  // namespace saek
