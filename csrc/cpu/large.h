// The few classes that carry an unlabelled row's probability, in double. Included only by kernels.inc.
// The excess is about sum p^2 / 2: a float32 cosine alone (6e-8, times s) costs 1e-6 of it, and what it adds to the sum of all p
// costs the others as much. Classes with p > kLargeProbability are few, and theirs is all that counts.
constexpr double kLargeProbability = 1e-4;
constexpr float kLargeLogit = -9.2103404f;  // its logarithm

typedef double vd __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef double vdu __attribute__((vector_size(RF_VECTOR_BYTES), aligned(8), may_alias));
typedef float vh __attribute__((vector_size(RF_VECTOR_BYTES / 2), aligned(4), may_alias));

static inline vd load_wide(const float* a) { return __builtin_convertvector(*reinterpret_cast<const vh*>(a), vd); }
static inline vd load_wide(const double* a) { return *reinterpret_cast<const vdu*>(a); }

template <class T>
static double exact_dot(const float* a, const T* b, int64_t D) {
  constexpr int64_t kHalf = kWidth / 2;
  vd s0 = vd{}, s1 = s0;
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) {
    s0 += load_wide(a + d) * load_wide(b + d);
    s1 += load_wide(a + d + kHalf) * load_wide(b + d + kHalf);
  }
  double total = 0.0;
  for (int64_t i = 0; i < kHalf; ++i) total += s0[i] + s1[i];
  for (; d < D; ++d) total += double(a[d]) * double(b[d]);
  return total;
}

// expm1(p) - p for p in [0, 1].
static double exact_remainder(double p) {
  double term = p * p / 2, total = 0.0;
  for (int k = 3; total + term != total; term *= p / k, ++k) total += term;
  return total;
}

// 1 / |row|; 0 for a zero row. Rows of W that float32 takes for unit are off by up to 6e-8; prototypes that the caller gave, and
// those with memory that are not to be normalised, stand as they are.
static double exact_inverse(const Plan& plan, const Tile& tile, int64_t j) {
  const float inverse = tile.inverse[j];
  if (inverse == 0.0f || plan.classes.unit || (inverse == 1.0f && !plan.classes.renormalize)) return double(inverse);
  const float* row = tile.rows + j * tile.stride;
  return 1.0 / __builtin_sqrt(exact_dot(row, row, plan.classes.D));
}

// Adds one class to lane n's sums and pull, and takes it from the tile.
static void add_large(const Plan& plan, const Tile& tile, int64_t j, int64_t n, double inverse, float* logits, Partial& out) {
  const float* row = tile.rows + j * tile.stride;
  const double lse = double(plan.terms[n]) - __builtin_log(double(plan.terms[plan.lanes + n]));
  const double cosine = exact_dot(row, plan.x_wide + n * plan.classes.D, plan.classes.D) * inverse;
  const double p = __builtin_fmin(__builtin_exp(double(plan.scale) * cosine - lse), 1.0);
  const double rest = exact_remainder(p);
  out.mass[n] += p;
  out.sum[n] += rest;
  out.mean[n] += p * (p + rest);
  logits[j * plan.lanes + n] = kMasked;
  const Element share = {int32_t(j), float(p * (p + rest - double(plan.terms[3 * plan.lanes + n])) * inverse)};
  add_rows(&share, 1, tile.rows, tile.stride, out.pull + n * plan.stride, plan.depth);
}

// Every class of the tile whose p passes kLargeProbability.
static void large_terms(const Plan& plan, const Tile& tile, float* logits, Partial& out) {
  const float* lse = plan.terms;
  for (int64_t j = 0; j < tile.count; ++j) {
    double inverse = -1.0;  // not known yet
    for (int64_t n = 0; n < plan.N; ++n) {
      const float c = logits[j * plan.lanes + n];
      if (!(plan.scale * c - lse[n] > kLargeLogit) || c < kMaskedBelow) continue;
      if (inverse < 0.0) inverse = exact_inverse(plan, tile, j);
      add_large(plan, tile, j, n, inverse, logits, out);
    }
  }
}
