// The rotary embedding of rows that are normalized: what rope_forward.cu and rope_backward.cu
// share.
//
// Plain kernels have a row in the registers of a group of lanes, two chunks each: i and i + lanes.
// Of a head that is rotated as a whole these are the two halves of its pairs. Others have the
// kernels' second form: the partner of a chunk is in another lane, or pairs are neighbours, or they
// are of several axes. All other launches go to kernels that read a row twice, the second time in
// units of pairs.
#pragma once
#include "launch.h"
#include "reduce.cuh"

namespace rmsnorm::cuda {

// Numbers below 2^31 divided by one, in three instructions.
struct Divisor {
  uint32_t multiplier, shift, value;
};

inline Divisor divisor_of(int64_t value) {
  uint32_t shift = 0;
  while (int64_t{1} << shift < value) ++shift;
  const uint64_t multiplier = (uint64_t{1} << (31 + shift)) / value + 1;
  return {static_cast<uint32_t>(multiplier), shift, static_cast<uint32_t>(value)};
}

__device__ inline unsigned quotient(unsigned n, const Divisor& d) {
  return __umulhi(2 * n, d.multiplier) >> d.shift;
}

// Rows of evenly spaced batches, tokens of a batch and heads of a token: how far apart, in
// elements.
// 32 bits: a product with such a stride is one instruction.
struct Place {
  int32_t batch, token, head;
};

struct RopeArgs {
  Rope rope;
  Rows token_of_row;  // whose offset of a row is its token
  int64_t heads_per_row, head_cols;
  int64_t weight_rows;  // rows that share a weight, of several
  bool angles_aligned;
  bool steps_in_fp32;  // of round_each_step: products, of a norm that is rounded to y's dtype
  unsigned blocks;     // (clusters) of each weight
  bool is_placed;      // rows and angles are, by what follows; else by their Rows
  Divisor heads, tokens;
  Place angles;
};

// A row's batch, its token there, its head, and its token among all.
struct HeadIndex {
  unsigned batch, batch_token, head, token;

  __device__ HeadIndex(const RopeArgs& a, unsigned row) {
    token = quotient(row, a.heads);
    head = row - token * a.heads.value;
    batch = quotient(token, a.tokens);
    batch_token = token - batch * a.tokens.value;
  }
  __device__ int64_t offset(const Place& place) const {
    return int64_t{static_cast<int32_t>(batch)} * place.batch +
           int64_t{static_cast<int32_t>(batch_token)} * place.token +
           int64_t{static_cast<int32_t>(head)} * place.head;
  }
};

// q, k or both, whose blocks come one after the other.
template <typename Args>
struct Sides {
  Args side[kMostSides];
  unsigned blocks;  // of the first

  __device__ const Args& here() const { return side[blockIdx.x >= blocks]; }
  __device__ unsigned block() const { return blockIdx.x - (blockIdx.x >= blocks ? blocks : 0); }
};

// The threads of a block, as groups of lanes that have a row each.
struct Lanes {
  int lane, slot, slots;

  __device__ explicit Lanes(int lanes) {
    const int bits = 31 - __clz(lanes);
    lane = lanes > kWarp ? threadIdx.x : threadIdx.x & (lanes - 1);
    slot = lanes > kWarp ? 0 : threadIdx.x >> bits;
    slots = lanes > kWarp ? 1 : blockDim.x >> bits;
  }
};

// What each product is rounded to, which is no step of its own where only the result is rounded.
struct Unrounded {};

// f of it, where y is of type Y.
template <typename Y, bool kEach, typename F>
__device__ void with_step(bool in_fp32, const F& f) {
  if constexpr (!kEach) {
    f(Unrounded());
  } else if (std::is_same_v<Y, float> || in_fp32) {
    f(float());
  } else {
    f(Y());
  }
}
template <typename Y, typename F>
__device__ void with_step(bool each_step, bool in_fp32, const F& f) {
  each_step ? with_step<Y, true>(in_fp32, f) : with_step<Y, false>(in_fp32, f);
}

// own * cos + other * sin. sin has the sign that belongs to own.
template <typename Step>
__device__ float2 turned(float2 own, float2 other, float2 cos, float2 sin) {
  if constexpr (std::is_same_v<Step, Unrounded>) {
    return multiply_add(own, cos, other * sin);
  } else {
    const auto product = [](float2 a, float2 b) {
      return round_to<Step>(float2{__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y)});
    };
    const float2 left = product(own, cos), right = product(other, sin);
    return {__fadd_rn(left.x, right.x), __fadd_rn(left.y, right.y)};
  }
}

__device__ inline float2 negative(float2 v) { return {-v.x, -v.y}; }

// cos and sin of a plain row, from pair `first` on. kAxes: they may be of several axes.
template <int kCount>
struct Angles {
  Chunk<float, kCount> cos, sin;

  template <bool kAxes>
  __device__ void load(const RopeArgs& a, const HeadIndex& index, int first) {
    const Rope& r = a.rope;
    const auto of_token = [&](int axis) {
      if (r.positions == nullptr) return index.offset(a.angles) + axis * r.axis_stride;
      return r.positions[axis * r.tokens + index.token] * r.angle_rows.stride[0];
    };
    const int64_t offset = first + of_token(0);
    with_type(r.dtype, [&](auto type) {
      using T = decltype(type);
      const T *const c = static_cast<const T*>(r.cos), *const s = static_cast<const T*>(r.sin);
      if (kAxes && r.axis_count > 1) {
        unrolled<kCount>([&](int i) {
          const int64_t at = first + i + of_token(r.axes[first + i]);
          cos.word[i] = __float_as_uint(static_cast<float>(c[at]));
          sin.word[i] = __float_as_uint(static_cast<float>(s[at]));
        });
      } else {
        const auto cos_there = load_whole<T, kCount>(c + offset, 0);
        const auto sin_there = load_whole<T, kCount>(s + offset, 0);
        cos = cos_there.template to<float>();
        sin = sin_there.template to<float>();
      }
    });
  }

  // A chunk of pairs of neighbours, rotated.
  template <typename Step>
  __device__ void turn_neighbours(Chunk<float, 2 * kCount>& v, bool back) const {
    unrolled<kCount>([&](int i) {
      const float2 pair = v.get(i);
      const float c = __uint_as_float(cos.word[i]), s = __uint_as_float(sin.word[i]);
      const float2 sines = back ? float2{s, -s} : float2{-s, s};
      v.set(i, turned<Step>(pair, {pair.y, pair.x}, {c, c}, sines));
    });
  }
};

// A row's columns in units of a chunk, where a thread that has one has all of its pairs: of halves
// the chunk `pairs` columns on too. After a head's pairs comes what is not rotated.
template <int kElems>
struct Units {
  const RopeArgs& a;
  const int pairs = static_cast<int>(a.rope.pairs);
  const int rotated = ((a.rope.interleaved ? 2 * pairs : pairs) + kElems - 1) / kElems;
  const int per_head = rotated + static_cast<int>((a.head_cols - 2 * pairs + kElems - 1) / kElems);
  const int64_t all = a.heads_per_row * per_head;

  struct Unit {
    int64_t col;
    int count, pair;  // pair: the first, or -1 of what is not rotated
  };
  __device__ Unit operator[](int64_t i) const {
    // Several heads have fewer than 2^32 units, or no memory would hold the row.
    const unsigned head = a.heads_per_row > 1 ? static_cast<unsigned>(i) / per_head : 0;
    const int64_t begin = head * a.head_cols, unit = i - int64_t{head} * per_head;
    if (unit < rotated) {
      const int col = static_cast<int>(unit) * kElems;
      const int left = (a.rope.interleaved ? 2 * pairs : pairs) - col;
      return {begin + col, min(left, kElems), a.rope.interleaved ? col / 2 : col};
    }
    const int64_t col = 2 * pairs + (unit - rotated) * kElems;
    return {begin + col, static_cast<int>(min(a.head_cols - col, int64_t{kElems})), -1};
  }
};

// Where a row is in two tensors, and its angles: those of its token's first axis.
struct AnyRow {
  const RopeArgs& a;
  int64_t token, left, right, first;

  __device__ AnyRow(const RopeArgs& a, int64_t row, const View& left_view, const Place& left_place,
                    const View& right_view, const Place& right_place)
      : a(a) {
    const Rope& r = a.rope;
    if (a.is_placed) {
      const HeadIndex index(a, static_cast<unsigned>(row));
      token = index.token;
      left = index.offset(left_place);
      right = index.offset(right_place);
      first = index.offset(a.angles);
    } else {
      token = row_offset(a.token_of_row, row);
      left = row_offset(left_view.rows, row);
      right = row_offset(right_view.rows, row);
      first = r.positions ? 0 : row_offset(r.angle_rows, token);
    }
    if (r.positions) first = of_axis(0);
  }
  __device__ int64_t of_axis(int axis) const {
    const Rope& r = a.rope;
    return r.positions ? r.positions[axis * r.tokens + token] * r.angle_rows.stride[0]
                       : first + axis * r.axis_stride;
  }

  // `count` cosines and sines from a pair on.
  template <int kCount>
  __device__ void load_angles(int pair, int count, Angles<kCount>& angles) const {
    const Rope& r = a.rope;
    auto &cos = angles.cos, &sin = angles.sin;
    with_any_type(r.dtype, [&](auto type) {
      using T = decltype(type);
      const T *const c = static_cast<const T*>(r.cos), *const s = static_cast<const T*>(r.sin);
      if constexpr (sizeof(T) < 8) {
        if (r.axis_count == 1) {
          const bool aligned = a.angles_aligned && pair % kCount == 0;
          cos = load_chunk<T, kCount>(c + first + pair, count, aligned).template to<float>();
          sin = load_chunk<T, kCount>(s + first + pair, count, aligned).template to<float>();
          return;
        }
      }
      unrolled<kCount>([&](int i) {
        if (i >= count) return;
        const int64_t at = (r.axis_count == 1 ? first : of_axis(r.axes[pair + i])) + pair + i;
        cos.word[i] = __float_as_uint(static_cast<float>(c[at]));
        sin.word[i] = __float_as_uint(static_cast<float>(s[at]));
      });
    });
  }
};

// Both chunks of a unit, or the one that is all of it, rotated by its angles, or back by them.
// load(column) gives a chunk, each(column, chunk) takes one.
template <typename Y, int kElems, typename Load, typename Each>
__device__ void turn_unit(const AnyRow& row, const typename Units<kElems>::Unit& unit,
                          bool each_step, bool back, const Load& load, const Each& each) {
  using C = Chunk<float, kElems>;
  const Rope& r = row.a.rope;
  C own = load(unit.col);
  if (unit.pair < 0) return each(unit.col, own);
  if (r.interleaved) {
    Angles<kElems / 2> angles = {};
    row.load_angles(unit.pair, unit.count / 2, angles);
    with_step<Y>(each_step, row.a.steps_in_fp32,
                 [&](auto step) { angles.template turn_neighbours<decltype(step)>(own, back); });
    return each(unit.col, own);
  }
  C other = load(unit.col + r.pairs);
  Angles<kElems> angles = {};
  row.load_angles(unit.pair, unit.count, angles);
  with_step<Y>(each_step, row.a.steps_in_fp32, [&](auto step) {
    using Step = decltype(step);
    unrolled<kElems / 2>([&](int i) {
      const float2 left = own.get(i), right = other.get(i), cos = angles.cos.get(i);
      const float2 sin = back ? negative(angles.sin.get(i)) : angles.sin.get(i);
      own.set(i, turned<Step>(left, right, cos, negative(sin)));
      other.set(i, turned<Step>(right, left, cos, sin));
    });
  });
  each(unit.col, own);
  each(unit.col + r.pairs, other);
}

// `count` elements of a row of any alignment, from column col on.
template <typename T, int kElems>
__device__ Chunk<T, kElems> load_at(const View& v, int64_t offset, int64_t col, int count) {
  const bool aligned = v.aligned && col % kElems == 0;
  return load_chunk<T, kElems>(static_cast<const T*>(v.data) + offset + col, count, aligned);
}
template <int kElems>
__device__ Chunk<float, kElems> load_floats(const View& v, int64_t offset, int64_t col, int count) {
  return with_type(v.dtype, [&](auto type) {
    return load_at<decltype(type), kElems>(v, offset, col, count).template to<float>();
  });
}
template <typename T, int kElems>
__device__ void store_at(const View& v, int64_t offset, int64_t col, int count,
                         const Chunk<float, kElems>& c) {
  const bool aligned = v.aligned && col % kElems == 0;
  T* const to = static_cast<T*>(const_cast<void*>(v.data)) + offset + col;
  store_chunk<T, kElems>(to, c.template to<T>(), count, aligned);
}
// The weight there, its offset added.
template <int kElems>
__device__ Chunk<float, kElems> load_weight(const RowArgs& a, int64_t offset, int64_t col,
                                            int count) {
  auto w = load_floats<kElems>(a.weight, offset, col, a.weight_cols > 0 ? count : 0);
  unrolled<kElems / 2>([&](int i) { w.set(i, w.get(i) + a.weight_offset); });
  return w;
}

// The rows that a block (a cluster) of such a kernel has in turn, so many at a time.
struct BlockRows {
  int64_t weight, begin, end, stride;

  __device__ BlockRows(const RopeArgs& a, unsigned block, int slots) {
    weight = block / a.blocks;
    const int64_t rows_begin = weight * a.weight_rows;
    begin = rows_begin + int64_t{block - static_cast<unsigned>(weight) * a.blocks} * slots;
    end = rows_begin + a.weight_rows;
    stride = int64_t{a.blocks} * slots;
  }
};

// ---------------------------------------------------------------- launches

// The Place of rows, if all batches, tokens of one and heads of one are evenly spaced.
inline bool place_of(const Rows& rows, int64_t count, int64_t heads, int64_t tokens, Place& place) {
  int64_t inner = 1;
  for (int d = rows.ndim - 1; d > 0; --d) {
    inner *= rows.size[d];
    if (inner != 1 && inner != heads && inner != heads * tokens && inner != count) return false;
  }
  const int64_t strides[] = {count > heads * tokens ? rows.offset(heads * tokens) : 0,
                             tokens > 1 ? rows.offset(heads) : 0, heads > 1 ? rows.offset(1) : 0};
  for (int64_t stride : strides) {
    if (stride != static_cast<int32_t>(stride)) return false;
  }
  place = {static_cast<int32_t>(strides[0]), static_cast<int32_t>(strides[1]),
           static_cast<int32_t>(strides[2])};
  return true;
}

// Tokens of a batch, if these rows tell.
inline int64_t batch_tokens(const Rows& rows, int64_t count, int64_t heads) {
  int64_t inner = 1;
  for (int d = rows.ndim - 1; d > 0; --d) {
    inner *= rows.size[d];
    if (inner > heads && inner % heads == 0 && inner < count) return inner / heads;
  }
  return 0;
}

// Does a plain kernel take rows of so many columns, of which the first 2 * pairs are rotated?
inline bool has_plain_rows(int64_t cols, int64_t pairs, DType x) {
  const int64_t elems = vector_elems(x), chunks = cols / elems;
  return cols % elems == 0 && chunks >= 2 && chunks <= 2 * kWarp && pairs % elems == 0 && pairs > 0;
}

// The lanes of such a row: those of the norm's kernels, or half of them where these have one chunk.
inline int plain_lanes(int64_t cols, DType x) {
  const int64_t chunks = cols / vector_elems(x);
  int lanes = 1;
  while (2 * lanes < chunks) lanes *= 2;
  return lanes;
}

// Do plain rows take the second form of their kernel?
inline bool is_apart(const Rope& r, int64_t cols, DType x) {
  return r.interleaved || r.axis_count > 1 || 2 * r.pairs != cols ||
         2 * plain_lanes(cols, x) != cols / vector_elems(x);
}

// What does not follow from a plan.
template <typename P>
RopeArgs rope_args(const P& p) {
  const int64_t tokens = p.rope.tokens, bytes = int64_t{size_of(p.rope.dtype)};
  // Of one row each, tokens start over with each weight.
  const Rows by_heads{2, {0, p.rows_per_token}, {1, 0}}, by_weights{2, {0, tokens}, {0, 1}};
  RopeArgs a{p.rope, p.rows_per_token > 1 ? by_heads : by_weights};
  a.heads_per_row = p.heads_per_row;
  a.head_cols = p.norm.cols / p.heads_per_row;
  a.weight_rows = p.norm.rows / p.weights;
  struct Table {
    DType x_dtype;
    int64_t rows;
  } table{p.norm.x_dtype, tokens};
  if (p.rope.positions != nullptr) table.rows = 2;  // or more: their stride counts
  const Rows& rows = p.rope.angle_rows;
  a.angles_aligned = bytes < 8 && view_of(table, p.rope.cos, p.rope.dtype, rows).aligned &&
                     view_of(table, p.rope.sin, p.rope.dtype, rows).aligned;
  return a;
}

// Of several weights each has to begin where the widest instruction can access it.
template <typename P>
void align_weights(RowArgs& a, const P& p) {
  const bool whole = p.weights == 1 || p.norm.cols % vector_elems(p.norm.x_dtype) == 0;
  a.weight.aligned = a.weight.data == nullptr || (a.weight.aligned && whole);
}

// Sets where rows and angles are placed, places[i] of rows[i], if they are.
template <typename P, int kCount>
void place_rows(RopeArgs& a, const P& p, const Rows* const (&rows)[kCount],
                Place* const (&places)[kCount]) {
  const Rope& r = p.rope;
  const int64_t heads = p.rows_per_token;
  if (p.norm.rows > std::numeric_limits<int32_t>::max() || p.weights != 1) return;
  int64_t tokens = r.positions != nullptr ? 0 : batch_tokens(r.angle_rows, r.tokens, 1);
  for (const Rows* one : rows) {
    if (tokens == 0) tokens = batch_tokens(*one, p.norm.rows, heads);
  }
  if (tokens == 0) tokens = r.tokens;
  for (int i = 0; i < kCount; ++i) {
    if (!place_of(*rows[i], p.norm.rows, heads, tokens, *places[i])) return;
  }
  if (r.positions == nullptr && !place_of(r.angle_rows, r.tokens, 1, tokens, a.angles)) return;
  a.heads = divisor_of(heads);
  a.tokens = divisor_of(tokens);
  a.is_placed = true;
}

// Does a plain kernel take these rows, but for the alignment of the norm's tensors?
template <typename P>
bool is_plain(const P& p, const RopeArgs& a) {
  const Rope& r = p.rope;
  return a.is_placed && a.angles_aligned && p.heads_per_row == 1 &&
         has_plain_rows(p.norm.cols, r.pairs, p.norm.x_dtype);
}

// One of the sides of a call: its kernel, arguments and plan.
template <typename Args>
struct Side {
  void (*kernel)(Sides<Args>);
  Args args;
  Plan plan;
};

// In one launch if they have a kernel and a shape of block in common.
template <typename Args>
int launch_sides(const Side<Args>* sides, int count, cudaStream_t stream) {
  static_assert(sizeof(Sides<Args>) <= 4096, "more than every toolkit takes as arguments");
  const auto launch_them = [&](const Side<Args>* first, int together) {
    Sides<Args> args{{}, static_cast<unsigned>(first->plan.blocks)};
    Plan plan = first->plan;
    for (int i = 0; i < together; ++i) args.side[i] = first[i].args;
    if (together == 2) {
      plan.blocks += first[1].plan.blocks;
      plan.shared_bytes = std::max(plan.shared_bytes, first[1].plan.shared_bytes);
    }
    set_last_plan(plan);
    return launch(first->kernel, static_cast<unsigned>(plan.blocks), plan.threads, args, stream,
                  static_cast<unsigned>(plan.shared_bytes), plan.cluster);
  };
  const auto alike = [](const Side<Args>& a, const Side<Args>& b) {
    return a.kernel == b.kernel && a.plan.threads == b.plan.threads &&
           a.plan.cluster == b.plan.cluster;
  };
  if (count == 2 && alike(sides[0], sides[1])) return launch_them(sides, 2);
  int error = 0;
  for (int i = 0; i < count && error == 0; ++i) error = launch_them(sides + i, 1);
  return error;
}

}  // namespace rmsnorm::cuda
