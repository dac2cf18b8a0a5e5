// What the emulation promises, on kernels with known mistakes. Exit code 0: all of it, 1: not; prints what failed.
#include "cuda_runtime.h"

#include <cstdio>

namespace {

struct Floats {
  float of[64];
};

float out[64];

__global__ void half_a_warp_shuffles() {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void part_of_a_mask() { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }

__global__ void some_at_a_barrier_others_at_a_shuffle() {
  if (threadIdx.x == 3) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void two_kinds_of_shuffle() {
  out[threadIdx.x] = threadIdx.x == 5 ? __shfl_up_sync(0xffffffffu, 1.0f, 1) : __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void neighbour(bool wait) {
  RF_SHARED(Floats, shared);
  shared.of[threadIdx.x] = float(threadIdx.x);
  if (wait) __syncthreads();
  out[threadIdx.x] = shared.of[(threadIdx.x + 1) % 64];
}

__global__ void unwritten() {
  RF_SHARED(Floats, shared);
  out[threadIdx.x] = shared.of[threadIdx.x];
}

__global__ void sums() {
  float x = float(threadIdx.x);
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  int before = int(threadIdx.x);
  before = __shfl_up_sync(0xffffffffu, before, 3);
  out[threadIdx.x] = x + 1000 * float(before);
}

bool good = true;

void expect(bool holds, const char* what) {
  if (!holds) std::printf("emulation: %s\n", what), good = false;
}

template <class... Arguments>
std::vector<float> run(const char* order, cudaError_t error, const char* what, void (*kernel)(Arguments...), Arguments... arguments) {
  setenv("RECOG_FAST_EMULATED_ORDER", order, 1);
  const cudaLaunchConfig_t config{dim3(1), dim3(64), 0, nullptr, nullptr, 0};
  expect(cudaLaunchKernelEx(&config, kernel, arguments...) == error, what);
  return std::vector<float>(out, out + 64);
}

}  // namespace

int main() {
  run("forward", cudaErrorLaunchFailure, "half a warp at a shuffle goes unnoticed", half_a_warp_shuffles);
  run("forward", cudaErrorLaunchFailure, "a shuffle of a part of a warp goes unnoticed", part_of_a_mask);
  run("forward", cudaErrorLaunchFailure, "a thread at a barrier, the others at a shuffle: unnoticed", some_at_a_barrier_others_at_a_shuffle);
  run("forward", cudaErrorLaunchFailure, "two kinds of shuffle meet", two_kinds_of_shuffle);
  std::vector<float> expected(64);
  for (int i = 0; i < 64; ++i) expected[i] = float((i + 1) % 64);
  for (const char* order : {"forward", "backward", "mixed"}) {
    expect(run(order, cudaSuccess, "a barrier fails", neighbour, true) == expected, "a barrier does not hold threads back");
    expect(run(order, cudaSuccess, "a race fails", neighbour, false) != expected, "a missing barrier does not show");
    expect(std::isnan(run(order, cudaSuccess, "unwritten fails", unwritten)[7]), "shared memory does not begin as NaN");
    const std::vector<float> both = run(order, cudaSuccess, "shuffles fail", sums);
    for (int i = 0; i < 64; ++i) {
      const int first = i / 32 * 32, before = i % 32 < 3 ? i : i - 3;
      expect(both[i] == float(32 * first + 496) + 1000 * float(before), "a shuffle gives the wrong lane");
    }
  }
  const cudaLaunchConfig_t odd{dim3(1), dim3(33), 0, nullptr, nullptr, 0};
  expect(cudaLaunchKernelEx(&odd, sums) == cudaErrorInvalidConfiguration, "a part of a warp is launched");
  return good ? 0 : 1;
}
