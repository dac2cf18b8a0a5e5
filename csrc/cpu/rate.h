// The micro-kernels on operands that stay in L1: what this core can do. Included only by kernels.inc.
// buffer holds A (kRowsAtOnce, kDepth), B (kDepth, kPanel), C (kRowsAtOnce, kPanel) and kRowsAtOnce steps.
static int64_t float32_rounds(float* buffer, int64_t rounds) {
  const float* b = buffer + kRowsAtOnce * kDepth;
  float* c = buffer + (kRowsAtOnce + kPanel) * kDepth;
  Fetch nothing;
  for (int64_t r = 0; r < rounds; ++r) micro<kRowsAtOnce>(nothing, buffer, kDepth, 1, b, kPanel, c, kPanel, kDepth, false);
  return rounds * kRowsAtOnce * kPanel * kDepth;
}

#if RF_AMX
static int64_t pair_rounds(float* buffer, int64_t rounds) {
  const TileSession session;
  constexpr int64_t kPairs = kDepth / 2;  // 32 rows of them fill the place of A
  const int32_t* a = reinterpret_cast<const int32_t*>(buffer);
  const int32_t* b = a + 2 * kTile * kPairs;
  float* c = buffer + (2 * kTile + kPanel) * kPairs;
  Fetch nothing;
  for (int64_t r = 0; r < rounds; ++r) micro_tiles<2>(nothing, a, kPairs, b, kPanel, c, kPanel, kPairs, false);
  return rounds * 2 * 2 * kTile * kPanel * kPairs;
}
#elif RF_PAIRS
static int64_t pair_rounds(float* buffer, int64_t rounds) {
  const int32_t* a = reinterpret_cast<const int32_t*>(buffer);
  const int32_t* b = a + kRowsAtOnce * kDepth;
  float* c = buffer + (kRowsAtOnce + kPanel) * kDepth;
  const float* step = c + kRowsAtOnce * kPanel;
  Fetch nothing;
  for (int64_t r = 0; r < rounds; ++r) micro_pairs<kRowsAtOnce>(nothing, a, kDepth, 1, b, kPanel, step, c, kPanel, kDepth, false);
  return rounds * 2 * kRowsAtOnce * kPanel * kDepth;
}
#endif
