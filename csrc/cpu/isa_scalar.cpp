// Any machine. Four lanes of the compiler's vector extension, which it maps to SSE2, NEON or plain
// code; no instruction beyond the baseline.
#include "kernels.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace rmsnorm::cpu {
namespace {

typedef float V __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(8)));
typedef double D __attribute__((vector_size(32)));
struct Pair {
  V even, odd;
};
constexpr int kLanes = 4;
constexpr const char* kIsaNames[] = {"scalar"};
constexpr int kGroup = 4, kTotals = 1;

INLINE V set1(float a) { return V{a, a, a, a}; }
INLINE V zero() { return set1(0); }
INLINE V add(V a, V b) { return a + b; }
INLINE V sub(V a, V b) { return a - b; }
INLINE V mul(V a, V b) { return a * b; }
INLINE V mul_add(V a, V b, V c) { return a * b + c; }

INLINE D to_double(V a) { return __builtin_convertvector(a, D); }
INLINE V to_float(D a) { return __builtin_convertvector(a, V); }
constexpr bool kFma = false;
INLINE V mul_in_double(V v, double a) { return to_float(to_double(v) * a); }
INLINE V mul_in_double(V v, double a, V w) { return to_float(to_double(v) * a * to_double(w)); }

INLINE V once(V v) { return v; }

INLINE V as_float(U a) { return reinterpret_cast<V>(a); }
INLINE U as_bits(V a) { return reinterpret_cast<U>(a); }
INLINE U select(U mask, U a, U b) { return (mask & a) | (~mask & b); }

// n of the 4 elements from p on, as bytes: no alignment and no aliasing rule to keep. The remainder of a row has many
// of the incomplete ones, which are out of line for that.
template <class Vec, class T>
__attribute__((noinline)) Vec load_part(const T* p, int n) {
  Vec v = {};
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}
template <class Vec, class T>
__attribute__((noinline)) void store_part(T* p, Vec v, int n) {
  __builtin_memcpy(p, &v, n * sizeof(T));
}
template <class Vec, class T>
INLINE Vec load_bytes(const T* p, int n) {
  if (n != kLanes) return load_part<Vec>(p, n);
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class Vec, class T>
INLINE void store_bytes(T* p, Vec v, int n) {
  if (n != kLanes) return store_part(p, v, n);
  __builtin_memcpy(p, &v, sizeof v);
}

INLINE V widen(U bits, BFloat16) { return as_float(bits << 16); }
INLINE V widen(U bits, Half) {
  const U sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  const U tiny = as_bits(as_float(rest | 0x38800000) - set1(0x1p-14f));  // no exponent: rest units of 2^-24, exact
  const U special = rest | 0x7f800000;                                   // Inf and NaN
  const U normal = rest + (112 << 23);                                   // another exponent bias
  return as_float(sign | select(U(rest < (1 << 23)), tiny, select(U(rest >= (31 << 23)), special, normal)));
}

// Half a unit, less one bit for an even result: the upper half is the BFloat16, what is in the lower half is left over.
INLINE U rounded(V v) { return as_bits(v) + ((as_bits(v) >> 16) & 1) + 0x7fff; }
// A NaN keeps its upper half and is made quiet.
INLINE U narrow(V v, BFloat16) { return select(U(v != v), as_bits(v) | 0x400000, rounded(v)) >> 16; }
INLINE U narrow(V v, Half) {
  const U sign = as_bits(v) & 0x80000000, rest = as_bits(v) ^ sign;
  const U tiny = as_bits(as_float(rest) + set1(0.5f)) - 0x3f000000;  // 0.5 has units of 2^-24: the addition rounds
  const U normal = (rest + ((rest >> 13) & 1) + 0xfff - (112 << 23)) >> 13;
  const U finite = select(U(rest < 0x38800000), tiny, normal);
  const U special = select(U(rest > 0x7f800000), 0x7e00 | (rest >> 13 & 0x3ff), U{} + 0x7c00);
  return (sign >> 16) | select(U(rest >= 0x47800000), special, finite);  // 2^16 and above, Inf, NaN
}

INLINE V load(const float* p, int n) { return load_bytes<V>(p, n); }
INLINE void store(float* p, V v, int n) { store_bytes(p, v, n); }
template <class T>
INLINE U load_bits(const T* p, int n) {
  return __builtin_convertvector(load_bytes<U16>(p, n), U);
}
template <class T>
INLINE void store_bits(T* p, U bits, int n) {
  store_bytes(p, __builtin_convertvector(bits, U16), n);
}

INLINE V round_to_bfloat16(V v) { return as_float(rounded(v) & 0xffff0000); }
INLINE Pair split(const BFloat16* p) {
  const U both = load_bytes<U>(reinterpret_cast<const uint32_t*>(p), kLanes);
  return {as_float(both << 16), as_float(both & 0xffff0000)};
}
template <bool kStream, bool kUnit>
INLINE void join(BFloat16* p, Pair v) {
  const U both = (rounded(v.even) >> 16) | (rounded(v.odd) & 0xffff0000);
  store_bytes(reinterpret_cast<uint32_t*>(p), both, kLanes);
}

INLINE V outside(V weight, uint32_t bits, V seen) { return as_float((as_bits(weight) - bits) | as_bits(seen)); }
INLINE bool any_outside(V seen) {
  const U bits = as_bits(seen);
  return (bits[0] | bits[1] | bits[2] | bits[3]) >> 30 & 1;
}

constexpr bool kStreams = false;  // there is nothing to write past the caches with
INLINE void stream(float*, V) {}
INLINE void stream_bits(void*, U) {}
INLINE void fence() {}

struct Doubles {
  D low, high;
};
INLINE void accumulate(Doubles& d, V low, V high) {
  d.low += to_double(low);
  d.high += to_double(high);
}
INLINE double total(const Doubles& d) {
  const D four = d.low + d.high;
  return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE void totals(const Doubles* d, double* sums) { *sums = total(*d); }

// There is no instruction that rounds to BFloat16.
struct Large {
  INLINE Pair split(const BFloat16* p) { return rmsnorm::cpu::split(p); }
  INLINE bool any_small() const { return true; }
};

#include "kernels.inl"

}  // namespace

const Kernels kScalar = {kIsaNames[0], forward<false>, backward<false>, dweight};

}  // namespace rmsnorm::cpu
