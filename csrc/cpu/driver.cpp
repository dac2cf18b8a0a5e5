#include "driver.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

namespace recog_fast::cpu {

namespace {

#if defined(__x86_64__)
bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw");
}
bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

const Kernels* best_kernels(const std::string& wanted) {
#if defined(__x86_64__)
  if ((wanted.empty() || wanted == "avx512") && supports_avx512()) return &kernels_avx512;
  if ((wanted.empty() || wanted == "avx2") && supports_avx2()) return &kernels_avx2;
#endif
  return wanted.empty() || wanted == "baseline" ? &kernels_baseline : nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

// Packed operands and lane tables of one call.
struct Workspace {
  Array<float> x_panels, x_columns, rules, terms;
  std::vector<Target> targets;
  Plan plan;
};

void pack_panels(const Rows& rows, int64_t D, int64_t width, Workspace& space) {
  const int64_t lanes = space.plan.lanes;
  space.x_panels = Array<float>(lanes * D);
  for (int64_t p = 0; p < lanes; p += width)
    for (int64_t k = 0; k < D; ++k)
      for (int64_t i = 0; i < width; ++i)
        space.x_panels[p * D + k * width + i] = p + i < rows.N ? rows.unit_embeddings[(p + i) * D + k] : 0.0f;
  space.plan.x_panels = space.x_panels.get();
}

void pack_columns(const Rows& rows, int64_t D, int64_t width, Workspace& space) {
  const int64_t depth = space.plan.depth;
  space.x_columns = Array<float>(depth * rows.N);
  for (int64_t d = 0; d < depth; d += width)
    for (int64_t n = 0; n < rows.N; ++n)
      for (int64_t i = 0; i < width; ++i)
        space.x_columns[d * rows.N + n * width + i] = d + i < D ? rows.unit_embeddings[n * D + d + i] : 0.0f;
  space.plan.x_columns = space.x_columns.get();
}

// (count, N) -> (count, lanes); the padding lanes repeat `fill`.
Array<float> pad_lanes(const float* const* sources, int64_t count, int64_t N, int64_t lanes, const float* fill) {
  Array<float> padded(count * lanes);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t n = 0; n < lanes; ++n) padded[r * lanes + n] = n < N ? sources[r][n] : fill[r];
  return padded;
}

void pack_rules(const Rows& rows, Workspace& space) {
  if (rows.rules == nullptr) return;
  const float plain[kRuleRows] = {4, 4, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1};
  const float* sources[kRuleRows];
  for (int r = 0; r < kRuleRows; ++r) sources[r] = rows.rules + r * rows.N;
  space.rules = pad_lanes(sources, kRuleRows, rows.N, space.plan.lanes, plain);
  space.plan.rules = space.rules.get();
}

void pack_terms(const RowTerms& terms, int64_t N, Workspace& space) {
  const float* sources[5] = {terms.lse, terms.negative, terms.target, terms.mean, terms.kind};
  const float idle[5] = {1e30f, 0, 0, 0, 0};
  space.terms = pad_lanes(sources, 5, N, space.plan.lanes, idle);
  space.plan.terms = space.terms.get();
  for (int64_t n = 0; n < N; ++n) space.plan.any_unknown |= terms.kind[n] != float(kMargin);
}

void pack_targets(const Classes& classes, const Rows& rows, Workspace& space) {
  for (int64_t n = 0; n < rows.N; ++n)
    if (rows.target[n] >= 0 && rows.target[n] < classes.C * classes.K) space.targets.push_back({rows.target[n], n});
  std::sort(space.targets.begin(), space.targets.end(),
            [](const Target& a, const Target& b) { return a.row != b.row ? a.row < b.row : a.lane < b.lane; });
  space.plan.targets = space.targets.data();
  space.plan.target_count = int64_t(space.targets.size());
}

void make_plan(const Classes& classes, const Rows& rows, int64_t width, Workspace& space) {
  Plan& plan = space.plan;
  plan.classes = classes;
  plan.N = rows.N;
  plan.lanes = round_up(rows.N, width);
  plan.depth = round_up(classes.D, width);
  plan.scale = rows.scale;
  plan.tile_classes = std::max<int64_t>(1, kTileRows / classes.K);
  plan.block_classes = std::max<int64_t>(1, kBlockRows / (plan.tile_classes * classes.K)) * plan.tile_classes;
  pack_panels(rows, classes.D, width, space);
  pack_rules(rows, space);
  pack_targets(classes, rows, space);
}

struct ThreadMemory {
  Array<float> logits, rows, gradient, lane, inverse, offset, nearest, pull;
  Array<double> sum, mean, mass;
  Array<int32_t> index;
  Scratch scratch{};
  Partial partial{};

  explicit ThreadMemory(const Plan& plan, bool forward) {
    const int64_t tile = std::max(kTileRows, plan.classes.K);
    logits = Array<float>(tile * plan.lanes);
    rows = Array<float>(tile * plan.depth);
    lane = Array<float>(plan.lanes);
    inverse = Array<float>(tile);
    if (!forward) gradient = Array<float>(tile * plan.depth);
    scratch = {logits.get(), rows.get(), gradient.get(), lane.get(), inverse.get()};
    if (!forward) return;
    offset = Array<float>(plan.lanes);
    nearest = Array<float>(plan.lanes);
    index = Array<int32_t>(plan.lanes);
    sum = Array<double>(plan.lanes);
    mean = Array<double>(plan.lanes);
    mass = Array<double>(plan.lanes);
    pull = Array<float>(plan.want_pull ? plan.lanes * plan.depth : 1);
    partial = {offset.get(), sum.get(), mean.get(), mass.get(), nearest.get(), index.get(), pull.get()};
  }

  void reset(const Plan& plan) const {
    std::fill_n(partial.offset, plan.lanes, -1e30f);
    std::fill_n(partial.nearest, plan.lanes, kMasked);
    std::fill_n(partial.index, plan.lanes, -1);
    std::fill_n(partial.sum, plan.lanes, 0.0);
    std::fill_n(partial.mean, plan.lanes, 0.0);
    std::fill_n(partial.mass, plan.lanes, 0.0);
    if (plan.want_pull) std::memset(partial.pull, 0, sizeof(float) * size_t(plan.lanes * plan.depth));
  }
};

// The whole sweep's sums, in double, and how a block's join them.
struct Total {
  std::vector<double> offset, sum, mean, mass, pull;
  std::vector<float> nearest;
  std::vector<int64_t> index;

  explicit Total(const Plan& plan)
      : offset(plan.N, -1e30), sum(plan.N, 0.0), mean(plan.N, 0.0), mass(plan.N, 0.0),
        pull(plan.want_pull ? plan.N * plan.classes.D : 0, 0.0),
        nearest(plan.N, kMasked), index(plan.N, -1) {}

  void merge(const Plan& plan, const Partial& part, int64_t first_class) {
    for (int64_t n = 0; n < plan.N; ++n) {
      double keep = 1.0, take = 1.0;
      if (!plan.unknown) rescale(n, double(part.offset[n]), keep, take);
      sum[n] = sum[n] * keep + part.sum[n] * take;
      mean[n] += part.mean[n];
      mass[n] += part.mass[n];
      if (part.nearest[n] > nearest[n]) {
        nearest[n] = part.nearest[n];
        index[n] = first_class + part.index[n] / plan.classes.K;
      }
      if (plan.want_pull) add_pull(plan, part, n, keep, take);
    }
  }

 private:
  void rescale(int64_t n, double part_offset, double& keep, double& take) {
    const double top = std::max(offset[n], part_offset);
    keep = std::exp(offset[n] - top);
    take = std::exp(part_offset - top);
    offset[n] = top;
  }

  void add_pull(const Plan& plan, const Partial& part, int64_t n, double keep, double take) {
    double* to = pull.data() + n * plan.classes.D;
    const float* from = part.pull + n * plan.depth;
    for (int64_t d = 0; d < plan.classes.D; ++d) to[d] = to[d] * keep + double(from[d]) * take;
  }
};

Total run_rows(const Classes& classes, const Rows& rows, Workspace& space, int threads) {
  const Kernels& kernels = active_kernels();
  const Plan& plan = space.plan;
  Total total(plan);
  const int64_t blocks = (classes.C + plan.block_classes - 1) / plan.block_classes;
  threads = useful_threads(threads, rows.N, classes.C * classes.K, classes.D);
  std::vector<ThreadMemory> memory;
  for (int t = 0; t < threads; ++t) memory.emplace_back(plan, true);
  ordered_blocks(
      blocks, threads,
      [&](int64_t block, int t) {
        memory[t].reset(plan);
        const int64_t first = block * plan.block_classes, last = std::min(first + plan.block_classes, classes.C);
        kernels.row_block(plan, first, last, memory[t].partial, memory[t].scratch);
      },
      [&](int64_t block, int t) { total.merge(plan, memory[t].partial, block * plan.block_classes); });
  return total;
}

void write_pull(const Total& total, const Plan& plan, bool normalise, float* pull) {
  if (pull == nullptr) return;
  const int64_t D = plan.classes.D;
  for (int64_t n = 0; n < plan.N; ++n) {
    const double factor = !normalise ? 1.0 : total.sum[n] == 0.0 ? 0.0 : 1.0 / total.sum[n];
    for (int64_t d = 0; d < D; ++d) pull[n * D + d] = float(total.pull[n * D + d] * factor);
  }
}

}  // namespace

const char* select_isa(const char* force) {
  const Kernels* kernels = best_kernels(force == nullptr ? "" : force);
  if (kernels == nullptr) return nullptr;
  chosen = kernels;
  return kernels->name;
}

const Kernels& active_kernels() {
  if (chosen == nullptr) chosen = best_kernels("");
  return *chosen;
}

const char* active_isa() { return active_kernels().name; }

int useful_threads(int threads, int64_t N, int64_t rows, int64_t D) {
  const double work = double(N) * double(rows) * double(D);
  return work < 4e6 ? 1 : std::max(1, threads);
}

void row_sweep(const Classes& classes, const Rows& rows, const RowSums& out, int threads) {
  Workspace space;
  make_plan(classes, rows, active_kernels().width, space);
  space.plan.want_pull = out.pull != nullptr;
  const Total total = run_rows(classes, rows, space, threads);
  for (int64_t n = 0; n < rows.N; ++n) {
    out.lse[n] = total.sum[n] == 0.0 ? -std::numeric_limits<double>::infinity() : total.offset[n] + std::log(total.sum[n]);
    out.nearest_cosine[n] = total.index[n] < 0 ? -2.0f : total.nearest[n];
    out.nearest_index[n] = total.index[n];
  }
  write_pull(total, space.plan, true, out.pull);
}

void unknown_sweep(const Classes& classes, const Rows& rows, const UnknownSums& out, int threads) {
  Workspace space;
  make_plan(classes, rows, active_kernels().width, space);
  const std::vector<float> zero(size_t(rows.N), 0.0f);
  std::vector<float> lse(zero), correction(zero);
  for (int64_t n = 0; n < rows.N; ++n) {
    lse[n] = float(out.lse[n]);
    correction[n] = float(std::exp(double(lse[n]) - out.lse[n]));
  }
  pack_terms({lse.data(), correction.data(), zero.data(), out.first_mean, zero.data()}, rows.N, space);
  space.plan.unknown = true;
  const Total total = run_rows(classes, rows, space, threads);
  std::copy(total.sum.begin(), total.sum.end(), out.remainder);
  std::copy(total.mean.begin(), total.mean.end(), out.mean);
  std::copy(total.mass.begin(), total.mass.end(), out.mass);
  write_pull(total, space.plan, false, out.pull);
}

void class_sweep(const Classes& classes, const Rows& rows, const RowTerms& terms, const ClassOutput& out, int threads) {
  const Kernels& kernels = active_kernels();
  Workspace space;
  make_plan(classes, rows, kernels.width, space);
  pack_columns(rows, classes.D, kernels.width, space);
  pack_terms(terms, rows.N, space);
  const Plan& plan = space.plan;
  const int64_t blocks = (classes.C + plan.block_classes - 1) / plan.block_classes;
  threads = useful_threads(threads, rows.N, classes.C * classes.K, classes.D);
  std::vector<ThreadMemory> memory;
  for (int t = 0; t < threads; ++t) memory.emplace_back(plan, false);
  ordered_blocks(
      blocks, threads,
      [&](int64_t block, int t) {
        const int64_t first = block * plan.block_classes, last = std::min(first + plan.block_classes, classes.C);
        kernels.class_block(plan, out, first, last, memory[t].scratch);
      },
      [](int64_t, int) {});
}

void effective_prototypes(const Classes& classes, float* prototypes, int threads) {
  const int64_t block = 4096;
  const int64_t blocks = (classes.C + block - 1) / block;
  threads = useful_threads(threads, 8, classes.C * classes.K, classes.D);
  ordered_blocks(
      blocks, threads,
      [&](int64_t b, int) {
        active_kernels().prototype_block(classes, prototypes, b * block, std::min((b + 1) * block, classes.C));
      },
      [](int64_t, int) {});
}

}  // namespace recog_fast::cpu
