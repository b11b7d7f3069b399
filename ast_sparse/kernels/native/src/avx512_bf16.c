/* AVX-512 with VBMI2 and BF16. bfloat16: for 64 columns one load of eight bytes of positions, a multishift that spreads
   them over 32 lanes, one permutation of two registers of x, one dot product: half the arithmetic of a dense product,
   and W is never expanded. Dot products of bfloat16 take subnormal numbers as 0. The other dtypes are those of
   avx512.c. */
#include "frame.h"
#ifdef AST24_HAS_AVX512
#include "avx512.h"

#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,fma")))

static int64_t operand(const ast24_product *p) { return p->tokens * p->padded * 2; }

static void prepare(const ast24_product *p, int64_t first, int64_t last) {
  const int64_t end = ast24_least(last, p->columns);
  for (int64_t t = 0; t < p->tokens; t++) {
    uint16_t *to = (uint16_t *)p->operand + t * p->padded;
    memcpy(to + first, (const uint16_t *)p->x + t * p->x_stride + first, (size_t)(end - first) * 2);
    memset(to + end, 0, (size_t)(last - end) * 2);
  }
}

BF16 static inline void store(const ast24_product *p, int64_t token, int64_t row, __m512 lanes) {
  float sum = _mm512_reduce_add_ps(lanes);
  if (p->bias) {
    const uint32_t bits = (uint32_t)((const uint16_t *)p->bias)[row] << 16;
    float addend;
    memcpy(&addend, &bits, 4);
    sum += addend;
  }
  const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(sum));
  uint16_t bits;
  memcpy(&bits, &rounded, 2);
  ((uint16_t *)p->y)[token * p->rows + row] = bits;
}

/* `r` rows from `row` on and `n` tokens from `token` on; r and n are known when this is compiled */
BF16 static inline __attribute__((always_inline)) void tile(
    int r, int n, const ast24_product *p, int64_t row, int64_t token) {
  uint8_t shifts[64];
  uint16_t bases[32];
  for (int lane = 0; lane < 32; lane++) {
    shifts[2 * lane] = (uint8_t)(2 * lane), shifts[2 * lane + 1] = 0;
    bases[lane] = (uint16_t)(lane / 2 * 4);
  }
  const __m512i spread = _mm512_loadu_si512(shifts), base = _mm512_loadu_si512(bases), three = _mm512_set1_epi16(3);
  const int64_t columns = p->columns;
  const uint16_t *x = (const uint16_t *)p->operand + token * p->padded;
  __m512 sums[4][4];
  for (int i = 0; i < r; i++)
    for (int t = 0; t < n; t++) sums[i][t] = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 64) {
    const int64_t left = ast24_least(columns - c, 64);
    const __mmask32 mask = 0xffffffffu >> (32 - left / 2);
    __m512i places[4];
    __m512bh weights[4];
    for (int i = 0; i < r; i++) {
      uint64_t nibbles = 0;
      const uint8_t *meta = p->meta + (row + i) * (columns / 8) + c / 8;
      const uint16_t *values = (const uint16_t *)p->values + (row + i) * (columns / 2) + c / 2;
      if (left == 64) {
        memcpy(&nibbles, meta, 8);
        weights[i] = (__m512bh)_mm512_loadu_si512(values);
      } else {
        memcpy(&nibbles, meta, (size_t)left / 8);
        weights[i] = (__m512bh)_mm512_maskz_loadu_epi16(mask, values);
      }
      const __m512i shifted = _mm512_multishift_epi64_epi8(spread, _mm512_set1_epi64((int64_t)nibbles));
      places[i] = _mm512_ternarylogic_epi64(shifted, three, base, 0xEA); /* (shifted & 3) | base */
    }
    for (int t = 0; t < n; t++) {
      const __m512i low = _mm512_load_si512(x + t * p->padded + c), high = _mm512_load_si512(x + t * p->padded + c + 32);
      for (int i = 0; i < r; i++)
        sums[i][t] = _mm512_dpbf16_ps(
            sums[i][t], weights[i], (__m512bh)_mm512_permutex2var_epi16(low, places[i], high));
    }
  }
  for (int i = 0; i < r; i++)
    for (int t = 0; t < n; t++) store(p, token + t, row + i, sums[i][t]);
}

BF16 static void rows(const ast24_product *p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last;) {
    int64_t token = 0;
    if (last - row >= 4) {
      for (; token + 4 <= p->tokens; token += 4) tile(4, 4, p, row, token);
      for (; token + 2 <= p->tokens; token += 2) tile(4, 2, p, row, token);
      if (token < p->tokens) tile(4, 1, p, row, token);
      row += 4;
    } else {
      for (; token < p->tokens; token++) tile(1, 1, p, row, token);
      row += 1;
    }
  }
}

static int usable(void) {
  return ast24_avx512.usable() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512bf16");
}

static const ast24_way bfloat16 = {operand, prepare, rows};

const ast24_level ast24_avx512_bf16 = {
    "avx512_bf16", usable, 1, {&bfloat16, &ast24_avx512_float16, &ast24_avx512_float32}, ast24_avx512_decode};
#endif
