// The memory write of recog_fast/ops/memory_write.py, which says what is stored where, without the host waiting for anything:
//   last_rows     which rows are the last of their class
//   plan_write    a place for each: its class's slot, or the n-th slot to be filled; cursor
//   then, if the ring is too full for the slots after the cursor, the n oldest entries:
//   count_digits  3 times: the stamp of the youngest of them, digit by digit
//   count_slots, gather_slots   the slots up to it, of its own stamp the first
//   order_slots   by (stamp, slot)
//   store_rows    rows, strengths, stamps, owners, slots
#include "memory_write.cuh"

namespace recog_fast::cuda {
namespace {

struct Tile {
  int64_t of[kThreads];
};

struct Bins {
  int32_t of[kBins];
};

struct Found {
  Threshold of[kPasses];
};

__global__ void __launch_bounds__(kThreads) last_rows(Batch batch, int64_t C, Scratch scratch) {
  RF_SHARED(Tile, tile);
  const int64_t own = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t label = own < batch.N ? batch.labels[own] : -1;
  bool last = label >= 0 && label < C;
  for (int64_t first = int64_t(blockIdx.x) * kThreads; first < batch.N; first += kThreads) {
    __syncthreads();
    tile.of[threadIdx.x] = first + threadIdx.x < batch.N ? batch.labels[first + threadIdx.x] : -1;
    __syncthreads();
    for (int k = 0; k < kThreads; ++k) last = last && (first + k <= own || tile.of[k] != label);
  }
  if (own < batch.N) scratch.place[own] = last ? 1 : 0;
}

// One block.
__global__ void __launch_bounds__(kThreads) plan_write(Ring ring, Batch batch, Scratch scratch, int64_t* evicted) {
  RF_SHARED(ScanParts, parts);
  Scan scan(parts);
  for (int k = threadIdx.x; k < kPasses * kBins; k += kThreads) scratch.histogram[k] = 0;
  int32_t winners = 0, total = 0;
  for (int64_t first = 0; first < batch.N; first += kThreads) {
    const int64_t n = first + threadIdx.x;
    scan.before(n < batch.N ? scratch.place[n] : 0, total);
    winners += total;
  }
  const int64_t dropped = winners > ring.S ? winners - ring.S : 0;  // the first of them
  int32_t seen = 0, fresh = 0, lost = 0;
  for (int64_t first = 0; first < batch.N; first += kThreads) {
    const int64_t n = first + threadIdx.x;
    const bool wins = n < batch.N && scratch.place[n] != 0;
    const int32_t slot = wins ? ring.slot[batch.labels[n]] : -1;
    const int64_t place = seen + scan.before(wins, total);  // every thread takes part in every scan
    seen += total;
    const bool kept = wins && place >= dropped;
    const int32_t rank = fresh + scan.before(kept && slot < 0, total);
    fresh += total;
    scan.before(wins && !kept && slot < 0, total);
    lost += total;
    if (n < batch.N) scratch.place[n] = !kept ? kNotStored : slot >= 0 ? slot : -2 - rank;
    if (kept && slot >= 0) ring.stamp[slot] = kRefreshed;
  }
  if (threadIdx.x != 0) return;
  const int64_t used = *ring.cursor;
  *scratch.plan = {fresh, int32_t(used), used + fresh <= ring.S, 0};
  *ring.cursor = used + fresh < ring.S ? used + fresh : ring.S;
  *evicted = lost;
}

__global__ void __launch_bounds__(kThreads) count_digits(const int64_t* stamp, int64_t S, Scratch scratch, int pass) {
  if (scratch.plan->direct) return;
  RF_SHARED(ScanParts, parts);
  RF_SHARED(Found, found);
  RF_SHARED(Bins, bins);
  Scan scan(parts);
  const Threshold so_far = threshold_of(scratch.histogram, scratch.plan->fresh, pass, scan, found.of);
  for (int k = threadIdx.x; k < kBins; k += kThreads) bins.of[k] = 0;
  __syncthreads();
  const int shift = shift_of(pass), bits = bits_of(pass);
  const int64_t first = int64_t(blockIdx.x) * kSegment, end = first + kSegment < S ? first + kSegment : S;
  DigitCounts counts(bins.of);
  for (int64_t s = first + threadIdx.x; s < end; s += kThreads) {
    const uint32_t digits = key_of(stamp[s]) >> shift;
    if (evictable(stamp[s]) && digits >> bits == so_far.key) counts.add(int32_t(digits & ((1u << bits) - 1)));
  }
  counts.flush();
  __syncthreads();
  for (int k = threadIdx.x; k < kBins; k += kThreads)
    if (bins.of[k] != 0) atomicAdd(scratch.histogram + pass * kBins + k, bins.of[k]);
}

__global__ void __launch_bounds__(kThreads) count_slots(const int64_t* stamp, int64_t S, Scratch scratch) {
  if (scratch.plan->direct) return;
  RF_SHARED(ScanParts, parts);
  RF_SHARED(Found, found);
  Scan scan(parts);
  const Threshold last = threshold_of(scratch.histogram, scratch.plan->fresh, kPasses, scan, found.of);
  const int64_t first = int64_t(blockIdx.x) * kSegment, end = first + kSegment < S ? first + kSegment : S;
  int32_t older = 0, equal = 0;
  for (int64_t s = first + threadIdx.x; s < end; s += kThreads) {
    if (!evictable(stamp[s])) continue;
    older += key_of(stamp[s]) < last.key;
    equal += key_of(stamp[s]) == last.key;
  }
  int32_t all_older = 0, all_equal = 0;
  scan.before(older, all_older);
  scan.before(equal, all_equal);
  if (threadIdx.x == 0) scratch.counts[2 * blockIdx.x] = all_older, scratch.counts[2 * blockIdx.x + 1] = all_equal;
}

__global__ void __launch_bounds__(kThreads) gather_slots(const int64_t* stamp, int64_t S, Scratch scratch) {
  if (scratch.plan->direct) return;
  RF_SHARED(ScanParts, parts);
  RF_SHARED(Found, found);
  Scan scan(parts);
  const int32_t fresh = scratch.plan->fresh;
  const Threshold last = threshold_of(scratch.histogram, fresh, kPasses, scan, found.of);
  int32_t older = 0, equal = 0, total = 0;  // in the segments before
  for (int64_t b = threadIdx.x; b < blockIdx.x; b += kThreads) older += scratch.counts[2 * b], equal += scratch.counts[2 * b + 1];
  scan.before(older, total);
  older = total;
  scan.before(equal, total);
  equal = total;
  for (int k = 0; k < kSegment; k += kThreads) {
    const int64_t s = int64_t(blockIdx.x) * kSegment + k + threadIdx.x;
    const bool there = s < S && evictable(stamp[s]);
    const uint32_t key = there ? key_of(stamp[s]) : 0;
    const bool is_older = there && key < last.key, is_equal = there && key == last.key;
    const int32_t at = older + scan.before(is_older, total);
    older += total;
    const int32_t rank = equal + scan.before(is_equal, total);
    equal += total;
    if (is_older) scratch.oldest[at] = int32_t(s);
    if (is_equal && rank < last.rank) scratch.oldest[fresh - last.rank + rank] = int32_t(s);
  }
}

__global__ void __launch_bounds__(kThreads) order_slots(const int64_t* stamp, Scratch scratch) {
  const int32_t fresh = scratch.plan->fresh;
  if (scratch.plan->direct || int64_t(blockIdx.x) * kThreads >= fresh) return;
  RF_SHARED(Tile, tile);
  const auto age = [&](int64_t n) {  // by stamp, then by slot; larger than any for n past the end
    if (n >= fresh) return INT64_MAX;
    const int32_t slot = scratch.oldest[n];
    return int64_t(key_of(stamp[slot])) << 31 | int64_t(slot);
  };
  const int64_t own = int64_t(blockIdx.x) * kThreads + threadIdx.x, mine = age(own);
  int32_t rank = 0;
  for (int64_t first = 0; first < fresh; first += kThreads) {
    __syncthreads();
    tile.of[threadIdx.x] = age(first + threadIdx.x);
    __syncthreads();
    for (int k = 0; k < kThreads; ++k) rank += tile.of[k] < mine;
  }
  if (own < fresh) scratch.chosen[rank] = scratch.oldest[own];
}

// A warp a row. A slot that changes hands belongs to one row alone, and the class that loses it is none of those stored.
__global__ void __launch_bounds__(kThreads, 4) store_rows(Ring ring, Batch batch, Scratch scratch, int64_t* evicted, bool vector) {
  const int64_t n = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (n >= batch.N) return;
  const int32_t place = scratch.place[n];
  if (place == kNotStored) return;
  const int32_t rank = -2 - place;
  const int32_t slot = place >= 0 ? place : scratch.plan->direct ? scratch.plan->used + rank : scratch.chosen[rank];
  copy_row(ring, batch, slot, n, vector);
  if (threadIdx.x % 32 != 0) return;
  const int64_t before = ring.owner[slot], label = batch.labels[n];
  if (place < 0 && before >= 0) {
    ring.slot[before] = -1;
    atomicAdd(reinterpret_cast<unsigned long long*>(evicted), 1ull);
  }
  ring.strength[slot] = batch.strengths_double ? float(static_cast<const double*>(batch.strengths)[n]) : static_cast<const float*>(batch.strengths)[n];
  ring.stamp[slot] = batch.step;
  ring.owner[slot] = label;
  ring.slot[label] = slot;
}

Shape blocks(int64_t count) { return {dim3(unsigned(count)), dim3(kThreads)}; }
int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

cudaError_t load_memory_write() {
  return load_kernels(last_rows, plan_write, count_digits, count_slots, gather_slots, order_slots, store_rows);
}

int64_t memory_write_scratch(int64_t N, int64_t S) { return Scratch::words(N, S); }

void memory_write(const Ring& ring, const Batch& batch, int32_t* words, int64_t* evicted, const Stream& stream) {
  const char* name = "memory_write";
  use_device(name, stream);
  const Scratch scratch = Scratch::in(words, batch.N);
  const Shape segments = blocks(Scratch::segments(ring.S));
  const int64_t bytes = ring.D * (ring.bfloat16 ? 2 : 4);
  const bool vector = ring.bfloat16 == batch.bfloat16 && bytes % 16 == 0 && aligned16(ring.rows, batch.embeddings);
  launch(name, last_rows, blocks(parts(batch.N, kThreads)), stream, batch, ring.C, scratch);
  launch(name, plan_write, blocks(1), stream, ring, batch, scratch, evicted);
  for (int pass = 0; pass < kPasses; ++pass) launch(name, count_digits, segments, stream, ring.stamp, ring.S, scratch, pass);
  launch(name, count_slots, segments, stream, ring.stamp, ring.S, scratch);
  launch(name, gather_slots, segments, stream, ring.stamp, ring.S, scratch);
  launch(name, order_slots, blocks(parts(batch.N, kThreads)), stream, ring.stamp, scratch);
  launch(name, store_rows, blocks(parts(batch.N, kWarps)), stream, ring, batch, scratch, evicted, vector);
}

}  // namespace recog_fast::cuda
