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

/* x of one token, for `tile_of_one`: of each 16 columns the groups 0, 2, 1, 3 */
INLINE void prepare_one(int dtype, const ast24_product *p, int64_t first, int64_t last) {
  float *to = p->operand;
  for (int64_t c = first; c < last; c += 8) {
    const lanes eight = c < p->columns ? widen(dtype, (const char *)p->x + c * size_of(dtype)) : zero();
    float *const group = to + c / 16 * 16 + c % 16 / 2;
    _mm_store_ps(group, _mm256_castps256_ps128(eight));
    _mm_store_ps(group + 8, _mm256_extractf128_ps(eight, 1));
  }
}

/* `r` rows (1, 2 or 4) from `row` on, one token; r is known when this is compiled */
INLINE void tile_of_one(int dtype, int r, const ast24_product *p, int64_t row) {
  const int64_t bytes = p->columns / 8, size = size_of(dtype), row_size = bytes * 4 * size;
  const uint8_t *meta = p->meta + row * bytes;
  const char *values = (const char *)p->values + row * row_size;
  const float *x = p->operand;
  const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14); /* a permutation reads the last two bits */
  lanes sums[4];
  sums[0] = sums[1] = sums[2] = sums[3] = zero();
  int64_t b = 0;
/* of the pairs of the four groups, 0 and 2 come from the first eight of x, 1 and 3 from the others */
#define PICK_AND_ADD(i, positions, weights) { \
    const __m256i where = _mm256_srlv_epi32(_mm256_set1_epi32(positions), shifts); \
    const lanes even = _mm256_permutevar_ps(groups02, where), odd = _mm256_permutevar_ps(groups13, where); \
    sums[i] = add_product(sums[i], weights, _mm256_blend_ps(even, odd, 0xCC)); \
  }
  for (; b + 2 <= bytes; b += 2) {
    const lanes groups02 = load(x + b * 8), groups13 = load(x + b * 8 + 8);
#define SIXTEEN(i) { \
    uint16_t positions; \
    memcpy(&positions, meta + i * bytes + b, 2); \
    PICK_AND_ADD(i, positions, widen(dtype, values + i * row_size + b * 4 * size)) \
  }
    EACH_ROW(SIXTEEN)
  }
  if (b < bytes) {
    const lanes groups02 = load(x + b * 8), groups13 = load(x + b * 8 + 8);
    char four[32] = {0};
#define EIGHT(i) \
    memcpy(four, values + i * row_size + b * 4 * size, 4 * (size_t)size); \
    PICK_AND_ADD(i, meta[i * bytes + b], widen(dtype, four))
    EACH_ROW(EIGHT)
  }
#define FINISH_ONE(i) finish(dtype, p, 0, row + i, total(sums[i]));
  EACH_ROW(FINISH_ONE)
}

INLINE void multiply_one(int dtype, const ast24_product *p, int64_t first, int64_t last) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) tile_of_one(dtype, 4, p, row);
  for (; row < last; row++) tile_of_one(dtype, 1, p, row);
}

#define WAY(name, dtype) \
  LEVEL static void prepare_##name(const ast24_product *p, int64_t first, int64_t last) { \
    if (p->tokens == 1) prepare_one(dtype, p, first, last); else prepare(dtype, p, first, last); \
  } \
  LEVEL static void multiply_##name(const ast24_product *p, int64_t first, int64_t last) { \
    if (p->tokens == 1) multiply_one(dtype, p, first, last); else multiply(dtype, p, first, last); \
  } \
  static const ast24_way name = {operand, prepare_##name, multiply_##name};
WAY(bfloat16, AST24_BFLOAT16)
WAY(float16, AST24_FLOAT16)
WAY(float32, AST24_FLOAT32)

static int usable(void) {
  unsigned a, b, features, d; /* Clang 14 does not know "f16c" */
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &features, &d) &&
         features & bit_F16C;
}

const ast24_level ast24_avx2 = {"avx2", usable, 1, {&bfloat16, &float16, &float32}, decode};
#endif
