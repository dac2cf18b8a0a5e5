#include "driver.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <ctime>
#include <limits>
#include <string>

#include "workspace.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace recog_fast::cpu {

namespace {

#if defined(__x86_64__)
bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw");
}
bool supports_vnni() { return supports_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool supports_bf16() { return supports_avx512() && __builtin_cpu_supports("avx512bf16"); }

// AMX's tiles are state that Linux grants on request, to the whole process and its threads.
bool grants_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
bool supports_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return supports_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTile) != 0 && grants_tiles();
}
bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

bool always() { return true; }

struct Choice {
  const Kernels* kernels;
  bool (*supported)();
  bool by_name_only;
};

// The best first.
const Choice kChoices[] = {
#if defined(__x86_64__)
    {&kernels_amx_bf16, supports_amx, false},
    {&kernels_avx512_bf16, supports_bf16, false},
    {&kernels_avx512_vnni, supports_vnni, false},
    {&kernels_avx512, supports_avx512, false},
    {&kernels_avx2, supports_avx2, false},
#endif
    {&kernels_baseline, always, false},
    {&kernels_emulated_bf16, always, true},
    {&kernels_emulated_amx, always, true},
};

const Kernels* best_kernels(const std::string& wanted) {
  for (const Choice& choice : kChoices)
    if (choice.supported() && (wanted.empty() ? !choice.by_name_only : wanted == choice.kernels->name)) return choice.kernels;
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

struct ThreadMemory {
  Array<float> logits, rows, gradient, panel, lane, inverse, weight, step;
  Array<int32_t> row_pairs, class_pairs, coefficients, turned;
  Array<Element> list;
  Array<const char*> ahead;
  Scratch scratch{};

  ThreadMemory(const Plan& plan, bool forward) {
    const int64_t tile = round_up(plan.tile_rows, plan.pairs ? kTileRowsStep : 2);
    logits = Array<float>(tile * plan.lanes);
    rows = Array<float>(tile * plan.stride);
    lane = Array<float>(plan.lanes);
    inverse = Array<float>(tile);
    weight = Array<float>(tile);
    step = Array<float>(std::max(tile, plan.lanes));
    if (plan.classes.slot != nullptr) ahead = Array<const char*>(tile);
    if (plan.lists) list = Array<Element>(std::max(tile, plan.lanes) + 1);
    if (!forward) gradient = Array<float>(tile * plan.stride);
    if (forward && !plan.pairs) panel = Array<float>(tile * plan.width);
    if (plan.pairs) {
      row_pairs = Array<int32_t>(tile * plan.pair_stride);
      coefficients = Array<int32_t>(tile * plan.lanes / 2);
      if (forward) class_pairs = Array<int32_t>(tile / 2 * plan.stride);
      if (forward) turned = Array<int32_t>(plan.lanes * plan.turned_stride);
    }
    scratch = {logits.get(), rows.get(), gradient.get(),  panel.get(),       lane.get(),        inverse.get(),
               weight.get(), step.get(), row_pairs.get(), class_pairs.get(), coefficients.get(), turned.get(),
               list.get(), ahead.get()};
  }
};

// A block's sums, until they are merged.
struct BlockSums {
  Array<float> offset, nearest, pull;
  Array<double> sum, mean, mass;
  Array<int32_t> index;
  Partial partial{};

  explicit BlockSums(const Plan& plan) : offset(plan.lanes), nearest(plan.lanes), pull(plan.want_pull ? plan.lanes * plan.stride : 1),
        sum(plan.lanes), mean(plan.lanes), mass(plan.lanes), index(plan.lanes) {
    partial = {offset.get(), sum.get(), mean.get(), mass.get(), nearest.get(), index.get(), pull.get()};
  }

  void reset(const Plan& plan) const {
    std::fill_n(partial.offset, plan.lanes, -1e30f);
    std::fill_n(partial.nearest, plan.lanes, kMasked);
    std::fill_n(partial.index, plan.lanes, -1);
    std::fill_n(partial.sum, plan.lanes, 0.0);
    std::fill_n(partial.mean, plan.lanes, 0.0);
    std::fill_n(partial.mass, plan.lanes, 0.0);
    if (plan.want_pull) std::memset(partial.pull, 0, sizeof(float) * size_t(plan.lanes * plan.stride));
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
      mean[n] = mean[n] * keep + part.mean[n] * take;
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
    const float* from = part.pull + n * plan.stride;
    for (int64_t d = 0; d < plan.classes.D; ++d) to[d] = to[d] * keep + double(from[d]) * take;
  }
};

Total run_rows(const Workspace& space, int threads) {
  const Plan& plan = space.plan;
  const Classes& classes = plan.classes;
  Total total(plan);
  threads = useful_threads(threads, plan.N, classes.C * classes.K, classes.D);
  const int slots = threads == 1 ? 1 : 2 * threads;
  std::vector<ThreadMemory> memory;
  for (int t = 0; t < threads; ++t) memory.emplace_back(plan, true);
  std::vector<BlockSums> sums;
  for (int i = 0; i < slots; ++i) sums.emplace_back(plan);
  ordered_blocks(
      space.blocks(), threads, slots,
      [&](int64_t block, int t, int slot) {
        sums[slot].reset(plan);
        const int64_t first = block * plan.block_classes, last = std::min(first + plan.block_classes, classes.C);
        space.sweeps->row_block(plan, first, last, sums[slot].partial, memory[t].scratch);
      },
      [&](int64_t block, int slot) { total.merge(plan, sums[slot].partial, block * plan.block_classes); });
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

bool runs_isa(const char* name) { return *name != '\0' && best_kernels(name) != nullptr; }

const char* pair_format() { return active_kernels().pair_format; }

double micro_kernel_rate(bool half, double seconds) {
  const Kernels& kernels = active_kernels();
  const Sweeps& sweeps = half && kernels.pair_format != nullptr ? kernels.pairs : kernels.float32;
  Array<float> buffer(16 * kDepth + kernels.width * kDepth + 16 * kernels.width + 16);
  std::fill_n(buffer.get(), 16 * kDepth + kernels.width * kDepth + 16 * kernels.width + 16, 1e-3f);
  double spent = 0.0;
  int64_t done = 0;
  while (spent < seconds) {
    const std::clock_t start = std::clock();
    done += sweeps.micro_kernel(buffer.get(), 500);
    spent += double(std::clock() - start) / CLOCKS_PER_SEC;
  }
  return 2.0 * double(done) / spent;
}

int useful_threads(int threads, int64_t N, int64_t rows, int64_t D) {
  const double work = double(N) * double(rows) * double(D);
  return work < 4e6 ? 1 : std::max(1, threads);
}

void row_sweep(const Classes& classes, const Rows& rows, const RowSums& out, const Kept& kept, int threads) {
  Workspace space(classes, rows, active_kernels());
  space.pack_embeddings(false);
  space.keep(kept);
  space.plan.want_pull = out.pull != nullptr;
  const Total total = run_rows(space, threads);
  for (int64_t n = 0; n < rows.N; ++n) {
    out.lse[n] = total.sum[n] == 0.0 ? -std::numeric_limits<double>::infinity() : total.offset[n] + std::log(total.sum[n]);
    out.nearest_cosine[n] = total.index[n] < 0 ? -2.0f : total.nearest[n];
    out.nearest_index[n] = total.index[n];
    if (out.listed != nullptr) out.listed[n] = !space.plan.lists || total.sum[n] == 0.0 ? 1.0 : total.mean[n] / total.sum[n];
  }
  write_pull(total, space.plan, true, out.pull);
}

void unknown_sweep(const Classes& classes, const Rows& rows, const UnknownSums& out, int threads) {
  Workspace space(classes, rows, active_kernels());
  space.pack_embeddings(false);
  const std::vector<float> zero(size_t(rows.N), 0.0f);
  std::vector<float> lse(zero), correction(zero);
  for (int64_t n = 0; n < rows.N; ++n) {
    lse[n] = float(out.lse[n]);
    correction[n] = float(std::exp(double(lse[n]) - out.lse[n]));
  }
  space.pack_terms({lse.data(), correction.data(), zero.data(), out.first_mean, zero.data()});
  space.pack_wide_rows(out.low);
  space.plan.unknown = true;
  const Total total = run_rows(space, threads);
  std::copy(total.sum.begin(), total.sum.end(), out.remainder);
  std::copy(total.mean.begin(), total.mean.end(), out.mean);
  std::copy(total.mass.begin(), total.mass.end(), out.mass);
  write_pull(total, space.plan, false, out.pull);
}

void class_sweep(const Classes& classes, const Rows& rows, const RowTerms& terms, const ClassOutput& out, const Kept& kept,
                 int threads) {
  Workspace space(classes, rows, active_kernels());
  space.pack_embeddings(true);
  space.pack_terms(terms);
  space.keep(kept);
  const Plan& plan = space.plan;
  threads = useful_threads(threads, rows.N, classes.C * classes.K, classes.D);
  std::vector<ThreadMemory> memory;
  for (int t = 0; t < threads; ++t) memory.emplace_back(plan, false);
  each_block(space.blocks(), threads, [&](int64_t block, int t) {
    const int64_t first = block * plan.block_classes, last = std::min(first + plan.block_classes, classes.C);
    space.sweeps->class_block(plan, out, first, last, memory[t].scratch);
  });
}

void effective_prototypes(const Classes& classes, float* prototypes, int threads) {
  const int64_t block = 4096;
  const int64_t blocks = (classes.C + block - 1) / block;
  threads = useful_threads(threads, 8, classes.C * classes.K, classes.D);
  each_block(blocks, threads, [&](int64_t b, int) {
    active_kernels().prototype_block(classes, prototypes, b * block, std::min((b + 1) * block, classes.C));
  });
}

}  // namespace recog_fast::cpu
