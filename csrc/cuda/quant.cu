// The norm in 8 bits, saturated: see Quant in rmsnorm.h.
#include "norm.cuh"

namespace rmsnorm::cuda {
namespace {

struct QuantArgs : NormArgs {
  Quant quant;
  float largest_value;      // of the format
  bool codes_aligned;       // every chunk of codes is
  bool per_token;           // each row has a scale of its own
  bool cast_before_weight;  // known at run time only: all of these share their kernels
};

// The largest magnitude: as integers they are in the same order, and NaN is the largest of all. Its
// sum is that of both.
struct Largest {
  uint32_t bits = 0;

  __device__ void take(float v) { bits = max(bits, __float_as_uint(v) & 0x7fffffffu); }
};
__device__ inline Largest operator+(Largest a, Largest b) { return {max(a.bits, b.bits)}; }
__device__ inline Largest of_lane(Largest v, int distance) {
  return {__shfl_xor_sync(~0u, v.bits, distance)};
}

// By which values are brought to the range of the format.
struct QuantScale {
  float scale, inverse;
  enum { kProduct, kQuotient, kDivision } method;

  // A static one.
  __device__ explicit QuantScale(float scale)
      : scale(scale), inverse(1.0f / scale), method(kProduct) {}

  // A dynamic one: largest is the largest magnitude of the values that share it.
  __device__ QuantScale(const QuantArgs& a, Largest largest) {
    const Quant& q = a.quant;
    const float magnitude = __uint_as_float(largest.bits);
    const float bounded = magnitude > q.bound ? q.bound : magnitude;
    scale = bounded / a.largest_value;
    scale = scale < q.least ? q.least : scale;
    inverse = 1.0f / scale;
    const bool in_range = magnitude <= q.bound && isfinite(magnitude);
    method = q.dtype == QType::kInt8 ? kProduct : in_range ? kQuotient : kDivision;
  }

  __device__ float operator()(float v) const {
    const float near = __fmul_rn(v, inverse);
    if (method == kProduct) return near;
    if (method == kDivision) return v / scale;
    // Rounded as a division is (Markstein 1990); in this order of signs 0 keeps its own.
    return __fmaf_rn(__fmaf_rn(near, scale, -v), -inverse, near);
  }
};

#if __CUDA_ARCH__ >= 890
// The codes of v.x and, above it, v.y.
__device__ inline uint32_t to_float8(float2 v, bool e4m3) {
  uint16_t both;
  if (e4m3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(v.y), "f"(v.x));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(both) : "f"(v.y), "f"(v.x));
  }
  return both;
}
#else
__device__ inline uint32_t to_float8(float v, bool e4m3) {
  const int fraction = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15, shift = 23 - fraction;
  const uint32_t sign = __float_as_uint(v) >> 24 & 0x80;
  uint32_t bits = __float_as_uint(v) & 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7f;
  bits = min(bits, __float_as_uint(max_value(e4m3 ? QType::kFloat8E4M3 : QType::kFloat8E5M2)));
  const float grid =
      static_cast<float>(1 << (24 - bias - fraction));  // its units are those of the denormals
  if (bits < static_cast<uint32_t>(128 - bias) << 23) {
    return sign | (__float_as_uint(__fadd_rn(__uint_as_float(bits), grid)) - __float_as_uint(grid));
  }
  return sign | ((bits + (bits >> shift & 1) + ((1u << (shift - 1)) - 1) -
                  (static_cast<uint32_t>(127 - bias) << 23)) >>
                 shift);
}
__device__ inline uint32_t to_float8(float2 v, bool e4m3) {
  return to_float8(v.x, e4m3) | to_float8(v.y, e4m3) << 8;
}
#endif

__device__ inline uint32_t to_int8(float v) {
  return max(-128, min(127, __float2int_rn(v))) & 0xff;
}  // NaN is 0

__device__ inline uint32_t to_codes(float2 v, QType type) {
  if (type == QType::kInt8) return to_int8(v.x) | to_int8(v.y) << 8;
  return to_float8(v, type == QType::kFloat8E4M3);
}

// The codes of v, at `index` on.
template <int kElems>
__device__ void store_codes(const QuantArgs& a, int64_t index, int count,
                            const float2 (&v)[kElems / 2], const QuantScale& scale) {
  uint32_t words[kElems / 4] = {};
#pragma unroll
  for (int i = 0; i < kElems / 2; ++i) {
    words[i / 2] |= to_codes({scale(v[i].x), scale(v[i].y)}, a.quant.dtype) << 16 * (i % 2);
  }
  uint8_t* const to = static_cast<uint8_t*>(a.quant.data) + index;
  if (a.codes_aligned && count >= kElems) {
    if constexpr (kElems == 8) {
      __stwb(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
    } else {
      __stwb(reinterpret_cast<uint32_t*>(to), words[0]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElems; ++i) {
      if (i < count) to[i] = static_cast<uint8_t>(words[i / 4] >> 8 * (i % 4));
    }
  }
}

// The norm as it is rounded before it is put into 8 bits.
template <typename N>
__device__ void norm_of(const QuantArgs& a, const typename N::XChunk& x,
                        const typename N::WChunk& w, const Scale& s, float2 (&v)[N::kElems / 2]) {
  using X = typename N::X;
#pragma unroll
  for (int i = 0; i < N::kElems / 2; ++i) {
    const float2 g = {w.get(i).x + a.weight_offset, w.get(i).y + a.weight_offset};
    v[i] = a.cast_before_weight ? normalized<X, true>(x.get(i), g, s)
                                : normalized<X, false>(x.get(i), g, s);
    if (a.y_dtype == DType::kFloat16) v[i] = round_to<__half>(v[i]);
    if (a.y_dtype == DType::kBFloat16) v[i] = round_to<__nv_bfloat16>(v[i]);
  }
}

template <typename N>
__device__ Largest largest_of(const QuantArgs& a, typename N::XChunk& x, typename N::WChunk& w,
                              const Scale& s) {
  x.stay_packed();
  float2 v[N::kElems / 2];
  norm_of<N>(a, x, w, s, v);
  Largest result;
#pragma unroll
  for (int i = 0; i < N::kElems / 2; ++i) result.take(v[i].x), result.take(v[i].y);
  return result;
}

// Stores the codes, the norm if it is wanted, and the scale of a block. largest: of the row, if it
// has a scale of its own.
template <typename N>
__device__ void store_quant(const QuantArgs& a, int64_t row, int64_t col, int count,
                            typename N::XChunk& x, typename N::WChunk& w, const Scale& s,
                            const Largest& largest) {
  constexpr int kElems = N::kElems;
  x.stay_packed();
  float2 v[kElems / 2];
  norm_of<N>(a, x, w, s, v);
  const auto store_as = [&](auto element) {
    using T = decltype(element);
    Chunk<T, kElems> y;
#pragma unroll
    for (int i = 0; i < kElems / 2; ++i) y.set(i, v[i]);
    store_chunk(static_cast<T*>(a.y) + row_offset(a.y_rows, row) + col, y, count, a.y_aligned);
  };
  if (a.y != nullptr) {
    if (a.y_dtype == DType::kFloat16) store_as(__half());
    if (a.y_dtype == DType::kBFloat16) store_as(__nv_bfloat16());
    if (a.y_dtype == DType::kFloat32) store_as(float());
  }
  const Quant& q = a.quant;
  const int64_t index = row * a.cols + col;
  if (q.block == 0) return store_codes<kElems>(a, index, count, v, QuantScale(*q.scale));
  Largest top = largest;
  int64_t block = 0;
  if (!a.per_token) {  // the threads of a block of columns are side by side in a warp
    const int group = static_cast<int>(q.block) / kElems;
    block = col / q.block;
    top = Largest();
#pragma unroll
    for (int i = 0; i < kElems / 2; ++i) top.take(v[i].x), top.take(v[i].y);
    for (int o = group / 2; o > 0; o /= 2)
      top = top + Largest{__shfl_xor_sync(group_mask(group), top.bits, o)};
  }
  const QuantScale scale(a, top);
  if (col == block * q.block) q.scale[row * q.row_stride + block * q.block_stride] = scale.scale;
  store_codes<kElems>(a, index, count, v, scale);
}

// Rows held in registers, as forward_rows.
template <typename X, bool kAdd, int kVectors>
__global__ ROWS_BOUNDS(kQuantRows, kVectors,
                       kAdd) void quant_rows(const __grid_constant__ QuantArgs a) {
  sync_dependent_launch();
  using N = Norm<X, float, kAdd>;
  constexpr int kRows = kForwardVectors / kVectors;
  __shared__ Scratch scratch;
  const Cluster alone(1);
  RowGroup<kRows, kVectors, N::kElems> group{a.rows, static_cast<int>(a.cols), a.lanes, kRows == 1};
  typename N::WChunk w[kVectors];
  group.each_chunk([&](int k, int col, int count) {
    w[k] = load_weight<float, N::kElems>(a.weight, col, count);
  });

  for (int turn = 0; group.any(); group.advance(), ++turn) {
    typename N::XChunk x[kRows][kVectors] = {};
    Total<X> sum[kRows];
    const int live = group.live();
    load_rows<N>(a, group, live, x, sum);
    row_sum(sum, live, a.lanes, alone, scratch, turn);
    Scale s[kRows];
    Largest largest[kRows];
    group.each_row([&](int r, int64_t row) {
      s[r] = N::scale(a, sum[r], row, alone, group.lane);
#pragma unroll
      for (int k = 0; k < kVectors && a.per_token; ++k)
        largest[r] = largest[r] + largest_of<N>(a, x[r][k], w[k], s[r]);
    });
    if (a.per_token) row_sum(largest, live, a.lanes, alone, scratch, ++turn);
    group.each_row([&](int r, int64_t row) {
      group.each_chunk([&](int k, int col, int count) {
        if (count > 0) store_quant<N>(a, row, col, count, x[r][k], w[k], s[r], largest[r]);
      });
    });
  }
}

template <typename N, bool kShared>
__device__ void long_rows(const QuantArgs& a) {
  sync_dependent_launch();
  extern __shared__ uint4 kept[];
  __shared__ Scratch scratch;
  const Cluster cluster(a.cluster);
  const LongRows<N, kShared> slice(a, cluster, kept);
  using Index = typename LongRows<N, kShared>::Index;

  int turn = 0;
  for (int64_t row = blockIdx.x / cluster.size; row < a.rows;
       row += gridDim.x / cluster.size, ++turn) {
    Total<typename N::X> sum[] = {slice.sum_of_squares(row)};
    typename N::WChunk w[kForwardVectors];
    Index first = slice.last_tile();
    slice.load_weights(first, w);
    row_sum(sum, 1, slice.lanes, cluster, scratch, turn);
    const Scale s = N::scale(a, sum[0], row, cluster, slice.lane);
    const int64_t x_offset = kShared ? 0 : row_offset(a.x_rows, row);
    Largest largest[1];
    if (a.per_token) {
      slice.each_chunk([&](Index i) {
        typename N::WChunk weight = slice.weight(i);
        typename N::XChunk x;
        slice.load_again(x_offset, i, x);
        largest[0] = largest[0] + largest_of<N>(a, x, weight, s);
      });
      row_sum(largest, 1, slice.lanes, cluster, scratch, ++turn);
    }
    for (; first >= 0; first -= slice.tile) {
      slice.each_chunk_again(x_offset, first, w, [&](Index i, auto& x, auto& weight) {
        store_quant<N>(a, row, slice.column(i), slice.count(i), x, weight, s, largest[0]);
      });
      if (first > 0) slice.load_weights(first - slice.tile, w);
    }
  }
}

template <typename X, bool kAdd>
__global__ LAUNCH_BOUNDS(kQuantSharedRows,
                         kAdd) void quant_shared_rows(const __grid_constant__ QuantArgs a) {
  long_rows<Norm<X, float, kAdd>, true>(a);
}

template <typename X, bool kAdd>
__global__ LAUNCH_BOUNDS(kQuantLongRows,
                         kAdd) void quant_long_rows(const __grid_constant__ QuantArgs a) {
  long_rows<Norm<X, float, kAdd>, false>(a);
}

template <typename X, bool kAdd>
int launch_rows(const QuantArgs& a, const Plan& plan, cudaStream_t stream) {
  void (*kernel)(QuantArgs) = plan.keep == Keep::kNowhere  ? quant_long_rows<X, kAdd>
                              : plan.keep == Keep::kShared ? quant_shared_rows<X, kAdd>
                              : plan.vectors == 1          ? quant_rows<X, kAdd, 1>
                              : plan.vectors == 2          ? quant_rows<X, kAdd, 2>
                                                           : quant_rows<X, kAdd, 4>;
  return launch(kernel, plan, a, stream);
}

// The weight is held as fp32, whatever it is: fewer kernels.
template <typename X>
int launch_rows(const QuantArgs& a, const Plan& plan, cudaStream_t stream) {
  return a.input.data != nullptr ? launch_rows<X, true>(a, plan, stream)
                                 : launch_rows<X, false>(a, plan, stream);
}

}  // namespace

int launch_quant(const RmsNormForward& p, const NormArgs& args, const Plan& plan,
                 cudaStream_t stream) {
  const int elems = vector_elems(p.x_dtype);
  const bool aligned =
      p.cols % elems == 0 && reinterpret_cast<uintptr_t>(p.quant.data) % elems == 0;
  const QuantArgs a{args,
                    p.quant,
                    max_value(p.quant.dtype),
                    aligned,
                    p.quant.block == p.cols,
                    p.cast_before_weight && p.weight != nullptr};
  return p.x_dtype == DType::kFloat32   ? launch_rows<float>(a, plan, stream)
         : p.x_dtype == DType::kFloat16 ? launch_rows<__half>(a, plan, stream)
                                        : launch_rows<__nv_bfloat16>(a, plan, stream);
}

}  // namespace rmsnorm::cuda
