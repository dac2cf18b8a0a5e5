// W as two 16-bit planes, and rounding to bfloat16 by chance (docs/math.md 1.5): the bits of recog_fast/ops/_planes.py and _stochastic.py.
#pragma once

#include <cstdint>

namespace recog_fast::cpu {

// bits(out) = (high << 16) + low, n elements.
void join_planes(const uint16_t* high, const int16_t* low, float* out, int64_t n, int threads);

// The inverse: high is the nearest bfloat16, ties away from zero; a NaN becomes 0x7fc0 and 0.
void split_planes(const float* values, uint16_t* high, int16_t* low, int64_t n, int threads);

// What the random bits of an element are a hash of, beside its row and column; `first` is the row of W that row 0 is.
struct Chance {
  int64_t seed = 0, step = 0, first = 0;
};

// rounded (R, D) bfloat16: values (R, D) with 16 random bits added, the lower half cut off; a NaN becomes 0x7fc0.
void round_by_chance(const float* values, uint16_t* rounded, int64_t R, int64_t D, const Chance& chance, int threads);

}  // namespace recog_fast::cpu
