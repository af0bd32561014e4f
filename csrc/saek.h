/* The kernels of one sparse-autoencoder step, as plain C functions.
 *
 *   pre  = (x - b_dec) W_enc^T + b_enc
 *   z    = min(max(pre, 0), clip)           kept only where pre > 0: the code
 *   e    = z W_dec - (x - b_dec)            residual
 *   loss = mean_b w_b |e_b|^2 + l1 mean_b s_b sum_j q_j z_bj
 *
 * The code comes from saek_compact (after the caller's matrix product), from saek_screen (which needs no
 * such product) or from saek_gather (where the support is given). Then
 *
 *   saek_residual  or  saek_decode and saek_dz      by row: dL/dxhat and dL/dz
 *   saek_transpose                                  the same entries by feature; gradient of b_enc
 *   saek_b_dec_gradient, saek_update_features ...   by feature: gradients, Adam, unit-norm rows
 *
 * Where about half of all features fire, the saek_dense_ functions finish what the caller's matrix
 * products leave over, a chunk of rows at a time.
 *
 * Rules. The caller allocates everything, results included, where saek_exec.device can reach it; nothing
 * here allocates or, on CUDA, waits. Every size is an int64_t. Matrices are row-major and contiguous; W_enc
 * and W_dec both hold one row of d_in numbers per feature. `T` below is the float or double of
 * saek_exec.dtype, aligned as such; `M` is T, or bfloat16 where that is SAEK_BFLOAT16. Any size >= 1 will do
 * (an empty batch is the caller's to refuse). Every sum of floats is made in a fixed order: results never
 * differ from run to run, nor with the number of threads (but for saek_dense_ on CUDA, whose parts count).
 *
 * On CUDA a call queues its kernels on saek_exec.stream and returns; all of them may be captured in a graph.
 * What changes from step to step (the penalty, Adam's numbers) is read from memory for that reason.
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
  SAEK_OVERFLOW = 2,     /* CPU: counters[0] exceeds `capacity`; nothing was listed */
  SAEK_BAD_ISA = 3,      /* SPARSEMILL_ISA names an instruction set this machine or build lacks */
  SAEK_NO_CUDA = 4,      /* built without CUDA */
  SAEK_NO_DEVICE = 5,    /* built with CUDA, but there is no usable driver or device */
  SAEK_UNSUPPORTED = 6,  /* not offered for this device, instruction set, dtype or size */
  SAEK_TOO_DENSE = 7,    /* saek_screen only: more candidates than `limit`; nothing was listed */
  SAEK_CUDA_FAILED = 8,  /* the CUDA runtime refused a launch; saek_cuda_error() has its words */
};

/* SAEK_BFLOAT16: matrices in bfloat16, all other numbers and every sum in float. CUDA only. */
enum { SAEK_FLOAT32 = 0, SAEK_FLOAT64 = 1, SAEK_BFLOAT16 = 2 };
enum { SAEK_CPU = 0, SAEK_CUDA = 1 };
enum { SAEK_B_DEC_SHARES = 256 }; /* see saek_b_dec_gradient */
enum { SAEK_LONG_LIST = 512 };   /* see saek_transpose */
enum { SAEK_SHARED_ROW = 49152 }; /* see saek_update_features */

/* Where a function runs. */
typedef struct {
  int device;
  int dtype;
  int threads;         /* >= 1. CPU: threads. CUDA: parts of a sum over rows, each with scratch of its own */
  void* stream;        /* CUDA: the cudaStream_t to queue on, of the current device */
  const int64_t* skip; /* CUDA: where this is set and not 0, nothing is done; see saek_code_out */
} saek_exec;

const char* saek_error_string(int code);

/* "avx512vnni", "avx512", "avx2" or "portable": the widest the processor offers, or what the environment
 * variable SPARSEMILL_ISA asks for. NULL where it asks for something that cannot run (SAEK_BAD_ISA). */
const char* saek_isa(void);

/* 1 where the loops run on several threads, 0 where the compiler had no OpenMP. */
int saek_has_openmp(void);

/* ---- The code -------------------------------------------------------------------------------------- */

/* The active entries of a batch: compressed sparse rows.
 * Entries of row b are row_ptr[b] .. row_ptr[b+1]-1 in ascending column order. A saturated entry
 * (pre > clip) holds -clip: z = |val|, and a negative val says that no gradient passes. Listed are the
 * entries with !(pre <= 0), so that a NaN is kept and surfaces in the loss. */
typedef struct {
  const int64_t* row_ptr; /* [rows + 1] */
  const int32_t* col;     /* [nnz] */
  const void* val;        /* T [nnz] */
  int64_t rows;
} saek_code;

/* Why kernels on CUDA leave everything undone, where saek_exec.skip points; 0 where they do not. */
enum { SAEK_TOO_SHORT = 1, SAEK_NOT_FINITE = 2 };

/* Where the next rows of a code are written. Where they do not fit, counters[3] becomes SAEK_TOO_SHORT, and
 * the call may be repeated with longer arrays. The CPU returns SAEK_OVERFLOW then, before it writes col and val; on CUDA
 * rows that fit are written, and the caller lets saek_exec.skip of all that follows point at counters[3],
 * and looks at it when it likes. */
typedef struct {
  int64_t* row_ptr;  /* [rows + 1], this call's part; [0] is set by the caller, the rest is written */
  int32_t* col;      /* [capacity] the whole batch's array; written from row_ptr[0] on */
  void* val;         /* T [capacity], likewise */
  int64_t capacity;
  int64_t* counters; /* [4]: = length needed of col and val so far; += saturated entries, where they fit;
                        += candidates looked at; = SAEK_TOO_SHORT where they do not fit, else left alone */
} saek_code_out;

/* From pre-activations of a chunk of rows. */
typedef struct {
  const void* pre;   /* M [rows, d_sae], without the bias */
  const void* b_enc; /* T [d_sae] */
  double clip;       /* > 0; infinity for none */
  int64_t rows, d_sae;
  uint64_t* mask;    /* scratch [rows, ceil(d_sae / 64)] */
  int32_t* counts;   /* CUDA: scratch [rows, 2] */
  saek_code_out out;
} saek_compact_args;

int saek_compact(const saek_exec* exec, const saek_compact_args* args);

/* Without a full matrix product: 8-bit integers bound every pre-activation from above, and where the bound
 * is positive (a candidate) it is computed in float. The same entries as in float throughout. float32 on
 * "avx512vnni", d_in <= 65536. Gives up with SAEK_TOO_DENSE where a sample of the batch has more than
 * `limit` candidates per entry. */
typedef struct {
  const void* xc;    /* T [rows, d_in]: x - b_dec */
  const void* W_enc; /* T [d_sae, d_in] */
  const void* b_enc; /* T [d_sae] */
  double clip;
  int64_t rows, d_in, d_sae;
  double limit;
  void* scratch;     /* saek_screen_scratch() bytes, 64-byte aligned */
  int32_t* list_col; /* scratch [out.capacity] */
  void* list_val;    /* scratch T [out.capacity] */
  saek_code_out out;
} saek_screen_args;

int64_t saek_screen_scratch(int64_t rows, int64_t d_in, int64_t d_sae, int threads);
int saek_screen(const saek_exec* exec, const saek_screen_args* args);

/* Where the support is given: computes pre there and lists what is active. */
typedef struct {
  const int64_t* support_ptr; /* [rows + 1], from 0 */
  const int32_t* support_col; /* ascending within a row */
  const void* xc;             /* M [rows, d_in] */
  const void* W_enc;          /* M [d_sae, d_in] */
  const void* b_enc;          /* T [d_sae] */
  double clip;
  int64_t rows, d_in;
  int64_t support_length;
  void* scratch;              /* T [support_length] */
  int32_t* counts;            /* CUDA: scratch [rows, 2] */
  saek_code_out out;
} saek_gather_args;

int saek_gather(const saek_exec* exec, const saek_gather_args* args);

/* ---- By row ---------------------------------------------------------------------------------------- */

/* out_b = sum_k val[k] matrix[col[k]] + bias over the entries of row b. */
typedef struct {
  saek_code code;     /* its val are plain weights: the sign is a sign */
  const void* matrix; /* M [*, d_in]: a row for each column */
  const void* bias;   /* T [d_in], or NULL for 0 */
  int64_t d_in;
  void* out;          /* T [rows, d_in] */
} saek_decode_args;

int saek_decode(const saek_exec* exec, const saek_decode_args* args);

/* Residual, loss and both gradients of a row while its decoder rows are in cache:
 *   grad_b = recon_scale w_b e_b,   dz_bj = <grad_b, W_dec_j> + l1_scale s_b q_j   (0 where saturated) */
typedef struct {
  saek_code code;
  const void* W_dec;          /* M [d_sae, d_in] */
  const void* x;              /* T [rows, d_in] */
  const void* b_dec;          /* T [d_in], or NULL where x is x - b_dec already */
  const void* recon_weight;   /* T [rows]: w_b, or NULL for 1 */
  const void* l1_weight;      /* T [rows]: s_b, or NULL for 1 */
  const void* feature_weight; /* T [d_sae]: q_j, or NULL for 1 */
  double recon_scale;         /* 2 / rows of the batch */
  const double* l1_scale;     /* [1]: l1 / rows of the batch */
  int64_t d_in;
  int64_t shared_bytes; /* CUDA: memory of a block that keeps decoder rows between both halves, 0 for none */
  int64_t* halt;        /* CUDA: set to SAEK_NOT_FINITE where a sum is that; NULL to go on regardless */
  double* row_sums;     /* scratch [rows, 4] */
  void* grad;           /* out M [rows, d_in]: dL/dxhat */
  void* dz;             /* out T [nnz]: dL/dpre of the listed entries */
  double* sums;         /* out [4]: sums over b of |e_b|^2, sum_j q_j z_bj, and these times w_b and s_b */
} saek_residual_args;

int saek_residual(const saek_exec* exec, const saek_residual_args* args);

/* The second half where dL/dxhat comes from outside:
 *   dz_bj = <grad_b, W_dec_j> + grad_l1_b q_j + grad_activity_j + grad_val_bj   (0 where saturated)
 * Each gradient may be NULL for 0. */
typedef struct {
  saek_code code;
  const void* W_dec;          /* M [d_sae, d_in] */
  const void* grad;           /* M [rows, d_in] */
  const void* grad_l1;        /* T [rows] */
  const void* feature_weight; /* T [d_sae]: q_j, or NULL for 1 */
  const void* grad_activity;  /* T [d_sae] */
  const void* grad_val;       /* T [nnz] */
  int64_t d_in;
  void* dz; /* out T [nnz] */
} saek_dz_args;

int saek_dz(const saek_exec* exec, const saek_dz_args* args);

/* ---- By feature ------------------------------------------------------------------------------------ */

/* The same entries by feature (a stable counting sort: rows ascend within a feature). */
typedef struct {
  const int64_t* feature_ptr; /* [d_sae + 1] */
  const int32_t* row;         /* [nnz] */
  const void* z;              /* T [nnz], >= 0 */
  const void* dz;             /* T [nnz] */
  const int32_t* long_lists;  /* CUDA: as saek_transpose left them, or NULL */
  int64_t slots;
} saek_by_feature;

/* On CUDA the features with more than SAEK_LONG_LIST entries are noted: their gradients are shared out among
 * many blocks, where a single one would take longer over them than all others over the rest. */
typedef struct {
  saek_code code;
  const void* dz;         /* T [nnz], in the order of `code` */
  const void* row_weight; /* T [rows]: r_b, or NULL for 1 */
  int64_t d_sae;
  int64_t* counts;        /* scratch [threads, d_sae]; CUDA: [ceil(threads / 2) + 2, d_sae] */
  int32_t* long_lists;    /* CUDA: out [1 + slots]: how many such features are noted, then which, ascending;
                             NULL to note none */
  int64_t slots;          /* further ones are not noted, and slow */
  int64_t* feature_ptr;   /* out [d_sae + 1] */
  int32_t* row;           /* out [nnz] */
  void* z;                /* out T [nnz] */
  void* dz_by_feature;    /* out T [nnz] */
  void* grad_b_enc;       /* out T [d_sae]: sum_b dz_bj */
  void* z_sum;            /* out T [d_sae]: sum_b r_b z_bj */
} saek_transpose_args;

int saek_transpose(const saek_exec* exec, const saek_transpose_args* args);

/* out = sum_b grad_b - sum_j grad_b_enc_j W_enc_j. Reads W_enc as it was in the forward, so it runs before
 * saek_update_features. */
typedef struct {
  const void* grad;       /* M [rows, d_in] */
  const void* grad_b_enc; /* T [d_sae] */
  const void* W_enc;      /* M [d_sae, d_in] */
  int64_t rows, d_in, d_sae;
  double* scratch; /* [SAEK_B_DEC_SHARES, d_in] */
  void* out;       /* T [d_in] */
} saek_b_dec_gradient_args;

int saek_b_dec_gradient(const saek_exec* exec, const saek_b_dec_gradient_args* args);

/* What the gradient rows of every feature are made of: from the entries, or, where entries.feature_ptr is
 * NULL, from sums of outer products that the caller has made.
 *   W_enc_j: sum_b dz_bj xc_b        W_dec_j: sum_b z_bj grad_b + pull_j W_dec_j */
typedef struct {
  saek_by_feature entries;
  const void* grad;       /* M [rows, d_in] */
  const void* xc;         /* M [rows, d_in] */
  const void* dW_enc;     /* T [d_sae, d_in] */
  const void* dW_dec;     /* T [d_sae, d_in], without pull */
  const void* grad_b_enc; /* T [d_sae] */
  const void* pull;       /* T [d_sae], or NULL for 0 */
  const void* W_dec;      /* T [d_sae, d_in]; may be NULL where pull is */
  void* long_rows;        /* CUDA: scratch T [entries.slots, 2, d_in] */
  int64_t d_in, d_sae;
} saek_gradient;

/* The gradients as tensors; each output may be NULL. */
typedef struct {
  saek_gradient gradient;
  void* dW_enc; /* out T [d_sae, d_in] */
  void* dW_dec; /* out T [d_sae, d_in] */
} saek_feature_gradients_args;

int saek_feature_gradients(const saek_exec* exec, const saek_feature_gradients_args* args);

/* Their squared lengths: W_enc's, W_dec's and b_enc's parts together. */
typedef struct {
  saek_gradient gradient;
  void *dW_enc, *dW_dec; /* CPU: T [d_sae, d_in], also receive the gradients; may be those in `gradient` */
  double* out;           /* [d_sae] */
} saek_feature_norms_args;

int saek_feature_norms(const saek_exec* exec, const saek_feature_norms_args* args);

/* Adam as in torch.optim.AdamW: bias-corrected, eps outside the square root, decay of the weight itself.
 * Update number t, from 1:
 *   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  p = keep p - rate m / (v_scale sqrt(v) + eps) */
typedef struct {
  double keep;    /* 1 - lr weight_decay */
  double rate;    /* lr / (1 - beta1^t) */
  double beta1, beta2;
  double v_scale; /* 1 / sqrt(1 - beta2^t) */
  double eps;
} saek_adam_numbers;

typedef struct {
  const saek_adam_numbers* numbers; /* [1] */
  const double* grad_scale; /* [1]: factor on the gradient, where its norm is clipped; NULL for 1 */
} saek_adam;

/* One parameter and its two moments, all T of one shape, updated in place. */
typedef struct {
  void *value, *m, *v;
} saek_moments;

/* Per feature, in one visit: both gradient rows are made in scratch and Adam moves W_enc, b_enc and W_dec.
 * With unit_norm the part of the decoder's gradient along its row is removed first, and the row is brought
 * back to length 1 afterwards. Features without entries move by their momentum, as in dense Adam. */
typedef struct {
  saek_gradient gradient;
  saek_adam adam;
  int unit_norm;
  void* scratch;                    /* CPU: T [threads, 2, d_in]. CUDA: T [threads, d_in], or NULL where a row
                                       is at most SAEK_SHARED_ROW bytes */
  saek_moments W_enc, b_enc, W_dec; /* T [d_sae, d_in], [d_sae], [d_sae, d_in] */
  void *W_enc_copy, *W_dec_copy;    /* CUDA: out M [d_sae, d_in]: the new weights once more, or NULL */
} saek_update_features_args;

int saek_update_features(const saek_exec* exec, const saek_update_features_args* args);

/* Any other parameter. */
typedef struct {
  const void* gradient; /* T [n] */
  int64_t n;
  saek_adam adam;
  saek_moments parameter; /* T [n] */
} saek_update_args;

int saek_update(const saek_exec* exec, const saek_update_args* args);

/* out_j = |matrix_j|, the length of each row. */
typedef struct {
  const void* matrix; /* T [rows, d_in] */
  int64_t rows, d_in;
  void* out; /* T [rows] */
} saek_row_norms_args;

int saek_row_norms(const saek_exec* exec, const saek_row_norms_args* args);

/* ---- The dense phase, a chunk of rows at a time ---------------------------------------------------- */

/* pre becomes z in place. Per-feature results are added to, so that chunks follow one another. */
typedef struct {
  void* pre;              /* in: M [rows, d_sae] without the bias; out: z */
  const void* b_enc;      /* T [d_sae] */
  double clip;
  const void* row_weight; /* T [rows]: r_b, or NULL for 1 */
  int64_t rows, d_sae;
  uint64_t* passes;       /* out [rows, ceil(d_sae / 64)]: bits where the gradient passes */
  int64_t* fired;         /* [d_sae] += rows in which the feature is active */
  int64_t* saturated;     /* [1] += entries with pre > clip */
  double* z_sum;          /* [2, d_sae] += sum_b z_bj, then sum_b r_b z_bj */
  double* scratch;        /* CUDA: [threads, 4, d_sae] */
} saek_dense_activate_args;

int saek_dense_activate(const saek_exec* exec, const saek_dense_activate_args* args);

/* grad holds z W_dec and becomes recon_scale w_b e_b in place. */
typedef struct {
  void* grad;               /* M [rows, d_in] */
  const void* x;            /* T [rows, d_in] */
  const void* b_dec;        /* T [d_in], or NULL where x is x - b_dec already */
  const void* recon_weight; /* T [rows], or NULL for 1 */
  double recon_scale;
  int64_t rows, d_in;
  int64_t* halt;    /* CUDA: as in saek_residual */
  double* row_sums; /* scratch [rows] */
  double* sums;     /* [2] += sum_b |e_b|^2, sum_b w_b |e_b|^2 */
} saek_dense_residual_args;

int saek_dense_residual(const saek_exec* exec, const saek_dense_residual_args* args);

/* dz holds grad W_dec^T; the penalty's gradient is added and entries that pass none become 0. */
typedef struct {
  void* dz;                   /* M [rows, d_sae] */
  const uint64_t* passes;     /* [rows, ceil(d_sae / 64)] */
  const void* l1_weight;      /* T [rows], or NULL for 1 */
  const void* feature_weight; /* T [d_sae], or NULL for 1 */
  const double* l1_scale;     /* [1] */
  int64_t rows, d_sae;
  double* grad_b_enc; /* [d_sae] += sum_b dz_bj */
  double* scratch;    /* CUDA: [threads, d_sae] */
} saek_dense_mask_args;

int saek_dense_mask(const saek_exec* exec, const saek_dense_mask_args* args);

/* ---- The CUDA runtime ------------------------------------------------------------------------------ */

/* Versions are CUDA's own numbers, such as 13000 for 13.0. */
typedef struct {
  char name[256];
  int major, minor;     /* compute capability */
  int64_t memory_bytes; /* total */
} saek_cuda_device;

int saek_cuda_count(int* devices, int* driver_version, int* runtime_version);
int saek_cuda_describe(int device, saek_cuda_device* out);

/* What the runtime said when this thread last got SAEK_CUDA_FAILED. */
const char* saek_cuda_error(void);

#ifdef __cplusplus
}
#endif

#endif
