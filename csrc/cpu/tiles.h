// The 16-bit GEMM on AMX tiles: 16 rows of 16 pairs times 16 pairs of 16 lanes in one instruction. Included only by kernels.inc.
// Operands as in pairs.h; a left operand must have its pairs along k next to each other (column 1), and be zero, as must the
// right one, from `depth` to the next multiple of kTile. Rows past `count` are read (any values) and not written.
constexpr int64_t kTile = 16;
constexpr int64_t kTileSteps = 64;  // k-steps of Fetch in one step of kTile pairs
static_assert(kPanel == 2 * kTile && kWidth == kTile, "a panel is two tiles wide");

#if defined(__AMX_BF16__)

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles as gemm_pairs uses them, while it lives: other code of the process may shape them for itself between blocks.
struct TileSession {
  TileSession() {
    const TileShapes shapes;
    __asm__ volatile("" ::"r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
  }
  ~TileSession() { _tile_release(); }
};

// GCC's intrinsics do not say that they read and write memory.
#define RF_TILE_FENCE() __asm__ volatile("" ::: "memory")
#define RF_TILE_ZERO(t) _tile_zero(t)
#define RF_TILE_LOAD(t, at, stride) _tile_loadd(t, at, int64_t(stride) * 4)
#define RF_TILE_STORE(t, at, stride) _tile_stored(t, at, int64_t(stride) * 4)
#define RF_TILE_PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)

#else  // the same in plain code, for tests on any CPU

struct TileSession {
  int32_t tiles[8][kTile][kTile];
  static thread_local TileSession* current;
  TileSession() { current = this; }
  ~TileSession() { current = nullptr; }
};
thread_local TileSession* TileSession::current = nullptr;

static inline void tile_zero(int t) { __builtin_memset(TileSession::current->tiles[t], 0, sizeof(TileSession::current->tiles[t])); }
static inline void tile_load(int t, const void* at, int64_t stride) {
  for (int64_t r = 0; r < kTile; ++r) __builtin_memcpy(TileSession::current->tiles[t][r], static_cast<const int32_t*>(at) + r * stride, 64);
}
static inline void tile_store(int t, void* at, int64_t stride) {
  for (int64_t r = 0; r < kTile; ++r) __builtin_memcpy(static_cast<int32_t*>(at) + r * stride, TileSession::current->tiles[t][r], 64);
}
static void tile_product(int c, int a, int b) {
  TileSession& s = *TileSession::current;
  for (int64_t m = 0; m < kTile; ++m) {
    float* sum = reinterpret_cast<float*>(s.tiles[c][m]);
    vf total = load(sum);
    for (int64_t k = 0; k < kTile; ++k) total = add_products(total, splat_int(s.tiles[a][m][k]), load_int(s.tiles[b][k]));
    store(sum, total);
  }
}

#define RF_TILE_FENCE() static_cast<void>(0)
#define RF_TILE_ZERO(t) tile_zero(t)
#define RF_TILE_LOAD(t, at, stride) tile_load(t, at, stride)
#define RF_TILE_STORE(t, at, stride) tile_store(t, at, stride)
#define RF_TILE_PRODUCT(c, a, b) tile_product(c, a, b)

#endif

// 32 (R = 2) or 16 rows of C's panel of 32 lanes.
template <int R>
static inline void micro_tiles(Fetch& fetch, const int32_t* a, int64_t row, const int32_t* b, int64_t stride, float* c, int64_t ldc,
                               int64_t depth, bool accumulate) {
  float* below = c + kTile * ldc;
  RF_TILE_FENCE();
  if (accumulate) {
    RF_TILE_LOAD(0, c, ldc);
    RF_TILE_LOAD(1, c + kTile, ldc);
    if constexpr (R == 2) {
      RF_TILE_LOAD(2, below, ldc);
      RF_TILE_LOAD(3, below + kTile, ldc);
    }
  } else {
    RF_TILE_ZERO(0);
    RF_TILE_ZERO(1);
    RF_TILE_ZERO(2);
    RF_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < depth; k += kTile) {
    fetch.advance(kTileSteps);
    RF_TILE_LOAD(6, b + k * stride, stride);
    RF_TILE_LOAD(4, a + k, row);
    RF_TILE_PRODUCT(0, 4, 6);
    RF_TILE_LOAD(7, b + k * stride + kTile, stride);
    RF_TILE_PRODUCT(1, 4, 7);
    if constexpr (R == 2) {
      RF_TILE_LOAD(5, a + kTile * row + k, row);
      RF_TILE_PRODUCT(2, 5, 6);
      RF_TILE_PRODUCT(3, 5, 7);
    }
  }
  RF_TILE_STORE(0, c, ldc);
  RF_TILE_STORE(1, c + kTile, ldc);
  if constexpr (R == 2) {
    RF_TILE_STORE(2, below, ldc);
    RF_TILE_STORE(3, below + kTile, ldc);
  }
  RF_TILE_FENCE();
}

// The last rows of C, fewer than kTile of them, by way of a buffer.
static void micro_tiles_tail(Fetch& fetch, int64_t count, const int32_t* a, int64_t row, const int32_t* b, int64_t stride, float* c, int64_t ldc,
                             int64_t depth, bool accumulate) {
  alignas(64) float part[kTile * kPanel];
  for (int64_t m = 0; m < kTile; ++m)
    for (int64_t n = 0; n < kPanel; n += kWidth) store(part + m * kPanel + n, accumulate && m < count ? load(c + m * ldc + n) : splat(0.0f));
  micro_tiles<1>(fetch, a, row, b, stride, part, kPanel, depth, accumulate);
  for (int64_t m = 0; m < count; ++m)
    for (int64_t n = 0; n < kPanel; n += kWidth) store(c + m * ldc + n, load(part + m * kPanel + n));
}

// C(m, :) (+)= step[m] * sum_k A(m, k) B(k, :). bfloat16 has no steps: step[m] is 1, or NaN for a row that is, and 1 where C accumulates.
static inline void gemm_tiles(Fetch& fetch, int64_t count, const int32_t* a, int64_t row, const int32_t* b, int64_t stride, const float* step,
                              float* c, int64_t ldc, int64_t depth, bool accumulate) {
  int64_t m = 0;
  for (; m + 2 * kTile <= count; m += 2 * kTile) micro_tiles<2>(fetch, a + m * row, row, b, stride, c + m * ldc, ldc, depth, accumulate);
  for (; m + kTile <= count; m += kTile) micro_tiles<1>(fetch, a + m * row, row, b, stride, c + m * ldc, ldc, depth, accumulate);
  if (m < count) micro_tiles_tail(fetch, count - m, a + m * row, row, b, stride, c + m * ldc, ldc, depth, accumulate);
  if (accumulate) return;
  for (m = 0; m < count; ++m) {
    if (step[m] == 1.0f) continue;
    for (int64_t n = 0; n < kPanel; n += kWidth) store(c + m * ldc + n, load(c + m * ldc + n) * step[m]);
  }
}

// to (16, 16) = the transpose of from: four perfect shuffles of its rows.
static inline void transpose_tile(const int32_t* from, int64_t stride, int32_t* to, int64_t to_stride) {
  vi rows[kTile], next[kTile];
  for (int64_t i = 0; i < kTile; ++i) rows[i] = load_int(from + i * stride);
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTile / 2; ++i) {
      const vi a = rows[i], b = rows[i + kTile / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) rows[i] = next[i];
  }
  for (int64_t i = 0; i < kTile; ++i) store_int(to + i * to_stride, rows[i]);
}

// turned (lanes, stride) = pairs (count, lanes) transposed, zero from `count` to the next multiple of kTile.
static void turn_pairs(int32_t* pairs, int64_t count, int64_t lanes, int32_t* turned, int64_t stride) {
  for (int64_t k = 0; k < count; k += kTile)
    for (int64_t n = 0; n < lanes; n += kTile) {
      if (k + kTile <= count) {
        transpose_tile(pairs + k * lanes + n, lanes, turned + n * stride + k, stride);
        continue;
      }
      alignas(64) int32_t last[kTile * kTile] = {};
      for (int64_t i = 0; k + i < count; ++i) store_int(last + i * kTile, load_int(pairs + (k + i) * lanes + n));
      transpose_tile(last, kTile, turned + n * stride + k, stride);
    }
}
