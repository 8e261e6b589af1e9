// The AVX-512 intrinsics of csrc/cpu/isa_avx512.cpp as AVX2 code, from Intel's description of each,
// for machines without AVX-512. Use: cpu_avx512_emulated.sh
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define EMU static inline __attribute__((always_inline, unused))

namespace emulated {

typedef uint32_t U32x16 __attribute__((vector_size(64)));

template <class To, class From>
EMU To half(From v, int i) {
  To result;
  std::memcpy(&result, reinterpret_cast<const char*>(&v) + i * sizeof(To), sizeof(To));
  return result;
}
template <class To, class From>
EMU To join(From low, From high) {
  To result;
  std::memcpy(&result, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&result) + sizeof low, &high, sizeof high);
  return result;
}

EMU __m512 set1(float a) { return join<__m512>(_mm256_set1_ps(a), _mm256_set1_ps(a)); }
EMU __m512i set1(int a) { return join<__m512i>(_mm256_set1_epi32(a), _mm256_set1_epi32(a)); }
EMU __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return join<__m512>(_mm256_fmadd_ps(half<__m256>(a, 0), half<__m256>(b, 0), half<__m256>(c, 0)),
                      _mm256_fmadd_ps(half<__m256>(a, 1), half<__m256>(b, 1), half<__m256>(c, 1)));
}
EMU __m512 load(const void* p) {
  __m512 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
EMU void store(void* p, __m512 v) { std::memcpy(p, &v, sizeof v); }
template <class V, class T>
EMU V masked_load(unsigned mask, const void* p) {
  T lane[sizeof(V) / sizeof(T)] = {};
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) lane[i] = static_cast<const T*>(p)[i];
  V v;
  std::memcpy(&v, lane, sizeof v);
  return v;
}
template <class T, class V>
EMU void masked_store(void* p, unsigned mask, V v) {
  T lane[sizeof(V) / sizeof(T)];
  std::memcpy(lane, &v, sizeof v);
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) static_cast<T*>(p)[i] = lane[i];
}
EMU __m512 from_half(__m256i v) {
  return join<__m512>(_mm256_cvtph_ps(half<__m128i>(v, 0)), _mm256_cvtph_ps(half<__m128i>(v, 1)));
}
EMU __m256i to_half(__m512 v) {
  return join<__m256i>(_mm256_cvtps_ph(half<__m256>(v, 0), 0),
                       _mm256_cvtps_ph(half<__m256>(v, 1), 0));
}
EMU __m512i widen16(__m256i v) {
  return join<__m512i>(_mm256_cvtepu16_epi32(half<__m128i>(v, 0)),
                       _mm256_cvtepu16_epi32(half<__m128i>(v, 1)));
}
EMU __m256i cut16(__m512i v) {
  uint32_t from[16];
  uint16_t to[16];
  std::memcpy(from, &v, sizeof from);
  for (int i = 0; i < 16; ++i) to[i] = uint16_t(from[i]);
  __m256i result;
  std::memcpy(&result, to, sizeof to);
  return result;
}
EMU int32_t largest(__m512i v) {
  int32_t lanes[16], result = INT32_MIN;
  std::memcpy(lanes, &v, sizeof lanes);
  for (const int32_t lane : lanes) result = lane > result ? lane : result;
  return result;
}
EMU __m512d fmadd(__m512d a, __m512d b, __m512d c) {
  return join<__m512d>(
      _mm256_fmadd_pd(half<__m256d>(a, 0), half<__m256d>(b, 0), half<__m256d>(c, 0)),
      _mm256_fmadd_pd(half<__m256d>(a, 1), half<__m256d>(b, 1), half<__m256d>(c, 1)));
}
EMU unsigned any_greater(__m512d a, __m512d b) {
  unsigned any = 0;
  for (int i = 0; i < 8; ++i) any |= unsigned(a[i] > b[i]);
  return any;
}
EMU __m512d to_doubles(__m256 v) {
  return join<__m512d>(_mm256_cvtps_pd(half<__m128>(v, 0)), _mm256_cvtps_pd(half<__m128>(v, 1)));
}

template <class T>
EMU __m512i each(T (*value)(const T*, const T*, int), __m512i a, __m512i b) {
  constexpr int kCount = 64 / sizeof(T);
  T x[kCount], y[kCount], result[kCount];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < kCount; ++i) result[i] = value(x, y, i);
  __m512i v;
  std::memcpy(&v, result, sizeof v);
  return v;
}
// Denormals are taken for 0 on the way in and on the way out; the elements of b come first.
static uint16_t to_bfloat16(const uint32_t* a, const uint32_t* b, int i) {
  const uint32_t bits = i < 16 ? b[i] : a[i - 16], magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((magnitude < 0x800000 ? bits & 0x80000000 : bits + 0x7fff + (bits >> 16 & 1)) >>
                  16);
}
EMU __m512i to_bfloat16(__m512 a, __m512 b) {
  uint32_t x[16], y[16];
  uint16_t result[32];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 32; ++i) result[i] = to_bfloat16(x, y, i);
  __m512i v;
  std::memcpy(&v, result, sizeof v);
  return v;
}
static uint16_t pick(const uint16_t* index, const uint16_t* from, int i) {
  return from[index[i] & 31];
}
static uint16_t sum(const uint16_t* a, const uint16_t* b, int i) { return uint16_t(a[i] + b[i]); }
EMU __m512 pick(__m512 a, __m512i index, __m512 b) {
  uint32_t at[16];
  float from[32], result[16];
  std::memcpy(at, &index, sizeof at);
  store(from, a);
  store(from + 16, b);
  for (int i = 0; i < 16; ++i) result[i] = from[at[i] & 31];
  return load(result);
}
EMU __m512i set1_16(int a) { return set1(int((a & 0xffff) * 0x10001u)); }
EMU unsigned none_common_16(__m512i a, __m512i b) {
  uint16_t common[32];
  const __m512i both = a & b;
  std::memcpy(common, &both, sizeof common);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= unsigned(common[i] == 0) << i;
  return mask;
}
EMU unsigned none_common_32(__m512i a, __m512i b) {
  const U32x16 both = reinterpret_cast<U32x16>(a & b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned(both[i] == 0) << i;
  return mask;
}
EMU __m512i masked_and(__m512i other, unsigned mask, __m512i a, __m512i b) {
  const U32x16 both = reinterpret_cast<U32x16>(a & b);
  U32x16 result = reinterpret_cast<U32x16>(other);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) result[i] = both[i];
  }
  return reinterpret_cast<__m512i>(result);
}
EMU unsigned unordered(__m512 a, __m512 b) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned(a[i] != a[i] || b[i] != b[i]) << i;
  return mask;
}
EMU __m512 max(__m512 a, __m512 b) {
  return join<__m512>(_mm256_max_ps(half<__m256>(a, 0), half<__m256>(b, 0)),
                      _mm256_max_ps(half<__m256>(a, 1), half<__m256>(b, 1)));
}
EMU __m512 scalef(__m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a[i] = b[i] == b[i] ? std::ldexp(a[i], int(std::floor(b[i]))) : b[i];
  return a;
}
// Element i of the result is element place(i) of a and b together.
template <class F>
EMU __m512d gather(__m512d a, __m512d b, F place) {
  double from[16], to[8];
  std::memcpy(from, &a, sizeof a);
  std::memcpy(from + 8, &b, sizeof b);
  for (int i = 0; i < 8; ++i) to[i] = from[place(i)];
  __m512d v;
  std::memcpy(&v, to, sizeof v);
  return v;
}
EMU __m512d shuffle_pairs(__m512d a, __m512d b, int control) {
  return gather(a, b,
                [=](int i) { return 8 * (i / 4) + 2 * (control >> 2 * (i / 2) & 3) + i % 2; });
}
EMU __m512d unpack(__m512d a, __m512d b, int odd) {
  return gather(a, b, [=](int i) { return 8 * (i % 2) + i / 2 * 2 + odd; });
}

}  // namespace emulated

#define _mm512_set1_ps(a) emulated::set1(float(a))
#define _mm512_set1_epi32(a) emulated::set1(int(a))
#define _mm512_fmadd_ps(a, b, c) emulated::fmadd(a, b, c)
#define _mm512_fmsub_ps(a, b, c) emulated::fmadd(a, b, -(c))
#define _mm512_max_ps(a, b) emulated::max(a, b)
#define _mm512_scalef_ps(a, b) emulated::scalef(a, b)
#define _mm512_loadu_ps(p) emulated::load(p)
#define _mm512_storeu_ps(p, v) emulated::store(p, v)
#define _mm512_maskz_loadu_ps(m, p) emulated::masked_load<__m512, float>(m, p)
#define _mm512_mask_storeu_ps(p, m, v) emulated::masked_store<float>(p, m, v)
#define _mm256_maskz_loadu_epi16(m, p) emulated::masked_load<__m256i, uint16_t>(m, p)
#define _mm256_mask_storeu_epi16(p, m, v) emulated::masked_store<uint16_t>(p, m, v)
#define _mm512_cvtph_ps(v) emulated::from_half(v)
#define _mm512_cvtps_ph(v, rounding) emulated::to_half(v)
#define _mm512_castps_si512(v) reinterpret_cast<__m512i>(v)
#define _mm512_castsi512_ps(v) reinterpret_cast<__m512>(v)
#define _mm512_castps_pd(v) reinterpret_cast<__m512d>(v)
#define _mm512_cvtepu16_epi32(v) emulated::widen16(v)
#define _mm512_cvtepi32_epi16(v) emulated::cut16(v)
#define _mm512_slli_epi32(v, n) \
  reinterpret_cast<__m512i>(reinterpret_cast<emulated::U32x16>(v) << (n))
#define _mm512_srli_epi32(v, n) \
  reinterpret_cast<__m512i>(reinterpret_cast<emulated::U32x16>(v) >> (n))
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_stream_ps(p, v) emulated::store(p, v)
#define _mm512_castps512_ps256(v) emulated::half<__m256>(v, 0)
#define _mm512_castpd512_pd256(v) emulated::half<__m256d>(v, 0)
#define _mm512_extractf64x4_pd(v, i) emulated::half<__m256d>(v, i)
#define _mm512_add_pd(a, b) ((a) + (b))
#define _mm512_cvtps_pd(v) emulated::to_doubles(v)
#define _mm512_fmadd_pd(a, b, c) emulated::fmadd(a, b, c)
#define _mm512_set1_pd(a) (__m512d{a, a, a, a, a, a, a, a})
#define _mm512_cmp_pd_mask(a, b, predicate) emulated::any_greater(a, b)
#define _mm512_reduce_max_epi32(v) emulated::largest(v)
#define _mm512_storeu_pd(p, v) std::memcpy(p, &static_cast<const __m512d&>(v), 64)
#define _mm512_shuffle_f64x2(a, b, control) emulated::shuffle_pairs(a, b, control)
#define _mm512_unpacklo_pd(a, b) emulated::unpack(a, b, 0)
#define _mm512_unpackhi_pd(a, b) emulated::unpack(a, b, 1)
#define _mm512_cvtne2ps_pbh(a, b) emulated::to_bfloat16(a, b)
#define _mm512_permutexvar_epi16(index, v) emulated::each(emulated::pick, index, v)
#define _mm512_permutex2var_ps(a, index, b) emulated::pick(a, index, b)
#define _mm512_permute_ps(v, order)                                              \
  emulated::join<__m512>(_mm256_permute_ps(emulated::half<__m256>(v, 0), order), \
                         _mm256_permute_ps(emulated::half<__m256>(v, 1), order))
#define _mm512_load_si512(p) reinterpret_cast<__m512i>(emulated::load(p))
#define _mm512_set1_epi16(a) emulated::set1_16(a)
#define _mm512_add_epi16(a, b) emulated::each(emulated::sum, a, b)
#define _mm512_testn_epi16_mask(a, b) emulated::none_common_16(a, b)
#define _mm512_testn_epi32_mask(a, b) emulated::none_common_32(a, b)
#define _mm512_mask_and_epi32(other, mask, a, b) emulated::masked_and(other, mask, a, b)
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::unordered(a, b)

#pragma GCC pop_options
