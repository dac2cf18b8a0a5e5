// Backward sweep over one block of classes: gradient, chain rule, optimizer. Included only by kernels.inc.

// Per-lane kinds: dL/dz / s of an unlabelled row, math.md 3.
static inline vf unknown_gradient(const Plan& plan, int64_t n, vf p) {
  const vf single = p * float(plan.classes.C) - 1.0f;
  const vf capped = minimum(p, splat(1.0f));
  const vf twice = capped * (capped + exponential_remainder(capped) - load(plan.terms + 3 * plan.lanes + n));
  return load(plan.terms + 4 * plan.lanes + n) == float(kUnknownSingle) ? single : twice;
}

// Classes that no margin row has as a negative: only rows of other kinds reach them (and targets, set afterwards).
static void hide_unseen(const Plan& plan, const Tile& tile, float* logits) {
  const float* kind = plan.terms + 4 * plan.lanes;
  for (int64_t j = 0; j < tile.count; ++j) {
    if (plan.classes.seen[(tile.first + j) / plan.classes.K] != 0) continue;
    for (int64_t n = 0; n < plan.lanes; n += kWidth) {
      float* at = logits + j * plan.lanes + n;
      store(at, load(kind + n) == splat(float(kMargin)) ? splat(0.0f) : load(at));
    }
  }
}

// logits -> dL/dc_ij of every negative in place: (count, lanes)
static void logit_gradients(const Plan& plan, const Tile& tile, float* logits) {
  const float* terms = plan.terms;
  const int64_t L = plan.lanes;
  for (int64_t n = 0; n < L; n += kWidth) {
    const vf lse = load(terms + n), weight = load(terms + L + n);
    const vi margin = load(terms + 4 * L + n) == splat(float(kMargin));
    for (int64_t j = 0; j < tile.count; ++j) {
      float* at = logits + j * L + n;
      const vf c = load(at);
      const Rule rule = plan.rules ? rule_at(plan, n, c) : Rule{c, splat(1.0f)};
      const vf p = exponential(plan.scale * rule.f - lse);
      vf value = plan.rules ? p * rule.g : p;
      if (plan.any_unknown) value = margin ? value : unknown_gradient(plan, n, p);
      store(at, c < kMaskedBelow ? splat(0.0f) : weight * value);
    }
  }
}

// The same from the exponentials that the forward sweep kept.
template <class A>
static void kept_gradients(const Plan& plan, const Tile& tile, const KeptTile& kept, float* slopes) {
  const int64_t L = plan.lanes;
  for (int64_t n = 0; n < L; n += kWidth) {
    const vf weight = load(plan.terms + L + n);
    const vf factor = exponential(load(kept.offset + n) - load(plan.terms + n)) * load(kept.step + n);
    const vi margin = load(plan.terms + 4 * L + n) == splat(float(kMargin));
    for (int64_t j = 0; j < tile.count; ++j) {
      const vf e = kept.exact != nullptr ? load(kept.exact + j * L + n) : A::kept_value(load_int(kept.half + j / 2 * L + n), j % 2 == 1);
      const vf p = e * (factor * tile.weight[j]);
      const vf value = plan.any_unknown ? (margin ? p : unknown_gradient(plan, n, p)) : p;
      store(slopes + j * L + n, weight * value);
    }
  }
}

// The targets' own gradients: they took no part among the negatives.
static void target_gradients(const Plan& plan, const Tile& tile, float* slopes) {
  for (int64_t t = first_target(plan, tile.first); t < plan.target_count && plan.targets[t].row < tile.first + tile.count; ++t)
    slopes[(plan.targets[t].row - tile.first) * plan.lanes + plan.targets[t].lane] = plan.terms[2 * plan.lanes + plan.targets[t].lane];
}

// A tile whose exponentials are kept: only its rows' weights are needed, inverted.
static Tile kept_rows(const Plan& plan, int64_t first, int64_t last, const KeptTile& kept, Scratch& scratch) {
  const int64_t K = plan.classes.K;
  const Tile tile{nullptr, 0, first * K, (last - first) * K, scratch.inverse, scratch.weight};
  for (int64_t j = 0; j < tile.count; ++j) tile.weight[j] = kept.weight[j] == 0.0f ? 0.0f : 1.0f / kept.weight[j];
  return tile;
}

// U = W^ + lam M of a class as the tile was prepared with it, 1/|U|; no row where it was not.
struct Injected {
  const float* row = nullptr;
  float scale = 0.0f;
};

// dP (in place) -> dL/dW^ of one row with memory: through P = U/|U| (math.md 2). `buffer` takes U where the tile has none.
static void memory_chain(const Classes& c, int64_t r, int64_t slot, float inverse, Injected u, float* d, float* buffer) {
  if (u.row == nullptr) u = {buffer, inject(c, r, slot, inverse, buffer)};
  if (u.scale == 0.0f) return;
  const float along = dot(d, u.row, c.D) * u.scale * u.scale;
  const float* row = u.row;
  const float scale = u.scale;
  along_row(c.D, [=](auto lanes, int64_t k) { lanes.put(d + k, (lanes.get(d + k) - along * lanes.get(row + k)) * scale); });
}

// dL/dW = (d - along w) inverse: through W^ = W/|W|; inverse 1 and along 0 where rows are unit by themselves.
struct Chain {
  float inverse = 1.0f, along = 0.0f;
};

static Chain weight_chain(const Classes& c, int64_t r, Injected injected, float* d, float* buffer) {
  if (c.unit) return {};
  const float* w = c.weight + r * c.D;
  const int64_t slot = memory_slot(c, r);
  vf own = splat(0.0f), along = own;
  int64_t k = 0;
  for (; k + kWidth <= c.D; k += kWidth) {
    const vf value = load(w + k);
    own += value * value;
    along += value * load(d + k);
  }
  float squared = sum_lanes(own), product = sum_lanes(along);
  for (; k < c.D; ++k) squared += w[k] * w[k], product += w[k] * d[k];
  const float inverse = inverse_norm(w, c.D, squared);
  if (slot >= 0 && c.renormalize) {
    memory_chain(c, r, slot, inverse, injected, d, buffer);
    product = dot(d, w, c.D);
  }
  return {inverse, product * inverse * inverse};
}

// torch.optim.SGD's update of one row, momentum buffer included; the gradient is never stored.
static void sgd_row(const ClassOutput& out, const Chain& chain, int64_t at, int64_t D, const float* d) {
  float* w = out.weight + at;
  const float momentum = out.momentum, lr = out.lr, inverse = chain.inverse;
  const float own = out.weight_decay - chain.along * inverse;
  if (out.velocity == nullptr) {
    along_row(D, [=](auto lanes, int64_t k) {
      const auto now = lanes.get(w + k);
      lanes.put(w + k, sgd_plain(now, lanes.get(d + k) * inverse + own * now, lr));
    });
    return;
  }
  float* v = out.velocity + at;
  if (out.nesterov) {
    along_row(D, [=](auto lanes, int64_t k) {
      const auto now = lanes.get(w + k);
      auto speed = lanes.get(v + k);
      lanes.put(w + k, sgd_nesterov(now, lanes.get(d + k) * inverse + own * now, speed, lr, momentum));
      lanes.put(v + k, speed);
    });
    return;
  }
  along_row(D, [=](auto lanes, int64_t k) {
    const auto now = lanes.get(w + k);
    auto speed = lanes.get(v + k);
    lanes.put(w + k, sgd_momentum(now, lanes.get(d + k) * inverse + own * now, speed, lr, momentum));
    lanes.put(v + k, speed);
  });
}

#include "unsampled.h"

static void finish_row(const Plan& plan, const ClassOutput& out, int64_t r, Injected injected, float* d, float* buffer) {
  const int64_t D = plan.classes.D;
  const Chain chain = out.mode == kPrototypeGradient ? Chain{} : weight_chain(plan.classes, r, injected, d, buffer);
  if (out.mode == kStep) return sgd_row(out, chain, r * D, D, d);
  const float* w = plan.classes.weight + r * D;
  float* gradient = out.gradient + r * D;
  const float along = chain.along, inverse = chain.inverse;
  along_row(D, [=](auto lanes, int64_t k) {
    lanes.put(gradient + k, (lanes.get(d + k) - along * lanes.get(w + k)) * inverse);
  });
}

template <class A>
static void class_block(const Plan& plan, const ClassOutput& out, int64_t first, int64_t last, Scratch& scratch) {
  const typename A::Session session;
  for (int64_t c = first; c < last; c += plan.tile_classes) {
    const int64_t end = c + plan.tile_classes < last ? c + plan.tile_classes : last;
    const KeptTile kept = kept_tile(plan, c);
    Tile tile;
    const bool listed = kept.counts != nullptr && kept.counts[0] != kNotListed;
    if (listed) {
      tile = {nullptr, 0, c * plan.classes.K, (end - c) * plan.classes.K, scratch.inverse, scratch.weight};
      listed_gradient(plan, tile, kept, scratch);
    } else if (kept.offset != nullptr && kept.counts == nullptr) {
      tile = kept_rows(plan, c, end, kept, scratch);
      kept_gradients<A>(plan, tile, kept, scratch.logits);
    } else {
      tile = tile_cosines<A>(plan, c, end, false, scratch, scratch.logits);
      logit_gradients(plan, tile, scratch.logits);
    }
    if (!listed) {
      if (plan.classes.seen != nullptr) hide_unseen(plan, tile, scratch.logits);
      target_gradients(plan, tile, scratch.logits);
      A::gradient(plan, tile, out.velocity, scratch.logits, scratch);
    }
    const bool prepared = tile.rows == scratch.rows;
    for (int64_t j = 0; j < tile.count; ++j) {
      const Injected injected = prepared ? Injected{tile.rows + j * tile.stride, tile.inverse[j]} : Injected{};
      finish_row(plan, out, weight_row(plan.classes, tile.first + j), injected, scratch.gradient + j * plan.stride, scratch.rows);
    }
  }
  if (plan.classes.members != nullptr) unsampled_rows(plan, out, first, last, scratch);
}

static void prototype_block(const Classes& c, float* prototypes, int64_t first, int64_t last) {
  for (int64_t r = first * c.K; r < last * c.K; ++r) {
    float* row = prototypes + r * c.D;
    const float* w = c.weight + r * c.D;
    const float inverse = c.unit ? 1.0f : inverse_norm(w, c.D);
    const int64_t slot = memory_slot(c, r);
    const float scale = slot >= 0 ? inject(c, r, slot, inverse, row) : inverse;
    if (slot >= 0) along_row(c.D, [=](auto lanes, int64_t k) { lanes.put(row + k, lanes.get(row + k) * (scale == 0.0f ? 1.0f : scale)); });
    else for (int64_t d = 0; d < c.D; ++d) row[d] = w[d] * inverse;
  }
}
