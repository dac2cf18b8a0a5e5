// One tile of prototypes and its logits. Included only by kernels.inc, inside its ISA's namespace.

// The tile's rows as a GEMM operand: P_j = inverse[j] * rows[j].
struct Tile {
  const float* rows;
  int64_t stride;
  int64_t first;  // row of W
  int64_t count;  // rows
  float* inverse;  // (count,)
  float* weight;   // (count,) P_j = weight[j] * the row that the second GEMM reads
};

static inline float dot(const float* a, const float* b, int64_t D) {
  vf s0 = splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
  int64_t d = 0;
  for (; d + 4 * kWidth <= D; d += 4 * kWidth) {
    s0 += load(a + d) * load(b + d);
    s1 += load(a + d + kWidth) * load(b + d + kWidth);
    s2 += load(a + d + 2 * kWidth) * load(b + d + 2 * kWidth);
    s3 += load(a + d + 3 * kWidth) * load(b + d + 3 * kWidth);
  }
  float total = sum_lanes((s0 + s1) + (s2 + s3));
  for (; d < D; ++d) total += a[d] * b[d];
  return total;
}

// 1 / |row|; 0 for a zero row (|row| <= 1e-12): its prototype is 0 and its gradient 0; NaN where an element is not finite.
// Rows whose squares leave float32 are summed in double.
static inline float inverse_norm(const float* row, int64_t D, float squared) {
  if (squared > 1e-24f && squared < 1e36f) return 1.0f / __builtin_sqrtf(squared);
  double exact = 0.0;
  for (int64_t d = 0; d < D; ++d) exact += double(row[d]) * double(row[d]);
  return exact <= 1e-24 ? 0.0f : float(1.0 / __builtin_sqrt(exact) + 0.0 * exact);
}

static inline float inverse_norm(const float* row, int64_t D) { return inverse_norm(row, D, dot(row, row, D)); }

// kWidth (or one) values of the memory from `at` on.
typedef uint16_t vs_unaligned __attribute__((vector_size(RF_VECTOR_BYTES / 2), aligned(2), may_alias));
struct FloatMemory {
  const float* rows;
  vf lanes(int64_t at) const { return load(rows + at); }
  float one(int64_t at) const { return rows[at]; }
};
struct HalfMemory {
  const uint16_t* rows;
  vf lanes(int64_t at) const {
    const vi bits = __builtin_convertvector(*reinterpret_cast<const vs_unaligned*>(rows + at), vi) << 16;
    vf values;
    __builtin_memcpy(&values, &bits, sizeof values);
    return values;
  }
  float one(int64_t at) const { return from_bfloat16(rows[at]); }
};

// Row of W behind the r-th row of the sweep.
static inline int64_t weight_row(const Classes& c, int64_t r) {
  return c.members == nullptr ? r : int64_t(c.members[r / c.K]) * c.K + r % c.K;
}

// Where row r of W keeps its memory, or -1: no entry, or strength 0.
static inline int64_t memory_slot(const Classes& c, int64_t r) {
  if (c.slot == nullptr) return -1;
  const int64_t slot = c.slot[r / c.K];
  return slot >= 0 && slot < c.S && c.strength[slot] != 0.0f ? slot : -1;
}

// row = U = W^ + lam M; |U|^2.
template <class Memory>
static inline float add_memory(const float* w, float inverse, float lam, Memory memory, int64_t at, int64_t D, float* row) {
  vf squares = splat(0.0f);
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) {
    const vf u = load(w + d) * inverse + lam * memory.lanes(at + d);
    store(row + d, u);
    squares += u * u;
  }
  float squared = sum_lanes(squares);
  for (; d < D; ++d) {
    row[d] = w[d] * inverse + lam * memory.one(at + d);
    squared += row[d] * row[d];
  }
  return squared;
}

// row = U, of which the prototype is U / |U|, or U itself without renormalize; W^ where they cancel. Returns 1/|U| (1 without
// renormalize), or 0 where the injection is not used.
static inline float inject(const Classes& c, int64_t r, int64_t slot, float inverse, float* row) {
  const float* w = c.weight + r * c.D;
  const float lam = c.strength[slot];
  const float squared = c.memory_bf16
      ? add_memory(w, inverse, lam, HalfMemory{static_cast<const uint16_t*>(c.memory_rows)}, slot * c.D, c.D, row)
      : add_memory(w, inverse, lam, FloatMemory{static_cast<const float*>(c.memory_rows)}, slot * c.D, c.D, row);
  if (!c.renormalize) return 1.0f;
  if (squared < kCancelled * kCancelled) {
    for (int64_t d = 0; d < c.D; ++d) row[d] = w[d] * inverse;
    return 0.0f;
  }
  return 1.0f / __builtin_sqrtf(squared);
}

static inline void zero_tail(float* row, int64_t D, int64_t depth) {
  for (int64_t d = D; d < depth; ++d) row[d] = 0.0f;
}

static void prepare(const Plan& plan, int64_t first, int64_t count, Scratch& scratch, Tile& tile) {
  const Classes& c = plan.classes;
  const int64_t D = c.D;
  float* buffer = scratch.rows;
  tile = {c.weight + first * D, D, first, count, scratch.inverse, scratch.inverse};
  bool injected = false;
  for (int64_t j = 0; j < count && !injected; ++j) injected = memory_slot(c, weight_row(c, first + j)) >= 0;
  const bool copied = injected || D != plan.depth || c.members != nullptr;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t r = weight_row(c, first + j), slot = memory_slot(c, r);
    const float inverse = c.unit ? 1.0f : inverse_norm(c.weight + r * D, D);
    tile.inverse[j] = inverse;
    if (!copied) continue;
    float* row = buffer + j * plan.stride;
    if (slot >= 0) {
      const float scale = inject(c, r, slot, inverse, row);
      tile.inverse[j] = scale == 0.0f ? 1.0f : scale;
    } else {
      __builtin_memcpy(row, c.weight + r * D, sizeof(float) * D);
    }
    zero_tail(row, D, plan.depth);
  }
  if (!copied) return;
  tile.rows = buffer;
  tile.stride = plan.stride;
}

// The rows of `matrix` (shaped like W, or null) of the tile after this one, over the next `steps` k-steps.
static Fetch next_rows(const Plan& plan, const Tile& tile, const float* matrix, int64_t steps) {
  const Classes& c = plan.classes;
  const int64_t first = tile.first + tile.count, left = c.C * c.K - first, count = left < tile.count ? left : tile.count;
  if (matrix == nullptr || c.members != nullptr || count <= 0 || c.D == 0) return {};
  const char* at = reinterpret_cast<const char*>(matrix + first * c.D);
  const int64_t bytes = count * c.D * int64_t(sizeof(float)), pace = steps * 64 / bytes;
  return {at, at + bytes, pace > 0 ? pace : 1, 1};
}

// The memory rows of the tile after this one, over the next `steps` k-steps: they lie in the order they were written.
static Fetch next_memory(const Plan& plan, const Tile& tile, const Scratch& scratch, int64_t steps) {
  const Classes& c = plan.classes;
  const int64_t first = tile.first + tile.count, left = c.C * c.K - first, count = left < tile.count ? left : tile.count;
  if (scratch.ahead == nullptr || c.D == 0) return {};
  const int64_t bytes = c.D * (c.memory_bf16 ? 2 : 4);
  int64_t found = 0;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t slot = memory_slot(c, weight_row(c, first + j));
    if (slot >= 0) scratch.ahead[found++] = static_cast<const char*>(c.memory_rows) + slot * bytes;
  }
  if (found == 0) return {};
  const int64_t pace = steps / (found * ((bytes + 63) / 64));
  return {scratch.ahead[0], scratch.ahead[0] + bytes, pace > 0 ? pace : 1, 1, scratch.ahead + 1, found - 1, bytes};
}

// cos[j][n] = <P_j, x_n>: (count, lanes)
static void cosines(const Plan& plan, const Tile& tile, const Scratch& scratch, float* logits) {
  const int64_t D = plan.classes.D, lanes = plan.lanes;
  Fetch fetch = next_memory(plan, tile, scratch, (tile.count + kRowsAtOnce - 1) / kRowsAtOnce * (lanes / kPanel) * D);
  for (int64_t k = 0; k < D; k += kDepth) {
    const int64_t depth = D - k < kDepth ? D - k : kDepth;
    for (int64_t n = 0; n < lanes; n += kPanel)
      gemm_panel(fetch, tile.count, tile.rows + k, tile.stride, 1, plan.x_panels + n * D + k * kPanel, kPanel, logits + n, lanes,
                 depth, k > 0);
  }
  for (int64_t j = 0; j < tile.count; ++j) {
    const float inverse = tile.inverse[j];
    if (inverse == 1.0f) continue;
    for (int64_t n = 0; n < lanes; n += kWidth) store(logits + j * lanes + n, load(logits + j * lanes + n) * inverse);
  }
}

// Keeps each class's best sub-center (ties: the first) and masks the others.
static void keep_best_subcenter(const Plan& plan, const Tile& tile, float* logits) {
  const int64_t K = plan.classes.K, lanes = plan.lanes;
  for (int64_t j = 0; j < tile.count; j += K)
    for (int64_t n = 0; n < lanes; n += kWidth) {
      float* column = logits + j * lanes + n;
      vf best = load(column);
      for (int64_t k = 1; k < K; ++k) best = maximum(load(column + k * lanes), best);
      vi taken = splat_int(0);
      for (int64_t k = 0; k < K; ++k) {
        const vf value = load(column + k * lanes);
        const vi wins = ((value == best) & ~taken) | (value != value);
        store(column + k * lanes, wins ? value : splat(kMasked));
        taken |= wins;
      }
    }
}

// First target (sorted by row) at or after `row`.
static int64_t first_target(const Plan& plan, int64_t row) {
  int64_t low = 0, high = plan.target_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (plan.targets[middle].row < row) low = middle + 1; else high = middle;
  }
  return low;
}

// Masks every sub-center of each row's target class.
static void mask_targets(const Plan& plan, const Tile& tile, float* logits) {
  const int64_t K = plan.classes.K;
  for (int64_t t = first_target(plan, tile.first); t < plan.target_count && plan.targets[t].row < tile.first + tile.count; ++t) {
    const int64_t j = (plan.targets[t].row - tile.first) / K * K;
    for (int64_t k = 0; k < K; ++k) logits[(j + k) * plan.lanes + plan.targets[t].lane] = kMasked;
  }
}

// The rule of lane n at cosine c: f, and g = 0 where the cosine is clamped.
struct Rule {
  vf f, g;
};

static inline Rule rule_at(const Plan& plan, int64_t n, vf cosine) {
  const float* r = plan.rules + n;
  const int64_t L = plan.lanes;
  const vf limit = load(r);
  const vf c = minimum(maximum(cosine, -limit), limit);
  const vi above = c > load(r + L);
  const vf a2 = above ? load(r + 2 * L) : load(r + 7 * L), a1 = above ? load(r + 3 * L) : load(r + 8 * L);
  const vf a0 = above ? load(r + 4 * L) : load(r + 9 * L), b1 = above ? load(r + 5 * L) : load(r + 10 * L);
  const vf b0 = above ? load(r + 6 * L) : load(r + 11 * L);
  const vf g = b1 * c + b0;
  return {(a2 * c + a1) * c + a0, cosine == c ? g : splat(0.0f)};
}
