// The CUDA kernels as C++ sees them: pointers into device memory, sizes, a stream. Nothing here waits for the device; the stream's device
// is current in the calling thread afterwards.
// Every function throws std::runtime_error, the kernel's name and CUDA's text, where a launch fails.
#pragma once

#include <cstdint>
#include <string>

namespace recog_fast::cuda {

constexpr int64_t kMostColumns = 4096;   // D of the kernels over rows of W
constexpr int64_t kMostWritten = 65536;  // rows of a batch that memory_write takes: its work grows with their square

struct Stream {
  uintptr_t handle;  // cudaStream_t
  int device;
};

// Loads the kernels on that device. Why it cannot run them: an old driver, no machine code for it, no such device. Empty where it can.
std::string missing(int device);

// The memory behind rows of W (docs/math.md 2); without rows: none.
struct Injection {
  const void* rows = nullptr;         // (S, D) float32 or bfloat16
  const float* strength = nullptr;    // (S,) lam
  const int32_t* slot = nullptr;      // (R,), -1: no entry
  bool bfloat16 = false, renormalize = true;
};

struct Prototypes {
  void* rows = nullptr;  // (R, D) float32 or bfloat16
  bool bfloat16 = false;
};

// dW = chain(dP) of R rows, then the step of W in place, or dW itself where `gradient` is given.
struct ClassStep {
  const float* d_prototypes;    // (R, D)
  float* weight;                // (R, D)
  float* velocity = nullptr;    // (R, D), null: no momentum
  float* gradient = nullptr;    // (R, D)
  int64_t R, D;
  float lr = 0, momentum = 0, weight_decay = 0;
  bool nesterov = false;
  Injection memory;
  Prototypes next;              // P of the new W, null: not wanted
  Injection next_memory;        // and its memory
  const float* rates = nullptr; // (3,) lr, momentum and weight decay, read in place of those above: a captured graph gets new ones
};

void class_step(const ClassStep& step, const Stream& stream);
void effective_prototypes(const float* weight, int64_t R, int64_t D, const Injection& memory, const Prototypes& out, const Stream& stream);

struct Ring {
  void* rows;        // (S, D) float32 or bfloat16
  float* strength;   // (S,)
  int64_t* stamp;    // (S,) -1: never written
  int64_t* owner;    // (S,) class, -1: none
  int32_t* slot;     // (C,) -1: none
  int64_t* cursor;   // () slots in use
  int64_t S, C, D;
  bool bfloat16;
};

struct Batch {
  const void* embeddings;   // (N, D) float32 or bfloat16
  const int64_t* labels;    // (N,)
  const void* strengths;    // (N,) float32 or float64
  int64_t N, step;
  bool bfloat16, strengths_double;
};

// int32 words of scratch that memory_write needs.
int64_t memory_write_scratch(int64_t N, int64_t S);
// `evicted` (): entries the full ring lost.
void memory_write(const Ring& ring, const Batch& batch, int32_t* scratch, int64_t* evicted, const Stream& stream);

// Running mean and deviation of the labelled norms (QAFace).
struct NormStatistics {
  const void* norms;         // (N,) float32 or float64
  const bool* labelled;      // (N,)
  int64_t N;
  bool norms_double;
  double old;                // weight of the old value
  const double *mean, *std;  // ()
  const int64_t* batches;    // ()
  double *new_mean, *new_std;
  int64_t* new_batches;
};

void norm_statistics(const NormStatistics& statistics, const Stream& stream);

}  // namespace recog_fast::cuda
