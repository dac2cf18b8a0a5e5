// One row of W after dP of its chunk: the chain through both normalisations, then SGD in place or dW (docs/math.md 1, 2).
#pragma once

#include "rows.cuh"

namespace recog_fast::cuda {

// dP (in place) -> dL/dW^ of a row with memory: through P = U/|U|, U = W^ + lam M; as it is where P = W^.
template <bool kVector>
__device__ __forceinline__ void through_memory(Row<kVector>& row, const Length& own, const Share<kVector>& w, float lam,
                                               Share<kVector>& mixed, Share<kVector>& d) {
#pragma unroll
  for (int k = 0; k < kShare<kVector>; ++k) mixed[k] = own.unit(w[k]) + lam * mixed[k];
  const Length length = row.length(mixed);
  if (!(length.norm >= kCancelled)) return;
  const float along = row.dot(d, mixed, length);
#pragma unroll
  for (int k = 0; k < kShare<kVector>; ++k) d[k] = (d[k] - along * length.unit(mixed[k])) * length.reciprocal();
}

// The new W in place of w, its velocity in place of v.
template <bool kVector>
__device__ __forceinline__ void sgd(const ClassStep& s, const Share<kVector>& g, Share<kVector>& w, Share<kVector>& v) {
  const float lr = s.rates ? s.rates[0] : s.lr, momentum = s.rates ? s.rates[1] : s.momentum;
  const float weight_decay = s.rates ? s.rates[2] : s.weight_decay;
#pragma unroll
  for (int k = 0; k < kShare<kVector>; ++k) {
    const float gradient = g[k] + weight_decay * w[k];
    if (s.velocity == nullptr)
      w[k] = sgd_plain(w[k], gradient, lr);
    else if (s.nesterov)
      w[k] = sgd_nesterov(w[k], gradient, v[k], lr, momentum);
    else
      w[k] = sgd_momentum(w[k], gradient, v[k], lr, momentum);
  }
}

template <bool kVector>
__device__ __forceinline__ void step_row(const ClassStep& s, int64_t r, Row<kVector>& row) {
  Share<kVector> w, d, v, mixed;
  int64_t at = -1;
  const float lam = s.memory.renormalize ? strength_of(s.memory, r, at) : 0.0f;  // without: dP is dL/dW^ already
  row.load(s.weight + r * s.D, w);
  row.load(s.d_prototypes + r * s.D, d);
  if (s.velocity != nullptr) row.load(s.velocity + r * s.D, v);
  if (lam != 0.0f) load_memory(row, s.memory, at, s.D, mixed);

  const Length own = row.length(w);
  if (lam != 0.0f) through_memory(row, own, w, lam, mixed, d);
  const float along = row.dot(d, w, own);
#pragma unroll
  for (int k = 0; k < kShare<kVector>; ++k) d[k] = (d[k] - along * own.unit(w[k])) * own.reciprocal();
  if (s.gradient != nullptr) return row.template store<true>(s.gradient + r * s.D, d);

  sgd<kVector>(s, d, w, v);
  row.template store<true>(s.weight + r * s.D, w);
  if (s.velocity != nullptr) row.template store<true>(s.velocity + r * s.D, v);
  if (s.next.rows == nullptr) return;
  to_prototype(row, s.next_memory, r, s.D, w);
  store_prototype<true>(row, s.next, r, s.D, w);
}

}  // namespace recog_fast::cuda
