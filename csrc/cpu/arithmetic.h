// The three GEMMs of a tile in float32 and in 16-bit pairs. Included only by kernels.inc, inside its ISA's namespace.
//   cosines   cos (count, lanes) = P x^T        (P the tile's prototypes)
//   pull      pull (N, stride)  += E^T P        (E (count, lanes) weighted by Tile::weight)
//   gradient  dP (count, stride) = G x          (G (count, lanes) logit gradients)

static inline int64_t panels(const Plan& plan) { return plan.depth / kPanel; }
static inline int64_t groups(int64_t rows) { return (rows + kRowsAtOnce - 1) / kRowsAtOnce; }

struct NoSession {
  NoSession() {}
};

// The next tile's rows of W and of the momentum, a panel of the one and a panel of the other in turn.
struct TwoFetches {
  Fetch weight, velocity;

  TwoFetches(const Plan& plan, const Tile& tile, const float* momentum, int64_t steps)
      : weight(next_rows(plan, tile, plan.classes.weight, steps / 2)), velocity(next_rows(plan, tile, momentum, steps / 2)) {}
  Fetch& at(int64_t d) { return d / kPanel % 2 == 0 ? weight : velocity; }
};

struct Float32 {
  typedef NoSession Session;

  static void prepare(const Plan& plan, int64_t first, int64_t count, bool, Scratch& scratch, Tile& tile) {
    recog_fast::cpu::RF_ISA::prepare(plan, first, count, scratch, tile);
  }

  // What the pull of a tile prepared without `forward` still needs.
  static void prepare_pull(const Plan&, Scratch&, Tile&) {}

  static void cosines(const Plan& plan, const Tile& tile, const Scratch& scratch, float* logits) {
    recog_fast::cpu::RF_ISA::cosines(plan, tile, scratch, logits);
  }

  static void pull(const Plan& plan, const Tile& tile, const float* exponentials, const Scratch& scratch, const KeptTile& kept, float* out) {
    if (kept.half != nullptr) keep_half(plan, tile, exponentials, kept);
    Fetch fetch = next_rows(plan, tile, plan.classes.weight, panels(plan) * groups(plan.N) * tile.count);
    for (int64_t d = 0; d < plan.depth; d += kPanel) {
      pack_panel(tile, d, scratch.panel);
      gemm_panel(fetch, plan.N, exponentials, 1, plan.lanes, scratch.panel, kPanel, out + d, plan.stride, tile.count, true);
    }
  }

  static void gradient(const Plan& plan, const Tile& tile, const float* velocity, const float* slopes, Scratch& scratch) {
    TwoFetches fetch(plan, tile, velocity, panels(plan) * groups(tile.count) * plan.N);
    for (int64_t d = 0; d < plan.depth; d += kPanel)
      gemm_panel(fetch.at(d), tile.count, slopes, plan.lanes, 1, plan.x_columns + d * plan.N, kPanel, scratch.gradient + d, plan.stride,
                 plan.N, false);
  }

  // The kept pair (rows j and j + 1) of one vector of lanes.
  static vf kept_value(vi pair, bool odd) { return odd ? high_bf16(pair) : low_bf16(pair); }

 private:
  // The rows' columns [d, d + kPanel), one after the other: rows a power of two apart would share few sets of L1.
  static void pack_panel(const Tile& tile, int64_t d, float* panel) {
    for (int64_t j = 0; j < tile.count; ++j)
      for (int v = 0; v < kVectors; ++v) store(panel + j * kPanel + v * kWidth, load(tile.rows + j * tile.stride + d + v * kWidth));
  }

  static void keep_half(const Plan& plan, const Tile& tile, const float* exponentials, const KeptTile& kept) {
    const int64_t L = plan.lanes;
    for (int64_t n = 0; n < L; n += kWidth) store(kept.step + n, splat(1.0f));
    for (int64_t j = 0; j < tile.count; j += 2)
      for (int64_t n = 0; n < L; n += kWidth) {
        const vf even = load(exponentials + j * L + n);
        store_int(kept.half + j / 2 * L + n, pack_bf16(even, j + 1 < tile.count ? load(exponentials + (j + 1) * L + n) : splat(0.0f)));
      }
  }
};

#if RF_PAIRS

#if RF_AMX
typedef TileSession PairSession;
constexpr int64_t kPairsAtOnce = kTile;  // that a product's operands are zero-padded to
static inline int64_t pair_steps(int64_t rows, int64_t pairs) {
  return (rows + 2 * kTile - 1) / (2 * kTile) * ((pairs + kTile - 1) / kTile) * kTileSteps;
}
#else
typedef NoSession PairSession;
constexpr int64_t kPairsAtOnce = 1;
static inline int64_t pair_steps(int64_t rows, int64_t pairs) { return groups(rows) * pairs; }
#endif

struct Pairs {
  typedef PairSession Session;

  // Prototypes as 16-bit rows: scratch.row_pairs (k, k + depth/2) for the cosines and, for a forward sweep,
  // scratch.class_pairs (rows j, j + 1) for the pull. P_j = weight[j] * operand.
  static void prepare(const Plan& plan, int64_t first, int64_t count, bool forward, Scratch& scratch, Tile& tile) {
    recog_fast::cpu::RF_ISA::prepare(plan, first, count, scratch, tile);
    tile.weight = scratch.weight;
    for (int64_t j = 0; j < count; j += 2) {
      const float even = operand_scale(plan, tile, j), odd = j + 1 < count ? operand_scale(plan, tile, j + 1) : 0.0f;
      const float* a = tile.rows + j * tile.stride;
      const float* b = j + 1 < count ? a + tile.stride : a;
      pack_rows(plan, a, b, even, odd, j, j + 1 < count, forward, scratch);
    }
    const int64_t pairs = (count + 1) / 2;
    if (forward && pairs % kPairsAtOnce != 0)
      __builtin_memset(scratch.class_pairs + pairs * plan.stride, 0,
                       sizeof(int32_t) * std::size_t((kPairsAtOnce - pairs % kPairsAtOnce) * plan.stride));
  }

  static void prepare_pull(const Plan& plan, Scratch& scratch, Tile& tile) { prepare(plan, tile.first, tile.count, true, scratch, tile); }

  static void cosines(const Plan& plan, const Tile& tile, const Scratch& scratch, float* logits) {
    const int64_t half = plan.depth / 2, lanes = plan.lanes;
    for (int64_t j = 0; j < tile.count; ++j) scratch.step[j] = tile.weight[j] * plan.x_step;
    Fetch fetch = next_memory(plan, tile, scratch, pair_steps(tile.count, half) * (lanes / kPanel));
    for (int64_t n = 0; n < lanes; n += kPanel)
      multiply(fetch, tile.count, scratch.row_pairs, plan.pair_stride, plan.x_pair_panels + n * half, kPanel, scratch.step, logits + n, lanes, half,
                 false);
  }

  static void pull(const Plan& plan, const Tile& tile, const float* exponentials, const Scratch& scratch, const KeptTile& kept,
                   float* out) {
    int32_t* pairs = kept.half != nullptr ? kept.half : scratch.coefficients;
    float* step = kept.half != nullptr ? kept.step : scratch.step;
    pack_exponentials(plan, tile, exponentials, pairs, step);
    const int64_t count = (tile.count + 1) / 2;
    Fetch fetch = next_rows(plan, tile, plan.classes.weight, panels(plan) * pair_steps(plan.N, count));
#if RF_AMX
    turn_pairs(pairs, count, plan.lanes, scratch.turned, plan.turned_stride);
    for (int64_t d = 0; d < plan.depth; d += kPanel)
      multiply(fetch, plan.N, scratch.turned, plan.turned_stride, scratch.class_pairs + d, plan.stride, step, out + d, plan.stride, count, true);
#else
    for (int64_t d = 0; d < plan.depth; d += kPanel)
      gemm_pairs(fetch, plan.N, pairs, 1, plan.lanes, scratch.class_pairs + d, plan.stride, step, out + d, plan.stride, count, true);
#endif
  }

  static void gradient(const Plan& plan, const Tile& tile, const float* velocity, const float* slopes, Scratch& scratch) {
    const int64_t half = plan.lanes / 2;
    for (int64_t j = 0; j < tile.count; ++j) {
      const float step = pack_slopes(plan, slopes + j * plan.lanes, scratch.coefficients + j * half);
      scratch.step[j] = step * plan.x_step;
    }
    TwoFetches fetch(plan, tile, velocity, panels(plan) * pair_steps(tile.count, half));
    for (int64_t d = 0; d < plan.depth; d += kPanel)
      multiply(fetch.at(d), tile.count, scratch.coefficients, half, plan.x_pair_columns + d * half, kPanel, scratch.step, scratch.gradient + d,
                 plan.stride, half, false);
  }

  static vf kept_value(vi pair, bool odd) { return odd ? high_pair(pair) : low_pair(pair); }

  // x as operands: pairs (k, k + depth/2) for the cosines, pairs (n, n + lanes/2) for the class gradient.
  static void pack_embeddings(const Plan& plan, const float* x, int32_t* panels, int32_t* columns) {
    const int64_t D = plan.classes.D, N = plan.N, depth = plan.depth, lanes = plan.lanes;
    const float scale = 1.0f / plan.x_step;
    const auto value = [&](int64_t n, int64_t d) { return n < N && d < D ? x[n * D + d] * scale : 0.0f; };
    for (int64_t n = 0; n < lanes; n += kWidth)
      for (int64_t k = 0; k < depth / 2; ++k) {
        vf low = splat(0.0f), high = low;
        for (int64_t i = 0; i < kWidth; ++i) low[i] = value(n + i, k), high[i] = value(n + i, k + depth / 2);
        store_int(panels + n / kPanel * kPanel * (depth / 2) + k * kPanel + n % kPanel, pack_pair(low, high));
      }
    if (columns == nullptr) return;
    for (int64_t d = 0; d < depth; d += kWidth)
      for (int64_t n = 0; n < lanes / 2; ++n) {
        vf low = splat(0.0f), high = low;
        for (int64_t i = 0; i < kWidth; ++i) low[i] = value(n, d + i), high[i] = value(n + lanes / 2, d + i);
        store_int(columns + d / kPanel * kPanel * (lanes / 2) + n * kPanel + d % kPanel, pack_pair(low, high));
      }
  }

 private:
  // gemm_pairs of a left operand whose pairs lie one after the other.
  static void multiply(Fetch& fetch, int64_t count, const int32_t* a, int64_t row, const int32_t* b, int64_t stride, const float* step, float* c,
                       int64_t ldc, int64_t depth, bool accumulate) {
#if RF_AMX
    gemm_tiles(fetch, count, a, row, b, stride, step, c, ldc, depth, accumulate);
#else
    gemm_pairs(fetch, count, a, row, 1, b, stride, step, c, ldc, depth, accumulate);
#endif
  }

  // Sets weight[j] and returns what rows[j] is multiplied with to become operands.
  static float operand_scale(const Plan& plan, const Tile& tile, int64_t j) {
    const float inverse = tile.inverse[j];
    const bool unit_row = !plan.classes.unit && inverse != 1.0f;
    const float squared = unit_row ? 1.0f : dot(tile.rows + j * tile.stride, tile.rows + j * tile.stride, plan.classes.D);
    const float norm = unit_row ? (inverse == 0.0f ? 0.0f : inverse / inverse) : __builtin_sqrtf(squared) * inverse;
    tile.weight[j] = step_of(norm);
    return tile.weight[j] > 0.0f ? inverse / tile.weight[j] : 0.0f;
  }

  static void pack_rows(const Plan& plan, const float* a, const float* b, float even, float odd, int64_t j, bool both, bool forward,
                        Scratch& scratch) {
    const int64_t half = plan.depth / 2;
    int32_t* rows = scratch.row_pairs + j * plan.pair_stride;
    int32_t* classes = scratch.class_pairs + j / 2 * plan.stride;
    for (int64_t k = 0; k < half; k += kWidth) {
      const vf a0 = load(a + k) * even, a1 = load(a + k + half) * even;
      const vf b0 = load(b + k) * odd, b1 = load(b + k + half) * odd;
      store_int(rows + k, pack_pair(a0, a1));
      if (both) store_int(rows + plan.pair_stride + k, pack_pair(b0, b1));
      if (!forward) continue;
      store_int(classes + k, pack_pair(a0, b0));
      store_int(classes + k + half, pack_pair(a1, b1));
    }
  }

  static void pack_exponentials(const Plan& plan, const Tile& tile, const float* exponentials, int32_t* pairs, float* steps) {
    const int64_t L = plan.lanes;
    for (int64_t n = 0; n < L; n += kWidth) {
      vf largest = splat(0.0f), total = largest;
      for (int64_t j = 0; j < tile.count; ++j) {
        const vf size = magnitude(load(exponentials + j * L + n));
        largest = maximum(size, largest);
        total += size;
      }
      const vf step = step_of(largest, total);
      const vf scale = step > 0.0f ? 1.0f / step : splat(0.0f);
      store(steps + n, step);
      for (int64_t j = 0; j < tile.count; j += 2) {
        const vf even = load(exponentials + j * L + n) * scale;
        const vf odd = j + 1 < tile.count ? load(exponentials + (j + 1) * L + n) * scale : splat(0.0f);
        store_int(pairs + j / 2 * L + n, pack_pair(even, odd));
      }
    }
  }

  // One class's slopes as operands; returns their step: int32 sums are over a k-slice of gemm_pairs, so the largest slice counts.
  static float pack_slopes(const Plan& plan, const float* slopes, int32_t* pairs) {
    const int64_t half = plan.lanes / 2;
    vf largest = splat(0.0f);
    float total = 0.0f;
    for (int64_t k = 0; k < half; k += kDepth) {
      vf slice = splat(0.0f);
      for (int64_t n = k; n < half && n < k + kDepth; n += kWidth) {
        const vf low = magnitude(load(slopes + n)), high = magnitude(load(slopes + n + half));
        largest = maximum(high, maximum(low, largest));
        slice += low + high;
      }
      const float sum = sum_lanes(slice);
      if (total == total && !(sum <= total)) total = sum;  // a NaN stays
    }
    float most = largest[0];
    for (int64_t i = 1; i < kWidth; ++i) most = largest[i] > most ? largest[i] : most;
    const float step = step_of(splat(most), splat(total))[0];
    const float scale = step > 0.0f ? 1.0f / step : 0.0f;
    for (int64_t n = 0; n < half; n += kWidth) store_int(pairs + n, pack_pair(load(slopes + n) * scale, load(slopes + n + half) * scale));
    return step;
  }
};

#endif
