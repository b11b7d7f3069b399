/* Products with more than AST24_FEW tokens: each lane is a token. Both AVX-512 levels include this.

   Tokens are cut into blocks of LARGEST, rows into strips. The sums of a strip and a block of tokens stay in the cache;
   they go on over a few groups of columns at a time, so that x for these groups stays in the first cache. In each range
   of 16 groups every second product goes to a second sum, which is then added: products wait less for each other. So the
   result of a token does not depend on how wide its block is.

   A file that includes this defines before:
     TARGET                       attributes of its functions
     block_bytes(p, width)        bytes of x for a block of tokens
     sum(dtype, r, width, p, row, group, groups, block, sums)
                                  the sums of r rows and a block go on over `groups` groups from `group` on */

enum { LARGEST = 64, STRIP = 128, STRIP_BYTES = 128 << 10 };

/* The last block is as wide as its tokens need. */
INLINE int width_of(int64_t tokens) {
  return tokens > 48 ? 64 : tokens > 32 ? 48 : tokens > 16 ? 32 : tokens > 8 ? 16 : 8;
}

INLINE int64_t blocks_bytes(const ast24_product *p) {
  const int64_t whole = p->tokens / LARGEST, left = p->tokens % LARGEST;
  return whole * block_bytes(p, LARGEST) + (left ? block_bytes(p, width_of(left)) : 0);
}

/* One block of tokens and up to STRIP rows, r at a time; x for `cached` groups stays in the first cache. All but p, row,
   rows, block, token and next are known when this is compiled. */
TARGET INLINE void strip(
    int dtype, int r, int width, int64_t cached, const ast24_product *p, int64_t row, int64_t rows, const char *block,
    int64_t token, upcoming *next) {
  _Alignas(64) float sums[STRIP * LARGEST];
  const int64_t groups = p->columns / 4, calls = (rows / r + 1) * ((groups + cached - 1) / cached);
  const int64_t lines = next->lines / calls + 1;
  for (int64_t group = 0; group < groups; group += cached) {
    const int64_t count = ast24_least(groups - group, cached);
    int64_t i = 0;
    for (; i + r <= rows; i += r) {
      fetch(next, lines);
      sum(dtype, r, width, p, row + i, group, count, block, sums + i * width);
    }
    for (; i < rows; i++) sum(dtype, 1, width, p, row + i, group, count, block, sums + i * width);
  }
  finish_strip(p, sums, width, token, ast24_least(p->tokens - token, width), row, rows);
}

typedef void strip_function(
    const ast24_product *p, int64_t row, int64_t rows, const char *block, int64_t token, upcoming *next);

#define STRIP_OF(name, dtype, r, width, cached) \
  TARGET static void name##width( \
      const ast24_product *p, int64_t row, int64_t rows, const char *block, int64_t token, upcoming *next) { \
    strip(dtype, r, width, cached, p, row, rows, block, token, next); \
  }

/* `name` is a function for strips of the dtype and any width */
#define STRIPS(name, dtype) \
  STRIP_OF(name, dtype, 4, 8, 64) \
  STRIP_OF(name, dtype, 4, 16, 64) \
  STRIP_OF(name, dtype, 4, 32, 32) \
  STRIP_OF(name, dtype, 2, 48, 16) \
  STRIP_OF(name, dtype, 2, 64, 16) \
  static strip_function *name(int width) { \
    return width == 8 ? name##8 : width == 16 ? name##16 : width == 32 ? name##32 : width == 48 ? name##48 : name##64; \
  }

INLINE void rows_many(const ast24_product *p, int64_t first, int64_t last, strip_function *(*strip_of)(int width)) {
  const int64_t size = p->dtype == AST24_FLOAT32 ? 4 : 2, row_bytes = p->columns / 2 * size;
  const int64_t fitting = STRIP_BYTES / row_bytes / 16 * 16, step = fitting < 16 ? 16 : ast24_least(fitting, STRIP);
  for (int64_t row = first; row < last; row += step) {
    const int64_t count = ast24_least(last - row, step), after = row + count, more = ast24_least(last - after, step);
    upcoming next = rows_ahead(p, after, more);
    const char *block = p->operand;
    for (int64_t token = 0; token < p->tokens; token += LARGEST) {
      const int width = width_of(p->tokens - token);
      strip_of(width)(p, row, count, block, token, &next);
      block += block_bytes(p, width);
    }
  }
}
