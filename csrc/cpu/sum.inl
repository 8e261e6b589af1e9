// Loads and stores by type, the walk along a row, and its sum of products.
#pragma once

template <class T>
INLINE V load(const T* p, int n) {
  return widen(load_bits(p, n), T());
}

// A NaN keeps its upper half and is made quiet.
INLINE Bits16 narrow(V v, BFloat16) {
  return pack_upper(V(v != v ? U32(v) | 0x400000 : rounded(v)));
}
template <class T>
INLINE void store(T* p, V v, int n) {
  store_bits(p, narrow(v, T()), n);
}
// The values that load() gives back.
template <class T>
INLINE V round_and_store(T* p, V v, int n) {
  if constexpr (kIsFloat<T>) {
    store(p, v, n);
    return v;
  } else {
    const Bits16 bits = narrow(v, T());
    store_bits(p, bits, n);
    return widen(bits, T());
  }
}
// kStream: n is kLanes, and p is aligned.
template <bool kStream, class T>
INLINE void write(T* p, V v, int n) {
  if constexpr (!kStream) {
    store(p, v, n);
  } else if constexpr (kIsFloat<T>) {
    Isa::stream(p, v);
  } else {
    Isa::stream_bits(p, narrow(v, T()));
  }
}

// The values that store(T*) and load(const T*) would give back; BFloat16 not for NaN.
template <class T>
INLINE V round_to(V v) {
  if constexpr (kIsFloat<T>) return v;
  if constexpr (kIsBFloat16<T>) return Isa::round_to_bfloat16(v);
  if constexpr (kIsSame<T, Half>) return widen(narrow(v, T()), T());
}

// BFloat16 is read and written in pairs: a shift and a mask instead of shuffles.
INLINE U32 load_pairs(const BFloat16* p) {
  U32 pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  return Isa::once(pairs);
}
INLINE Pair split(U32 pairs) { return {V(pairs << 16), V(pairs & 0xffff0000)}; }
INLINE Pair split(const BFloat16* p) { return split(load_pairs(p)); }

// 2 * kLanes elements.
template <class T>
INLINE Pair load_pair(const T* p) {
  if constexpr (kIsBFloat16<T>) return split(p);
  const V low = load(p, kLanes), high = load(p + kLanes, kLanes);
  return {evens(low, high), odds(low, high)};
}

// A NaN without the bits below BFloat16's, and quiet.
INLINE V shorten_nan(V v) { return v != v ? V((U32(v) | 0x400000) & 0xffff0000) : v; }

// Not for NaNs with a bit set below BFloat16's, and with kRound (by Isa::round_pair) not for
// denormals.
template <bool kRound>
INLINE U32 join(Pair v) {
  if constexpr (kRound) return Isa::round_pair(v);
  return Isa::interleave(rounded(v.even), rounded(v.odd));
}
template <bool kStream, bool kRound>
INLINE void join(BFloat16* p, Pair v) {
  const U32 pairs = join<kRound>(v);
  if constexpr (kStream) return Isa::stream(p, V(pairs));
  __builtin_memcpy(p, &pairs, sizeof pairs);
}

// So many rows ahead, to be fetched: exact where rows are evenly spaced. Where they are not, it is
// right for most of them, and takes none of offset()'s divisions.
template <class T>
INLINE T* row_ahead(T* row, const Rows& rows, int64_t ahead) {
  return row + ahead * rows.stride[rows.ndim - 1];
}

// May whole vectors of all rows be streamed?
template <class T>
INLINE bool streamable(const void* data, const Rows& rows) {
  constexpr uint64_t kAlignment = kLanes * sizeof(float);
  uint64_t places = reinterpret_cast<uintptr_t>(data);
  for (int d = 0; d < rows.ndim; ++d) places |= uint64_t(rows.stride[d]) * sizeof(T);
  return Isa::kStreams && places % kAlignment == 0;
}

// A load waits for what was streamed just before to the same place in another page of 4 KiB. So a
// row that is streamed kLines lines ahead of one that is read, by the place in their pages, is
// walked from its end: Zen 2, fp32 256x16384, us: 1840 where nothing waits; from the start 4720
// half a line ahead, 2900 a line, 2050 two; from the end 1860 to 1930. 1: a walk from the start
// waits, -1: one from the end does, 0: neither, or nothing is loaded.
template <int kLines, class Streamed, class Loaded>
INLINE int waits(const Streamed* streamed, const Loaded* loaded) {
  constexpr uintptr_t kPage = 4096, kNear = kLines * kLine;
  if (!loaded || sizeof(Streamed) != sizeof(Loaded)) return 0;
  const uintptr_t ahead = (uintptr_t(streamed) - uintptr_t(loaded)) % kPage;
  return ahead == 0 ? 0 : ahead <= kNear ? 1 : kPage - ahead <= kNear ? -1 : 0;
}

template <class F>
INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat16:
      return f(Half());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kFloat64:
      return;  // that is for fp64.cpp
  }
}

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// ---------------------------------------------------------------- along a row

constexpr int kStep = 4 * kLanes;

// step(i) for steps of kStep elements, as many as make whole lots of kLot, from the first or from
// the last on; then rest(i, n) vector by vector.
template <int kLot = kStep, class Step, class Rest>
INLINE void for_each_step(int64_t begin, int64_t end, Step step, Rest rest,
                          bool from_last = false) {
  const int64_t last = begin + (end - begin) / kLot * kLot;
  int64_t i = begin;
  if (from_last) {
    for (i = last; i > begin;) step(i -= kStep);
    i = last;
  } else {
    for (; i < last; i += kStep) step(i);
  }
  for (; i + kLanes <= end; i += kLanes) rest(i, kLanes);
  if (i < end) rest(i, int(end - i));
}

// body(i, n) for the vectors of a step; BFloat16 may be taken in pairs of them.
template <int kCount = kLanes, class F>
INLINE void for_each_vector_of_step(int64_t i, F body, bool from_last = false) {
  const int64_t flip = from_last ? kStep - kCount : 0;
#pragma GCC unroll 4
  for (int j = 0; j < kStep; j += kCount) body(i + (j ^ flip), kCount);
}

template <class F>
INLINE void for_each_vector(int64_t begin, int64_t end, F body) {
  for_each_step(begin, end, [&](int64_t i) { for_each_vector_of_step(i, body); }, body);
}

// One NaN for all instruction sets: of two, a machine takes that which the compiler put first.
template <class T>
INLINE void fill_with_nan(T* p, int64_t begin, int64_t end) {
  for_each_vector(begin, end, [&](int64_t i, int n) { store(p + i, set1(__builtin_nanf("")), n); });
}

// One NaN for all instruction sets, as of fill_with_nan(). It is looked for in two vectors at once:
// with AVX2 a call takes 0.85 times as long.
INLINE V canonical(V v) { return v == v ? v : set1(__builtin_nanf("")); }
INLINE Pair canonical(Pair v) {
  if (__builtin_expect(!Isa::may_have_nan(v), true)) return v;
  return {canonical(v.even), canonical(v.odd)};
}

// A row that is fetched while others are worked on. A long one is fetched to the L2 cache, half of
// it in each of the two passes over another: the memory has work all the time. A short one is
// fetched to the L1 cache in the second pass.
template <class T>
struct Prefetch {
  const T* row;  // nullptr: nothing to fetch
  int64_t cols;
  bool in_halves;

  template <bool kSecondPass, int kCount>
  INLINE void along(int64_t i) const {
    if (!row) return;
    if (in_halves) return lines<kCount / 2, 2>(row + (kSecondPass ? (cols + i) / 2 : i / 2));
    if (kSecondPass) lines<kCount, 3>(row + i);
  }
  template <int kCount, int kLocality>
  static INLINE void lines(const T* p) {
    constexpr int kPerLine = kLine / int(sizeof(T));
#pragma GCC unroll 8
    for (int j = 0; j < kCount; j += kPerLine) __builtin_prefetch(p + j, 0, kLocality);
  }
};

// ---------------------------------------------------------------- sums

// A row is summed in 64 virtual lanes on every machine: element i goes to lane i % 64, lanes are
// combined by halving (i += i + 32, then 16, 8), so AVX2 and AVX-512 give the same bits. BFloat16
// rows are read in pairs: there each whole 32 of the lanes are 16 even elements, then 16 odd ones.
constexpr int kBlock = 64;
constexpr int kVectors = kBlock / kLanes;
static_assert(kBlock % kStep == 0 && 16 % kLanes == 0);

// After 4 terms a lane is folded into double. A row of equal values makes the same rounding error
// in every lane and step: 4 terms keep it below 0.3 ulp of y, 64 terms would make it 5. Costs 11
// instructions per 32 multiply-adds (AVX2), hidden behind the loads.
constexpr int kFold = 4 * kBlock;

struct Factors {
  V a, b;
};
struct PairFactors {
  Factors even, odd;
};

// kCount vectors of lanes. Halves of halves and not an array, which GCC 12 would keep in memory.
template <int kCount>
struct Lanes {
  static constexpr int kHalf = kCount / 2;
  Lanes<kHalf> low, high;

  INLINE Lanes operator+(const Lanes& other) const { return {low + other.low, high + other.high}; }
  // Those of columns i to `end`; kWhole: there are enough for all lanes.
  template <bool kWhole, class F>
  INLINE void add_products(int64_t i, int64_t end, F factors) {
    if constexpr (kWhole && F::kPairs && kCount * kLanes == 32) {
      Lanes<kHalf>::add_pairs(low, high, i, factors);
    } else {
      const int64_t middle = i + kHalf * kLanes;
      low.template add_products<kWhole>(i, end, factors);
      if (kWhole || middle < end) high.template add_products<kWhole>(middle, end, factors);
    }
  }
  template <class F>
  static INLINE void add_pairs(Lanes& even, Lanes& odd, int64_t i, F factors) {
    Lanes<kHalf>::add_pairs(even.low, odd.low, i, factors);
    Lanes<kHalf>::add_pairs(even.high, odd.high, i + kCount * kLanes, factors);
  }
};
template <>
struct Lanes<1> {
  V v;
  INLINE Lanes operator+(const Lanes& other) const { return {v + other.v}; }
  template <bool kWhole, class F>
  INLINE void add_products(int64_t i, int64_t end, F factors) {
    const Factors f = factors(i, kWhole || i + kLanes <= end ? kLanes : int(end - i));
    v = Isa::fma(f.a, f.b, v);
  }
  template <class F>
  static INLINE void add_pairs(Lanes& even, Lanes& odd, int64_t i, F factors) {
    const PairFactors f = factors.pair(i);
    even.v = Isa::fma(f.even.a, f.even.b, even.v);
    odd.v = Isa::fma(f.odd.a, f.odd.b, odd.v);
  }
};

template <int kCount>
INLINE void fold(const Lanes<kCount>& lanes, Doubles& sum) {
  if constexpr (kCount == 1) {
    accumulate(sum, lanes.v);
  } else if constexpr (kCount * kLanes == 8) {
    accumulate(sum, lanes.low.v, lanes.high.v);
  } else {
    fold(lanes.low + lanes.high, sum);
  }
}

// Adds a * b over [begin, end) to sum, with {a, b} = factors(i, n) for the n elements from i on
// and, where F::kPairs, factors.pair(i) for the 2 * kLanes from i on; factors.fetch(i) may fetch
// what comes later. A row may be summed in parts that end at multiples of kFold.
template <class F>
INLINE void add_products(Doubles& sum, int64_t begin, int64_t end, F factors) {
  int64_t i = begin;
  while (i + kBlock <= end) {
    const int64_t stop = i + kFold <= end ? i + kFold : end;
    Lanes<kVectors> lanes = {};
    for (; i + kBlock <= stop; i += kBlock) {
      factors.fetch(i);
      lanes.template add_products<true>(i, end, factors);
    }
    fold(lanes, sum);
  }
  if (i < end) {
    Lanes<kVectors> lanes = {};
    lanes.template add_products<false>(i, end, factors);
    fold(lanes, sum);
  }
}

INLINE bool in_fast_range(double rstd) { return rstd >= kMinFastRstd && rstd <= kMaxFastRstd; }

// The sum of a row's squares is off by 7 roundings at most: of the product, of 3 additions to it in
// its lane, and of 3 in halving 64 lanes to 8, each by 2^-24 of what is there then. Terms of about
// one size average that out. One that is most of the row does not, and where a lane holds so much
// of the sum, the row is summed again in double.
constexpr double kDominant = 0.4;

typedef double EightDoubles __attribute__((vector_size(64)));
template <class Tx>
INLINE void add_squares(EightDoubles& sum, const Tx* x) {
  typedef Tx Eight __attribute__((vector_size(8 * sizeof(Tx))));
  Eight eight;
  __builtin_memcpy(&eight, x, sizeof eight);
  const EightDoubles v = __builtin_convertvector(eight, EightDoubles);
  sum += v * v;
}

template <class Tx>
__attribute__((noinline)) double sum_squares_in_double(const Tx* x, int64_t cols) {
  EightDoubles a = {}, b = {}, c = {}, d = {};  // that one addition need not wait for another
  int64_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    add_squares(a, x + i), add_squares(b, x + i + 8);
    add_squares(c, x + i + 16), add_squares(d, x + i + 24);
  }
  EightDoubles lanes = (a + b) + (c + d);
  for (; i + 8 <= cols; i += 8) add_squares(lanes, x + i);
  for (int lane = 0; i + lane < cols; ++lane) lanes[lane] += double(x[i + lane]) * x[i + lane];
  double four[4];
  for (int lane = 0; lane < 4; ++lane) four[lane] = lanes[lane] + lanes[lane + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}
