/* The product and the decoded matrix, eight columns at a time: what AVX2 and NEON have in common.

   W is expanded by the tables of places.h, eight columns once for up to six tokens, and x is widened by `prepare`.

   A file that includes this defines before:
     LEVEL                            attributes of its functions
     lanes                            eight float32
     zero(), load(float *), store(float *, lanes), add_product(sum, a, b), total(lanes)
     widen_float16s(void *), widen_bfloat16s(void *)   eight entries as lanes
     widen_float16(bits), round_float16(float)         one entry
     expand(dtype, void *values, int byte)   the eight columns of four values
     expand_bits16(void *values, int byte, void *to), expand_bits32(…)   the same, bits unchanged */
#ifndef AST24_EIGHT_H
#define AST24_EIGHT_H

#include "frame.h"

#define INLINE LEVEL static inline __attribute__((always_inline))

/* In place of loops over rows and tokens of a tile: GCC would keep the sums in memory. */
#define EACH_ROW(DO) \
  DO(0) if (r > 1) { DO(1) } if (r > 2) { DO(2) DO(3) }
#define EACH_TOKEN(DO) \
  DO(0) if (n > 1) { DO(1) } if (n > 2) { DO(2) } if (n > 3) { DO(3) } if (n > 4) { DO(4) } if (n > 5) { DO(5) }
#define MOST_TOKENS 6

static inline int64_t size_of(int dtype) { return dtype == AST24_FLOAT32 ? 4 : 2; }

static inline float widen_bfloat16(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* to the nearest, ties to even; a NaN stays one */
static inline uint16_t round_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* y[token, row]: the bias is added, and the sum rounded */
INLINE void finish(int dtype, const ast24_product *p, int64_t token, int64_t row, float sum) {
  const int64_t at = token * p->rows + row;
  if (dtype == AST24_FLOAT32) {
    ((float *)p->y)[at] = p->bias ? sum + ((const float *)p->bias)[row] : sum;
  } else {
    const int is_float16 = dtype == AST24_FLOAT16;
    if (p->bias) {
      const uint16_t half = ((const uint16_t *)p->bias)[row];
      sum += is_float16 ? widen_float16(half) : widen_bfloat16(half);
    }
    ((uint16_t *)p->y)[at] = is_float16 ? round_float16(sum) : round_bfloat16(sum);
  }
}

/* `r` rows (1, 2 or 4) from `row` on and `n` tokens from `token` on; both are known when this is compiled */
INLINE void tile(int dtype, int r, int n, const ast24_product *p, int64_t row, int64_t token) {
  const int64_t bytes = p->columns / 8, row_size = bytes * 4 * size_of(dtype);
  const uint8_t *meta = p->meta + row * bytes;
  const char *values = (const char *)p->values + row * row_size;
  const float *x = (const float *)p->operand + token * p->padded;
  lanes sums[4][MOST_TOKENS], weights[4];
#define ZERO(t) sums[0][t] = sums[1][t] = sums[2][t] = sums[3][t] = zero();
  EACH_TOKEN(ZERO)
  for (int64_t b = 0; b < bytes; b++) {
#define EXPAND(i) weights[i] = expand(dtype, values + i * row_size + b * 4 * size_of(dtype), meta[i * bytes + b]);
    EACH_ROW(EXPAND)
#define ADD(i) sums[i][at] = add_product(sums[i][at], weights[i], eight);
#define TOKEN(t) { enum { at = t }; const lanes eight = load(x + t * p->padded + b * 8); EACH_ROW(ADD) }
    EACH_TOKEN(TOKEN)
  }
#define FINISH_ROW(i) finish(dtype, p, token + at, row + i, total(sums[i][at]));
#define FINISH(t) { enum { at = t }; EACH_ROW(FINISH_ROW) }
  EACH_TOKEN(FINISH)
}

/* `r` rows and all tokens, in tiles of about the same number of tokens */
INLINE void strip(int dtype, int r, const ast24_product *p, int64_t row) {
  for (int64_t token = 0; token < p->tokens;) {
    const int64_t left = p->tokens - token, tiles = (left + MOST_TOKENS - 1) / MOST_TOKENS;
    const int64_t n = (left + tiles - 1) / tiles;
    switch (n) {
      case 1: tile(dtype, r, 1, p, row, token); break;
      case 2: tile(dtype, r, 2, p, row, token); break;
      case 3: tile(dtype, r, 3, p, row, token); break;
      case 4: tile(dtype, r, 4, p, row, token); break;
      case 5: tile(dtype, r, 5, p, row, token); break;
      default: tile(dtype, r, 6, p, row, token);
    }
    token += n;
  }
}

INLINE void multiply(int dtype, const ast24_product *p, int64_t first, int64_t last) {
  int64_t row = first;
  if (p->tokens == 1)
    for (; row + 4 <= last; row += 4) tile(dtype, 4, 1, p, row, 0);
  if (p->tokens == 2)
    for (; row + 4 <= last; row += 4) tile(dtype, 4, 2, p, row, 0);
  for (; row + 2 <= last; row += 2) strip(dtype, 2, p, row);
  if (row < last) strip(dtype, 1, p, row);
}

/* eight entries of x */
INLINE lanes widen(int dtype, const void *x) {
  return dtype == AST24_FLOAT32 ? load(x) : dtype == AST24_FLOAT16 ? widen_float16s(x) : widen_bfloat16s(x);
}

static int64_t operand(const ast24_product *p) { return p->tokens * p->padded * 4; }

/* x as float32, 0 behind the columns */
INLINE void prepare(int dtype, const ast24_product *p, int64_t first, int64_t last) {
  for (int64_t t = 0; t < p->tokens; t++) {
    const char *from = (const char *)p->x + t * p->x_stride * size_of(dtype);
    float *to = (float *)p->operand + t * p->padded;
    for (int64_t c = first; c < last; c += 8)
      store(to + c, c < p->columns ? widen(dtype, from + c * size_of(dtype)) : zero());
  }
}

LEVEL static void decode(const ast24_matrix *m, int64_t first, int64_t last) {
  /* rows are whole bytes of positions, so all rows are one long row */
  const int64_t bytes = m->columns / 8;
  for (int64_t b = first * bytes; b < last * bytes; b++)
    if (m->itemsize == 4)
      expand_bits32((const char *)m->values + b * 16, m->meta[b], (char *)m->dense + b * 32);
    else
      expand_bits16((const char *)m->values + b * 8, m->meta[b], (char *)m->dense + b * 16);
}

#endif
