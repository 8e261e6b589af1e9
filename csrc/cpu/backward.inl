// dx = rstd * (g - xhat * mean(g * xhat)) with g = dy * weight, and dweight, the sum of dy * xhat.
#pragma once
#include "weight.inl"

template <class Tdy, class Tx>
constexpr bool kGradientPairs = kIsBFloat16<Tdy> && kIsBFloat16<Tx>;

// Of the sum of g * x; rstd comes in at the end.
template <class Tdy, class Tx>
struct GradientFactors {
  static constexpr bool kPairs = kGradientPairs<Tdy, Tx>;
  const Tdy* dy;
  const Tx* x;
  TileWeight weight;
  Prefetch<Tdy> next_dy;
  Prefetch<Tx> next_x;

  INLINE void fetch(int64_t i) const {
    next_dy.template along<false, kBlock>(i);
    next_x.template along<false, kBlock>(i);
  }
  INLINE Factors operator()(int64_t i, int n) const {
    return {load(dy + i, n) * weight(i, n), load(x + i, n)};
  }
  INLINE PairFactors pair(int64_t i) const {
    const Pair d = split(dy + i), v = split(x + i), g = weight.pair(i);
    return {{d.even * g.even, v.even}, {d.odd * g.odd, v.odd}};
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

// Columns begin to end of one row: dx, and its dweight added to the partial sums, whose whole
// blocks are in the order of Pair if the loads are; the flags say what is wanted.
template <bool kDx, bool kDweight, bool kStream, class Tdy, class Tx>
INLINE void gradient(GradientRow<Tdy, Tx> row, Prefetch<Tdy> next_dy, Prefetch<Tx> next_x,
                     TileWeight weight, float* partial, int64_t begin, int64_t end, bool cast) {
  const V r = set1(row.rstd), c = set1(row.mean);
  const bool from_last = kStream && waits<1>(row.dx, row.dy) + waits<1>(row.dx, row.x) +
                                            waits<1>(row.dx, row.dresidual) +
                                            waits<1>(row.dx, weight.data) >
                                        0;
  const auto vector = [&](V d, V x, V w, float* sum, int n) INLINE_LAMBDA {
    const V xhat = x * r;
    if constexpr (kDweight) {
      store(sum, Isa::fma(d, cast ? round_to<Tx>(xhat) : xhat, load(sum, n)), n);
    }
    return kDx ? r * (d * w - xhat * c) : V{};
  };
  const auto one = [&](int64_t i, int n, auto in_step) INLINE_LAMBDA {
    V result =
        vector(load(row.dy + i, n), load(row.x + i, n), kDx ? weight(i, n) : V{}, partial + i, n);
    if (kDx && row.dresidual) result = result + load(row.dresidual + i, n);
    if constexpr (kDx) write<kStream && in_step.value>(row.dx + i, result, n);
  };
  const auto step = [&](int64_t i) INLINE_LAMBDA {
    next_dy.template along<true, kStep>(i);
    next_x.template along<true, kStep>(i);
    if constexpr (kGradientPairs<Tdy, Tx>) {
      const auto pair = [&](int64_t j, int) INLINE_LAMBDA {
        const Pair d = split(row.dy + j), x = split(row.x + j), w = kDx ? weight.pair(j) : Pair{};
        V even = vector(d.even, x.even, w.even, partial + j, kLanes);
        V odd = vector(d.odd, x.odd, w.odd, partial + j + kLanes, kLanes);
        if (kDx && row.dresidual) {
          const Pair other = split(row.dresidual + j);
          even = even + other.even, odd = odd + other.odd;
        }
        if constexpr (kDx) join<kStream, false>(row.dx + j, {even, odd});
      };
      for_each_vector_of_step<2 * kLanes>(i, pair, from_last);
    } else {
      const auto vector = [&](int64_t j, int n) INLINE_LAMBDA { one(j, n, Constant<true>()); };
      for_each_vector_of_step(i, vector, from_last);
    }
  };
  const auto rest = [&](int64_t i, int n) INLINE_LAMBDA { one(i, n, Constant<false>()); };
  for_each_step<kGradientPairs<Tdy, Tx> ? kBlock : kStep>(begin, end, step, rest, from_last);
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
INLINE bool is_certain(double sum, float rstd) {
  const double magnitude = __builtin_fabs(sum);
  return magnitude <= kMaxGradientSum && (rstd <= kMaxPlainRstd || magnitude >= kMinGradientSum);
}

// Some blocks of rows. kRows: how many long rows at most stay in the L2 cache between the two
// passes over them, each of which takes the group tile by tile, so that the weight and the partial
// sums stay in the L1 cache. What is short stays in the L1 cache itself, and what has to come from
// memory comes at a steadier pace row by row.
template <class Tdy, class Tx, bool kDx, bool kDweight, int kRows>
class BackwardBlocks {
 public:
  INLINE BackwardBlocks(const RmsNormBackward& params, WeightTiles& w) : p(params), weight(w) {}

  INLINE void run(int64_t block_begin, int64_t block_end) {
    for (int64_t block = block_begin; block < block_end; ++block) {
      start_block(block);
      for (int64_t first = block_first; first < block_last; first += group) {
        const int64_t count = first + group < block_last ? group : block_last - first;
        sum_group(first, count);
        judge_group(first, count);
        write_group(first, count);
        if (kDweight && sums_of_block > 1) fold_partials(first + count);
      }
      finish_block();
    }
    if (stream) Isa::fence();
  }

 private:
  using Row = GradientRow<Tdy, Tx>;
  static constexpr int64_t kColumns = kRows == 1 ? WeightTiles::kTile : kGradientTile;
  enum Verdict : char { kFast, kDxAgain, kAllAgain };

  INLINE Row row_at(int64_t row) const {
    const Tx* dresidual = static_cast<const Tx*>(p.dresidual);
    return {static_cast<const Tdy*>(p.dy) + p.dy_rows.offset(row),
            static_cast<const Tx*>(p.x) + p.x_rows.offset(row),
            dresidual ? dresidual + p.dresidual_rows.offset(row) : nullptr,
            static_cast<Tx*>(p.dx) + row * cols,
            static_cast<const float*>(p.rstd)[row],
            0};
  }

  // What the rows of a block add to dweight; of a large one what up to kFoldRows rows add, and what
  // those before them did.
  INLINE void start_block(int64_t block) {
    block_first = block * block_rows;
    block_last = block_first + block_rows < p.rows ? block_first + block_rows : p.rows;
    again = false;
    if constexpr (kDweight) {
      folded = static_cast<float*>(p.workspace) + sums_of_block * block * cols;
      partial = folded + (sums_of_block - 1) * cols;
      fold_at = block_first + kFoldRows;
      for_each_vector(0, sums_of_block * cols,
                      [&](int64_t i, int n) { store(folded + i, V{}, n); });
    }
  }

  // The first pass: sums of g * x.
  INLINE void sum_group(int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      rows[j] = row_at(first + j);
      sums[j] = Doubles{};
    }
    for (int64_t begin = 0; kDx && begin < cols; begin += kColumns) {
      const int64_t end = begin + kColumns < cols ? begin + kColumns : cols;
      const TileWeight w = weight.part(begin);
      for (int64_t j = 0; j < count; ++j) {
        const Row row = rows[j];
        Doubles sum = sums[j];
        const bool fetch = in_halves && prefetch && first + 1 < block_last;
        const Row next = fetch ? row_at(first + 1) : Row{};
        const GradientFactors<Tdy, Tx> factors{
            row.dy, row.x, w, {next.dy, cols, true}, {next.x, cols, true}};
        add_products(sum, begin, end, factors);
        sums[j] = sum;
      }
    }
  }

  INLINE void judge_group(int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      const double sum = kDx ? total(sums[j]) : 0;
      const float rstd = rows[j].rstd;
      rows[j].mean = float(sum * rstd / double(cols));
      // A NaN comes out of every product with the row that it is in.
      const bool fast = rstd != rstd || in_fast_range(rstd);
      const bool certain = rstd != rstd || !kDx || is_certain(sum, rstd);
      const Verdict verdict = !fast ? kAllAgain : !certain ? kDxAgain : kFast;
      verdicts[first - block_first + j] = verdict;
      again |= verdict != kFast;
    }
  }

  // The second pass: dx and the partial sums of dweight.
  INLINE void write_group(int64_t first, int64_t count) {
    for (int64_t begin = 0; begin < cols; begin += kColumns) {
      const int64_t end = begin + kColumns < cols ? begin + kColumns : cols;
      const TileWeight w = kDx ? weight.part(begin) : TileWeight{};
      for (int64_t j = 0; j < count; ++j) {
        if (verdicts[first - block_first + j] == kAllAgain) continue;
        const Row row = rows[j];
        const bool fetch = prefetch && first + group + j < block_last;
        const Row next = fetch ? row_at(first + group + j) : Row{};
        const Prefetch<Tdy> next_dy{next.dy, cols, in_halves};
        const Prefetch<Tx> next_x{next.x, cols, in_halves};
        const auto write = [&](auto streams) INLINE_LAMBDA {
          gradient<kDx, kDweight, streams.value>(row, next_dy, next_x, w, partial, begin, end,
                                                 p.cast_before_weight);
        };
        const bool is_nan = kDx && row.rstd != row.rstd;
        const bool streams = kRows == 1 && stream && !is_nan;
        streams ? write(Constant<Isa::kStreams && kDx>()) : write(Constant<false>());
        if (is_nan) fill_with_nan(row.dx, begin, end);
      }
    }
  }

  INLINE void fold_partials(int64_t rows_end) {
    if (rows_end < fold_at && rows_end != block_last) return;
    fold_at += kFoldRows;
    for_each_vector(0, cols, [&](int64_t i, int n) {
      store(folded + i, load(folded + i, n) + load(partial + i, n), n);
      store(partial + i, V{}, n);
    });
  }

  INLINE void finish_block() {
    if (kDweight && kGradientPairs<Tdy, Tx>) unpair(folded, cols);
    if (!again) return;
    if (stream) Isa::fence();
    for (int64_t row = block_first; row < block_last; ++row) {
      const Verdict verdict = verdicts[row - block_first];
      if (verdict != kFast) backward_row_fp64(p, row, verdict == kAllAgain ? folded : nullptr);
    }
  }

  const RmsNormBackward& p;
  WeightTiles& weight;  // not a member: its address leaves this object, which then stays in memory
  const int64_t cols = p.cols, block_rows = rms_norm_backward_plan(p).block_rows;
  const int64_t sums_of_block = dweight_sums(block_rows);
  const bool stream = p.stream && streamable<Tx>(p.dx, Rows{1, {p.rows}, {cols}});
  const bool prefetch =
      !kIsFloat<Tx> || p.rows * cols * int64_t(sizeof(Tdy) + 2 * sizeof(Tx)) >= kFarBytes;
  const bool in_halves = kDx && kRows == 1 && cols * int64_t(sizeof(Tx)) >= long_row_bytes();
  const int64_t group =
      between(gradient_bytes() / (cols * int64_t(sizeof(Tdy) + sizeof(Tx))), 1, kRows);
  int64_t block_first, block_last, fold_at;
  float *folded = nullptr, *partial = nullptr;
  bool again;
  Row rows[kRows];
  Doubles sums[kRows];
  Verdict verdicts[kMaxBlockRows];
};

// From dtypes to types. The flag only names the instruction set.
template <bool kRound>
void backward(const RmsNormBackward& p, int64_t block_begin, int64_t block_end) {
  set_last_isa(Isa::kNames[kRound]);
  with_type(p.dy_dtype, [&](auto dy) {
    with_type(p.x_dtype, [&](auto x) {
      using Tdy = decltype(dy);
      using Tx = decltype(x);
      const auto run = [&](auto dx, auto dweight, auto rows) {
        WeightTiles weight(p, kGradientPairs<Tdy, Tx>);
        using Kernel = BackwardBlocks<Tdy, Tx, dx.value, dweight.value, rows.value>;
        Kernel(p, weight).run(block_begin, block_end);
      };
      constexpr Constant<true> yes;
      if (!p.dweight) return run(yes, Constant<false>(), Constant<1>());
      if (!p.dx) return run(Constant<false>(), yes, Constant<1>());
      const int64_t bytes = p.rows * p.cols * int64_t(sizeof(Tdy) + 2 * sizeof(Tx));
      if (p.cols <= kGradientTile || bytes >= kFarBytes) return run(yes, yes, Constant<1>());
      run(yes, yes, Constant<kGradientRows>());
    });
  });
}

// Sums the blocks' partial sums in their order, in double.
void dweight(const RmsNormBackward& p, int64_t col_begin, int64_t col_end) {
  constexpr int64_t kColumns = 256;  // 2 KB of sums, and whole cache lines of the partials
  const BackwardPlan plan = rms_norm_backward_plan(p);
  const int64_t blocks = plan.blocks, stride = dweight_sums(plan.block_rows) * p.cols;
  for (int64_t begin = col_begin; begin < col_end; begin += kColumns) {
    const int64_t count = col_end - begin < kColumns ? col_end - begin : kColumns;
    double sums[kColumns] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const float* folded = static_cast<float*>(p.workspace) + block * stride + begin;
      for (int64_t i = 0; i < count; ++i) sums[i] += folded[i];
    }
    float rounded_sums[kColumns];
    for (int64_t i = 0; i < kColumns; ++i) rounded_sums[i] = float(sums[i]);
    with_type(p.w_dtype, [&](auto w) {
      auto* to = static_cast<decltype(w)*>(p.dweight) + begin;
      for_each_vector(0, count, [&](int64_t i, int n) {
        const V sum = load(rounded_sums + i, n);
        store(to + i, sum == sum ? sum : set1(__builtin_nanf("")), n);  // one NaN: fill_with_nan()
      });
    });
  }
}
