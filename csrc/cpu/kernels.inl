// The row kernels, written once over the verbs of an instruction set. An isa_*.cpp includes this
// file inside its target region and an anonymous namespace, after it has defined
//   V, kLanes, kIsaName              a vector of fp32 lanes
//   zero  set1  add  sub  mul        as they say
//   mul_add(a, b, c)                 a * b + c, fused where the machine has it
//   kFma                             has it fma(a, b, c) and fmsub(a, b, c), a * b + c and a * b - c rounded once? Else
//   mul_in_double(v, a[, w])         v * a * w with a double, rounded to fp32 at the end
//   once(v)                          v, in a register before it is used
//   load(p, n)  store(p, v, n)       the first n lanes, of float
//   load_bits  store_bits            the same of Half and BFloat16, whose bits are
//   stream  stream_bits  fence       if kStreams: store all lanes past the caches, at an aligned address; order such stores
//   widen(bits, T())  narrow(v, T()) turned into fp32 and back, rounded to nearest even
//   Pair, unmix(low, high)           the even and the odd elements of 2 * kLanes
//   split(p)  join(p, pair)          the same of BFloat16 in memory: a shift and a mask instead of shuffles; join is not
//                                    for NaNs with a bit set below BFloat16's, and with kUnit (an instruction for it,
//                                    which takes denormals for 0) not for denormals
//   round_to_bfloat16(v)             in fp32, not for NaN
//   outside(w, bits, seen)           has any w bit 30 set in its bits less these? For any_outside(seen)
//   any_denormal(pair, pair)         with kUnit
//   Large                            split(p), then any_small(): was any of them below 2^kLargeExponent?
//   Doubles, accumulate(d, v...)     8 double lanes, plus the last 8 fp32 lanes of a sum
//   accumulate_squares(d, v...)      plus the squares of 8 elements after the other, exact in double
//   exceeds(d, limit)                is one of the lanes larger?
//   largest_lane(v)                  of the lanes as integers
//   total(d)  totals(d, sums)        their sum by halving; those of kTotals of them
// V and what it is cast to are the compiler's vectors, which have operators.
// No std:: calls and no #ifdef in here: see "The ISA trap" in csrc/cpu/isa_avx2.cpp.

template <class T>
INLINE V load(const T* p, int n) {
  return widen(load_bits(p, n), T());
}
template <class T>
INLINE void store(T* p, V v, int n) {
  store_bits(p, narrow(v, T()), n);
}
template <bool kStream, class T>
INLINE void write(T* p, V v, int n) {
  if constexpr (!kStream) {
    store(p, v, n);
  } else if constexpr (sizeof(T) == 4) {
    stream(p, v);
  } else {
    stream_bits(p, narrow(v, T()));
  }
}
// The values that store(T*) and load(const T*) would give back.
template <class T>
INLINE V round_to(V v) {
  return widen(narrow(v, T()), T());
}
template <>
INLINE V round_to<float>(V v) {
  return v;
}
template <>
INLINE V round_to<BFloat16>(V v) {
  return round_to_bfloat16(v);
}

// A row is summed in 64 virtual lanes on every machine: element i goes to lane i % 64, lanes are
// combined by halving (i += i + 32, then 16, 8), so AVX2 and AVX-512 give the same bits. BFloat16 rows
// are read in pairs: there each whole 32 of the lanes are 16 even elements, then 16 odd ones.
constexpr int kBlock = 64;
constexpr int kVectors = kBlock / kLanes;

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

  static INLINE Lanes zeros() { return {Lanes<kHalf>::zeros(), Lanes<kHalf>::zeros()}; }
  INLINE Lanes operator+(const Lanes& other) const { return {low + other.low, high + other.high}; }
  template <class F>
  INLINE void add_products(int64_t i, F factors) {
    if constexpr (F::kPairs && kCount * kLanes == 32) {
      Lanes<kHalf>::add_pairs(low, high, i, factors);
    } else {
      low.add_products(i, factors);
      high.add_products(i + kHalf * kLanes, factors);
    }
  }
  template <class F>
  static INLINE void add_pairs(Lanes& even, Lanes& odd, int64_t i, F factors) {
    Lanes<kHalf>::add_pairs(even.low, odd.low, i, factors);
    Lanes<kHalf>::add_pairs(even.high, odd.high, i + kCount * kLanes, factors);
  }
  template <class F>
  INLINE void add_products(int64_t i, int64_t end, F factors) {
    low.add_products(i, end, factors);
    if (i + kHalf * kLanes < end) high.add_products(i + kHalf * kLanes, end, factors);
  }
};
template <>
struct Lanes<1> {
  V v;

  static INLINE Lanes zeros() { return {zero()}; }
  INLINE Lanes operator+(const Lanes& other) const { return {add(v, other.v)}; }
  template <class F>
  INLINE void add_products(int64_t i, F factors) {
    const Factors f = factors(i, kLanes);
    v = mul_add(f.a, f.b, v);
  }
  template <class F>
  static INLINE void add_pairs(Lanes& even, Lanes& odd, int64_t i, F factors) {
    const PairFactors f = factors.pair(i);
    even.v = mul_add(f.even.a, f.even.b, even.v);
    odd.v = mul_add(f.odd.a, f.odd.b, odd.v);
  }
  template <class F>
  INLINE void add_products(int64_t i, int64_t end, F factors) {
    const Factors f = factors(i, i + kLanes <= end ? kLanes : int(end - i));
    v = mul_add(f.a, f.b, v);
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

// Adds a * b over [begin, end) to sum, with {a, b} = factors(i, n) for the n elements from i on and, where F::kPairs,
// factors.pair(i) for the 2 * kLanes from i on; factors.fetch(i) may fetch what comes later. A row may be summed in
// parts that end at multiples of kFold.
template <class F>
INLINE void add_products(Doubles& sum, int64_t begin, int64_t end, F factors) {
  int64_t i = begin;
  while (i + kBlock <= end) {
    const int64_t stop = i + kFold <= end ? i + kFold : end;
    auto lanes = Lanes<kVectors>::zeros();
    for (; i + kBlock <= stop; i += kBlock) {
      factors.fetch(i);
      lanes.add_products(i, factors);
    }
    fold(lanes, sum);
  }
  if (i < end) {
    auto lanes = Lanes<kVectors>::zeros();
    lanes.add_products(i, end, factors);
    fold(lanes, sum);
  }
}

template <class T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;
template <class T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

constexpr int kStep = 4 * kLanes;

// A row that is fetched while others are worked on. A long one is fetched to the L2 cache, half of it in each of the two
// passes over another: the memory has work all the time. A short one is fetched to the L1 cache in the second pass.
template <class T>
struct Fetch {
  const T* row;  // nullptr: nothing to fetch
  int64_t cols;
  bool in_halves;

  template <bool kSecond, int kCount>
  INLINE void along(int64_t i) const {
    if (!row) return;
    if (!in_halves) {
      if (kSecond) lines<kCount, 3>(row + i);
    } else {
      lines<kCount / 2, 2>(row + (kSecond ? (cols + i) / 2 : i / 2));
    }
  }

 private:
  template <int kCount, int kLocality>
  static INLINE void lines(const T* p) {
#pragma GCC unroll 8
    for (int j = 0; j < kCount; j += kLine / int(sizeof(T))) __builtin_prefetch(p + j, 0, kLocality);
  }
};

template <class T, bool kLook>
struct Squares {
  static constexpr bool kPairs = kIsBFloat16<T>;
  const T* x;
  Large& large;  // with kLook: the pairs go through it
  Fetch<T> next;

  INLINE void fetch(int64_t i) const { next.template along<false, kBlock>(i); }

  INLINE Factors operator()(int64_t i, int n) const {
    const V v = once(load(x + i, n));
    return {v, v};
  }
  INLINE PairFactors pair(int64_t i) const {
    const Pair v = kLook ? large.split(x + i) : split(x + i);
    return {{v.even, v.even}, {v.odd, v.odd}};
  }
};

// step(i) for steps of kStep elements, as many as make whole lots of kLot, then rest(i, n) vector by vector.
template <int kLot = kStep, class Step, class Rest>
INLINE void for_each_step(int64_t begin, int64_t end, Step step, Rest rest) {
  const int64_t last = begin + (end - begin) / kLot * kLot;
  int64_t i = begin;
  for (; i < last; i += kStep) step(i);
  for (; i + kLanes <= end; i += kLanes) rest(i, kLanes);
  if (i < end) rest(i, int(end - i));
}

template <class F>
INLINE void for_each_vector_of_step(int64_t i, F body) {
#pragma GCC unroll 4
  for (int j = 0; j < kStep; j += kLanes) body(i + j, kLanes);
}

template <class F>
INLINE void for_each_vector(int64_t begin, int64_t end, F body) {
  for_each_step(begin, end, [&](int64_t i) { for_each_vector_of_step(i, body); }, body);
}

// What a row is multiplied by, from a column on: a weight where it lies, no weight, or that of a WeightTiles.
template <class T>
struct Weight {
  const T* data;

  INLINE Weight part(int64_t) const { return *this; }
  INLINE V operator()(int64_t i, int n) const { return load(data + i, n); }
  INLINE Pair pair(int64_t i) const {
    if constexpr (kIsBFloat16<T>) return split(data + i);
    return unmix(load(data + i, kLanes), load(data + i + kLanes, kLanes));
  }
};
struct NoWeight {
  V one;

  INLINE NoWeight part(int64_t) const { return *this; }
  INLINE V operator()(int64_t, int) const { return one; }
  INLINE Pair pair(int64_t) const { return {one, one}; }
};
struct TileWeight {
  const float* data;

  INLINE V operator()(int64_t i, int n) const { return load(data + i, n); }
  INLINE Pair pair(int64_t i) const { return {load(data + i, kLanes), load(data + i + kLanes, kLanes)}; }
};

template <class A, class B>
constexpr bool kIsSame = false;
template <class A>
constexpr bool kIsSame<A, A> = true;

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// The weight plus its offset, as floats: in place where it is that already, else a tile at a time, which spares the
// kernels the dtypes of the weight. Most weights are one tile, which is then filled once for many rows. With `pairs` the
// whole blocks of a tile are in the order of Pair, as those of a sum are.
class WeightTiles {
 public:
  static constexpr int64_t kTile = kWeightTile;
  static_assert(kTile % kFold == 0 && kGradientTile % kFold == 0 && kAddTile % kFold == 0 && kBlock % kStep == 0, "see add_products and for_each_step");
  static INLINE int64_t tile_end(int64_t begin, int64_t cols) { return begin + kTile < cols ? begin + kTile : cols; }

  template <class P>
  WeightTiles(const P& p, bool pairs)
      : cols_(p.cols), data_(p.weight), dtype_(p.w_dtype), offset_(p.weight ? float(p.weight_offset) : 0), pairs_(pairs) {
    if (data_ && dtype_ == DType::kFloat32 && offset_ == 0 && !pairs) plain_ = static_cast<const float*>(data_);
  }

  // The columns from this one on, as far as the next multiple of kTile.
  INLINE TileWeight part(int64_t column) {
    if (plain_) return {plain_};
    const int64_t begin = column / kTile * kTile;
    if (begin != filled_) fill(begin);
    return {tile_ - begin};
  }

 private:
  void fill(int64_t begin);

  const int64_t cols_;
  const void* data_;
  DType dtype_;
  float offset_;
  bool pairs_;
  const float* plain_ = nullptr;
  int64_t filled_ = -1;
  float* const tile_ = weight_tile();
};

// Are all weights 0, or at least 2^`exponent` and less than 2^128 times that? A quick look at all, and a closer one if
// that found something, which may be no more than a 0.
bool within_one_by_one(const float* w, int64_t count, int exponent) {
  const float least = __builtin_ldexpf(1, exponent);
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(w[i]);
    if (magnitude != 0 && !(magnitude >= least && magnitude * 0x1p-64f < least * 0x1p64f)) return false;
  }
  return true;
}
INLINE bool within(const float* w, int64_t count, int exponent) {
  V seen[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) seen[j] = outside(load(w + i + j * kLanes, kLanes), uint32_t(127 + exponent) << 23, seen[j]);
  }
  const bool found = any_outside(seen[0]) || any_outside(seen[1]) || any_outside(seen[2]) || any_outside(seen[3]);
  return found ? within_one_by_one(w, count, exponent) : within_one_by_one(w + i, count - i, exponent);
}

template <class F>
INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float());
    case DType::kFloat16: return f(Half());
    case DType::kBFloat16: return f(BFloat16());
    case DType::kFloat64: return;  // that is for fp64.cpp
  }
}

// ---------------------------------------------------------------- forward

// Columns begin to end of a row of x as the sum of its addends; those of next_row, if there is one, are fetched meanwhile. kUnit: BFloat16 is rounded by the machine where no sum is denormal.
template <class Tin, class Tx, bool kUnit>
void add_row(const RmsNormForward& p, int64_t row, int64_t begin, int64_t end, int64_t next_row) {
  const auto row_of_input = [&](int64_t r) { return static_cast<const Tin*>(p.addends.input) + p.addends.input_rows.offset(r); };
  const Tin* input = row_of_input(row);
  const Tin* next = next_row >= 0 ? row_of_input(next_row) : nullptr;
  const Tx* residual = static_cast<const Tx*>(p.addends.residual) + p.addends.residual_rows.offset(row);
  Tx* x = static_cast<Tx*>(const_cast<void*>(p.x)) + p.x_rows.offset(row);
  const auto one = [&](int64_t i, int n) INLINE_LAMBDA { store(x + i, add(load(input + i, n), load(residual + i, n)), n); };
  const auto step = [&](int64_t i) INLINE_LAMBDA {
    if (next) {
      for (int j = 0; j < kStep; j += kLine / int(sizeof(Tin))) __builtin_prefetch(next + i + j, 0, 2);
    }
    if constexpr (kIsBFloat16<Tin> && kIsBFloat16<Tx>) {
      const auto sum = [&](int64_t j) INLINE_LAMBDA {
        const Pair a = split(input + j), b = split(residual + j);
        return Pair{add(a.even, b.even), add(a.odd, b.odd)};
      };
      const Pair low = sum(i), high = sum(i + 2 * kLanes);
      if (kUnit && !any_denormal(low, high)) {
        join<false, kUnit>(x + i, low), join<false, kUnit>(x + i + 2 * kLanes, high);
      } else {
        join<false, false>(x + i, low), join<false, false>(x + i + 2 * kLanes, high);
      }
    } else {
      for_each_vector_of_step(i, one);
    }
  };
  for_each_step<kIsBFloat16<Tin> && kIsBFloat16<Tx> ? kBlock : kStep>(begin, end, step, one);
}

using AddRow = void (*)(const RmsNormForward& p, int64_t row, int64_t begin, int64_t end, int64_t next_row);

// nullptr: x is no sum.
template <class Tx, bool kUnit>
AddRow add_row_of(const RmsNormForward& p) {
  AddRow result = nullptr;
  if (p.addends.input) result = [](const RmsNormForward& p, int64_t row, int64_t begin, int64_t, int64_t) { begin ? void() : add_row_fp64(p, row); };
  if (result) with_type(p.addends.input_dtype, [&](auto in) { result = add_row<decltype(in), Tx, kUnit>; });
  return result;
}

// Does a call that reads and writes so much find its next row in memory?
template <class Tx>
INLINE bool is_far(int64_t bytes) {
  return bytes >= (kIsFloat<Tx> ? kFarBytes : kFarBytes16);
}

INLINE bool in_fast_range(double rstd) { return rstd >= kMinRstd && rstd <= kMaxRstd; }

// The sum of a row's squares is off by 7 roundings at most: of the product, of 3 additions to it in its lane, and of 3 in
// halving 64 lanes to 8, each by 2^-24 of what is there then. Terms of about one size average that out. One that is most of
// the row does not, and where a lane holds so much of the sum, the row is summed again in double.
constexpr double kDominant = 0.4;

template <class Tx>
__attribute__((noinline)) double sum_squares_in_double(const Tx* x, int64_t cols) {
  constexpr int kEight = kLanes > 8 ? kLanes : 8;
  Doubles sum = {};
  for (int64_t i = 0; i < cols; i += kEight) {
    const int n = i + kEight <= cols ? kEight : int(cols - i);
    if constexpr (kLanes == kEight) {
      accumulate_squares(sum, load(x + i, n));
    } else {
      accumulate_squares(sum, load(x + i, n < kLanes ? n : kLanes), n > kLanes ? load(x + i + kLanes, n - kLanes) : zero());
    }
  }
  return total(sum);
}

// One row of y. Fp32 forms its products to twice the
// precision: with the error of a short row's sum on top, two roundings would make 2 ulps now and then.
template <bool kStream, bool kUnit, class Tx, bool kCast, class W, class Ty>
INLINE void scale_row(const Tx* x, W& weight, Ty* y, int64_t cols, double rstd, Fetch<Tx> next) {
  constexpr bool kPairs = kIsBFloat16<Tx> && kIsBFloat16<Ty>;
  const V hi = set1(float(rstd)), lo = set1(float(rstd - float(rstd)));
  const auto scaled = [&](auto v, auto g) INLINE_LAMBDA {
    if constexpr (!kIsFloat<Tx>) {
      return mul(kCast ? round_to<Tx>(mul(v, hi)) : mul(v, hi), g);
    } else if constexpr (!kFma) {
      return kCast ? mul(mul_in_double(v, rstd), g) : mul_in_double(v, rstd, g);
    } else if constexpr (kCast) {
      return mul(fma(v, hi, mul(v, lo)), g);
    } else {
      v = once(v), g = once(g);
      const V gr = mul(g, hi);
      return fma(v, gr, mul(v, fma(g, lo, fmsub(g, hi, gr))));
    }
  };
  for (int64_t begin = 0; begin < cols; begin += WeightTiles::kTile) {
    const int64_t end = WeightTiles::tile_end(begin, cols);
    const auto w = weight.part(begin);
    const auto step = [&](int64_t i) {
      next.template along<true, kStep>(i);
      if constexpr (kPairs) {
#pragma GCC unroll 2
        for (int64_t j = i; j < i + kStep; j += 2 * kLanes) {
          const Pair v = split(x + j), g = w.pair(j);
          join<kStream, kUnit>(y + j, {scaled(v.even, g.even), scaled(v.odd, g.odd)});
        }
      } else {
        for_each_vector_of_step(i, [&](int64_t j, int n) { write<kStream>(y + j, scaled(load(x + j, n), w(j, n)), n); });
      }
    };
    for_each_step<kPairs ? kBlock : kStep>(
        begin, end, step, [&](int64_t i, int n) { store(y + i, scaled(load(x + i, n), w(i, n)), n); });
  }
}

// kCols: the length of the rows where it is known to the compiler, else 0. kUnit: BFloat16 is rounded by the machine in
// rows without small elements; the caller has seen to the weight.
template <bool kStream, class Tx, class Ty, bool kCast, bool kUnit, int kCols, class W>
INLINE void forward_rows(const RmsNormForward& p, W& weight, int64_t row_begin, int64_t row_end) {
  const int64_t cols = kCols ? kCols : p.cols;
  const double per_col = 1.0 / double(cols);
  const auto row_of_x = [&](int64_t row) { return static_cast<const Tx*>(p.x) + p.x_rows.offset(row); };

  // Short rows are summed a group ahead of the one that is scaled: their square roots and divisions share instructions
  // and are waited for less. Longer rows would leave the L1 cache in between. What has to come from memory is read and
  // written in turns, in small groups, and fetched ahead.
  const int64_t row_bytes = cols * int64_t(sizeof(Tx)), total_bytes = p.rows * cols * int64_t(sizeof(Tx) + sizeof(Ty));
  const bool far = total_bytes >= kFarBytes, fetch = is_far<Tx>(total_bytes);
  const int64_t fitting = (far ? kFarGroupBytes : kGroupBytes) / row_bytes;
  const int64_t group = fitting > kGroup ? kGroup : fitting > 1 ? fitting : 1;
  const bool ahead = group > 1 && !far, in_halves = group == 1 && row_bytes >= kFetchInHalves;
  Doubles sums[kGroup];
  Large large;
  const AddRow add_addends = add_row_of<Tx, kUnit>(p);
  const auto fetched = [&](int64_t row) INLINE_LAMBDA {
    return Fetch<Tx>{fetch && row < row_end ? row_of_x(row) : nullptr, cols, in_halves};
  };
  const auto sum_row = [&](int64_t row, int64_t j) INLINE_LAMBDA {
    Doubles sum = {};
    const Fetch<Tx> next = in_halves ? fetched(row + 1) : Fetch<Tx>{};
    const Squares<Tx, kUnit> squares{row_of_x(row), large, next};
    if (!add_addends) {
      add_products(sum, 0, cols, squares);
    } else {  // a part is summed up while it is in the L1 cache
      for (int64_t begin = 0; begin < cols; begin += kAddTile) {
        const int64_t end = begin + kAddTile < cols ? begin + kAddTile : cols;
        add_addends(p, row, begin, end, in_halves && fetch && row + 1 < row_end ? row + 1 : -1);
        add_products(sum, begin, end, squares);
      }
    }
    sums[j] = sum;
  };
  for (int64_t first = row_begin; first < row_end; first += group) {
    const int64_t count = first + group < row_end ? group : row_end - first;
    if (!ahead || first == row_begin) {
      for (int64_t j = 0; j < count; ++j) sum_row(first + j, j);
    }
    double rstd[kGroup];
    bool fast = true;
    const auto look_for_dominant = [&](int64_t j) INLINE_LAMBDA {
      if constexpr (kIsFloat<Tx>) {
        if (__builtin_expect(exceeds(sums[j], kDominant * rstd[j]), false)) rstd[j] = sum_squares_in_double(row_of_x(first + j), cols);
      }
    };
    if (count == kGroup) {
      for (int j = 0; j < kGroup; j += kTotals) totals(sums + j, rstd + j);
      for (int j = 0; j < kGroup; ++j) look_for_dominant(j);
      for (int j = 0; j < kGroup; ++j) rstd[j] = 1 / __builtin_sqrt(rstd[j] * per_col + p.eps);
      for (int j = 0; j < kGroup; ++j) fast &= in_fast_range(rstd[j]);
    } else {
      for (int64_t j = 0; j < count; ++j) {
        rstd[j] = total(sums[j]);
        look_for_dominant(j);
        rstd[j] = 1 / __builtin_sqrt(rstd[j] * per_col + p.eps);
        fast &= in_fast_range(rstd[j]);
      }
    }
    if (!fast) {
      for (int64_t j = 0; j < count; ++j) rstd[j] = rstd[j] != rstd[j] ? __builtin_nan("") : rstd[j];
    }
    if (p.rstd) {
      for (int64_t j = 0; j < count; ++j) static_cast<float*>(p.rstd)[first + j] = float(rstd[j]);
    }
    const bool small = !kUnit || large.any_small();
    large = Large();
    for (int64_t j = 0; j < count; ++j) {
      const int64_t row = first + j;
      if (ahead && row + group < row_end) sum_row(row + group, j);
      Ty* y = static_cast<Ty*>(p.y) + p.y_rows.offset(row);
      if (!fast && rstd[j] != rstd[j]) {  // one NaN for all, whichever the row held first
        for_each_vector(0, cols, [&](int64_t i, int n) { store(y + i, set1(__builtin_nanf("")), n); });
        continue;
      }
      if (!fast && !in_fast_range(rstd[j])) {
        forward_row_fp64(p, row);
        continue;
      }
      const Tx* x = row_of_x(row);
      const Fetch<Tx> next = fetched(row + (ahead ? group + kGroup / 2 : group));
      if (kUnit && !small) {
        scale_row<kStream, kUnit, Tx, kCast>(x, weight, y, cols, rstd[j], next);
      } else {
        scale_row<kStream, false, Tx, kCast>(x, weight, y, cols, rstd[j], next);
      }
    }
  }
  if (kStream) fence();
}

// May whole vectors of all rows be streamed?
template <class T>
INLINE bool streamable(const void* data, const Rows& rows) {
  constexpr uint64_t kAlignment = kLanes * sizeof(float);
  uint64_t places = reinterpret_cast<uintptr_t>(data);
  for (int d = 0; d < rows.ndim; ++d) places |= uint64_t(rows.stride[d]) * sizeof(T);
  return kStreams && places % kAlignment == 0;
}

template <class Tx, class Ty, bool kCast, bool kUnit>
void forward_typed(const RmsNormForward& p, int64_t row_begin, int64_t row_end) {
  // Heads take a fifth less time without loops, where a vector is no few lanes.
  const auto rows_streamed = [&](auto stream, auto unit, auto& weight) {
    if constexpr (kLanes >= 8 && kIsSame<Tx, Ty>) {
      if (p.cols == 64) return forward_rows<stream.value, Tx, Ty, kCast, unit.value, 64>(p, weight, row_begin, row_end);
      if (p.cols == 128) return forward_rows<stream.value, Tx, Ty, kCast, unit.value, 128>(p, weight, row_begin, row_end);
    }
    forward_rows<stream.value, Tx, Ty, kCast, unit.value, 0>(p, weight, row_begin, row_end);
  };
  const auto rows = [&](auto unit, auto& weight) {
    if (p.stream && streamable<Ty>(p.y, p.y_rows)) return rows_streamed(Bool<kStreams>(), unit, weight);
    rows_streamed(Bool<false>(), unit, weight);
  };
  if (!p.weight) {
    if constexpr (kCast) return;  // forward() does not ask for it
    NoWeight one{set1(1.0f)};
    return rows(Bool<kUnit>(), one);
  }
  // A tile does not pay for one row. In long rows it takes the place of x or y in the L1 cache.
  if constexpr (!kIsFloat<Tx> && kIsSame<Tx, Ty>) {
    if (p.w_dtype == p.x_dtype && p.weight_offset == 0 && (row_end - row_begin == 1 || (kLanes >= 8 && p.cols > kDirectCols))) {
      Weight<Tx> weight{static_cast<const Tx*>(p.weight)};
      if constexpr (kUnit) {
        Large large;
        for (int64_t i = 0; i < p.cols / kBlock * kBlock; i += 2 * kLanes) large.split(weight.data + i);
        if (large.any_small()) return rows(Bool<false>(), weight);
      }
      return rows(Bool<kUnit>(), weight);
    }
  }
  WeightTiles weight(p, kIsBFloat16<Tx> && kIsBFloat16<Ty>);
  if constexpr (kUnit || (kIsFloat<Tx> && !kCast)) {
    bool ordinary = true;
    for (int64_t begin = 0; begin < p.cols && ordinary; begin += WeightTiles::kTile) {
      const int64_t end = WeightTiles::tile_end(begin, p.cols);
      ordinary = within(weight.part(begin).data + begin, end - begin, kUnit ? kLargeExponent : kLeastWeightExponent);
    }
    if (!ordinary) {
      if constexpr (kUnit) return rows(Bool<false>(), weight);
      const AddRow add_addends = add_row_of<Tx, kUnit>(p);
      for (int64_t row = row_begin; row < row_end; ++row) {
        if (add_addends) add_addends(p, row, 0, p.cols, -1);
        forward_row_fp64(p, row);
      }
      return;
    }
  }
  rows(Bool<kUnit>(), weight);
}

// ---------------------------------------------------------------- backward

template <class Tdy, class Tx>
constexpr bool kGradientPairs = kIsBFloat16<Tdy> && kIsBFloat16<Tx>;

// Of the sum of g * x; rstd comes in at the end.
template <class Tdy, class Tx>
struct GradientFactors {
  static constexpr bool kPairs = kGradientPairs<Tdy, Tx>;
  const Tdy* dy;
  const Tx* x;
  TileWeight weight;
  Fetch<Tdy> next_dy;
  Fetch<Tx> next_x;

  INLINE void fetch(int64_t i) const {
    next_dy.template along<false, kBlock>(i);
    next_x.template along<false, kBlock>(i);
  }
  INLINE Factors operator()(int64_t i, int n) const { return {mul(load(dy + i, n), weight(i, n)), load(x + i, n)}; }
  INLINE PairFactors pair(int64_t i) const {
    const Pair d = split(dy + i), v = split(x + i), g = weight.pair(i);
    return {{mul(d.even, g.even), v.even}, {mul(d.odd, g.odd), v.odd}};
  }
};

template <class Tdy, class Tx>
struct GradientRow {
  const Tdy* dy;
  const Tx* x;
  const Tx* dresidual;
  Tx* dx;
  float rstd;
  float mean;  // of g * xhat
};

// Columns begin to end of one row: dx, and its dweight added to the partial sums, whose whole blocks are in the order of
// Pair if the loads are; the flags say what is wanted.
template <bool kDx, bool kDweight, bool kStream, class Tdy, class Tx>
INLINE void gradient(GradientRow<Tdy, Tx> row, Fetch<Tdy> next_dy, Fetch<Tx> next_x, TileWeight weight, float* partial,
                     int64_t begin, int64_t end, bool cast) {
  const V r = set1(row.rstd), c = set1(row.mean);
  const auto vector = [&](V d, V x, V w, float* sum, int n) INLINE_LAMBDA {
    const V xhat = mul(x, r);
    if constexpr (kDweight) store(sum, mul_add(d, cast ? round_to<Tx>(xhat) : xhat, load(sum, n)), n);
    return kDx ? mul(r, sub(mul(d, w), mul(xhat, c))) : zero();
  };
  const auto one = [&](int64_t i, int n, auto in_step) INLINE_LAMBDA {
    V result = vector(load(row.dy + i, n), load(row.x + i, n), kDx ? weight(i, n) : zero(), partial + i, n);
    if (kDx && row.dresidual) result = add(result, load(row.dresidual + i, n));
    if constexpr (kDx) write<kStream && in_step.value>(row.dx + i, result, n);
  };
  const auto step = [&](int64_t i) INLINE_LAMBDA {
    next_dy.template along<true, kStep>(i);
    next_x.template along<true, kStep>(i);
    if constexpr (kGradientPairs<Tdy, Tx>) {
#pragma GCC unroll 2
      for (int64_t j = i; j < i + kStep; j += 2 * kLanes) {
        const Pair d = split(row.dy + j), x = split(row.x + j), w = kDx ? weight.pair(j) : Pair{};
        V even = vector(d.even, x.even, w.even, partial + j, kLanes);
        V odd = vector(d.odd, x.odd, w.odd, partial + j + kLanes, kLanes);
        if (kDx && row.dresidual) {
          const Pair other = split(row.dresidual + j);
          even = add(even, other.even), odd = add(odd, other.odd);
        }
        if constexpr (kDx) join<kStream, false>(row.dx + j, {even, odd});
      }
    } else {
      for_each_vector_of_step(i, [&](int64_t j, int n) INLINE_LAMBDA { one(j, n, Bool<true>()); });
    }
  };
  for_each_step<kGradientPairs<Tdy, Tx> ? kBlock : kStep>(
      begin, end, step, [&](int64_t i, int n) INLINE_LAMBDA { one(i, n, Bool<false>()); });
}

// From the order of Pair to that of memory, for whole blocks.
INLINE void unpair(float* p, int64_t cols) {
  for (int64_t i = 0; i < cols / kBlock * kBlock; i += 2 * kLanes) {
    float pairs[2 * kLanes];
    for (int j = 0; j < 2 * kLanes; ++j) pairs[j] = p[i + j];
    for (int j = 0; j < kLanes; ++j) {
      p[i + 2 * j] = pairs[j];
      p[i + 2 * j + 1] = pairs[kLanes + j];
    }
  }
}

// Is the sum of g * x in the range of fp32, though x may be as small and as large as 1 / rstd?
INLINE bool certain(double sum, float rstd) {
  const double magnitude = __builtin_fabs(sum);
  return magnitude <= kMaxGradientSum && (rstd <= kMaxPlainRstd || magnitude >= kMinGradientSum);
}

// kRows: a group of long rows stays in the L2 cache between its two passes, each of which takes it tile by tile, so that
// the weight and the partial sums stay in the L1 cache. What is short stays in the L1 cache itself, and what has to come
// from memory comes at a steadier pace row by row.
template <class Tdy, class Tx, bool kDx, bool kDweight, int kRows>
void backward_blocks(const RmsNormBackward& p, int64_t block_begin, int64_t block_end) {
  using Row = GradientRow<Tdy, Tx>;
  const int64_t cols = p.cols, block_rows = rms_norm_backward_plan(p).block_rows, sums_of_block = dweight_sums(block_rows);
  const auto row_at = [&](int64_t row) {
    return Row{static_cast<const Tdy*>(p.dy) + p.dy_rows.offset(row), static_cast<const Tx*>(p.x) + p.x_rows.offset(row),
               p.dresidual ? static_cast<const Tx*>(p.dresidual) + p.dresidual_rows.offset(row) : nullptr,
               static_cast<Tx*>(p.dx) + row * cols, static_cast<const float*>(p.rstd)[row], 0};
  };
  WeightTiles weight(p, kGradientPairs<Tdy, Tx>);
  const Doubles none = {};
  const bool stream = p.stream && streamable<Tx>(p.dx, Rows{1, {p.rows}, {cols}});
  const bool fetch = is_far<Tx>(p.rows * cols * int64_t(sizeof(Tdy) + 2 * sizeof(Tx)));
  const bool in_halves = kDx && kRows == 1 && cols * int64_t(sizeof(Tx)) >= kFetchInHalves;
  const int64_t fitting = kGradientBytes / (cols * int64_t(sizeof(Tdy) + sizeof(Tx)));
  const int64_t group = fitting > kRows ? kRows : fitting > 1 ? fitting : 1;
  constexpr int64_t kColumns = kRows == 1 ? WeightTiles::kTile : kGradientTile;
  for (int64_t block = block_begin; block < block_end; ++block) {
    // What the rows of a block add to dweight; of a large one what up to kFoldRows rows add, and what those before them did.
    float* const folded = kDweight ? static_cast<float*>(p.workspace) + sums_of_block * block * cols : nullptr;
    float* const partial = kDweight ? folded + (sums_of_block - 1) * cols : nullptr;
    if (kDweight) for_each_vector(0, sums_of_block * cols, [&](int64_t i, int n) { store(folded + i, zero(), n); });
    int64_t fold_at = block * block_rows + kFoldRows;
    const int64_t block_first = block * block_rows;
    const int64_t block_last = block_first + block_rows < p.rows ? block_first + block_rows : p.rows;
    enum : char { kFast, kDxAgain, kAllAgain } verdict[kMaxBlockRows];
    bool again = false;
    for (int64_t first = block_first; first < block_last; first += group) {
      const int64_t count = first + group < block_last ? group : block_last - first;
      Row rows[kRows];
      Doubles sums[kRows];
      for (int64_t j = 0; j < count; ++j) {
        rows[j] = row_at(first + j);
        sums[j] = none;
      }
      for (int64_t begin = 0; kDx && begin < cols; begin += kColumns) {
        const int64_t end = begin + kColumns < cols ? begin + kColumns : cols;
        const TileWeight w = weight.part(begin);
        for (int64_t j = 0; j < count; ++j) {
          const Row row = rows[j];
          Doubles sum = sums[j];
          const Row next = in_halves && fetch && first + 1 < block_last ? row_at(first + 1) : Row{};
          add_products(sum, begin, end, GradientFactors<Tdy, Tx>{row.dy, row.x, w, {next.dy, cols, true}, {next.x, cols, true}});
          sums[j] = sum;
        }
      }
      for (int64_t j = 0; j < count; ++j) {
        const double sum = kDx ? total(sums[j]) : 0;
        rows[j].mean = float(sum * rows[j].rstd / double(cols));
        auto& row_verdict = verdict[first - block_first + j];
        const float rstd = rows[j].rstd;
        // A NaN comes out of every product with the row that it is in.
        const bool nan = rstd != rstd;
        row_verdict = nan ? kFast : !in_fast_range(rstd) ? kAllAgain : kDx && !certain(sum, rstd) ? kDxAgain : kFast;
        again |= row_verdict != kFast;
      }
      for (int64_t begin = 0; begin < cols; begin += kColumns) {
        const int64_t end = begin + kColumns < cols ? begin + kColumns : cols;
        const TileWeight w = kDx ? weight.part(begin) : TileWeight{};
        for (int64_t j = 0; j < count; ++j) {
          if (verdict[first - block_first + j] == kAllAgain) continue;
          const Row row = rows[j], next = fetch && first + group + j < block_last ? row_at(first + group + j) : Row{};
          const Fetch<Tdy> next_dy{next.dy, cols, in_halves};
          const Fetch<Tx> next_x{next.x, cols, in_halves};
          if (kRows == 1 && stream) {
            gradient<kDx, kDweight, kStreams && kDx>(row, next_dy, next_x, w, partial, begin, end, p.cast_before_weight);
          } else {
            gradient<kDx, kDweight, false>(row, next_dy, next_x, w, partial, begin, end, p.cast_before_weight);
          }
        }
      }
      if (kDweight && sums_of_block > 1 && (first + count >= fold_at || first + count == block_last)) {
        fold_at += kFoldRows;
        for_each_vector(0, cols, [&](int64_t i, int n) {
          store(folded + i, add(load(folded + i, n), load(partial + i, n)), n);
          store(partial + i, zero(), n);
        });
      }
    }
    if (kDweight && kGradientPairs<Tdy, Tx>) unpair(folded, cols);
    if (again && stream) fence();
    for (int64_t j = 0; again && j < block_last - block_first; ++j) {
      if (verdict[j] != kFast) backward_row_fp64(p, block_first + j, verdict[j] == kAllAgain ? folded : nullptr);
    }
  }
  if (stream) fence();
}

// Sums the blocks' partial sums in their order, in double.
template <class Tw>
void sum_partials(const RmsNormBackward& p, int64_t col_begin, int64_t col_end) {
  constexpr int64_t kColumns = 256;  // 2 KB of sums, and whole cache lines of the partials
  const BackwardPlan plan = rms_norm_backward_plan(p);
  const int64_t blocks = plan.blocks, stride = dweight_sums(plan.block_rows) * p.cols;
  for (int64_t begin = col_begin; begin < col_end; begin += kColumns) {
    const int64_t count = col_end - begin < kColumns ? col_end - begin : kColumns;
    double sums[kColumns] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const float* folded = static_cast<const float*>(p.workspace) + block * stride + begin;
      for (int64_t i = 0; i < count; ++i) sums[i] += folded[i];
    }
    float rounded_sums[kColumns];
    for (int64_t i = 0; i < kColumns; ++i) rounded_sums[i] = float(sums[i]);
    Tw* dweight = static_cast<Tw*>(p.dweight) + begin;
    for_each_vector(0, count, [&](int64_t i, int n) { store(dweight + i, load(rounded_sums + i, n), n); });
  }
}

// ---------------------------------------------------------------- from dtypes to types

template <bool kUnit>
void forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end) {
  set_last_isa(kIsaNames[kUnit]);
  with_type(p.x_dtype, [&](auto x) {
    using Tx = decltype(x);
    constexpr bool kTypedUnit = kUnit && kIsBFloat16<Tx>;
    if constexpr (kIsFloat<Tx>) {  // a residual in fp32 beside 16-bit activations
      if (p.y_dtype != p.x_dtype) {
        return with_type(p.y_dtype, [&](auto y) {
          using Ty = decltype(y);
          if (p.cast_before_weight && p.weight) return forward_typed<Tx, Ty, true, false>(p, row_begin, row_end);
          forward_typed<Tx, Ty, false, false>(p, row_begin, row_end);
        });
      }
    }
    // Without a weight there is nothing to be cast before.
    if (!p.cast_before_weight || !p.weight) return forward_typed<Tx, Tx, false, kTypedUnit>(p, row_begin, row_end);
    if (p.y_dtype == p.x_dtype) return forward_typed<Tx, Tx, true, kTypedUnit>(p, row_begin, row_end);
    if constexpr (!kIsFloat<Tx>) forward_typed<Tx, float, true, false>(p, row_begin, row_end);
  });
}

void WeightTiles::fill(int64_t begin) {
  const int64_t end = tile_end(begin, cols_);
  const V offset = set1(offset_ == 0 ? -0.0f : offset_);  // adding -0 changes no bit
  const auto fill_from = [&](auto weight) {
    const auto put = [&](int64_t i, int n) { store(tile_ + (i - begin), add(weight(i, n), offset), n); };
    const auto step = [&](int64_t i) {
      if (!pairs_) return for_each_vector_of_step(i, put);
#pragma GCC unroll 2
      for (int64_t j = i; j < i + kStep; j += 2 * kLanes) {
        const Pair w = weight.pair(j);
        store(tile_ + (j - begin), add(w.even, offset), kLanes);
        store(tile_ + (j - begin) + kLanes, add(w.odd, offset), kLanes);
      }
    };
    pairs_ ? for_each_step<kBlock>(begin, end, step, put) : for_each_step(begin, end, step, put);
  };
  filled_ = begin;
  if (!data_) return fill_from(NoWeight{set1(1.0f)});
  with_type(dtype_, [&](auto w) { fill_from(Weight<decltype(w)>{static_cast<const decltype(w)*>(data_)}); });
  if (!pairs_ || dtype_ == DType::kBFloat16) return;
  for (int64_t i = 0; i < end - begin; ++i) {  // see join: no NaN with a bit set below BFloat16's
    if (tile_[i] != tile_[i]) tile_[i] = __builtin_nanf("");
  }
}

template <bool kUnit>
void backward(const RmsNormBackward& p, int64_t block_begin, int64_t block_end) {
  set_last_isa(kIsaNames[kUnit]);
  with_type(p.dy_dtype, [&](auto dy) {
    with_type(p.x_dtype, [&](auto x) {
      using Tdy = decltype(dy);
      using Tx = decltype(x);
      if (!p.dweight) return backward_blocks<Tdy, Tx, true, false, 1>(p, block_begin, block_end);
      if (!p.dx) return backward_blocks<Tdy, Tx, false, true, 1>(p, block_begin, block_end);
      const int64_t bytes = p.rows * p.cols * int64_t(sizeof(Tdy) + 2 * sizeof(Tx));
      if (p.cols <= kGradientTile || bytes >= kFarBytes) {
        return backward_blocks<Tdy, Tx, true, true, 1>(p, block_begin, block_end);
      }
      backward_blocks<Tdy, Tx, true, true, kGradientRows>(p, block_begin, block_end);
    });
  });
}

void dweight(const RmsNormBackward& p, int64_t col_begin, int64_t col_end) {
  with_type(p.w_dtype, [&](auto w) { sum_partials<decltype(w)>(p, col_begin, col_end); });
}

// ---------------------------------------------------------------- 8 bits

typedef int32_t Bits __attribute__((vector_size(sizeof(V)), may_alias));
typedef uint16_t Words __attribute__((vector_size(sizeof(V)), may_alias));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), may_alias));

INLINE V magnitude(V v) { return V(Bits(v) & 0x7fffffff); }
INLINE Bits larger(Bits a, Bits b) { return a > b ? a : b; }

// The formats of a QType: the codes of v, saturated and rounded to nearest even, in the lower bytes, with kOffset added; and
// two of them side by side. kPlain: v is known to be a number that is in the range once rounded.
template <int kFraction, int kBias>
struct Float8 {
  static constexpr bool kDivides = true;
  static constexpr float kMost = kFraction == 3 ? 448.0f : 57344.0f;
  static constexpr int kLeastExponent = 128 - kBias;  // of a float, of the least normal number and of what is below
  static constexpr int32_t kOffset = ((23 - kFraction) << 23) + (kLeastExponent << kFraction);

  template <bool kPlain>
  static INLINE Bits code(V v) {
    const Bits sign = Bits(v) >> 24 & 0x80;
    Bits bits = Bits(magnitude(v));
    if constexpr (!kPlain) {
      const Bits limit = Bits(set1(kMost));
      bits = bits < limit ? bits : limit;
    }
    // The sum with a number so much greater is rounded in units of the code, which it counts in its lowest bits.
    const Bits exponent = larger(bits & 0x7f800000, Bits{} + (kLeastExponent << 23));
    const Bits sum = Bits(add(V(bits), V(exponent + ((23 - kFraction) << 23))));
    const Bits code = sum - exponent + (exponent >> (23 - kFraction));
    if constexpr (!kPlain) return (v == v ? code : Bits{} + (0x7f + kOffset)) + sign;
    return code + sign;
  }
  static INLINE Bits pair(Bits low, Bits high) { return low + (high << 8) - int32_t(uint32_t(kOffset) * 0x101); }
};
struct Int8 {
  static constexpr bool kDivides = false;
  static constexpr float kMost = 127.0f;
  static constexpr int32_t kOffset = 0x4b400000;  // of 1.5 * 2^23, whose units are 1

  template <bool kPlain>
  static INLINE Bits code(V v) {
    if constexpr (!kPlain) {
      const V least = set1(-128.0f), most = set1(127.0f);
      v = v < least ? least : v;
      v = v > most ? most : v;
      v = v == v ? v : zero();
    }
    return Bits(add(v, set1(0x1.8p23f)));
  }
  static INLINE Bits pair(Bits low, Bits high) { return (low & 0xff) | high << 8; }
};

// The largest |p[i]|, NaN if there is one: as integers they are in the same order.
template <class T>
INLINE float largest(const T* p, int64_t n) {
  Bits seen = {};
  int64_t i = 0;
  if constexpr (!kIsFloat<T>) {
    Words words_seen = {};
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      Words words;
      __builtin_memcpy(&words, p + i, sizeof words);
      words &= 0x7fff;
      words_seen = words > words_seen ? words : words_seen;
    }
    // Each half of a lane as a number of T.
    const Bits both = Bits(words_seen), lanes = larger(both & 0xffff, both >> 16);
    seen = Bits(widen(reinterpret_cast<decltype(load_bits(p, 0))>(__builtin_convertvector(lanes, HalfWords)), T()));
  }
  for (; i < n; i += kLanes) seen = larger(seen, Bits(magnitude(load(p + i, i + kLanes <= n ? kLanes : int(n - i)))));
  const int32_t most = largest_lane(V(seen));
  float value;
  __builtin_memcpy(&value, &most, sizeof value);
  return value;
}

template <class F, bool kPlain, class T, class Scaled>
INLINE void quantize_span(const T* from, uint8_t* to, int64_t n, Scaled scaled) {
  int64_t i = 0;
  if constexpr (kIsBFloat16<T>) {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const Pair v = split(from + i);
      const Bits even = F::template code<kPlain>(scaled(v.even)), odd = F::template code<kPlain>(scaled(v.odd));
      const HalfWords both = __builtin_convertvector(F::pair(even, odd), HalfWords);
      __builtin_memcpy(to + i, &both, sizeof both);
    }
  }
  for (; i < n; i += kLanes) {
    const int m = i + kLanes <= n ? kLanes : int(n - i);
    const Bits code = F::template code<kPlain>(scaled(load(from + i, m))) - F::kOffset;
    const Bytes codes = __builtin_convertvector(code, Bytes);
    m == kLanes ? __builtin_memcpy(to + i, &codes, kLanes) : __builtin_memcpy(to + i, &codes, m);
  }
}

template <class F, class T>
void quantize_rows(const RmsNormForward& p, int64_t row_begin, int64_t row_end) {
  const Quant& q = p.quant;
  const int64_t width = q.block ? q.block : p.cols;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* from = static_cast<const T*>(p.y) + p.y_rows.offset(row);
    uint8_t* to = static_cast<uint8_t*>(q.data) + row * p.cols;
    for (int64_t begin = 0; begin < p.cols; begin += width) {
      float scale = q.block ? 0 : *q.scale;  // those that are found are written by other threads meanwhile
      bool plain = false;
      if (q.block) {
        const float most = largest(from + begin, width), bounded = most > q.bound ? q.bound : most;
        plain = most <= q.bound && most < __builtin_inff();
        scale = bounded / F::kMost;
        scale = scale < q.least ? q.least : scale;
        q.scale[row * q.row_stride + begin / width * q.block_stride] = scale;
      }
      const float inverse = 1.0f / scale;
      const V s = set1(scale), over_s = set1(inverse), minus_over_s = set1(-inverse);
      const auto product = [=](V v) INLINE_LAMBDA { return mul(v, over_s); };
      const auto span = [&](auto plain, auto scaled) {
        quantize_span<F, plain.value>(from + begin, to + begin, width, scaled);
      };
      if (!q.block) {
        span(Bool<false>(), product);
      } else if (!F::kDivides) {
        plain ? span(Bool<true>(), product) : span(Bool<false>(), product);
      } else if (!plain) {
        span(Bool<false>(), [=](V v) INLINE_LAMBDA { return v / s; });
      } else if constexpr (kFma) {
        // Rounded as a division is: over_s is 1 / s rounded once, and one step from there (Markstein 1990) is exact. In
        // this order of signs 0 keeps its own.
        span(Bool<true>(), [=](auto v) INLINE_LAMBDA {
          const V near = mul(v, over_s);
          return fma(fmsub(near, s, v), minus_over_s, near);
        });
      } else {
        span(Bool<true>(), [=](V v) INLINE_LAMBDA { return v / s; });
      }
    }
  }
}

// Of y, which forward() wrote.
void quantize(const RmsNormForward& p, int64_t row_begin, int64_t row_end) {
  const auto as = [&](auto format) {
    using F = decltype(format);
    switch (p.y_dtype) {
      case DType::kFloat32: return quantize_rows<F, float>(p, row_begin, row_end);
      case DType::kFloat16: return quantize_rows<F, Half>(p, row_begin, row_end);
      default: return quantize_rows<F, BFloat16>(p, row_begin, row_end);
    }
  };
  switch (p.quant.dtype) {
    case QType::kFloat8E4M3: return as(Float8<3, 7>());
    case QType::kFloat8E5M2: return as(Float8<2, 15>());
    case QType::kInt8: return as(Int8());
  }
}
