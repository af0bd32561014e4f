// The loops over numbers that all kernels share. Included once per instruction set.
//
// Everything lives in namespace saek::SAEK_ISA and no standard-library template is used: an inline
// function of one name compiled three times would be merged by the linker into one copy, perhaps
// the one this processor cannot run.
#pragma once

#include <cstdint>
#include <math.h>

#include "../saek.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace saek {
namespace SAEK_ISA {

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Whether so many entries fit; the counters are told, and how many candidates were looked at.
inline bool fits(const saek_code_out& out, int64_t needed, int64_t candidates) {
  out.counters[0] = needed;
  out.counters[2] += candidates;
  if (needed > out.capacity) out.counters[3] = SAEK_TOO_SHORT;
  return needed <= out.capacity;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline float magnitude(float a) { return fabsf(a); }
inline double magnitude(double a) { return fabs(a); }
inline float square_root(float a) { return sqrtf(a); }
inline double square_root(double a) { return sqrt(a); }

// Bit i is set where !(pre[i] + bias[i] <= 0): positive, or NaN.
template <class T>
inline uint64_t active_bits(const T* pre, const T* bias, int64_t n) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; ++i)
    bits |= static_cast<uint64_t>(!(pre[i] + bias[i] <= T(0))) << i;
  return bits;
}

// The same for 64 columns, in whole registers where there are any.
template <class T>
inline uint64_t active_bits_64(const T* pre, const T* bias) {
  return active_bits(pre, bias, 64);
}

#if defined(__AVX512F__)
template <>
inline uint64_t active_bits_64(const float* pre, const float* bias) {
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(pre + 16 * i), _mm512_loadu_ps(bias + 16 * i));
    bits |= static_cast<uint64_t>(_mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NLE_UQ)) << (16 * i);
  }
  return bits;
}
template <>
inline uint64_t active_bits_64(const double* pre, const double* bias) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    const __m512d sum = _mm512_add_pd(_mm512_loadu_pd(pre + 8 * i), _mm512_loadu_pd(bias + 8 * i));
    bits |= static_cast<uint64_t>(_mm512_cmp_pd_mask(sum, _mm512_setzero_pd(), _CMP_NLE_UQ)) << (8 * i);
  }
  return bits;
}
#elif defined(__AVX2__)
template <>
inline uint64_t active_bits_64(const float* pre, const float* bias) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(pre + 8 * i), _mm256_loadu_ps(bias + 8 * i));
    const __m256 active = _mm256_cmp_ps(sum, _mm256_setzero_ps(), _CMP_NLE_UQ);
    bits |= static_cast<uint64_t>(_mm256_movemask_ps(active)) << (8 * i);
  }
  return bits;
}
template <>
inline uint64_t active_bits_64(const double* pre, const double* bias) {
  uint64_t bits = 0;
  for (int i = 0; i < 16; ++i) {
    const __m256d sum = _mm256_add_pd(_mm256_loadu_pd(pre + 4 * i), _mm256_loadu_pd(bias + 4 * i));
    const __m256d active = _mm256_cmp_pd(sum, _mm256_setzero_pd(), _CMP_NLE_UQ);
    bits |= static_cast<uint64_t>(_mm256_movemask_pd(active)) << (4 * i);
  }
  return bits;
}
#endif

// The dense phase, up to 64 columns of one row: pre + bias becomes z, which is added to `sum`, as is 1 to
// `count` where it is active. `passes` gets the bits where the gradient passes. Returns how many are
// above the clip.
template <class T>
inline int64_t activate(T* __restrict z, const T* __restrict bias, T clip, int64_t n, T* __restrict sum,
                        T* __restrict count, uint64_t* passes) {
  uint64_t bits = 0, above = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T p = z[i] + bias[i];
    const bool active = !(p <= T(0)), over = p > clip;
    z[i] = over ? clip : active ? p : T(0);
    sum[i] += z[i];
    count[i] += active ? T(1) : T(0);
    bits |= static_cast<uint64_t>(active) << i;
    above |= static_cast<uint64_t>(over) << i;
  }
  *passes = bits & ~above;
  return __builtin_popcountll(above);
}

// dz = dz + penalty q where its bit is set, else 0; it is added to `sum`.
template <class T>
inline void add_where(T* __restrict dz, T penalty, const T* __restrict q, uint64_t bits, int64_t n,
                      T* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) {
    dz[i] = bits >> i & 1 ? dz[i] + penalty * (q ? q[i] : T(1)) : T(0);
    sum[i] += dz[i];
  }
}

#if defined(__AVX512F__)
// The lanes of 16 that n more numbers fill.
inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : n > 0 ? static_cast<__mmask16>((1u << n) - 1) : 0;
}

template <>
inline int64_t activate(float* __restrict z, const float* __restrict bias, float clip, int64_t n,
                        float* __restrict sum, float* __restrict count, uint64_t* passes) {
  const __m512 one = _mm512_set1_ps(1), bound = _mm512_set1_ps(clip);
  uint64_t bits = 0, above = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 in = first_lanes(n - i);
    const __m512 p = _mm512_add_ps(_mm512_maskz_loadu_ps(in, z + i), _mm512_maskz_loadu_ps(in, bias + i));
    const __mmask16 active = _mm512_mask_cmp_ps_mask(in, p, _mm512_setzero_ps(), _CMP_NLE_UQ);
    const __mmask16 over = _mm512_mask_cmp_ps_mask(in, p, bound, _CMP_GT_OQ);
    const __m512 kept = _mm512_mask_mov_ps(_mm512_maskz_mov_ps(active, p), over, bound);
    const __m512 counted = _mm512_maskz_loadu_ps(in, count + i);
    _mm512_mask_storeu_ps(z + i, in, kept);
    _mm512_mask_storeu_ps(sum + i, in, _mm512_add_ps(_mm512_maskz_loadu_ps(in, sum + i), kept));
    _mm512_mask_storeu_ps(count + i, in, _mm512_mask_add_ps(counted, active, counted, one));
    bits |= static_cast<uint64_t>(active) << i;
    above |= static_cast<uint64_t>(over) << i;
  }
  *passes = bits & ~above;
  return __builtin_popcountll(above);
}
template <>
inline void add_where(float* __restrict dz, float penalty, const float* __restrict q, uint64_t bits,
                      int64_t n, float* __restrict sum) {
  const __m512 all = _mm512_set1_ps(penalty);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 in = first_lanes(n - i);
    const __m512 add = q ? _mm512_mul_ps(all, _mm512_maskz_loadu_ps(in, q + i)) : all;
    const __m512 moved = _mm512_maskz_add_ps(static_cast<__mmask16>(bits >> i & in),
                                             _mm512_maskz_loadu_ps(in, dz + i), add);
    _mm512_mask_storeu_ps(dz + i, in, moved);
    _mm512_mask_storeu_ps(sum + i, in, _mm512_add_ps(_mm512_maskz_loadu_ps(in, sum + i), moved));
  }
}
#endif

// out += sum_k |weight[k]| matrix[index[k]]   (weight[k] itself unless Absolute)
// Four rows at a time, so that `out` is loaded and stored a quarter as often.
template <class T, bool Absolute>
inline void add_rows(const int32_t* index, const T* weight, int64_t n, const T* matrix, int64_t d,
                     T* __restrict out) {
  const auto factor = [weight](int64_t k) { return Absolute ? magnitude(weight[k]) : weight[k]; };
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    const T* __restrict r0 = matrix + index[k] * d;
    const T* __restrict r1 = matrix + index[k + 1] * d;
    const T* __restrict r2 = matrix + index[k + 2] * d;
    const T* __restrict r3 = matrix + index[k + 3] * d;
    const T w0 = factor(k), w1 = factor(k + 1), w2 = factor(k + 2), w3 = factor(k + 3);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i)
      out[i] += (w0 * r0[i] + w1 * r1[i]) + (w2 * r2[i] + w3 * r3[i]);
  }
  for (; k < n; ++k) {
    const T* __restrict r0 = matrix + index[k] * d;
    const T w0 = factor(k);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] += w0 * r0[i];
  }
}

// 64 bytes of numbers, which the compiler makes of whatever registers there are.
template <class T>
struct Lanes {
  static constexpr int64_t count = 64 / sizeof(T);
  typedef T Vector __attribute__((vector_size(64)));
  typedef T Loose __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));

  static Vector load(const T* p) { return *reinterpret_cast<const Loose*>(p); }
  static T sum(Vector v) {
    T total = 0;
    for (int64_t i = 0; i < count; ++i) total += v[i];
    return total;
  }
};

// <a, b> in four sums side by side, so that no addition waits for the one before it.
template <class T>
inline T dot(const T* a, const T* b, int64_t d) {
  using L = Lanes<T>;
  constexpr int64_t n = L::count;
  typename L::Vector s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * n <= d; i += 4 * n) {
    s0 += L::load(a + i) * L::load(b + i);
    s1 += L::load(a + i + n) * L::load(b + i + n);
    s2 += L::load(a + i + 2 * n) * L::load(b + i + 2 * n);
    s3 += L::load(a + i + 3 * n) * L::load(b + i + 3 * n);
  }
  for (; i + n <= d; i += n) s0 += L::load(a + i) * L::load(b + i);
  T rest = 0;
  for (; i < d; ++i) rest += a[i] * b[i];
  return L::sum((s0 + s1) + (s2 + s3)) + rest;
}

// out[k] = <matrix[index[k]], vector>
template <class T>
inline void dot_rows(const int32_t* index, int64_t n, const T* matrix, int64_t d,
                     const T* __restrict vector, T* __restrict out) {
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    const T* __restrict r0 = matrix + index[k] * d;
    const T* __restrict r1 = matrix + index[k + 1] * d;
    const T* __restrict r2 = matrix + index[k + 2] * d;
    const T* __restrict r3 = matrix + index[k + 3] * d;
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < d; ++i) {
      s0 += vector[i] * r0[i];
      s1 += vector[i] * r1[i];
      s2 += vector[i] * r2[i];
      s3 += vector[i] * r3[i];
    }
    out[k] = s0;
    out[k + 1] = s1;
    out[k + 2] = s2;
    out[k + 3] = s3;
  }
  for (; k < n; ++k) out[k] = dot(matrix + index[k] * d, vector, d);
}

// The numbers of one Adam update that are the same for every weight.
template <class T>
struct AdamScalars {
  T keep, scale, rate, one_minus_beta1, beta2, one_minus_beta2, v_scale, eps;

  explicit AdamScalars(const saek_adam& a)
      : keep(static_cast<T>(a.numbers->keep)),
        scale(static_cast<T>(a.grad_scale ? *a.grad_scale : 1.0)),
        rate(static_cast<T>(a.numbers->rate)),
        one_minus_beta1(static_cast<T>(1 - a.numbers->beta1)),
        beta2(static_cast<T>(a.numbers->beta2)),
        one_minus_beta2(static_cast<T>(1 - a.numbers->beta2)),
        v_scale(static_cast<T>(a.numbers->v_scale)),
        eps(static_cast<T>(a.numbers->eps)) {}
};

template <class T>
inline void adam(T* __restrict value, T* __restrict m, T* __restrict v, const T* __restrict gradient,
                 int64_t n, const AdamScalars<T>& a) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = a.scale * gradient[i];
    const T mi = m[i] + a.one_minus_beta1 * (g - m[i]);
    const T vi = a.beta2 * v[i] + a.one_minus_beta2 * (g * g);
    m[i] = mi;
    v[i] = vi;
    value[i] = a.keep * value[i] - a.rate * mi / (square_root(vi) * a.v_scale + a.eps);
  }
}

}  // namespace SAEK_ISA
}  // namespace saek
