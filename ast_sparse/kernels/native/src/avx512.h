/* What both AVX-512 levels use. */
#ifndef AST24_AVX512_H
#define AST24_AVX512_H

#include <immintrin.h>

#include "frame.h"

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")))

extern const ast24_way ast24_avx512_float16, ast24_avx512_float32;
void ast24_avx512_decode(const ast24_matrix *, int64_t first, int64_t last);

#endif
