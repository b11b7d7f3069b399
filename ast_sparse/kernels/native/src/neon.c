/* NEON: every AArch64 CPU has it. Conversions from and to float16 are part of it, those of bfloat16 are integer
   operations. */
#include "frame.h"
#ifdef AST24_HAS_NEON
#include <arm_neon.h>

#include "places.h"

#define LEVEL
#define OPERATION static inline __attribute__((always_inline))

typedef float32x4x2_t lanes;

OPERATION lanes both(float32x4_t low, float32x4_t high) {
  const lanes eight = {{low, high}};
  return eight;
}
OPERATION lanes zero(void) { return both(vdupq_n_f32(0), vdupq_n_f32(0)); }
OPERATION lanes load(const float *from) { return both(vld1q_f32(from), vld1q_f32(from + 4)); }
OPERATION void store(float *to, lanes eight) {
  vst1q_f32(to, eight.val[0]);
  vst1q_f32(to + 4, eight.val[1]);
}
OPERATION lanes add_product(lanes sum, lanes a, lanes b) {
  return both(vfmaq_f32(sum.val[0], a.val[0], b.val[0]), vfmaq_f32(sum.val[1], a.val[1], b.val[1]));
}
OPERATION float total(lanes sum) { return vaddvq_f32(vaddq_f32(sum.val[0], sum.val[1])); }

OPERATION lanes float16s_of(uint8x16_t bytes) {
  const float16x8_t halves = vreinterpretq_f16_u8(bytes);
  return both(vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves));
}
OPERATION lanes widen_float16s(const void *from) { return float16s_of(vld1q_u8(from)); }
OPERATION lanes widen_bfloat16s(const void *from) {
  const uint16x8_t halves = vreinterpretq_u16_u8(vld1q_u8(from));
  const uint32x4_t low = vshll_n_u16(vget_low_u16(halves), 16), high = vshll_high_n_u16(halves, 16);
  return both(vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high));
}
OPERATION float widen_float16(uint16_t bits) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
}
OPERATION uint16_t round_float16(float value) {
  return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(value))), 0);
}

/* an index beyond the 16 bytes of a register gives 0 */
OPERATION uint8x16_t places16(const void *values, int byte) {
  return vqtbl1q_u8(vcombine_u8(vld1_u8(values), vdup_n_u8(0)), vld1q_u8(places.bits16[byte]));
}
OPERATION uint8x16x2_t places32(uint8x16_t values, const uint8_t *where) {
  const uint8x16x2_t eight = {{vqtbl1q_u8(values, vld1q_u8(where)), vqtbl1q_u8(values, vld1q_u8(where + 16))}};
  return eight;
}
OPERATION void expand_bits16(const void *values, int byte, void *to) { vst1q_u8(to, places16(values, byte)); }
OPERATION void expand_bits32(const void *values, int byte, void *to) {
  const uint8x16x2_t eight = places32(vld1q_u8(values), places.bits32[byte]);
  vst1q_u8(to, eight.val[0]);
  vst1q_u8((uint8_t *)to + 16, eight.val[1]);
}

OPERATION lanes expand(int dtype, const void *values, int byte) {
  if (dtype == AST24_FLOAT16) return float16s_of(places16(values, byte));
  const uint8x16x2_t eight = dtype == AST24_FLOAT32
                                 ? places32(vld1q_u8(values), places.bits32[byte])
                                 : places32(vcombine_u8(vld1_u8(values), vdup_n_u8(0)), places.bfloat16s[byte]);
  return both(vreinterpretq_f32_u8(eight.val[0]), vreinterpretq_f32_u8(eight.val[1]));
}

#include "eight.h"

#define WAY(name, dtype) \
  static void prepare_##name(const ast24_product *p, int64_t first, int64_t last) { prepare(dtype, p, first, last); } \
  static void multiply_##name(const ast24_product *p, int64_t first, int64_t last) { multiply(dtype, p, first, last); } \
  static const ast24_way name = {128, 64, 0, operand, prepare_##name, multiply_##name};
WAY(bfloat16, AST24_BFLOAT16)
WAY(float16, AST24_FLOAT16)
WAY(float32, AST24_FLOAT32)

static int usable(void) { return 1; }

const ast24_level ast24_neon = {"neon", usable, {&bfloat16, &float16, &float32}, decode};
#endif
