// By row: reconstructions, residuals, losses, and the gradients of the listed entries. One block a row.
// Contracts: see saek.h.

#include "common.cuh"
#include "../table.h"

namespace saek {
namespace cuda {
namespace {

constexpr int kRowThreads = 256;  // also for short rows: dz is a warp's work for each entry
constexpr int kSumThreads = 1024;

template <class T, class M, int N>
__global__ void decode_rows(saek_decode_args a, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t row = blockIdx.x, d = a.d_in;
  const int64_t first = a.code.row_ptr[row], n = a.code.row_ptr[row + 1] - first;
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t c = threadIdx.x * N; c < d; c += static_cast<int64_t>(blockDim.x) * N) {
    Pack<T, N> sum = weighted_rows<N>(a.code.col + first, static_cast<const T*>(a.code.val) + first, n,
                                      static_cast<const M*>(a.matrix), d, c);
    if (bias) add_scaled(sum, T(1), load<T, N>(bias + c));
    store_global(static_cast<T*>(a.out) + row * d + c, sum);
  }
}

template <class T, class M>
int decode_of(const saek_exec& exec, const saek_decode_args& a) {
  constexpr int N = kPiece<M>;
  const dim3 grid(static_cast<unsigned>(a.code.rows));
  const cudaStream_t stream = stream_of(exec);
  if (in_pieces<N>(a.d_in, of<M>(a.matrix), of<T>(a.bias), of<T>(a.out)))
    SAEK_LAUNCH((decode_rows<T, M, N>), grid, threads_for(a.d_in, N), 0, stream, a, exec.skip);
  else
    SAEK_LAUNCH((decode_rows<T, M, 1>), grid, threads_for(a.d_in, 1), 0, stream, a, exec.skip);
  return launched();
}

// e = xhat - x of columns c .. c+N-1 before the reconstruction is added.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> minus_x(const T* x, const T* b_dec, int64_t c) {
  Pack<T, N> e = {};
  if (b_dec) e = load<T, N>(b_dec + c);
  add_scaled(e, T(-1), load<T, N>(x + c));
  return e;
}

// The decoder rows are needed twice, for the reconstruction and for dz: as many as shared memory holds
// (`kept`) are read once.
template <class T, class M, int N>
__global__ void residual_rows(saek_residual_args a, int64_t kept, const int64_t* skip) {
  SAEK_SHARED(double, sums, kWarp + 1);
  SAEK_DYNAMIC_SHARED(M, rows);
  if (skipped(skip)) return;
  const int64_t row = blockIdx.x, d = a.d_in;
  const int64_t first = a.code.row_ptr[row], n = a.code.row_ptr[row + 1] - first;
  const int32_t* col = a.code.col + first;
  const T *val = static_cast<const T*>(a.code.val) + first, *q = static_cast<const T*>(a.feature_weight);
  const M* __restrict__ W_dec = static_cast<const M*>(a.W_dec);
  M* grad = static_cast<M*>(a.grad) + row * d;
  const double w = weight_at(static_cast<const T*>(a.recon_weight), row);
  const double s = weight_at(static_cast<const T*>(a.l1_weight), row);
  const T scale = static_cast<T>(a.recon_scale * w), penalty = static_cast<T>(*a.l1_scale * s);

  double squared = 0, size = 0;
  for (int64_t c = threadIdx.x * N; c < d; c += static_cast<int64_t>(blockDim.x) * N) {
    Pack<T, N> e = minus_x<N>(static_cast<const T*>(a.x) + row * d, static_cast<const T*>(a.b_dec), c);
#pragma unroll 4
    for (int64_t k = 0; k < n; ++k) {
      const Pack<M, N> piece = *reinterpret_cast<const Pack<M, N>*>(W_dec + col[k] * d + c);
      if (k < kept) *reinterpret_cast<Pack<M, N>*>(rows + k * d + c) = piece;
      const T z = magnitude(val[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) e.at[i] += z * to<T>(piece.at[i]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      squared += static_cast<double>(e.at[i]) * static_cast<double>(e.at[i]);
      e.at[i] *= scale;
    }
    store_global(grad + c, e);
  }
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x)
    size += (q ? static_cast<double>(q[col[k]]) : 1.0) * static_cast<double>(magnitude(val[k]));
  squared = block_sum(squared, sums);
  size = block_sum(size, sums);
  if (threadIdx.x == 0) {
    double* out = a.row_sums + 4 * row;
    out[0] = squared;
    out[1] = size;
    out[2] = w * squared;
    out[3] = s * size;
  }
  // block_sum has let every thread see the whole of `grad` and `rows`.
  T* dz = static_cast<T*>(a.dz) + first;
  for (int64_t k = warp(); k < n; k += warps()) {
    const M* decoder_row = k < kept ? rows + k * d : W_dec + col[k] * d;
    const T product = warp_dot<N, T>(grad, decoder_row, d);
    if (lane() == 0) dz[k] = val[k] < T(0) ? T(0) : product + penalty * (q ? q[col[k]] : T(1));
  }
}

// The sums over rows, in one order whatever the machine.
__global__ void __launch_bounds__(kSumThreads)
    sum_residuals(const double* row_sums, int64_t rows, double* out, int64_t* halt, const int64_t* skip) {
  SAEK_SHARED(double, sums, kWarp + 1);
  if (skipped(skip)) return;
  double part[4] = {};
  for (int64_t b = threadIdx.x; b < rows; b += kSumThreads)
    for (int i = 0; i < 4; ++i) part[i] += row_sums[4 * b + i];
  for (int i = 0; i < 4; ++i) part[i] = block_sum(part[i], sums);
  if (threadIdx.x != 0) return;
  bool finite = true;
  for (int i = 0; i < 4; ++i) {
    out[i] = part[i];
    finite = finite && isfinite(part[i]);
  }
  if (halt && !finite) *halt = SAEK_NOT_FINITE;
}

template <class T, class M, int N>
int launch_residual(const saek_exec& exec, const saek_residual_args& a) {
  const int64_t kept = a.shared_bytes / (a.d_in * static_cast<int64_t>(sizeof(M)));
  const int bytes = static_cast<int>(kept * a.d_in * static_cast<int64_t>(sizeof(M)));
  if (const int code = allow_shared(residual_rows<T, M, N>, bytes)) return code;
  const dim3 grid(static_cast<unsigned>(a.code.rows));
  const cudaStream_t stream = stream_of(exec);
  SAEK_LAUNCH((residual_rows<T, M, N>), grid, kRowThreads, bytes, stream, a, kept, exec.skip);
  SAEK_LAUNCH(sum_residuals, dim3(1), kSumThreads, 0, stream, a.row_sums, a.code.rows, a.sums, a.halt,
              exec.skip);
  return launched();
}

template <class T, class M>
int residual_of(const saek_exec& exec, const saek_residual_args& a) {
  constexpr int N = kPiece<M>;
  return in_pieces<N>(a.d_in, of<M>(a.W_dec), of<T>(a.x), of<T>(a.b_dec), of<M>(a.grad))
             ? launch_residual<T, M, N>(exec, a)
             : launch_residual<T, M, 1>(exec, a);
}

template <class T, class M, int N>
__global__ void dz_rows(saek_dz_args a, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t row = blockIdx.x, d = a.d_in;
  const T *val = static_cast<const T*>(a.code.val), *q = static_cast<const T*>(a.feature_weight);
  const T *g_l1 = static_cast<const T*>(a.grad_l1), *g_val = static_cast<const T*>(a.grad_val);
  const T* g_activity = static_cast<const T*>(a.grad_activity);
  const M *grad = static_cast<const M*>(a.grad), *W_dec = static_cast<const M*>(a.W_dec);
  for (int64_t k = a.code.row_ptr[row] + warp(); k < a.code.row_ptr[row + 1]; k += warps()) {
    const int64_t j = a.code.col[k];
    T sum = grad ? warp_dot<N, T>(grad + row * d, W_dec + j * d, d) : T(0);
    if (lane() != 0) continue;
    if (g_l1) sum += g_l1[row] * (q ? q[j] : T(1));
    if (g_activity) sum += g_activity[j];
    if (g_val) sum += g_val[k];
    static_cast<T*>(a.dz)[k] = val[k] < T(0) ? T(0) : sum;
  }
}

template <class T, class M>
int dz_of(const saek_exec& exec, const saek_dz_args& a) {
  constexpr int N = kPiece<M>;
  const dim3 grid(static_cast<unsigned>(a.code.rows));
  const cudaStream_t stream = stream_of(exec);
  if (in_pieces<N>(a.d_in, of<M>(a.W_dec), of<M>(a.grad)))
    SAEK_LAUNCH((dz_rows<T, M, N>), grid, kRowThreads, 0, stream, a, exec.skip);
  else
    SAEK_LAUNCH((dz_rows<T, M, 1>), grid, kRowThreads, 0, stream, a, exec.skip);
  return launched();
}

constexpr int kNormThreads = 256;

template <class T, int N>
__global__ void __launch_bounds__(kNormThreads) norm_rows(saek_row_norms_args a, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * warps() + warp();
  if (row >= a.rows) return;  // the whole warp
  const T* numbers = static_cast<const T*>(a.matrix) + row * a.d_in;
  const T squared = warp_dot<N, T>(numbers, numbers, a.d_in);
  if (lane() == 0) static_cast<T*>(a.out)[row] = square_root(squared);
}

template <class T, class M>
int row_norms_of(const saek_exec& exec, const saek_row_norms_args& a) {
  constexpr int N = kPiece<T>;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kNormThreads / kWarp)));
  const cudaStream_t stream = stream_of(exec);
  if (in_pieces<N>(a.d_in, of<T>(a.matrix)))
    SAEK_LAUNCH((norm_rows<T, N>), grid, kNormThreads, 0, stream, a, exec.skip);
  else
    SAEK_LAUNCH((norm_rows<T, 1>), grid, kNormThreads, 0, stream, a, exec.skip);
  return launched();
}

}  // namespace

SAEK_ENTRY(decode)
SAEK_ENTRY(residual)
SAEK_ENTRY(dz)
SAEK_ENTRY(row_norms)

}  // namespace cuda
}  // namespace saek
