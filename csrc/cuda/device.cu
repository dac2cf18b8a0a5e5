#include "device.cuh"

namespace recog_fast::cuda {

std::string missing(int device) {
  const char* name = "CUDA C++";
  try {
    int before = 0;
    check(cudaGetDevice(&before), name);
    check(cudaSetDevice(device), name);
    cudaError_t error = cudaSuccess;
    for (const auto load : {load_class_step, load_effective_prototypes, load_memory_write, load_norm_statistics})
      if (error == cudaSuccess) error = load();
    check(cudaSetDevice(before), name);
    check(error, name);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace recog_fast::cuda
