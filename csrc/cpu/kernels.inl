// The row kernels, written once over the verbs of an instruction set. An isa_*.cpp includes this
// file inside its target region and an anonymous namespace, after it has defined
//   V, kLanes, kIsaName              a vector of fp32 lanes
//   zero  set1  add  sub  mul        as they say
//   mul_add(a, b, c)                 a * b + c, fused where the machine has it
//   fma(a, b, c)  fmsub(a, b, c)     a * b + c, a * b - c with an exact product on every machine
//   load(p, n)  store(p, v, n)       the first n lanes, of float
//   load_bits  store_bits            the same of Half and BFloat16, whose bits are
//   widen(bits, T())  narrow(v, T()) turned into fp32 and back, rounded to nearest even
//   Doubles, accumulate(d, v...), total(d)   8 double lanes, plus the last 8 fp32 lanes of a sum; their sum by halving
// No std:: calls and no #ifdef in here: see "The ISA trap" in csrc/cpu/isa_avx2.cpp.

template <class T>
INLINE V load(const T* p, int n) {
  return widen(load_bits(p, n), T());
}
template <class T>
INLINE void store(T* p, V v, int n) {
  store_bits(p, narrow(v, T()), n);
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

// A row is summed in 64 virtual lanes on every machine: element i goes to lane i % 64, lanes are
// combined by halving (i += i + 32, then 16, 8), so AVX2 and AVX-512 give the same bits.
constexpr int kBlock = 64;
constexpr int kVectors = kBlock / kLanes;

// After 4 terms a lane is folded into double. A row of equal values makes the same rounding error
// in every lane and step: 4 terms keep it below 0.3 ulp of y, 64 terms would make it 5. Costs 11
// instructions per 32 multiply-adds (AVX2), hidden behind the loads.
constexpr int kFold = 4 * kBlock;

struct Factors {
  V a, b;
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
    low.add_products(i, factors);
    high.add_products(i + kHalf * kLanes, factors);
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

// Adds a * b over [begin, end) to sum, with {a, b} = factors(i, n) for the n elements from i on.
// A row may be summed in parts that end at multiples of kFold.
template <class F>
INLINE void add_products(Doubles& sum, int64_t begin, int64_t end, F factors) {
  int64_t i = begin;
  while (i + kBlock <= end) {
    const int64_t stop = i + kFold <= end ? i + kFold : end;
    auto lanes = Lanes<kVectors>::zeros();
    for (; i + kBlock <= stop; i += kBlock) lanes.add_products(i, factors);
    fold(lanes, sum);
  }
  if (i < end) {
    auto lanes = Lanes<kVectors>::zeros();
    lanes.add_products(i, end, factors);
    fold(lanes, sum);
  }
}

template <class F>
INLINE double sum_products(int64_t cols, F factors) {
  Doubles sum = {};
  add_products(sum, 0, cols, factors);
  return total(sum);
}

template <class F>
INLINE void for_each_vector(int64_t begin, int64_t end, F body) {
  int64_t i = begin;
  for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) body(i + j * kLanes, kLanes);
  }
  for (; i + kLanes <= end; i += kLanes) body(i, kLanes);
  if (i < end) body(i, int(end - i));
}

struct NoWeight {};

template <class T>
struct Weight {
  const T* data;
  V offset;  // -0 where there is none: adding it changes no bit

  INLINE V operator()(int64_t i, int n) const { return add(load(data + i, n), offset); }
};
template <>
struct Weight<NoWeight> {
  V one;

  INLINE V operator()(int64_t, int) const { return one; }
};

template <class T, class P>
INLINE Weight<T> weight_of(const P& p) {
  if constexpr (__is_empty(T)) {
    return {set1(1.0f)};
  } else {
    return {static_cast<const T*>(p.weight), set1(p.weight_offset == 0 ? -0.0f : float(p.weight_offset))};
  }
}

template <class T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

template <bool kFirst, class A, class B>
struct Select {
  using Type = A;
};
template <class A, class B>
struct Select<false, A, B> {
  using Type = B;
};

template <class A, class B>
struct Promote {
  using Type = float;
};
template <class A>
struct Promote<A, A> {
  using Type = A;
};
template <class A>
struct Promote<A, NoWeight> {
  using Type = A;
};

// The compensated product of fp32 forms g * rstd first. Is it finite whatever the rstd? (A factor
// of 2^31 makes an overflow of every weight that might overflow, and 0 * inf a NaN.)
template <class W>
INLINE bool products_are_finite(const W& weight, int64_t cols) {
  const V scale = set1(0x1p31f), nought = zero();
  return sum_products(cols, [&](int64_t i, int n) { return Factors{mul(weight(i, n), scale), nought}; }) == 0;
}

// ---------------------------------------------------------------- forward

// 1 / sqrt(v) as the sum of two floats.
struct Rstd {
  float hi, lo;
};

INLINE bool in_fast_range(double v) { return v >= kMinMeanSquare && v <= kMaxMeanSquare; }

INLINE Rstd rstd_of(double v) {
  const double r = 1 / __builtin_sqrt(v);
  const float hi = float(r);
  return {hi, float(r - hi)};
}

template <class Tx, class Ty, bool kCast, class W>
INLINE void scale_row(const Tx* x, const W& weight, Ty* y, int64_t cols, Rstd rstd) {
  const V hi = set1(rstd.hi), lo = set1(rstd.lo);
  for_each_vector(0, cols, [&](int64_t i, int n) {
    const V v = load(x + i, n), g = weight(i, n);
    if constexpr (kCast) {
      const V xhat = kIsFloat<Tx> ? fma(v, hi, mul(v, lo)) : mul(v, hi);
      store(y + i, mul(round_to<Tx>(xhat), g), n);
    } else if constexpr (kIsFloat<Tx>) {
      const V gr = mul(g, hi);
      const V rest = fma(g, lo, fmsub(g, hi, gr));
      store(y + i, fma(v, gr, mul(v, rest)), n);
    } else {
      store(y + i, mul(mul(v, hi), g), n);
    }
  });
}

template <class Tx, class Tw, bool kCast>
void forward_rows(const RmsNormForward& p, int64_t row_begin, int64_t row_end) {
  using Ty = typename Select<kCast, typename Promote<Tx, Tw>::Type, Tx>::Type;
  const int64_t cols = p.cols;
  const double per_col = 1.0 / double(cols);
  const auto weight = weight_of<Tw>(p);
  const bool fast = kCast || !kIsFloat<Tx> || __is_empty(Tw) || products_are_finite(weight, cols);

  // The sums of 4 short rows are formed before the first is scaled: square root and division of
  // one hide behind the sums of the next. Longer rows would leave the L1 cache in between.
  constexpr int kGroup = 4;
  const int64_t group = cols <= 1024 ? kGroup : 1;
  for (int64_t first = row_begin; first < row_end; first += group) {
    const int64_t last = first + group < row_end ? first + group : row_end;
    double mean_square[kGroup];
    for (int64_t row = first; row < last; ++row) {
      const Tx* x = static_cast<const Tx*>(p.x) + p.x_rows.offset(row);
      const double sum = sum_products(cols, [&](int64_t i, int n) {
        const V v = load(x + i, n);
        return Factors{v, v};
      });
      mean_square[row - first] = sum * per_col + p.eps;
    }
    for (int64_t row = first; row < last; ++row) {
      const double v = mean_square[row - first];
      if (!fast || !in_fast_range(v)) {
        forward_row_fp64(p, row);
        continue;
      }
      const Rstd rstd = rstd_of(v);
      scale_row<Tx, Ty, kCast>(static_cast<const Tx*>(p.x) + p.x_rows.offset(row), weight,
                               static_cast<Ty*>(p.y) + p.y_rows.offset(row), cols, rstd);
      if (p.rstd) static_cast<float*>(p.rstd)[row] = rstd.hi;
    }
  }
}

// ---------------------------------------------------------------- backward

// The weight plus its offset, as floats: in place where it is that already, else a tile at a time. The
// backward has 9 pairs of dtypes without the weight's: this keeps it from 36. Most weights are one
// tile, which is then filled once for a block of rows.
class WeightTiles {
 public:
  static constexpr int64_t kTile = 4096;  // 16 KB of stack
  static_assert(kTile % kFold == 0, "see add_products");

  explicit WeightTiles(const RmsNormBackward& p) : p_(p) {
    if (p.weight && p.w_dtype == DType::kFloat32 && p.weight_offset == 0) plain_ = static_cast<const float*>(p.weight);
  }

  // weights(i) for begin <= i < end, end - begin <= kTile.
  INLINE const float* operator()(int64_t begin, int64_t end) {
    if (plain_) return plain_ + begin;
    if (begin != filled_) fill(begin, end);
    return tile_;
  }

 private:
  void fill(int64_t begin, int64_t end);

  const RmsNormBackward& p_;
  const float* plain_ = nullptr;
  int64_t filled_ = -1;
  float tile_[kTile];
};

// One row: dx, and its dweight added to the block's partial sums. The flags say what is wanted.
template <class Tdy, class Tx, bool kDx, bool kDweight>
INLINE void gradient_row(const Tdy* dy, const Tx* x, WeightTiles& weight, Tx* dx, float* partial, int64_t cols,
                         float rstd, bool cast) {
  constexpr int64_t kTile = WeightTiles::kTile;
  const V r = set1(rstd);
  V c = zero();
  if constexpr (kDx) {
    Doubles sum = {};
    for (int64_t begin = 0; begin < cols; begin += kTile) {
      const int64_t end = begin + kTile < cols ? begin + kTile : cols;
      const float* g = weight(begin, end);
      add_products(sum, begin, end, [&](int64_t i, int n) {
        return Factors{mul(load(dy + i, n), load(g + (i - begin), n)), mul(load(x + i, n), r)};
      });
    }
    c = set1(float(total(sum) / double(cols)));
  }
  for (int64_t begin = 0; begin < cols; begin += kTile) {
    const int64_t end = begin + kTile < cols ? begin + kTile : cols;
    const float* g = kDx ? weight(begin, end) : nullptr;
    for_each_vector(begin, end, [&](int64_t i, int n) {
      const V d = load(dy + i, n), xhat = mul(load(x + i, n), r);
      if constexpr (kDweight) {
        store(partial + i, mul_add(d, cast ? round_to<Tx>(xhat) : xhat, load(partial + i, n)), n);
      }
      if constexpr (kDx) store(dx + i, mul(r, sub(mul(d, load(g + (i - begin), n)), mul(xhat, c))), n);
    });
  }
}

template <class Tdy, class Tx, bool kDx, bool kDweight>
void backward_blocks(const RmsNormBackward& p, int64_t block_begin, int64_t block_end) {
  const int64_t cols = p.cols, block_rows = rms_norm_backward_plan(p).block_rows;
  const float* rstd = static_cast<const float*>(p.rstd);
  WeightTiles weight(p);
  for (int64_t block = block_begin; block < block_end; ++block) {
    float* partial = kDweight ? static_cast<float*>(p.workspace) + block * cols : nullptr;
    if (kDweight) for_each_vector(0, cols, [&](int64_t i, int n) { store(partial + i, zero(), n); });
    const int64_t end = (block + 1) * block_rows < p.rows ? (block + 1) * block_rows : p.rows;
    for (int64_t row = block * block_rows; row < end; ++row) {
      if (!(rstd[row] >= kMinRstd && rstd[row] <= kMaxRstd)) {
        backward_row_fp64(p, row, partial);
        continue;
      }
      gradient_row<Tdy, Tx, kDx, kDweight>(static_cast<const Tdy*>(p.dy) + p.dy_rows.offset(row),
                                           static_cast<const Tx*>(p.x) + p.x_rows.offset(row), weight,
                                           static_cast<Tx*>(p.dx) + row * cols, partial, cols, rstd[row],
                                           p.cast_before_weight);
    }
  }
}

// ---------------------------------------------------------------- from dtypes to types

template <class F>
INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float());
    case DType::kFloat16: return f(Half());
    case DType::kBFloat16: return f(BFloat16());
    case DType::kFloat64: return;  // not here: dispatch.cpp has sent it to fp64.cpp
  }
}

template <class P, class F>
INLINE void with_weight_type(const P& p, F f) {
  if (p.weight) return with_type(p.w_dtype, f);
  f(NoWeight());
}

void forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end) {
  set_last_isa(kIsaName);
  with_type(p.x_dtype, [&](auto x) {
    with_weight_type(p, [&](auto w) {
      if (p.cast_before_weight) return forward_rows<decltype(x), decltype(w), true>(p, row_begin, row_end);
      forward_rows<decltype(x), decltype(w), false>(p, row_begin, row_end);
    });
  });
}

void WeightTiles::fill(int64_t begin, int64_t end) {
  with_weight_type(p_, [&](auto w) {
    const auto weight = weight_of<decltype(w)>(p_);
    for_each_vector(begin, end, [&](int64_t i, int n) { store(tile_ + (i - begin), weight(i, n), n); });
  });
  filled_ = begin;
}

void backward(const RmsNormBackward& p, int64_t block_begin, int64_t block_end) {
  set_last_isa(kIsaName);
  with_type(p.dy_dtype, [&](auto dy) {
    with_type(p.x_dtype, [&](auto x) {
      using Tdy = decltype(dy);
      using Tx = decltype(x);
      if (!p.dweight) return backward_blocks<Tdy, Tx, true, false>(p, block_begin, block_end);
      if (!p.dx) return backward_blocks<Tdy, Tx, false, true>(p, block_begin, block_end);
      backward_blocks<Tdy, Tx, true, true>(p, block_begin, block_end);
    });
  });
}
