#include "device.cuh"

namespace recog_fast::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

std::string missing(int device) {
  const char* name = "CUDA C++";
  try {
    int before = 0;
    check(cudaGetDevice(&before), name);
    check(cudaSetDevice(device), name);
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
    check(cudaSetDevice(before), name);
    check(error, name);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace recog_fast::cuda
