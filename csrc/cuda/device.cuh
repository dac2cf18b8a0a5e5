// What every CUDA kernel here stands on: launches that report, loads and stores, bfloat16. tests/native/emulated/cuda_runtime.h runs the
// same sources on a CPU, one fiber a thread; what is used of CUDA is what it offers.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace recog_fast::cuda {

#define RF_ELEMENT __host__ __device__ __forceinline__
#include "../elements.h"
#undef RF_ELEMENT

// Shared memory of a kernel; the emulation puts it where it can fill it with NaN first.
#ifndef RF_SHARED
#define RF_SHARED(type, name) __shared__ type name
#endif

struct Shape {
  dim3 grid, block;
};

inline void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of this thread would report it again
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Makes the stream's device current in this thread, as torch's device guard around the call has done for torch.
inline void use_device(const char* kernel, const Stream& stream) {
  int now = -1;
  check(cudaGetDevice(&now), kernel);
  if (now != stream.device) check(cudaSetDevice(stream.device), kernel);
}

// Throws std::runtime_error with the kernel's name and CUDA's text.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, const Stream& stream, const Arguments&... arguments) {
  if (shape.grid.x == 0) return;
  const cudaLaunchConfig_t config{shape.grid, shape.block, 0, reinterpret_cast<cudaStream_t>(stream.handle), nullptr, 0};
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// Loads these kernels' machine code now: at a first launch inside a stream capture it would be too late.
template <class... Kernels>
cudaError_t load_kernels(Kernels*... kernels) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSuccess;
  ((error = error == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernels) : error), ...);
  return error;
}
cudaError_t load_class_step();
cudaError_t load_effective_prototypes();
cudaError_t load_memory_write();
cudaError_t load_norm_statistics();

// Whether these addresses (0 for none) are multiples of 16.
template <class... Addresses>
bool aligned16(Addresses... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

// Read or written once in a sweep: what else is in the L2 cache may stay there.
template <class T>
__device__ __forceinline__ T load_once(const T* address) {
#if defined(__CUDA_ARCH__)
  return __ldcs(address);
#else
  return *address;
#endif
}

template <bool kOnce, class T>
__device__ __forceinline__ void store_as(T* address, T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (kOnce) return __stcs(address, value);
#endif
  *address = value;
}

// To the nearest, ties to even; a NaN becomes 0x7fff, as PyTorch's on CUDA does.
__device__ __forceinline__ uint32_t two_bfloat16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
#endif
}

__device__ __forceinline__ uint16_t to_bfloat16(float value) { return uint16_t(two_bfloat16(value, 0.0f)); }

// Every lane of a full warp gets the sum, the same bits in each: lanes i and i ^ o add the same two numbers.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

}  // namespace recog_fast::cuda
