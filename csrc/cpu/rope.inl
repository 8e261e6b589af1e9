// Heads are rotated: those that the norm has left in a tile, and gradients on their way back to it.
#pragma once
#include "sum.inl"

// cos and sin of a token in the type that is computed in, one for each pair of columns; where these
// are neighbours, one for each column, of sin what the other column of the pair is multiplied by.
struct Angles {
  alignas(kLine) float cos[2 * Rope::kMostPairs], sin[2 * Rope::kMostPairs];
};

// kRoundEach: the angles are rounded to To, and so is each product.
template <class To, bool kRoundEach>
INLINE V rounded_step(V v) {
  if constexpr (kRoundEach) return round_to<To>(v);
  return v;
}

template <class To, bool kRoundEach>
void load_angles(Angles& angles, const Rope& rope, int64_t token, bool reversed) {
  with_type(rope.dtype, [&](auto type) {
    using T = decltype(type);
    const auto *cos = static_cast<const T*>(rope.cos), *sin = static_cast<const T*>(rope.sin);
    const auto put = [&](int64_t i, int n, int64_t offset) INLINE_LAMBDA {
      const V s = rounded_step<To, kRoundEach>(load(sin + offset + i, n));
      store(angles.cos + i, rounded_step<To, kRoundEach>(load(cos + offset + i, n)), n);
      store(angles.sin + i, reversed ? -s : s, n);
    };
    if (rope.axis_count == 1) {
      const int64_t offset = rope.offset(token, 0);
      return for_each_vector(0, rope.pairs, [&](int64_t i, int n) { put(i, n, offset); });
    }
    for (int64_t i = 0; i < rope.pairs; ++i) put(i, 1, rope.offset(token, rope.axes[i]));
  });
  if (!rope.interleaved) return;
  for (int64_t i = rope.pairs - 1; i >= 0; --i) {
    const float c = angles.cos[i], s = angles.sin[i];
    angles.cos[2 * i] = angles.cos[2 * i + 1] = c;
    angles.sin[2 * i] = -s;
    angles.sin[2 * i + 1] = s;
  }
}

// One NaN for all instruction sets, as of fill_with_nan().
template <class To, bool kRoundEach>
INLINE V sum_of_products(V a, V cos, V b, V sin) {
  V sum;
  if constexpr (kRoundEach) {
    sum = round_to<To>(a * cos) + round_to<To>(b * sin);
  } else {
    sum = Isa::fma(a, cos, b * sin);
  }
  return sum == sum ? sum : set1(__builtin_nanf(""));
}

template <class From, class To, bool kRoundEach>
INLINE void rotate_head(const From* from, To* to, int64_t cols, const Rope& rope,
                        const Angles& angles) {
  const int64_t pairs = rope.pairs;
  if (rope.interleaved) {
    for_each_vector(0, 2 * pairs, [&](int64_t i, int n) INLINE_LAMBDA {
      const V v = load(from + i, n), cos = load(angles.cos + i, n), sin = load(angles.sin + i, n);
      store(to + i, sum_of_products<To, kRoundEach>(v, cos, swap_pairs(v), sin), n);
    });
  } else {
    for_each_vector(0, pairs, [&](int64_t i, int n) INLINE_LAMBDA {
      const V a = load(from + i, n), b = load(from + pairs + i, n);
      const V cos = load(angles.cos + i, n), sin = load(angles.sin + i, n);
      store(to + i, sum_of_products<To, kRoundEach>(a, cos, -b, sin), n);
      store(to + pairs + i, sum_of_products<To, kRoundEach>(b, cos, a, sin), n);
    });
  }
  for_each_vector(2 * pairs, cols, [&](int64_t i, int n) { store(to + i, load(from + i, n), n); });
}

template <class From, class To, bool kRoundEach>
void rotate_rows(const Rope& rope, const RotatedRows& rows, int64_t row_begin, int64_t row_end) {
  Angles angles;
  int64_t of_token = -1;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t token = row / rows.rows_per_token;
    if (token != of_token) load_angles<To, kRoundEach>(angles, rope, token, rows.reversed);
    of_token = token;
    const From* from = static_cast<const From*>(rows.from);
    To* to = static_cast<To*>(rows.to);
    from += rows.from_rows.offset(row - rows.from_begin);
    to += rows.to_rows.offset(row - rows.to_begin);
    for (int64_t head = 0; head < rows.heads_per_row; ++head) {
      const int64_t column = head * rows.head_cols;
      rotate_head<From, To, kRoundEach>(from + column, to + column, rows.head_cols, rope, angles);
    }
  }
}

// From a tile of fp32, or to one; or, where each step is rounded, from one dtype to the same.
void rotate(const Rope& rope, const RotatedRows& rows, int64_t row_begin, int64_t row_end) {
  with_type(rows.from_dtype, [&](auto from) {
    with_type(rows.to_dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      if constexpr (kIsSame<From, To>) {
        if (rope.round_each_step && !rows.reversed) {
          return rotate_rows<From, To, true>(rope, rows, row_begin, row_end);
        }
      }
      if constexpr (kIsFloat<From> || kIsFloat<To>) {
        rotate_rows<From, To, false>(rope, rows, row_begin, row_end);
      }
    });
  });
}
