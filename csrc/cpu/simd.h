// Vectors of one ISA, by GCC/Clang vector extensions. Included only by kernels.inc, inside its ISA's namespace.
typedef float vf __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef float vf_unaligned __attribute__((vector_size(RF_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(RF_VECTOR_BYTES), aligned(4), may_alias));

constexpr int64_t kWidth = RF_VECTOR_BYTES / 4;  // lanes of a vector
constexpr int kVectors = 2;                      // vectors of a panel
constexpr int64_t kPanel = kWidth * kVectors;

static inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
static inline vi load_int(const int32_t* p) { return *reinterpret_cast<const vi_unaligned*>(p); }
static inline void store_int(int32_t* p, vi v) { *reinterpret_cast<vi_unaligned*>(p) = v; }
static inline vf splat(float x) { return vf{} + x; }
static inline vi splat_int(int32_t x) { return vi{} + x; }
// A NaN in `a` stays a NaN: a diverged weight must reach the loss.
static inline vf maximum(vf a, vf b) { return a < b ? b : a; }
static inline vf minimum(vf a, vf b) { return a > b ? b : a; }

static inline vf magnitude(vf a) { return a < 0.0f ? -a : a; }

static inline float sum_lanes(vf v) {
  float total = 0.0f;
  for (int64_t i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

// Runs body(lanes, k) over a row of D floats, kWidth at a time and then one by one; lanes.get(p), lanes.put(p, value).
struct Wide {
  static vf get(const float* p) { return load(p); }
  static void put(float* p, vf v) { store(p, v); }
};
struct Single {
  static float get(const float* p) { return *p; }
  static void put(float* p, float v) { *p = v; }
};
template <class Body>
static inline void along_row(int64_t D, Body body) {
  int64_t k = 0;
  for (; k + kWidth <= D; k += kWidth) body(Wide(), k);
  for (; k < D; ++k) body(Single(), k);
}

// e^x, relative error 1.2e-7 over [-87, 88]; 0 below, no infinities above (x is capped at 88).
static inline vf exponential(vf x) {
  const vf capped = minimum(maximum(x, splat(-87.0f)), splat(88.0f));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf whole = (capped * 1.44269504088896341f + magic) - magic;
  vf r = capped - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  vf y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const vi power = (__builtin_convertvector(whole, vi) + 127) << 23;
  vf scale;
  __builtin_memcpy(&scale, &power, sizeof scale);
  return x < -87.0f ? splat(0.0f) : y * scale;
}

// (e^p - 1 - p) for p in [0, 1]: Taylor to p^11, truncation below 2.1e-9 of the value.
static inline vf exponential_remainder(vf p) {
  vf y = splat(2.50521083854417188e-8f);
  y = y * p + 2.75573192239858907e-7f;
  y = y * p + 2.75573192239858907e-6f;
  y = y * p + 2.48015873015873016e-5f;
  y = y * p + 1.98412698412698413e-4f;
  y = y * p + 1.38888888888888889e-3f;
  y = y * p + 8.33333333333333333e-3f;
  y = y * p + 4.16666666666666667e-2f;
  y = y * p + 1.66666666666666667e-1f;
  y = y * p + 0.5f;
  return y * p * p;
}
