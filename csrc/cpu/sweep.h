// The CPU sweeps over classes: what goes in, what comes out. Pointers and sizes only; no torch, no Python.
// N rows of a batch, C classes, K sub-centers per class, D embedding size. Everything is float32, row-major, contiguous.
#pragma once

#include <cstdint>

namespace recog_fast::cpu {

// Rows of the packed (kRuleRows, N) matrix of recog_fast/rules.py: clamp, threshold, above (a2 a1 a0 b1 b0), below (...).
constexpr int kRuleRows = 12;

// P_j = normalize(normalize(W_j) + lam_j M_j) without ever being stored: rows are prepared tile by tile (math.md 2).
struct Classes {
  const float* weight = nullptr;       // (C, K, D) raw class centres, or unit prototypes when `unit`
  const void* memory_rows = nullptr;   // (S, D) bfloat16 or float32 (`memory_bf16`), or null
  const float* strength = nullptr;     // (S,)
  const int32_t* slot = nullptr;       // (C,) row of the memory, -1 none
  int64_t C = 0, K = 1, D = 0, S = 0;
  bool unit = false;
  bool memory_bf16 = false;
  bool renormalize = true;
  // Sampled classes (math.md 1.3): the sweep is over C of the `all` classes that W and `slot` hold; the j-th is members[j].
  const int32_t* members = nullptr;    // (C,) ascending, or null: every class of W
  const uint8_t* seen = nullptr;       // (C,) 0: no negative of margin rows, or null: all are
  int64_t all = 0;                     // classes of W, where members is given
};

struct Rows {
  const float* unit_embeddings = nullptr;  // (N, D)
  const int64_t* target = nullptr;         // (N,) class * K + sub-center, or negative: no target among these classes
  const float* rules = nullptr;            // (kRuleRows, N) or null: every row plain
  int64_t N = 0;
  float scale = 1.0f;
  bool half = false;  // 16-bit operands where this ISA has them (pair_format), else float32
};

// Exponentials that a row sweep keeps for the class sweep over the same rows and classes: whole blocks, as many as fit.
struct Kept {
  void* data = nullptr;
  int64_t bytes = 0;
  bool half = false;            // 16 bits each, else float32
  bool lists = false;           // element lists instead: only classes whose logit s f(c) reaches the row's floor are kept, and
                                // no other enters pull or the class gradient (unless its tile has too many to list)
  const float* floor = nullptr; // (N,) for a row sweep with lists
};

// Forward sweep: logsumexp over negatives, nearest negative, and pull_i = sum_j softmax_j g(c_ij) P_j.
struct RowSums {
  double* lse = nullptr;            // (N,)
  float* nearest_cosine = nullptr;  // (N,) -2 where there is no negative
  int64_t* nearest_index = nullptr; // (N,) class, -1 where there is no negative
  float* pull = nullptr;            // (N, D) or null: not wanted
  double* listed = nullptr;         // (N,) or null: share of sum exp(s f) that pull and the class gradient hold
};

// UIR sweep (math.md 3) over all classes but each row's target, which the caller sets to its nearest class: what is left
// keeps its precision when p of the nearest class is close to 1. p = exp(z - lse):
// mass = sum p, remainder = sum(expm1(p) - p), mean = sum p expm1(p), pull = sum p (expm1(p) - first_mean) P.
struct UnknownSums {
  const double* lse = nullptr;        // (N,)
  const float* first_mean = nullptr;  // (N,)
  double* mass = nullptr;             // (N,)
  double* remainder = nullptr;        // (N,)
  double* mean = nullptr;             // (N,)
  float* pull = nullptr;              // (N, D)
  const float* low = nullptr;         // (N, D) what rounding x to float32 lost, or null
};

enum Kind : int { kMargin = 0, kUnknownDouble = 1, kUnknownSingle = 2 };

// dL/dc_ij = negative_i * h(p_ij), plus target_i at the target; p = exp(s f(c) - lse).
// kMargin: h = p g(c); kUnknownDouble: h = p (expm1(p) - mean_i); kUnknownSingle: h = C p - 1.
struct RowTerms {
  const float* lse = nullptr;       // (N,)
  const float* negative = nullptr;  // (N,)
  const float* target = nullptr;    // (N,)
  const float* mean = nullptr;      // (N,)
  const float* kind = nullptr;      // (N,)
};

enum Output : int { kPrototypeGradient = 0, kWeightGradient = 1, kStep = 2 };

struct ClassOutput {
  int mode = kWeightGradient;
  float* gradient = nullptr;  // (C, K, D): dP or dW
  float* weight = nullptr;    // kStep: (C, K, D), updated in place
  float* velocity = nullptr;  // kStep: (C, K, D), updated in place; null with momentum 0
  float lr = 0, momentum = 0, weight_decay = 0;
  bool nesterov = false;
  bool sparse = false;        // kStep: classes outside `members` stay as they are; else momentum and decay move them
};

// Which build of the kernels runs: "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "baseline" or, never by itself,
// "emulated_bf16" or "emulated_amx"; `force` as above, or null for the best this CPU has.
const char* select_isa(const char* force);
const char* active_isa();
bool runs_isa(const char* name);  // whether this CPU can
const char* pair_format();  // of 16-bit operands: "int16", "bfloat16", or null

// Operations per second (two per multiply-add) of the micro-kernel on operands in cache, over `seconds` of CPU time.
double micro_kernel_rate(bool half, double seconds);

int64_t kept_bytes(const Classes& classes, int64_t N, bool half, bool keep_half, bool lists);  // to keep all of N rows' exponentials
void row_sweep(const Classes& classes, const Rows& rows, const RowSums& out, const Kept& kept, int threads);
void unknown_sweep(const Classes& classes, const Rows& rows, const UnknownSums& out, int threads);
void class_sweep(const Classes& classes, const Rows& rows, const RowTerms& terms, const ClassOutput& out, const Kept& kept,
                 int threads);
void effective_prototypes(const Classes& classes, float* prototypes, int threads);

}  // namespace recog_fast::cpu
