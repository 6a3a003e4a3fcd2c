/* The C interface of slimformer's int8 kernels.
 *
 * A linear layer is y = x W^T + bias: W is (outputs, inputs), int8 with one fp32 scale for each output, stored in the packed
 * format of docs/decisions/0020-kernels.md; x is quantized to uint8 with a scale and a zero point for each row, or for all rows.
 * Every processor path gives the same bits. No function keeps or frees what it is handed; all are safe to call from many threads.
 */
#ifndef SLIMFORMER_KERNELS_H
#define SLIMFORMER_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SFK_API __attribute__((visibility("default")))
#define SFK_INTERFACE 2 /* grows when a declaration below changes */

typedef enum {
  SFK_OK = 0,
  SFK_BAD_ARGUMENT = 1,
  SFK_BAD_FILE = 2,     /* packed bytes that are damaged, cut short, or made to mislead */
  SFK_NEWER_FILE = 3,   /* packed bytes of a later version of the format */
  SFK_NO_SUCH_PATH = 4, /* a processor path that this library or this processor lacks */
  SFK_NO_MEMORY = 5
} sfk_status;

typedef enum { SFK_NONE = 0, SFK_RELU = 1, SFK_GELU = 2, SFK_GELU_TANH = 3 } sfk_activation;

/* Runs task(user, i) for all i below count, in any order, at once or in turn, and returns when all are done. */
typedef void (*sfk_parallel)(void *pool, void (*task)(void *user, size_t index), size_t count, void *user);

typedef struct sfk_linear sfk_linear;

SFK_API int sfk_interface(void);
SFK_API const char *sfk_version(void);
/* What went wrong in this thread's last call that did not give SFK_OK: one sentence. */
SFK_API const char *sfk_message(void);

/* The processor path in use: "avx512vnni", "avxvnni", "avx2", "neon" or "scalar"; the best one that the processor has, or the one
 * that the environment variable SLIMFORMER_KERNELS_PATH names. NULL if that one cannot run here. */
SFK_API const char *sfk_path(void);
/* Changes it for the whole process; for tests. */
SFK_API sfk_status sfk_set_path(const char *name);

/* Packs a matrix. block_rows 0: all weights; 1, 2, 4 or 16: only blocks of that many outputs by 4 inputs that are not all zero.
 * weights: (outputs, inputs); scales and bias: (outputs); bias may be NULL. */
SFK_API sfk_status sfk_pack_size(int block_rows, int64_t outputs, int64_t inputs, const int8_t *weights, size_t *bytes);
SFK_API sfk_status sfk_pack(int block_rows, int64_t outputs, int64_t inputs, const int8_t *weights, const float *scales,
                            const float *bias, void *packed, size_t bytes);

/* Checks packed bytes (aligned to 64) and makes a view of them: they must outlive it. */
SFK_API sfk_status sfk_open(const void *packed, size_t bytes, sfk_linear **linear);
SFK_API void sfk_close(sfk_linear *linear);
SFK_API int64_t sfk_outputs(const sfk_linear *linear);
SFK_API int64_t sfk_inputs(const sfk_linear *linear);
SFK_API int64_t sfk_blocks(const sfk_linear *linear); /* stored blocks; of a dense matrix 0 */

/* One product; all matrices are row by row without gaps. Set the rest to zero. Either x or x_codes is the input, and exactly
 * one of the outputs is written. */
typedef struct {
  int64_t rows;
  const float *x;         /* (rows, inputs): quantized here, by x_scale and x_zero if given, else each row by its own extremes */
  const uint8_t *x_codes; /* (rows, inputs): integers; x = (code - zero) * scale */
  const float *x_scale;   /* (rows) if per_row, else (1) */
  const uint8_t *x_zero;  /* likewise */
  int per_row;
  int activation;        /* an sfk_activation */
  const float *residual; /* (rows, outputs), added after the activation, or NULL */
  const float *norm_gain, *norm_shift; /* (outputs): a LayerNorm over each row, last; or NULL */
  float norm_epsilon;
  float *y;         /* (rows, outputs) */
  int32_t *y_sums;  /* (rows, outputs): sums of (code - zero) * weight, before all scales; no bias, activation, residual, norm */
  uint8_t *y_codes; /* (rows, outputs): the result as integers, by y_scale and y_zero */
  float y_scale;
  uint8_t y_zero;
  sfk_parallel parallel; /* NULL: in this thread */
  void *pool;
  int threads; /* how many the pool has; splits small products */
} sfk_product;

SFK_API sfk_status sfk_multiply(const sfk_linear *linear, const sfk_product *product);

/* A whole encoder of the BERT kind (post-norm; layers and heads may differ, sublayers may be missing), packed as src/encoder.cc
 * describes: token ids in, hidden states out. Rows are computed without their padding, and each result depends on its row alone. */
typedef struct sfk_encoder sfk_encoder;

typedef struct {
  int64_t rows, columns;
  const int64_t *ids;   /* (rows, columns) */
  const int64_t *mask;  /* likewise: 0 is padding; NULL: there is none */
  const int64_t *types; /* likewise; NULL: all 0 */
  float *hidden;        /* (rows, columns, hidden size), 0 where the mask is; or (rows, hidden size): that of each first column */
  sfk_parallel parallel;
  void *pool;
  int threads;
} sfk_texts;

SFK_API sfk_status sfk_encoder_open(const void *packed, size_t bytes, sfk_encoder **encoder);
SFK_API void sfk_encoder_close(sfk_encoder *encoder);
SFK_API int64_t sfk_encoder_hidden(const sfk_encoder *encoder);
SFK_API int sfk_encoder_first_only(const sfk_encoder *encoder);
SFK_API sfk_status sfk_encoder_run(const sfk_encoder *encoder, const sfk_texts *texts);
/* The digest that a packed encoder carries in its header. */
SFK_API uint64_t sfk_digest(const void *packed, size_t bytes);

/* Operations per second of a loop of dot products in registers, and bytes per second read from a buffer: for rooflines. One thread. */
SFK_API double sfk_peak_operations(void);
SFK_API double sfk_peak_bytes(size_t buffer_bytes);

#ifdef __cplusplus
}
#endif
#endif
