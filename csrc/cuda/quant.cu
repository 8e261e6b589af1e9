// The norm in 8 bits, saturated: see Quant in rmsnorm.h.
#include <cuda_fp8.h>

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
  return __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, e4m3 ? __NV_E4M3 : __NV_E5M2);
}
#else
__device__ inline uint32_t to_float8(float v, bool e4m3) {
  const int fraction = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15, shift = 23 - fraction;
  const uint32_t sign = __float_as_uint(v) >> 24 & 0x80;
  uint32_t bits = __float_as_uint(v) & 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7f;
  bits = min(bits, __float_as_uint(max_value(e4m3 ? QType::kFloat8E4M3 : QType::kFloat8E5M2)));
  // Its units are those of the denormals.
  const float grid = static_cast<float>(1 << (24 - bias - fraction));
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

// NaN is 0.
__device__ inline uint32_t to_int8(float v) {
  return max(-128, min(127, __float2int_rn(v))) & 0xff;
}

__device__ inline uint32_t to_codes(float2 v, QType type) {
  if (type == QType::kInt8) return to_int8(v.x) | to_int8(v.y) << 8;
  return to_float8(v, type == QType::kFloat8E4M3);
}

// Stores the codes, the norm if it is wanted, and the scales.
template <typename NType>
struct StoreQuant {
  using N = NType;
  using Args = QuantArgs;
  using XChunk = typename N::XChunk;
  using WChunk = typename N::WChunk;
  static constexpr bool kFindsLargest = true;
  static constexpr int kElems = N::kElems, kPairs = kElems / 2;
  const Args& a;
  const int64_t row;
  const Scale& s;
  const Largest& largest;  // of the row, if it has a scale of its own

  // The norm as it is rounded before it is put into 8 bits.
  static __device__ void norm_of(const Args& a, XChunk& x, const WChunk& w, const Scale& s,
                                 float2 (&v)[kPairs]) {
    using X = typename N::X;
    x.stay_packed();
    unrolled<kPairs>([&](int i) {
      const float2 g = w.get(i) + a.weight_offset;
      v[i] = a.cast_before_weight ? normalized<X, true>(x.get(i), g, s)
                                  : normalized<X, false>(x.get(i), g, s);
      if (a.y.dtype == DType::kFloat16) v[i] = round_to<__half>(v[i]);
      if (a.y.dtype == DType::kBFloat16) v[i] = round_to<__nv_bfloat16>(v[i]);
    });
  }

  static __device__ Largest largest_of(const float2 (&v)[kPairs]) {
    Largest result;
    unrolled<kPairs>([&](int i) { result.take(v[i].x), result.take(v[i].y); });
    return result;
  }
  static __device__ Largest largest_of(const Args& a, XChunk& x, const WChunk& w, const Scale& s) {
    float2 v[kPairs];
    norm_of(a, x, w, s, v);
    return largest_of(v);
  }

  // From a copy: v itself as a chunk cost twelve registers on compute capability 12.0.
  __device__ void store_norm(int64_t col, int count, const float2 (&v)[kPairs]) const {
    Chunk<float, kElems> y;
    unrolled<kPairs>([&](int i) { y.set(i, v[i]); });
    const int64_t index = a.y.offset(row) + col;
    with_type(a.y.dtype, [&](auto type) { store_chunk<decltype(type)>(a.y, index, y, count); });
  }

  __device__ void store_codes(int64_t col, int count, const float2 (&v)[kPairs],
                              const QuantScale& scale) const {
    Chunk<uint8_t, kElems> codes = {};
    unrolled<kPairs>([&](int i) {
      codes.word[i / 2] |= to_codes({scale(v[i].x), scale(v[i].y)}, a.quant.dtype) << 16 * (i % 2);
    });
    uint8_t* const to = static_cast<uint8_t*>(a.quant.data) + row * a.cols + col;
    store_chunk(to, codes, count, a.codes_aligned);
  }

  __device__ void store(int64_t col, int count, XChunk& x, const WChunk& w) const {
    if (count <= 0) return;
    float2 v[kPairs];
    norm_of(a, x, w, s, v);
    if (a.y.data != nullptr) store_norm(col, count, v);
    const Quant& q = a.quant;
    if (q.block == 0) return store_codes(col, count, v, QuantScale(*q.scale));
    Largest top = largest;
    int64_t block = 0;
    if (!a.per_token) {  // the threads of a block of columns are side by side in a warp
      const int group = static_cast<int>(q.block) / kElems;
      block = col / q.block;
      top = largest_of(v);
      for (int o = group / 2; o > 0; o /= 2)
        top = top + Largest{__shfl_xor_sync(group_mask(group), top.bits, o)};
    }
    const QuantScale scale(a, top);
    if (col == block * q.block) q.scale[row * q.row_stride + block * q.block_stride] = scale.scale;
    store_codes(col, count, v, scale);
  }
};

// The weight is held as fp32, whatever it is: fewer kernels.
template <typename X, bool kAdd>
using StoreRows = StoreQuant<Norm<X, float, kAdd>>;

template <typename X, bool kAdd, int kVectors>
SHORT_ROW_KERNEL(kQuantRows, kVectors, kAdd)
quant_rows(const __grid_constant__ QuantArgs a) {
  norm_rows<StoreRows<X, kAdd>, kVectors>(a);
}

template <typename X, bool kAdd>
ROW_KERNEL(kQuantSharedRows, kAdd)
quant_shared_rows(const __grid_constant__ QuantArgs a) {
  norm_long_rows<StoreRows<X, kAdd>, true>(a);
}

template <typename X, bool kAdd>
ROW_KERNEL(kQuantLongRows, kAdd)
quant_long_rows(const __grid_constant__ QuantArgs a) {
  norm_long_rows<StoreRows<X, kAdd>, false>(a);
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

}  // namespace

int launch_quant(const RmsNormForward& p, const NormArgs& args, const Plan& plan,
                 cudaStream_t stream) {
  const int elems = vector_elems(p.x_dtype);
  QuantArgs a{args};
  a.quant = p.quant;
  a.largest_value = max_value(p.quant.dtype);
  a.codes_aligned = p.cols % elems == 0 && reinterpret_cast<uintptr_t>(p.quant.data) % elems == 0;
  a.per_token = p.quant.block == p.cols;
  a.cast_before_weight = p.cast_before_weight && p.weight != nullptr;
  return with_type(p.x_dtype, [&](auto x) {
    return with_flag(a.input.data != nullptr, [&](auto add) {
      return launch_rows<decltype(x), decltype(add)::value>(a, plan, stream);
    });
  });
}

}  // namespace rmsnorm::cuda
