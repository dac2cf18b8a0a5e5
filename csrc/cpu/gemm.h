// Register-blocked C (+)= A B. Included only by kernels.inc, inside its ISA's namespace.
// A(m, k) = a[m * row + k * column] is broadcast, never packed; B's panel is kPanel columns, row k at b + k * stride.

// Memory that the next tile reads, brought into cache line by line while this tile's products are computed: one line every
// `pace` k-steps of the micro-kernels. In bursts the lines would queue before the products' own loads and gain nothing.
// After [at, end) come `more` rows of `bytes` each, wherever they lie.
struct Fetch {
  const char* at = nullptr;
  const char* end = nullptr;
  int64_t pace = 0, left = INT64_MAX;
  const char* const* rows = nullptr;
  int64_t more = 0, bytes = 0;

  inline void step() {
    if (--left != 0) return;
    __builtin_prefetch(at);
    at += 64;
    left = pace;
    if (at < end) return;
    if (more == 0) {
      left = INT64_MAX;
      return;
    }
    --more;
    at = *rows++;
    end = at + bytes;
  }

  // The same as `steps` calls of step(), at the speed of its prefetches.
  inline void advance(int64_t steps) {
    while (left <= steps) {
      steps -= left;
      left = 1;
      step();
    }
    if (left != INT64_MAX) left -= steps;
  }
};

template <int M>
static inline void micro(Fetch& fetch, const float* a, int64_t row, int64_t column, const float* b, int64_t stride, float* c, int64_t ldc,
                         int64_t depth, bool accumulate) {
  vf sum[M][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[m][v] = accumulate ? load(c + m * ldc + v * kWidth) : splat(0.0f);
  Fetch lines = fetch;
  for (int64_t k = 0; k < depth; ++k) {
    lines.step();
    vf right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * stride + v * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float left = a[m * row + k * column];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[m][v] += left * right[v];
    }
  }
  fetch = lines;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + m * ldc + v * kWidth, sum[m][v]);
}

template <int M>
static void micro_tail(Fetch& fetch, int64_t count, const float* a, int64_t row, int64_t column, const float* b, int64_t stride, float* c,
                       int64_t ldc, int64_t depth, bool accumulate) {
  if (count == M) return micro<M>(fetch, a, row, column, b, stride, c, ldc, depth, accumulate);
  if constexpr (M > 1) micro_tail<M - 1>(fetch, count, a, row, column, b, stride, c, ldc, depth, accumulate);
}

// One panel of C: rows [0, count) in groups of kRowsAtOnce.
static inline void gemm_panel(Fetch& fetch, int64_t count, const float* a, int64_t row, int64_t column, const float* b, int64_t stride,
                              float* c, int64_t ldc, int64_t depth, bool accumulate) {
  int64_t m = 0;
  for (; m + kRowsAtOnce <= count; m += kRowsAtOnce)
    micro<kRowsAtOnce>(fetch, a + m * row, row, column, b, stride, c + m * ldc, ldc, depth, accumulate);
  if (m < count)
    micro_tail<kRowsAtOnce - 1>(fetch, count - m, a + m * row, row, column, b, stride, c + m * ldc, ldc, depth, accumulate);
}
