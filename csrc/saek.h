/* The kernels of one sparse-autoencoder step, as plain C functions.
 *
 *   pre  = (x - b_dec) W_enc^T + b_enc      the caller's matrix product, one chunk of rows at a time
 *   z    = min(max(pre, 0), clip)           saek_compact: kept only where pre > 0
 *   e    = z W_dec - (x - b_dec)            saek_residual: residual, loss, dL/dxhat and dL/dz
 *   loss = mean_b w_b |e_b|^2 + l1 mean_b s_b sum_j z_bj
 *   saek_transpose, saek_update_b_dec, saek_update_features: gradients, Adam, unit-norm decoder rows
 *
 * Rules. The caller allocates everything; nothing here allocates, and every size is an int64_t.
 * Matrices are row-major and contiguous; W_enc and W_dec both hold one row of d_in numbers per
 * feature. `T` below is float or double as `dtype` says. Any alignment and any size >= 1 will do
 * (an empty batch is the caller's to refuse). Every output element is written by one thread in a
 * fixed order, so results do not depend on `threads`.
 *
 * Every function returns SAEK_OK or an error code; saek_error_string() puts it into words.
 */
#ifndef SAEK_H
#define SAEK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  SAEK_OK = 0,
  SAEK_BAD_ARGUMENT = 1, /* a null pointer, a size below 1, an unknown dtype, a clip <= 0 */
  SAEK_OVERFLOW = 2,     /* saek_compact only: `needed` exceeds `capacity`; nothing was listed */
  SAEK_BAD_ISA = 3,      /* SPARSEMILL_ISA names an instruction set this machine or build lacks */
  SAEK_NO_CUDA = 4,      /* built without CUDA */
  SAEK_NO_DEVICE = 5,    /* built with CUDA, but there is no usable driver or device */
};

enum { SAEK_FLOAT32 = 0, SAEK_FLOAT64 = 1 };

const char* saek_error_string(int code);

/* "avx512", "avx2" or "portable": the widest the processor offers, or what the environment variable
 * SPARSEMILL_ISA asks for. NULL where it asks for something that cannot run (see SAEK_BAD_ISA). */
const char* saek_isa(void);

/* 1 where the loops run on several threads, 0 where the compiler had no OpenMP. */
int saek_has_openmp(void);

/* The compacted activations of a batch: compressed sparse rows.
 * Entries of row b are row_ptr[b] .. row_ptr[b+1]-1 in ascending column order. A saturated entry
 * (pre > clip) holds -clip: z = |val|, and a negative val says that no gradient passes. */
typedef struct {
  const int64_t* row_ptr; /* [rows + 1] */
  const int32_t* col;     /* [nnz] */
  const void* val;        /* T [nnz] */
  int64_t rows;
} saek_code;

/* Lists the active entries of one chunk of rows: those with !(pre + b_enc <= 0), so that a NaN is
 * kept and surfaces in the loss. On SAEK_OVERFLOW col and val are untouched; the call may be
 * repeated with larger arrays. */
typedef struct {
  const void* pre;   /* T [rows, d_sae], without the bias */
  const void* b_enc; /* T [d_sae] */
  double clip;       /* > 0; infinity for none */
  int64_t rows, d_sae;
  int64_t capacity;  /* length of col and val */
  int threads;
  uint64_t* mask;    /* scratch [rows, ceil(d_sae / 64)] */
  int64_t* row_ptr;  /* [rows + 1], this chunk's part; [0] is set by the caller, the rest is written */
  int32_t* col;      /* the whole batch's array; written from row_ptr[0] on */
  void* val;         /* T, likewise */
  int64_t needed;    /* out: length col and val must have to hold this chunk */
  int64_t saturated; /* out: entries of this chunk with pre > clip */
} saek_compact_args;

int saek_compact(int dtype, saek_compact_args* args);

/* out_b = sum_j z_bj W_dec_j + b_dec */
typedef struct {
  saek_code code;
  const void* W_dec; /* T [d_sae, d_in] */
  const void* b_dec; /* T [d_in] */
  int64_t d_in;
  int threads;
  void* out; /* T [rows, d_in] */
} saek_decode_args;

int saek_decode(int dtype, const saek_decode_args* args);

/* Residual, loss and both gradients of a row while its decoder rows are in cache:
 *   grad_b = recon_scale w_b e_b,   dz_bj = <grad_b, W_dec_j> + l1_scale s_b   (0 where saturated) */
typedef struct {
  saek_code code;
  const void* W_dec;        /* T [d_sae, d_in] */
  const void* xc;           /* T [rows, d_in]: x - b_dec */
  const void* recon_weight; /* T [rows]: w_b, or NULL for 1 */
  const void* l1_weight;    /* T [rows]: s_b, or NULL for 1 */
  double recon_scale;       /* 2 / rows of the batch */
  double l1_scale;          /* l1 / rows of the batch */
  int64_t d_in;
  int threads;
  double* row_partials; /* scratch [2 rows] */
  void* grad;           /* out T [rows, d_in]: dL/dxhat */
  void* dz;             /* out T [nnz]: dL/dpre of the listed entries */
  double squared_error; /* out: sum_b |e_b|^2, without weights */
  double l1;            /* out: sum_bj z_bj, without weights */
} saek_residual_args;

int saek_residual(int dtype, saek_residual_args* args);

/* The same entries by feature (a stable counting sort: rows ascend within a feature). */
typedef struct {
  const int64_t* feature_ptr; /* [d_sae + 1] */
  const int32_t* row;         /* [nnz] */
  const void* z;              /* T [nnz], >= 0 */
  const void* dz;             /* T [nnz] */
  int64_t d_sae;
} saek_by_feature;

typedef struct {
  saek_code code;
  const void* dz; /* T [nnz], in the order of `code` */
  int64_t d_sae;
  int threads;
  int64_t* counts;      /* scratch [threads, d_sae] */
  int64_t* feature_ptr; /* out [d_sae + 1] */
  int32_t* row;         /* out [nnz] */
  void* z;              /* out T [nnz] */
  void* dz_by_feature;  /* out T [nnz] */
  void* grad_b_enc;     /* out T [d_sae]: sum_b dz_bj */
} saek_transpose_args;

int saek_transpose(int dtype, const saek_transpose_args* args);

/* Adam as in torch.optim: bias-corrected, eps outside the square root, no weight decay. */
typedef struct {
  double lr, beta1, beta2, eps;
  int64_t step; /* number of this update, from 1 */
} saek_adam;

/* One parameter and its two moments, all T of one shape, updated in place. */
typedef struct {
  void *value, *m, *v;
} saek_moments;

/* b_dec, whose gradient is sum_b grad_b - sum_j grad_b_enc_j W_enc_j. Reads W_enc as it was in the
 * forward, so it runs before saek_update_features. */
typedef struct {
  const void* grad;       /* T [rows, d_in] */
  const void* grad_b_enc; /* T [d_sae] */
  const void* W_enc;      /* T [d_sae, d_in] */
  int64_t rows, d_in, d_sae;
  int threads;
  saek_adam adam;
  saek_moments b_dec; /* T [d_in] */
} saek_b_dec_args;

int saek_update_b_dec(int dtype, const saek_b_dec_args* args);

/* Per feature, in one visit: both gradient rows are gathered in scratch, the part of the decoder's
 * parallel to its row is removed, Adam moves W_enc, b_enc and W_dec, and the decoder row is brought
 * back to length 1. Features without entries move by their momentum, as in dense Adam. */
typedef struct {
  saek_by_feature entries;
  const void* grad;       /* T [rows, d_in] */
  const void* xc;         /* T [rows, d_in] */
  const void* grad_b_enc; /* T [d_sae] */
  int64_t d_in;
  int threads;
  saek_adam adam;
  void* scratch;                    /* T [threads, 2, d_in] */
  saek_moments W_enc, b_enc, W_dec; /* T [d_sae, d_in], [d_sae], [d_sae, d_in] */
} saek_features_args;

int saek_update_features(int dtype, const saek_features_args* args);

/* What the CUDA runtime sees. Versions are CUDA's own numbers, such as 13000 for 13.0. */
typedef struct {
  char name[256];
  int major, minor;     /* compute capability */
  int64_t memory_bytes; /* total */
} saek_cuda_device;

int saek_cuda_count(int* devices, int* driver_version, int* runtime_version);
int saek_cuda_describe(int device, saek_cuda_device* out);

#ifdef __cplusplus
}
#endif

#endif
