/* AVX-512 with float32 arithmetic, for all dtypes. For 32 columns the 16 activations that meet kept values are picked
   from two registers by the stored positions; 16-bit values are widened when they are loaded. */
#include "frame.h"
#ifdef AST24_HAS_AVX512
#include "avx512.h"

/* 16 entries of a dtype as float32; only the lanes of `mask` are read, the others are 0. */
WIDE static inline __m512 load(int dtype, const void *at, __mmask16 mask) {
  if (dtype == AST24_FLOAT32) return _mm512_maskz_loadu_ps(mask, at);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, at);
  if (dtype == AST24_FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* float32 rounded to the nearest even bfloat16; a NaN stays one */
static inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

WIDE static inline void store(int dtype, void *to, const void *bias, int64_t token_rows, int64_t row, float sum) {
  if (dtype == AST24_FLOAT32) {
    ((float *)to)[token_rows + row] = bias ? sum + ((const float *)bias)[row] : sum;
  } else if (dtype == AST24_FLOAT16) {
    if (bias) sum += _cvtsh_ss(((const uint16_t *)bias)[row]);
    ((uint16_t *)to)[token_rows + row] = _cvtss_sh(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    if (bias) {
      const uint32_t bits = (uint32_t)((const uint16_t *)bias)[row] << 16;
      float addend;
      memcpy(&addend, &bits, 4);
      sum += addend;
    }
    ((uint16_t *)to)[token_rows + row] = to_bfloat16(sum);
  }
}

static int64_t operand(const ast24_product *p) { return p->tokens * p->padded * 4; }

WIDE static inline __attribute__((always_inline)) void prepare(
    int dtype, const ast24_product *p, int64_t first, int64_t last) {
  const int64_t size = dtype == AST24_FLOAT32 ? 4 : 2;
  for (int64_t t = 0; t < p->tokens; t++) {
    const char *from = (const char *)p->x + t * p->x_stride * size;
    float *to = (float *)p->operand + t * p->padded;
    for (int64_t c = first; c < last; c += 16) {
      const int64_t left = ast24_least(p->columns - c, 16);
      const __mmask16 mask = left <= 0 ? 0 : (__mmask16)(0xffff >> (16 - left));
      _mm512_store_ps(to + c, load(dtype, from + ast24_least(c, p->columns) * size, mask));
    }
  }
}

/* `r` rows from `row` on and `n` tokens from `token` on; r and n are known when this is compiled */
WIDE static inline __attribute__((always_inline)) void tile(
    int dtype, int r, int n, const ast24_product *p, int64_t row, int64_t token) {
  const int64_t size = dtype == AST24_FLOAT32 ? 4 : 2, columns = p->columns;
  const __m512i spread = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i base = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i three = _mm512_set1_epi32(3);
  const float *x = (const float *)p->operand + token * p->padded;
  __m512 sums[4][4];
  for (int i = 0; i < r; i++)
    for (int t = 0; t < n; t++) sums[i][t] = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 32) {
    const int64_t left = ast24_least(columns - c, 32);
    const __mmask16 mask = (__mmask16)(0xffff >> (16 - left / 2));
    __m512i places[4];
    __m512 weights[4];
    for (int i = 0; i < r; i++) {
      uint32_t nibbles = 0;
      const uint8_t *meta = p->meta + (row + i) * (columns / 8) + c / 8;
      if (left == 32)
        memcpy(&nibbles, meta, 4);
      else
        memcpy(&nibbles, meta, (size_t)left / 8);
      const __m512i shifted = _mm512_srlv_epi32(_mm512_set1_epi32((int)nibbles), spread);
      places[i] = _mm512_ternarylogic_epi32(shifted, three, base, 0xEA); /* (shifted & 3) | base */
      weights[i] = load(dtype, (const char *)p->values + ((row + i) * (columns / 2) + c / 2) * size, mask);
    }
    for (int t = 0; t < n; t++) {
      const __m512 low = _mm512_load_ps(x + t * p->padded + c), high = _mm512_load_ps(x + t * p->padded + c + 16);
      for (int i = 0; i < r; i++)
        sums[i][t] = _mm512_fmadd_ps(weights[i], _mm512_permutex2var_ps(low, places[i], high), sums[i][t]);
    }
  }
  for (int i = 0; i < r; i++)
    for (int t = 0; t < n; t++)
      store(dtype, p->y, p->bias, (token + t) * p->rows, row + i, _mm512_reduce_add_ps(sums[i][t]));
}

WIDE static inline __attribute__((always_inline)) void rows_of(
    int dtype, const ast24_product *p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last;) {
    const int64_t left = last - row;
    int64_t token = 0;
    if (left >= 4) {
      for (; token + 4 <= p->tokens; token += 4) tile(dtype, 4, 4, p, row, token);
      for (; token + 2 <= p->tokens; token += 2) tile(dtype, 4, 2, p, row, token);
      if (token < p->tokens) tile(dtype, 4, 1, p, row, token);
      row += 4;
    } else {
      for (; token < p->tokens; token++) tile(dtype, 1, 1, p, row, token);
      row += 1;
    }
  }
}

WIDE static void prepare_bfloat16(const ast24_product *p, int64_t first, int64_t last) {
  prepare(AST24_BFLOAT16, p, first, last);
}
WIDE static void prepare_float16(const ast24_product *p, int64_t first, int64_t last) {
  prepare(AST24_FLOAT16, p, first, last);
}
WIDE static void prepare_float32(const ast24_product *p, int64_t first, int64_t last) {
  prepare(AST24_FLOAT32, p, first, last);
}

WIDE static void rows_bfloat16(const ast24_product *p, int64_t first, int64_t last) {
  rows_of(AST24_BFLOAT16, p, first, last);
}
WIDE static void rows_float16(const ast24_product *p, int64_t first, int64_t last) {
  rows_of(AST24_FLOAT16, p, first, last);
}
WIDE static void rows_float32(const ast24_product *p, int64_t first, int64_t last) {
  rows_of(AST24_FLOAT32, p, first, last);
}

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

static const ast24_way bfloat16 = {operand, prepare_bfloat16, rows_bfloat16};
const ast24_way ast24_avx512_float16 = {operand, prepare_float16, rows_float16};
const ast24_way ast24_avx512_float32 = {operand, prepare_float32, rows_float32};

const ast24_level ast24_avx512 = {
    "avx512", usable, 1, {&bfloat16, &ast24_avx512_float16, &ast24_avx512_float32}, ast24_avx512_decode};
#endif
