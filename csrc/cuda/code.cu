// Which entries are active: from pre-activations of a chunk of rows, or on a given support.
//
// Two passes. The first looks at every pre-activation, leaves one bit of each and counts them by row; the
// second adds up the counts before its row and writes the entries, reading the pre-activations of set bits
// alone. Contracts: see saek.h.

#include "common.cuh"
#include "../table.h"

namespace saek {
namespace cuda {
namespace {

constexpr int kMarkThreads = 256, kMarkRows = 2, kListThreads = 256;
constexpr int64_t kSlice = 1024;  // rows that share a starting point, each adding up the counts before it

// One block takes kMarkRows rows, a thread 8 columns, so that the bias is read once for all of them.
template <class T, class M, bool Whole>
__global__ void __launch_bounds__(kMarkThreads)
    mark(const M* __restrict__ pre, const T* __restrict__ bias, T clip, int64_t rows, int64_t d_sae,
         uint8_t* mask, int32_t* counts, const int64_t* skip) {
  SAEK_SHARED(int, sums, kWarp + 1);
  if (skipped(skip)) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMarkRows, bytes = (d_sae + 63) / 64 * 8;
  int active[kMarkRows] = {}, saturated[kMarkRows] = {};
  for (int64_t i = threadIdx.x; i < bytes; i += kMarkThreads) {
    const int64_t c = 8 * i;
    const int n = c + 8 <= d_sae ? 8 : c < d_sae ? static_cast<int>(d_sae - c) : 0;
    Pack<T, 8> b = {};
    if (Whole && n == 8) b = load<T, 8>(bias + c);
    if (!Whole) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < n) b.at[e] = bias[c + e];
    }
#pragma unroll
    for (int r = 0; r < kMarkRows; ++r) {
      if (first + r >= rows) break;
      const M* row = pre + (first + r) * d_sae + c;
      Pack<T, 8> p = {};
      if (Whole && n == 8) p = load<T, 8>(row);
      if (!Whole) {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (e < n) p.at[e] = to<T>(row[e]);
      }
      unsigned bits = 0, over = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const T sum = p.at[e] + b.at[e];
        bits |= static_cast<unsigned>(e < n && !(sum <= T(0))) << e;
        over |= static_cast<unsigned>(e < n && sum > clip) << e;
      }
      mask[(first + r) * bytes + i] = static_cast<uint8_t>(bits);
      active[r] += __popc(bits);
      saturated[r] += __popc(over);
    }
  }
#pragma unroll
  for (int r = 0; r < kMarkRows; ++r) {
    const int n = block_sum(active[r], sums), over = block_sum(saturated[r], sums);
    if (threadIdx.x == 0 && first + r < rows) {
      counts[2 * (first + r)] = n;
      counts[2 * (first + r) + 1] = over;
    }
  }
}

// Where the rows of one call are listed.
template <class T>
struct Listing {
  saek_code_out out;
  const int32_t* counts;  // [rows, 2]: active, of these saturated
  int64_t rows, candidates;
  int64_t slice;  // first row of this launch
};

// The place of a row's first entry, for all threads of its block; -1 where the row does not fit.
// The block of the last row settles the counters.
template <class T>
__device__ int64_t place(const Listing<T>& l, int64_t row, int64_t* sums) {
  int64_t before = 0;
  for (int64_t i = l.slice + threadIdx.x; i < row; i += blockDim.x) before += l.counts[2 * i];
  const int64_t start = l.out.row_ptr[l.slice] + block_sum(before, sums);
  const int64_t end = start + l.counts[2 * row];
  const bool fits = end <= l.out.capacity;
  if (row == l.rows - 1) {
    int64_t saturated = 0;
    for (int64_t i = threadIdx.x; i < l.rows; i += blockDim.x) saturated += l.counts[2 * i + 1];
    saturated = block_sum(saturated, sums);
    if (threadIdx.x == 0) {
      l.out.counters[0] = end;
      l.out.counters[1] += fits ? saturated : 0;
      l.out.counters[2] += l.candidates;
      if (!fits) l.out.counters[3] = SAEK_TOO_SHORT;
    }
  }
  if (threadIdx.x == 0) l.out.row_ptr[row + 1] = end;
  return fits ? start : -1;
}

template <class T>
__device__ __forceinline__ void write_entry(const saek_code_out& out, int64_t at, int64_t j, T pre, T clip) {
  out.col[at] = static_cast<int32_t>(j);
  static_cast<T*>(out.val)[at] = pre > clip ? -clip : pre;
}

// One block a row.
template <class T, class M>
__global__ void __launch_bounds__(kListThreads)
    list_marked(Listing<T> l, const M* __restrict__ pre, const T* __restrict__ bias, T clip,
                int64_t d_sae, const uint64_t* mask, const int64_t* skip) {
  SAEK_SHARED(int64_t, sums, kWarp + 1);
  SAEK_SHARED(int, places, kWarp + 1);
  SAEK_SHARED(int, stop, 1);
  if (block_skipped(skip, stop)) return;  // the block of the last row may write there
  const int64_t row = l.slice + blockIdx.x, words = (d_sae + 63) / 64;
  int64_t start = place(l, row, sums);
  if (start < 0) return;
  for (int64_t w0 = 0; w0 < words; w0 += kListThreads) {
    const int64_t w = w0 + threadIdx.x;
    uint64_t bits = w < words ? mask[row * words + w] : 0;
    int total;
    int64_t at = start + block_sum_before(__popcll(bits), places, &total);
    for (; bits != 0; bits &= bits - 1) {
      const int64_t j = 64 * w + __ffsll(static_cast<long long>(bits)) - 1;
      write_entry(l.out, at++, j, to<T>(pre[row * d_sae + j]) + bias[j], clip);
    }
    start += total;
  }
}

template <class T, class M>
int compact_of(const saek_exec& exec, const saek_compact_args& a) {
  const M* pre = of<M>(a.pre);
  const T *bias = of<T>(a.b_enc), clip = static_cast<T>(a.clip);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(a.mask);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kMarkRows)));
  const cudaStream_t stream = stream_of(exec);
  if (in_pieces<8>(a.d_sae, pre, bias))
    SAEK_LAUNCH((mark<T, M, true>), grid, kMarkThreads, 0, stream, pre, bias, clip, a.rows, a.d_sae, bytes,
                a.counts, exec.skip);
  else
    SAEK_LAUNCH((mark<T, M, false>), grid, kMarkThreads, 0, stream, pre, bias, clip, a.rows, a.d_sae, bytes,
                a.counts, exec.skip);
  Listing<T> l = {a.out, a.counts, a.rows, a.rows * a.d_sae, 0};
  for (; l.slice < a.rows; l.slice += kSlice) {
    const int64_t n = a.rows - l.slice < kSlice ? a.rows - l.slice : kSlice;
    SAEK_LAUNCH((list_marked<T, M>), dim3(static_cast<unsigned>(n)), kListThreads, 0, stream, l, pre, bias,
                clip, a.d_sae, a.mask, exec.skip);
  }
  return launched();
}

// pre of the supported entries of a row, one warp an entry.
template <class T, class M, int N>
__global__ void multiply_supported(saek_gather_args a, const int64_t* skip) {
  SAEK_SHARED(int, sums, kWarp + 1);
  if (skipped(skip)) return;
  const int64_t row = blockIdx.x;
  const M *x = static_cast<const M*>(a.xc) + row * a.d_in, *W = static_cast<const M*>(a.W_enc);
  const T* bias = static_cast<const T*>(a.b_enc);
  const T clip = static_cast<T>(a.clip);
  int active = 0, saturated = 0;
  for (int64_t k = a.support_ptr[row] + warp(); k < a.support_ptr[row + 1]; k += warps()) {
    const int64_t j = a.support_col[k];
    const T pre = warp_dot<N, T>(W + j * a.d_in, x, a.d_in) + bias[j];
    if (lane() == 0) {
      static_cast<T*>(a.scratch)[k] = pre;
      active += !(pre <= T(0));
      saturated += pre > clip;
    }
  }
  const int n = block_sum(active, sums), over = block_sum(saturated, sums);
  if (threadIdx.x == 0) {
    a.counts[2 * row] = n;
    a.counts[2 * row + 1] = over;
  }
}

template <class T>
__global__ void __launch_bounds__(kListThreads)
    list_supported(Listing<T> l, saek_gather_args a, const int64_t* skip) {
  SAEK_SHARED(int64_t, sums, kWarp + 1);
  SAEK_SHARED(int, places, kWarp + 1);
  SAEK_SHARED(int, stop, 1);
  if (block_skipped(skip, stop)) return;  // the block of the last row may write there
  const int64_t row = l.slice + blockIdx.x, end = a.support_ptr[row + 1];
  const T* pre = static_cast<const T*>(a.scratch);
  int64_t start = place(l, row, sums);
  if (start < 0) return;
  for (int64_t k0 = a.support_ptr[row]; k0 < end; k0 += kListThreads) {
    const int64_t k = k0 + threadIdx.x;
    const bool active = k < end && !(pre[k] <= T(0));
    int total;
    const int before = block_sum_before(static_cast<int>(active), places, &total);
    if (active) write_entry(l.out, start + before, a.support_col[k], pre[k], static_cast<T>(a.clip));
    start += total;
  }
}

template <class T, class M>
int gather_of(const saek_exec& exec, const saek_gather_args& a) {
  constexpr int N = kPiece<M>;
  const dim3 grid(static_cast<unsigned>(a.rows));
  const cudaStream_t stream = stream_of(exec);
  if (in_pieces<N>(a.d_in, of<M>(a.xc), of<M>(a.W_enc)))
    SAEK_LAUNCH((multiply_supported<T, M, N>), grid, 256, 0, stream, a, exec.skip);
  else
    SAEK_LAUNCH((multiply_supported<T, M, 1>), grid, 256, 0, stream, a, exec.skip);
  Listing<T> l = {a.out, a.counts, a.rows, a.support_length, 0};
  for (; l.slice < a.rows; l.slice += kSlice) {
    const int64_t n = a.rows - l.slice < kSlice ? a.rows - l.slice : kSlice;
    SAEK_LAUNCH((list_supported<T>), dim3(static_cast<unsigned>(n)), kListThreads, 0, stream, l, a,
                exec.skip);
  }
  return launched();
}

}  // namespace

SAEK_ENTRY(compact)
SAEK_ENTRY(gather)

}  // namespace cuda
}  // namespace saek
