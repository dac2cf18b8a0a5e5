// Element lists: only what is large enough enters the pull and the class gradient. Included only by kernels.inc.

// out (depth) += sum of value * row index of `rows`.
template <int V>
static inline void add_columns(const Element* list, int64_t count, const float* rows, int64_t stride, float* out) {
  vf sum[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sum[v] = load(out + v * kWidth);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = rows + list[i].index * stride;
    const float value = list[i].value;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] += value * load(row + v * kWidth);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(out + v * kWidth, sum[v]);
}

static void add_rows(const Element* list, int64_t count, const float* rows, int64_t stride, float* out, int64_t depth) {
  if (count == 0) return;
  int64_t d = 0;
  for (; d + 8 * kWidth <= depth; d += 8 * kWidth) add_columns<8>(list, count, rows + d, stride, out + d);
  for (; d < depth; d += kPanel) add_columns<kVectors>(list, count, rows + d, stride, out + d);
}

static int64_t count_listed(const Plan& plan, const Tile& tile, const float* logits) {
  vi count = splat_int(0);
  for (int64_t n = 0; n < plan.lanes; n += kWidth) {
    const vf floor = load(plan.floor + n);
    for (int64_t j = 0; j < tile.count; ++j) {
      const vf c = load(logits + j * plan.lanes + n);
      const vf z = plan.scale * (plan.rules ? rule_at(plan, n, c).f : c);
      count -= (z >= floor) & (c > kMaskedBelow);
    }
  }
  int64_t total = 0;
  for (int64_t i = 0; i < kWidth; ++i) total += count[i];
  return total;
}

static inline bool fits_list(const Plan& plan, const Tile& tile, const float* logits) {
  return count_listed(plan, tile, logits) <= plan.tile_rows * plan.lanes / kListedShare;
}

// logits -> e^{z - offset} g in place, 0 below the floor; adds all exponentials to the sums, and those above to `mean`.
static void exponentiate_listed(const Plan& plan, const Tile& tile, float* logits, Partial& out) {
  for (int64_t n = 0; n < plan.lanes; n += kWidth) {
    const vf offset = load(out.offset + n), floor = load(plan.floor + n);
    vf sum = splat(0.0f), listed = sum;
    for (int64_t j = 0; j < tile.count; ++j) {
      float* at = logits + j * plan.lanes + n;
      const vf c = load(at);
      const Rule rule = plan.rules ? rule_at(plan, n, c) : Rule{c, splat(1.0f)};
      const vf z = plan.scale * rule.f;
      const vf e = c < kMaskedBelow ? splat(0.0f) : exponential(z - offset);
      const vi large = (z >= floor) & (c > kMaskedBelow);
      sum += e;
      listed += large ? e : splat(0.0f);
      // chosen last: 0 times a rule's infinite slope would be NaN, which is listed, and nobody counted it
      store(at, large ? (plan.rules ? e * rule.g : e) : splat(0.0f));
    }
    for (int64_t i = 0; i < kWidth; ++i) {
      out.sum[n + i] += double(sum[i]);
      out.mean[n + i] += double(listed[i]);
    }
  }
}

// What is not 0 of a tile, row by row. Written without branches, so one element past the last.
static void list_rows(const Plan& plan, const Tile& tile, const float* values, const KeptTile& kept) {
  Element* to = kept.elements;
  for (int64_t j = 0; j < tile.count; ++j) {
    const Element* begin = to;
    for (int64_t n = 0; n < plan.N; ++n) {
      const float value = values[j * plan.lanes + n];
      *to = {int32_t(n), value};
      to += value != 0.0f;
    }
    kept.counts[j] = int32_t(to - begin);
  }
}

// pull_n += sum of its listed elements' P_j.
static void pull_listed(const Plan& plan, const Tile& tile, const float* values, Element* list, float* pull) {
  for (int64_t n = 0; n < plan.N; ++n) {
    Element* to = list;
    for (int64_t j = 0; j < tile.count; ++j) {
      const float value = values[j * plan.lanes + n];
      *to = {int32_t(j), value * tile.inverse[j]};
      to += value != 0.0f;
    }
    add_rows(list, to - list, tile.rows, tile.stride, pull + n * plan.stride, plan.depth);
  }
}

static void list_tile(const Plan& plan, const Tile& tile, float* logits, Partial& out, const KeptTile& kept, Scratch& scratch) {
  exponentiate_listed(plan, tile, logits, out);
  __builtin_memcpy(kept.offset, out.offset, sizeof(float) * plan.lanes);
  list_rows(plan, tile, logits, kept);
  if (plan.want_pull) pull_listed(plan, tile, logits, scratch.list, out.pull);
}

// dP (count, stride) of a listed tile: sum over its elements, and the targets' own.
static void listed_gradient(const Plan& plan, const Tile& tile, const KeptTile& kept, Scratch& scratch) {
  float* factor = scratch.lane;
  for (int64_t n = 0; n < plan.lanes; n += kWidth)
    store(factor + n, load(plan.terms + plan.lanes + n) * exponential(load(kept.offset + n) - load(plan.terms + n)));
  const Element* from = kept.elements;
  for (int64_t j = 0; j < tile.count; ++j) {
    float* gradient = scratch.gradient + j * plan.stride;
    __builtin_memset(gradient, 0, sizeof(float) * uint64_t(plan.depth));
    for (int64_t i = 0; i < kept.counts[j]; ++i, ++from) scratch.list[i] = {from->index, from->value * factor[from->index]};
    add_rows(scratch.list, kept.counts[j], plan.x_rows, plan.stride, gradient, plan.depth);
  }
  for (int64_t t = first_target(plan, tile.first); t < plan.target_count && plan.targets[t].row < tile.first + tile.count; ++t) {
    const Element own = {int32_t(plan.targets[t].lane), plan.terms[2 * plan.lanes + plan.targets[t].lane]};
    add_rows(&own, 1, plan.x_rows, plan.stride, scratch.gradient + (plan.targets[t].row - tile.first) * plan.stride, plan.depth);
  }
}
