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
#ifdef AST24_HAS_AMX
    &ast24_amx_bf16,
#endif
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
  ast24_product product; /* of all tokens, or a piece of them */
  const ast24_way *way;
  int threads;  /* that share the rows of a piece */
  int64_t most; /* tokens of a piece */
  int *failed;
} product_call;

static void prepare_part(const void *what, int64_t first, int64_t last) {
  const product_call *call = what;
  call->way->prepare(&call->product, first, last);
}

static void rows_part(const void *what, int64_t first, int64_t last) {
  const product_call *call = what;
  call->way->rows(&call->product, first, last);
}

/* y[first:last], piece by piece */
static void tokens_part(const void *what, int64_t first, int64_t last) {
  product_call call = *(const product_call *)what;
  ast24_product *p = &call.product;
  const int64_t itemsize = p->dtype == AST24_FLOAT32 ? 4 : 2;
  p->x = (const char *)p->x + first * p->x_stride * itemsize;
  p->y = (char *)p->y + first * p->rows * itemsize;
  p->tokens = ast24_least(last - first, call.most);
  const int64_t bytes = call.way->operand(p);
  _Alignas(64) char on_stack[ON_STACK];
  char *operand = bytes <= ON_STACK ? on_stack : aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
  if (!operand) {
    __atomic_store_n(call.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  p->operand = operand;
  for (int64_t left = last - first; left > 0; left -= p->tokens) {
    const int64_t behind = left - call.most;
    p->tokens = behind > 0 && behind <= AST24_FEW ? call.most / 2 : ast24_least(left, call.most);
    share(prepare_part, &call, p->padded, 64, p->tokens * p->padded > PREPARED_ALONE ? call.threads : 1);
    share(rows_part, &call, p->rows, 16, call.threads);
    p->x = (const char *)p->x + p->tokens * p->x_stride * itemsize;
    p->y = (char *)p->y + p->tokens * p->rows * itemsize;
  }
  if (operand != on_stack) free(operand);
}

/* The most tokens of a thread's own product */
static int64_t most_own(const ast24_way *way, const ast24_product *p) {
  ast24_product few = *p;
  few.tokens = 16;
  const int64_t most = way->own / way->operand(&few) * 16;
  return most > way->most_own ? most : way->most_own;
}

/* y = x Wᵀ + b. 0: done; 1: out of memory.

   If there are enough tokens, each thread takes some of them. It waits for no other, and what it prepares stays in its
   own cache. Else threads share the rows. */
EXPORT int ast24_linear(
    int level, int dtype, const void *x, int64_t x_stride, const void *values, const void *meta, const void *bias,
    void *y, int64_t tokens, int64_t rows, int64_t columns, int threads) {
  const int64_t padded = (columns + 63) / 64 * 64;
  const ast24_way *way = levels[level]->ways[dtype];
  const int by_tokens = tokens >= threads * way->most_own;
  int failed = 0;
  product_call call = {
      {dtype, tokens, rows, columns, x, x_stride, values, meta, bias, y, padded, NULL},
      way, by_tokens ? 1 : threads, way->most, &failed};
  if (by_tokens) call.most = most_own(way, &call.product);
  if (by_tokens)
    share(tokens_part, &call, tokens, 16, threads);
  else
    tokens_part(&call, 0, tokens);
  return failed;
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
