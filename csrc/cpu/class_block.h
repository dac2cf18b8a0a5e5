// Backward sweep over one block of classes: gradient, chain rule, optimizer. Included only by kernels.inc.

// Per-lane kinds: dL/dz / s of an unlabelled row, math.md 3.
static inline vf unknown_gradient(const Plan& plan, int64_t n, vf p) {
  const vf single = p * float(plan.classes.C) - 1.0f;
  const vf capped = minimum(p, splat(1.0f));
  const vf twice = capped * (capped + exponential_remainder(capped) - load(plan.terms + 3 * plan.lanes + n));
  return load(plan.terms + 4 * plan.lanes + n) == float(kUnknownSingle) ? single : twice;
}

// logits -> dL/dc_ij in place: (count, lanes)
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
  for (int64_t t = first_target(plan, tile.first); t < plan.target_count && plan.targets[t].row < tile.first + tile.count; ++t)
    logits[(plan.targets[t].row - tile.first) * L + plan.targets[t].lane] = terms[2 * L + plan.targets[t].lane];
}

// dP (in place) -> dW of one row: through P = U/|U|, U = W^ + lam M, W^ = W/|W| (math.md 2).
static void chain(const Classes& c, int64_t r, float* d, float* prototype) {
  if (c.unit) return;
  const float* w = c.weight + r * c.D;
  const float inverse = inverse_norm(w, c.D);
  const int64_t slot = memory_slot(c, r);
  if (slot >= 0 && c.renormalize) {
    const float scale = inject(c, r, slot, inverse, prototype);
    if (scale != 0.0f) {
      const float along = dot(d, prototype, c.D);
      for (int64_t k = 0; k < c.D; ++k) d[k] = (d[k] - along * prototype[k]) * scale;
    }
  }
  const float along = dot(d, w, c.D) * inverse * inverse;
  for (int64_t k = 0; k < c.D; ++k) d[k] = (d[k] - along * w[k]) * inverse;
}

// torch.optim.SGD's update of one row, momentum buffer included.
static void sgd_row(const ClassOutput& out, int64_t at, int64_t D, const float* d) {
  float* w = out.weight + at;
  float* v = out.velocity + at;
  const float momentum = out.momentum, decay = out.weight_decay, lr = out.lr;
  const bool nesterov = out.nesterov;
  for (int64_t k = 0; k < D; ++k) {
    const float g = d[k] + decay * w[k];
    v[k] = momentum * v[k] + g;
    w[k] -= lr * (nesterov ? g + momentum * v[k] : v[k]);
  }
}

static void finish_row(const Plan& plan, const ClassOutput& out, int64_t r, float* d, float* prototype) {
  const int64_t D = plan.classes.D;
  if (out.mode != kPrototypeGradient) chain(plan.classes, r, d, prototype);
  if (out.mode == kStep) sgd_row(out, r * D, D, d);
  else __builtin_memcpy(out.gradient + r * D, d, sizeof(float) * D);
}

static void class_block(const Plan& plan, const ClassOutput& out, int64_t first, int64_t last, Scratch& scratch) {
  for (int64_t c = first; c < last; c += plan.tile_classes) {
    const int64_t end = c + plan.tile_classes < last ? c + plan.tile_classes : last;
    const Tile tile = tile_cosines(plan, c, end, scratch);
    logit_gradients(plan, tile, scratch.logits);
    for (int64_t d = 0; d < plan.depth; d += kPanel)
      gemm_panel(tile.count, scratch.logits, plan.lanes, 1, plan.x_columns + d * plan.N, kPanel, scratch.gradient + d,
                 plan.depth, plan.N, false);
    for (int64_t j = 0; j < tile.count; ++j)
      finish_row(plan, out, tile.first + j, scratch.gradient + j * plan.depth, scratch.rows);
  }
}

static void prototype_block(const Classes& c, float* prototypes, int64_t first, int64_t last) {
  for (int64_t r = first * c.K; r < last * c.K; ++r) {
    float* row = prototypes + r * c.D;
    const float* w = c.weight + r * c.D;
    const float inverse = c.unit ? 1.0f : inverse_norm(w, c.D);
    const int64_t slot = memory_slot(c, r);
    if (slot >= 0) inject(c, r, slot, inverse, row);
    else for (int64_t d = 0; d < c.D; ++d) row[d] = w[d] * inverse;
  }
}
