/* Runs the cases that neon.py wrote: neon CASES RESULTS. For each: y of the product, then the decoded matrix.
   Every tensor ends at a page that may not be accessed. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const char *ast24_name(int level);
int ast24_usable(int level);
int ast24_linear(
    int level, int dtype, const void *x, int64_t x_stride, const void *values, const void *meta, const void *bias,
    void *y, int64_t tokens, int64_t rows, int64_t columns, int threads);
void ast24_decode(
    int level, int itemsize, const void *values, const void *meta, void *dense, int64_t rows, int64_t columns,
    int threads);

static void fail(const char *what) {
  fprintf(stderr, "neon: %s\n", what);
  exit(1);
}

typedef struct {
  char *memory, *start;
  size_t mapped, bytes;
} area;

static area area_of(size_t bytes) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
  area made = {NULL, NULL, whole + page, bytes};
  made.memory = mmap(NULL, made.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made.memory == MAP_FAILED || mprotect(made.memory + whole, page, PROT_NONE)) fail("no memory");
  made.start = made.memory + whole - bytes;
  return made;
}

static area area_from(FILE *file, size_t bytes) {
  const area made = area_of(bytes);
  if (fread(made.start, 1, bytes, file) != bytes) fail("the file of cases is cut off");
  return made;
}

static void put(FILE *file, area from) {
  if (fwrite(from.start, 1, from.bytes, file) != from.bytes) fail("the results cannot be written");
}

int main(int count, char **arguments) {
  if (count != 3) fail("usage: neon CASES RESULTS");
  if (!ast24_name(0) || strcmp(ast24_name(0), "neon") || !ast24_usable(0)) fail("the first level is not neon");
  FILE *cases = fopen(arguments[1], "rb"), *results = fopen(arguments[2], "wb");
  if (!cases || !results) fail("a file cannot be opened");
  struct {
    int64_t dtype, itemsize, tokens, rows, columns, x_stride, has_bias;
  } it;
  while (fread(&it, sizeof it, 1, cases) == 1) {
    const size_t size = (size_t)it.itemsize, entries = (size_t)(it.rows * it.columns);
    area all[] = {
        area_from(cases, (size_t)((it.tokens - 1) * it.x_stride + it.columns) * size),
        area_from(cases, entries / 2 * size),
        area_from(cases, entries / 8),
        area_from(cases, it.has_bias ? (size_t)it.rows * size : 0),
        area_of((size_t)(it.tokens * it.rows) * size),
        area_of(entries * size),
    };
    const char *bias = it.has_bias ? all[3].start : NULL;
    if (ast24_linear(
            0, (int)it.dtype, all[0].start, it.x_stride, all[1].start, all[2].start, bias, all[4].start, it.tokens,
            it.rows, it.columns, 1))
      fail("a product failed");
    ast24_decode(0, (int)size, all[1].start, all[2].start, all[5].start, it.rows, it.columns, 1);
    put(results, all[4]);
    put(results, all[5]);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) munmap(all[i].memory, all[i].mapped);
  }
  if (fclose(results)) fail("the results cannot be written");
  return 0;
}
