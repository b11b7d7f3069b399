/* What both AVX-512 levels use. */
#ifndef AST24_AVX512_H
#define AST24_AVX512_H

#include <immintrin.h>

#include "frame.h"

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")))

void ast24_avx512_decode(const ast24_matrix *, int64_t first, int64_t last);
void ast24_avx512_prepare_float16(const ast24_product *);
void ast24_avx512_prepare_float32(const ast24_product *);
void ast24_avx512_rows_float16(const ast24_product *, int64_t first, int64_t last);
void ast24_avx512_rows_float32(const ast24_product *, int64_t first, int64_t last);

#endif
