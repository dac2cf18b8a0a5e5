#include "class_step.cuh"

namespace recog_fast::cuda {
namespace {

template <bool kVector>
__global__ void __launch_bounds__(kMostThreads<kVector>) class_step_rows(ClassStep step) {
  RF_SHARED(RowSums, sums);
  const int64_t r = row_of_thread();
  if (r >= step.R) return;  // all threads of a row together
  Row<kVector> row(int(step.D), sums);
  step_row(step, r, row);
}

}  // namespace

cudaError_t load_class_step() { return load_kernels(class_step_rows<true>, class_step_rows<false>); }

void class_step(const ClassStep& s, const Stream& stream) {
  use_device("class_step", stream);
  const bool vector = s.D % 4 == 0 && aligned16(s.d_prototypes, s.weight, s.velocity, s.gradient, s.memory.rows, s.next.rows, s.next_memory.rows);
  launch("class_step", vector ? class_step_rows<true> : class_step_rows<false>, shape_of(s.R, s.D, vector), stream, s);
}

}  // namespace recog_fast::cuda
