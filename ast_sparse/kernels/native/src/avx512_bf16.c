/* AVX-512 with VBMI2 and BF16: W is never expanded, and half the arithmetic of a dense product is done. Dot products of
   bfloat16 take subnormal numbers as 0. The other dtypes are those of avx512.c.

   Up to AST24_FEW tokens: for 64 columns, one load of eight bytes of positions, a multishift that spreads them over 32 lanes,
   a permutation of two registers of x for each token, one dot product.

   More tokens: each lane is a token. A group of four columns has six pairs of positions. `prepare` writes, for each
   group, the six vectors with the two entries of x at a pair, so a group of W is one dot product of its two values,
   broadcast, and the vector of its pair. Vectors lie at group * 7 + nibble: the six nibbles that occur (4, 8, 9, 12, 13,
   14) differ modulo 7, so groups interleave without a conflict, and the address needs no table. */
#include "frame.h"
#ifdef AST24_HAS_AVX512
#include "avx512.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,f16c,fma")))

/* x of a block: vectors of `width` pairs. Any nibble, even 15, lies inside. */
INLINE int64_t block_bytes(const ast24_product *p, int width) { return (p->padded / 4 * 7 + 9) * width * 4; }

/* The sums of r rows and a block of tokens go on over `groups` groups from `group` on; r and width are known when this
   is compiled. */
TARGET INLINE void sum(
    int dtype, int r, int width, const ast24_product *p, int64_t row, int64_t group, int64_t groups, const char *block,
    float *to) {
  (void)dtype;
  const int64_t bytes = p->columns / 8, size = width * 4;
  const int n = width < 16 ? 1 : width / 16;
  __m512 sums[8][4];
  const char *values = (const char *)p->values + row * bytes * 8 + group * 4;
  const uint8_t *meta = p->meta + row * bytes + group / 2;
  block += group * 7 * size;
  for (int i = 0; i < r; i++)
    for (int t = 0; t < n; t++) sums[i][t] = group ? load_sums(width, to + i * width + 16 * t) : _mm512_setzero_ps();
#define GROUP(g) \
  for (int i = 0; i < r; i++) { \
    __m512 *to_add = (g) % 2 ? odd[i] : sums[i]; \
    const char *pair = block + (g) * 7 * size + (nibbles[i] >> 4 * (g) & 15) * size; \
    const char *value = values + i * bytes * 8 + (g) * 4; \
    int32_t two; \
    memcpy(&two, value, 4); \
    if (width == 8) { \
      const __m256bh x = (__m256bh)_mm256_loadu_si256((const void *)pair), w = (__m256bh)_mm256_set1_epi32(two); \
      to_add[0] = _mm512_castps256_ps512(_mm256_dpbf16_ps(_mm512_castps512_ps256(to_add[0]), w, x)); \
    } else { \
      const __m512bh w = (__m512bh)_mm512_set1_epi32(two); \
      for (int t = 0; t < n; t++) \
        to_add[t] = _mm512_dpbf16_ps(to_add[t], w, (__m512bh)_mm512_loadu_si512(pair + 64 * t)); \
    } \
  }
#define JOIN for (int i = 0; i < r; i++) for (int t = 0; t < n; t++) sums[i][t] = _mm512_add_ps(sums[i][t], odd[i][t]);
  for (; groups >= 16; groups -= 16, meta += 8, values += 64, block += 16 * 7 * size) {
    uint64_t nibbles[8];
    __m512 odd[8][4];
    for (int i = 0; i < r; i++) {
      memcpy(&nibbles[i], meta + i * bytes, 8);
      for (int t = 0; t < n; t++) odd[i][t] = _mm512_setzero_ps();
    }
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) GROUP(g)
    JOIN
  }
  if (groups) {
    uint64_t nibbles[8];
    __m512 odd[8][4];
    for (int i = 0; i < r; i++) {
      nibbles[i] = 0;
      memcpy(&nibbles[i], meta + i * bytes, (size_t)groups / 2);
      for (int t = 0; t < n; t++) odd[i][t] = _mm512_setzero_ps();
    }
    for (int g = 0; g < groups; g += 2) { GROUP(g) GROUP(g + 1) }
    JOIN
  }
  for (int i = 0; i < r; i++)
    for (int t = 0; t < n; t++) store_sums(width, to + i * width + 16 * t, sums[i][t]);
}

#include "strips.h"

static int64_t operand(const ast24_product *p) {
  return p->tokens <= AST24_FEW ? p->tokens * p->padded * 2 : blocks_bytes(p);
}

INLINE void prepare_few(const ast24_product *p, int64_t first, int64_t last) {
  const int64_t end = ast24_least(last, p->columns);
  for (int64_t t = 0; t < p->tokens; t++) {
    uint16_t *to = (uint16_t *)p->operand + t * p->padded;
    memcpy(to + first, (const uint16_t *)p->x + t * p->x_stride + first, (size_t)(end - first) * 2);
    memset(to + end, 0, (size_t)(last - end) * 2);
  }
}

/* the pairs of up to 16 tokens, at `to` of a block `width` wide */
TARGET INLINE void prepare_pairs(
    const ast24_product *p, const uint16_t *x, int64_t tokens, char *to, int width, int64_t first, int64_t last) {
  static const uint8_t low[6] = {0, 0, 1, 0, 1, 2}, high[6] = {1, 2, 2, 3, 3, 3};
  __m512i pick[6];
  for (int i = 0; i < 6; i++) { /* entry `low` of token t, then entry `high`; a token is four entries */
    const __m512i pair = _mm512_set1_epi32(low[i] | high[i] << 16), step = _mm512_set1_epi32(4 << 16 | 4);
    const __m512i token = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i both = _mm512_or_si512(token, _mm512_slli_epi32(token, 16));
    pick[i] = _mm512_add_epi16(pair, _mm512_mullo_epi16(both, step));
  }
  const __m512i eight = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), zero = _mm512_setzero_si512();
  const __m512i stride = _mm512_mullo_epi64(eight, _mm512_set1_epi64(p->x_stride));
  const __mmask8 there = (__mmask8)lanes_below(tokens), there8 = (__mmask8)(lanes_below(tokens) >> 8);
  const __mmask16 stored = lanes_below(width);
  const int64_t end = ast24_least(last, p->columns);
  for (int64_t c = first; c < end; c += 4) {
    const __m512i front = _mm512_mask_i64gather_epi64(zero, there, stride, x + c, 2);
    const __m512i back = there8 ? _mm512_mask_i64gather_epi64(zero, there8, stride, x + 8 * p->x_stride + c, 2) : zero;
    for (int i = 0; i < 6; i++)
      _mm512_mask_storeu_epi32(to + (c / 4 * 7 + (low[i] | high[i] << 2)) * width * 4, stored,
                               _mm512_permutex2var_epi16(front, pick[i], back));
  }
}

TARGET static void prepare(const ast24_product *p, int64_t first, int64_t last) {
  if (p->tokens <= AST24_FEW) {
    prepare_few(p, first, last);
    return;
  }
  char *to = p->operand;
  for (int64_t token = 0; token < p->tokens; token += LARGEST) {
    const int width = width_of(p->tokens - token);
    for (int64_t t = token; t < token + width; t += 16)
      prepare_pairs(p, (const uint16_t *)p->x + t * p->x_stride, p->tokens - t, to + (t - token) * 4, width, first, last);
    to += block_bytes(p, width);
  }
}

/* The sums of one row and `n` tokens, in 16 lanes. Rows are read one after the other, as one long stream: reading several
   at once halves the speed of memory. Four sums for each token, because a dot product takes longer than its turn. */
TARGET INLINE void few(int n, const ast24_product *p, int64_t row, __m512i spread, __m512i base, __m512 *totals_of) {
  const int64_t columns = p->columns;
  const uint16_t *x = p->operand, *values = (const uint16_t *)p->values + row * (columns / 2);
  const uint8_t *meta = p->meta + row * (columns / 8);
  const __m512i three = _mm512_set1_epi16(3);
  __m512 sums[AST24_FEW][4];
  for (int t = 0; t < n; t++)
    for (int j = 0; j < 4; j++) sums[t][j] = _mm512_setzero_ps();
/* 64 columns: (spread nibbles & 3) | base are the places of 32 entries in two registers of x */
#define COLUMNS(j, nibbles, weights) { \
    const __m512i all = _mm512_multishift_epi64_epi8(spread, _mm512_set1_epi64((int64_t)(nibbles))); \
    const __m512i places = _mm512_ternarylogic_epi64(all, three, base, 0xEA); \
    const __m512bh w = (__m512bh)(weights); \
    for (int t = 0; t < n; t++) { \
      const __m512i low = _mm512_load_si512(x + t * p->padded + 64 * (j)); \
      const __m512i high = _mm512_load_si512(x + t * p->padded + 64 * (j) + 32); \
      sums[t][j] = _mm512_dpbf16_ps(sums[t][j], w, (__m512bh)_mm512_permutex2var_epi16(low, places, high)); \
    } \
  }
  int64_t left = columns;
  for (; left >= 256; left -= 256, x += 256, values += 128, meta += 32) {
    ast24_fetch_ahead(values, 256, meta);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      uint64_t nibbles;
      memcpy(&nibbles, meta + 8 * j, 8);
      COLUMNS(j, nibbles, _mm512_loadu_si512(values + 32 * j))
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const int64_t here = ast24_least(left - 64 * j, 64);
    if (here <= 0) break;
    uint64_t nibbles = 0;
    memcpy(&nibbles, meta + 8 * j, (size_t)here / 8);
    COLUMNS(j, nibbles, _mm512_maskz_loadu_epi16(0xffffffffu >> (32 - here / 2), values + 32 * j))
  }
  for (int t = 0; t < n; t++)
    totals_of[16 * t] = _mm512_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]), _mm512_add_ps(sums[t][2], sums[t][3]));
}

TARGET INLINE void rows_few(int n, const ast24_product *p, int64_t first, int64_t last) {
  uint8_t shifts[64];
  uint16_t bases[32];
  for (int lane = 0; lane < 32; lane++) {
    shifts[2 * lane] = (uint8_t)(2 * lane), shifts[2 * lane + 1] = 0;
    bases[lane] = (uint16_t)(lane / 2 * 4);
  }
  const __m512i spread = _mm512_loadu_si512(shifts), base = _mm512_loadu_si512(bases);
  __m512 sums[AST24_FEW * 16];
  for (int i = 0; i < n * 16; i++) sums[i] = _mm512_setzero_ps();
  for (int64_t row = first; row < last; row += 16) {
    const int64_t count = ast24_least(last - row, 16);
    for (int64_t i = 0; i < count; i++) few(n, p, row + i, spread, base, sums + i);
    for (int t = 0; t < n; t++) finish(p, t, row, lanes_below(count), totals(sums + 16 * t));
  }
}

STRIPS(strip_of, AST24_BFLOAT16)

TARGET static void rows(const ast24_product *p, int64_t first, int64_t last) {
  switch (p->tokens) {
    case 1: rows_few(1, p, first, last); break;
    case 2: rows_few(2, p, first, last); break;
    case 3: rows_few(3, p, first, last); break;
    case 4: rows_few(4, p, first, last); break;
    default: rows_many(p, first, last, strip_of);
  }
}

static int usable(void) {
  return ast24_avx512.usable() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bf16");
}

const ast24_way ast24_avx512_bf16_bfloat16 = {128, 64, 0, operand, prepare, rows};

const ast24_level ast24_avx512_bf16 = {
    "avx512_bf16", usable, {&ast24_avx512_bf16_bfloat16, &ast24_avx512_float16, &ast24_avx512_float32}, ast24_avx512_decode};
#endif
