// The CPU kernels. Compiled once per instruction set with SAEK_ISA = portable, avx2 or avx512.
//
// Work is shared out over rows, features or fixed blocks of columns with disjoint outputs; no sum
// crosses threads, so results do not depend on how many there are. Contracts: see saek.h.

#include "../saek.h"
#include "rows.h"
#include "table.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace saek {
namespace SAEK_ISA {
namespace {

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class T>
int compact(saek_compact_args& a) {
  const T* pre = static_cast<const T*>(a.pre);
  const T* bias = static_cast<const T*>(a.b_enc);
  T* val = static_cast<T*>(a.val);
  const T clip = static_cast<T>(a.clip);
  const int64_t words = (a.d_sae + 63) / 64, whole = a.d_sae / 64;

#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t b = 0; b < a.rows; ++b) {
    const T* row = pre + b * a.d_sae;
    uint64_t* mask = a.mask + b * words;
    int64_t count = 0;
    for (int64_t w = 0; w < whole; ++w) {
      mask[w] = active_bits_64(row + 64 * w, bias + 64 * w);
      count += __builtin_popcountll(mask[w]);
    }
    if (whole < words) {
      mask[whole] = active_bits(row + 64 * whole, bias + 64 * whole, a.d_sae - 64 * whole);
      count += __builtin_popcountll(mask[whole]);
    }
    a.row_ptr[b + 1] = count;
  }
  for (int64_t b = 0; b < a.rows; ++b) a.row_ptr[b + 1] += a.row_ptr[b];
  a.needed = a.row_ptr[a.rows];
  a.saturated = 0;
  if (a.needed > a.capacity) return SAEK_OVERFLOW;

  int64_t saturated = 0;
#pragma omp parallel for num_threads(a.threads) schedule(static) reduction(+ : saturated)
  for (int64_t b = 0; b < a.rows; ++b) {
    const T* row = pre + b * a.d_sae;
    int64_t out = a.row_ptr[b];
    for (int64_t w = 0; w < words; ++w) {
      for (uint64_t bits = a.mask[b * words + w]; bits != 0; bits &= bits - 1) {
        const int64_t j = 64 * w + __builtin_ctzll(bits);
        const T p = row[j] + bias[j];
        const bool over = p > clip;
        saturated += over;
        a.col[out] = static_cast<int32_t>(j);
        val[out++] = over ? -clip : p;
      }
    }
  }
  a.saturated = saturated;
  return SAEK_OK;
}

template <class T>
void decode(const saek_decode_args& a) {
  const T* b_dec = static_cast<const T*>(a.b_dec);
  const T* val = static_cast<const T*>(a.code.val);
  const int64_t d = a.d_in;

#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 16)
  for (int64_t b = 0; b < a.code.rows; ++b) {
    T* out = static_cast<T*>(a.out) + b * d;
    const int64_t first = a.code.row_ptr[b], n = a.code.row_ptr[b + 1] - first;
    for (int64_t i = 0; i < d; ++i) out[i] = b_dec[i];
    add_rows<T, true>(a.code.col + first, val + first, n, static_cast<const T*>(a.W_dec), d, out);
  }
}

// One row: e = z W_dec - xc is built in the row of `grad`, then scaled in place.
template <class T>
void residual_row(const saek_residual_args& a, int64_t b) {
  const int64_t d = a.d_in, first = a.code.row_ptr[b], n = a.code.row_ptr[b + 1] - first;
  const int32_t* col = a.code.col + first;
  const T* val = static_cast<const T*>(a.code.val) + first;
  const T* W_dec = static_cast<const T*>(a.W_dec);
  const T* xc = static_cast<const T*>(a.xc) + b * d;
  const T* w = static_cast<const T*>(a.recon_weight);
  const T* s = static_cast<const T*>(a.l1_weight);
  T* e = static_cast<T*>(a.grad) + b * d;
  T* dz = static_cast<T*>(a.dz) + first;

  for (int64_t i = 0; i < d; ++i) e[i] = -xc[i];
  add_rows<T, true>(col, val, n, W_dec, d, e);

  const T scale = static_cast<T>(a.recon_scale * (w ? static_cast<double>(w[b]) : 1.0));
  double squared = 0;
#pragma omp simd reduction(+ : squared)
  for (int64_t i = 0; i < d; ++i) {
    squared += static_cast<double>(e[i]) * static_cast<double>(e[i]);
    e[i] *= scale;
  }

  dot_rows(col, n, W_dec, d, e, dz);
  const T penalty = static_cast<T>(a.l1_scale * (s ? static_cast<double>(s[b]) : 1.0));
  double l1 = 0;
  for (int64_t k = 0; k < n; ++k) {
    l1 += static_cast<double>(magnitude(val[k]));
    dz[k] = val[k] < T(0) ? T(0) : dz[k] + penalty;
  }
  a.row_partials[2 * b] = squared;
  a.row_partials[2 * b + 1] = l1;
}

template <class T>
void residual(saek_residual_args& a) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 16)
  for (int64_t b = 0; b < a.code.rows; ++b) residual_row<T>(a, b);

  a.squared_error = 0;
  a.l1 = 0;
  for (int64_t b = 0; b < a.code.rows; ++b) {
    a.squared_error += a.row_partials[2 * b];
    a.l1 += a.row_partials[2 * b + 1];
  }
}

// Stable counting sort in `threads` blocks of rows. Block by block the rows ascend, and so do the
// places given out within a feature: the result is the same for every number of blocks.
template <class T>
void transpose(const saek_transpose_args& a) {
  const int64_t rows = a.code.rows, F = a.d_sae, blocks = a.threads;
  const T* val = static_cast<const T*>(a.code.val);
  const T* dz_in = static_cast<const T*>(a.dz);
  T* z = static_cast<T*>(a.z);
  T* dz = static_cast<T*>(a.dz_by_feature);
  T* grad_b_enc = static_cast<T*>(a.grad_b_enc);

#pragma omp parallel for num_threads(a.threads) schedule(static, 1)
  for (int64_t t = 0; t < blocks; ++t) {
    int64_t* count = a.counts + t * F;
    for (int64_t j = 0; j < F; ++j) count[j] = 0;
    const int64_t end = a.code.row_ptr[rows * (t + 1) / blocks];
    for (int64_t k = a.code.row_ptr[rows * t / blocks]; k < end; ++k) ++count[a.code.col[k]];
  }
  int64_t place = 0;
  for (int64_t j = 0; j < F; ++j) {
    a.feature_ptr[j] = place;
    for (int64_t t = 0; t < blocks; ++t) {
      const int64_t n = a.counts[t * F + j];
      a.counts[t * F + j] = place;
      place += n;
    }
  }
  a.feature_ptr[F] = place;

#pragma omp parallel for num_threads(a.threads) schedule(static, 1)
  for (int64_t t = 0; t < blocks; ++t) {
    int64_t* next = a.counts + t * F;
    for (int64_t b = rows * t / blocks; b < rows * (t + 1) / blocks; ++b) {
      for (int64_t k = a.code.row_ptr[b]; k < a.code.row_ptr[b + 1]; ++k) {
        const int64_t to = next[a.code.col[k]]++;
        a.row[to] = static_cast<int32_t>(b);
        z[to] = magnitude(val[k]);
        dz[to] = dz_in[k];
      }
    }
  }

#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t j = 0; j < F; ++j) {
    double sum = 0;
    for (int64_t k = a.feature_ptr[j]; k < a.feature_ptr[j + 1]; ++k)
      sum += static_cast<double>(dz[k]);
    grad_b_enc[j] = static_cast<T>(sum);
  }
}

template <class T>
void update_b_dec(const saek_b_dec_args& a) {
  constexpr int64_t kBlock = 64;
  const AdamScalars<T> scalars(a.adam);
  const T* grad = static_cast<const T*>(a.grad);
  const T* grad_b_enc = static_cast<const T*>(a.grad_b_enc);
  const T* W_enc = static_cast<const T*>(a.W_enc);

#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
  for (int64_t block = 0; block < (a.d_in + kBlock - 1) / kBlock; ++block) {
    const int64_t begin = block * kBlock, n = least(kBlock, a.d_in - begin);
    double sum[kBlock] = {};
    for (int64_t b = 0; b < a.rows; ++b) {
      const T* row = grad + b * a.d_in + begin;
      for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<double>(row[i]);
    }
    for (int64_t j = 0; j < a.d_sae; ++j) {
      const T* row = W_enc + j * a.d_in + begin;
      const double g = static_cast<double>(grad_b_enc[j]);
      for (int64_t i = 0; i < n; ++i) sum[i] -= g * static_cast<double>(row[i]);
    }
    T gradient[kBlock];
    for (int64_t i = 0; i < n; ++i) gradient[i] = static_cast<T>(sum[i]);
    adam(static_cast<T*>(a.b_dec.value) + begin, static_cast<T*>(a.b_dec.m) + begin,
         static_cast<T*>(a.b_dec.v) + begin, gradient, n, scalars);
  }
}

// gradient -= (<gradient, row> / <row, row>) row; a row of zeros has no direction to remove.
template <class T>
void remove_parallel(T* __restrict gradient, const T* __restrict row, int64_t d) {
  const T length2 = dot(row, row, d);
  if (length2 == T(0)) return;
  const T share = dot(gradient, row, d) / length2;
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) gradient[i] -= share * row[i];
}

template <class T>
void to_unit_length(T* __restrict row, int64_t d) {
  const T length2 = dot(row, row, d);
  if (length2 == T(0)) return;
  const T factor = T(1) / square_root(length2);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) row[i] *= factor;
}

template <class T>
void update_feature(const saek_features_args& a, const AdamScalars<T>& scalars, int64_t j,
                    T* scratch) {
  const int64_t d = a.d_in, first = a.entries.feature_ptr[j];
  const int64_t n = a.entries.feature_ptr[j + 1] - first;
  const int32_t* rows = a.entries.row + first;
  T* grad_enc = scratch;
  T* grad_dec = scratch + d;
  for (int64_t i = 0; i < 2 * d; ++i) scratch[i] = T(0);
  add_rows<T, false>(rows, static_cast<const T*>(a.entries.dz) + first, n,
                     static_cast<const T*>(a.xc), d, grad_enc);
  add_rows<T, false>(rows, static_cast<const T*>(a.entries.z) + first, n,
                     static_cast<const T*>(a.grad), d, grad_dec);

  const auto update = [&](const saek_moments& p, int64_t at, const T* gradient, int64_t count) {
    adam(static_cast<T*>(p.value) + at, static_cast<T*>(p.m) + at, static_cast<T*>(p.v) + at,
         gradient, count, scalars);
  };
  T* decoder_row = static_cast<T*>(a.W_dec.value) + j * d;
  update(a.W_enc, j * d, grad_enc, d);
  update(a.b_enc, j, static_cast<const T*>(a.grad_b_enc) + j, 1);
  remove_parallel(grad_dec, decoder_row, d);
  update(a.W_dec, j * d, grad_dec, d);
  to_unit_length(decoder_row, d);
}

template <class T>
void update_features(const saek_features_args& a) {
  const AdamScalars<T> scalars(a.adam);
#pragma omp parallel num_threads(a.threads)
  {
    T* scratch = static_cast<T*>(a.scratch) + this_thread() * 2 * a.d_in;
#pragma omp for schedule(dynamic, 16)
    for (int64_t j = 0; j < a.entries.d_sae; ++j) update_feature<T>(a, scalars, j, scratch);
  }
}

}  // namespace

const Table& table() {
  static const Table built = {
      {compact<float>, compact<double>},
      {decode<float>, decode<double>},
      {residual<float>, residual<double>},
      {transpose<float>, transpose<double>},
      {update_b_dec<float>, update_b_dec<double>},
      {update_features<float>, update_features<double>},
  };
  return built;
}

}  // namespace SAEK_ISA
}  // namespace saek
