// What one call prepares once and every class block reads: packed operands, padded lane tables, sorted targets.
#pragma once

#include <cstdint>

#include "sweep.h"

namespace recog_fast::cpu {

constexpr int64_t kTileRows = 48;     // rows of W whose logits are on chip together
constexpr int64_t kBlockRows = 960;   // rows of W of one queue entry: its partial sums do not depend on who computes it
constexpr int64_t kDepth = 256;       // k-slice of the first GEMM: a packed panel stays in L1
constexpr float kMasked = -1e30f;       // a cosine that takes no part (targets, losing sub-centers)
constexpr float kMaskedBelow = -1e29f;  // no real one is: |U| without renormalize stays far above

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Target {
  int64_t row;  // row of W: class * K + sub-center
  int64_t lane;
};

struct Plan {
  Classes classes;
  int64_t N = 0, lanes = 0, depth = 0;     // lanes: N padded; depth: D padded
  int64_t tile_classes = 1, block_classes = 1;
  float scale = 1.0f;
  const float* x_panels = nullptr;         // [lanes/NR][D][NR]: x^T, operand of the logits
  const float* x_columns = nullptr;        // [depth/NR][N][NR]: x, operand of the class gradient
  const float* rules = nullptr;            // (kRuleRows, lanes) or null
  const float* terms = nullptr;            // (5, lanes): lse, negative, target, mean, kind
  const Target* targets = nullptr;         // sorted by row
  int64_t target_count = 0;
  bool any_unknown = false;                // some lane has kind != kMargin
  bool want_pull = true;
  bool unknown = false;                    // row sweep of UIR
};

// One block's sums; merged in block order.
struct Partial {
  float* offset;    // (lanes,) exponent offset: sum = sum exp(z - offset)
  double* sum;      // (lanes,) or T
  double* mean;     // (lanes,) E of UIR
  double* mass;     // (lanes,) sum p of UIR
  float* nearest;   // (lanes,)
  int32_t* index;   // (lanes,) row of W relative to the block
  float* pull;      // (lanes, depth)
};

struct Scratch {
  float* logits;    // (tile rows, lanes)
  float* rows;      // (tile rows, depth): prepared prototypes, when W itself cannot be the operand
  float* gradient;  // (tile rows, depth)
  float* lane;      // (lanes,)
  float* inverse;   // (tile rows,)
};

struct Kernels {
  const char* name;
  int64_t width;  // NR: lanes of one panel
  void (*row_block)(const Plan& plan, int64_t first, int64_t last, Partial& partial, Scratch& scratch);
  void (*class_block)(const Plan& plan, const ClassOutput& out, int64_t first, int64_t last, Scratch& scratch);
  void (*prototype_block)(const Classes& classes, float* prototypes, int64_t first, int64_t last);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace recog_fast::cpu
