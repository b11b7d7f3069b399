/* Tables for one byte of positions, which is eight columns: how a byte shuffle brings four kept values to their places,
   with zeros between them. x86 (pshufb) and AArch64 (tbl) both read 0x80 as a zero. */
#ifndef AST24_PLACES_H
#define AST24_PLACES_H

#include <stdint.h>

/* A nibble that names one position twice keeps the second value. */
static struct {
  uint8_t bits16[256][16];     /* values of two bytes at their places */
  uint8_t bits32[256][32];     /* values of four bytes */
  uint8_t bfloat16s[256][32];  /* values of two bytes, each in the high half of a float32 */
} places __attribute__((aligned(64)));

__attribute__((constructor)) static void fill_places(void) {
  for (int byte = 0; byte < 256; byte++)
    for (int column = 0; column < 8; column++) {
      const int nibble = byte >> column / 4 * 4, first = nibble & 3, second = nibble >> 2 & 3, at = column % 4;
      const int value = at == second ? column / 4 * 2 + 1 : at == first ? column / 4 * 2 : -1;
      for (int k = 0; k < 4; k++) {
        places.bits32[byte][4 * column + k] = (uint8_t)(value < 0 ? 0x80 : 4 * value + k);
        places.bfloat16s[byte][4 * column + k] = (uint8_t)(value < 0 || k < 2 ? 0x80 : 2 * value + k - 2);
        if (k < 2) places.bits16[byte][2 * column + k] = (uint8_t)(value < 0 ? 0x80 : 2 * value + k);
      }
    }
}

#endif
