// Forward sweeps over one block of classes. Included only by kernels.inc, inside its ISA's namespace.

constexpr float kHeadroom = 40.0f;  // the exponent offset moves only when a logit passes it by this much

// Nearest negative so far: strict >, classes ascending, so ties keep the lowest row.
static void update_nearest(const Plan& plan, const Tile& tile, int64_t row_in_block, const float* logits, Partial& out) {
  for (int64_t n = 0; n < plan.lanes; n += kWidth) {
    vf best = load(out.nearest + n);
    vi index = load_int(out.index + n);
    for (int64_t j = 0; j < tile.count; ++j) {
      const vf c = load(logits + j * plan.lanes + n);
      const vi better = (c > best) & (c > kMaskedBelow);
      best = better ? c : best;
      index = better ? splat_int(int32_t(row_in_block + j)) : index;
    }
    store(out.nearest + n, best);
    store_int(out.index + n, index);
  }
}

// Largest logit of each lane so far, or of the tile where a rule bends the logits; -1e30 where all are masked.
static void largest_logit(const Plan& plan, const Tile& tile, const float* logits, const Partial& out, float* largest) {
  if (plan.rules == nullptr) {
    for (int64_t n = 0; n < plan.lanes; ++n) largest[n] =
      out.index[n] >= 0 ? plan.scale * out.nearest[n] : -1e30f;
    return;
  }
  for (int64_t n = 0; n < plan.lanes; n += kWidth) {
    vf best = splat(-1e30f);
    for (int64_t j = 0; j < tile.count; ++j) {
      const vf c = load(logits + j * plan.lanes + n);
      const vf z = plan.scale * rule_at(plan, n, c).f;
      best = (z > best) & (c > kMaskedBelow) ? z : best;
    }
    store(largest + n, best);
  }
}

static void move_offset(const Plan& plan, int64_t n, float largest, Partial& out) {
  const float old = out.offset[n];
  if (!(largest > old + kHeadroom)) return;
  out.offset[n] = largest;
  const float factor = old > -1e29f ? float(__builtin_exp(double(old) - double(largest))) : 0.0f;
  out.sum[n] *= factor;
  out.mean[n] *= factor;
  if (!plan.want_pull) return;
  float* pull = out.pull + n * plan.stride;
  for (int64_t d = 0; d < plan.depth; ++d) pull[d] *= factor;
}

// logits -> e^{z - offset} g weight_j in place; adds e^{z - offset} to the sums.
static void exponentiate(const Plan& plan, const Tile& tile, float* logits, Partial& out) {
  for (int64_t n = 0; n < plan.lanes; n += kWidth) {
    const vf offset = load(out.offset + n);
    vf sum = splat(0.0f);
    for (int64_t j = 0; j < tile.count; ++j) {
      float* at = logits + j * plan.lanes + n;
      const vf c = load(at);
      const Rule rule = plan.rules ? rule_at(plan, n, c) : Rule{c, splat(1.0f)};
      const vf e = c < kMaskedBelow ? splat(0.0f) : exponential(plan.scale * rule.f - offset);
      sum += e;
      store(at, (plan.rules ? e * rule.g : e) * tile.weight[j]);
    }
    for (int64_t i = 0; i < kWidth; ++i) {
      out.sum[n + i] += double(sum[i]);
      if (plan.lists) out.mean[n + i] += double(sum[i]);  // nothing of this tile is left out
    }
  }
}

// logits -> p (expm1(p) - first mean) weight_j in place; adds mass, T and E of math.md 3.
static void unknown_terms(const Plan& plan, const Tile& tile, float* logits, Partial& out) {
  for (int64_t n = 0; n < plan.lanes; n += kWidth) {
    const vf lse = load(plan.terms + n), correction = load(plan.terms + plan.lanes + n);  // e^{float(lse) - lse}
    const vf first_mean = load(plan.terms + 3 * plan.lanes + n);
    vf remainder = splat(0.0f), mean = splat(0.0f), mass = splat(0.0f);
    for (int64_t j = 0; j < tile.count; ++j) {
      float* at = logits + j * plan.lanes + n;
      const vf c = load(at);
      const vf p = c < kMaskedBelow ? splat(0.0f) : minimum(exponential(plan.scale * c - lse) * correction, splat(1.0f));
      const vf rest = exponential_remainder(p);
      mass += p;
      remainder += rest;
      mean += p * (p + rest);
      store(at, p * (p + rest - first_mean) * tile.weight[j]);
    }
    for (int64_t i = 0; i < kWidth; ++i) {
      out.sum[n + i] += double(remainder[i]);
      out.mean[n + i] += double(mean[i]);
      out.mass[n + i] += double(mass[i]);
    }
  }
}

// What the class sweep needs beside the exponentials themselves.
static void keep_scales(const Plan& plan, const Tile& tile, const Partial& out, const KeptTile& kept) {
  if (kept.offset == nullptr || kept.counts != nullptr) return;
  __builtin_memcpy(kept.offset, out.offset, sizeof(float) * plan.lanes);
  __builtin_memcpy(kept.weight, tile.weight, sizeof(float) * tile.count);
  if (kept.exact == nullptr) return;
  for (int64_t n = 0; n < plan.lanes; n += kWidth) store(kept.step + n, splat(1.0f));
}

template <class A>
static void row_block(const Plan& plan, int64_t first, int64_t last, Partial& out, Scratch& scratch) {
  const typename A::Session session;
  const int64_t K = plan.classes.K;
  for (int64_t c = first; c < last; c += plan.tile_classes) {
    const int64_t end = c + plan.tile_classes < last ? c + plan.tile_classes : last;
    const KeptTile kept = kept_tile(plan, c);
    float* logits = kept.exact != nullptr ? kept.exact : scratch.logits;
    const bool lists = kept.counts != nullptr;
    Tile tile = tile_cosines<A>(plan, c, end, plan.want_pull && !lists, scratch, logits);
    if (plan.unknown) {
      large_terms(plan, tile, logits, out);
      unknown_terms(plan, tile, logits, out);
    } else {
      update_nearest(plan, tile, (c - first) * K, logits, out);
      largest_logit(plan, tile, logits, out, scratch.lane);
      for (int64_t n = 0; n < plan.lanes; ++n) move_offset(plan, n, scratch.lane[n], out);
      if (lists && fits_list(plan, tile, logits)) {
        list_tile(plan, tile, logits, out, kept, scratch);
        continue;
      }
      if (lists) {
        kept.counts[0] = kNotListed;
        A::prepare_pull(plan, scratch, tile);
      }
      exponentiate(plan, tile, logits, out);
      keep_scales(plan, tile, out, kept);
    }
    if (plan.want_pull) A::pull(plan, tile, logits, scratch, kept, out.pull);
  }
}
