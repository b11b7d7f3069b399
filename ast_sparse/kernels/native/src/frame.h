/* What the levels (one file each) and the frame agree on. A level is one way to compute, for CPUs with some features.

   W has `rows` rows of `columns` entries, columns a multiple of 8. It is stored in the 2:4 code: the kept values of a
   row in order, columns / 2 of them, and columns / 8 bytes of positions. A byte has two groups of four columns, the
   first in its low half; a nibble is idx0 | idx1 << 2. Rows follow each other without a gap, so nothing but the first
   entry of a tensor is aligned, and nothing may be read behind the last. */
#ifndef AST24_FRAME_H
#define AST24_FRAME_H

#include <stdint.h>
#include <string.h>

/* GCC 10 and Clang 9 are the first that know bfloat16 */
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define AST24_HAS_AVX512
#endif
/* GCC 11 and Clang 12 are the first that know all of AMX that is used; their assembler may be older */
#if defined(AST24_HAS_AVX512) && defined(__linux__) && !defined(AST24_NO_AMX) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define AST24_HAS_AMX
#endif
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define AST24_HAS_NEON
#endif

enum { AST24_BFLOAT16, AST24_FLOAT16, AST24_FLOAT32, AST24_DTYPES };

/* y = x Wᵀ + b, all tensors of one dtype. */
typedef struct {
  int dtype;
  int64_t tokens; /* 1 to `most` of the way, or of a thread's own product: the frame cuts longer ones */
  int64_t rows, columns;
  const void *x;   /* tokens rows of `columns` entries, x_stride entries apart */
  int64_t x_stride;
  const void *values;  /* [rows, columns / 2] */
  const uint8_t *meta; /* [rows, columns / 8] */
  const void *bias;    /* [rows], or NULL */
  void *y;             /* [tokens, rows] */
  int64_t padded;      /* columns, rounded up to a multiple of 64 */
  void *operand;       /* x as `prepare` arranged it, aligned to 64 bytes; read by all threads */
} ast24_product;

/* A product of up to AST24_FEW tokens may add in another order than a larger one, and only such a product: the frame cuts
   none of them off a longer one. */
enum { AST24_FEW = 4 };

/* The dense matrix [rows, columns], exactly 0.0 where pruned; the bits of kept values do not change. */
typedef struct {
  int itemsize; /* 2 or 4 */
  int64_t rows, columns;
  const void *values;
  const uint8_t *meta;
  void *dense;
} ast24_matrix;

/* How one dtype is multiplied. Each thread has tokens of its own, or all share `prepare` by columns, then `rows` by rows.
   The result of a row and a token must depend neither on first and last nor on other tokens' values. Sums are in float32
   and rounded once, after the bias was added. */
typedef struct {
  int64_t most;     /* tokens of a product whose rows threads share; a multiple of 16 */
  int64_t most_own; /* tokens of a thread's own product: x as it is prepared for more leaves the second cache */
  int64_t own;      /* bytes: a thread's own product may have more tokens while x as it is prepared takes no more; or 0 */
  int64_t (*operand)(const ast24_product *); /* bytes that prepare needs */
  void (*prepare)(const ast24_product *, int64_t first, int64_t last); /* multiples of 64, up to padded */
  void (*rows)(const ast24_product *, int64_t first, int64_t last);    /* y[:, first:last]; first is a multiple of 16 */
} ast24_way;

typedef struct {
  const char *name;
  int (*usable)(void); /* whether this CPU has the features */
  const ast24_way *ways[AST24_DTYPES];
  void (*decode)(const ast24_matrix *, int64_t first, int64_t last); /* dense[first:last] */
} ast24_level;

/* Defined in the file of the level; the frame has them in a table, best first. */
extern const ast24_level ast24_amx_bf16, ast24_avx512_bf16, ast24_avx512, ast24_avx2, ast24_neon;

/* A row of W is read like a stream, but the hardware stops looking ahead at the end of each page. So the lines that come
   AST24_AHEAD bytes later, perhaps those of the next row, are fetched, with as many bytes of positions as belong to
   16-bit values. The last columns of a row, too few for a whole step, fetch nothing. Behind the last row nothing is
   there to be fetched, which does no harm. */
enum { AST24_AHEAD = 2048 };
static inline __attribute__((always_inline)) void ast24_fetch_ahead(const void *values, int64_t bytes, const void *meta) {
  for (int64_t line = 0; line < bytes; line += 64)
    __builtin_prefetch((const void *)((uintptr_t)values + (uintptr_t)line + AST24_AHEAD));
  __builtin_prefetch((const void *)((uintptr_t)meta + AST24_AHEAD / 8));
}

static inline int64_t ast24_least(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
