// 16-bit arithmetic: two operands per 32-bit lane, multiplied and added in one instruction. Included only by kernels.inc.
// RF_PAIRS chooses the format: RF_INT16 fixed point (a step per row, int32 sums: exact until the last rounding; pmaddwd,
// vpdpwssd) or RF_BF16 (vdpbf16ps). value = step * operand. ISAs without the instruction get the same in plain vectors.

// bfloat16 of `a` (low half) and `b` (high half), rounded to nearest even; a NaN stays one.
static inline vi round_bf16(vf a) {
  vi bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  const vi rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return a != a ? bits | 0x400000 : rounded;
}
#if RF_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
// The instruction leaves a's values in the low half of the vector; it takes denormals for 0, as the products do.
typedef int16_t vs __attribute__((vector_size(RF_VECTOR_BYTES)));
static inline vi pack_bf16(vf a, vf b) {
  const vs in_turn = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return vi(_mm512_permutexvar_epi16(__m512i(in_turn), (__m512i)_mm512_cvtne2ps_pbh(__m512(b), __m512(a))));
}
#else
static inline vi pack_bf16(vf a, vf b) { return ((round_bf16(a) >> 16) & 0xffff) | (round_bf16(b) & int32_t(0xffff0000)); }
#endif

static inline vf as_float(vi bits) {
  vf value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
static inline vf low_bf16(vi pair) { return as_float(pair << 16); }
static inline vf high_bf16(vi pair) { return as_float(pair & int32_t(0xffff0000)); }

#if RF_PAIRS == RF_INT16

typedef vi vsum;
constexpr float kLargest = 32767.0f;
constexpr float kLargestSum = 65000.0f;  // sum |q| of one operand of a product: times 32767 it stays inside int32

// The step at which `largest` is representable and products with rows of norm <= 32767 steps cannot overflow.
static inline vf step_of(vf largest, vf total) { return maximum(total * (1.0f / kLargestSum), largest * (1.0f / kLargest)); }
static inline float step_of(float norm) { return norm * (1.0f / kLargest); }

static inline vi whole_bits(vf a) {  // |a| < 2^22: the low half of the bits is the nearest integer
  const vf shifted = a + 12582912.0f;
  vi bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return bits;
}
static inline vi pack_pair(vf a, vf b) { return (whole_bits(a) & 0xffff) | (whole_bits(b) << 16); }
static inline vf low_pair(vi pair) { return __builtin_convertvector((pair << 16) >> 16, vf); }
static inline vf high_pair(vi pair) { return __builtin_convertvector(pair >> 16, vf); }
static inline vf sum_value(vsum sum) { return __builtin_convertvector(sum, vf); }

static inline vsum add_products(vsum sum, vi left, vi right) {
#if RF_VECTOR_BYTES == 64 && defined(__AVX512VNNI__)
  return vsum(_mm512_dpwssd_epi32(__m512i(sum), __m512i(left), __m512i(right)));
#elif RF_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return sum + vsum(_mm512_madd_epi16(__m512i(left), __m512i(right)));
#elif RF_VECTOR_BYTES == 32 && defined(__AVX2__)
  return sum + vsum(_mm256_madd_epi16(__m256i(left), __m256i(right)));
#else
  return sum + ((left << 16) >> 16) * ((right << 16) >> 16) + (left >> 16) * (right >> 16);
#endif
}

#else  // RF_BF16

typedef vf vsum;
static inline vf step_of(vf, vf) { return splat(1.0f); }
static inline float step_of(float norm) { return norm == norm ? 1.0f : norm; }
static inline vi pack_pair(vf a, vf b) { return pack_bf16(a, b); }
static inline vf low_pair(vi pair) { return low_bf16(pair); }
static inline vf high_pair(vi pair) { return high_bf16(pair); }
static inline vf sum_value(vsum sum) { return sum; }

static inline vsum add_products(vsum sum, vi left, vi right) {
#if RF_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
  return vsum(_mm512_dpbf16_ps(__m512(sum), (__m512bh)(left), (__m512bh)(right)));
#else
  return sum + low_bf16(left) * low_bf16(right) + high_bf16(left) * high_bf16(right);
#endif
}

#endif

// C(m, :) (+)= step[m] * sum_k A(m, k) B(k, :): A(m, k) = a[m * row + k * column] pairs, B's panel kPanel lanes of pairs.
template <int M>
static inline void micro_pairs(Fetch& fetch, const int32_t* a, int64_t row, int64_t column, const int32_t* b, int64_t stride, const float* step,
                               float* c, int64_t ldc, int64_t depth, bool accumulate) {
  vsum sum[M][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[m][v] = vsum{};
  Fetch lines = fetch;
  for (int64_t k = 0; k < depth; ++k) {
    lines.step();
    vi right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load_int(b + k * stride + v * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vi left = splat_int(a[m * row + k * column]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[m][v] = add_products(sum[m][v], left, right[v]);
    }
  }
  fetch = lines;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + m * ldc + v * kWidth;
      const vf product = sum_value(sum[m][v]) * step[m];
      store(at, accumulate ? load(at) + product : product);
    }
}

template <int M>
static void micro_pairs_tail(Fetch& fetch, int64_t count, const int32_t* a, int64_t row, int64_t column, const int32_t* b, int64_t stride,
                             const float* step, float* c, int64_t ldc, int64_t depth, bool accumulate) {
  if (count == M) return micro_pairs<M>(fetch, a, row, column, b, stride, step, c, ldc, depth, accumulate);
  if constexpr (M > 1) micro_pairs_tail<M - 1>(fetch, count, a, row, column, b, stride, step, c, ldc, depth, accumulate);
}

// One panel of C, sliced along k so that a panel of B stays in L1 (and int32 sums of N > 512 rows in range).
static inline void gemm_pairs(Fetch& fetch, int64_t count, const int32_t* a, int64_t row, int64_t column, const int32_t* b, int64_t stride,
                              const float* step, float* c, int64_t ldc, int64_t depth, bool accumulate) {
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {  // depth 0 (no rows) writes zeros
    const int64_t slice = depth - k < kDepth ? depth - k : kDepth;
    const int32_t* left = a + k * column;
    const int32_t* right = b + k * stride;
    int64_t m = 0;
    for (; m + kRowsAtOnce <= count; m += kRowsAtOnce)
      micro_pairs<kRowsAtOnce>(fetch, left + m * row, row, column, right, stride, step + m, c + m * ldc, ldc, slice, accumulate || k > 0);
    if (m < count)
      micro_pairs_tail<kRowsAtOnce - 1>(fetch, count - m, left + m * row, row, column, right, stride, step + m, c + m * ldc, ldc, slice,
                                        accumulate || k > 0);
  }
}
