// What an instruction set provides. An isa_*.cpp opens its target region and an anonymous
// namespace, defines the verbs that are checked here, includes this file, defines Isa with its
// kNames and what it has of OptionalVerbs, and includes the kernels, an .inl for each family. No
// std:: calls and no #ifdef in any of them: see "The ISA trap" in isa_avx2.cpp.
#pragma once

template <class A, class B>
constexpr bool kIsSame = __is_same(A, B);
template <class T>
constexpr bool kIsFloat = __is_same(T, float);
template <class T>
constexpr bool kIsBFloat16 = __is_same(T, BFloat16);

// V: a vector of kLanes of fp32, with the compiler's operators. Doubles: 8 lanes of double, whose
// accumulate(d, v...) adds the last 8 fp32 lanes of a sum.
typedef uint32_t U32 __attribute__((vector_size(sizeof(V)), may_alias));
typedef int32_t I32 __attribute__((vector_size(sizeof(V)), may_alias));
constexpr float* kFloats = nullptr;
constexpr Half* kHalfs = nullptr;
using Bits16 = decltype(load_bits(kHalfs, 0));  // kLanes elements
static_assert(sizeof(V) == kLanes * sizeof(float) && sizeof(Bits16) == kLanes * sizeof(Half));
#define VERB(type, call) static_assert(__is_same(decltype(call), type), #type " " #call)
VERB(V, set1(0.0f));             // in all lanes
VERB(V, load(kFloats, kLanes));  // the first n lanes
VERB(void, store(kFloats, V(), kLanes));
VERB(void, store_bits(kHalfs, Bits16(), kLanes));  // and load_bits: the same of 16 bits
VERB(V, widen(Bits16(), Half()));
VERB(V, widen(Bits16(), BFloat16()));
VERB(Bits16, narrow(V(), Half()));    // rounded to nearest even
VERB(Bits16, pack_upper(V()));        // the upper 16 bits of each lane
VERB(V, evens(V(), V()));             // the elements 0, 2, 4, ... of two vectors
VERB(V, odds(V(), V()));              // 1, 3, 5, ...
VERB(V, swap_pairs(V()));             // 1, 0, 3, 2, 5, 4, ...
VERB(int32_t, largest_lane(V()));     // of the lanes as integers
VERB(bool, exceeds(Doubles(), 0.0));  // is one of the lanes larger?
VERB(double, total(Doubles()));       // the sum of the lanes, by halving
#undef VERB

// The even and the odd elements of 2 * kLanes.
struct Pair {
  V even, odd;
};

// Half a unit, less one bit for an even result: the upper half is the BFloat16, what is in the
// lower half is left over. Not for NaN.
INLINE U32 rounded(V v) { return U32(v) + ((U32(v) >> 16) & 1) + 0x7fff; }

// Isa hides what it has or has better. What is only declared here goes with the flag above it.
struct OptionalVerbs {
  static constexpr bool kFma = false;  // does fma() round once? Then fmsub() is a * b - c
  static INLINE V fma(V a, V b, V c) { return a * b + c; }
  static V fmsub(V a, V b, V c);
  template <class T, class... W>
  static INLINE T mul_in_double(T v, double a, W... w) {
    typedef double D __attribute__((vector_size(2 * sizeof(T))));
    return __builtin_convertvector(
        ((__builtin_convertvector(v, D) * a) * ... * __builtin_convertvector(w, D)), T);
  }

  // A NaN stays.
  static INLINE V at_least(V v, V least) { return v < least ? least : v; }

  // v * 2^n of a whole n from -150 to 0, rounded once: in two steps, of which the first is exact.
  static INLINE V scale_down(V v, V n) {
    const I32 exponent = __builtin_convertvector(n, I32), half = exponent >> 1;
    return v * V((half + 127) << 23) * V((exponent - half + 127) << 23);
  }

  // v in a register before it is used, where the compiler would load it for each use.
  template <class T>
  static INLINE T once(T v) {
    return v;
  }

  // Writes whole vectors past the caches, at an aligned address.
  static constexpr bool kStreams = false;
  static void stream(void* p, V v);
  static void stream_bits(void* p, Bits16 bits);
  static INLINE void fence() {}  // orders them before later writes

  static constexpr bool kConverts16Bit = false;  // one instruction each way: cheaper than a tile
  static constexpr bool kUnrollsHeads = false;   // rows of 64 and 128 columns gain from it

  // Rows whose square roots and divisions are done together, and how many sums one totals() makes.
  static constexpr int kGroupRows = 4, kTotals = 1;
  static INLINE void totals(const Doubles* d, double* sums) { *sums = total(*d); }

  static INLINE bool may_have_nan(Pair) { return true; }

  static INLINE V round_to_bfloat16(V v) { return V(rounded(v) & 0xffff0000); }

  // The upper halves of both.
  static INLINE U32 interleave(U32 even, U32 odd) { return even >> 16 | (odd & 0xffff0000); }

  // Rounds to BFloat16 and interleaves, by an instruction that takes denormals for 0.
  static constexpr bool kRoundsBFloat16 = false;
  static U32 round_pair(Pair v);
  static bool sum_may_be_denormal(U32 a, U32 b);  // of BFloat16

  struct SmallElements {  // was one of the BFloat16 below 2^kSmallExponent?
    INLINE void look(U32) {}
    INLINE bool any() const { return true; }
  };
};
