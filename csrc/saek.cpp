// The C functions of saek.h: check the arguments, choose the instruction set, call its kernel.

#include "saek.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "table.h"

namespace {

struct Choice {
  const char* name;            // nullptr where SPARSEMILL_ISA cannot be met
  const saek::Table* table;
  bool screens;
};

// What this build holds and this processor runs, widest first.
int offered_here(Choice (&out)[4]) {
  int n = 0;
#ifdef SAEK_WITH_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt")) {
#ifdef SAEK_WITH_AVX512VNNI
    if (__builtin_cpu_supports("avx512vnni"))
      out[n++] = {"avx512vnni", &saek::avx512::table(), true};
#endif
    out[n++] = {"avx512", &saek::avx512::table(), false};
  }
#endif
#ifdef SAEK_WITH_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("popcnt"))
    out[n++] = {"avx2", &saek::avx2::table(), false};
#endif
  out[n++] = {"portable", &saek::portable::table(), false};
  return n;
}

Choice choose() {
  Choice offered[4];
  const int n = offered_here(offered);
  const char* wanted = std::getenv("SPARSEMILL_ISA");
  if (wanted == nullptr || *wanted == '\0') return offered[0];
  for (int i = 0; i < n; ++i)
    if (std::strcmp(wanted, offered[i].name) == 0) return offered[i];
  return {nullptr, nullptr, false};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

// What every function asks of where it runs.
int check(const saek_exec* exec) {
  if (exec == nullptr || exec->dtype < SAEK_FLOAT32 || exec->dtype > SAEK_BFLOAT16 || exec->threads < 1 ||
      (exec->device != SAEK_CPU && exec->device != SAEK_CUDA))
    return SAEK_BAD_ARGUMENT;
#ifndef SAEK_WITH_CUDA
  if (exec->device == SAEK_CUDA) return SAEK_NO_CUDA;
#endif
  if (exec->device == SAEK_CUDA) return SAEK_OK;
  if (exec->dtype == SAEK_BFLOAT16) return SAEK_UNSUPPORTED;
  return chosen().table == nullptr ? SAEK_BAD_ISA : SAEK_OK;
}

template <class... Pointers>
bool set(Pointers... pointers) {
  return (... && (pointers != nullptr));
}
template <class... Sizes>
bool sized(Sizes... sizes) {
  return (... && (sizes >= 1));
}

// Rows and columns are numbered in 32 bits.
bool fits(int64_t n) { return n >= 1 && n <= INT32_MAX; }

// What is asked of arguments. `e` tells whether what pointers point at may be read: on CUDA it may not, and
// arrays of entries must be there even if they turn out empty.
int64_t entries(const saek_exec& e, const int64_t* ptr, int64_t n) {
  return e.device == SAEK_CPU ? ptr[n] : 1;
}

bool ok(const saek_exec& e, const saek_code& c) {
  return c.row_ptr && fits(c.rows) && (entries(e, c.row_ptr, c.rows) == 0 || set(c.col, c.val));
}
bool ok(const saek_exec& e, const saek_code& c, const void* per_entry) {
  return ok(e, c) && (entries(e, c.row_ptr, c.rows) == 0 || per_entry != nullptr);
}
bool ok(const saek_code_out& o) {
  return set(o.row_ptr, o.counters) && o.capacity >= 0 && (o.capacity == 0 || set(o.col, o.val));
}
bool ok(const saek_moments& p) { return set(p.value, p.m, p.v); }
bool ok(const saek_exec& e, const saek_adam& a) {
  return set(a.numbers) && (e.device == SAEK_CUDA ||
                            (a.numbers->beta1 >= 0 && a.numbers->beta1 < 1 && a.numbers->beta2 >= 0 &&
                             a.numbers->beta2 < 1));
}
bool ok(const saek_exec& e, const saek_gradient& g) {
  const saek_by_feature& f = g.entries;
  return sized(g.d_in, g.d_sae) && (g.pull == nullptr || g.W_dec != nullptr) &&
         (f.long_lists == nullptr || (f.slots >= 1 && set(g.long_rows))) &&
         (f.feature_ptr == nullptr || entries(e, f.feature_ptr, g.d_sae) == 0 || set(f.row, f.z, f.dz));
}
// The rows of W_enc's and W_dec's gradients can be made.
bool has_enc(const saek_gradient& g) { return g.entries.feature_ptr ? set(g.xc) : set(g.dW_enc); }
bool has_dec(const saek_gradient& g) { return g.entries.feature_ptr ? set(g.grad) : set(g.dW_dec); }
bool has_both(const saek_gradient& g) { return has_enc(g) && has_dec(g); }
// Scratch memory that one device alone needs.
bool on_cpu(const saek_exec& e, const void* p) { return e.device == SAEK_CUDA || p != nullptr; }
bool on_cuda(const saek_exec& e, const void* p) { return e.device == SAEK_CPU || p != nullptr; }

bool ok(const saek_exec& e, const saek_compact_args& a) {
  return set(a.pre, a.b_enc, a.mask) && on_cuda(e, a.counts) && fits(a.rows) && fits(a.d_sae) && a.clip > 0 &&
         ok(a.out);
}
bool ok(const saek_screen_args& a) {
  return set(a.xc, a.W_enc, a.b_enc, a.scratch) &&
         reinterpret_cast<std::uintptr_t>(a.scratch) % 64 == 0 && fits(a.rows) && sized(a.d_in) &&
         fits(a.d_sae) && a.clip > 0 && ok(a.out) &&
         (a.out.capacity == 0 || set(a.list_col, a.list_val));
}
bool ok(const saek_exec& e, const saek_gather_args& a) {
  return set(a.support_ptr, a.xc, a.W_enc, a.b_enc) && on_cuda(e, a.counts) && fits(a.rows) &&
         sized(a.d_in) && a.clip > 0 && ok(a.out) && a.support_length >= 0 &&
         (e.device == SAEK_CUDA || a.support_ptr[a.rows] == a.support_length) &&
         (a.support_length == 0 || set(a.support_col, a.scratch));
}
bool ok(const saek_exec& e, const saek_decode_args& a) {
  return ok(e, a.code) && set(a.matrix, a.out) && sized(a.d_in);
}
bool ok(const saek_exec& e, const saek_residual_args& a) {
  return ok(e, a.code, a.dz) && set(a.W_dec, a.x, a.l1_scale, a.row_sums, a.grad, a.sums) && sized(a.d_in) &&
         a.shared_bytes >= 0;
}
bool ok(const saek_exec& e, const saek_dz_args& a) {
  return ok(e, a.code, a.dz) && sized(a.d_in) && (a.grad == nullptr || set(a.W_dec));
}
bool ok(const saek_exec& e, const saek_transpose_args& a) {
  return ok(e, a.code, a.dz) && set(a.counts, a.feature_ptr, a.grad_b_enc, a.z_sum) && fits(a.d_sae) &&
         (a.long_lists == nullptr || a.slots >= 1) &&
         (entries(e, a.code.row_ptr, a.code.rows) == 0 || set(a.row, a.z, a.dz_by_feature));
}
bool ok(const saek_exec&, const saek_b_dec_gradient_args& a) {
  return set(a.grad, a.grad_b_enc, a.W_enc, a.scratch, a.out) && sized(a.rows, a.d_in, a.d_sae);
}
bool ok(const saek_exec& e, const saek_feature_gradients_args& a) {
  return ok(e, a.gradient) && (a.dW_enc == nullptr || has_enc(a.gradient)) &&
         (a.dW_dec == nullptr || has_dec(a.gradient));
}
bool ok(const saek_exec& e, const saek_feature_norms_args& a) {
  return ok(e, a.gradient) && has_both(a.gradient) && set(a.gradient.grad_b_enc, a.out) &&
         on_cpu(e, a.dW_enc) && on_cpu(e, a.dW_dec);
}
bool ok(const saek_exec& e, const saek_update_features_args& a) {
  const bool row_fits = a.gradient.d_in * (e.dtype == SAEK_FLOAT64 ? 8 : 4) <= SAEK_SHARED_ROW;
  return ok(e, a.gradient) && has_both(a.gradient) && set(a.gradient.grad_b_enc) && on_cpu(e, a.scratch) &&
         (row_fits || on_cuda(e, a.scratch)) && ok(a.W_enc) && ok(a.b_enc) && ok(a.W_dec) && ok(e, a.adam);
}
bool ok(const saek_exec& e, const saek_update_args& a) {
  return set(a.gradient) && sized(a.n) && ok(a.parameter) && ok(e, a.adam);
}
bool ok(const saek_exec&, const saek_row_norms_args& a) { return set(a.matrix, a.out) && sized(a.rows, a.d_in); }
bool ok(const saek_exec& e, const saek_dense_activate_args& a) {
  return set(a.pre, a.b_enc, a.passes, a.fired, a.saturated, a.z_sum) && on_cuda(e, a.scratch) &&
         fits(a.rows) && sized(a.d_sae) && a.clip > 0;
}
bool ok(const saek_exec&, const saek_dense_residual_args& a) {
  return set(a.grad, a.x, a.row_sums, a.sums) && fits(a.rows) && sized(a.d_in);
}
bool ok(const saek_exec& e, const saek_dense_mask_args& a) {
  return set(a.dz, a.passes, a.l1_scale, a.grad_b_enc) && on_cuda(e, a.scratch) && sized(a.rows, a.d_sae);
}

}  // namespace

extern "C" {

const char* saek_error_string(int code) {
  switch (code) {
    case SAEK_OK: return "no error";
    case SAEK_BAD_ARGUMENT: return "a pointer is null or a size or constant is out of range";
    case SAEK_OVERFLOW: return "the arrays are too short for the active entries";
    case SAEK_BAD_ISA:
      return "SPARSEMILL_ISA names an instruction set this processor or build lacks";
    case SAEK_NO_CUDA: return "built without CUDA";
    case SAEK_NO_DEVICE: return "no usable CUDA driver or device";
    case SAEK_UNSUPPORTED: return "not offered for this device, instruction set, dtype or size";
    case SAEK_TOO_DENSE: return "too many candidates for the screen to pay";
    case SAEK_CUDA_FAILED: return "the CUDA runtime refused a launch";
    default: return "unknown error code";
  }
}

const char* saek_isa(void) { return chosen().name; }

int saek_has_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

#ifdef SAEK_WITH_CUDA
#define SAEK_QUEUE(name) \
  if (exec->device == SAEK_CUDA) return saek::cuda::name(*exec, *args);
#else
#define SAEK_QUEUE(name)
#endif
#define SAEK_DEFINE(name)                                                       \
  int saek_##name(const saek_exec* exec, const saek_##name##_args* args) {      \
    if (const int code = check(exec)) return code;                              \
    if (args == nullptr || !ok(*exec, *args)) return SAEK_BAD_ARGUMENT;         \
    SAEK_QUEUE(name)                                                            \
    return chosen().table->name[exec->dtype](*exec, *args);                     \
  }
SAEK_KERNELS(SAEK_DEFINE)
#undef SAEK_DEFINE
#undef SAEK_QUEUE

int64_t saek_screen_scratch(int64_t rows, int64_t d_in, int64_t d_sae, int threads) {
#ifdef SAEK_WITH_AVX512VNNI
  if (!sized(rows, d_in, d_sae, threads)) return 0;
  return saek::avx512vnni::screen_scratch(rows, d_in, d_sae, threads);
#else
  (void)rows, (void)d_in, (void)d_sae, (void)threads;
  return 0;
#endif
}

int saek_screen(const saek_exec* exec, const saek_screen_args* args) {
  if (const int code = check(exec)) return code;
  if (args == nullptr || !ok(*args)) return SAEK_BAD_ARGUMENT;
  // Sums of 65536 products of 8 bits, 255 * 128 * 65536 at most, stay below 2^31.
  if (exec->device != SAEK_CPU || !chosen().screens || exec->dtype != SAEK_FLOAT32 || args->d_in > 65536) return SAEK_UNSUPPORTED;
#ifdef SAEK_WITH_AVX512VNNI
  return saek::avx512vnni::screen(*exec, *args);
#else
  return SAEK_UNSUPPORTED;
#endif
}

#ifndef SAEK_WITH_CUDA
int saek_cuda_count(int*, int*, int*) { return SAEK_NO_CUDA; }
int saek_cuda_describe(int, saek_cuda_device*) { return SAEK_NO_CUDA; }
const char* saek_cuda_error(void) { return ""; }
#endif

}  // extern "C"
