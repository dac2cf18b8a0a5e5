// Where a tile's exponentials are kept between the sweeps. Included only by kernels.inc, inside its ISA's namespace.
static inline KeptTile kept_tile(const Plan& plan, int64_t first_class) {
  const int64_t block = first_class / plan.block_classes;
  if (block >= plan.kept_blocks) return {};
  const int64_t tile = first_class % plan.block_classes / plan.tile_classes;
  char* at = plan.kept + block * plan.kept_block_bytes + tile * plan.kept_tile_bytes;
  float* step = reinterpret_cast<float*>(at);
  float* weight = step + 2 * plan.lanes;
  float* values = weight + plan.tile_rows;
  int32_t* integers = reinterpret_cast<int32_t*>(values);
  if (plan.lists) return {nullptr, nullptr, step, step + plan.lanes, weight, integers, reinterpret_cast<Element*>(integers + plan.tile_rows)};
  return {plan.kept_half ? nullptr : values, plan.kept_half ? integers : nullptr, step, step + plan.lanes, weight, nullptr, nullptr};
}

// The tile of classes [first, last): prototypes and masked cosines.
template <class A>
static Tile tile_cosines(const Plan& plan, int64_t first, int64_t last, bool forward, Scratch& scratch, float* logits) {
  const int64_t K = plan.classes.K;
  Tile tile;
  A::prepare(plan, first * K, (last - first) * K, forward, scratch, tile);
  A::cosines(plan, tile, scratch, logits);
  if (K > 1) keep_best_subcenter(plan, tile, logits);
  mask_targets(plan, tile, logits);
  return tile;
}
