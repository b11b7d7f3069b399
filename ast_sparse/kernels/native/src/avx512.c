/* AVX-512 with float32 arithmetic, for all dtypes; half the arithmetic of a dense product is done.

   Up to AST24_FEW tokens: for 32 columns the 16 entries of x that meet kept values are picked from two registers by the stored
   positions. 16-bit values are widened when they are loaded. More tokens: each lane is a token; `prepare` transposes x, so
   a kept value, broadcast, is multiplied with the vector of its column. */
#include "frame.h"
#ifdef AST24_HAS_AVX512
#include "avx512.h"

#define TARGET WIDE

INLINE int64_t size_of(int dtype) { return dtype == AST24_FLOAT32 ? 4 : 2; }

/* 16 entries of a dtype as float32; only the lanes of `mask` are read, the others are 0 */
TARGET INLINE __m512 load(int dtype, const void *at, __mmask16 mask) {
  if (dtype == AST24_FLOAT32) return _mm512_maskz_loadu_ps(mask, at);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, at);
  if (dtype == AST24_FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* the two values of a group, each in all lanes */
TARGET INLINE void broadcast(int dtype, const void *values, __m512 *two) {
  if (dtype == AST24_FLOAT32) {
    float value[2];
    memcpy(value, values, 8);
    two[0] = _mm512_set1_ps(value[0]), two[1] = _mm512_set1_ps(value[1]);
  } else if (dtype == AST24_FLOAT16) {
    int16_t value[2];
    memcpy(value, values, 4);
    two[0] = _mm512_cvtph_ps(_mm256_set1_epi16(value[0])), two[1] = _mm512_cvtph_ps(_mm256_set1_epi16(value[1]));
  } else {
    int32_t both;
    memcpy(&both, values, 4);
    const __m512i all = _mm512_set1_epi32(both);
    two[0] = _mm512_castsi512_ps(_mm512_slli_epi32(all, 16));
    two[1] = _mm512_castsi512_ps(_mm512_and_si512(all, _mm512_set1_epi32((int)0xffff0000)));
  }
}

/* x of a block: vectors of `width` tokens */
INLINE int64_t block_bytes(const ast24_product *p, int width) { return p->padded * width * 4; }

/* The sums of r rows and a block of tokens go on over `groups` groups from `group` on; dtype, r and width are known when
   this is compiled. */
TARGET INLINE void sum(
    int dtype, int r, int width, const ast24_product *p, int64_t row, int64_t group, int64_t groups, const char *block,
    float *to) {
  const int64_t bytes = p->columns / 8, size = size_of(dtype), row_bytes = p->columns / 2 * size;
  const int n = width < 16 ? 1 : width / 16;
  __m512 sums[4][4];
  const char *values = (const char *)p->values + row * row_bytes + group * 2 * size;
  const uint8_t *meta = p->meta + row * bytes + group / 2;
  const float *x = (const float *)block + group * 4 * width;
  for (int i = 0; i < r; i++)
    for (int t = 0; t < n; t++) sums[i][t] = group ? load_sums(width, to + i * width + 16 * t) : _mm512_setzero_ps();
#define GROUP(g) \
  for (int i = 0; i < r; i++) { \
    __m512 two[2]; \
    broadcast(dtype, values + i * row_bytes + (g) * 2 * size, two); \
    const float *first = x + (g) * 4 * width + (nibbles[i] >> 4 * (g) & 3) * width; \
    const float *second = x + (g) * 4 * width + (nibbles[i] >> (4 * (g) + 2) & 3) * width; \
    for (int t = 0; t < n; t++) { \
      sums[i][t] = _mm512_fmadd_ps(two[0], load_sums(width, first + 16 * t), sums[i][t]); \
      others[i][t] = _mm512_fmadd_ps(two[1], load_sums(width, second + 16 * t), others[i][t]); \
    } \
  }
  while (groups > 0) {
    const int64_t here = ast24_least(groups, 16);
    uint64_t nibbles[4];
    __m512 others[4][4];
    for (int i = 0; i < r; i++) {
      nibbles[i] = 0;
      if (here == 16)
        memcpy(&nibbles[i], meta + i * bytes, 8);
      else
        memcpy(&nibbles[i], meta + i * bytes, (size_t)here / 2);
      for (int t = 0; t < n; t++) others[i][t] = _mm512_setzero_ps();
    }
    if (here == 16) {
#pragma GCC unroll 16
      for (int g = 0; g < 16; g++) GROUP(g)
    } else {
      for (int g = 0; g < here; g++) GROUP(g)
    }
    for (int i = 0; i < r; i++)
      for (int t = 0; t < n; t++) sums[i][t] = _mm512_add_ps(sums[i][t], others[i][t]);
    groups -= 16, meta += 8, values += 32 * size, x += 64 * width;
  }
  for (int i = 0; i < r; i++)
    for (int t = 0; t < n; t++) store_sums(width, to + i * width + 16 * t, sums[i][t]);
}

#include "strips.h"

static int64_t operand(const ast24_product *p) {
  return p->tokens <= AST24_FEW ? p->tokens * p->padded * 4 : blocks_bytes(p);
}

TARGET INLINE void prepare_few(int dtype, const ast24_product *p, int64_t first, int64_t last) {
  for (int64_t t = 0; t < p->tokens; t++) {
    const char *from = (const char *)p->x + t * p->x_stride * size_of(dtype);
    float *to = (float *)p->operand + t * p->padded;
    for (int64_t c = first; c < last; c += 16)
      _mm512_store_ps(to + c, load(dtype, from + ast24_least(c, p->columns) * size_of(dtype), lanes_below(p->columns - c)));
  }
}

TARGET INLINE void prepare(int dtype, const ast24_product *p, int64_t first, int64_t last) {
  if (p->tokens <= AST24_FEW) {
    prepare_few(dtype, p, first, last);
    return;
  }
  float *to = p->operand;
  const int64_t end = ast24_least(last, p->columns);
  for (int64_t token = 0; token < p->tokens; token += LARGEST) {
    const int width = width_of(p->tokens - token);
    for (int64_t t = 0; t < width; t += 16)
      for (int64_t c = first; c < end; c += 16) {
        __m512 tile[16];
        const __mmask16 there = lanes_below(end - c);
        for (int i = 0; i < 16; i++) {
          const int64_t at = (token + t + i) * p->x_stride + c;
          const __mmask16 mask = token + t + i < p->tokens ? there : 0;
          tile[i] = load(dtype, (const char *)p->x + (mask ? at : 0) * size_of(dtype), mask);
        }
        transpose(tile);
        for (int i = 0; i < 16 && c + i < end; i++)
          _mm512_mask_storeu_ps(to + (c + i) * width + t, lanes_below(width), tile[i]);
      }
    to += p->padded * width;
  }
}

/* The sums of one row and `n` tokens, in 16 lanes. Rows are read one after the other, as one long stream. */
TARGET INLINE void few(int dtype, int n, const ast24_product *p, int64_t row, __m512 *totals_of) {
  const int64_t columns = p->columns, size = size_of(dtype);
  const __m512i spread = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i base = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i three = _mm512_set1_epi32(3);
  const float *x = p->operand;
  const char *values = (const char *)p->values + row * (columns / 2) * size;
  const uint8_t *meta = p->meta + row * (columns / 8);
  __m512 sums[AST24_FEW][4];
  for (int t = 0; t < n; t++)
    for (int j = 0; j < 4; j++) sums[t][j] = _mm512_setzero_ps();
#define COLUMNS(j, nibbles, mask) { \
    const __m512i all = _mm512_srlv_epi32(_mm512_set1_epi32((int)(nibbles)), spread); \
    const __m512i places = _mm512_ternarylogic_epi32(all, three, base, 0xEA); /* (all & 3) | base */ \
    const __m512 weights = load(dtype, values + 16 * (j) * size, mask); \
    for (int t = 0; t < n; t++) { \
      const __m512 low = _mm512_load_ps(x + t * p->padded + 32 * (j)); \
      const __m512 high = _mm512_load_ps(x + t * p->padded + 32 * (j) + 16); \
      sums[t][j] = _mm512_fmadd_ps(weights, _mm512_permutex2var_ps(low, places, high), sums[t][j]); \
    } \
  }
  int64_t left = columns;
  for (; left >= 128; left -= 128, x += 128, values += 64 * size, meta += 16) {
    ast24_fetch_ahead(values, 64 * size, meta);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      uint32_t nibbles;
      memcpy(&nibbles, meta + 4 * j, 4);
      COLUMNS(j, nibbles, 0xffff)
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const int64_t here = ast24_least(left - 32 * j, 32);
    if (here <= 0) break;
    uint32_t nibbles = 0;
    memcpy(&nibbles, meta + 4 * j, (size_t)here / 8);
    COLUMNS(j, nibbles, lanes_below(here / 2))
  }
  for (int t = 0; t < n; t++)
    totals_of[16 * t] = _mm512_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]), _mm512_add_ps(sums[t][2], sums[t][3]));
}

TARGET INLINE void rows_few(int dtype, int n, const ast24_product *p, int64_t first, int64_t last) {
  __m512 sums[AST24_FEW * 16];
  for (int i = 0; i < n * 16; i++) sums[i] = _mm512_setzero_ps();
  for (int64_t row = first; row < last; row += 16) {
    const int64_t count = ast24_least(last - row, 16);
    for (int64_t i = 0; i < count; i++) few(dtype, n, p, row + i, sums + i);
    for (int t = 0; t < n; t++) finish(p, t, row, lanes_below(count), totals(sums + 16 * t));
  }
}

#define WAY(name, dtype) \
  TARGET static void prepare_##name(const ast24_product *p, int64_t first, int64_t last) { \
    prepare(dtype, p, first, last); \
  } \
  STRIPS(strip_##name, dtype) \
  TARGET static void rows_##name(const ast24_product *p, int64_t first, int64_t last) { \
    switch (p->tokens) { \
      case 1: rows_few(dtype, 1, p, first, last); break; \
      case 2: rows_few(dtype, 2, p, first, last); break; \
      case 3: rows_few(dtype, 3, p, first, last); break; \
      case 4: rows_few(dtype, 4, p, first, last); break; \
      default: rows_many(p, first, last, strip_##name); \
    } \
  } \
  const ast24_way ast24_avx512_##name = {128, 64, 0, operand, prepare_##name, rows_##name};

WAY(bfloat16, AST24_BFLOAT16)
WAY(float16, AST24_FLOAT16)
WAY(float32, AST24_FLOAT32)

/* Which of 16 columns are kept, as bits; `nibbles` are those of their four groups. */
static inline __mmask16 occupancy(uint32_t nibbles) {
  static const uint8_t kept[16] = {1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8};
  return (__mmask16)(kept[nibbles & 15] | kept[nibbles >> 4 & 15] << 4 | kept[nibbles >> 8 & 15] << 8 |
                     kept[nibbles >> 12 & 15] << 12);
}

WIDE void ast24_avx512_decode(const ast24_matrix *m, int64_t first, int64_t last) {
  /* rows are whole bytes of positions, so all rows are one long row */
  for (int64_t c = first * m->columns, end = last * m->columns; c < end; c += 16) {
    const int64_t left = ast24_least(end - c, 16);
    const __mmask16 entries = (__mmask16)(0xffff >> (16 - left)), half = (__mmask16)(0xff >> (8 - left / 2));
    const uint8_t *meta = m->meta + c / 8;
    const __mmask16 kept = occupancy(meta[0] | (left > 8 ? (uint32_t)meta[1] << 8 : 0u));
    if (m->itemsize == 4) {
      const __m512i values = _mm512_maskz_loadu_epi32(half, (const uint32_t *)m->values + c / 2);
      _mm512_mask_storeu_epi32((uint32_t *)m->dense + c, entries, _mm512_maskz_expand_epi32(kept, values));
    } else {
      const __m128i values = _mm_maskz_loadu_epi16((__mmask8)half, (const uint16_t *)m->values + c / 2);
      const __m512i dense = _mm512_maskz_expand_epi32(kept, _mm512_cvtepu16_epi32(_mm256_castsi128_si256(values)));
      _mm256_mask_storeu_epi16((uint16_t *)m->dense + c, entries, _mm512_cvtepi32_epi16(dense));
    }
  }
}

static int usable(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

const ast24_level ast24_avx512 = {
    "avx512", usable, {&ast24_avx512_bfloat16, &ast24_avx512_float16, &ast24_avx512_float32}, ast24_avx512_decode};
#endif
