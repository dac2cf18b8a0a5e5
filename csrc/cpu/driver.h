// Memory and threads of one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "plan.h"

namespace recog_fast::cpu {

// 64-byte aligned array, uninitialised.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t count) {
    // To the byte: what lies past the end must be a sanitizer's, not slack.
    void* data = nullptr;
    if (posix_memalign(&data, 64, sizeof(T) * size_t(count > 0 ? count : 1)) != 0) throw std::bad_alloc();
    data_.reset(static_cast<T*>(data));
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T, Free> data_;
};

// Runs run(0) here and run(1), run(2), ... on threads of their own. They are spawned per call: nothing outlives it, fork stays safe.
template <class Run>
void run_team(int64_t blocks, int threads, Run run) {
  std::vector<std::thread> team;
  try {
    for (int t = 1; t < threads && t < blocks; ++t) team.emplace_back(run, t);
  } catch (const std::system_error&) {
    // No more threads to be had: those there, and this one, do the work.
  }
  run(0);
  for (auto& member : team) member.join();
}

// work(block, thread) over a dynamic queue, in any order.
template <class Work>
void each_block(int64_t blocks, int threads, Work work) {
  std::atomic<int64_t> next{0};
  run_team(blocks, threads, [&](int thread) {
    for (int64_t block = next++; block < blocks; block = next++) work(block, thread);
  });
}

// work(block, thread, slot) over a dynamic queue, and merge(block, slot) in block order, so that the result does not depend on
// which thread took which block. A finished block waits in its slot: with more slots than threads, nobody waits for a slow one.
template <class Work, class Merge>
void ordered_blocks(int64_t blocks, int threads, int slots, Work work, Merge merge) {
  constexpr int64_t kFree = -1, kBusy = -2;
  std::mutex mutex;
  std::condition_variable changed;
  int64_t next = 0, merged = 0;
  std::vector<int64_t> holds(size_t(slots), kFree);  // a finished block, or one of these
  const auto find = [&](int64_t what) { return std::find(holds.begin(), holds.end(), what) - holds.begin(); };
  run_team(blocks, threads, [&](int thread) {
    std::unique_lock<std::mutex> lock(mutex);
    while (next < blocks) {
      const int64_t slot = find(kFree);
      if (slot == slots) {
        changed.wait(lock);
        continue;
      }
      const int64_t block = next++;
      holds[size_t(slot)] = kBusy;
      lock.unlock();
      work(block, thread, int(slot));
      lock.lock();
      holds[size_t(slot)] = block;
      for (int64_t ready = find(merged); ready < slots; ready = find(merged)) {
        merge(merged++, int(ready));
        holds[size_t(ready)] = kFree;
      }
      changed.notify_all();
    }
  });
}

const Kernels& active_kernels();

// How many threads are worth their start for this much work.
int useful_threads(int threads, int64_t N, int64_t rows, int64_t D);

}  // namespace recog_fast::cpu
