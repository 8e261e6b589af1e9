// AVX2 + FMA + F16C (Haswell 2013, Zen 2017 and later).
//
// The ISA trap: inline functions compiled with -mavx2 become weak symbols, of which the linker
// keeps one for the whole library, and an older CPU crashes in it. Hence a target region, which the
// headers stay out of, instead of a compiler flag, and internal linkage for all that is inside.
#include "kernels.h"

#if RMSNORM_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace rmsnorm::cpu {
namespace {

using V = __m256;
constexpr int kLanes = 8;

INLINE V set1(float a) { return _mm256_set1_ps(a); }
INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE V load(const float* p, int n) {
  return n == kLanes ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(n));
}
INLINE void store(float* p, V v, int n) {
  if (n == kLanes) return _mm256_storeu_ps(p, v);
  _mm256_maskstore_ps(p, first(n), v);
}
// AVX2 has no masked access to 16 bits.
#include "bytes.inl"
INLINE __m128i load_bits(const void* p, int n) { return load_bytes<__m128i>(p, n); }
INLINE void store_bits(void* p, __m128i bits, int n) { store_bytes(p, bits, n); }

INLINE V widen(__m128i bits, Half) { return _mm256_cvtph_ps(bits); }
INLINE V widen(__m128i bits, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INLINE __m128i narrow(V v, Half) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLINE __m128i pack_upper(V v) {
  const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

INLINE V in_order(__m256 v) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}
// Shuffles stay within a half.
INLINE V evens(V low, V high) { return in_order(_mm256_shuffle_ps(low, high, 0x88)); }
INLINE V odds(V low, V high) { return in_order(_mm256_shuffle_ps(low, high, 0xdd)); }

INLINE V swap_pairs(V v) { return _mm256_permute_ps(v, 0xb1); }

INLINE int32_t largest_lane(V v) {
  const __m256i eight = _mm256_castps_si256(v);
  const __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

struct Doubles {
  __m256d low, high;
};
INLINE void accumulate(Doubles& d, V v) {
  d.low = _mm256_add_pd(d.low, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  d.high = _mm256_add_pd(d.high, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
}
INLINE bool exceeds(const Doubles& d, double limit) {
  const __m256d larger = _mm256_max_pd(d.low, d.high);
  return _mm256_movemask_pd(_mm256_cmp_pd(larger, _mm256_set1_pd(limit), _CMP_GT_OQ)) != 0;
}
INLINE double total(const Doubles& d) {
  const __m256d four = _mm256_add_pd(d.low, d.high);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

#include "verbs.h"

struct Isa : OptionalVerbs {
  static constexpr const char* kNames[] = {"avx2"};

  static constexpr bool kFma = true;
  static INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static INLINE V fmsub(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }

  template <class T>
  static INLINE T once(T v) {
    asm("" : "+x"(v));
    return v;
  }

  static INLINE V at_least(V v, V least) { return _mm256_max_ps(least, v); }

  static constexpr bool kStreams = true;
  static INLINE void stream(void* p, V v) { _mm256_stream_ps(static_cast<float*>(p), v); }
  static INLINE void stream_bits(void* p, __m128i bits) {
    _mm_stream_si128(static_cast<__m128i*>(p), bits);
  }
  static INLINE void fence() { _mm_sfence(); }

  static INLINE bool may_have_nan(Pair v) {
    return _mm256_movemask_ps(_mm256_cmp_ps(v.even, v.odd, _CMP_UNORD_Q)) != 0;
  }

  static constexpr bool kConverts16Bit = true, kUnrollsHeads = true;

  static INLINE U32 interleave(U32 even, U32 odd) {
    return U32(_mm256_blend_epi16(__m256i(even >> 16), __m256i(odd), 0xaa));
  }
};

#include "backward.inl"
#include "forward.inl"
#include "gated.inl"
#include "quant.inl"
#include "rope.inl"

}  // namespace

const Kernels kAvx2 = {Isa::kNames[0], forward<false>, backward<false>,
                       dweight,        quantize,       gate_rows,
                       gate_gradients, rotate,         rope_forward<false>};

}  // namespace rmsnorm::cpu

#pragma GCC pop_options
#endif
