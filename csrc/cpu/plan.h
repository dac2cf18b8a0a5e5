// What one call prepares once and every class block reads: packed operands, padded lane tables, sorted targets.
#pragma once

#include <cstdint>

#include "sweep.h"

namespace recog_fast::cpu {

constexpr int64_t kTileRows = 96;       // rows of W whose logits are on chip together
constexpr int64_t kBlockRows = 960;     // rows of W of one queue entry: its partial sums do not depend on who computes it
constexpr int64_t kDepth = 256;         // k-slice of a GEMM (pairs in 16 bits): a packed panel stays in L1
constexpr int64_t kTileRowsStep = 32;   // what tile rows of scratch are rounded up to: AMX tiles hold 16 rows, or 16 pairs of them
constexpr int64_t kSkew = 16;            // floats between scratch rows: a power-of-two stride would share few cache sets
constexpr float kMasked = -1e30f;       // a cosine that takes no part (targets, losing sub-centers)
constexpr float kMaskedBelow = -1e29f;  // no real one is: |U| without renormalize stays far above

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Target {
  int64_t row;  // row of W: class * K + sub-center
  int64_t lane;
};

struct Plan {
  Classes classes;
  int64_t N = 0, lanes = 0, depth = 0;     // lanes: N padded; depth: D padded, both to the width of a panel
  int64_t width = 0;                       // NR: lanes of one panel
  int64_t stride = 0, pair_stride = 0;     // of scratch rows of `depth` values, and of depth/2 pairs
  int64_t turned_stride = 0;               // of `turned`
  int64_t tile_classes = 1, block_classes = 1;
  float scale = 1.0f;
  int64_t tile_rows = kTileRows;
  bool pairs = false;                      // 16-bit operands
  float x_step = 1.0f;                     // x = x_step * operand
  const int32_t* x_pair_panels = nullptr;  // [lanes/NR][depth/2][NR]
  const int32_t* x_pair_columns = nullptr; // [depth/NR][lanes/2][NR]
  char* kept = nullptr;                    // exponentials of the first kept_blocks blocks, tile by tile
  int64_t kept_blocks = 0, kept_block_bytes = 0, kept_tile_bytes = 0;
  bool kept_half = false;                  // in 16 bits: pairs of rows (j, j + 1)
  bool lists = false;                      // kept as element lists
  const float* floor = nullptr;            // (lanes,) the logits from which on a class is listed, for a row sweep
  const float* x_rows = nullptr;           // (N, stride): x, operand of the class gradient from lists
  const double* x_wide = nullptr;          // (N, D): x before it was rounded, for the large classes of unlabelled rows
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
  double* mean;     // (lanes,) E of UIR, or the part of sum that is listed
  double* mass;     // (lanes,) sum p of UIR
  float* nearest;   // (lanes,)
  int32_t* index;   // (lanes,) row of W relative to the block
  float* pull;      // (lanes, stride)
};

// One element of a list: e^{z - offset} g of a lane, or what a row is multiplied with.
struct Element {
  int32_t index;
  float value;
};

constexpr int64_t kListedShare = 2;  // a tile with more than half of its elements to list is swept densely: that is as fast
constexpr int32_t kNotListed = -1;

struct Scratch {
  float* logits;          // (tile rows, lanes)
  float* rows;            // (tile rows, stride): prepared prototypes, when W itself cannot be the operand
  float* gradient;        // (tile rows, stride)
  float* panel;           // (tile rows, NR) columns of prototypes
  float* lane;            // (lanes,)
  float* inverse;         // (tile rows,)
  float* weight;          // (tile rows,)
  float* step;            // (max(tile rows, lanes),) of the left operand of a GEMM in pairs
  int32_t* row_pairs;     // (tile rows, pair stride)
  int32_t* class_pairs;   // (tile rows / 2, stride)
  int32_t* coefficients;  // (tile rows / 2, lanes) exponentials, or (tile rows, lanes / 2) slopes
  int32_t* turned;        // (lanes, turned stride) exponentials by lane, for AMX
  Element* list;          // (max(tile rows, lanes) + 1,)
  const char** ahead;     // (tile rows,) memory rows of the next tile; null without a memory
};

// Where one tile's exponentials e^{z - offset} g weight are kept for the class sweep; all null where they are not.
struct KeptTile {
  float* exact;   // (tile rows, lanes), or
  int32_t* half;  // (tile rows / 2, lanes) pairs, value = step * operand
  float* step;    // (lanes,)
  float* offset;  // (lanes,)
  float* weight;  // (tile rows,)
  int32_t* counts;    // (tile rows,) elements listed of each row, the first kNotListed: none is, or
  Element* elements;  // (tile rows * lanes / kListedShare + 1,) by row, then lane
};

// The sweeps in one arithmetic.
struct Sweeps {
  void (*row_block)(const Plan& plan, int64_t first, int64_t last, Partial& partial, Scratch& scratch);
  void (*class_block)(const Plan& plan, const ClassOutput& out, int64_t first, int64_t last, Scratch& scratch);
  // Multiply-adds of the micro-kernel on operands in L1: `rounds` passes over kDepth; returns how many were done.
  int64_t (*micro_kernel)(float* buffer, int64_t rounds);
};

struct Kernels {
  const char* name;
  const char* pair_format;  // "int16", "bfloat16", or null: 16-bit requests run in float32
  int64_t width;            // NR: lanes of one panel
  Sweeps float32, pairs;
  void (*pack_embeddings)(const Plan& plan, const float* x, int32_t* panels, int32_t* columns);
  void (*prototype_block)(const Classes& classes, float* prototypes, int64_t first, int64_t last);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_vnni;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx_bf16;
extern const Kernels kernels_emulated_bf16;  // plain vectors: the 16-bit logic of avx512_bf16 on any CPU, for tests
extern const Kernels kernels_emulated_amx;   // and that of amx_bf16

}  // namespace recog_fast::cpu
