// Random problems for kernel_check and their answers by plain double loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/sweep.h"

namespace check {

namespace cpu = recog_fast::cpu;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

struct Shape {
  int64_t N, C, D, K;
  float scale;
  bool rules, unit, renormalize;
  int memory;  // 0 none, 16 or 32 bits
  bool half;   // 16-bit operands
  int threads;
};

inline float bfloat16(float value, uint16_t& bits) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  bits = uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  word = uint32_t(bits) << 16;
  std::memcpy(&value, &word, 4);
  return value;
}

// Whether 16 bits are fixed point here, else bfloat16 (kept exponentials too).
inline bool fixed_point() { return cpu::pair_format() != nullptr && cpu::pair_format()[0] == 'i'; }

struct Problem {
  Shape shape;
  Floats x, weight, memory, strength, rules;
  std::vector<uint16_t> memory_bits;
  std::vector<int32_t> slot;
  std::vector<int64_t> label;   // class, or -1
  std::vector<int64_t> target;  // row of W, or -1
  Doubles prototypes, inverse;  // (C K, D), 1/|W|
  Doubles cosine;               // (N, C) of the best sub-center
  std::vector<int> best;        // (N, C) which that is
  std::vector<char> listed;     // (N, C) what of pull and gradient counts (element lists); empty: all
  double clear;                 // distance of every cosine from a jump: a rule's threshold, its clamp, a tie of sub-centers

  Problem(const Shape& s, uint32_t seed) : shape(s), clear(s.half ? 4e-3 : 2e-6), random_(seed) {
    make_weight();
    make_memory();
    make_prototypes();
    for (int64_t n = 0; n < s.N; ++n) make_row(n);
    if (s.rules) make_rules();
  }

  cpu::Classes classes() const {
    const Shape& s = shape;
    cpu::Classes c;
    c.weight = weight.data();
    c.C = s.C, c.K = s.K, c.D = s.D, c.unit = s.unit, c.renormalize = s.renormalize;
    if (s.memory == 0) return c;
    c.S = int64_t(strength.size());
    c.memory_bf16 = s.memory == 16;
    c.memory_rows = c.memory_bf16 ? static_cast<const void*>(memory_bits.data()) : memory.data();
    c.strength = strength.data(), c.slot = slot.data();
    return c;
  }

  cpu::Rows rows(const std::vector<int64_t>& targets) const {
    cpu::Rows r;
    r.unit_embeddings = x.data(), r.target = targets.data(), r.rules = shape.rules ? rules.data() : nullptr;
    r.N = shape.N, r.scale = shape.scale, r.half = shape.half;
    return r;
  }

  // The same with operands as 16 bits hold them, everything else exact: what no kernel on such operands can do better than.
  Problem ideal() const {
    Problem q = *this;
    if (!shape.half) return q;
    const bool fixed = fixed_point();
    for (int64_t n = 0; n < shape.N; ++n) round_row(&q.x[n * shape.D], fixed);
    for (int64_t r = 0; r < shape.C * shape.K; ++r) round_row(&q.prototypes[r * shape.D], fixed);
    for (int64_t n = 0; n < shape.N; ++n)
      for (int64_t c = 0; c < shape.C; ++c) q.cosine[n * shape.C + c] = q.product(n, c * shape.K + best[n * shape.C + c]);
    return q;
  }

  bool counts(int64_t n, int64_t c) const { return listed.empty() || listed[n * shape.C + c] != 0; }

  double product(int64_t n, int64_t r) const {
    double sum = 0;
    for (int64_t d = 0; d < shape.D; ++d) sum += double(x[n * shape.D + d]) * prototypes[r * shape.D + d];
    return sum;
  }

  // What the chain multiplies a gradient of row r with, at most.
  double chain_factor(int64_t r) const { return shape.unit ? 1 : inverse[r] * (mixed_inverse(r) > 0 ? mixed_inverse(r) : 1); }

  double uniform() { return std::uniform_real_distribution<double>(0, 1)(random_); }
  double normal() { return std::normal_distribution<double>()(random_); }

  // f and g of math.md 1.2 at cosine c of row n.
  double value(int64_t n, double c, double& slope) const {
    slope = 1;
    if (!shape.rules) return c;
    const auto at = [&](int r) { return double(rules[r * shape.N + n]); };
    const double clamped = std::min(std::max(c, -at(0)), at(0));
    const int from = clamped > at(1) ? 2 : 7;
    slope = clamped == c ? at(from + 3) * clamped + at(from + 4) : 0;
    return (at(from) * clamped + at(from + 1)) * clamped + at(from + 2);
  }

  // dP -> dW of row r of W, in place: W^ = W/|W|, U = W^ + lam M, P = U/|U| (math.md 2).
  void chain(int64_t r, double* d) const {
    if (shape.unit) return;
    const int64_t D = shape.D;
    const double inverse_u = mixed_inverse(r);
    if (inverse_u > 0) project(d, &prototypes[r * D], inverse_u);
    Doubles unit(D);
    for (int64_t k = 0; k < D; ++k) unit[k] = weight[r * D + k] * inverse[r];
    project(d, unit.data(), inverse[r]);
  }

 private:
  std::mt19937 random_;

  template <class T>
  void round_row(T* row, bool fixed) const {
    double squared = 0;
    uint16_t bits;
    for (int64_t d = 0; d < shape.D; ++d) squared += double(row[d]) * row[d];
    const double step = std::sqrt(squared) / 32767;
    for (int64_t d = 0; d < shape.D; ++d)
      if (!fixed) row[d] = T(bfloat16(float(row[d]), bits));
      else row[d] = step > 0 ? T(std::nearbyint(row[d] / step) * step) : T(0);
  }

  void project(double* d, const double* unit, double factor) const {
    double along = 0;
    for (int64_t k = 0; k < shape.D; ++k) along += d[k] * unit[k];
    for (int64_t k = 0; k < shape.D; ++k) d[k] = (d[k] - along * unit[k]) * factor;
  }

  bool injected(int64_t r) const { return shape.memory != 0 && slot[r / shape.K] >= 0 && strength[slot[r / shape.K]] != 0; }

  // 1/|U| where the prototype is renormalised, else 0.
  double mixed_inverse(int64_t r) const {
    if (!injected(r) || !shape.renormalize) return 0;
    double squared = 0;
    for (int64_t k = 0; k < shape.D; ++k) squared += mixed(r, k) * mixed(r, k);
    return 1 / std::sqrt(squared);
  }

  double mixed(int64_t r, int64_t k) const {
    const double own = weight[r * shape.D + k] * inverse[r];
    const int64_t at = injected(r) ? slot[r / shape.K] : -1;
    return at < 0 ? own : own + double(strength[at]) * memory[at * shape.D + k];
  }

  void make_weight() {
    const int64_t rows = shape.C * shape.K, D = shape.D;
    weight.resize(rows * D), inverse.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      double squared = 0;
      const double size = shape.D > 1 ? std::pow(10.0, uniform() - 0.5) : 1.0;
      for (int64_t k = 0; k < D; ++k) {
        const double v = normal();
        weight[r * D + k] = float((v + (v < 0 ? -0.3 : 0.3)) * size);
        squared += double(weight[r * D + k]) * weight[r * D + k];
      }
      inverse[r] = 1 / std::sqrt(squared);
      for (int64_t k = 0; shape.unit && k < D; ++k) weight[r * D + k] = float(weight[r * D + k] * inverse[r]);
      if (shape.unit) inverse[r] = 1;
    }
    if (shape.C > 4 && D > 1 && !shape.unit) {  // a zero row: its prototype is 0
      std::fill_n(&weight[2 * shape.K * D], D, 0.0f);
      inverse[2 * shape.K] = 0;
    }
  }

  void make_memory() {
    if (shape.memory == 0) return;
    const int64_t S = (shape.C + 1) / 2, D = shape.D;
    memory.resize(S * D), memory_bits.resize(S * D), strength.resize(S), slot.assign(shape.C, -1);
    for (int64_t s = 0; s < S; ++s) {
      strength[s] = float(std::max(0.0, 2 * uniform() - 0.4));
      for (int64_t k = 0; k < D; ++k) {
        const float v = float(normal() / std::sqrt(double(D)));
        memory[s * D + k] = shape.memory == 16 ? bfloat16(v, memory_bits[s * D + k]) : v;
      }
      slot[2 * s] = int32_t(S - 1 - s);
    }
  }

  void make_prototypes() {
    const int64_t rows = shape.C * shape.K, D = shape.D;
    prototypes.resize(rows * D);
    for (int64_t r = 0; r < rows; ++r) {
      const double factor = mixed_inverse(r);
      for (int64_t k = 0; k < D; ++k) prototypes[r * D + k] = mixed(r, k) * (factor > 0 ? factor : 1);
    }
  }

  // A unit row, near a prototype or anywhere, drawn again where two sub-centers nearly tie.
  void make_row(int64_t n) {
    const Shape& s = shape;
    x.resize(s.N * s.D), cosine.resize(s.N * s.C), best.resize(s.N * s.C), label.resize(s.N), target.resize(s.N);
    for (int attempt = 0; attempt < 1000; ++attempt) {
      const int64_t near = int64_t(uniform() * double(s.C * s.K));
      const double pull = 3 * uniform() * std::sqrt(double(s.D));
      Doubles row(s.D);
      double squared = 0;
      for (int64_t k = 0; k < s.D; ++k) row[k] = normal() + pull * prototypes[near * s.D + k], squared += row[k] * row[k];
      for (int64_t k = 0; k < s.D; ++k) x[n * s.D + k] = float(row[k] / std::sqrt(squared));
      if (cosines(n) || s.D == 1) break;
    }
    label[n] = uniform() < 0.3 ? -1 : int64_t(uniform() * double(s.C));
    target[n] = label[n] < 0 ? -1 : label[n] * s.K + int64_t(uniform() * double(s.K));
  }

  // False where two sub-centers nearly tie.
  bool cosines(int64_t n) {
    const Shape& s = shape;
    bool apart = true;
    for (int64_t c = 0; c < s.C; ++c) {
      double first = -1e9, second = -1e9;
      for (int64_t k = 0; k < s.K; ++k) {
        const double sum = product(n, c * s.K + k);
        if (sum > first) second = first, first = sum, best[n * s.C + c] = int(k);
        else second = std::max(second, sum);
      }
      cosine[n * s.C + c] = first;
      apart = apart && first - second > clear;
    }
    return apart;
  }

  // CurricularFace's rule with AdaFace's clamp; with 16-bit operands Circle's, which has no jump.
  void make_rules() {
    const float curricular[10] = {1, 0.3f, 0, 2, 0.3f, 0, 1, 0, 0, 1}, circle[10] = {1, 0, -0.0625f, 1, 0.25f, 0, 0, 0, 0, 0};
    const float plain[12] = {4, 4, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1};
    rules.resize(cpu::kRuleRows * shape.N);
    for (int64_t n = 0; n < shape.N; ++n) {
      float column[12] = {4, -0.25f};
      std::copy_n(shape.half ? circle : curricular, 10, column + 2);
      if (!shape.half) column[0] = clear_of(n, 0.5), column[1] = clear_of(n, 0.0);
      for (int r = 0; r < 12; ++r) rules[r * shape.N + n] = label[n] < 0 ? plain[r] : column[r];
    }
  }

  // A number of [low, low + 0.4] that no |cosine| of the row comes near.
  float clear_of(int64_t n, double low) {
    float value = 0;
    for (int attempt = 0; attempt < 1000; ++attempt) {
      value = float(low + 0.4 * uniform());
      bool apart = true;
      for (int64_t c = 0; c < shape.C; ++c) apart = apart && std::fabs(std::fabs(cosine[n * shape.C + c]) - value) > clear;
      if (apart) break;
    }
    return value;
  }
};

}  // namespace check
