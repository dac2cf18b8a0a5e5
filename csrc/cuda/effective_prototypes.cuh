// P_j = normalize(normalize(W_j) + lam_j M_j), cast to the sweep's dtype (docs/math.md 2): one row, read and written once.
#pragma once

#include "rows.cuh"

namespace recog_fast::cuda {

template <bool kVector>
__device__ __forceinline__ void prototype_row(const float* weight, int64_t r, int64_t D, const Injection& memory, const Prototypes& out, Row<kVector>& row) {
  Share<kVector> x;
  row.load(weight + r * D, x);
  to_prototype(row, memory, r, D, x);
  store_prototype<false>(row, out, r, D, x);  // a tile kernel reads it next
}

}  // namespace recog_fast::cuda
