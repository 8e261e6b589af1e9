// The weight of a row, by column.
#pragma once
#include "sum.inl"

// What a row is multiplied by, from a column on: a weight where it lies, no weight, or that of a
// WeightTiles.
template <class T>
struct Weight {
  const T* data;

  INLINE Weight part(int64_t) const { return *this; }
  INLINE V operator()(int64_t i, int n) const { return load(data + i, n); }
  INLINE Pair pair(int64_t i) const { return load_pair(data + i); }
};
struct NoWeight {
  V one;
  static constexpr const float* data = nullptr;

  INLINE NoWeight part(int64_t) const { return *this; }
  INLINE V operator()(int64_t, int) const { return one; }
  INLINE Pair pair(int64_t) const { return {one, one}; }
};
struct TileWeight {
  const float* data;

  INLINE V operator()(int64_t i, int n) const { return load(data + i, n); }
  INLINE Pair pair(int64_t i) const {
    return {load(data + i, kLanes), load(data + i + kLanes, kLanes)};
  }
};

// The weight plus its offset, as floats: in place where it is that already, else a tile at a time,
// which spares the kernels the dtypes of the weight. Most weights are one tile, which is then
// filled once for many rows. With `pairs` the whole blocks of a tile are in the order of Pair, as
// those of a sum are.
class WeightTiles {
 public:
  static constexpr int64_t kTile = kWeightTile;
  static_assert(kTile % kFold == 0 && kGradientTile % kFold == 0, "see add_products");
  static INLINE int64_t tile_end(int64_t begin, int64_t cols) {
    return begin + kTile < cols ? begin + kTile : cols;
  }

  template <class P>
  WeightTiles(const P& p, bool pairs)
      : cols_(p.cols),
        data_(p.weight),
        dtype_(p.w_dtype),
        offset_(p.weight ? float(p.weight_offset) : 0),
        pairs_(pairs) {
    const bool is_there = data_ && dtype_ == DType::kFloat32 && offset_ == 0 && !pairs;
    if (is_there) in_place_ = static_cast<const float*>(data_);
  }

  // The columns from this one on, as far as the next multiple of kTile.
  INLINE TileWeight part(int64_t column) {
    if (in_place_) return {in_place_};
    const int64_t begin = column / kTile * kTile;
    if (begin != filled_) fill(begin);
    return {tile_ - begin};
  }

 private:
  __attribute__((noinline)) void fill(int64_t begin) {
    filled_ = begin;
    if (!data_) return fill_from(NoWeight{set1(1.0f)}, begin);
    with_type(dtype_, [&](auto w) {
      fill_from(Weight<decltype(w)>{static_cast<const decltype(w)*>(data_)}, begin);
    });
    if (!pairs_ || dtype_ == DType::kBFloat16) return;
    for (int64_t i = 0; i < tile_end(begin, cols_) - begin; ++i) {
      if (tile_[i] != tile_[i]) tile_[i] = __builtin_nanf("");  // join() wants no other NaN
    }
  }

  template <class W>
  void fill_from(W weight, int64_t begin) {
    const V offset = set1(float(addend_of(offset_)));
    float* const tile = tile_ - begin;
    const auto one = [&](int64_t i, int n) { store(tile + i, weight(i, n) + offset, n); };
    const auto step = [&](int64_t i) {
      if (!pairs_) return for_each_vector_of_step(i, one);
      for_each_vector_of_step<2 * kLanes>(i, [&](int64_t j, int) {
        const Pair w = weight.pair(j);
        store(tile + j, w.even + offset, kLanes);
        store(tile + j + kLanes, w.odd + offset, kLanes);
      });
    };
    const int64_t end = tile_end(begin, cols_);
    pairs_ ? for_each_step<kBlock>(begin, end, step, one) : for_each_step(begin, end, step, one);
  }

  const int64_t cols_;
  const void* data_;
  DType dtype_;
  float offset_;
  bool pairs_;
  const float* in_place_ = nullptr;
  int64_t filled_ = -1;
  float* const tile_ = weight_tile();
};

// Are all weights 0, or at least 2^`exponent` and less than 2^128 times that? A quick look at all,
// and a closer one if that found something, which may be no more than a 0.
INLINE bool is_in_range(const float* w, int64_t count, int exponent) {
  // Bit 30 of the difference is set below the range and above it.
  const uint32_t smallest = uint32_t(127 + exponent) << 23;
  U32 seen[4] = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) seen[j] |= U32(load(w + i + j * kLanes, kLanes)) - smallest;
  }
  if (largest_lane(V((seen[0] | seen[1] | seen[2] | seen[3]) & 0x40000000))) i = 0;
  for (; i < count; ++i) {
    const uint32_t difference = __builtin_bit_cast(uint32_t, w[i]) - smallest;
    if (difference & 0x40000000 && w[i] != 0) return false;
  }
  return true;
}
