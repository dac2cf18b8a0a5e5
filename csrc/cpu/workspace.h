// Packed operands and lane tables of one call.
#pragma once

#include <vector>

#include "driver.h"

namespace recog_fast::cpu {

struct Workspace {
  Plan plan;
  const Sweeps* sweeps = nullptr;  // in the arithmetic of the call

  Workspace(const Classes& classes, const Rows& rows, const Kernels& kernels);
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void pack_terms(const RowTerms& terms);
  void pack_embeddings(bool columns);  // the operands of the logits and, for a class sweep, of the class gradient
  void pack_float_rows();              // x itself, for element lists
  void pack_wide_rows(const float* low);  // x + low, for the large classes of unlabelled rows
  void keep(const Kept& kept);         // where the exponentials are, as many blocks as fit

  int64_t blocks() const { return (plan.classes.C + plan.block_classes - 1) / plan.block_classes; }

 private:
  Array<float> x_panels_, x_columns_, x_rows_, rules_, terms_, floor_;
  Array<double> x_wide_;
  Array<int32_t> pair_panels_, pair_columns_;
  std::vector<Target> targets_;
  Rows rows_;
  const Kernels& kernels_;

  void pack_float_panels();
  void pack_float_columns();
  void pack_rules();
  void pack_targets();
};

}  // namespace recog_fast::cpu
