// y = x * rstd * weight, with x formed first where it is a sum.
#pragma once
#include "weight.inl"

// In which order a call works, from the length of its rows alone; no bit depends on it.
struct RowSchedule {
  int64_t group;   // rows that are summed before the first of them is scaled
  int64_t ahead;   // how many rows behind the one that is summed one is fetched
  bool in_halves;  // see Prefetch
};

// Short rows are summed a group ahead of the one that is scaled: their square roots and divisions
// share instructions and are waited for less.
template <class Tx>
INLINE RowSchedule schedule_rows(int64_t cols) {
  const int64_t row_bytes = cols * int64_t(sizeof(Tx));
  return {between(kGroupBytes / row_bytes, 1, Isa::kGroupRows),
          between(kAheadBytes / row_bytes, 1, kMostAhead), row_bytes >= long_row_bytes()};
}

// Of the sum of squares. kLook: the elements go by `small` too.
template <class Tx, bool kLook>
struct Squares {
  static constexpr bool kPairs = kIsBFloat16<Tx>;
  const Tx* x;
  Isa::SmallElements& small;
  Prefetch<Tx> next;

  INLINE void fetch(int64_t i) const { next.template along<false, kBlock>(i); }
  INLINE Factors operator()(int64_t i, int n) const {
    const V v = Isa::once(load(x + i, n));
    return {v, v};
  }
  INLINE PairFactors pair(int64_t i) const {
    const U32 pairs = load_pairs(x + i);
    if constexpr (kLook) small.look(pairs);
    const Pair v = split(pairs);
    return {{v.even, v.even}, {v.odd, v.odd}};
  }
};

// Of the sum of squares of a row that is formed on the way: input + residual, rounded and stored.
// kRound: by Isa::round_pair where that is certain to be right.
template <class Tin, class Tx, bool kRound>
struct SquaresOfSum {
  static constexpr bool kPairs = kIsBFloat16<Tx>;
  const Tin* input;
  const Tx* residual;
  Tx* x;
  Isa::SmallElements& small;
  const Tin* next_input;  // nullptr: nothing to fetch
  const Tx* next_residual;
  bool in_halves;

  // A short row to the L1 cache. Of a long one the residual by halves, as Prefetch does it, and the
  // input as a whole.
  INLINE void fetch(int64_t i) const {
    if (!next_input) return;
    if (in_halves) {
      Prefetch<Tin>::template lines<kBlock, 2>(next_input + i);
      Prefetch<Tx>::template lines<kBlock / 2, 2>(next_residual + i / 2);
    } else {
      Prefetch<Tin>::template lines<kBlock, 3>(next_input + i);
      Prefetch<Tx>::template lines<kBlock, 3>(next_residual + i);
    }
  }
  INLINE Factors operator()(int64_t i, int n) const {
    const V v = round_and_store(x + i, load(input + i, n) + load(residual + i, n), n);
    return {v, v};
  }
  INLINE PairFactors pair(int64_t i) const {
    const U32 pairs = rounded_sums(i);
    __builtin_memcpy(x + i, &pairs, sizeof pairs);
    if constexpr (kRound) small.look(pairs);
    const Pair v = split(pairs);
    return {{v.even, v.even}, {v.odd, v.odd}};
  }

 private:
  INLINE U32 rounded_sums(int64_t i) const {
    const U32 others = load_pairs(residual + i);
    const Pair b = split(others);
    if constexpr (kIsBFloat16<Tin>) {
      const U32 pairs = load_pairs(input + i);
      const Pair a = split(pairs), sum = {a.even + b.even, a.odd + b.odd};
      if constexpr (kRound) {
        if (!Isa::sum_may_be_denormal(pairs, others)) return join<true>(sum);
      }
      return join<false>(sum);
    } else {
      const Pair a = load_pair(input + i);
      return join<false>({shorten_nan(a.even + b.even), shorten_nan(a.odd + b.odd)});
    }
  }
};

// input + residual, which both passes over an unrounded sum form: to keep it in memory takes
// longer.
template <class T>
struct UnroundedSum {
  const T* input;
  const T* residual;

  INLINE V operator()(int64_t i, int n) const { return load(input + i, n) + load(residual + i, n); }
  INLINE Pair pair(int64_t i) const {
    const Pair a = split(input + i), b = split(residual + i);
    return {a.even + b.even, a.odd + b.odd};
  }
};

// Of the sum of its squares.
template <class T, bool kRound>
struct SquaresOfUnrounded {
  static constexpr bool kPairs = kIsBFloat16<T>;
  SquaresOfSum<T, T, kRound> of;
  UnroundedSum<T> sum{of.input, of.residual};

  INLINE void fetch(int64_t i) const { of.fetch(i); }
  INLINE Factors operator()(int64_t i, int n) const {
    const V v = sum(i, n);
    return {v, v};
  }
  INLINE PairFactors pair(int64_t i) const {
    const Pair v = sum.pair(i);
    if constexpr (kRound) of.small.look(Isa::interleave(U32(v.even), U32(v.odd)));
    return {{v.even, v.even}, {v.odd, v.odd}};
  }
};

// Forms a row of x, and sums its squares. fetches: there is a row to fetch meanwhile. kCols:
// as of ForwardRows; an fp32 head takes a tenth less time so. kUnrounded: sums the squares alone.
template <class Tin, class Tx, bool kRound, int kCols, bool kUnrounded>
Doubles add_and_sum(const RmsNormForward& p, int64_t row, bool fetches, Isa::SmallElements& small) {
  const int64_t cols = kCols ? kCols : p.cols;
  const Addends& a = p.addends;
  Tx* x = static_cast<Tx*>(const_cast<void*>(p.x)) + p.x_rows.offset(row);
  Doubles sum = {};
  if constexpr (kIsSame<Tin, double>) {
    add_row_fp64(p, row);
    add_products(sum, 0, cols, Squares<Tx, kRound>{x, small, {}});
  } else {
    const RowSchedule schedule = schedule_rows<Tx>(cols);
    const Tin* input = static_cast<const Tin*>(a.input) + a.input_rows.offset(row);
    const Tx* residual = static_cast<const Tx*>(a.residual) + a.residual_rows.offset(row);
    const Tin* next = row_ahead(input, a.input_rows, schedule.ahead);
    const SquaresOfSum<Tin, Tx, kRound> squares{
        input,
        residual,
        x,
        small,
        fetches ? next : nullptr,
        row_ahead(residual, a.residual_rows, schedule.ahead),
        schedule.in_halves};
    if constexpr (kUnrounded) {
      add_products(sum, 0, cols, SquaresOfUnrounded<Tx, kRound>{squares});
    } else {
      add_products(sum, 0, cols, squares);
    }
  }
  return sum;
}

using AddAndSum = decltype(&add_and_sum<float, float, false, 0, false>);

// nullptr: x is no sum.
template <class Tx, bool kRound, int kCols, bool kUnrounded>
AddAndSum add_and_sum_of(const RmsNormForward& p) {
  if constexpr (kUnrounded) return add_and_sum<Tx, Tx, kRound, kCols, true>;
  if (!p.addends.input) return nullptr;
  AddAndSum result = add_and_sum<double, Tx, kRound, kCols, false>;
  with_type(p.addends.input_dtype,
            [&](auto in) { result = add_and_sum<decltype(in), Tx, kRound, kCols, false>; });
  return result;
}

// x * rstd * weight. Fp32 forms its products to twice the precision: with the error of a short
// row's sum on top, two roundings would make 2 ulps now and then.
template <class Tx, bool kCast>
struct Scale {
  const double rstd;
  const V hi = set1(float(rstd)), lo = set1(float(rstd - float(rstd)));

  INLINE V operator()(V v, V g) const {
    if constexpr (!kIsFloat<Tx>) {
      return (kCast ? round_to<Tx>(v * hi) : v * hi) * g;
    } else if constexpr (!Isa::kFma) {
      return kCast ? Isa::mul_in_double(v, rstd) * g : Isa::mul_in_double(v, rstd, g);
    } else if constexpr (kCast) {
      return Isa::fma(v, hi, v * lo) * g;
    } else {
      v = Isa::once(v), g = Isa::once(g);
      const V gr = g * hi;
      return Isa::fma(v, gr, v * Isa::fma(g, lo, Isa::fmsub(g, hi, gr)));
    }
  }
};

// A row as scale_row() reads it. kRound: by Isa::round_pair.
template <class Tx>
struct RowOfX {
  const Tx* at;

  INLINE V operator()(int64_t i, int n) const { return load(at + i, n); }
  template <bool kRound>
  INLINE Pair pair(int64_t i) const {
    return split(at + i);
  }
};
// The same of an unrounded sum. What is read is written too, rounded, to x.
template <class T>
struct RowOfUnrounded {
  const T* at;  // the input
  const T* residual;
  T* x;

  INLINE V operator()(int64_t i, int n) const {
    const V v = UnroundedSum<T>{at, residual}(i, n);
    store(x + i, v, n);
    return v;
  }
  template <bool kRound>
  INLINE Pair pair(int64_t i) const {
    const Pair v = UnroundedSum<T>{at, residual}.pair(i);
    join<false, kRound>(x + i, v);
    return v;
  }
};

// One row of y.
template <bool kStream, bool kRound, class Tx, bool kCast, class W, class Ty, class Row>
INLINE void scale_row(Row x, W& weight, Ty* y, int64_t cols, double rstd, Prefetch<Tx> next) {
  constexpr bool kPairs = kIsBFloat16<Tx> && kIsBFloat16<Ty>;
  const Scale<Tx, kCast> scaled{rstd};
  for (int64_t begin = 0; begin < cols; begin += WeightTiles::kTile) {
    const int64_t end = WeightTiles::tile_end(begin, cols);
    const auto w = weight.part(begin);
    const bool from_last = kStream && waits<2>(y, x.at) + waits<2>(y, w.data) > 0;
    const auto step = [&](int64_t i) {
      next.template along<true, kStep>(i);
      if constexpr (kPairs) {
        const auto pair = [&](int64_t j, int) INLINE_LAMBDA {
          const Pair v = x.template pair<kRound>(j), g = w.pair(j);
          join<kStream, kRound>(y + j, {scaled(v.even, g.even), scaled(v.odd, g.odd)});
        };
        for_each_vector_of_step<2 * kLanes>(i, pair, from_last);
      } else {
        const auto vector = [&](int64_t j, int n) INLINE_LAMBDA {
          write<kStream>(y + j, scaled(x(j, n), w(j, n)), n);
        };
        for_each_vector_of_step(i, vector, from_last);
      }
    };
    const auto one = [&](int64_t i, int n)
                         INLINE_LAMBDA { store(y + i, scaled(x(i, n), w(i, n)), n); };
    for_each_step<kPairs ? kBlock : kStep>(begin, end, step, one, from_last);
  }
}

// A row of y is x * rstd * weight, and no more.
struct NoRotation {};

// Some rows of y; or of what a Rotation makes of them. kStream: past the caches. kCols: the length
// of the rows where it is known to the compiler, else 0. kRound: BFloat16 is rounded by
// Isa::round_pair in groups without small elements; the caller has seen to the weight. kUnrounded:
// the rows are unrounded sums, of two tensors of Tx.
template <bool kStream, class Tx, class Ty, bool kCast, bool kRound, int kCols, class W,
          class Rotation, bool kUnrounded = false>
class ForwardRows {
 public:
  // weight_is_in_range: else every product might leave the fast path's range.
  INLINE ForwardRows(const RmsNormForward& params, W& w, Rotation& r, bool weight_is_in_range,
                     int64_t end, int64_t first_row_of_y)
      : p(params),
        weight(w),
        rotation(r),
        in_range(weight_is_in_range),
        row_end(end),
        y_begin(first_row_of_y) {}

  INLINE void run(int64_t row_begin) {
    const int64_t group = schedule.group;
    for (int64_t first = row_begin; first < row_end; first += group) {
      const int64_t count = first + group < row_end ? group : row_end - first;
      if (group == 1 || first == row_begin) {
        for (int64_t j = 0; j < count; ++j) sum_row(first + j, j);
      }
      const bool fast = find_rstd(first, count);
      for (int64_t j = 0; p.rstd && j < count; ++j) {
        static_cast<float*>(p.rstd)[first + j] = float(rstd[j]);
      }
      const bool round = kRound && !small.any();
      small = {};
      for (int64_t j = 0; j < count; ++j) {
        const int64_t row = first + j;
        if (group > 1 && row + group < row_end) sum_row(row + group, j);
        if (fast || (in_range && in_fast_range(rstd[j]))) {
          write_row(row, rstd[j], round);
        } else {
          write_uncommon_row(row, rstd[j]);
        }
      }
    }
    if (kStream) Isa::fence();
  }

 private:
  static constexpr bool kRotates = !kIsSame<Rotation, NoRotation>;

  INLINE int64_t cols() const { return kCols ? kCols : any_cols; }
  INLINE const Tx* row_of_x(int64_t row) const {
    return static_cast<const Tx*>(p.x) + p.x_rows.offset(row);
  }
  // A row so many ahead of this one; of a sum what SquaresOfSum leaves of the residual.
  INLINE Prefetch<Tx> prefetch(const Tx* x, int64_t row, int64_t ahead) const {
    if (row + ahead >= row_end || (add_and_sum && !schedule.in_halves)) return {};
    if (!add_and_sum) return {row_ahead(x, p.x_rows, ahead), cols(), schedule.in_halves};
    const Addends& a = p.addends;
    const Tx* residual = static_cast<const Tx*>(a.residual) + a.residual_rows.offset(row + ahead);
    return {residual, cols(), /*in_halves=*/true};
  }

  // sums[j]: of the row's squares, in double.
  INLINE void sum_row(int64_t row, int64_t j) {
    if (!add_and_sum) {
      Doubles sum = {};
      const Tx* x = row_of_x(row);
      const Prefetch<Tx> next =
          schedule.in_halves ? prefetch(x, row, schedule.ahead) : Prefetch<Tx>{};
      add_products(sum, 0, cols(), Squares<Tx, kRound>{x, small, next});
      sums[j] = sum;
    } else {
      Isa::SmallElements seen = small;  // a copy, or this object would stay in memory
      sums[j] = add_and_sum(p, row, row + schedule.ahead < row_end, seen);
      small = seen;
    }
  }

  // See kDominant; rstd[j] is the sum of squares yet.
  INLINE void look_for_dominant(int64_t row, int64_t j) {
    if constexpr (kIsFloat<Tx> || kUnrounded) {
      if (__builtin_expect(exceeds(sums[j], kDominant * rstd[j]), false)) {
        if constexpr (kUnrounded) {
          rstd[j] = sum_of_squares_fp64(p, row);
        } else {
          rstd[j] = sum_squares_in_double(row_of_x(row), cols());
        }
      }
    }
  }

  // From sums to rstd; true if all and the weight are in the fast path's range.
  INLINE bool find_rstd(int64_t first, int64_t count) {
    const double eps = p.eps;
    bool fast = in_range;
    if (count == Isa::kGroupRows) {  // side by side
      for (int j = 0; j < Isa::kGroupRows; j += Isa::kTotals) Isa::totals(sums + j, rstd + j);
      for (int j = 0; j < Isa::kGroupRows; ++j) look_for_dominant(first + j, j);
      for (int j = 0; j < Isa::kGroupRows; ++j) {
        rstd[j] = 1 / __builtin_sqrt(rstd[j] * per_col + eps);
      }
      for (int j = 0; j < Isa::kGroupRows; ++j) fast &= in_fast_range(rstd[j]);
    } else {
      for (int64_t k = 0; k < count; ++k) {
        rstd[k] = total(sums[k]);
        look_for_dominant(first + k, k);
        rstd[k] = 1 / __builtin_sqrt(rstd[k] * per_col + eps);
        fast &= in_fast_range(rstd[k]);
      }
    }
    if (!fast) {  // one NaN for all, whichever the row held first
      for (int64_t k = 0; k < count; ++k) {
        if (rstd[k] != rstd[k]) rstd[k] = __builtin_nan("");
      }
    }
    return fast;
  }

  INLINE Ty* row_of_y(int64_t row) const {
    return reinterpret_cast<Ty*>(y_address + p.y_rows.offset(row) * sizeof(Ty));
  }

  INLINE void write_row(int64_t row, double rstd_of_row, bool round) {
    const Tx* x = row_of_x(row);
    const Prefetch<Tx> next = prefetch(x, row, window);
    if constexpr (kRotates) {
      return rotation.write_row(row, x, row_of_y(row), cols(), rstd_of_row, next);
    }
    const auto scale = [&](auto rounds) INLINE_LAMBDA {
      const auto scale_it = [&](auto row_of_it) INLINE_LAMBDA {
        scale_row<kStream, rounds.value, Tx, kCast>(row_of_it, weight, row_of_y(row), cols(),
                                                    rstd_of_row, next);
      };
      if constexpr (kUnrounded) {
        scale_it(unrounded_row(row));
      } else {
        scale_it(RowOfX<Tx>{x});
      }
    };
    round ? scale(Constant<kRound>()) : scale(Constant<false>());
  }

  INLINE RowOfUnrounded<Tx> unrounded_row(int64_t row) const {
    const Addends& a = p.addends;
    return {static_cast<const Tx*>(a.input) + a.input_rows.offset(row),
            static_cast<const Tx*>(a.residual) + a.residual_rows.offset(row),
            const_cast<Tx*>(row_of_x(row))};
  }

  INLINE void write_uncommon_row(int64_t row, double rstd_of_row) {
    if constexpr (kUnrounded) {
      if (rstd_of_row != rstd_of_row) {
        const RowOfUnrounded<Tx> x = unrounded_row(row);
        for_each_vector(0, cols(), [&](int64_t i, int n) { x(i, n); });
      }
    }
    if (rstd_of_row != rstd_of_row) return fill_with_nan(row_of_y(row), 0, cols());
    if constexpr (kRotates) return rotation.write_uncommon_row(row);
    forward_row_fp64(p, row, y_begin);
  }

  const RmsNormForward& p;
  W& weight;
  Rotation& rotation;
  const bool in_range;
  const int64_t row_end, y_begin;
  const uintptr_t y_address =  // where row 0 would be
      reinterpret_cast<uintptr_t>(p.y) - y_begin * p.y_rows.stride[0] * sizeof(Ty);
  const int64_t any_cols = p.cols;
  const double per_col = 1.0 / double(cols());
  const RowSchedule schedule = schedule_rows<Tx>(cols());
  // From the row that is scaled to the one that is fetched.
  const int64_t window = schedule.ahead + (schedule.group > 1 ? schedule.group : 0);
  // nullptr: x is there.
  const AddAndSum add_and_sum = add_and_sum_of<Tx, kRound, kCols, kUnrounded>(p);
  static_assert(Isa::kGroupRows % Isa::kTotals == 0);
  Doubles sums[Isa::kGroupRows];
  double rstd[Isa::kGroupRows];
  Isa::SmallElements small;
};

// Calls run(Constant<kCols>()) for rows of that many columns.
template <bool kConstant, class F>
INLINE void with_cols(int64_t cols, F run) {
  // Heads take a fifth less time without loops, and 2 to 4 % less again out of line.
  const auto head = [&](auto constant) __attribute__((noinline)) { run(constant); };
  if constexpr (Isa::kUnrollsHeads && kConstant) {
    if (cols == 64) return head(Constant<64>());
    if (cols == 128) return head(Constant<128>());
  }
  run(Constant<0>());
}

template <class Tx, class Ty, bool kCast, bool kRound, class W>
void forward_rows(const RmsNormForward& p, W& weight, bool in_range, int64_t row_begin,
                  int64_t row_end, int64_t y_begin) {
  NoRotation none;
  // Not of the rows without a loop, which would be as many kernels again.
  constexpr bool kMayBeUnrounded = !kIsFloat<Tx> && (kCast || kIsSame<Tx, Ty>);
  const auto run = [&](auto stream) {
    if constexpr (kMayBeUnrounded) {
      if (is_unrounded(p)) {
        using Kernel = ForwardRows<stream.value, Tx, Ty, kCast, kRound, 0, W, NoRotation, true>;
        return Kernel(p, weight, none, in_range, row_end, y_begin).run(row_begin);
      }
    }
    with_cols<kIsSame<Tx, Ty>>(p.cols, [&](auto cols) INLINE_LAMBDA {
      using Kernel = ForwardRows<stream.value, Tx, Ty, kCast, kRound, cols.value, W, NoRotation>;
      Kernel(p, weight, none, in_range, row_end, y_begin).run(row_begin);
    });
  };
  const bool streams = p.stream && streamable<Ty>(p.y, p.y_rows);
  streams ? run(Constant<Isa::kStreams>()) : run(Constant<false>());
}

// Chooses how the weight is read.
template <class Tx, class Ty, bool kCast, bool kRound>
void forward_typed(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin) {
  const auto with = [&](auto round, auto& weight, bool in_range) {
    forward_rows<Tx, Ty, kCast, round.value>(p, weight, in_range, row_begin, row_end, y_begin);
  };
  if (!p.weight) {
    if constexpr (kCast) return;  // forward() does not ask for it
    NoWeight one{set1(1.0f)};
    return with(Constant<kRound>(), one, true);
  }
  // A tile does not pay for one row. In long rows it takes the place of x or y in the L1 cache.
  if constexpr (!kIsFloat<Tx> && kIsSame<Tx, Ty>) {
    const bool in_tile = kIsSame<Tx, Half> && !p.stream && p.cols <= half_tile_cols();
    const bool long_rows = Isa::kConverts16Bit && p.cols > kDirectCols && !in_tile;
    if (p.w_dtype == p.x_dtype && p.weight_offset == 0 && (row_end - row_begin == 1 || long_rows)) {
      Weight<Tx> weight{static_cast<const Tx*>(p.weight)};
      if constexpr (kRound) {
        Isa::SmallElements small;
        for (int64_t i = 0; i < p.cols / kBlock * kBlock; i += 2 * kLanes) {
          small.look(load_pairs(weight.data + i));
        }
        if (small.any()) return with(Constant<false>(), weight, true);
      }
      return with(Constant<kRound>(), weight, true);
    }
  }
  WeightTiles weight(p, kIsBFloat16<Tx> && kIsBFloat16<Ty>);
  bool in_range = true;
  if constexpr (kRound || (kIsFloat<Tx> && !kCast)) {
    constexpr int kExponent = kRound ? kSmallExponent : kMinWeightExponent;
    for (int64_t begin = 0; begin < p.cols && in_range; begin += WeightTiles::kTile) {
      const int64_t count = WeightTiles::tile_end(begin, p.cols) - begin;
      in_range = is_in_range(weight.part(begin).data + begin, count, kExponent);
    }
  }
  if (kRound && !in_range) return with(Constant<false>(), weight, true);
  with(Constant<kRound>(), weight, in_range);
}

// From dtypes to types. kRound: with Isa::round_pair.
template <bool kRound>
void forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin) {
  static_assert(!kRound || Isa::kRoundsBFloat16);
  set_last_isa(Isa::kNames[kRound]);
  const bool cast = p.cast_before_weight && p.weight;  // else there is nothing to be cast before
  with_type(p.x_dtype, [&](auto x) {
    with_type(p.y_dtype, [&](auto y) {
      using Tx = decltype(x);
      using Ty = decltype(y);
      // A residual in fp32 beside 16-bit activations, a weight in fp32 beside them, or a tile.
      constexpr bool kSame = kIsSame<Tx, Ty>, kRoundTx = kRound && kSame && kIsBFloat16<Tx>;
      if constexpr (kSame || kIsFloat<Tx> || kIsFloat<Ty>) {
        if (!cast) return forward_typed<Tx, Ty, false, kRoundTx>(p, row_begin, row_end, y_begin);
        forward_typed<Tx, Ty, true, kRoundTx>(p, row_begin, row_end, y_begin);
      }
    });
  });
}
