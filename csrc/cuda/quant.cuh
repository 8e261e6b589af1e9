// Rows in 8 bits: see Quant in rmsnorm.h.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

namespace rmsnorm::cuda {

// The largest magnitude: as integers they are in the same order, and NaN is the largest of all. Its sum is that of both.
struct Largest {
  uint32_t bits = 0;

  __device__ void take(float v) { bits = max(bits, __float_as_uint(v) & 0x7fffffffu); }
};
__device__ inline Largest operator+(Largest a, Largest b) { return {max(a.bits, b.bits)}; }
__device__ inline Largest of_lane(Largest v, int distance) { return {__shfl_xor_sync(~0u, v.bits, distance)}; }

struct QuantArgs {
  Quant to;
  float most;     // of the format
  bool aligned;   // every chunk of codes is
  bool per_row;   // a scale for each row
};

// By which values are brought to the range of the format.
struct QuantScale {
  float scale, inverse;
  enum { kProduct, kQuotient, kDivision } way;

  // A given one.
  __device__ explicit QuantScale(float scale) : scale(scale), inverse(1.0f / scale), way(kProduct) {}

  __device__ QuantScale(const QuantArgs& a, Largest largest) {
    const float most = __uint_as_float(largest.bits), bounded = most > a.to.bound ? a.to.bound : most;
    scale = bounded / a.most;
    scale = scale < a.to.least ? a.to.least : scale;
    inverse = 1.0f / scale;
    way = a.to.dtype == QType::kInt8 ? kProduct : most <= a.to.bound && isfinite(most) ? kQuotient : kDivision;
  }

  __device__ float operator()(float v) const {
    const float near = __fmul_rn(v, inverse);
    if (way == kProduct) return near;
    if (way == kDivision) return v / scale;
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
  bits = min(bits, __float_as_uint(e4m3 ? 448.0f : 57344.0f));
  const float grid = static_cast<float>(1 << (24 - bias - fraction));  // its units are those of the denormals
  if (bits < static_cast<uint32_t>(128 - bias) << 23) {
    return sign | (__float_as_uint(__fadd_rn(__uint_as_float(bits), grid)) - __float_as_uint(grid));
  }
  return sign | ((bits + (bits >> shift & 1) + ((1u << (shift - 1)) - 1) - (static_cast<uint32_t>(127 - bias) << 23)) >> shift);
}
__device__ inline uint32_t to_float8(float2 v, bool e4m3) { return to_float8(v.x, e4m3) | to_float8(v.y, e4m3) << 8; }
#endif

__device__ inline uint32_t to_int8(float v) { return max(-128, min(127, __float2int_rn(v))) & 0xff; }  // NaN is 0

__device__ inline uint32_t to_codes(float2 v, QType type) {
  if (type == QType::kInt8) return to_int8(v.x) | to_int8(v.y) << 8;
  return to_float8(v, type == QType::kFloat8E4M3);
}

// The codes of v, at column col of a row.
template <int kElems>
__device__ void store_codes(const QuantArgs& a, int64_t index, int count, const float2 (&v)[kElems / 2], const QuantScale& scale) {
  uint32_t words[kElems / 4] = {};
#pragma unroll
  for (int i = 0; i < kElems / 2; ++i) {
    words[i / 2] |= to_codes({scale(v[i].x), scale(v[i].y)}, a.to.dtype) << 16 * (i % 2);
  }
  uint8_t* const to = static_cast<uint8_t*>(a.to.data) + index;
  if (a.aligned && count >= kElems) {
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

}  // namespace rmsnorm::cuda
