/* What Python calls: the levels of this CPU, a product, a decoded matrix; and how the work is shared by threads.

   No OpenMP is linked. torch's own team is used, by the functions of the OpenMP library that torch has loaded. A second
   team beside it would slow both down, because idle threads of both keep spinning. */
#include "frame.h"

#include <stddef.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))
#define ON_STACK (64 << 10)
#define PREPARED_ALONE (64 << 10) /* entries of x */

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

/* Whether this CPU can run it. */
EXPORT int ast24_usable(int level) { return levels[level]->usable() != 0; }

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
  int64_t size, block;
} shared;

static void part_of_team(void *argument) {
  const shared *work = argument;
  /* asked here, because a team may be smaller than wanted */
  const int64_t each = size_of_team(), me = number_in_team(), blocks = (work->size + work->block - 1) / work->block;
  const int64_t first = blocks * me / each * work->block;
  const int64_t last = ast24_least(blocks * (me + 1) / each * work->block, work->size);
  if (first < last) work->part(work->what, first, last);
}

/* part(what, 0, size) in whole blocks, one range of them for each thread */
static void share(
    void (*part)(const void *, int64_t, int64_t), const void *what, int64_t size, int64_t block, int threads) {
  shared work = {part, what, size, block};
  if (threads > 1 && run_team)
    run_team(part_of_team, &work, (unsigned)threads, 0);
  else
    part(what, 0, size);
}

typedef struct {
  ast24_product product;
  const ast24_way *way;
} product_call;

static void prepare_part(const void *what, int64_t first, int64_t last) {
  const product_call *call = what;
  call->way->prepare(&call->product, first, last);
}

static void rows_part(const void *what, int64_t first, int64_t last) {
  const product_call *call = what;
  call->way->rows(&call->product, first, last);
}

/* y = x Wᵀ + b. 0: done; 1: out of memory. */
EXPORT int ast24_linear(
    int level, int dtype, const void *x, int64_t x_stride, const void *values, const void *meta, const void *bias,
    void *y, int64_t tokens, int64_t rows, int64_t columns, int threads) {
  const ast24_way *way = levels[level]->ways[dtype];
  const int64_t itemsize = dtype == AST24_FLOAT32 ? 4 : 2, padded = (columns + 63) / 64 * 64;
  product_call call = {
      {dtype, ast24_least(tokens, AST24_MOST_TOKENS), rows, columns, x, x_stride, values, meta, bias, y, padded, NULL},
      way};
  ast24_product *p = &call.product;
  const int64_t bytes = way->operand(p);
  _Alignas(64) char on_stack[ON_STACK];
  void *operand = bytes <= ON_STACK ? on_stack : aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
  if (!operand) return 1;
  p->operand = operand;
  for (int64_t token = 0; token < tokens; token += p->tokens) {
    const int64_t left = tokens - token, behind = left - AST24_MOST_TOKENS;
    p->tokens = behind > 0 && behind <= AST24_FEW ? AST24_MOST_TOKENS / 2 : ast24_least(left, AST24_MOST_TOKENS);
    p->x = (const char *)x + token * x_stride * itemsize;
    p->y = (char *)y + token * rows * itemsize;
    share(prepare_part, &call, padded, 64, p->tokens * padded > PREPARED_ALONE ? threads : 1);
    share(rows_part, &call, rows, 16, threads);
  }
  if (operand != on_stack) free(operand);
  return 0;
}

typedef struct {
  ast24_matrix matrix;
  void (*decode)(const ast24_matrix *, int64_t, int64_t);
} matrix_call;

static void matrix_part(const void *what, int64_t first, int64_t last) {
  const matrix_call *call = what;
  call->decode(&call->matrix, first, last);
}

/* dense = W */
EXPORT void ast24_decode(
    int level, int itemsize, const void *values, const void *meta, void *dense, int64_t rows, int64_t columns,
    int threads) {
  matrix_call call = {{itemsize, rows, columns, values, meta, dense}, levels[level]->decode};
  share(matrix_part, &call, rows, 16, threads);
}
