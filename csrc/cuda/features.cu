// By feature: the entries in feature order, the gradients, and the update, all of a feature in one block.
//
// A feature's gradient rows are sums over its entries, made column by column in registers; no gradient
// tensor exists. Contracts: see saek.h.

#include "common.cuh"
#include "../table.h"

namespace saek {
namespace cuda {
namespace {

// ---- Entries by feature -----------------------------------------------------------------------------
// A counting sort in `parts` blocks of rows, as on the CPU. The columns of one row differ, so its entries
// can be placed at once; rows of a part follow one another, which keeps them in order within a feature.

constexpr int kCountThreads = 256, kColumnThreads = 256, kPlaceThreads = 128;

struct Sort {
  saek_transpose_args a;
  int64_t parts;
  int32_t* counts;      // [parts, d_sae]
  int64_t* block_sums;  // [2, blocks of kColumnThreads features]: entries, long lists
};

__device__ __forceinline__ int64_t first_row(const Sort& s, int64_t part) {
  return s.a.code.rows * part / s.parts;
}

__global__ void __launch_bounds__(kCountThreads) count_columns(Sort s, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t part = blockIdx.x, end = s.a.code.row_ptr[first_row(s, part + 1)];
  int32_t* counts = s.counts + part * s.a.d_sae;
  for (int64_t k = s.a.code.row_ptr[first_row(s, part)] + threadIdx.x; k < end; k += kCountThreads)
    atomicAdd(counts + s.a.code.col[k], 1);
}

// Counts become the entries of the parts before; feature_ptr[j + 1] holds the feature's own number.
__global__ void __launch_bounds__(kColumnThreads) sum_parts(Sort s, const int64_t* skip) {
  SAEK_SHARED(int64_t, sums, kWarp + 1);
  if (skipped(skip)) return;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  int32_t before = 0;
  if (j < s.a.d_sae) {
    constexpr int kAtOnce = 8;  // loads that need not wait for the stores before them
    for (int64_t part = 0; part < s.parts; part += kAtOnce) {
      int32_t n[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) n[i] = part + i < s.parts ? s.counts[(part + i) * s.a.d_sae + j] : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (part + i < s.parts) s.counts[(part + i) * s.a.d_sae + j] = before;
        before += n[i];
      }
    }
    s.a.feature_ptr[j + 1] = before;
  }
  const int64_t entries = block_sum(static_cast<int64_t>(before), sums);
  const int64_t longs = block_sum(static_cast<int64_t>(before > SAEK_LONG_LIST), sums);
  if (threadIdx.x == 0) {
    s.block_sums[blockIdx.x] = entries;
    s.block_sums[gridDim.x + blockIdx.x] = longs;
  }
}

// The features' numbers become their ends; the long ones are noted.
__global__ void __launch_bounds__(kColumnThreads) sum_columns(Sort s, const int64_t* skip) {
  SAEK_SHARED(int64_t, sums, kWarp + 1);
  if (skipped(skip)) return;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  int64_t before = 0, longs_before = 0;
  for (int64_t i = threadIdx.x; i < blockIdx.x; i += kColumnThreads) {
    before += s.block_sums[i];
    longs_before += s.block_sums[gridDim.x + i];
  }
  before = block_sum(before, sums);
  longs_before = block_sum(longs_before, sums);
  const int64_t n = j < s.a.d_sae ? s.a.feature_ptr[j + 1] : 0;
  const bool is_long = n > SAEK_LONG_LIST;
  int64_t total, longs;
  const int64_t start = before + block_sum_before(n, sums, &total);
  const int64_t slot = longs_before + block_sum_before(static_cast<int64_t>(is_long), sums, &longs);
  if (j < s.a.d_sae) s.a.feature_ptr[j + 1] = start + n;
  if (j == 0) s.a.feature_ptr[0] = 0;
  if (s.a.long_lists == nullptr) return;
  if (is_long && slot < s.a.slots) s.a.long_lists[1 + slot] = static_cast<int32_t>(j);
  if (threadIdx.x == 0 && blockIdx.x == gridDim.x - 1) {
    const int64_t all = longs_before + longs;
    s.a.long_lists[0] = static_cast<int32_t>(all < s.a.slots ? all : s.a.slots);
  }
}

template <class T>
__global__ void __launch_bounds__(kPlaceThreads) place_entries(Sort s, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t part = blockIdx.x;
  const T *val = static_cast<const T*>(s.a.code.val), *dz = static_cast<const T*>(s.a.dz);
  int32_t* next = s.counts + part * s.a.d_sae;
  for (int64_t row = first_row(s, part); row < first_row(s, part + 1); ++row) {
    const int64_t end = s.a.code.row_ptr[row + 1];
    for (int64_t k = s.a.code.row_ptr[row] + threadIdx.x; k < end; k += kPlaceThreads) {
      const int64_t j = s.a.code.col[k], to = s.a.feature_ptr[j] + next[j]++;
      s.a.row[to] = static_cast<int32_t>(row);
      static_cast<T*>(s.a.z)[to] = magnitude(val[k]);
      static_cast<T*>(s.a.dz_by_feature)[to] = dz[k];
    }
    __syncthreads();
  }
}

constexpr int kFeatureSumThreads = 256;

// One warp a feature.
template <class T>
__global__ void __launch_bounds__(kFeatureSumThreads)
    sum_entries(saek_transpose_args a, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * warps() + warp();
  if (j >= a.d_sae) return;
  const T *z = static_cast<const T*>(a.z), *dz = static_cast<const T*>(a.dz_by_feature);
  const T* r = static_cast<const T*>(a.row_weight);
  double sum = 0, size = 0;
  for (int64_t k = a.feature_ptr[j] + lane(); k < a.feature_ptr[j + 1]; k += kWarp) {
    sum += static_cast<double>(dz[k]);
    size += weight_at(r, a.row[k]) * static_cast<double>(z[k]);
  }
  sum = warp_sum(sum);
  size = warp_sum(size);
  if (lane() == 0) {
    static_cast<T*>(a.grad_b_enc)[j] = static_cast<T>(sum);
    static_cast<T*>(a.z_sum)[j] = static_cast<T>(size);
  }
}

template <class T, class M>
int transpose_of(const saek_exec& exec, const saek_transpose_args& a) {
  const int64_t parts = exec.threads, blocks = ceil_div(a.d_sae, kColumnThreads);
  const Sort s = {a, parts, reinterpret_cast<int32_t*>(a.counts), a.counts + ceil_div(parts, 2) * a.d_sae};
  const dim3 by_part(static_cast<unsigned>(parts)), by_column(static_cast<unsigned>(blocks));
  const cudaStream_t stream = stream_of(exec);
  const size_t bytes = static_cast<size_t>(parts * a.d_sae) * sizeof(int32_t);
  if (const int code = outcome(cudaMemsetAsync(s.counts, 0, bytes, stream))) return code;
  SAEK_LAUNCH(count_columns, by_part, kCountThreads, 0, stream, s, exec.skip);
  SAEK_LAUNCH(sum_parts, by_column, kColumnThreads, 0, stream, s, exec.skip);
  SAEK_LAUNCH(sum_columns, by_column, kColumnThreads, 0, stream, s, exec.skip);
  SAEK_LAUNCH((place_entries<T>), by_part, kPlaceThreads, 0, stream, s, exec.skip);
  SAEK_LAUNCH((sum_entries<T>), dim3(static_cast<unsigned>(ceil_div(a.d_sae, kFeatureSumThreads / kWarp))),
              kFeatureSumThreads, 0, stream, a, exec.skip);
  return launched();
}

// ---- The gradient of b_dec --------------------------------------------------------------------------

constexpr int kShareThreads = 128;

template <class T, class M>
__global__ void __launch_bounds__(kShareThreads)
    sum_share(saek_b_dec_gradient_args a, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t share = blockIdx.x, c = static_cast<int64_t>(blockIdx.y) * kShareThreads + threadIdx.x;
  if (c >= a.d_in) return;
  const M *grad = static_cast<const M*>(a.grad), *W_enc = static_cast<const M*>(a.W_enc);
  const T* grad_b_enc = static_cast<const T*>(a.grad_b_enc);
  double sum = 0;
#pragma unroll 4
  for (int64_t b = a.rows * share / SAEK_B_DEC_SHARES; b < a.rows * (share + 1) / SAEK_B_DEC_SHARES; ++b)
    sum += to<double>(grad[b * a.d_in + c]);
#pragma unroll 4
  for (int64_t j = a.d_sae * share / SAEK_B_DEC_SHARES; j < a.d_sae * (share + 1) / SAEK_B_DEC_SHARES; ++j)
    sum -= static_cast<double>(grad_b_enc[j]) * to<double>(W_enc[j * a.d_in + c]);
  a.scratch[share * a.d_in + c] = sum;
}

template <class T>
__global__ void __launch_bounds__(kShareThreads)
    sum_shares(saek_b_dec_gradient_args a, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kShareThreads + threadIdx.x;
  if (c >= a.d_in) return;
  double sum = 0;
  for (int64_t share = 0; share < SAEK_B_DEC_SHARES; ++share) sum += a.scratch[share * a.d_in + c];
  static_cast<T*>(a.out)[c] = static_cast<T>(sum);
}

template <class T, class M>
int b_dec_gradient_of(const saek_exec& exec, const saek_b_dec_gradient_args& a) {
  const unsigned columns = static_cast<unsigned>(ceil_div(a.d_in, kShareThreads));
  const cudaStream_t stream = stream_of(exec);
  SAEK_LAUNCH((sum_share<T, M>), dim3(SAEK_B_DEC_SHARES, columns), kShareThreads, 0, stream, a, exec.skip);
  SAEK_LAUNCH((sum_shares<T>), dim3(columns), kShareThreads, 0, stream, a, exec.skip);
  return launched();
}

// ---- Gradient rows ----------------------------------------------------------------------------------

// Where the gradient rows of one feature come from: `enc` and `dec` where they are ready, else entries.
template <class T>
struct Feature {
  int64_t j, first, n;
  const T *enc, *dec;
};

template <class T>
__device__ Feature<T> feature_of(const saek_gradient& g, int64_t j) {
  const saek_by_feature& e = g.entries;
  if (e.feature_ptr == nullptr)
    return {j, 0, 0, static_cast<const T*>(g.dW_enc) + j * g.d_in, static_cast<const T*>(g.dW_dec) + j * g.d_in};
  Feature<T> f = {j, e.feature_ptr[j], e.feature_ptr[j + 1] - e.feature_ptr[j], nullptr, nullptr};
  if (f.n <= SAEK_LONG_LIST || e.long_lists == nullptr) return f;
  const int32_t* noted = e.long_lists + 1;
  int from = 0, below = e.long_lists[0];
  const int all = below;
  while (from < below) {  // the first noted feature that is not before j
    const int middle = (from + below) / 2;
    if (noted[middle] < j)
      from = middle + 1;
    else
      below = middle;
  }
  if (from < all && noted[from] == j) {
    f.enc = static_cast<const T*>(g.long_rows) + 2 * from * g.d_in;
    f.dec = f.enc + g.d_in;
  }
  return f;
}

template <int N, class T, class M>
__device__ __forceinline__ Pack<T, N> encoder_gradient(const saek_gradient& g, const Feature<T>& f, int64_t c) {
  if (f.enc) return load<T, N>(f.enc + c);
  return weighted_rows<N>(g.entries.row + f.first, static_cast<const T*>(g.entries.dz) + f.first, f.n,
                          static_cast<const M*>(g.xc), g.d_in, c);
}

template <int N, class T, class M>
__device__ __forceinline__ Pack<T, N> decoder_gradient(const saek_gradient& g, const Feature<T>& f, int64_t c) {
  Pack<T, N> sum;
  if (f.dec)
    sum = load<T, N>(f.dec + c);
  else
    sum = weighted_rows<N>(g.entries.row + f.first, static_cast<const T*>(g.entries.z) + f.first, f.n,
                           static_cast<const M*>(g.grad), g.d_in, c);
  if (g.pull)
    add_scaled(sum, static_cast<const T*>(g.pull)[f.j],
               load<T, N>(static_cast<const T*>(g.W_dec) + f.j * g.d_in + c));
  return sum;
}

// Gradient rows of features with many entries, shared out by columns among blocks and by entries among
// the warps of each.
constexpr int kLongThreads = 512;

template <class T, class M, int N>
__global__ void __launch_bounds__(kLongThreads, 1) sum_long_lists(saek_gradient g, const int64_t* skip) {
  constexpr int kWarps = kLongThreads / kWarp, kColumns = kWarp * N;
  SAEK_SHARED(T, parts, kWarps * kColumns);
  if (skipped(skip)) return;
  const int64_t slot = blockIdx.x, c0 = static_cast<int64_t>(blockIdx.y) * kColumns, d = g.d_in;
  if (slot >= g.entries.long_lists[0]) return;
  const int64_t j = g.entries.long_lists[1 + slot], n = g.entries.feature_ptr[j + 1] - g.entries.feature_ptr[j];
  const int64_t from = n * warp() / kWarps, first = g.entries.feature_ptr[j] + from;
  const int64_t mine = n * (warp() + 1) / kWarps - from, c = c0 + lane() * N;
  for (int which = 0; which < 2; ++which) {
    const T* weight = static_cast<const T*>(which == 0 ? g.entries.dz : g.entries.z) + first;
    const M* matrix = static_cast<const M*>(which == 0 ? g.xc : g.grad);
    if (c < d)
      store(parts + warp() * kColumns + lane() * N,
            weighted_rows<N>(g.entries.row + first, weight, mine, matrix, d, c));
    __syncthreads();
    for (int i = threadIdx.x; i < kColumns && c0 + i < d; i += kLongThreads) {
      T sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += parts[w * kColumns + i];
      static_cast<T*>(g.long_rows)[(2 * slot + which) * d + c0 + i] = sum;
    }
    __syncthreads();
  }
}

template <class T, class M, int N>
void launch_long_lists(const saek_exec& exec, const saek_gradient& g) {
  if (g.entries.feature_ptr == nullptr || g.entries.long_lists == nullptr) return;
  const dim3 grid(static_cast<unsigned>(g.entries.slots),
                  static_cast<unsigned>(ceil_div(g.d_in, kWarp * N)));
  SAEK_LAUNCH((sum_long_lists<T, M, N>), grid, kLongThreads, 0, stream_of(exec), g, exec.skip);
}

// Whether all that a gradient is made of can be read N numbers at a time.
template <int N, class T, class M>
bool in_pieces(const saek_gradient& g) {
  return cuda::in_pieces<N>(g.d_in, of<M>(g.grad), of<M>(g.xc), of<T>(g.dW_enc), of<T>(g.dW_dec),
                            of<T>(g.W_dec), of<T>(g.long_rows));
}

template <class T, class M, int N>
__global__ void write_gradients(saek_feature_gradients_args a, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t d = a.gradient.d_in, at = blockIdx.x * d;
  const Feature<T> f = feature_of<T>(a.gradient, blockIdx.x);
  for (int64_t c = threadIdx.x * N; c < d; c += static_cast<int64_t>(blockDim.x) * N) {
    if (a.dW_enc) store_global(static_cast<T*>(a.dW_enc) + at + c, encoder_gradient<N, T, M>(a.gradient, f, c));
    if (a.dW_dec) store_global(static_cast<T*>(a.dW_dec) + at + c, decoder_gradient<N, T, M>(a.gradient, f, c));
  }
}

template <class T, class M, int N>
int launch_gradients(const saek_exec& exec, const saek_feature_gradients_args& a) {
  launch_long_lists<T, M, N>(exec, a.gradient);
  SAEK_LAUNCH((write_gradients<T, M, N>), dim3(static_cast<unsigned>(a.gradient.d_sae)),
              threads_for(a.gradient.d_in, N), 0, stream_of(exec), a, exec.skip);
  return launched();
}

template <class T, class M>
int feature_gradients_of(const saek_exec& exec, const saek_feature_gradients_args& a) {
  constexpr int N = kPiece<M>;
  return in_pieces<N, T, M>(a.gradient) && cuda::in_pieces<N>(a.gradient.d_in, of<T>(a.dW_enc), of<T>(a.dW_dec))
             ? launch_gradients<T, M, N>(exec, a)
             : launch_gradients<T, M, 1>(exec, a);
}

template <int N, class T>
__device__ __forceinline__ double squares(const Pack<T, N>& values) {
  double sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += static_cast<double>(values.at[i]) * static_cast<double>(values.at[i]);
  return sum;
}

template <class T, class M, int N>
__global__ void norm_gradients(saek_feature_norms_args a, const int64_t* skip) {
  SAEK_SHARED(double, sums, kWarp + 1);
  if (skipped(skip)) return;
  const int64_t j = blockIdx.x;
  const Feature<T> f = feature_of<T>(a.gradient, j);
  double sum = 0;
  for (int64_t c = threadIdx.x * N; c < a.gradient.d_in; c += static_cast<int64_t>(blockDim.x) * N) {
    sum += squares<N>(encoder_gradient<N, T, M>(a.gradient, f, c));
    sum += squares<N>(decoder_gradient<N, T, M>(a.gradient, f, c));
  }
  sum = block_sum(sum, sums);
  const double bias = static_cast<double>(static_cast<const T*>(a.gradient.grad_b_enc)[j]);
  if (threadIdx.x == 0) a.out[j] = sum + bias * bias;
}

template <class T, class M, int N>
int launch_norms(const saek_exec& exec, const saek_feature_norms_args& a) {
  launch_long_lists<T, M, N>(exec, a.gradient);
  SAEK_LAUNCH((norm_gradients<T, M, N>), dim3(static_cast<unsigned>(a.gradient.d_sae)),
              threads_for(a.gradient.d_in, N), 0, stream_of(exec), a, exec.skip);
  return launched();
}

template <class T, class M>
int feature_norms_of(const saek_exec& exec, const saek_feature_norms_args& a) {
  constexpr int N = kPiece<M>;
  return in_pieces<N, T, M>(a.gradient) ? launch_norms<T, M, N>(exec, a) : launch_norms<T, M, 1>(exec, a);
}

// ---- The update -------------------------------------------------------------------------------------

template <int N, class T>
__device__ __forceinline__ Pack<T, N> moved(const AdamScalars<T>& adam, const saek_moments& p, int64_t at,
                                            const Pack<T, N>& gradient) {
  T *m_at = static_cast<T*>(p.m) + at, *v_at = static_cast<T*>(p.v) + at;
  Pack<T, N> value = load<T, N>(static_cast<const T*>(p.value) + at);
  Pack<T, N> m = load<T, N>(m_at), v = load<T, N>(v_at);
#pragma unroll
  for (int i = 0; i < N; ++i) value.at[i] = adam.moved(value.at[i], m.at[i], v.at[i], gradient.at[i]);
  store_global(m_at, m);
  store_global(v_at, v);
  return value;
}

template <int N, class T, class M>
__device__ __forceinline__ void write_row(const saek_moments& p, void* copy, int64_t at, const Pack<T, N>& value) {
  store_global(static_cast<T*>(p.value) + at, value);
  if (copy) store_global(static_cast<M*>(copy) + at, value);
}

// One block a feature. A thread works on the same columns throughout, so what it keeps of a decoder row in
// `kept` needs no barrier of its own.
template <class T, class M, int N>
__global__ void update_rows(saek_update_features_args a, const int64_t* skip) {
  SAEK_SHARED(T, sums, kWarp + 1);
  SAEK_DYNAMIC_SHARED(T, shared_row);
  if (skipped(skip)) return;
  const int64_t d = a.gradient.d_in, step = static_cast<int64_t>(blockDim.x) * N;
  T* kept = a.scratch ? static_cast<T*>(a.scratch) + blockIdx.x * d : shared_row;
  const AdamScalars<T> adam(a.adam);
  for (int64_t j = blockIdx.x; j < a.gradient.d_sae; j += gridDim.x) {
    const Feature<T> f = feature_of<T>(a.gradient, j);
    const T* decoder_row = static_cast<const T*>(a.W_dec.value) + j * d;

    T along = 0, length2 = 0;
    for (int64_t c = threadIdx.x * N; c < d; c += step) {
      write_row<N, T, M>(a.W_enc, a.W_enc_copy, j * d + c,
                         moved<N>(adam, a.W_enc, j * d + c, encoder_gradient<N, T, M>(a.gradient, f, c)));
      const Pack<T, N> gradient = decoder_gradient<N, T, M>(a.gradient, f, c);
      store(kept + c, gradient);
      if (!a.unit_norm) continue;
      const Pack<T, N> row = load<T, N>(decoder_row + c);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        along += gradient.at[i] * row.at[i];
        length2 += row.at[i] * row.at[i];
      }
    }
    if (threadIdx.x == 0) {
      const Pack<T, 1> gradient = {{static_cast<const T*>(a.gradient.grad_b_enc)[j]}};
      store(static_cast<T*>(a.b_enc.value) + j, moved<1>(adam, a.b_enc, j, gradient));
    }

    T share = 0;  // of the row in its gradient; a row of zeros has no direction to remove
    if (a.unit_norm) {
      along = block_sum(along, sums);
      length2 = block_sum(length2, sums);
      share = length2 == T(0) ? T(0) : along / length2;
    }
    T moved2 = 0;
    for (int64_t c = threadIdx.x * N; c < d; c += step) {
      Pack<T, N> gradient = load<T, N>(kept + c);
      if (a.unit_norm) add_scaled(gradient, -share, load<T, N>(decoder_row + c));
      const Pack<T, N> value = moved<N>(adam, a.W_dec, j * d + c, gradient);
      if (!a.unit_norm) {
        write_row<N, T, M>(a.W_dec, a.W_dec_copy, j * d + c, value);
        continue;
      }
      store(kept + c, value);
#pragma unroll
      for (int i = 0; i < N; ++i) moved2 += value.at[i] * value.at[i];
    }
    if (!a.unit_norm) continue;
    moved2 = block_sum(moved2, sums);
    const T factor = moved2 == T(0) ? T(1) : T(1) / square_root(moved2);
    for (int64_t c = threadIdx.x * N; c < d; c += step) {
      Pack<T, N> value = load<T, N>(kept + c);
#pragma unroll
      for (int i = 0; i < N; ++i) value.at[i] *= factor;
      write_row<N, T, M>(a.W_dec, a.W_dec_copy, j * d + c, value);
    }
  }
}

template <class T, class M, int N>
int launch_update(const saek_exec& exec, const saek_update_features_args& a) {
  launch_long_lists<T, M, N>(exec, a.gradient);
  const int64_t d = a.gradient.d_in, F = a.gradient.d_sae;
  const int64_t blocks = a.scratch && exec.threads < F ? exec.threads : F;
  const int bytes = a.scratch ? 0 : static_cast<int>(d * static_cast<int64_t>(sizeof(T)));
  if (const int code = allow_shared(update_rows<T, M, N>, bytes)) return code;
  SAEK_LAUNCH((update_rows<T, M, N>), dim3(static_cast<unsigned>(blocks)), threads_for(d, N), bytes,
              stream_of(exec), a, exec.skip);
  return launched();
}

template <class T, class M>
int update_features_of(const saek_exec& exec, const saek_update_features_args& a) {
  constexpr int N = kPiece<T>;  // weights and moments are most of what is moved
  const bool pieces =
      in_pieces<N, T, M>(a.gradient) &&
      cuda::in_pieces<N>(a.gradient.d_in, of<T>(a.scratch), of<T>(a.W_enc.value), of<T>(a.W_enc.m),
                         of<T>(a.W_enc.v), of<T>(a.W_dec.value), of<T>(a.W_dec.m), of<T>(a.W_dec.v),
                         of<M>(a.W_enc_copy), of<M>(a.W_dec_copy));
  return pieces ? launch_update<T, M, N>(exec, a) : launch_update<T, M, 1>(exec, a);
}

constexpr int kUpdateThreads = 256;

template <class T>
__global__ void __launch_bounds__(kUpdateThreads) update_numbers(saek_update_args a, const int64_t* skip) {
  if (skipped(skip)) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kUpdateThreads + threadIdx.x;
  if (i >= a.n) return;
  const AdamScalars<T> adam(a.adam);
  const Pack<T, 1> gradient = {{static_cast<const T*>(a.gradient)[i]}};
  store(static_cast<T*>(a.parameter.value) + i, moved<1>(adam, a.parameter, i, gradient));
}

template <class T, class M>
int update_of(const saek_exec& exec, const saek_update_args& a) {
  SAEK_LAUNCH((update_numbers<T>), dim3(static_cast<unsigned>(ceil_div(a.n, kUpdateThreads))), kUpdateThreads,
              0, stream_of(exec), a, exec.skip);
  return launched();
}

}  // namespace

SAEK_ENTRY(transpose)
SAEK_ENTRY(b_dec_gradient)
SAEK_ENTRY(feature_gradients)
SAEK_ENTRY(feature_norms)
SAEK_ENTRY(update_features)
SAEK_ENTRY(update)

}  // namespace cuda
}  // namespace saek
