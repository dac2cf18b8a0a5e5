// QAFace's running mean and unbiased deviation of the labelled norms (docs/math.md 2), in double, one block: sums in a fixed order.
#include "device.cuh"

namespace recog_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Sums {
  double of[3][kWarps];
};

__device__ double block_sum(double x, double (&parts)[kWarps]) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) total += parts[warp];
  return total;
}

__device__ double norm_at(const NormStatistics& s, int64_t n) {
  return s.norms_double ? static_cast<const double*>(s.norms)[n] : double(static_cast<const float*>(s.norms)[n]);
}

__global__ void __launch_bounds__(kThreads) update_statistics(NormStatistics s) {
  RF_SHARED(Sums, sums);
  double count = 0.0, total = 0.0, square = 0.0;
  for (int64_t n = threadIdx.x; n < s.N; n += kThreads)
    if (s.labelled[n]) count += 1.0, total += norm_at(s, n);
  count = block_sum(count, sums.of[0]);
  const double mean = block_sum(total, sums.of[1]) / (count > 1.0 ? count : 1.0);
  for (int64_t n = threadIdx.x; n < s.N; n += kThreads)
    if (s.labelled[n]) square += (norm_at(s, n) - mean) * (norm_at(s, n) - mean);
  const double std = sqrt(block_sum(square, sums.of[2]) / (count > 2.0 ? count - 1.0 : 1.0));
  if (threadIdx.x != 0) return;
  const bool first = *s.batches == 0;
  const double before = *s.std;
  *s.new_mean = count == 0.0 ? *s.mean : first ? mean : s.old * *s.mean + (1.0 - s.old) * mean;
  if (count > 1.0)
    *s.new_std = first ? std : s.old * before + (1.0 - s.old) * std;
  else
    *s.new_std = count == 1.0 && first ? 1.0 : before;
  *s.new_batches = *s.batches + (count > 0.0 ? 1 : 0);
}

}  // namespace

cudaError_t load_norm_statistics() { return load_kernels(update_statistics); }

void norm_statistics(const NormStatistics& s, const Stream& stream) {
  use_device("norm_statistics", stream);
  launch("norm_statistics", update_statistics, {dim3(1), dim3(kThreads)}, stream, s);
}

}  // namespace recog_fast::cuda
