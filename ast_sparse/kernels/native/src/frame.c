/* What Python calls: the levels of this CPU, a product, a decoded matrix; and how the work is shared by threads.

   No OpenMP is linked. torch's own team is used, by the functions of the OpenMP library that torch has loaded. A second
   team beside it would slow both down, because idle threads of both keep spinning. */
#include "frame.h"

#include <stddef.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))
#define ON_STACK (64 << 10)

static const ast24_level *const levels[] = {
#ifdef AST24_HAS_AVX512
    &ast24_avx512_bf16,
    &ast24_avx512,
#endif
#ifdef __x86_64__
    &ast24_avx2,
#endif
#ifdef AST24_HAS_NEON
    &ast24_neon,
#endif
    NULL,
};

EXPORT int ast24_abi(void) { return 1; }

/* Name of the level, or NULL behind the last one. The best is first. */
EXPORT const char *ast24_name(int level) { return levels[level] ? levels[level]->name : NULL; }

/* 0: this CPU cannot run it; 1: it can; 3: and it may be chosen without being named. */
EXPORT int ast24_usable(int level) { return levels[level]->usable() ? 1 | levels[level]->automatic << 1 : 0; }

static void (*run_team)(void (*)(void *), void *, unsigned, unsigned);
static int (*number_in_team)(void);
static int (*size_of_team)(void);

/* GOMP_parallel, omp_get_thread_num, omp_get_num_threads of one OpenMP library; without them everything is serial. */
EXPORT void ast24_openmp(void *parallel, void *number, void *size) {
  run_team = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
  number_in_team = (int (*)(void))number;
  size_of_team = (int (*)(void))size;
}

typedef struct {
  void (*part)(const void *, int64_t, int64_t);
  const void *what;
  int64_t rows;
} shared;

static void part_of_team(void *argument) {
  const shared *work = argument;
  /* asked here, because a team may be smaller than wanted; whole blocks of 16 rows, so that y is shared by cache lines */
  const int64_t each = size_of_team(), me = number_in_team(), blocks = (work->rows + 15) / 16;
  const int64_t first = blocks * me / each * 16, last = ast24_least(blocks * (me + 1) / each * 16, work->rows);
  if (first < last) work->part(work->what, first, last);
}

static void share(void (*part)(const void *, int64_t, int64_t), const void *what, int64_t rows, int threads) {
  shared work = {part, what, rows};
  if (threads > 1 && run_team)
    run_team(part_of_team, &work, (unsigned)threads, 0);
  else
    part(what, 0, rows);
}

typedef struct {
  ast24_product product;
  void (*rows)(const ast24_product *, int64_t, int64_t);
} product_call;

typedef struct {
  ast24_matrix matrix;
  void (*decode)(const ast24_matrix *, int64_t, int64_t);
} matrix_call;

static void product_part(const void *what, int64_t first, int64_t last) {
  const product_call *call = what;
  call->rows(&call->product, first, last);
}

/* y = x Wᵀ + b. 0: done; 1: out of memory; 2: the level does not serve the dtype. */
EXPORT int ast24_linear(
    int level, int dtype, const void *x, int64_t x_stride, const void *values, const void *meta, const void *bias,
    void *y, int64_t tokens, int64_t rows, int64_t columns, int threads) {
  const ast24_way *way = &levels[level]->ways[dtype];
  if (!way->rows) return 2;
  const int64_t padded = (columns + 63) / 64 * 64, bytes = tokens * padded * way->itemsize;
  _Alignas(64) char on_stack[ON_STACK];
  void *operand = bytes <= ON_STACK ? on_stack : aligned_alloc(64, (size_t)bytes);
  if (!operand) return 1;
  product_call call = {
      {dtype, tokens, rows, columns, x, x_stride, values, meta, bias, y, padded, operand}, way->rows};
  way->prepare(&call.product);
  share(product_part, &call, rows, threads);
  if (operand != on_stack) free(operand);
  return 0;
}

static void matrix_part(const void *what, int64_t first, int64_t last) {
  const matrix_call *call = what;
  call->decode(&call->matrix, first, last);
}

/* dense = W. 0: done; 2: the level does not serve it. */
EXPORT int ast24_decode(
    int level, int itemsize, const void *values, const void *meta, void *dense, int64_t rows, int64_t columns,
    int threads) {
  matrix_call call = {{itemsize, rows, columns, values, meta, dense}, levels[level]->decode};
  if (!call.decode) return 2;
  share(matrix_part, &call, rows, threads);
  return 0;
}
