// Which element of a matrix each lane of a warp holds, for ldmatrix and mma.m16n8k16 (PTX ISA, "Matrix Fragments for
// mma.m16n8k16 with floating point type"; "ldmatrix"). The one place of these maps in the emulator: tests compare it
// with CuTe's and Triton's. A register holds two bf16 elements, the lower half first: element i is in register i / 2.
#pragma once

#include <cstdint>
#include <cstring>

namespace cuda_emulator {

struct Position {
  int row, column;
};
struct Source {
  int lane, element;
};
struct MatrixRow {
  std::uint16_t elements[8];
};
struct MatrixOperands {
  std::uint32_t a[4], b[2];
};

namespace fragments {

// Of an 8 x 8 matrix that ldmatrix loads: element 0 or 1.
inline Position matrix(int lane, int element, bool transposed) {
  const Position at{lane / 4, lane % 4 * 2 + element};
  return transposed ? Position{at.column, at.row} : at;
}
// Of a [16 (m), 16 (k)]: elements 0 to 7.
inline Position a(int lane, int element) {
  return {lane / 4 + element / 2 % 2 * 8, lane % 4 * 2 + element % 2 + element / 4 * 8};
}
// Of b [16 (k), 8 (n)]: elements 0 to 3.
inline Position b(int lane, int element) { return {lane % 4 * 2 + element % 2 + element / 2 * 8, lane / 4}; }
// Of c [16 (m), 8 (n)]: elements 0 to 3, a float each.
inline Position accumulator(int lane, int element) { return {lane / 4 + element / 2 * 8, lane % 4 * 2 + element % 2}; }

// The inverse of a map of COUNT elements a lane, made once.
template <int ROWS, int COLUMNS>
struct Inverse {
  Source source[ROWS][COLUMNS];
  explicit Inverse(Position (*map)(int, int)) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int element = 0; element < ROWS * COLUMNS / 32; ++element) {
        const Position at = map(lane, element);
        source[at.row][at.column] = {lane, element};
      }
    }
  }
};
inline Source source_a(Position at) {
  static const Inverse<16, 16> inverse(a);
  return inverse.source[at.row][at.column];
}
inline Source source_b(Position at) {
  static const Inverse<16, 8> inverse(b);
  return inverse.source[at.row][at.column];
}

}  // namespace fragments

inline float bf16_value(const std::uint32_t* registers, int element) {
  const std::uint32_t bits = registers[element / 2] >> (element % 2 * 16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace cuda_emulator
