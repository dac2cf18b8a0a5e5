// Every sweep of csrc/cpu against plain double loops, without Python or torch.
//   kernel_check ISA [float32|half|all] [small|full]     ISA: a name of select_isa, or "all" that this CPU runs
// Prints the worst error of each result as a share of what is allowed. Exit code 0: all within, 1: not, 2: no such ISA here.
// Allowed in float32, by the golden cases' budget: lse 1e-6 |lse| + 2e-6 s, gradients 5e-5 of the norm. With 16-bit operands:
// 1.5 times the error of an ideal path (operands rounded, everything else exact) and what rounding the slopes costs; kept
// 16-bit exponentials: 4e-3 and the same.
#include <cstdio>
#include <functional>
#include <map>

#include "problem.h"

namespace {

using namespace check;

std::map<std::string, double> worst;

void judge(const std::string& what, double error, double allowed) {
  double& share = worst[what];
  const double now = error <= 0 ? 0 : error / allowed;
  share = now >= share || now != now ? now : share;
}

double norm(const Doubles& a) {
  double squared = 0;
  for (double v : a) squared += v * v;
  return std::sqrt(squared);
}

template <class A>
double distance(const A& a, const Doubles& b) {
  Doubles difference(b);
  for (size_t i = 0; i < b.size(); ++i) difference[i] -= a[i];
  return norm(difference);
}

// A rounding of one factor of a product, by its format. int16: steps of total / 65000 of up to 96 values.
double rounding(bool half) { return !half ? 1e-6 : fixed_point() ? 1e-3 : 0x1p-9; }

// Frobenius norms; `terms` is that of the products before they were summed and projected.
void judge_matrix(const std::string& what, const Floats& ours, const Doubles& truth, const Doubles& ideal, bool half, double terms,
                  double relative = 5e-5) {
  judge(what, distance(ours, truth), relative * norm(truth) + 1.5 * distance(ideal, truth) + rounding(half) * terms + 1e-12);
}

// What a cosine may be off by.
double cosine_budget(const Problem& p, const Problem& ideal) {
  double largest = 1, own = 0;
  for (size_t i = 0; i < p.cosine.size(); ++i) {
    largest = std::max(largest, std::fabs(p.cosine[i]));
    own = std::max(own, std::fabs(p.cosine[i] - ideal.cosine[i]));
  }
  return 2e-6 * largest + 1.5 * own;
}

// logsumexp over the classes other than `without`, nearest of them, and their shares e^{z - lse} g.
struct Row {
  double lse = 0, nearest = -2;
  int64_t index = -1;
  Doubles p, slope;
};

Row solve(const Problem& p, int64_t n, int64_t without, bool rules) {
  const int64_t C = p.shape.C;
  Row row;
  row.p.assign(C, 0), row.slope.assign(C, 1);
  double top = -1e300, sum = 0;
  for (int64_t c = 0; c < C; ++c) {
    const double cosine = p.cosine[n * C + c];
    row.p[c] = p.shape.scale * (rules ? p.value(n, cosine, row.slope[c]) : cosine);
    if (c == without) continue;
    if (cosine > row.nearest || row.index < 0) row.nearest = cosine, row.index = c;
    top = std::max(top, row.p[c]);
  }
  for (int64_t c = 0; c < C; ++c) sum += c == without ? 0 : std::exp(row.p[c] - top);
  row.lse = row.index < 0 ? -INFINITY : top + std::log(sum);
  for (int64_t c = 0; c < C; ++c) row.p[c] = c == without || row.index < 0 ? 0 : std::exp(row.p[c] - row.lse);
  return row;
}

// to += factor P of class c; returns factor^2 |P|^2
double add_prototype(const Problem& p, int64_t n, int64_t c, double factor, double* to) {
  const int64_t D = p.shape.D;
  const double* from = &p.prototypes[(c * p.shape.K + p.best[n * p.shape.C + c]) * D];
  double squared = 0;
  for (int64_t d = 0; d < D; ++d) to[d] += factor * from[d], squared += factor * factor * from[d] * from[d];
  return squared;
}

void check_prototypes(const Problem& p) {
  Floats ours(p.prototypes.size(), NAN);
  cpu::effective_prototypes(p.classes(), ours.data(), p.shape.threads);
  double error = 0;
  for (size_t i = 0; i < ours.size(); ++i) {
    const double now = std::fabs(ours[i] - p.prototypes[i]);
    error = now <= error ? error : now;
  }
  judge("effective_prototypes", error, 4e-6);
}

// sum_j softmax_j g(c_ij) P_j (N, D); the norm of its terms.
Doubles pull_of(const Problem& p, double& terms) {
  const Shape& s = p.shape;
  Doubles pull(s.N * s.D, 0);
  double squared = 0;
  for (int64_t n = 0; n < s.N; ++n) {
    const Row row = solve(p, n, p.label[n], true);
    for (int64_t c = 0; c < s.C; ++c)
      if (row.p[c] != 0 && p.counts(n, c)) squared += add_prototype(p, n, c, row.p[c] * row.slope[c], &pull[n * s.D]);
  }
  terms = std::sqrt(squared);
  return pull;
}

void check_rows(const Problem& p, const Problem& q, const cpu::Kept& kept) {
  const Shape& s = p.shape;
  Doubles lse(s.N, NAN);
  Floats nearest(s.N, NAN), ours(s.N * s.D, NAN);
  std::vector<int64_t> index(s.N, -7);
  cpu::row_sweep(p.classes(), p.rows(p.target), {lse.data(), nearest.data(), index.data(), ours.data()}, kept, s.threads);
  const double budget = cosine_budget(p, q);
  for (int64_t n = 0; n < s.N; ++n) {
    const Row row = solve(p, n, p.label[n], true);
    if (row.index < 0) {
      judge("nearest", index[n] == -1 && nearest[n] == -2 && std::isinf(lse[n]) ? 0 : INFINITY, 1);
      continue;
    }
    const double steepest = s.rules ? 2.3 : 1;  // f' = 2 c + t, whatever g is
    judge("lse", std::fabs(lse[n] - row.lse), 1e-6 * std::fabs(row.lse) + steepest * budget * s.scale);
    const bool real = index[n] >= 0 && index[n] < s.C && index[n] != p.label[n];
    judge("nearest", real ? std::fabs(p.cosine[n * s.C + index[n]] - row.nearest) : INFINITY, 2 * budget);
    judge("nearest", std::fabs(nearest[n] - row.nearest), budget);
  }
  double terms, unused;
  const Doubles truth = pull_of(p, terms);
  judge_matrix("pull", ours, truth, pull_of(q, unused), s.half, terms);
}

struct Unknown {
  Doubles sums[3], pull;  // mass, remainder, mean (N,); (N, D)
  double terms = 0;
};

Unknown unknown_of(const Problem& p, const Doubles& lse, const std::vector<int64_t>& nearest, const Floats& first) {
  const Shape& s = p.shape;
  Unknown u;
  for (Doubles& sum : u.sums) sum.assign(s.N, 0);
  u.pull.assign(s.N * s.D, 0);
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t c = 0; c < s.C; ++c) {
      if (c * s.K == nearest[n]) continue;
      const double q = std::min(1.0, std::exp(s.scale * p.cosine[n * s.C + c] - lse[n])), h = std::expm1(q);
      u.sums[0][n] += q, u.sums[1][n] += h - q, u.sums[2][n] += q * h;
      u.terms += add_prototype(p, n, c, q * (h - first[n]), &u.pull[n * s.D]);
    }
  u.terms = std::sqrt(u.terms);
  return u;
}

void check_unknown(const Problem& p, const Problem& q) {
  const Shape& s = p.shape;
  Doubles lse(s.N), found[3];
  for (Doubles& sum : found) sum.assign(s.N, NAN);
  Floats first(s.N), ours(s.N * s.D, NAN);
  std::vector<int64_t> nearest(s.N);
  for (int64_t n = 0; n < s.N; ++n) {
    const Row row = solve(p, n, -1, false);
    const double top = row.p[row.index];
    lse[n] = row.lse, nearest[n] = row.index * s.K, first[n] = float(top * std::expm1(top));
  }
  cpu::Rows rows = p.rows(nearest);
  rows.rules = nullptr;
  cpu::unknown_sweep(p.classes(), rows, {lse.data(), first.data(), found[0].data(), found[1].data(), found[2].data(), ours.data()},
                     s.threads);
  const Unknown truth = unknown_of(p, lse, nearest, first), ideal = unknown_of(q, lse, nearest, first);
  const double relative = 2 * (s.scale * cosine_budget(p, q) + 2e-6);  // p^2 is worth twice what p is
  for (int64_t n = 0; n < s.N; ++n)
    for (int i = 0; i < 3; ++i)
      judge("unknown sums", std::fabs(found[i][n] - truth.sums[i][n]), relative * truth.sums[i][n] + 2e-8);
  judge_matrix("unknown pull", ours, truth.pull, ideal.pull, s.half, truth.terms);
}

struct Terms {
  Floats all;  // (5, N)
  bool unknown;
  cpu::RowTerms view(int64_t N) const {
    const float* t = all.data();
    return {t, t + N, t + 2 * N, t + 3 * N, t + 4 * N};
  }
};

Terms make_terms(Problem& p, bool unknown) {
  const int64_t N = p.shape.N;
  Terms terms{Floats(5 * N), unknown};
  for (int64_t n = 0; n < N; ++n) {
    const double lse = solve(p, n, p.label[n], true).lse;
    terms.all[n] = float(std::isinf(lse) ? 0 : lse);
    terms.all[N + n] = float(p.normal()), terms.all[2 * N + n] = float(p.normal()), terms.all[3 * N + n] = float(0.1 * p.uniform());
    terms.all[4 * N + n] = float(unknown && p.label[n] < 0 ? 1 + n % 2 : 0);
  }
  return terms;
}

// dP (C K, D) by the definition of cpu::RowTerms; sums of its terms' squares by row of W.
Doubles prototype_gradient(const Problem& p, const Terms& terms, Doubles& squares) {
  const Shape& s = p.shape;
  const float* t = terms.all.data();
  Doubles d(s.C * s.K * s.D, 0);
  squares.assign(s.C * s.K, 0);
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t c = 0; c < s.C; ++c) {
      double g;
      const double q = std::exp(s.scale * p.value(n, p.cosine[n * s.C + c], g) - t[n]), capped = std::min(q, 1.0);
      const int kind = int(t[4 * s.N + n]);
      const double twice = capped * (std::expm1(capped) - t[3 * s.N + n]);
      const double h = kind == cpu::kMargin ? q * g : kind == cpu::kUnknownSingle ? double(s.C) * q - 1 : twice;
      const bool own = c == p.label[n];
      const int64_t row = own ? p.target[n] : c * s.K + p.best[n * s.C + c];
      if (!own && !p.counts(n, c)) continue;
      const double slope = own ? t[2 * s.N + n] : t[s.N + n] * h;
      squares[row] += slope * slope;
      for (int64_t k = 0; k < s.D; ++k) d[row * s.D + k] += slope * p.x[n * s.D + k];
    }
  return d;
}

void check_step(const Problem& p, const Terms& terms, const cpu::Kept& kept, const std::string& name, const Doubles& d_weight,
                const Doubles& ideal, double size, bool half, double relative) {
  Floats weight = p.weight, velocity(weight.size());
  for (size_t i = 0; i < velocity.size(); ++i) velocity[i] = float(i % 7) - 3;
  cpu::ClassOutput out{cpu::kStep, nullptr, weight.data(), velocity.data(), 0.1f, 0.9f, 5e-4f, p.shape.N % 2 == 1};
  const double momentum = out.momentum, decay = out.weight_decay, lr = out.lr;
  Doubles speed[2] = {d_weight, ideal}, moved[2] = {d_weight, ideal};
  for (int k = 0; k < 2; ++k)
    for (size_t i = 0; i < weight.size(); ++i) {
      const double g = speed[k][i] + decay * weight[i];
      speed[k][i] = momentum * velocity[i] + g;
      moved[k][i] = weight[i] - lr * (out.nesterov ? g + momentum * speed[k][i] : speed[k][i]);
    }
  cpu::Classes classes = p.classes();
  classes.weight = weight.data();
  cpu::class_sweep(classes, p.rows(p.target), terms.view(p.shape.N), out, kept, p.shape.threads);
  // of the gradient's part; the rest of v and W is a few roundings
  const double gradient = relative * norm(d_weight) + rounding(half) * size;
  judge(name + " step v", distance(velocity, speed[0]), gradient + 1.5 * distance(speed[1], speed[0]) + 5e-7 * norm(speed[0]));
  judge(name + " step W", distance(weight, moved[0]), 0.2 * gradient + 1.5 * distance(moved[1], moved[0]) + 5e-7 * norm(moved[0]));
}

void check_classes(const Problem& p, const Problem& q, const Terms& terms, const cpu::Kept& kept, const std::string& name) {
  const Shape& s = p.shape;
  const bool half = s.half || (kept.data && kept.half);
  const double relative = kept.data && kept.half ? 4e-3 : 5e-5;
  Doubles squares, unused;
  Doubles d = prototype_gradient(p, terms, squares), ideal = prototype_gradient(q, terms, unused);
  double direct = 0, chained = 0;
  for (int64_t r = 0; r < s.C * s.K; ++r) direct += squares[r], chained += squares[r] * std::pow(p.chain_factor(r), 2);
  Floats ours(d.size(), NAN);
  cpu::ClassOutput out;
  out.gradient = ours.data();
  if (!kept.data) {  // kept exponentials carry 1/|W|, so the dP of a zero row, which nobody asks for, is lost
    out.mode = cpu::kPrototypeGradient;
    cpu::class_sweep(p.classes(), p.rows(p.target), terms.view(s.N), out, kept, s.threads);
    judge_matrix(name + " dP", ours, d, ideal, half, std::sqrt(direct), relative);
  }
  for (int64_t r = 0; r < s.C * s.K; ++r) p.chain(r, &d[r * s.D]), p.chain(r, &ideal[r * s.D]);
  out.mode = cpu::kWeightGradient;
  cpu::class_sweep(p.classes(), p.rows(p.target), terms.view(s.N), out, kept, s.threads);
  judge_matrix(name + " dW", ours, d, ideal, half, std::sqrt(chained), relative);
  if (!s.unit) check_step(p, terms, kept, name, d, ideal, std::sqrt(chained), half, relative);
}

// (N,) floors of element lists, each in the widest gap below a row's largest logits; marks what lies above. Infinite where no gap
// is wide enough for logits off by `error`; false where a tile would have too much to list.
bool make_floors(Problem& p, double error, Floats& floors) {
  const Shape& s = p.shape;
  const int64_t tile = std::max<int64_t>(1, 96 / s.K);
  std::vector<int64_t> counts((s.C + tile - 1) / tile, 0);
  floors.assign(s.N, INFINITY), p.listed.assign(s.N * s.C, 0);
  for (int64_t n = 0; n < s.N; ++n) {
    double slope, widest = 2 * error;
    Doubles z(s.C);
    for (int64_t c = 0; c < s.C; ++c) z[c] = s.scale * p.value(n, p.cosine[n * s.C + c], slope);
    Doubles order(z);
    std::sort(order.begin(), order.end(), std::greater<double>());
    for (int64_t k = 1; k < s.C && k <= s.C / 8 + 2; ++k)
      if (order[k - 1] - order[k] > widest) widest = order[k - 1] - order[k], floors[n] = float((order[k - 1] + order[k]) / 2);
    for (int64_t c = 0; c < s.C; ++c)
      if (z[c] >= floors[n]) p.listed[n * s.C + c] = 1, counts[c / tile] += c != p.label[n];
  }
  return *std::max_element(counts.begin(), counts.end()) <= tile * s.K * s.N / 2;
}

void check_lists(Problem p, Problem q, const Terms& terms) {
  const Shape& s = p.shape;
  Floats floors, ours(s.N * s.D, NAN), nearest(s.N);
  if (!make_floors(p, 2.3 * s.scale * cosine_budget(p, q), floors)) return;
  q.listed = p.listed;
  std::vector<char> buffer(size_t(cpu::kept_bytes(p.classes(), s.N, s.half, false, true)), char(0x7f));
  const cpu::Kept kept{buffer.data(), int64_t(buffer.size()), false, true, floors.data()};
  Doubles lse(s.N), share(s.N, NAN);
  std::vector<int64_t> index(s.N);
  cpu::row_sweep(p.classes(), p.rows(p.target), {lse.data(), nearest.data(), index.data(), ours.data(), share.data()}, kept, s.threads);
  const double relative = 2 * (2.3 * s.scale * cosine_budget(p, q) + 2e-6);
  for (int64_t n = 0; n < s.N; ++n) {
    const Row row = solve(p, n, p.label[n], true);
    double truth = row.index < 0 ? 1 : 0;
    for (int64_t c = 0; c < s.C; ++c) truth += p.counts(n, c) ? row.p[c] : 0;
    judge("listed share", std::fabs(share[n] - truth), relative);
  }
  double size, unused;
  const Doubles truth = pull_of(p, size);
  judge_matrix("listed pull", ours, truth, pull_of(q, unused), s.half, size);
  check_classes(p, q, terms, kept, "class listed");
}

void check_problem(const Shape& shape, uint32_t seed) {
  Problem p(shape, seed);
  const Problem q = p.ideal();
  check_prototypes(p);
  check_rows(p, q, {});
  check_unknown(p, q);
  check_classes(p, q, make_terms(p, true), {}, "class unknown");
  check_classes(p, q, make_terms(p, false), {}, "class");
  const Terms terms = make_terms(p, false);
  for (const bool half : {false, true}) {
    // Room for all blocks but the last, where there are several: both ways run in one sweep.
    cpu::Classes one = p.classes();
    one.C = 1;
    const int64_t block = cpu::kept_bytes(one, shape.N, shape.half, half, false);
    const int64_t all = cpu::kept_bytes(p.classes(), shape.N, shape.half, half, false);
    std::vector<char> buffer(size_t(std::max(block, all - block)), char(0x7f));
    const cpu::Kept kept{buffer.data(), int64_t(buffer.size()), half};
    check_rows(p, q, kept);
    check_classes(p, q, terms, kept, half ? "class kept16" : "class kept32");
  }
  check_lists(p, q, terms);
}

std::vector<Shape> shapes(bool half, bool full) {
  // N: a lane, odd, about a panel of 32, past one; C: below, at and past a tile of 48 or 96, past a block of 960; D: odd, about a
  // panel, past a slice of 256; then the options.
  std::vector<Shape> all{
      {1, 1, 3, 1, 8, false, false, true, 0, half, 1},      {1, 2, 1, 1, 1, false, false, true, 0, half, 1},
      {5, 9, 7, 1, 16, true, false, true, 32, half, 1},     {31, 48, 31, 1, 64, false, false, true, 0, half, 1},
      {33, 97, 64, 1, 64, true, false, true, 16, half, 2},  {32, 49, 33, 1, 16, false, true, true, 0, half, 1},
      {6, 20, 24, 3, 16, false, false, true, 0, half, 1},   {3, 4, 48, 49, 8, true, false, true, 0, half, 1},
      {17, 50, 130, 1, 32, true, false, false, 32, half, 1}, {9, 970, 40, 1, 64, true, false, true, 0, half, 2},
  };
  // Every remainder of N, C and D by what a micro-kernel does at once: 6 or 12 rows, panels of 8, 16 and 32 lanes.
  for (int64_t i = 0; i < 48; ++i)
    all.push_back({1 + 7 * i % 40, 2 + 13 * i % 154, 2 + 11 * i % 80, 1, 16, i % 2 == 1, i % 7 == 3, i % 5 != 0, int(i % 3) * 16, half, 1});
  if (!full) return all;
  for (const Shape& more : std::vector<Shape>{
           {130, 2000, 257, 1, 64, true, false, true, 16, half, 2}, {64, 961, 512, 1, 64, false, false, true, 0, half, 2},
           {100, 5000, 15, 1, 16, true, false, false, 32, half, 3}, {65, 100, 640, 1, 64, false, false, true, 32, half, 1},
           {128, 1921, 96, 1, 1, true, true, true, 0, half, 2}})
    all.push_back(more);
  return all;
}

bool run(const std::string& isa, bool half, bool full) {
  worst.clear();
  uint32_t seed = 1;
  for (const Shape& shape : shapes(half, full)) check_problem(shape, seed++);
  bool good = true;
  for (const auto& [what, share] : worst) {
    const bool within = share <= 1;
    good = good && within;
    std::printf("%-13s %-8s %-20s %8.4f of what is allowed%s\n", isa.c_str(), half ? cpu::pair_format() : "float32", what.c_str(),
                share, within ? "" : "  FAILED");
  }
  std::fflush(stdout);
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "all", arithmetic = count > 2 ? arguments[2] : "all";
  const bool full = count > 3 && std::string(arguments[3]) == "full";
  bool good = true, ran = false;
  for (const char* isa : {"amx_bf16", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "baseline", "emulated_bf16", "emulated_amx"}) {
    if ((wanted != "all" && wanted != isa) || cpu::select_isa(isa) == nullptr) continue;
    for (const bool half : {false, true}) {
      if ((arithmetic != "all" && arithmetic != (half ? "half" : "float32")) || (half && cpu::pair_format() == nullptr)) continue;
      ran = true;
      good = run(isa, half, full) && good;
    }
  }
  if (!ran) std::fprintf(stderr, "kernel_check: nothing to run for %s, %s on this CPU\n", wanted.c_str(), arithmetic.c_str());
  return !ran ? 2 : good ? 0 : 1;
}
