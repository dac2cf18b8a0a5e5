#include "device.cuh"

namespace recog_fast::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

std::string missing(int device) {
  try {
    const OnDevice current("CUDA C++", {0, device});
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, nothing), "CUDA C++");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace recog_fast::cuda
