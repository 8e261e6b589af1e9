// Any machine. Four lanes of the compiler's vector extension, which it maps to SSE2, NEON or plain
// code; no instruction beyond the baseline.
#include "kernels.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#ifdef __clang__
#define SHUFFLE __builtin_shufflevector
#else  // GCC has that too, from 12 on
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) == (a)){__VA_ARGS__})
#endif

namespace rmsnorm::cpu {
namespace {

typedef float V __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(16)));
typedef uint64_t U64 __attribute__((vector_size(16)));
typedef double D __attribute__((vector_size(32)));
constexpr int kLanes = 4;

INLINE V set1(float a) { return V{a, a, a, a}; }
INLINE U select(U mask, U a, U b) { return (mask & a) | (~mask & b); }
INLINE bool all(U mask) { return (U64(mask)[0] & U64(mask)[1]) == ~uint64_t(0); }
INLINE bool likely(bool condition) { return __builtin_expect(condition, true); }

#include "bytes.inl"

INLINE V load(const float* p, int n) { return load_bytes<V>(p, n); }
INLINE void store(float* p, V v, int n) { store_bytes(p, v, n); }
INLINE uint64_t load_bits(const void* p, int n) { return load_bytes<uint64_t>(p, n); }
INLINE void store_bits(void* p, uint64_t bits, int n) { store_bytes(p, bits, n); }

// Four 16-bit elements are a word.
INLINE U spread(uint64_t four) {  // to the upper halves
  return U(SHUFFLE(U16{}, U16(U64{four, 0}), 0, 8, 1, 9, 2, 10, 3, 11));
}
INLINE uint64_t pack(U lower) {  // the lower halves, which have 0 above
  const U64 pairs = U64(lower);
  const U joined = U(pairs | pairs >> 16);
  return U64(SHUFFLE(joined, joined, 0, 2, 4, 6))[0];
}
constexpr uint64_t four(uint64_t element) { return element * 0x0001000100010001; }

INLINE V widen(uint64_t bits, BFloat16) { return V(spread(bits)); }

// Nearly all Halfs are normal numbers, which need another exponent bias and no more. The others are
// out of line.
constexpr uint32_t kBias = 112 << 23;
INLINE V widen_normal(U upper) { return V((U(I(upper) >> 3) & 0x8fffffff) + kBias); }
__attribute__((noinline)) V widen_any(U upper) {
  const U sign = upper & 0x80000000, rest = (upper ^ sign) >> 3;
  // Without an exponent, rest is units of 2^-24, and the difference exact. Inf and NaN are special.
  const U tiny = U(V(rest | 0x38800000) - set1(0x1p-14f));
  const U other = select(U(rest >= (31 << 23)), rest | 0x7f800000, rest + kBias);
  return V(sign | select(U(rest < (1 << 23)), tiny, other));
}
INLINE V widen(uint64_t bits, Half) {
  // An exponent of 1 to 30, and no other, has one of its upper four bits set when 1 is added.
  const uint64_t upper = ((bits & four(0x7c00)) + four(0x0400)) & four(0x7800);
  const bool normal = ((upper + four(0x7800)) & four(0x8000)) == four(0x8000);
  return likely(normal) ? widen_normal(spread(bits)) : widen_any(spread(bits));
}

INLINE uint64_t pack_upper(V v) { return pack(U(v) >> 16); }
INLINE U narrow_normal(U rest) { return (rest + ((rest >> 13) & 1) + (0xfff - kBias)) >> 13; }
__attribute__((noinline)) U narrow_any(U rest) {
  // 0.5 has units of 2^-24: the addition rounds.
  const U tiny = U(V(rest) + set1(0.5f)) - 0x3f000000;
  const U finite = select(U(rest < 0x38800000), tiny, narrow_normal(rest));
  const U special = select(U(rest > 0x7f800000), 0x7e00 | (rest >> 13 & 0x3ff), U{} + 0x7c00);
  return select(U(rest >= 0x47800000), special, finite);  // 2^16 and above, Inf, NaN
}
INLINE uint64_t narrow(V v, Half) {
  const U rest = U(v) & 0x7fffffff, sign = U(v) ^ rest;
  // The least int is 2^-14, the least normal Half.
  const I from_least = I(rest + (0x80000000 - 0x38800000));
  const bool normal = all(U(from_least < INT32_MIN + (0x47800000 - 0x38800000)));
  return pack((sign >> 16) | (likely(normal) ? narrow_normal(rest) : narrow_any(rest)));
}

INLINE V evens(V low, V high) { return SHUFFLE(low, high, 0, 2, 4, 6); }
INLINE V odds(V low, V high) { return SHUFFLE(low, high, 1, 3, 5, 7); }
INLINE V swap_pairs(V v) { return SHUFFLE(v, v, 1, 0, 3, 2); }

INLINE int32_t largest_lane(V v) {
  const I bits = I(v);
  const int32_t a = bits[0] > bits[1] ? bits[0] : bits[1];
  const int32_t b = bits[2] > bits[3] ? bits[2] : bits[3];
  return a > b ? a : b;
}

INLINE D to_double(V a) { return __builtin_convertvector(a, D); }
struct Doubles {
  D low, high;
};
INLINE void accumulate(Doubles& d, V low, V high) {
  d.low += to_double(low);
  d.high += to_double(high);
}
INLINE bool exceeds(const Doubles& d, double limit) {
  bool any = false;
  for (int i = 0; i < 4; ++i) any |= d.low[i] > limit || d.high[i] > limit;
  return any;
}
INLINE double total(const Doubles& d) {
  const D four = d.low + d.high;
  return (four[0] + four[2]) + (four[1] + four[3]);
}

#include "verbs.h"

struct Isa : OptionalVerbs {
  static constexpr const char* kNames[] = {"scalar"};
};

#include "backward.inl"
#include "forward.inl"
#include "gated.inl"
#include "quant.inl"
#include "rope.inl"

}  // namespace

const Kernels kScalar = {Isa::kNames[0], forward<false>, backward<false>,
                         dweight,        quantize,       gate_rows,
                         gate_gradients, rotate,         rope_forward<false>};

}  // namespace rmsnorm::cpu
