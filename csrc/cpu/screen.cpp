// The code of a batch at a fraction of the matrix product's cost, for processors with AVX-512 VNNI.
//
// Rows x and w of xc and W_enc are rounded to 8 bits, x ~ sx q and w ~ sw p. With the lengths of what
// the rounding lost, |x - sx q| and |w - sw p|, the Cauchy-Schwarz inequality gives
//
//   <x, w> <= sx sw <q, p> + |x - sx q| |w| + |sx q| |w - sw p|
//
// and <q, p> is exact in 32-bit integers. Where this bound plus the bias is not positive, the feature is
// certainly silent. The rest, the candidates, are computed in float as anywhere else. The bound also has
// room for every rounding of float arithmetic, its own included (kSlack).
//
// Features are worked through in blocks whose weights stay in the second-level cache from rounding to
// the last candidate; each weight is read from memory once.

#include "../saek.h"
#include "rows.h"
#include "../table.h"

namespace saek {
namespace SAEK_ISA {
namespace {

constexpr int64_t kTile = 6, kLanes = 64;     // rows and features of a tile: 24 registers of 16 sums
constexpr int64_t kBlockBytes = 400 << 10;    // of float weights in a block, at most
constexpr int64_t kBlockEntries = 1 << 20;    // of a block's list, at most (but for one group of kLanes)
constexpr int64_t kBlocks = 16;               // at least, so that threads share them evenly
constexpr int64_t kSampleBlocks = 4, kSampleTiles = 43;
constexpr float kSlack = 1.0f / (1 << 23);    // relative error of one rounding, twice over
// Rows with greater or smaller numbers are not bounded: (127 * 1e13)^2 * 65536 is far below the largest
// float, so no sum of a dot product overflows, and 1e-13^2 is far above the smallest.
constexpr float kLeastScale = 1e-13f, kGreatestScale = 1e13f;

// What the bound needs to know of a rounded row.
struct Rounded {
  float scale;  // s
  float length; // |s q|, rounded up
  float lost;   // |x - s q|, rounded up, and the slack of a dot product with this row
  int32_t sum;  // of q
};

// Rounds a row of d floats to q, padded with zeros to `padded`. A row that holds a NaN or an infinity,
// or is too small for the arithmetic of the bound, gets lost = NaN: then everything is a candidate.
Rounded round_row(const float* row, int64_t d, int64_t padded, int8_t* q) {
  float most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < d; ++i) most = most < fabsf(row[i]) ? fabsf(row[i]) : most;
  const float scale = most / 127, inverse = scale > 0 ? 127 / most : 0;
  const __m512 by = _mm512_set1_ps(inverse);
  __m512 lost2 = _mm512_setzero_ps(), length2 = _mm512_setzero_ps();
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 exact = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(d - i), row + i), by);
    const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(exact));
    _mm_mask_storeu_epi8(q + i, first_lanes(padded - i), bytes);
    const __m512i back = _mm512_cvtepi8_epi32(bytes);
    const __m512 value = _mm512_cvtepi32_ps(back), error = _mm512_sub_ps(exact, value);
    lost2 = _mm512_fmadd_ps(error, error, lost2);
    length2 = _mm512_fmadd_ps(value, value, length2);
    sum = _mm512_add_epi32(sum, back);
  }
  const float slack = kSlack * static_cast<float>(d + 64);
  const float length = scale * sqrtf(_mm512_reduce_add_ps(length2)) * (1 + slack);
  const float lost = scale * sqrtf(_mm512_reduce_add_ps(lost2)) * (1 + slack);
  const bool unfit = most > 0 && !(scale > kLeastScale && scale < kGreatestScale);
  return {scale, length, unfit ? NAN : lost + slack * (length + lost), _mm512_reduce_add_epi32(sum)};
}

// One block of features, rounded and laid out for the tile: [features / 64][padded / 4][64][4] unsigned
// bytes, 128 added since the instruction multiplies unsigned by signed.
struct Block {
  uint8_t* packed;
  float *scale, *length, *lost, *bias; // [features]; the bias rounded up
  int8_t* row;                         // scratch [padded]
};

void pack(const Block& out, const saek_screen_args& a, int64_t first, int64_t count, int64_t features,
          int64_t padded) {
  const float *W_enc = static_cast<const float*>(a.W_enc), *b_enc = static_cast<const float*>(a.b_enc);
  for (int64_t f = 0; f < features; ++f) {
    uint8_t* to = out.packed + f / kLanes * kLanes * padded + f % kLanes * 4;
    if (f >= count) {
      // Beyond the last feature: the caller masks these lanes.
      out.scale[f] = out.length[f] = out.lost[f] = out.bias[f] = 0;
      for (int64_t k = 0; k < padded / 4; ++k) __builtin_memset(to + 4 * kLanes * k, 128, 4);
      continue;
    }
    const Rounded r = round_row(W_enc + (first + f) * a.d_in, a.d_in, padded, out.row);
    const float bias = b_enc[first + f];
    out.scale[f] = r.scale;
    out.length[f] = r.length + r.lost;
    out.lost[f] = r.lost;
    out.bias[f] = bias * (bias < 0 ? 1 - 16 * kSlack : 1 + 16 * kSlack);
    for (int64_t k = 0; k < padded / 4; ++k) {
      uint32_t four;
      __builtin_memcpy(&four, out.row + 4 * k, 4);
      four ^= 0x80808080u; // +128 to each byte
      __builtin_memcpy(to + 4 * kLanes * k, &four, 4);
    }
  }
}

// <q_b, p_j + 128> for kTile rows and 64 features. The instruction is written out because the compiler
// would otherwise move the accumulators from register to register.
inline __attribute__((always_inline)) void multiply(const int8_t* q, const uint8_t* packed,
                                                    int64_t padded, __m512i (&out)[kTile][4]) {
  __m512i sum[kTile][4];
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_si512();
  for (int64_t k = 0; k < padded / 4; ++k) {
    __m512i p[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) p[c] = _mm512_loadu_si512(packed + 256 * k + 64 * c);
    __builtin_prefetch(q + kTile * (padded + 4 * k)); // the rows of the next tile
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) {
      int32_t four;
      __builtin_memcpy(&four, q + 4 * (kTile * k + r), 4);
      const __m512i all = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c)
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[r][c]) : "v"(p[c]), "v"(all));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) out[r][c] = sum[r][c];
}

// The candidates among 64 features for the `rows` rows of a tile; bits beyond `valid` are left out.
void mark_tile(const int8_t* q, const Rounded* x, int64_t rows, const Block& w, int64_t lane0,
                int64_t padded, uint64_t valid, uint64_t* mask) {
  const float *scale = w.scale + lane0, *length = w.length + lane0;
  const float *lost = w.lost + lane0, *bias = w.bias + lane0;
  const uint8_t* packed = w.packed + lane0 * padded;
  __m512i sum[kTile][4];
  multiply(q, packed, padded, sum); // rows are padded to whole tiles
  for (int64_t r = 0; r < rows; ++r) {
    const __m512i offset = _mm512_set1_epi32(128 * x[r].sum);
    uint64_t bits = 0;
    for (int c = 0; c < 4; ++c) {
      const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][c], offset));
      const __m512 unit = _mm512_mul_ps(_mm512_set1_ps(x[r].scale), _mm512_loadu_ps(scale + 16 * c));
      __m512 bound = _mm512_loadu_ps(bias + 16 * c);
      bound = _mm512_fmadd_ps(_mm512_set1_ps(x[r].lost), _mm512_loadu_ps(length + 16 * c), bound);
      bound = _mm512_fmadd_ps(_mm512_set1_ps(x[r].length), _mm512_loadu_ps(lost + 16 * c), bound);
      bound = _mm512_fmadd_ps(product, unit, bound);
      bits |= static_cast<uint64_t>(_mm512_cmp_ps_mask(bound, _mm512_setzero_ps(), _CMP_NLE_UQ))
              << 16 * c;
    }
    mask[r] = bits & valid;
  }
}

// Hands out parts of the scratch memory, each on a cache line of its own. From address 0 it measures.
struct Carve {
  uintptr_t at;

  template <class T>
  T* take(int64_t n) {
    T* here = reinterpret_cast<T*>(at);
    at += (static_cast<uintptr_t>(n) * sizeof(T) + 63) / 64 * 64;
    return here;
  }
};

// How the work is cut up.
struct Plan {
  int64_t rows, d_sae, padded, features, blocks;

  Plan(int64_t rows_, int64_t d_in, int64_t d_sae_)
      : rows(rows_), d_sae(d_sae_), padded((d_in + 3) / 4 * 4) {
    const int64_t groups = least(least(kBlockBytes / (kLanes * d_in * 4), kBlockEntries / (kLanes * rows)),
                                 d_sae / (kLanes * kBlocks));
    features = kLanes * (groups < 1 ? 1 : groups);
    blocks = (d_sae + features - 1) / features;
  }
};

// One thread's scratch memory.
struct Own {
  Block block;
  uint64_t* mask; // [features / 64, rows]
  int32_t* col;   // [rows * features]: a block's list
  float* val;     // [rows * features]

  Own(const Plan& plan, Carve& memory) {
    block.packed = memory.take<uint8_t>(plan.features * plan.padded);
    block.scale = memory.take<float>(plan.features);
    block.length = memory.take<float>(plan.features);
    block.lost = memory.take<float>(plan.features);
    block.bias = memory.take<float>(plan.features);
    block.row = memory.take<int8_t>(plan.padded);
    mask = memory.take<uint64_t>(plan.features / kLanes * plan.rows);
    col = memory.take<int32_t>(plan.rows * plan.features);
    val = memory.take<float>(plan.rows * plan.features);
  }
};

// What threads share, and where their own memory starts.
struct Shared {
  int8_t* q;           // [tiles][padded / 4][kTile][4]: the rows of a tile side by side
  Rounded* x;          // [rows]
  int32_t* begin;      // [blocks, rows + 1]: where a row's entries start in the block's list
  int64_t* list_begin; // [blocks]: where the block's list starts
  uintptr_t own, own_bytes;

  Shared(const Plan& plan, Carve& memory) {
    q = memory.take<int8_t>((plan.rows + kTile - 1) / kTile * kTile * plan.padded);
    x = memory.take<Rounded>(plan.rows);
    begin = memory.take<int32_t>(plan.blocks * (plan.rows + 1));
    list_begin = memory.take<int64_t>(plan.blocks);
    own = memory.at;
    Carve measure{0};
    Own(plan, measure);
    own_bytes = measure.at;
  }

  Own mine(const Plan& plan) const {
    Carve memory{own + static_cast<uintptr_t>(this_thread()) * own_bytes};
    return Own(plan, memory);
  }
};

// Masks of one block, for every tile of rows or some of them, evenly spread; returns how many candidates.
int64_t mask_block(const saek_screen_args& a, const Plan& plan, const Shared& shared, const Own& s, int64_t block, int64_t tiles) {
  const int64_t first = block * plan.features, count = least(plan.features, plan.d_sae - first);
  const int64_t all = (plan.rows + kTile - 1) / kTile;
  pack(s.block, a, first, count, plan.features, plan.padded);
  int64_t found = 0;
  for (int64_t lane0 = 0; lane0 < count; lane0 += kLanes) {
    const int64_t lanes = least(kLanes, count - lane0);
    const uint64_t valid = lanes == kLanes ? ~uint64_t(0) : (uint64_t(1) << lanes) - 1;
    uint64_t* mask = s.mask + lane0 / kLanes * plan.rows;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t b = i * all / tiles * kTile, rows = least(kTile, plan.rows - b);
      mark_tile(shared.q + b * plan.padded, shared.x + b, rows, s.block, lane0, plan.padded, valid, mask + b);
      for (int64_t r = b; r < b + rows; ++r) found += __builtin_popcountll(mask[r]);
    }
  }
  return found;
}

// Lists the block's active entries row by row; returns how many.
int64_t list_block(const saek_screen_args& a, const Plan& plan, const Shared& shared, const Own& s, int64_t block,
                   int64_t* saturated) {
  const float *xc = static_cast<const float*>(a.xc), *b_enc = static_cast<const float*>(a.b_enc);
  const float* W_enc = static_cast<const float*>(a.W_enc);
  const float clip = static_cast<float>(a.clip);
  const int64_t first = block * plan.features, count = least(plan.features, plan.d_sae - first);
  int32_t* begin = shared.begin + block * (plan.rows + 1);
  int64_t n = 0;
  for (int64_t b = 0; b < plan.rows; ++b) {
    begin[b] = static_cast<int32_t>(n);
    for (int64_t lane0 = 0; lane0 < count; lane0 += kLanes) {
      for (uint64_t bits = s.mask[lane0 / kLanes * plan.rows + b]; bits != 0; bits &= bits - 1) {
        const int64_t j = first + lane0 + __builtin_ctzll(bits);
        const float pre = dot(W_enc + j * a.d_in, xc + b * a.d_in, a.d_in) + b_enc[j];
        if (pre <= 0) continue;
        *saturated += pre > clip;
        s.col[n] = static_cast<int32_t>(j);
        s.val[n++] = pre > clip ? -clip : pre;
      }
    }
  }
  begin[plan.rows] = static_cast<int32_t>(n);
  return n;
}

}  // namespace

int64_t screen_scratch(int64_t rows, int64_t d_in, int64_t d_sae, int threads) {
  Carve measure{0};
  const Shared shared(Plan(rows, d_in, d_sae), measure);
  return static_cast<int64_t>(shared.own + static_cast<uintptr_t>(threads) * shared.own_bytes);
}

int screen(const saek_exec& exec, const saek_screen_args& a) {
  const Plan plan(a.rows, a.d_in, a.d_sae);
  Carve memory{reinterpret_cast<uintptr_t>(a.scratch)};
  const Shared shared(plan, memory);
  const float* xc = static_cast<const float*>(a.xc);
  const int64_t tiles = (a.rows + kTile - 1) / kTile;

#pragma omp parallel for num_threads(exec.threads) schedule(static)
  for (int64_t t = 0; t < tiles; ++t) {
    int8_t *to = shared.q + t * kTile * plan.padded, *row = shared.mine(plan).block.row;
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t b = t * kTile + r;
      if (b < a.rows)
        shared.x[b] = round_row(xc + b * a.d_in, a.d_in, plan.padded, row);
      else
        __builtin_memset(row, 0, static_cast<size_t>(plan.padded));
      for (int64_t k = 0; k < plan.padded / 4; ++k) __builtin_memcpy(to + 4 * (kTile * k + r), row + 4 * k, 4);
    }
  }

  // A few blocks of features and tiles of rows tell whether there are too many candidates for this to pay.
  const int64_t sample_blocks = least(kSampleBlocks, plan.blocks), sample_tiles = least(kSampleTiles, tiles);
  int64_t sampled = 0;
#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 1) reduction(+ : sampled)
  for (int64_t i = 0; i < sample_blocks; ++i)
    sampled += mask_block(a, plan, shared, shared.mine(plan), i * plan.blocks / sample_blocks, sample_tiles);
  const double looked_at = static_cast<double>(least(a.rows, sample_tiles * kTile)) *
                           static_cast<double>(least(a.d_sae, sample_blocks * plan.features));
  if (static_cast<double>(sampled) > a.limit * looked_at) {
    a.out.counters[0] = a.out.row_ptr[0];
    a.out.counters[2] += sampled;
    return SAEK_TOO_DENSE;
  }

  int64_t listed = 0, found = 0, saturated = 0;
#pragma omp parallel for num_threads(exec.threads) schedule(dynamic, 1) reduction(+ : found, saturated)
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const Own s = shared.mine(plan);
    found += mask_block(a, plan, shared, s, block, tiles);
    const int64_t n = list_block(a, plan, shared, s, block, &saturated);
    int64_t at;
#pragma omp atomic capture
    {
      at = listed;
      listed += n;
    }
    // Where a list lies depends on the threads; what is made of the lists does not.
    shared.list_begin[block] = at;
    if (n == 0 || at + n > a.out.capacity) continue;
    __builtin_memcpy(a.list_col + at, s.col, static_cast<size_t>(4 * n));
    __builtin_memcpy(static_cast<float*>(a.list_val) + at, s.val, static_cast<size_t>(4 * n));
  }

  int64_t* row_ptr = a.out.row_ptr;
  for (int64_t b = 0; b < a.rows; ++b) row_ptr[b + 1] = 0;
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int32_t* begin = shared.begin + block * (a.rows + 1);
    for (int64_t b = 0; b < a.rows; ++b) row_ptr[b + 1] += begin[b + 1] - begin[b];
  }
  for (int64_t b = 0; b < a.rows; ++b) row_ptr[b + 1] += row_ptr[b];
  if (!fits(a.out, row_ptr[a.rows], found)) return SAEK_OVERFLOW;
  a.out.counters[1] += saturated;

  float* val = static_cast<float*>(a.out.val);
#pragma omp parallel for num_threads(exec.threads) schedule(static)
  for (int64_t b = 0; b < a.rows; ++b) {
    int64_t to = row_ptr[b];
    for (int64_t block = 0; block < plan.blocks; ++block) {
      const int32_t* begin = shared.begin + block * (a.rows + 1);
      const int64_t from = shared.list_begin[block] + begin[b];
      for (int64_t k = 0; k < begin[b + 1] - begin[b]; ++k, ++to) {
        a.out.col[to] = a.list_col[from + k];
        val[to] = static_cast<const float*>(a.list_val)[from + k];
      }
    }
  }
  return SAEK_OK;
}

}  // namespace SAEK_ISA
}  // namespace saek
