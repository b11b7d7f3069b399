/* AVX-512 level `avx512_bf16`, with AMX for more than AST24_FEW tokens in bfloat16: a tile unit multiplies 16 rows of W
   with 16 tokens in dense form, many times as fast as a vector unit does it with half the arithmetic. W is expanded a
   few rows and columns at a time, into tiles that stay in the first cache if they fit; it is read once for up to MOST
   tokens, or more of few columns.

   A tile of W is 16 rows of 32 columns. A tile of x is 16 pairs of columns, each with the two entries of 16 tokens, as
   `prepare` writes them. Sums of 16 rows and 16 tokens are a tile, too; they go on in the same order of columns for any
   tokens beside them. Products with pruned columns are products with 0. Subnormal numbers are taken as 0. */
#include "frame.h"
#ifdef AST24_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

#define TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,f16c,fma,amx-tile,amx-bf16")))

enum {
  TILE = 1024,        /* bytes */
  BLOCK = 1024,       /* columns that are expanded at a time */
  PAIR = 32,          /* rows of two tiles */
  STRIP = 128,        /* rows for which x of a block of columns stays in the second cache */
  MOST = 256,         /* tokens, if there are more columns than BLOCK, and of products whose rows threads share */
  OWN = 576 << 10,    /* bytes of x in tiles that stay in the second cache */
  MANY = 4            /* pairs of tiles of tokens from which on W is expanded into the tiles that were just read */
};
_Static_assert((MOST + 16) * 2 * (BLOCK + 64) > OWN, "more tokens than MOST have at most BLOCK columns");

typedef struct {
  _Alignas(64) uint32_t of[16][BLOCK / 32]; /* rows, tiles of columns */
} places;

/* What was written there is in memory: the compiler does not know that tiles and their sizes are loaded from it. */
#define WRITTEN(there) __asm__ volatile("" : : "r"(there) : "memory")

/* Pointers given to the tile functions are in parentheses, which the macros of early GCC 11 lack. */

static int64_t operand(const ast24_product *p) {
  return p->tokens <= AST24_FEW ? ast24_avx512_bf16_bfloat16.operand(p) : (p->tokens + 15) / 16 * 16 * p->padded * 2;
}

TARGET static void prepare(const ast24_product *p, int64_t first, int64_t last) {
  if (p->tokens <= AST24_FEW) {
    ast24_avx512_bf16_bfloat16.prepare(p, first, last);
    return;
  }
  const int64_t tiles = p->padded / 32;
  for (int64_t token = 0; token < p->tokens; token += 16)
    for (int64_t c = first; c < last; c += 32) {
      const __mmask32 there = c + 32 <= p->columns ? 0xffffffffu : c >= p->columns ? 0 : (1u << (p->columns - c)) - 1;
      const uint16_t *x = (const uint16_t *)p->x + token * p->x_stride + c;
      char *to = (char *)p->operand + (token / 16 * tiles + c / 32) * TILE;
      __m512 pairs[16];
      for (int t = 0; t < 16; t++)
        pairs[t] = token + t < p->tokens ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, x + t * p->x_stride))
                                         : _mm512_setzero_ps();
      transpose(pairs);
      for (int i = 0; i < 16; i++) _mm512_store_ps((float *)(to + 64 * i), pairs[i]);
    }
}

/* For `rows` rows, at most 16, and `columns` columns, at most BLOCK: a bit for each column, set where W keeps it. */
TARGET INLINE void find(const ast24_product *p, int64_t row, int64_t rows, int64_t column, int64_t columns, places *to) {
  const __m512i kept = _mm512_broadcast_i32x4( /* the columns that a nibble keeps */
      _mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
  const __m512i kept_above = _mm512_slli_epi16(kept, 4), nibble = _mm512_set1_epi8(15);
  const uint8_t *meta = p->meta + row * (p->columns / 8) + column / 8;
  for (int64_t i = 0; i < 16; i++, meta += p->columns / 8)
    for (int64_t c = 0; c < columns; c += 512) { /* 64 bytes */
      const int64_t bytes = i < rows ? ast24_least(columns - c, 512) / 8 : 0;
      const __mmask64 there = bytes < 64 ? (1ull << bytes) - 1 : ~0ull;
      const __m512i two = _mm512_maskz_loadu_epi8(there, meta + c / 8);
      const __m512i above = _mm512_and_si512(_mm512_srli_epi16(two, 4), nibble);
      const __m512i both = _mm512_or_si512(_mm512_shuffle_epi8(kept, _mm512_and_si512(two, nibble)),
                                           _mm512_shuffle_epi8(kept_above, above));
      _mm512_store_si512(to->of[i] + c / 32, _mm512_maskz_mov_epi8(there, both));
    }
}

/* Tile k of these rows and columns; `values` are those of the first row and column of the block. */
TARGET INLINE void expand(
    const uint16_t *values, int64_t stride, int64_t rows, int64_t columns, int64_t k, const places *where, char *to) {
  const int64_t left = columns - 32 * k;
  values += 16 * k;
  if (rows >= 16 && left >= 32) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; i++, values += stride) {
      const __m512i two = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)values));
      _mm512_store_si512(to + 64 * i, _mm512_maskz_expand_epi16(where->of[i][k], two));
    }
    return;
  }
  const __mmask16 there = left >= 32 ? 0xffff : (__mmask16)((1u << left / 2) - 1);
  for (int64_t i = 0; i < 16; i++, values += stride) {
    const __m256i two = i < rows ? _mm256_maskz_loadu_epi16(there, values) : _mm256_setzero_si256();
    _mm512_store_si512(to + 64 * i, _mm512_maskz_expand_epi16(where->of[i][k], _mm512_castsi256_si512(two)));
  }
}

/* Up to PAIR rows and BLOCK columns of W, which are expanded two tiles at a time, whose values are one line of each row:
   64 columns of the first 16 rows, then of the others. In w, tiles of the same columns are neighbours. */
typedef struct {
  places where[2];
  const uint16_t *values;
  int64_t stride, rows, columns, row_tiles; /* row_tiles: 2, or 1 if there are no other rows */
  int64_t all, done;                        /* pairs of tiles */
  char *w;
} block;

TARGET INLINE void begin(const ast24_product *p, int64_t row, int64_t rows, int64_t column, char *w, block *to) {
  to->stride = p->columns / 2;
  to->values = (const uint16_t *)p->values + row * to->stride + column / 2;
  to->rows = ast24_least(rows, PAIR), to->columns = ast24_least(p->columns - column, BLOCK);
  to->row_tiles = rows > 16 ? 2 : 1, to->all = to->row_tiles * ((to->columns + 63) / 64), to->done = 0, to->w = w;
  for (int64_t j = 0; 16 * j < to->rows; j++)
    find(p, row + 16 * j, to->rows - 16 * j, column, to->columns, &to->where[j]);
}

TARGET static void expand_next(block *b) {
  const int64_t j = b->done % b->row_tiles, first = b->done / b->row_tiles * 2;
  WRITTEN(b->w); /* what was there is loaded by now */
  for (int64_t k = first; k < first + 2 && 32 * k < b->columns; k++)
    expand(b->values + 16 * j * b->stride, b->stride, b->rows - 16 * j, b->columns, k, &b->where[j],
           b->w + (2 * k + j) * TILE);
  b->done++;
}

/* y[token : token + 16, row : row + rows] from tiles of sums, those of the next 16 rows sums_next behind: the bias is
   added, pairs of rows are rounded together, and pairs of rows and tokens exchanged. */
TARGET static void finish_sums(
    const ast24_product *p, const float *sums, int64_t sums_next, int64_t row, int64_t rows, int64_t token) {
  static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i in_pairs = _mm512_loadu_si512(order);
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  WRITTEN(sums);
  for (int64_t r = 0; r < rows; r += 16, sums += sums_next) {
    const __mmask16 there = lanes_below(rows - r);
    float bias[16] = {0};
    if (p->bias) {
      const __m256i narrow = _mm256_maskz_loadu_epi16(there, (const uint16_t *)p->bias + row + r);
      _mm512_storeu_si512(bias, _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
    }
    __m512i two[8], four[8], eight[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) { /* token t: rows 2i and 2i + 1 */
      const __m512 low = _mm512_add_ps(_mm512_load_ps(sums + 32 * i), _mm512_set1_ps(bias[2 * i]));
      const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + 32 * i + 16), _mm512_set1_ps(bias[2 * i + 1]));
      two[i] = _mm512_permutexvar_epi16(in_pairs, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) { /* 64 bits: four rows; 128-bit lane j: tokens 4j and 4j + 1, 4j + 2 and 4j + 3 */
      four[i] = _mm512_unpacklo_epi32(two[i], two[i + 1]);
      four[i + 1] = _mm512_unpackhi_epi32(two[i], two[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) { /* 128 bits: eight rows; lane j of eight[i + k]: token 4j + k */
      eight[i] = _mm512_unpacklo_epi64(four[i], four[i + 2]);
      eight[i + 1] = _mm512_unpackhi_epi64(four[i], four[i + 2]);
      eight[i + 2] = _mm512_unpacklo_epi64(four[i + 1], four[i + 3]);
      eight[i + 3] = _mm512_unpackhi_epi64(four[i + 1], four[i + 3]);
    }
    uint16_t *y = (uint16_t *)p->y + token * p->rows + row + r;
    const int64_t count = ast24_least(p->tokens - token, 16);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      const __m512i low = _mm512_permutex2var_epi64(eight[k], first, eight[k + 4]);
      const __m512i high = _mm512_permutex2var_epi64(eight[k], last, eight[k + 4]);
      const __m256i of_token[4] = {_mm512_castsi512_si256(low), _mm512_extracti64x4_epi64(low, 1),
                                   _mm512_castsi512_si256(high), _mm512_extracti64x4_epi64(high, 1)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
        if (4 * j + k < count) _mm256_mask_storeu_epi16(y + (4 * j + k) * p->rows, there, of_token[j]);
    }
  }
}

/* Sums of up to PAIR rows and 32 tokens that wait to be rounded, while the next ones are added up. */
typedef struct {
  const float *sums;
  int64_t row, rows, token, tokens;
} unfinished;

/* 16 tokens of them */
TARGET static void finish_next(const ast24_product *p, unfinished *u) {
  finish_sums(p, u->sums, 512, u->row, u->rows, u->token);
  u->sums += 256, u->token += 16, u->tokens -= 16;
}

/* The sums of one or two tiles of rows (r) and of tokens (t) over the columns of a block. Multiplying tiles leaves the rest
   of the core idle, so meanwhile the previous sums are finished, `due` pairs of tiles of the next block expanded, and
   `lines` of W fetched for each tile of columns: not all at once, because a core waits for only a few lines at a time, and
   the tiles of x are among them. x is not kept in the first cache, where it would push out W. If `due` is at most
   next->row_tiles for each 64 columns of this block, a pair of tiles is expanded only after this block's pair was read:
   both may be in one place.

   x: the tiles of the first 16 tokens; the next ones are x_next bytes behind. from: sums that go on, or NULL; to: where
   they are stored. Those of the next 16 rows are from_next and to_next behind. */
TARGET INLINE void sum(
    int r, int t, const ast24_product *p, const block *b, const char *x, int64_t x_next, const float *from,
    int64_t from_next, float *to, int64_t to_next, unfinished *before, block *next, int64_t due, int64_t lines,
    upcoming *ahead) {
  const char *w = b->w;
  const int64_t tiles = (b->columns + 31) / 32, waiting = (before->tokens + 15) / 16;
  if (from) {
    _tile_loadd(0, from, 64);
    if (t > 1) _tile_loadd(1, (from + 256), 64);
    if (r > 1) _tile_loadd(2, (from + from_next), 64);
    if (r > 1 && t > 1) _tile_loadd(3, (from + from_next + 256), 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0, finishing = 0, expanding = -due; k < tiles; k++, w += 2 * TILE, x += TILE) {
    _tile_stream_loadd(6, x, 64);
    _tile_loadd(4, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (t > 1) {
      _tile_stream_loadd(7, (x + x_next), 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (r > 1) {
      _tile_loadd(5, (w + TILE), 64);
      _tile_dpbf16ps(2, 5, 6);
      if (t > 1) _tile_dpbf16ps(3, 5, 7);
    }
    fetch(ahead, lines);
    for (finishing += waiting; finishing >= tiles; finishing -= tiles) finish_next(p, before);
    for (expanding += due; expanding >= tiles; expanding -= tiles) expand_next(next);
  }
  _tile_stored(0, to, 64);
  if (t > 1) _tile_stored(1, (to + 256), 64);
  if (r > 1) _tile_stored(2, (to + to_next), 64);
  if (r > 1 && t > 1) _tile_stored(3, (to + to_next + 256), 64);
}

/* y[:, row : row + rows], at most STRIP rows */
TARGET static void strip(const ast24_product *p, int64_t row, int64_t rows, upcoming *ahead) {
  _Alignas(64) float sums[STRIP * MOST], ends[PAIR * 32]; /* those that go on in the next block, and those that do not */
  _Alignas(64) char w[2][2 * BLOCK / 32 * TILE];
  block blocks[2], *now = &blocks[0], *next = &blocks[1];
  unfinished before = {.tokens = 0};
  const int64_t of_tokens = (p->tokens + 15) / 16, pairs = (of_tokens + 1) / 2, x_next = p->padded / 32 * TILE;
  const int64_t lines = ahead->lines / (pairs * ((rows + PAIR - 1) / PAIR) * ((p->columns + 31) / 32)) + 1;
  const int in_place = pairs >= MANY, goes_on = p->columns > BLOCK;
  begin(p, row, rows, 0, w[0], now);
  while (now->done < now->all) expand_next(now);
  for (int64_t column = 0, i = 0; column < p->columns;) {
    const int64_t after = i + PAIR < rows ? i + PAIR : 0, column_after = after ? column : column + BLOCK;
    const int is_last = column + BLOCK >= p->columns;
    next->all = next->done = 0, next->row_tiles = 1;
    if (column_after < p->columns)
      begin(p, row + after, rows - after, column_after, in_place ? w[0] : w[now->w == w[0]], next);
    WRITTEN(now->w);
    const char *x = (const char *)p->operand + column / 32 * TILE;
    for (int64_t pair = 0; pair < pairs; pair++, x += 2 * x_next) {
      /* With two places for W its expansion is spread evenly. With one, which takes half the room in the first cache, the
         next tiles are expanded where the last tokens have read those of now. */
      int64_t due = next->all * (pair + 1) / pairs - next->done;
      if (in_place) due = pair < pairs - 1 ? 0 : ast24_least(next->all, next->row_tiles * ((now->columns + 63) / 64));
      float *kept = goes_on ? sums + (i / 16 * of_tokens + 2 * pair) * 256 : NULL, *to = is_last ? ends : kept;
      const float *from = column ? kept : NULL;
      const int64_t kept_next = of_tokens * 256, to_next = is_last ? 512 : kept_next;
      const int both = 2 * pair + 1 < of_tokens;
      if (now->rows > 16 && both)
        sum(2, 2, p, now, x, x_next, from, kept_next, to, to_next, &before, next, due, lines, ahead);
      else if (now->rows > 16)
        sum(2, 1, p, now, x, x_next, from, kept_next, to, to_next, &before, next, due, lines, ahead);
      else if (both)
        sum(1, 2, p, now, x, x_next, from, kept_next, to, to_next, &before, next, due, lines, ahead);
      else
        sum(1, 1, p, now, x, x_next, from, kept_next, to, to_next, &before, next, due, lines, ahead);
      if (is_last)
        before = (unfinished){to, row + i, now->rows, 32 * pair, ast24_least(p->tokens - 32 * pair, 32)};
    }
    while (next->done < next->all) expand_next(next);
    block *const last = now;
    now = next, next = last;
    i = after, column = column_after;
  }
  while (before.tokens > 0) finish_next(p, &before);
}

/* The same for at most 64 rows and 16 tokens, or 32 rows and 32 tokens: sums stay in tiles, and each tile of W is used at
   once. r: tiles of rows; t: of tokens. */
TARGET INLINE void strip_few(int r, int t, const ast24_product *p, int64_t row, int64_t rows, upcoming *ahead) {
  _Alignas(64) float sums[64 * 32];
  _Alignas(64) char w[2][4][TILE];
  const int64_t x_next = p->padded / 32 * TILE, stride = p->columns / 2;
  const int64_t lines = ahead->lines / ((p->columns + 31) / 32) + 1;
  const char *x = p->operand;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t column = 0; column < p->columns; column += BLOCK) {
    const int64_t columns = ast24_least(p->columns - column, BLOCK), tiles = (columns + 31) / 32;
    const uint16_t *values = (const uint16_t *)p->values + row * stride + column / 2;
    places where[4];
    for (int j = 0; j < r; j++) find(p, row + 16 * j, rows - 16 * j, column, columns, &where[j]);
    for (int64_t k = 0; k < tiles; k++, x += TILE) {
      char(*to)[TILE] = w[k % 2];
      for (int j = 0; j < r; j++)
        expand(values + 16 * j * stride, stride, rows - 16 * j, columns, k, &where[j], to[j]);
      WRITTEN(to);
      fetch(ahead, lines);
      _tile_loadd(6, x, 64);
      _tile_loadd(4, to[0], 64);
      _tile_dpbf16ps(0, 4, 6);
      if (t > 1) {
        _tile_loadd(7, (x + x_next), 64);
        _tile_dpbf16ps(2, 4, 7);
      }
      if (r > 1) {
        _tile_loadd(5, to[1], 64);
        _tile_dpbf16ps(1, 5, 6);
        if (t > 1) _tile_dpbf16ps(3, 5, 7);
      }
      if (r > 2) {
        _tile_loadd(4, to[2], 64);
        _tile_dpbf16ps(2, 4, 6);
      }
      if (r > 3) {
        _tile_loadd(5, to[3], 64);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
  }
  _tile_stored(0, sums, 64);
  if (r > 1) _tile_stored(1, (sums + 256 * t), 64);
  if (t > 1) {
    _tile_stored(2, (sums + 256), 64);
    if (r > 1) _tile_stored(3, (sums + 768), 64);
  } else {
    if (r > 2) _tile_stored(2, (sums + 512), 64);
    if (r > 3) _tile_stored(3, (sums + 768), 64);
  }
  for (int64_t token = 0; token < p->tokens; token += 16) finish_sums(p, sums + 16 * token, 256 * t, row, rows, token);
}

TARGET static void strip_of_16(const ast24_product *p, int64_t row, int64_t rows, upcoming *ahead) {
  if (rows > 48)
    strip_few(4, 1, p, row, rows, ahead);
  else if (rows > 32)
    strip_few(3, 1, p, row, rows, ahead);
  else if (rows > 16)
    strip_few(2, 1, p, row, rows, ahead);
  else
    strip_few(1, 1, p, row, rows, ahead);
}

TARGET static void strip_of_32(const ast24_product *p, int64_t row, int64_t rows, upcoming *ahead) {
  if (rows > 16)
    strip_few(2, 2, p, row, rows, ahead);
  else
    strip_few(1, 2, p, row, rows, ahead);
}

/* Sizes of all eight tiles: 16 rows of 64 bytes. */
typedef struct {
  uint8_t palette, start, zero[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} sizes;

TARGET static void rows(const ast24_product *p, int64_t first, int64_t last) {
  if (p->tokens <= AST24_FEW) {
    ast24_avx512_bf16_bfloat16.rows(p, first, last);
    return;
  }
  sizes before, now = {.palette = 1};
  for (int i = 0; i < 8; i++) now.bytes[i] = 64, now.rows[i] = 16;
  WRITTEN(&before);
  _tile_storeconfig(&before); /* oneDNN may rely on the ones that it loaded in this thread */
  WRITTEN(&before);
  WRITTEN(&now);
  _tile_loadconfig(&now);
  const int64_t step = p->tokens <= 16 ? 64 : p->tokens <= 32 ? 32 : STRIP;
  for (int64_t row = first; row < last; row += step) {
    const int64_t count = ast24_least(last - row, step), after = row + count;
    upcoming ahead = rows_ahead(p, after, ast24_least(last - after, step));
    (p->tokens <= 16 ? strip_of_16 : p->tokens <= 32 ? strip_of_32 : strip)(p, row, count, &ahead);
  }
  if (before.palette)
    _tile_loadconfig(&before);
  else
    _tile_release();
}

/* Whether the CPU has AMX and Linux lets this process use it, which it must be asked once. */
static int usable(void) {
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18, BF16 = 1 << 22, TILES = 1 << 24 };
  unsigned a, b, c, d;
  if (!ast24_avx512_bf16.usable() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  return (d & BF16) && (d & TILES) && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

static const ast24_way bfloat16 = {MOST, MOST, OWN, operand, prepare, rows};

const ast24_level ast24_amx_bf16 = {
    "amx_bf16", usable, {&bfloat16, &ast24_avx512_float16, &ast24_avx512_float32}, ast24_avx512_decode};
#endif
