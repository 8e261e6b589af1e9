// AVX-512 F, BW, DQ, VL (Skylake-X 2017, Zen 4 2022 and later). See isa_avx2.cpp for the target
// region. BF16 (Cooper Lake 2020, Zen 4 2022 and later) makes a second set, in which a row whose
// results cannot be denormal, which BF16 flushes to 0, is rounded by it. The FP16 extension is not
// used: its conversions double-round.
#include "kernels.h"

#if RMSNORM_X86
#include <immintrin.h>

// GCC 12 finds its own _mm512_undefined() uninitialized, wherever it is inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace rmsnorm::cpu {
namespace {

using V = __m512;
constexpr int kLanes = 16;

INLINE V set1(float a) { return _mm512_set1_ps(a); }
INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
INLINE V load(const float* p, int n) {
  return n == kLanes ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first(n), p);
}
INLINE void store(float* p, V v, int n) {
  if (n == kLanes) return _mm512_storeu_ps(p, v);
  _mm512_mask_storeu_ps(p, first(n), v);
}

// 16 values of 16 bits.
INLINE __m256i load_bits(const void* p, int n) {
  return n == kLanes ? _mm256_loadu_si256(static_cast<const __m256i*>(p))
                     : _mm256_maskz_loadu_epi16(first(n), p);
}
INLINE void store_bits(void* p, __m256i bits, int n) {
  if (n == kLanes) return _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
  _mm256_mask_storeu_epi16(p, first(n), bits);
}

INLINE V widen(__m256i bits, Half) { return _mm512_cvtph_ps(bits); }
INLINE V widen(__m256i bits, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLINE __m256i narrow(V v, Half) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE __m256i pack_upper(V v) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
}

alignas(64) constexpr uint32_t kEven[] = {0,  2,  4,  6,  8,  10, 12, 14,
                                          16, 18, 20, 22, 24, 26, 28, 30};
INLINE V evens(V low, V high) {
  return _mm512_permutex2var_ps(low, _mm512_load_si512(kEven), high);
}
INLINE V odds(V low, V high) {
  const __m512i odd = _mm512_or_si512(_mm512_load_si512(kEven), _mm512_set1_epi32(1));
  return _mm512_permutex2var_ps(low, odd, high);
}

INLINE V swap_pairs(V v) { return _mm512_permute_ps(v, 0xb1); }

INLINE int32_t largest_lane(V v) { return _mm512_reduce_max_epi32(_mm512_castps_si512(v)); }

struct Doubles {
  __m512d v;
};
INLINE __m256 upper(V v) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}
INLINE void accumulate(Doubles& d, V v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), upper(v));
  d.v = _mm512_add_pd(d.v, _mm512_cvtps_pd(eight));
}
INLINE bool exceeds(const Doubles& d, double limit) {
  return _mm512_cmp_pd_mask(d.v, _mm512_set1_pd(limit), _CMP_GT_OQ) != 0;
}
INLINE double total(const Doubles& d) {
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(d.v), _mm512_extractf64x4_pd(d.v, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// Halves of a and of b added, for the sums of two rows at once.
INLINE __m512d add_halves(__m512d a, __m512d b) {
  return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x44), _mm512_shuffle_f64x2(a, b, 0xee));
}
INLINE __m512d add_quarters(__m512d a, __m512d b) {
  return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
}
alignas(64) constexpr uint16_t kInterleave[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

#include "verbs.h"

struct Isa : OptionalVerbs {
  static constexpr const char* kNames[] = {"avx512", "avx512_bf16"};

  static constexpr bool kFma = true;
  static INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static INLINE V fmsub(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }

  static INLINE V at_least(V v, V least) { return _mm512_max_ps(least, v); }
  static INLINE V scale_down(V v, V n) { return _mm512_scalef_ps(v, n); }

  // A core may load no more than 64 bytes in a cycle.
  template <class T>
  static INLINE T once(T v) {
    asm("" : "+v"(v));
    return v;
  }

  static constexpr bool kStreams = true;
  static INLINE void stream(void* p, V v) { _mm512_stream_ps(static_cast<float*>(p), v); }
  static INLINE void stream_bits(void* p, __m256i bits) {
    _mm256_stream_si256(static_cast<__m256i*>(p), bits);
  }
  static INLINE void fence() { _mm_sfence(); }

  static INLINE bool may_have_nan(Pair v) {
    return _mm512_cmp_ps_mask(v.even, v.odd, _CMP_UNORD_Q) != 0;
  }

  static constexpr bool kConverts16Bit = true, kUnrollsHeads = true;

  static constexpr int kGroupRows = 8, kTotals = 8;
  static INLINE void totals(const Doubles* d, double* sums) {
    const __m512d a = add_quarters(add_halves(d[0].v, d[2].v), add_halves(d[4].v, d[6].v));
    const __m512d b = add_quarters(add_halves(d[1].v, d[3].v), add_halves(d[5].v, d[7].v));
    _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b)));
  }

  // Half a unit is added; where nothing is left below, that was a tie, and goes to even. An
  // instruction less than rounded() and a mask: a rotation with each step rounded takes 0.88 times
  // as long (one core of an Emerald Rapids).
  static INLINE V round_to_bfloat16(V v) {
    const U32 sum = U32(v) + 0x8000;
    const __mmask16 ties = _mm512_testn_epi32_mask(__m512i(sum), _mm512_set1_epi32(0xffff));
    return V(_mm512_mask_and_epi32(__m512i(sum & 0xffff0000), ties, __m512i(sum),
                                   _mm512_set1_epi32(int(0xfffe0000))));
  }

  static constexpr bool kRoundsBFloat16 = true;
  static INLINE U32 round_pair(Pair v) {
    // 16 even elements, 16 odd ones.
    const __m512i halves = __m512i(_mm512_cvtne2ps_pbh(v.odd, v.even));
    return U32(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves));
  }
  // Then both addends are below 2^-118, for a BFloat16 is a multiple of 2^-7 times its power of
  // two: of neither is one of the upper four bits of the exponent set.
  static INLINE bool sum_may_be_denormal(U32 a, U32 b) {
    return _mm512_testn_epi16_mask(__m512i(a | b), _mm512_set1_epi16(0x7800)) != 0;
  }
  // An exponent from 96 on, less bias, is one from 128 on after 32 is added, which is seen in the
  // uppermost bit; the fast path has none from 192 on.
  static_assert(kSmallExponent == 96 - 127);
  struct SmallElements {
    __m512i large;

    // One that the compiler adds would be outside of the target region.
    INLINE SmallElements() : large(_mm512_set1_epi16(-1)) {}
    INLINE void look(U32 pairs) {
      const __m512i shifted = _mm512_add_epi16(__m512i(pairs), _mm512_set1_epi16(32 << 7));
      large = _mm512_and_si512(large, shifted);
    }
    INLINE bool any() const {
      return _mm512_testn_epi16_mask(large, _mm512_set1_epi16(1 << 14)) != 0;
    }
  };
};

#include "backward.inl"
#include "forward.inl"
#include "gated.inl"
#include "quant.inl"
#include "rope.inl"

}  // namespace

const Kernels kAvx512 = {Isa::kNames[0], forward<false>, backward<false>,
                         dweight,        quantize,       gate_rows,
                         gate_gradients, rotate,         rope_forward<false>};
const Kernels kAvx512Bf16 = {Isa::kNames[1], forward<true>, backward<true>,
                             dweight,        quantize,      gate_rows,
                             gate_gradients, rotate,        rope_forward<true>};

}  // namespace rmsnorm::cpu

#pragma GCC pop_options
#endif
