#include "planes.h"

#include <algorithm>
#include <cstring>

#include "driver.h"

namespace recog_fast::cpu {

namespace {

constexpr int64_t kElements = 1 << 15;  // of a block
constexpr uint32_t kSpread = 0x9E3779B9u;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline bool missing(uint32_t bits) { return (bits & 0x7FFFFFFFu) > 0x7F800000u; }

inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

inline uint32_t with_word(uint32_t key, int64_t word) {
  key = mixed(key ^ uint32_t(word));
  return mixed(key ^ uint32_t(uint64_t(word) >> 32));
}

// work(begin, end) over n elements in blocks of `size`.
template <class Work>
void each_range(int64_t n, int64_t size, int threads, Work work) {
  each_block((n + size - 1) / size, threads, [&](int64_t block, int) { work(block * size, std::min((block + 1) * size, n)); });
}

int worth(int threads, int64_t n) { return n < 8 * kElements ? 1 : threads; }

}  // namespace

void join_planes(const uint16_t* __restrict high, const int16_t* __restrict low, float* __restrict out, int64_t n, int threads) {
  each_range(n, kElements, worth(threads, n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = (uint32_t(high[i]) << 16) + uint32_t(int32_t(low[i]));
      float value;
      std::memcpy(&value, &bits, sizeof value);
      out[i] = value;
    }
  });
}

void split_planes(const float* values, uint16_t* high, int16_t* low, int64_t n, int threads) {
  each_range(n, kElements, worth(threads, n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = bits_of(values[i]);
      const bool nan = missing(bits);
      high[i] = uint16_t(nan ? 0x7FC0u : (bits + 0x8000u) >> 16);
      low[i] = int16_t(nan ? 0u : bits & 0xFFFFu);
    }
  });
}

void round_by_chance(const float* values, uint16_t* rounded, int64_t R, int64_t D, const Chance& chance, int threads) {
  const uint32_t key = with_word(with_word(0, chance.seed), chance.step);
  each_range(R, std::max<int64_t>(1, kElements / D), worth(threads, R * D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint32_t own = with_word(key, chance.first + row);
      const float* from = values + row * D;
      uint16_t* to = rounded + row * D;
      for (int64_t d = 0; d < D; ++d) {
        const uint32_t bits = bits_of(from[d]);
        const uint32_t up = (bits + (mixed(own + uint32_t(d) * kSpread) >> 16)) >> 16;
        to[d] = uint16_t(missing(bits) ? 0x7FC0u : up);
      }
    }
  });
}

}  // namespace recog_fast::cpu
