// Memory and threads of one call.
#pragma once

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

// Runs work(block, thread) over a dynamic queue of `blocks`, and merge(block, thread) in block order, so that the result
// does not depend on which thread took which block. Threads are spawned per call: nothing outlives it, fork stays safe.
template <class Work, class Merge>
void ordered_blocks(int64_t blocks, int threads, Work work, Merge merge) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable turn;
  int64_t merged = 0;
  auto run = [&](int thread) {
    for (int64_t block = next++; block < blocks; block = next++) {
      work(block, thread);
      std::unique_lock<std::mutex> lock(mutex);
      turn.wait(lock, [&] { return merged == block; });
      merge(block, thread);
      ++merged;
      turn.notify_all();
    }
  };
  std::vector<std::thread> team;
  try {
    for (int t = 1; t < threads && t < blocks; ++t) team.emplace_back(run, t);
  } catch (const std::system_error&) {
    // No more threads to be had: those there, and this one, do the work.
  }
  run(0);
  for (auto& member : team) member.join();
}

const Kernels& active_kernels();

// How many threads are worth their start for this much work.
int useful_threads(int threads, int64_t N, int64_t rows, int64_t D);

}  // namespace recog_fast::cpu
