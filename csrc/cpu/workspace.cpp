#include "workspace.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace recog_fast::cpu {

namespace {

// (count, N) -> (count, lanes); the padding lanes repeat `fill`.
Array<float> pad_lanes(const float* const* sources, int64_t count, int64_t N, int64_t lanes, const float* fill) {
  Array<float> padded(count * lanes);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t n = 0; n < lanes; ++n) padded[r * lanes + n] = n < N ? sources[r][n] : fill[r];
  return padded;
}

// Largest norm of the rows; not finite where one of them is not.
double largest_norm(const float* x, int64_t N, int64_t D) {
  double largest = 0.0;
  for (int64_t n = 0; n < N; ++n) {
    double squared = 0.0;
    for (int64_t d = 0; d < D; ++d) squared += double(x[n * D + d]) * double(x[n * D + d]);
    largest = squared <= largest ? largest : squared;
    if (!std::isfinite(squared)) return squared;
  }
  return std::sqrt(largest);
}

void shape_plan(const Classes& classes, int64_t N, const Kernels& kernels, bool pairs, Plan& plan) {
  plan.classes = classes;
  plan.N = N;
  plan.width = kernels.width;
  plan.lanes = round_up(N, kernels.width);
  plan.depth = round_up(classes.D, kernels.width);
  plan.stride = plan.depth + kSkew;
  plan.pair_stride = plan.depth / 2 + kSkew;
  plan.pairs = pairs;
  plan.tile_classes = std::max<int64_t>(1, kTileRows / classes.K);
  plan.tile_rows = plan.tile_classes * classes.K;
  plan.turned_stride = round_up(plan.tile_rows, kTileRowsStep) / 2 + kSkew;
  plan.block_classes = std::max<int64_t>(1, kBlockRows / plan.tile_rows) * plan.tile_classes;
}

void shape_kept(bool half, bool lists, Plan& plan) {
  const int64_t value = half ? 2 : 4, listed = plan.tile_rows * plan.lanes / kListedShare + 1;
  const int64_t values = lists ? plan.tile_rows * 4 + listed * int64_t(sizeof(Element)) : round_up(plan.tile_rows, 2) * plan.lanes * value;
  plan.kept_half = half && !lists;
  plan.kept_tile_bytes = round_up(values + (2 * plan.lanes + plan.tile_rows) * 4, 64);
  plan.kept_block_bytes = plan.kept_tile_bytes * (plan.block_classes / plan.tile_classes);
}

}  // namespace

Workspace::Workspace(const Classes& classes, const Rows& rows, const Kernels& kernels)
    : sweeps(&kernels.float32), rows_(rows), kernels_(kernels) {
  const bool half = rows.half && kernels.pair_format != nullptr;
  const double norm = half ? largest_norm(rows.unit_embeddings, rows.N, classes.D) : 0.0;
  shape_plan(classes, rows.N, kernels, half && std::isfinite(norm), plan);  // a row that is not: float32 carries it to its own loss
  plan.scale = rows.scale;
  if (plan.pairs) {
    plan.x_step = kernels.pair_format[0] == 'i' ? float(std::max(1.0, norm) / 32767.0) : 1.0f;
    sweeps = &kernels.pairs;
  }
  pack_rules();
  pack_targets();
}

void Workspace::pack_embeddings(bool columns) {
  if (!plan.pairs) {
    pack_float_panels();
    if (columns) pack_float_columns();
    return;
  }
  pair_panels_ = Array<int32_t>(plan.lanes * plan.depth / 2);
  if (columns) pair_columns_ = Array<int32_t>(plan.lanes * plan.depth / 2);
  kernels_.pack_embeddings(plan, rows_.unit_embeddings, pair_panels_.get(), pair_columns_.get());
  plan.x_pair_panels = pair_panels_.get();
  plan.x_pair_columns = pair_columns_.get();
}

void Workspace::pack_float_panels() {
  const int64_t D = plan.classes.D, width = kernels_.width;
  x_panels_ = Array<float>(plan.lanes * D);
  for (int64_t p = 0; p < plan.lanes; p += width)
    for (int64_t k = 0; k < D; ++k)
      for (int64_t i = 0; i < width; ++i)
        x_panels_[p * D + k * width + i] = p + i < plan.N ? rows_.unit_embeddings[(p + i) * D + k] : 0.0f;
  plan.x_panels = x_panels_.get();
}

void Workspace::pack_float_columns() {
  const int64_t D = plan.classes.D, N = plan.N, width = kernels_.width;
  x_columns_ = Array<float>(plan.depth * N);
  for (int64_t d = 0; d < plan.depth; d += width)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < width; ++i)
        x_columns_[d * N + n * width + i] = d + i < D ? rows_.unit_embeddings[n * D + d + i] : 0.0f;
  plan.x_columns = x_columns_.get();
}

void Workspace::pack_float_rows() {
  x_rows_ = Array<float>(plan.N * plan.stride);
  for (int64_t n = 0; n < plan.N; ++n)
    for (int64_t d = 0; d < plan.stride; ++d) x_rows_[n * plan.stride + d] = d < plan.classes.D ? rows_.unit_embeddings[n * plan.classes.D + d] : 0.0f;
  plan.x_rows = x_rows_.get();
}

void Workspace::pack_wide_rows(const float* low) {
  const int64_t count = plan.N * plan.classes.D;
  x_wide_ = Array<double>(count);
  for (int64_t i = 0; i < count; ++i) x_wide_[i] = double(rows_.unit_embeddings[i]) + (low == nullptr ? 0.0 : double(low[i]));
  plan.x_wide = x_wide_.get();
}

void Workspace::pack_rules() {
  if (rows_.rules == nullptr) return;
  const float plain[kRuleRows] = {4, 4, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1};
  const float* sources[kRuleRows];
  for (int r = 0; r < kRuleRows; ++r) sources[r] = rows_.rules + r * plan.N;
  rules_ = pad_lanes(sources, kRuleRows, plan.N, plan.lanes, plain);
  plan.rules = rules_.get();
}

void Workspace::pack_terms(const RowTerms& terms) {
  const float* sources[5] = {terms.lse, terms.negative, terms.target, terms.mean, terms.kind};
  const float idle[5] = {1e30f, 0, 0, 0, 0};
  terms_ = pad_lanes(sources, 5, plan.N, plan.lanes, idle);
  plan.terms = terms_.get();
  for (int64_t n = 0; n < plan.N; ++n) plan.any_unknown |= terms.kind[n] != float(kMargin);
}

void Workspace::pack_targets() {
  for (int64_t n = 0; n < plan.N; ++n)
    if (rows_.target[n] >= 0 && rows_.target[n] < plan.classes.C * plan.classes.K) targets_.push_back({rows_.target[n], n});
  std::sort(targets_.begin(), targets_.end(),
            [](const Target& a, const Target& b) { return a.row != b.row ? a.row < b.row : a.lane < b.lane; });
  plan.targets = targets_.data();
  plan.target_count = int64_t(targets_.size());
}

void Workspace::keep(const Kept& kept) {
  shape_kept(kept.half, kept.lists, plan);
  plan.kept = static_cast<char*>(kept.data);
  plan.kept_blocks = kept.data == nullptr ? 0 : std::min(blocks(), kept.bytes / plan.kept_block_bytes);
  plan.lists = kept.lists;
  if (!kept.lists) return;
  pack_float_rows();
  if (kept.floor == nullptr) return;
  const float nothing = std::numeric_limits<float>::infinity();
  floor_ = pad_lanes(&kept.floor, 1, plan.N, plan.lanes, &nothing);
  plan.floor = floor_.get();
}

int64_t kept_bytes(const Classes& classes, int64_t N, bool half, bool keep_half, bool lists) {
  Plan plan;
  shape_plan(classes, N, active_kernels(), half && active_kernels().pair_format != nullptr, plan);
  shape_kept(keep_half, lists, plan);
  return (classes.C + plan.block_classes - 1) / plan.block_classes * plan.kept_block_bytes;
}

}  // namespace recog_fast::cpu
