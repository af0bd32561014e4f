// The C functions of saek.h: check the arguments, choose the instruction set, call its kernel.

#include "saek.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/table.h"

namespace {

struct Choice {
  const char* name;            // nullptr where SPARSEMILL_ISA cannot be met
  const saek::Table* table;
};

// What this build holds and this processor runs, widest first.
int candidates(Choice (&out)[3]) {
  int n = 0;
#ifdef SAEK_WITH_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt"))
    out[n++] = {"avx512", &saek::avx512::table()};
#endif
#ifdef SAEK_WITH_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("popcnt"))
    out[n++] = {"avx2", &saek::avx2::table()};
#endif
  out[n++] = {"portable", &saek::portable::table()};
  return n;
}

Choice choose() {
  Choice offered[3];
  const int n = candidates(offered);
  const char* wanted = std::getenv("SPARSEMILL_ISA");
  if (wanted == nullptr || *wanted == '\0') return offered[0];
  for (int i = 0; i < n; ++i)
    if (std::strcmp(wanted, offered[i].name) == 0) return offered[i];
  return {nullptr, nullptr};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

bool code_ok(const saek_code& c) {
  // Row numbers are stored in 32 bits by the transpose.
  return c.row_ptr && c.rows >= 1 && c.rows <= INT32_MAX;
}

bool moments_ok(const saek_moments& p) { return p.value && p.m && p.v; }

bool adam_ok(const saek_adam& a) {
  return a.step >= 1 && a.beta1 >= 0 && a.beta1 < 1 && a.beta2 >= 0 && a.beta2 < 1;
}

}  // namespace

// A function may find its dtype, its table and its arguments wrong in one way each.
#define SAEK_CHECK(condition)                                                      \
  if (args == nullptr || (dtype != SAEK_FLOAT32 && dtype != SAEK_FLOAT64) ||       \
      !(condition) || args->threads < 1)                                           \
    return SAEK_BAD_ARGUMENT;                                                      \
  if (chosen().table == nullptr) return SAEK_BAD_ISA;

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

int saek_compact(int dtype, saek_compact_args* args) {
  SAEK_CHECK(args->pre && args->b_enc && args->mask && args->row_ptr && args->rows >= 1 &&
             args->d_sae >= 1 && args->d_sae <= INT32_MAX && args->clip > 0 && args->capacity >= 0 &&
             (args->capacity == 0 || (args->col && args->val)))
  return chosen().table->compact[dtype](*args);
}

int saek_decode(int dtype, const saek_decode_args* args) {
  SAEK_CHECK(code_ok(args->code) && args->W_dec && args->b_dec && args->out && args->d_in >= 1)
  chosen().table->decode[dtype](*args);
  return SAEK_OK;
}

int saek_residual(int dtype, saek_residual_args* args) {
  SAEK_CHECK(code_ok(args->code) && args->W_dec && args->xc && args->row_partials && args->grad &&
             args->d_in >= 1)
  chosen().table->residual[dtype](*args);
  return SAEK_OK;
}

int saek_transpose(int dtype, const saek_transpose_args* args) {
  SAEK_CHECK(code_ok(args->code) && args->counts && args->feature_ptr && args->grad_b_enc &&
             args->d_sae >= 1 && args->d_sae <= INT32_MAX)
  chosen().table->transpose[dtype](*args);
  return SAEK_OK;
}

int saek_update_b_dec(int dtype, const saek_b_dec_args* args) {
  SAEK_CHECK(args->grad && args->grad_b_enc && args->W_enc && moments_ok(args->b_dec) &&
             adam_ok(args->adam) && args->rows >= 1 && args->d_in >= 1 && args->d_sae >= 1)
  chosen().table->update_b_dec[dtype](*args);
  return SAEK_OK;
}

int saek_update_features(int dtype, const saek_features_args* args) {
  SAEK_CHECK(args->entries.feature_ptr && args->grad && args->xc && args->grad_b_enc &&
             args->scratch && moments_ok(args->W_enc) && moments_ok(args->b_enc) &&
             moments_ok(args->W_dec) && adam_ok(args->adam) && args->d_in >= 1 &&
             args->entries.d_sae >= 1)
  chosen().table->update_features[dtype](*args);
  return SAEK_OK;
}

#ifndef SAEK_WITH_CUDA
int saek_cuda_count(int*, int*, int*) { return SAEK_NO_CUDA; }
int saek_cuda_describe(int, saek_cuda_device*) { return SAEK_NO_CUDA; }
#endif

}  // extern "C"
