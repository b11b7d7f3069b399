/* AVX2 with FMA and F16C. From two tokens on W is expanded (eight.h). For one token x is permuted instead: two in-lane
   permutations of 16 columns, by the stored positions, and W is read as it is. */
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>

#include "frame.h"
#include "places.h"

#define LEVEL __attribute__((target("avx2,fma,f16c")))
#define OPERATION LEVEL static inline __attribute__((always_inline))

typedef __m256 lanes;

OPERATION lanes zero(void) { return _mm256_setzero_ps(); }
OPERATION lanes load(const float *from) {
  lanes eight = _mm256_loadu_ps(from);
  __asm__("" : "+x"(eight)); /* or GCC would load it again for each row */
  return eight;
}
OPERATION void store(float *to, lanes eight) { _mm256_storeu_ps(to, eight); }
OPERATION lanes add_product(lanes sum, lanes a, lanes b) { return _mm256_fmadd_ps(a, b, sum); }
OPERATION float total(lanes sum) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
OPERATION lanes widen_float16s(const void *from) { return _mm256_cvtph_ps(_mm_loadu_si128(from)); }
OPERATION lanes widen_bfloat16s(const void *from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from)), 16));
}
OPERATION float widen_float16(uint16_t bits) { return _cvtsh_ss(bits); }
OPERATION uint16_t round_float16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

/* four 16-bit values, or four 32-bit values, in both halves of a register */
OPERATION __m256i twice64(const void *values) {
  int64_t bits;
  memcpy(&bits, values, 8);
  return _mm256_set1_epi64x(bits);
}
OPERATION __m256i twice128(const void *values) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(values)); }


OPERATION __m128i places16(const void *values, int byte) {
  return _mm_shuffle_epi8(_mm_loadl_epi64(values), _mm_load_si128((const __m128i *)places.bits16[byte]));
}
OPERATION __m256i places32(const void *values, int byte) {
  return _mm256_shuffle_epi8(twice128(values), _mm256_load_si256((const __m256i *)places.bits32[byte]));
}
OPERATION void expand_bits16(const void *values, int byte, void *to) { _mm_storeu_si128(to, places16(values, byte)); }
OPERATION void expand_bits32(const void *values, int byte, void *to) { _mm256_storeu_si256(to, places32(values, byte)); }

OPERATION lanes expand(int dtype, const void *values, int byte) {
  if (dtype == AST24_FLOAT32) return _mm256_castsi256_ps(places32(values, byte));
  if (dtype == AST24_FLOAT16) return _mm256_cvtph_ps(places16(values, byte));
  const __m256i where = _mm256_load_si256((const __m256i *)places.bfloat16s[byte]);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice64(values), where));
}

#include "eight.h"

/* x of one token, for `multiply_one`: of each 16 columns the groups 0, 2, 1, 3 */
INLINE void prepare_one(int dtype, const ast24_product *p, int64_t first, int64_t last) {
  float *to = p->operand;
  for (int64_t c = first; c < last; c += 8) {
    const lanes eight = c < p->columns ? widen(dtype, (const char *)p->x + c * size_of(dtype)) : zero();
    float *const group = to + c / 16 * 16 + c % 16 / 2;
    _mm_store_ps(group, _mm256_castps256_ps128(eight));
    _mm_store_ps(group + 8, _mm256_extractf128_ps(eight, 1));
  }
}

/* `count` bytes of positions in each lane */
INLINE __m256i positions(const uint8_t *meta, size_t count) {
  uint32_t bits = 0;
  memcpy(&bits, meta, count);
  return _mm256_set1_epi32((int)bits);
}

/* One token. Rows are read one after the other, as one long stream: several at once are slower when they come from
   memory. Four sums, because a sum takes longer than its turn. */
INLINE void multiply_one(int dtype, const ast24_product *p, int64_t first, int64_t last) {
  const int64_t bytes = p->columns / 8, size = size_of(dtype);
  /* a permutation reads the last two bits; the second half of 32 bits of positions is for the next 16 columns */
  const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i further = _mm256_add_epi32(shifts, _mm256_set1_epi32(16));
  for (int64_t row = first; row < last; row++) {
    const uint8_t *meta = p->meta + row * bytes;
    const char *values = (const char *)p->values + row * bytes * 4 * size;
    const float *x = p->operand;
    lanes sums[4];
    sums[0] = sums[1] = sums[2] = sums[3] = zero();
/* of the pairs of the four groups, 0 and 2 come from the first eight of x, 1 and 3 from the others */
#define SIXTEEN(j, positions, weights) { \
    const __m256i where = positions; \
    const lanes even = _mm256_permutevar_ps(load(x + 16 * (j)), where); \
    const lanes odd = _mm256_permutevar_ps(load(x + 16 * (j) + 8), where); \
    sums[j] = add_product(sums[j], weights, _mm256_blend_ps(even, odd, 0xCC)); \
  }
#define THIRTY_TWO(j) { \
    const __m256i bits = positions(meta + 2 * (j), 4); \
    SIXTEEN(j, _mm256_srlv_epi32(bits, shifts), widen(dtype, values + 8 * size * (j))) \
    SIXTEEN(j + 1, _mm256_srlv_epi32(bits, further), widen(dtype, values + 8 * size * (j + 1))) \
  }
    int64_t left = bytes;
    for (; left >= 8; left -= 8, meta += 8, values += 32 * size, x += 64) {
      ast24_fetch_ahead(values, 32 * size, meta);
      THIRTY_TWO(0) THIRTY_TWO(2)
    }
    for (; left >= 2; left -= 2, meta += 2, values += 8 * size, x += 16)
      SIXTEEN(0, _mm256_srlv_epi32(positions(meta, 2), shifts), widen(dtype, values))
    if (left) {
      char four[32] = {0};
      memcpy(four, values, 4 * (size_t)size);
      SIXTEEN(0, _mm256_srlv_epi32(positions(meta, 1), shifts), widen(dtype, four))
    }
    const lanes sum = _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
    finish(dtype, p, 0, row, total(sum));
  }
}

#define WAY(name, dtype) \
  LEVEL static void prepare_##name(const ast24_product *p, int64_t first, int64_t last) { \
    if (p->tokens == 1) prepare_one(dtype, p, first, last); else prepare(dtype, p, first, last); \
  } \
  LEVEL static void multiply_##name(const ast24_product *p, int64_t first, int64_t last) { \
    if (p->tokens == 1) multiply_one(dtype, p, first, last); else multiply(dtype, p, first, last); \
  } \
  static const ast24_way name = {128, 64, 0, operand, prepare_##name, multiply_##name};
WAY(bfloat16, AST24_BFLOAT16)
WAY(float16, AST24_FLOAT16)
WAY(float32, AST24_FLOAT32)

static int usable(void) {
  unsigned a, b, features, d; /* Clang 14 does not know "f16c" */
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &features, &d) &&
         features & bit_F16C;
}

const ast24_level ast24_avx2 = {"avx2", usable, {&bfloat16, &float16, &float32}, decode};
#endif
