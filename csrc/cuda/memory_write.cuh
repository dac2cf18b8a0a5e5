// Blocks of memory_write: scans, the slots of the oldest entries, one row into its slot. Integers only decide: no order of
// threads shows in the result.
#pragma once

#include "device.cuh"

namespace recog_fast::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSegment = 8192;                      // slots that one block looks through
constexpr int kPasses = 3, kBins = 2048;            // a stamp is found digit by digit: 11, 11 and 10 bits of stamp + 1
constexpr int64_t kRefreshed = INT64_MAX;           // stamp of a slot that its class overwrites in this batch: never evicted
constexpr int32_t kNotStored = -1;                  // place of a row; p <= -2: the (-2 - p)-th slot to be filled; else its slot
static_assert(kBins % kThreads == 0 && kSegment % kThreads == 0);

// What the first kernels find out for the others.
struct Plan {
  int32_t fresh;   // classes that need a slot
  int32_t used;    // slots in use before
  int32_t direct;  // whether the slots after `used` are enough
  int32_t unused;
};

// Scratch, all int32.
struct Scratch {
  Plan* plan;
  int32_t* place;      // (N,)
  int32_t* oldest;     // (N,) slots to be filled, in no order that matters
  int32_t* chosen;     // (N,) the same by age
  int32_t* histogram;  // (kPasses, kBins)
  int32_t* counts;     // (segments, 2) slots younger than the threshold's, and of its stamp

  __host__ __device__ static int64_t segments(int64_t S) { return (S + kSegment - 1) / kSegment; }
  __host__ __device__ static int64_t words(int64_t N, int64_t S) { return 4 + 3 * N + kPasses * kBins + 2 * segments(S); }
  __host__ __device__ static Scratch in(int32_t* words, int64_t N) {
    int32_t* rows = words + 4;
    return {reinterpret_cast<Plan*>(words), rows, rows + N, rows + 2 * N, rows + 3 * N, rows + 3 * N + kPasses * kBins};
  }
};

struct ScanParts {
  int32_t of[2][kWarps];
};

// Sums of one number a thread, over the threads before it and over all of the block.
class Scan {
 public:
  __device__ explicit Scan(ScanParts& parts) : parts_(parts) {}

  __device__ int32_t before(int32_t value, int32_t& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t up_to = value;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int32_t other = __shfl_up_sync(0xffffffffu, up_to, o);
      if (lane >= o) up_to += other;
    }
    // Two buffers in turn: whoever writes one again has passed the barrier behind which all had read it.
    int32_t* parts = parts_.of[turn_];
    turn_ ^= 1;
    if (lane == 31) parts[warp] = up_to;
    __syncthreads();
    int32_t base = 0;
    total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) base += parts[w];
      total += parts[w];
    }
    return base + up_to - value;
  }

 private:
  ScanParts& parts_;
  int turn_ = 0;
};

// The stamp (plus one) of the youngest entry to be evicted, and how many of that stamp are; after fewer passes its first digits.
struct Threshold {
  uint32_t key = 0;
  int32_t rank = 0;  // among what shares the digits found so far, from 1
};

__device__ __forceinline__ int shift_of(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }
__device__ __forceinline__ int bits_of(int pass) { return pass == 2 ? 10 : 11; }

// Threshold after the first `passes` histograms; every block finds it for itself. `found`: one for each pass.
__device__ inline Threshold threshold_of(const int32_t* histogram, int32_t fresh, int passes, Scan& scan, Threshold (&found)[kPasses]) {
  Threshold now{0, fresh};
  constexpr int kOwn = kBins / kThreads;
  for (int pass = 0; pass < passes; ++pass) {
    const int32_t* bins = histogram + pass * kBins + threadIdx.x * kOwn;
    int32_t own = 0, total = 0;
    for (int k = 0; k < kOwn; ++k) own += bins[k];
    int32_t before = scan.before(own, total);
    if (before < now.rank && now.rank <= before + own) {  // one thread
      int k = 0;
      while (before + bins[k] < now.rank) before += bins[k++];
      found[pass] = {now.key << bits_of(pass) | uint32_t(threadIdx.x * kOwn + k), now.rank - before};
    }
    __syncthreads();
    now = found[pass];
  }
  return now;
}

// Counts of one block's digits. Neighbours in time share a stamp: a thread adds up equal digits before it touches a bin.
class DigitCounts {
 public:
  __device__ explicit DigitCounts(int32_t* bins) : bins_(bins) {}
  __device__ void add(int32_t digit) {
    if (digit != digit_) flush(), digit_ = digit;
    ++run_;
  }
  __device__ void flush() {
    if (run_ > 0) atomicAdd(bins_ + digit_, run_);
    run_ = 0;
  }

 private:
  int32_t* bins_;
  int32_t digit_ = 0, run_ = 0;
};

__device__ __forceinline__ bool evictable(int64_t stamp) { return stamp != kRefreshed; }
// stamp + 1: never written is 0, and 2^31 the most; of kRefreshed nobody's.
__device__ __forceinline__ uint32_t key_of(int64_t stamp) { return uint32_t(uint64_t(stamp) + 1); }

// Row `row` of the batch into its slot; vector: 16 bytes at a time, both sides of one type.
__device__ inline void copy_row(const Ring& ring, const Batch& batch, int64_t slot, int64_t row, bool vector) {
  const int lane = threadIdx.x % 32;
  if (vector) {
    const int64_t words = ring.D * (ring.bfloat16 ? 2 : 4) / 16;
    uint4* to = static_cast<uint4*>(ring.rows) + slot * words;
    const uint4* from = static_cast<const uint4*>(batch.embeddings) + row * words;
    for (int64_t d = lane; d < words; d += 32) to[d] = load_once(from + d);
    return;
  }
  for (int64_t d = lane; d < ring.D; d += 32) {
    const int64_t to = slot * ring.D + d, from = row * ring.D + d;
    const float value = batch.bfloat16 ? from_bfloat16(static_cast<const uint16_t*>(batch.embeddings)[from])
                                       : static_cast<const float*>(batch.embeddings)[from];
    if (ring.bfloat16)
      static_cast<uint16_t*>(ring.rows)[to] = to_bfloat16(value);
    else
      static_cast<float*>(ring.rows)[to] = value;
  }
}

}  // namespace recog_fast::cuda
