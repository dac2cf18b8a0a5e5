// CUDA for a CPU, as much of it as csrc/cuda uses: the kernels compile as they are and run one block after the other, every thread a
// fiber that runs until it meets others (a shuffle, a barrier). Found that way, and reported as a CUDA error: threads of a warp that
// meet in different places or not at all, and barriers that some threads never reach. Not found: what needs threads to run at
// the same time. RECOG_FAST_EMULATED_ORDER = forward, backward or mixed: in which order threads and blocks run; results that depend on it
// show a race. Shared memory is 0xff bytes (NaN, -1) when a block begins. RECOG_FAST_EMULATED_ERROR = a number: every launch fails.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define RF_SHARED(type, name) type& name = *static_cast<type*>(emulated::shared(sizeof(type), alignof(type)))

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorInsufficientDriver = 35, cudaErrorLaunchFailure = 719 };

namespace emulated {

enum class Meets { nobody, warp, block };

struct Thread {
  dim3 index;
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  Meets meets = Meets::nobody;
  int kind = 0;               // which kind of meeting, and its width
  unsigned char given[8], taken[8];
  int from = 0;               // lane whose value is taken
  size_t shared = 0;          // how often it asked for shared memory
};

struct State {
  dim3 grid, block, at;
  std::vector<Thread> threads;
  Thread* now = nullptr;
  ucontext_t scheduler;
  std::vector<std::pair<std::vector<char>, size_t>> shared;  // bytes and alignment, in the order asked for
  std::function<void()> body;
  std::string failed;
};

inline State& state() {
  static State only;
  return only;
}

inline void* shared(size_t bytes, size_t alignment) {
  State& s = state();
  const size_t which = s.now->shared++;
  if (which == s.shared.size()) s.shared.emplace_back(std::vector<char>(bytes + alignment, char(0xff)), alignment);
  char* at = s.shared[which].first.data();
  return at + (alignment - reinterpret_cast<uintptr_t>(at) % alignment) % alignment;
}

inline void meet(Meets whom, int kind) {
  State& s = state();
  s.now->meets = whom, s.now->kind = kind;
  swapcontext(&s.now->context, &s.scheduler);
}

inline void start() {
  State& s = state();
  s.body();
  s.now->done = true;
  swapcontext(&s.now->context, &s.scheduler);
}

template <class T>
T exchange(unsigned mask, T value, int kind, int from) {
  static_assert(sizeof(T) <= 8);
  Thread& self = *state().now;
  std::memcpy(self.given, &value, sizeof value);
  self.from = from;
  meet(Meets::warp, mask == 0xffffffffu ? kind * 16 + int(sizeof(T)) : -1);
  std::memcpy(&value, self.taken, sizeof value);
  return value;
}

// Lets those go on who have all met; false: nobody could.
inline bool let_go() {
  State& s = state();
  bool went = false;
  const size_t count = s.threads.size();
  for (size_t first = 0; first < count; first += 32) {
    Thread* warp = &s.threads[first];
    bool all = true;  // a full warp, at the same meeting
    for (int l = 0; l < 32; ++l) all = all && !warp[l].done && warp[l].meets == Meets::warp && warp[l].kind >= 0 && warp[l].kind == warp[0].kind;
    if (!all) continue;
    for (int l = 0; l < 32; ++l) std::memcpy(warp[l].taken, warp[warp[l].from].given, 8);
    for (int l = 0; l < 32; ++l) warp[l].meets = Meets::nobody;
    went = true;
  }
  bool barrier = true, anyone = false;
  for (const Thread& t : s.threads) {
    barrier = barrier && (t.done || t.meets == Meets::block);
    anyone = anyone || !t.done;
  }
  if (!barrier || !anyone) return went;
  for (Thread& t : s.threads) t.meets = Meets::nobody;
  return true;
}

inline void run_block(const std::vector<int>& order) {
  State& s = state();
  s.shared.clear();
  s.shared.reserve(16);
  for (size_t i = 0; i < s.threads.size(); ++i) {
    Thread& t = s.threads[i];
    t.index = dim3(unsigned(i) % s.block.x, unsigned(i) / s.block.x);
    t.done = false, t.meets = Meets::nobody, t.shared = 0;
    t.stack.resize(1 << 16);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data(), t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = nullptr;
    makecontext(&t.context, start, 0);
  }
  for (;;) {
    bool left = false;
    for (int i : order) {
      Thread& t = s.threads[size_t(i)];
      if (t.done || t.meets != Meets::nobody) continue;
      s.now = &t;
      swapcontext(&s.scheduler, &t.context);
    }
    for (const Thread& t : s.threads) left = left || !t.done;
    if (!left) return;
    if (!let_go()) {
      s.failed = "threads that do not meet";
      return;
    }
  }
}

template <class T>
std::vector<T> ordered(size_t count) {
  static std::mt19937 random(1);
  std::vector<T> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = T(i);
  const char* wanted = std::getenv("RECOG_FAST_EMULATED_ORDER");
  if (wanted != nullptr && std::string(wanted) == "backward") std::reverse(order.begin(), order.end());
  if (wanted != nullptr && std::string(wanted) == "mixed") std::shuffle(order.begin(), order.end(), random);
  return order;
}

inline cudaError_t launch(const dim3& grid, const dim3& block, std::function<void()> body) {
  const size_t count = size_t(block.x) * block.y * block.z;
  if (const char* error = std::getenv("RECOG_FAST_EMULATED_ERROR")) return cudaError_t(std::atoi(error));
  if (count == 0 || count > 1024 || count % 32 != 0 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y != 1) return cudaErrorInvalidConfiguration;
  State& s = state();
  s.grid = grid, s.block = block, s.body = std::move(body), s.failed.clear();
  if (s.threads.size() != count) s.threads = std::vector<Thread>(count);
  for (unsigned b : ordered<unsigned>(grid.x)) {
    s.at = dim3(b, 0, 0);
    run_block(ordered<int>(count));
    if (!s.failed.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulated

#define threadIdx (emulated::state().now->index)
#define blockIdx (emulated::state().at)
#define blockDim (emulated::state().block)
#define gridDim (emulated::state().grid)

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return emulated::exchange(mask, value, 1, int(threadIdx.y * blockDim.x + threadIdx.x) % 32 ^ other);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  const int lane = int(threadIdx.y * blockDim.x + threadIdx.x) % 32;
  return emulated::exchange(mask, value, 2, lane < by ? lane : lane - by);
}

inline void __syncthreads() { emulated::meet(emulated::Meets::block, 0); }

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

struct cudaLaunchConfig_t {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  void* attributes;
  unsigned attribute_count;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  return emulated::launch(config->grid, config->block, [=] { kernel(arguments...); });
}

struct cudaFuncAttributes {};

template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Parameters...)) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidConfiguration; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInsufficientDriver ? "cudaErrorInsufficientDriver" : error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorLaunchFailure";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = error == cudaErrorInsufficientDriver ? "no driver (emulated)" : error == cudaErrorInvalidConfiguration ? "invalid configuration (emulated)" : emulated::state().failed;
  return text.c_str();
}
