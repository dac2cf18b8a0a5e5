// Rows of W that a sampled sweep passes over. Included only by class_block.h.

// The classes between members[first - 1] and members[last - 1] that are no members (the last block: to the end of W): their
// gradient is 0, and a step moves them by momentum and decay alone unless it is sparse.
static void unsampled_rows(const Plan& plan, const ClassOutput& out, int64_t first, int64_t last, Scratch& scratch) {
  const Classes& c = plan.classes;
  if (out.mode == kStep && out.sparse) return;
  for (int64_t d = 0; d < c.D; ++d) scratch.rows[d] = 0.0f;
  const int64_t gaps = last < c.C ? last : c.C + 1;  // the one after the last member too
  for (int64_t m = first; m < gaps; ++m) {
    const int64_t begin = m == 0 ? 0 : c.members[m - 1] + 1, end = m < c.C ? c.members[m] : c.all;
    if (out.mode == kStep) {
      for (int64_t r = begin * c.K; r < end * c.K; ++r) sgd_row(out, Chain{}, r * c.D, c.D, scratch.rows);
    } else if (begin < end) {
      __builtin_memset(out.gradient + begin * c.K * c.D, 0, sizeof(float) * uint64_t((end - begin) * c.K * c.D));
    }
  }
}
