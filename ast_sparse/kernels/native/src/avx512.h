/* What both AVX-512 levels use. */
#ifndef AST24_AVX512_H
#define AST24_AVX512_H

#include <immintrin.h>

#include "frame.h"

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")))
#define INLINE static inline __attribute__((always_inline))

extern const ast24_way ast24_avx512_bfloat16, ast24_avx512_float16, ast24_avx512_float32;
extern const ast24_way ast24_avx512_bf16_bfloat16;
void ast24_avx512_decode(const ast24_matrix *, int64_t first, int64_t last);

/* the lowest `count` bits */
INLINE __mmask16 lanes_below(int64_t count) { return (__mmask16)(count >= 16 ? 0xffff : (1 << (count < 0 ? 0 : count)) - 1); }

/* Lines of W that are still to be fetched. They are fetched in order during the work on rows before them, whose own
   accesses jump from row to row, which no hardware foresees. */
typedef struct {
  const char *values, *meta;
  int64_t lines, values_per_meta;
} upcoming;

INLINE upcoming rows_ahead(const ast24_product *p, int64_t row, int64_t rows) {
  const int64_t size = p->dtype == AST24_FLOAT32 ? 4 : 2, row_bytes = p->columns / 2 * size;
  return (upcoming){(const char *)p->values + row * row_bytes, (const char *)p->meta + row * (p->columns / 8),
                    rows > 0 ? (rows * row_bytes + 63) / 64 : 0, 4 * size};
}

INLINE void fetch(upcoming *next, int64_t lines) {
  for (; lines > 0 && next->lines > 0; lines--, next->lines--, next->values += 64) {
    _mm_prefetch(next->values, _MM_HINT_T1);
    if (next->lines % next->values_per_meta == 0) {
      _mm_prefetch(next->meta, _MM_HINT_T1);
      next->meta += 64;
    }
  }
}

/* sums of 16 rows and one token: the bias is added, and the sums are rounded and stored; `mask` has the rows there are */
WIDE INLINE void finish(const ast24_product *p, int64_t token, int64_t row, __mmask16 mask, __m512 sums) {
  const int64_t at = token * p->rows + row;
  if (p->dtype == AST24_FLOAT32) {
    if (p->bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, (const float *)p->bias + row));
    _mm512_mask_storeu_ps((float *)p->y + at, mask, sums);
    return;
  }
  const uint16_t *bias = (const uint16_t *)p->bias + row;
  __m256i halves;
  if (p->dtype == AST24_FLOAT16) {
    if (p->bias) sums = _mm512_add_ps(sums, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, bias)));
    halves = _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    if (p->bias) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias));
      sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
    }
    /* to the nearest, ties to even; a NaN stays one */
    const __m512i bits = _mm512_castps_si512(sums), top = _mm512_srli_epi32(bits, 16), one = _mm512_set1_epi32(1);
    const __m512i half = _mm512_add_epi32(_mm512_and_si512(top, one), _mm512_set1_epi32(0x7fff));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40));
    halves = _mm512_cvtepi32_epi16(rounded);
  }
  _mm256_mask_storeu_epi16((uint16_t *)p->y + at, mask, halves);
}

/* lanes of each of 16 registers added: sum i is in lane i; always in the same order */
WIDE INLINE __m512 totals(const __m512 *sums) {
  __m512 two[8], four[4], eight[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) /* two rows in a register, 64 bits each in turn */
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]), _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) { /* four rows, 128 bits each in turn */
    const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) /* 128-bit lanes: 0 + 1 and 2 + 3 of four rows, then of the next four */
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

/* the sums of up to 16 tokens, of which `width` there are in memory */
WIDE INLINE __m512 load_sums(int width, const float *from) {
  return width == 8 ? _mm512_castps256_ps512(_mm256_loadu_ps(from)) : _mm512_loadu_ps(from);
}

WIDE INLINE void store_sums(int width, float *to, __m512 sums) {
  if (width == 8)
    _mm256_storeu_ps(to, _mm512_castps512_ps256(sums));
  else
    _mm512_storeu_ps(to, sums);
}

/* rows and columns of 16 registers exchanged */
WIDE INLINE void transpose(__m512 *rows) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 even0 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88), odd0 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xdd);
    rows[j] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    rows[j + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    rows[j + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    rows[j + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}

/* y[token : token + count, row : row + rows] from sums[rows rounded up to 16][width], width entries of which are tokens */
WIDE INLINE void finish_strip(
    const ast24_product *p, const float *sums, int width, int64_t token, int64_t count, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t t = 0; t < count; t += 16) {
      __m512 tile[16];
      const __mmask16 there = lanes_below(width - t);
      for (int i = 0; i < 16; i++) tile[i] = _mm512_maskz_loadu_ps(there, sums + (r + i) * width + t);
      transpose(tile);
      const int64_t last = ast24_least(count - t, 16);
      for (int64_t i = 0; i < last; i++) finish(p, token + t + i, row + r, lanes_below(rows - r), tile[i]);
    }
}

#endif
