#include "effective_prototypes.cuh"

namespace recog_fast::cuda {
namespace {

template <bool kVector>
__global__ void __launch_bounds__(kMostThreads<kVector>) prototype_rows(const float* weight, int64_t R, int64_t D, Injection memory, Prototypes out) {
  RF_SHARED(RowSums, sums);
  const int64_t r = row_of_thread();
  if (r >= R) return;  // all threads of a row together
  Row<kVector> row(int(D), sums);
  prototype_row(weight, r, D, memory, out, row);
}

}  // namespace

cudaError_t load_effective_prototypes() { return load_kernels(prototype_rows<true>, prototype_rows<false>); }

void effective_prototypes(const float* weight, int64_t R, int64_t D, const Injection& memory, const Prototypes& out, const Stream& stream) {
  use_device("effective_prototypes", stream);
  const bool vector = D % 4 == 0 && aligned16(weight, memory.rows, out.rows);
  launch("effective_prototypes", vector ? prototype_rows<true> : prototype_rows<false>, shape_of(R, D, vector), stream, weight, R, D, memory, out);
}

}  // namespace recog_fast::cuda
