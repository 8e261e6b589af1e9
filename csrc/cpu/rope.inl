// Heads are rotated: as they are normalized; or those that the norm has left in a tile, and
// gradients on their way back to it.
#pragma once
#include "forward.inl"

// cos and sin of a token in the type that is computed in, one for each pair of columns; where these
// are neighbours, one for each column, of sin what the other column of the pair is multiplied by.
struct Angles {
  alignas(kLine) float cos[2 * Rope::kMostPairs], sin[2 * Rope::kMostPairs];
};

// What each product is rounded to, which is no step of its own where only the result is rounded.
struct Unrounded {};
template <class Step>
constexpr bool kRoundsEach = !kIsSame<Step, Unrounded>;

template <class To, bool kRounds>
INLINE V rounded_if(V v) {
  if constexpr (kRounds) return round_to<To>(v);
  return v;
}

// f of the type that products are rounded to, where y is of type T.
template <class T, class F>
INLINE auto with_step(const Rope& rope, DType y, F f) {
  if (!rope.round_each_step) return f(Unrounded());
  if constexpr (!kIsFloat<T>) {
    if (rope.step_dtype(y) == y) return f(T());
  }
  return f(float());
}

// f of a value of the type of the angles, which may be fp64 beside any norm.
template <class F>
INLINE void with_angle_type(DType dtype, F f) {
  if (dtype == DType::kFloat64) return f(double());
  with_type(dtype, f);
}
INLINE V load(const double* p, int n) {
  V v{};
  for (int i = 0; i < n; ++i) v[i] = float(p[i]);
  return v;
}

inline void load_angles(Angles& angles, const Rope& rope, int64_t token, bool reversed,
                        bool in_pairs) {
  with_angle_type(rope.dtype, [&](auto type) {
    using T = decltype(type);
    const auto *cos = static_cast<const T*>(rope.cos), *sin = static_cast<const T*>(rope.sin);
    const auto put = [&](int64_t i, int n, int64_t offset) INLINE_LAMBDA {
      const V s = load(sin + offset + i, n);
      store(angles.cos + i, load(cos + offset + i, n), n);
      store(angles.sin + i, reversed ? -s : s, n);
    };
    if (rope.axis_count == 1) {
      const int64_t offset = rope.offset(token, 0);
      return for_each_vector(0, rope.pairs, [&](int64_t i, int n) { put(i, n, offset); });
    }
    for (int64_t i = 0, n; i < rope.pairs; i += n) {  // a vector of one axis at a time
      const int axis = rope.axes[i];
      for (n = 1; n < kLanes && i + n < rope.pairs && rope.axes[i + n] == axis;) ++n;
      put(i, int(n), rope.offset(token, axis));
    }
  });
  const auto put_two = [&](int64_t i, Pair c, Pair s) INLINE_LAMBDA {
    store(angles.cos + i, c.even, kLanes), store(angles.cos + i + kLanes, c.odd, kLanes);
    store(angles.sin + i, s.even, kLanes), store(angles.sin + i + kLanes, s.odd, kLanes);
  };
  if (rope.interleaved && in_pairs) {
    for (int64_t i = rope.pairs - kLanes; i >= 0; i -= kLanes) {
      const V c = load(angles.cos + i, kLanes), s = load(angles.sin + i, kLanes);
      put_two(2 * i, {c, c}, {-s, s});
    }
  } else if (rope.interleaved) {
    for (int64_t i = rope.pairs - 1; i >= 0; --i) {
      const float c = angles.cos[i], s = angles.sin[i];
      angles.cos[2 * i] = angles.cos[2 * i + 1] = c;
      angles.sin[2 * i] = -s;
      angles.sin[2 * i + 1] = s;
    }
  } else if (in_pairs) {
    for (int64_t i = 0; i < rope.pairs; i += 2 * kLanes) {
      put_two(i, load_pair(angles.cos + i), load_pair(angles.sin + i));
    }
  }
}

template <class Step>
INLINE V sum_of_products(V a, V cos, V b, V sin) {
  if constexpr (kRoundsEach<Step>) return round_to<Step>(a * cos) + round_to<Step>(b * sin);
  return Isa::fma(a, cos, b * sin);
}

template <class From, class To, class Step>
INLINE void rotate_head(const From* from, To* to, int64_t cols, const Rope& rope,
                        const Angles& angles) {
  const int64_t pairs = rope.pairs;
  if (rope.interleaved) {
    for_each_vector(0, 2 * pairs, [&](int64_t i, int n) INLINE_LAMBDA {
      const V v = load(from + i, n), cos = load(angles.cos + i, n), sin = load(angles.sin + i, n);
      store(to + i, canonical(sum_of_products<Step>(v, cos, swap_pairs(v), sin)), n);
    });
  } else {
    for_each_vector(0, pairs, [&](int64_t i, int n) INLINE_LAMBDA {
      const V a = load(from + i, n), b = load(from + pairs + i, n);
      const V cos = load(angles.cos + i, n), sin = load(angles.sin + i, n);
      const Pair turned = canonical(
          Pair{sum_of_products<Step>(a, cos, -b, sin), sum_of_products<Step>(b, cos, a, sin)});
      store(to + i, turned.even, n);
      store(to + pairs + i, turned.odd, n);
    });
  }
  for_each_vector(2 * pairs, cols, [&](int64_t i, int n) { store(to + i, load(from + i, n), n); });
}

template <class From, class To, class Step>
void rotate_rows(const Rope& rope, const RotatedRows& rows, int64_t row_begin, int64_t row_end) {
  Angles angles;
  int64_t token_end = row_begin;
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (row == token_end) {
      const int64_t token = row / rows.rows_per_token;
      load_angles(angles, rope, token, rows.reversed, /*in_pairs=*/false);
      token_end = (token + 1) * rows.rows_per_token;
    }
    const From* from = static_cast<const From*>(rows.from);
    To* to = static_cast<To*>(rows.to);
    from += rows.from_rows.offset(row - rows.from_begin);
    to += rows.to_rows.offset(row - rows.to_begin);
    for (int64_t head = 0; head < rows.heads_per_row; ++head) {
      const int64_t column = head * rows.head_cols;
      rotate_head<From, To, Step>(from + column, to + column, rows.head_cols, rope, angles);
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
          return with_step<To>(rope, rows.to_dtype, [&](auto step) {
            rotate_rows<From, To, decltype(step)>(rope, rows, row_begin, row_end);
          });
        }
      }
      if constexpr (kIsFloat<From> || kIsFloat<To>) {
        rotate_rows<From, To, Unrounded>(rope, rows, row_begin, row_end);
      }
    });
  });
}

// ---------------------------------------------------------------- as they are normalized

// Heads of whole blocks, in one pass. By way of a tile 2048 tokens of 40 heads of 128 columns take,
// through the caches and past them: bf16 1.9 and 2.1 times as long, fp32 1.4 and 2.0; 1 token 2.0
// and 1.3; with AVX2 64 tokens 2.0 and 1.4 (one core of an Emerald Rapids).

// Two vectors of elements: of BFloat16 the even and the odd ones, else the first and the second.
template <class T>
INLINE Pair load_two(const T* p) {
  if constexpr (kIsBFloat16<T>) return split(p);
  return {load(p, kLanes), load(p + kLanes, kLanes)};
}
template <class T>
INLINE Pair swap_pairs(Pair v) {
  if constexpr (kIsBFloat16<T>) return {v.odd, v.even};
  return {swap_pairs(v.even), swap_pairs(v.odd)};
}
template <bool kStream, class T>
INLINE void write_two(T* p, Pair v) {
  if constexpr (kIsBFloat16<T>) return join<kStream, false>(p, v);
  write<kStream>(p, v.even, kLanes);
  write<kStream>(p + kLanes, v.odd, kLanes);
}
template <bool kStream>
INLINE void write_pairs(BFloat16* p, U32 pairs) {
  if constexpr (kStream) return Isa::stream(p, V(pairs));
  __builtin_memcpy(p, &pairs, sizeof pairs);
}

template <class To, bool kRounds>
INLINE Pair rounded_if(Pair v) {
  return {rounded_if<To, kRounds>(v.even), rounded_if<To, kRounds>(v.odd)};
}
INLINE Pair product(Pair a, Pair b) { return {a.even * b.even, a.odd * b.odd}; }

// a * b + c * d, or with kMinus the difference.
template <class Step, bool kMinus>
INLINE Pair two_products(Pair a, Pair b, Pair c, Pair d) {
  constexpr bool kEach = kRoundsEach<Step>;
  const Pair q = rounded_if<Step, kEach>(product(c, d));
  if constexpr (!kEach && Isa::kFma) {
    if constexpr (kMinus) {
      return {Isa::fmsub(a.even, b.even, q.even), Isa::fmsub(a.odd, b.odd, q.odd)};
    }
    return {Isa::fma(a.even, b.even, q.even), Isa::fma(a.odd, b.odd, q.odd)};
  }
  const Pair p = rounded_if<Step, kEach>(product(a, b));
  if constexpr (kMinus) return {p.even - q.even, p.odd - q.odd};
  return {p.even + q.even, p.odd + q.odd};
}

// What is the same for all heads of a token.
struct Heads {
  int64_t cols, pairs;  // of one
  Angles angles;        // of BFloat16 in the order of Pair
};

// One head of y, by two vectors here and two there at a time. kRound: by Isa::round_pair, unless a
// result is small, which includes denormals, or NaN. The steps of kRoundsEach by it too, where no
// denormal can matter, took longer than by Isa::round_to_bfloat16.
template <class T, bool kRound, class Step, bool kCast, bool kInterleaved, bool kStream>
void write_head(const Heads& heads, const float* weight, const T* x, T* y, double rstd) {
  constexpr int kTwo = 2 * kLanes;
  const int64_t cols = heads.cols, pairs = heads.pairs;
  const TileWeight w{weight}, cos{heads.angles.cos}, sin{heads.angles.sin};
  const Scale<T, kCast> scale{rstd};
  const auto norm = [&](Pair& v, int64_t i) INLINE_LAMBDA {
    const Pair elements = load_two(x + i), g = w.pair(i);
    v = {scale(elements.even, g.even), scale(elements.odd, g.odd)};
    v = rounded_if<T, kRoundsEach<Step>>(v);
  };
  const auto write = [&](int64_t i, Pair a, int64_t j, Pair b, auto rotated) INLINE_LAMBDA {
    if constexpr (kRound) {
      const U32 pairs_of_a = Isa::round_pair(a), pairs_of_b = Isa::round_pair(b);
      Isa::SmallElements small;
      small.look(pairs_of_a);
      small.look(pairs_of_b);
      if (__builtin_expect(!small.any(), true)) {
        write_pairs<kStream>(y + i, pairs_of_a);
        write_pairs<kStream>(y + j, pairs_of_b);
        return;
      }
    }
    write_two<kStream>(y + i, rotated.value ? canonical(a) : a);
    write_two<kStream>(y + j, rotated.value ? canonical(b) : b);
  };
  constexpr Constant<true> yes;
  Pair a, b;
  for (int64_t i = 0; !kInterleaved && i < pairs; i += kTwo) {
    norm(a, i), norm(b, i + pairs);
    const Pair c = cos.pair(i), s = sin.pair(i);
    write(i, two_products<Step, true>(a, c, b, s), i + pairs, two_products<Step, false>(b, c, a, s),
          yes);
  }
  for (int64_t i = 0; kInterleaved && i < 2 * pairs; i += 2 * kTwo) {
    const int64_t j = i + kTwo;
    norm(a, i), norm(b, j);
    write(i, two_products<Step, false>(a, cos.pair(i), swap_pairs<T>(a), sin.pair(i)), j,
          two_products<Step, false>(b, cos.pair(j), swap_pairs<T>(b), sin.pair(j)), yes);
  }
  for (int64_t i = 2 * pairs; i < cols; i += 2 * kTwo) {
    norm(a, i), norm(b, i + kTwo);
    write(i, a, i + kTwo, b, Constant<false>());
  }
}

template <class T>
using WriteHead = void (*)(const Heads&, const float*, const T*, T*, double);

// Looked up for a call, in the order of write_head's flags, and called for a head: so ForwardRows
// is compiled once for all of them.
template <class T, bool kRound, class Step, bool... kFlags>
WriteHead<T> write_head_of(const bool* flags) {
  if constexpr (sizeof...(kFlags) < 2 + Isa::kStreams) {
    return *flags ? write_head_of<T, kRound, Step, kFlags..., true>(flags + 1)
                  : write_head_of<T, kRound, Step, kFlags..., false>(flags + 1);
  } else if constexpr (sizeof...(kFlags) < 3) {
    return write_head<T, kRound, Step, kFlags..., false>;
  } else {
    return write_head<T, kRound, Step, kFlags...>;
  }
}

// What ForwardRows does with the rows whose rstd is known.
template <class T, bool kRound>
class Rotation {
 public:
  Rotation(const RmsNormRope& params, const float* w, void* row_of_tile)
      : p(params), weight(w), tile(row_of_tile) {
    const RmsNormForward& norm = p.norm;
    heads.cols = norm.cols / p.heads_per_row;
    heads.pairs = p.rope.pairs;
    const bool flags[] = {norm.cast_before_weight && norm.weight, p.rope.interleaved,
                          norm.stream && streamable<T>(norm.y, norm.y_rows)};
    write = with_step<T>(p.rope, norm.y_dtype, [&](auto step) {
      return write_head_of<T, kRound, decltype(step)>(flags);
    });
  }

  // Rows come in their order. cols: of the row.
  INLINE void write_row(int64_t row, const T* x, T* y, int64_t cols, double rstd,
                        Prefetch<T> next) {
    if (row >= token_end) start_token(row / p.rows_per_token);
    // All of it before the head: inside of write_head it takes 1.04 times as long.
    for (int64_t i = 0; i < cols; i += kBlock) next.template along<true, kBlock>(i);
    for (int64_t i = 0; i < cols; i += heads.cols) write(heads, weight + i, x + i, y + i, rstd);
  }

  // By way of a tile.
  __attribute__((noinline)) void write_uncommon_row(int64_t row) {
    RmsNormForward norm = p.norm;
    norm.y = tile;
    norm.cast_before_weight = norm.cast_before_weight && norm.weight;
    norm.y_rows = {1, {}, {norm.cols}};
    if (!p.rope.round_each_step) norm.y_dtype = DType::kFloat32;
    forward_row_fp64(norm, row, row);
    RotatedRows r{};
    r.from = tile, r.from_rows = norm.y_rows, r.from_begin = row, r.from_dtype = norm.y_dtype;
    r.to = p.norm.y, r.to_rows = p.norm.y_rows, r.to_dtype = p.norm.y_dtype;
    r.rows_per_token = p.rows_per_token, r.heads_per_row = p.heads_per_row;
    r.head_cols = heads.cols;
    rotate(p.rope, r, row, row + 1);
  }

 private:
  __attribute__((noinline)) void start_token(int64_t token) {
    token_end = (token + 1) * p.rows_per_token;
    load_angles(heads.angles, p.rope, token, /*reversed=*/false, /*in_pairs=*/kIsBFloat16<T>);
  }

  const RmsNormRope& p;
  const float* const weight;  // of BFloat16 in the order of Pair
  void* const tile;
  WriteHead<T> write;
  int64_t token_end = 0;
  Heads heads;
};

template <class T, bool kRound>
void rope_rows(const RmsNormRope& p, int64_t row_begin, int64_t row_end, void* tile) {
  const RmsNormForward& norm = p.norm;
  WeightTiles weight(norm, kIsBFloat16<T>);
  const float* const w = weight.part(0).data;
  const bool in_range = !kIsFloat<T> || (norm.cast_before_weight && norm.weight) ||
                        is_in_range(w, norm.cols, kMinWeightExponent);
  Rotation<T, kRound> rotation(p, w, tile);
  with_cols<true>(norm.cols, [&](auto cols) INLINE_LAMBDA {
    using Kernel =
        ForwardRows<false, T, T, false, false, cols.value, WeightTiles, Rotation<T, kRound>>;
    Kernel(norm, weight, rotation, in_range, row_end, 0).run(row_begin);
  });
  if (norm.stream) Isa::fence();
}

// False, and nothing is done, where heads are no whole blocks or dtypes differ.
template <bool kRound>
bool rope_forward(const RmsNormRope& p, int64_t row_begin, int64_t row_end, void* tile) {
  const RmsNormForward& norm = p.norm;
  const bool whole = p.rope.pairs % (kBlock / 2) == 0 && norm.cols / p.heads_per_row % kBlock == 0;
  if (!whole || norm.cols > WeightTiles::kTile || norm.x_dtype != norm.y_dtype) return false;
  set_last_isa(Isa::kNames[kRound]);
  with_type(norm.x_dtype, [&](auto x) {
    using T = decltype(x);
    rope_rows<T, kRound && kIsBFloat16<T>>(p, row_begin, row_end, tile);
  });
  return true;
}
