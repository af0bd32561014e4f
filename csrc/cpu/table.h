// What one instruction set's build of the CPU kernels offers; filled in kernels.cpp, used in saek.cpp.
#pragma once

#include "../saek.h"

namespace saek {

// Index 0 is float, 1 is double, as in SAEK_FLOAT32 and SAEK_FLOAT64.
struct Table {
  int (*compact[2])(saek_compact_args&);
  void (*decode[2])(const saek_decode_args&);
  void (*residual[2])(saek_residual_args&);
  void (*transpose[2])(const saek_transpose_args&);
  void (*update_b_dec[2])(const saek_b_dec_args&);
  void (*update_features[2])(const saek_features_args&);
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

}  // namespace saek
