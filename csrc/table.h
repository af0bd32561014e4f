// The kernels by name, for each instruction set and for CUDA; used in saek.cpp.
#pragma once

#include "saek.h"

namespace saek {

// Every kernel of saek.h but saek_screen, in the order of that file.
#define SAEK_KERNELS(X)                                                                            \
  X(compact) X(gather) X(decode) X(residual) X(dz) X(transpose) X(b_dec_gradient)                  \
  X(feature_gradients) X(feature_norms) X(update_features) X(update) X(row_norms)                  \
  X(dense_activate) X(dense_residual) X(dense_mask)

// What one instruction set's build of the CPU kernels offers; filled in cpu/kernels.cpp.
struct Table {
  // Index 0 is float, 1 is double, as in SAEK_FLOAT32 and SAEK_FLOAT64.
#define SAEK_DECLARE(name) int (*name[2])(const saek_exec&, const saek_##name##_args&);
  SAEK_KERNELS(SAEK_DECLARE)
#undef SAEK_DECLARE
};

namespace portable {
const Table& table();
}
namespace avx2 {
const Table& table();
}
namespace avx512 {
const Table& table();
}

// The 8-bit screen, for processors with AVX-512 VNNI. Defined in cpu/screen.cpp.
namespace avx512vnni {
int64_t screen_scratch(int64_t rows, int64_t d_in, int64_t d_sae, int threads);
int screen(const saek_exec& exec, const saek_screen_args& args);
}

// Queues kernels for any of the three number formats. Defined in cuda/*.cu.
namespace cuda {
#define SAEK_DECLARE(name) int name(const saek_exec&, const saek_##name##_args&);
SAEK_KERNELS(SAEK_DECLARE)
#undef SAEK_DECLARE
}

}  // namespace saek
