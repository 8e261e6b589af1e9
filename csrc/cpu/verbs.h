// What an instruction set provides. An isa_*.cpp opens its target region and an anonymous
// namespace, defines the verbs of the first list, includes this file, defines Isa, and includes the
// kernels, an .inl for each family. No std:: calls and no #ifdef in any of them: see "The ISA trap"
// in isa_avx2.cpp.
//
// clang-format off
// Every instruction set has
//   V, kLanes                       a vector of fp32 lanes, with the compiler's operators
//   set1(a)                         a in all lanes
//   load(p, n)  store(p, v, n)      the first n lanes, of float
//   load_bits(p, n)  store_bits     the same of n elements of 16 bits
//   widen(bits, T())                Half or BFloat16 to fp32
//   narrow(v, Half())               rounded to nearest even
//   pack_upper(v)                   the upper 16 bits of each lane
//   evens(a, b)  odds(a, b)         the elements 0, 2, 4, ... and 1, 3, 5, ... of two vectors
//   largest_lane(v)                 of the lanes as integers
//   Doubles, accumulate(d, v...)    8 double lanes, plus the last 8 fp32 lanes of a sum
//   accumulate_squares(d, v...)     plus the squares of 8 elements after the other, exact in double
//   exceeds(d, limit)               is one of the lanes larger?
//   total(d)                        their sum, by halving
// and Isa::kNames. What else Isa may have is in OptionalVerbs.
// clang-format on
#pragma once

template <class A, class B>
constexpr bool kIsSame = false;
template <class A>
constexpr bool kIsSame<A, A> = true;
template <class T>
constexpr bool kIsFloat = kIsSame<T, float>;
template <class T>
constexpr bool kIsBFloat16 = kIsSame<T, BFloat16>;

typedef uint32_t U32 __attribute__((vector_size(sizeof(V)), may_alias));
typedef int32_t I32 __attribute__((vector_size(sizeof(V)), may_alias));
using Bits16 = decltype(load_bits(static_cast<const Half*>(nullptr), 0));  // kLanes elements

#define VERB(type, call) static_assert(__is_same(decltype(call), type), #type " " #call)
static_assert(sizeof(V) == kLanes * sizeof(float) && sizeof(Bits16) == kLanes * sizeof(Half));
VERB(V, set1(0.0f));
VERB(V, load(static_cast<const float*>(nullptr), kLanes));
VERB(void, store(static_cast<float*>(nullptr), V(), kLanes));
VERB(void, store_bits(static_cast<Half*>(nullptr), Bits16(), kLanes));
VERB(V, widen(Bits16(), Half()));
VERB(V, widen(Bits16(), BFloat16()));
VERB(Bits16, narrow(V(), Half()));
VERB(Bits16, pack_upper(V()));
VERB(V, evens(V(), V()));
VERB(V, odds(V(), V()));
VERB(int32_t, largest_lane(V()));
VERB(bool, exceeds(Doubles(), 0.0));
VERB(double, total(Doubles()));
#undef VERB

// The even and the odd elements of 2 * kLanes.
struct Pair {
  V even, odd;
};
INLINE Pair unmix(V low, V high) { return {evens(low, high), odds(low, high)}; }

// Half a unit, less one bit for an even result: the upper half is the BFloat16, what is in the
// lower half is left over. Not for NaN.
INLINE U32 rounded(V v) { return U32(v) + ((U32(v) >> 16) & 1) + 0x7fff; }

// Isa hides what it has or has better. What is only declared here goes with the flag above it.
struct OptionalVerbs {
  static constexpr bool kFma = false;  // a * b + c and a * b - c, rounded once
  static V fma(V a, V b, V c);
  static V fmsub(V a, V b, V c);
  template <class T>
  static INLINE T mul_in_double(T v, double a) {
    typedef double D __attribute__((vector_size(2 * sizeof(T))));
    return __builtin_convertvector(__builtin_convertvector(v, D) * a, T);
  }
  template <class T>
  static INLINE T mul_in_double(T v, double a, T w) {
    typedef double D __attribute__((vector_size(2 * sizeof(T))));
    return __builtin_convertvector(
        __builtin_convertvector(v, D) * a * __builtin_convertvector(w, D), T);
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

  // The upper halves of both.
  static INLINE U32 interleave(U32 even, U32 odd) { return even >> 16 | (odd & 0xffff0000); }

  // Rounds to BFloat16 and interleaves, by an instruction that takes denormals for 0.
  static constexpr bool kRoundsBFloat16 = false;
  static U32 round_pair(Pair v);
  static bool any_denormal(Pair a, Pair b);
  struct SmallElements {  // was one of the BFloat16 below 2^kSmallExponent?
    INLINE void look(U32) {}
    INLINE bool any() const { return true; }
  };
};
