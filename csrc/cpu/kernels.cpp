// The CPU kernels. Compiled once per instruction set with SAEK_ISA = portable, avx2 or avx512.
//
// Work is shared out over rows, features or fixed blocks of columns with disjoint outputs; no sum
// crosses threads, so results do not depend on how many there are. Contracts: see saek.h.

#include "../saek.h"
#include "rows.h"
#include "../table.h"

namespace saek {
namespace SAEK_ISA {
namespace {

template <class T>
const T* of(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* of(void* p) {
  return static_cast<T*>(p);
}

// A weight that may be absent.
template <class T>
double weight_at(const T* weights, int64_t i) {
  return weights ? static_cast<double>(weights[i]) : 1.0;
}

// ---- The code ---------------------------------------------------------------------------------------

template <class T>
int compact(const saek_exec& exec, const saek_compact_args& a) {
  const T* pre = of<T>(a.pre);
  const T* bias = of<T>(a.b_enc);
  T* val = of<T>(a.out.val);
  int64_t* row_ptr = a.out.row_ptr;
  const T clip = static_cast<T>(a.clip);
  const int64_t words = (a.d_sae + 63) / 64, whole = a.d_sae / 64;

#pragma omp parallel for num_threads(exec.threads) schedule(static)
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
    row_ptr[b + 1] = count;
  }
  for (int64_t b = 0; b < a.rows; ++b) row_ptr[b + 1] += row_ptr[b];
  if (!fits(a.out, row_ptr[a.rows], a.rows * a.d_sae)) return SAEK_OVERFLOW;

  int64_t saturated = 0;
#pragma omp parallel for num_threads(exec.threads) schedule(static) reduction(+ : saturated)
  for (int64_t b = 0; b < a.rows; ++b) {
    const T* row = pre + b * a.d_sae;
    int64_t out = row_ptr[b];
    for (int64_t w = 0; w < words; ++w) {
      for (uint64_t bits = a.mask[b * words + w]; bits != 0; bits &= bits - 1) {
        const int64_t j = 64 * w + __builtin_ctzll(bits);
        const T p = row[j] + bias[j];
        const bool over = p > clip;
        saturated += over;
        a.out.col[out] = static_cast<int32_t>(j);
        val[out++] = over ? -clip : p;
      }
    }
  }
  a.out.counters[1] += saturated;
  return SAEK_OK;
}

template <class T>
int gather(const saek_exec& exec, const saek_gather_args& a) {
  const T* bias = of<T>(a.b_enc);
  T* pre = of<T>(a.scratch);
  T* val = of<T>(a.out.val);
  int64_t* row_ptr = a.out.row_ptr;
  const T clip = static_cast<T>(a.clip);

#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 16)
  for (int64_t b = 0; b < a.rows; ++b) {
    const T* x = of<T>(a.xc) + b * a.d_in;
    int64_t count = 0;
    for (int64_t k = a.support_ptr[b]; k < a.support_ptr[b + 1]; ++k) {
      const int64_t j = a.support_col[k];
      pre[k] = dot(of<T>(a.W_enc) + j * a.d_in, x, a.d_in) + bias[j];
      count += !(pre[k] <= T(0));
    }
    row_ptr[b + 1] = count;
  }
  for (int64_t b = 0; b < a.rows; ++b) row_ptr[b + 1] += row_ptr[b];
  if (!fits(a.out, row_ptr[a.rows], a.support_length)) return SAEK_OVERFLOW;

  int64_t saturated = 0;
#pragma omp parallel for num_threads(exec.threads) schedule(static) reduction(+ : saturated)
  for (int64_t b = 0; b < a.rows; ++b) {
    int64_t out = row_ptr[b];
    for (int64_t k = a.support_ptr[b]; k < a.support_ptr[b + 1]; ++k) {
      if (pre[k] <= T(0)) continue;
      const bool over = pre[k] > clip;
      saturated += over;
      a.out.col[out] = a.support_col[k];
      val[out++] = over ? -clip : pre[k];
    }
  }
  a.out.counters[1] += saturated;
  return SAEK_OK;
}

// ---- By row -----------------------------------------------------------------------------------------

template <class T>
int decode(const saek_exec& exec, const saek_decode_args& a) {
  const T* bias = of<T>(a.bias);
  const T* val = of<T>(a.code.val);
  const int64_t d = a.d_in;

#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 16)
  for (int64_t b = 0; b < a.code.rows; ++b) {
    T* out = of<T>(a.out) + b * d;
    const int64_t first = a.code.row_ptr[b], n = a.code.row_ptr[b + 1] - first;
    for (int64_t i = 0; i < d; ++i) out[i] = bias ? bias[i] : T(0);
    add_rows<T, false>(a.code.col + first, val + first, n, of<T>(a.matrix), d, out);
  }
  return SAEK_OK;
}

// Scales e = xhat - x in place by recon_scale w_b; returns |e|^2 from before.
template <class T>
double scale_residual(T* __restrict e, int64_t d, T scale) {
  double squared = 0;
#pragma omp simd reduction(+ : squared)
  for (int64_t i = 0; i < d; ++i) {
    squared += static_cast<double>(e[i]) * static_cast<double>(e[i]);
    e[i] *= scale;
  }
  return squared;
}

template <class T>
int residual(const saek_exec& exec, const saek_residual_args& a) {
  const T *W_dec = of<T>(a.W_dec), *w = of<T>(a.recon_weight), *s = of<T>(a.l1_weight);
  const T* q = of<T>(a.feature_weight);
  const int64_t d = a.d_in, rows = a.code.rows;

#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 16)
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t first = a.code.row_ptr[b], n = a.code.row_ptr[b + 1] - first;
    const int32_t* col = a.code.col + first;
    const T* val = of<T>(a.code.val) + first;
    const T *x = of<T>(a.x) + b * d, *b_dec = of<T>(a.b_dec);
    T* e = of<T>(a.grad) + b * d;
    T* dz = of<T>(a.dz) + first;

    for (int64_t i = 0; i < d; ++i) e[i] = b_dec ? b_dec[i] - x[i] : -x[i];
    add_rows<T, true>(col, val, n, W_dec, d, e);
    const double w_b = weight_at(w, b), s_b = weight_at(s, b);
    const double squared = scale_residual(e, d, static_cast<T>(a.recon_scale * w_b));
    dot_rows(col, n, W_dec, d, e, dz);
    const T penalty = static_cast<T>(*a.l1_scale * s_b);
    double l1 = 0;
    for (int64_t k = 0; k < n; ++k) {
      const T q_j = q ? q[col[k]] : T(1);
      l1 += static_cast<double>(q_j) * static_cast<double>(magnitude(val[k]));
      dz[k] = val[k] < T(0) ? T(0) : dz[k] + penalty * q_j;
    }
    double* sums = a.row_sums + 4 * b;
    sums[0] = squared;
    sums[1] = l1;
    sums[2] = w_b * squared;
    sums[3] = s_b * l1;
  }

  for (int i = 0; i < 4; ++i) a.sums[i] = 0;
  for (int64_t b = 0; b < rows; ++b)
    for (int i = 0; i < 4; ++i) a.sums[i] += a.row_sums[4 * b + i];
  return SAEK_OK;
}

template <class T>
int dz(const saek_exec& exec, const saek_dz_args& a) {
  const T *g_l1 = of<T>(a.grad_l1), *q = of<T>(a.feature_weight);
  const T *g_activity = of<T>(a.grad_activity), *g_val = of<T>(a.grad_val);

#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 16)
  for (int64_t b = 0; b < a.code.rows; ++b) {
    const int64_t first = a.code.row_ptr[b], n = a.code.row_ptr[b + 1] - first;
    const int32_t* col = a.code.col + first;
    const T* val = of<T>(a.code.val) + first;
    T* out = of<T>(a.dz) + first;
    if (a.grad)
      dot_rows(col, n, of<T>(a.W_dec), a.d_in, of<T>(a.grad) + b * a.d_in, out);
    else
      for (int64_t k = 0; k < n; ++k) out[k] = T(0);
    for (int64_t k = 0; k < n; ++k) {
      if (g_l1) out[k] += g_l1[b] * (q ? q[col[k]] : T(1));
      if (g_activity) out[k] += g_activity[col[k]];
      if (g_val) out[k] += g_val[first + k];
      if (val[k] < T(0)) out[k] = T(0);
    }
  }
  return SAEK_OK;
}

// ---- By feature -------------------------------------------------------------------------------------

// Stable counting sort in `threads` blocks of rows. Block by block the rows ascend, and so do the
// places given out within a feature: the result is the same for every number of blocks.
template <class T>
int transpose(const saek_exec& exec, const saek_transpose_args& a) {
  const int64_t rows = a.code.rows, F = a.d_sae, blocks = exec.threads;
  const T *val = of<T>(a.code.val), *dz_in = of<T>(a.dz), *r = of<T>(a.row_weight);
  T *z = of<T>(a.z), *dz = of<T>(a.dz_by_feature);
  T *grad_b_enc = of<T>(a.grad_b_enc), *z_sum = of<T>(a.z_sum);

#pragma omp parallel for num_threads(exec.threads) schedule(static, 1)
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

#pragma omp parallel for num_threads(exec.threads) schedule(static, 1)
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

#pragma omp parallel for num_threads(exec.threads) schedule(static)
  for (int64_t j = 0; j < F; ++j) {
    double sum = 0, size = 0;
    for (int64_t k = a.feature_ptr[j]; k < a.feature_ptr[j + 1]; ++k) {
      sum += static_cast<double>(dz[k]);
      size += weight_at(r, a.row[k]) * static_cast<double>(z[k]);
    }
    grad_b_enc[j] = static_cast<T>(sum);
    z_sum[j] = static_cast<T>(size);
  }
  return SAEK_OK;
}

// Both sums in a fixed number of shares of the rows, so that the order of additions is always the same.
template <class T>
int b_dec_gradient(const saek_exec& exec, const saek_b_dec_gradient_args& a) {
  constexpr int64_t kShares = SAEK_B_DEC_SHARES;
  const T *grad = of<T>(a.grad), *grad_b_enc = of<T>(a.grad_b_enc), *W_enc = of<T>(a.W_enc);
  const int64_t d = a.d_in;

#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 1)
  for (int64_t share = 0; share < kShares; ++share) {
    double* __restrict sum = a.scratch + share * d;
    for (int64_t i = 0; i < d; ++i) sum[i] = 0;
    for (int64_t b = a.rows * share / kShares; b < a.rows * (share + 1) / kShares; ++b) {
      const T* __restrict row = grad + b * d;
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) sum[i] += static_cast<double>(row[i]);
    }
    for (int64_t j = a.d_sae * share / kShares; j < a.d_sae * (share + 1) / kShares; ++j) {
      const T* __restrict row = W_enc + j * d;
      const double g = static_cast<double>(grad_b_enc[j]);
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) sum[i] -= g * static_cast<double>(row[i]);
    }
  }
  for (int64_t share = 1; share < kShares; ++share)
    for (int64_t i = 0; i < d; ++i) a.scratch[i] += a.scratch[share * d + i];
  for (int64_t i = 0; i < d; ++i) of<T>(a.out)[i] = static_cast<T>(a.scratch[i]);
  return SAEK_OK;
}

// The gradient rows of feature j, each made only where asked for.
template <class T>
void gradient_rows(const saek_gradient& g, int64_t j, T* dW_enc, T* dW_dec) {
  const int64_t d = g.d_in;
  const auto make = [&](T* out, const void* ready, const void* weights, const void* matrix) {
    if (g.entries.feature_ptr == nullptr) {
      const T* row = of<T>(ready) + j * d;
      for (int64_t i = 0; i < d; ++i) out[i] = row[i];
      return;
    }
    const int64_t first = g.entries.feature_ptr[j], n = g.entries.feature_ptr[j + 1] - first;
    for (int64_t i = 0; i < d; ++i) out[i] = T(0);
    add_rows<T, false>(g.entries.row + first, of<T>(weights) + first, n, of<T>(matrix), d, out);
  };
  if (dW_enc) make(dW_enc, g.dW_enc, g.entries.dz, g.xc);
  if (dW_dec) {
    make(dW_dec, g.dW_dec, g.entries.z, g.grad);
    if (g.pull) {
      const T pull = of<T>(g.pull)[j];
      const T* row = of<T>(g.W_dec) + j * d;
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) dW_dec[i] += pull * row[i];
    }
  }
}

template <class T>
int feature_gradients(const saek_exec& exec, const saek_feature_gradients_args& a) {
  T *dW_enc = of<T>(a.dW_enc), *dW_dec = of<T>(a.dW_dec);
#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 16)
  for (int64_t j = 0; j < a.gradient.d_sae; ++j) {
    const int64_t at = j * a.gradient.d_in;
    gradient_rows<T>(a.gradient, j, dW_enc ? dW_enc + at : nullptr, dW_dec ? dW_dec + at : nullptr);
  }
  return SAEK_OK;
}

template <class T>
double squared_length(const T* row, int64_t d) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) sum += static_cast<double>(row[i]) * static_cast<double>(row[i]);
  return sum;
}

// Stores what it makes: the update then reads it, where making it again would take as long as the first time.
template <class T>
int feature_norms(const saek_exec& exec, const saek_feature_norms_args& a) {
  const int64_t d = a.gradient.d_in;
  const T* grad_b_enc = of<T>(a.gradient.grad_b_enc);
#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 16)
  for (int64_t j = 0; j < a.gradient.d_sae; ++j) {
    T *enc = of<T>(a.dW_enc) + j * d, *dec = of<T>(a.dW_dec) + j * d;
    gradient_rows<T>(a.gradient, j, enc, dec);
    const double bias = static_cast<double>(grad_b_enc[j]);
    a.out[j] = bias * bias + squared_length(enc, d) + squared_length(dec, d);
  }
  return SAEK_OK;
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
void update_moments(const saek_moments& p, int64_t at, const T* gradient, int64_t n,
                    const AdamScalars<T>& scalars) {
  adam(of<T>(p.value) + at, of<T>(p.m) + at, of<T>(p.v) + at, gradient, n, scalars);
}

template <class T>
int update_features(const saek_exec& exec, const saek_update_features_args& a) {
  const AdamScalars<T> scalars(a.adam);
  const int64_t d = a.gradient.d_in;
#pragma omp parallel num_threads(exec.threads)
  {
    T* grad_enc = of<T>(a.scratch) + this_thread() * 2 * d;
    T* grad_dec = grad_enc + d;
#pragma omp for schedule(dynamic, 16)
    for (int64_t j = 0; j < a.gradient.d_sae; ++j) {
      gradient_rows<T>(a.gradient, j, grad_enc, grad_dec);
      T* decoder_row = of<T>(a.W_dec.value) + j * d;
      update_moments<T>(a.W_enc, j * d, grad_enc, d, scalars);
      update_moments<T>(a.b_enc, j, of<T>(a.gradient.grad_b_enc) + j, 1, scalars);
      if (a.unit_norm) remove_parallel(grad_dec, decoder_row, d);
      update_moments<T>(a.W_dec, j * d, grad_dec, d, scalars);
      if (a.unit_norm) to_unit_length(decoder_row, d);
    }
  }
  return SAEK_OK;
}

template <class T>
int update(const saek_exec& exec, const saek_update_args& a) {
  constexpr int64_t kBlock = 1024;
  const AdamScalars<T> scalars(a.adam);
#pragma omp parallel for num_threads(exec.threads) schedule(static)
  for (int64_t at = 0; at < a.n; at += kBlock)
    update_moments<T>(a.parameter, at, of<T>(a.gradient) + at, least(kBlock, a.n - at), scalars);
  return SAEK_OK;
}

template <class T>
int row_norms(const saek_exec& exec, const saek_row_norms_args& a) {
#pragma omp parallel for num_threads(exec.threads) schedule(static)
  for (int64_t j = 0; j < a.rows; ++j) {
    const T* row = of<T>(a.matrix) + j * a.d_in;
    of<T>(a.out)[j] = square_root(dot(row, row, a.d_in));
  }
  return SAEK_OK;
}

// ---- The dense phase --------------------------------------------------------------------------------

// Columns one thread works on at a time, so that their sums stay in its first-level cache, and rows
// after which these join the totals.
constexpr int64_t kColumns = 1024, kRows = 16;

template <class T, class Total>
void add_to(Total* __restrict total, T* __restrict part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    total[i] += static_cast<Total>(part[i]);
    part[i] = T(0);
  }
}

template <class T>
int dense_activate(const saek_exec& exec, const saek_dense_activate_args& a) {
  const T *bias = of<T>(a.b_enc), *r = of<T>(a.row_weight);
  const T clip = static_cast<T>(a.clip);
  const int64_t words = (a.d_sae + 63) / 64;

  int64_t saturated = 0;
#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 1) reduction(+ : saturated)
  for (int64_t block = 0; block < (a.d_sae + kColumns - 1) / kColumns; ++block) {
    const int64_t begin = block * kColumns, width = least(kColumns, a.d_sae - begin);
    T plain[kColumns] = {}, weighted[kColumns] = {}, count[kColumns] = {};
    for (int64_t b0 = 0; b0 < a.rows; b0 += kRows) {
      for (int64_t b = b0; b < least(a.rows, b0 + kRows); ++b) {
        T* __restrict z = of<T>(a.pre) + b * a.d_sae + begin;
        for (int64_t i = 0; i < width; i += 64)
          saturated += activate(z + i, bias + begin + i, clip, least(64, width - i), plain + i, count + i,
                                a.passes + b * words + (begin + i) / 64);
        if (r) {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) weighted[i] += r[b] * z[i];
        }
      }
      if (!r)
        for (int64_t i = 0; i < width; ++i) weighted[i] = plain[i];
      add_to(a.fired + begin, count, width);
      add_to(a.z_sum + begin, plain, width);
      add_to(a.z_sum + a.d_sae + begin, weighted, width);
    }
  }
  *a.saturated += saturated;
  return SAEK_OK;
}

template <class T>
int dense_residual(const saek_exec& exec, const saek_dense_residual_args& a) {
  const T *w = of<T>(a.recon_weight), *b_dec = of<T>(a.b_dec);
#pragma omp parallel for num_threads(exec.threads) schedule(static)
  for (int64_t b = 0; b < a.rows; ++b) {
    T* __restrict e = of<T>(a.grad) + b * a.d_in;
    const T* __restrict x = of<T>(a.x) + b * a.d_in;
    if (b_dec)
      for (int64_t i = 0; i < a.d_in; ++i) e[i] += b_dec[i];
#pragma omp simd
    for (int64_t i = 0; i < a.d_in; ++i) e[i] -= x[i];
    a.row_sums[b] = scale_residual(e, a.d_in, static_cast<T>(a.recon_scale * weight_at(w, b)));
  }
  for (int64_t b = 0; b < a.rows; ++b) {
    a.sums[0] += a.row_sums[b];
    a.sums[1] += weight_at(w, b) * a.row_sums[b];
  }
  return SAEK_OK;
}

template <class T>
int dense_mask(const saek_exec& exec, const saek_dense_mask_args& a) {
  const T *s = of<T>(a.l1_weight), *q = of<T>(a.feature_weight);
  const int64_t words = (a.d_sae + 63) / 64;

#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 1)
  for (int64_t block = 0; block < (a.d_sae + kColumns - 1) / kColumns; ++block) {
    const int64_t begin = block * kColumns, width = least(kColumns, a.d_sae - begin);
    T sum[kColumns] = {};
    for (int64_t b0 = 0; b0 < a.rows; b0 += kRows) {
      for (int64_t b = b0; b < least(a.rows, b0 + kRows); ++b) {
        const T penalty = static_cast<T>(*a.l1_scale * weight_at(s, b));
        T* __restrict dz = of<T>(a.dz) + b * a.d_sae + begin;
        for (int64_t i = 0; i < width; i += 64)
          add_where(dz + i, penalty, q ? q + begin + i : nullptr,
                    a.passes[b * words + (begin + i) / 64], least(64, width - i), sum + i);
      }
      add_to(a.grad_b_enc + begin, sum, width);
    }
  }
  return SAEK_OK;
}

}  // namespace

const Table& table() {
#define SAEK_ENTRY(name) {name<float>, name<double>},
  static const Table built = {SAEK_KERNELS(SAEK_ENTRY)};
#undef SAEK_ENTRY
  return built;
}

}  // namespace SAEK_ISA
}  // namespace saek
