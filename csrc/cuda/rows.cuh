// A row of W spread over the threads of a warp, longer ones of a block: loads, stores, sums in a fixed order, length.
#pragma once

#include "device.cuh"

namespace recog_fast::cuda {

constexpr int kRowsOfBlock = 4;       // of one warp each
constexpr int kMostWarps = 16;        // of one row
constexpr float kZeroNorm = 1e-12f;   // |x| up to this: the unit row is 0, and its gradient
constexpr float kHuge = 1e36f;        // squares from here on are summed again, of elements that are scaled down
constexpr float kScaledDown = 0x1p-80f;

// Elements of a row that one thread holds: one by one they cost more registers than as vectors.
template <bool kVector>
constexpr int kShare = kVector ? 16 : 8;
template <bool kVector>
using Share = float[kShare<kVector>];
// Threads of the longest row.
template <bool kVector>
constexpr int kMostThreads = int(kMostColumns) / kShare<kVector>;
static_assert(kMostThreads<true> <= 32 * kMostWarps && kMostThreads<false> <= 32 * kMostWarps);

// 4 bfloat16 values of a row: 8 bytes, the share of 16 bytes of float32.
struct alignas(8) Four {
  uint32_t low, high;
};

// What makes a row unit: x^ = (x * down) * inverse; 0 for a zero row, NaN where an element is not finite.
struct Length {
  float down, inverse, norm;

  __device__ float unit(float x) const { return (x * down) * inverse; }
  __device__ float reciprocal() const { return down * inverse; }
};

__device__ __forceinline__ Length length_of(float squared, float down) {
  const float length = sqrtf(squared), norm = length / down;
  if (norm <= kZeroNorm) return {down, 0.0f, norm};
  return length < INFINITY ? Length{down, 1.0f / length, norm} : Length{down, NAN, NAN};
}

struct RowSums {
  float of[2][kMostWarps];
};

// This thread's share of a row. kVector: 16 bytes at a time, which needs D % 4 == 0 and rows that begin at 16 bytes.
// All threads of a row take part in `sum`, `length` and `dot`; what they return is the same in each, to the bit.
template <bool kVector>
class Row {
 public:
  __device__ Row(int columns, RowSums& sums) : columns_(columns), sums_(sums) {}

  __device__ void load(const float* row, Share<kVector>& x) const {
    if constexpr (kVector) {
#pragma unroll
      for (int k = 0; k < kShare<kVector>; k += 4) {
        const float4 four = column(k) < columns_ ? load_once(reinterpret_cast<const float4*>(row + column(k))) : float4{};
        x[k] = four.x, x[k + 1] = four.y, x[k + 2] = four.z, x[k + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kShare<kVector>; ++k) x[k] = column(k) < columns_ ? load_once(row + column(k)) : 0.0f;
    }
  }

  __device__ void load(const uint16_t* row, Share<kVector>& x) const {
    if constexpr (kVector) {
#pragma unroll
      for (int k = 0; k < kShare<kVector>; k += 4) {
        const Four four = column(k) < columns_ ? *reinterpret_cast<const Four*>(row + column(k)) : Four{};
        x[k] = from_bfloat16(uint16_t(four.low)), x[k + 1] = from_bfloat16(uint16_t(four.low >> 16));
        x[k + 2] = from_bfloat16(uint16_t(four.high)), x[k + 3] = from_bfloat16(uint16_t(four.high >> 16));
      }
    } else {
#pragma unroll
      for (int k = 0; k < kShare<kVector>; ++k) x[k] = column(k) < columns_ ? from_bfloat16(row[column(k)]) : 0.0f;
    }
  }

  // kOnce: nobody reads it soon, what is in the L2 cache may stay there.
  template <bool kOnce>
  __device__ void store(float* row, const Share<kVector>& x) const {
    if constexpr (kVector) {
#pragma unroll
      for (int k = 0; k < kShare<kVector>; k += 4) {
        const float4 four{x[k], x[k + 1], x[k + 2], x[k + 3]};
        if (column(k) < columns_) store_as<kOnce>(reinterpret_cast<float4*>(row + column(k)), four);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kShare<kVector>; ++k)
        if (column(k) < columns_) store_as<kOnce>(row + column(k), x[k]);
    }
  }

  template <bool kOnce>
  __device__ void store(uint16_t* row, const Share<kVector>& x) const {
    if constexpr (kVector) {
#pragma unroll
      for (int k = 0; k < kShare<kVector>; k += 4) {
        const uint2 four{two_bfloat16(x[k], x[k + 1]), two_bfloat16(x[k + 2], x[k + 3])};
        if (column(k) < columns_) store_as<kOnce>(reinterpret_cast<uint2*>(row + column(k)), four);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kShare<kVector>; ++k)
        if (column(k) < columns_) store_as<kOnce>(row + column(k), to_bfloat16(x[k]));
    }
  }

  __device__ float sum(float x) {
    x = warp_sum(x);
    if (blockDim.x == 32) return x;  // the same for the whole launch
    // Two buffers in turn: whoever writes one again has passed the barrier behind which all had read it.
    float* parts = sums_.of[turn_];
    turn_ ^= 1;
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) total += parts[warp];
    return total;
  }

  __device__ Length length(const Share<kVector>& x) {
    float squared = 0.0f;
#pragma unroll
    for (int k = 0; k < kShare<kVector>; ++k) squared += x[k] * x[k];
    squared = sum(squared);
    if (squared < kHuge) return length_of(squared, 1.0f);  // all threads of the row agree
    squared = 0.0f;
#pragma unroll
    for (int k = 0; k < kShare<kVector>; ++k) squared += (x[k] * kScaledDown) * (x[k] * kScaledDown);
    return length_of(sum(squared), kScaledDown);
  }

  // <d, x^> of a row x with that length.
  __device__ float dot(const Share<kVector>& d, const Share<kVector>& x, const Length& length) {
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < kShare<kVector>; ++k) total += d[k] * length.unit(x[k]);
    return sum(total);
  }

 private:
  // The column behind the thread's k-th element; neighbouring threads hold neighbouring columns. Columns past D hold zeros.
  __device__ int column(int k) const {
    return kVector ? (k / 4 * int(blockDim.x) + int(threadIdx.x)) * 4 + k % 4 : k * int(blockDim.x) + int(threadIdx.x);
  }

  int columns_, turn_ = 0;
  RowSums& sums_;
};

// lam of row r of W; 0: no entry.
__device__ __forceinline__ float strength_of(const Injection& memory, int64_t r, int64_t& at) {
  if (memory.rows == nullptr) return 0.0f;
  at = memory.slot[r];
  return at < 0 ? 0.0f : memory.strength[at];
}

template <bool kVector>
__device__ __forceinline__ void load_memory(const Row<kVector>& row, const Injection& memory, int64_t at, int64_t D, Share<kVector>& x) {
  if (memory.bfloat16)
    row.load(static_cast<const uint16_t*>(memory.rows) + at * D, x);
  else
    row.load(static_cast<const float*>(memory.rows) + at * D, x);
}

// P in place of row r of W: W/|W|, and with an entry U = W^ + lam M or U/|U|, but W^ where |U| < 1e-4.
template <bool kVector>
__device__ __forceinline__ void to_prototype(Row<kVector>& row, const Injection& memory, int64_t r, int64_t D, Share<kVector>& x) {
  int64_t at = -1;
  const float lam = strength_of(memory, r, at);
  Share<kVector> mixed;
  if (lam != 0.0f) load_memory(row, memory, at, D, mixed);
  const Length own = row.length(x);
#pragma unroll
  for (int k = 0; k < kShare<kVector>; ++k) x[k] = own.unit(x[k]);
  if (lam == 0.0f) return;
#pragma unroll
  for (int k = 0; k < kShare<kVector>; ++k) mixed[k] = x[k] + lam * mixed[k];
  Length length{1.0f, 1.0f, 1.0f};
  if (memory.renormalize) length = row.length(mixed);
  if (memory.renormalize && !(length.norm >= kCancelled)) return;
#pragma unroll
  for (int k = 0; k < kShare<kVector>; ++k) x[k] = length.unit(mixed[k]);
}

template <bool kOnce, bool kVector>
__device__ __forceinline__ void store_prototype(const Row<kVector>& row, const Prototypes& out, int64_t r, int64_t D, const Share<kVector>& x) {
  if (out.bfloat16)
    row.template store<kOnce>(static_cast<uint16_t*>(out.rows) + r * D, x);
  else
    row.template store<kOnce>(static_cast<float*>(out.rows) + r * D, x);
}

__device__ __forceinline__ int64_t row_of_thread() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }

// A warp a row, several rows to a block; longer rows get a block each.
inline Shape shape_of(int64_t rows, int64_t columns, bool vector) {
  const int64_t share = 32 * (vector ? kShare<true> : kShare<false>);
  const unsigned warps = columns <= share ? 1 : unsigned((columns + share - 1) / share), together = warps == 1 ? kRowsOfBlock : 1;
  return {dim3(unsigned((rows + together - 1) / together)), dim3(32 * warps, together)};
}

}  // namespace recog_fast::cuda
