// The norm in 8 bits, saturated: see Quant in rmsnorm.h. What quant.cu and gated_quant.cu share.
#pragma once
#include <cuda_fp8.h>

#include "launch.h"
#include "reduce.cuh"

namespace rmsnorm::cuda {

// What a kernel is told beside the arguments of a norm.
struct QuantEnd {
  Quant quant;
  int64_t row_codes;                          // columns of a row, of all of its groups
  float largest_value, inverse_largest;       // of the format
  bool codes_aligned;                         // every chunk of codes is
  bool per_token;                             // each row has a scale of its own
  int lanes_per_block, lanes_per_block_log2;  // that share a scale; 0: no dynamic one of blocks
};

// By which values are brought to the range of the format.
struct QuantScale {
  float scale, inverse;
  enum { kProduct, kQuotient, kAnyQuotient } method;

  QuantScale() = default;
  // A static one, of which no more is needed.
  __device__ explicit QuantScale(float inverse) : scale(0), inverse(inverse), method(kProduct) {}

  // A dynamic one, of the largest magnitude of the values that share it.
  __device__ QuantScale(const QuantEnd& a, float magnitude) {
    const Quant& q = a.quant;
    const float bounded = magnitude > q.bound ? q.bound : magnitude;
    scale = isfinite(bounded) ? quotient(bounded, a.largest_value, a.inverse_largest) : bounded;
    scale = scale < q.least ? q.least : scale;
    inverse = 1.0f / scale;
    const bool in_range = magnitude <= q.bound && isfinite(magnitude);
    method = q.dtype == QType::kInt8 ? kProduct : in_range ? kQuotient : kAnyQuotient;
  }

  // v / by, rounded as a division is (Markstein 1990); in this order of signs 0 keeps its own.
  static __device__ float quotient(float v, float by, float inverse) {
    const float near = __fmul_rn(v, inverse);
    return __fmaf_rn(__fmaf_rn(near, by, -v), -inverse, near);
  }

  // All of v, in the range of the format.
  template <int kPairs>
  __device__ void apply(float2 (&v)[kPairs]) const {
    const auto each = [&](const auto& f) {
      unrolled<kPairs>([&](int i) { v[i] = {f(v[i].x), f(v[i].y)}; });
    };
    if (method == kProduct) return each([&](float x) { return __fmul_rn(x, inverse); });
    if (method == kQuotient) return each([&](float x) { return quotient(x, scale, inverse); });
    // Of an infinite product, or by an infinite scale, the product is the quotient.
    each([&](float x) {
      const float result = quotient(x, scale, inverse);
      return isfinite(result) ? result : __fmul_rn(x, inverse);
    });
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

// v / scale and v * (1 / scale) are within 2^-22 of each other, so they have the same code but
// where a number halfway between two codes is as near. Have they there too, for every v of the
// 16-bit type T? It takes one look at the v next to each such number, of a binade and of the
// denormals: a lane has one of these. Of whole warps.
template <typename T>
__device__ bool product_has_the_codes(const QuantScale& scale, bool e4m3) {
  const int codes = e4m3 ? 8 : 4, i = threadIdx.x % (2 * codes);  // of a binade
  const float least = e4m3 ? 0x1p-10f : 0x1p-17f;                 // half of the smallest code
  const float middle = i < codes ? 2 * (codes + i) + 1 : least * (2 * (i - codes) + 1);
  constexpr uint32_t kRest = std::is_same_v<T, __half> ? 0x1fff : 0xffff;  // that T lacks of fp32
  const uint32_t bits = __float_as_uint(middle * scale.scale) + (kRest + 1) / 2;
  const float v = __uint_as_float(bits & ~kRest);
  const float quotient = QuantScale::quotient(v, scale.scale, scale.inverse);
  const uint32_t both = to_float8({quotient, __fmul_rn(v, scale.inverse)}, e4m3);
  return __all_sync(~0u, (both & 0xff) == both >> 8);
}

// Saturated; NaN is 0. The codes of v.x and, above it, v.y.
__device__ inline uint32_t to_int8(float2 v) {
  uint32_t codes;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
      : "=r"(codes)
      : "r"(__float2int_rn(v.y)), "r"(__float2int_rn(v.x)), "r"(0));
  return codes;
}

// Stores the codes, the norm if it is wanted, and the scales: the epilogue of a Norm (norm.cuh), or
// of one with a gate. Its Args have a QuantEnd.
template <typename NormType, typename ArgsType>
struct StoreQuant {
  using N = NormType;
  using Args = ArgsType;
  using X = typename N::X;
  static constexpr int kElems = N::kElems, kPairs = kElems / 2;
  using YChunk = typename N::YChunk;
  static constexpr bool kFindsLargest = true;
  float inverse;  // of a static scale

  __device__ void prepare(const Args& a) {
    inverse = a.quant.block == 0 ? 1.0f / *a.quant.scale : 0;
  }

  struct Place {
    const Args& a;
    const int64_t row, begin;
    uint8_t* const codes = static_cast<uint8_t*>(a.quant.data) + row * a.row_codes + begin;
    float* const scales = a.quant.scale + row * a.quant.row_stride;
    QuantScale scale;

    // `first`: it stores the scale of a row.
    __device__ Place(const StoreQuant& e, const Args& a, int64_t row, int64_t begin,
                     typename N::LargestY largest, bool first)
        : a(a), row(row), begin(begin), scale(e.inverse) {
      if (!a.per_token) return;
      scale = QuantScale(a, largest.value());
      if (first) *scales = scale.scale;
    }

    template <typename Index>
    __device__ void store(Index col, int count, const YChunk& y) const {
      store_norm(col, count, y);
      store_codes(col, count, y, a.lanes_per_block != 0 ? of_block<false>(col, count, y) : scale);
    }

    // The chunks that each(f) calls f(k, column, count) for. Of more than one the rows are of whole
    // warps.
    template <typename Each, int kChunks>
    __device__ void store(const Each& each, const YChunk (&y)[kChunks]) {
      if (a.y.data != nullptr) {
        each([&](int k, auto col, int count) { store_norm(col, count, y[k]); });
      }
      if (a.lanes_per_block != 0) {
        return each([&](int k, auto col, int count) {
          store_codes(col, count, y[k], of_block<(kChunks > 1)>(col, count, y[k]));
        });
      }
      // Of rows of fewer chunks it would cost more than it spares. y of other kernels has any type.
      if constexpr (kChunks == kForwardVectors && N::kPlain && sizeof(X) == 2) {
        if (a.per_token && scale.method == QuantScale::kQuotient &&
            product_has_the_codes<X>(scale, a.quant.dtype == QType::kFloat8E4M3))
          scale.method = QuantScale::kProduct;
      }
      each([&](int k, auto col, int count) { store_codes(col, count, y[k], scale); });
    }

    template <typename Index>
    __device__ void store_norm(Index col, int count, const YChunk& y) const {
      if (a.y.data == nullptr || count <= 0) return;
      N::store(a, begin + a.y.offset<N::kPlain>(row), col, count, y);
    }

    // The scale of a chunk's block of columns, whose lanes are side by side in a warp. kWhole: all
    // lanes of the warp call this.
    template <bool kWhole, typename Index>
    __device__ QuantScale of_block(Index col, int count, const YChunk& y) const {
      if (!kWhole && count <= 0) return scale;
      typename N::LargestY top;
      top.take(y);
      const uint32_t mask = kWhole ? ~0u : group_mask(a.lanes_per_block);
#pragma unroll
      for (int o = kWarp / 2; o > 0; o /= 2) {
        if (!kWhole && o >= a.lanes_per_block) continue;
        const typename N::LargestY other{__shfl_xor_sync(mask, top.bits, o)};
        if (o < a.lanes_per_block) top = top + other;
      }
      const QuantScale result(a, top.value());
      const Index chunk = static_cast<Index>(begin + col) / kElems;
      if ((chunk & (a.lanes_per_block - 1)) == 0 && count > 0) {
        scales[(chunk >> a.lanes_per_block_log2) * a.quant.block_stride] = result.scale;
      }
      return result;
    }

    template <typename Index>
    __device__ void store_codes(Index col, int count, const YChunk& y, const QuantScale& by) const {
      if (count <= 0) return;
      float2 v[kPairs];
      unrolled<kPairs>([&](int i) { v[i] = y.get(i); });
      by.apply(v);
      Chunk<uint8_t, kElems> chunk = {};
      const auto each = [&](const auto& f) {
        unrolled<kPairs>([&](int i) { chunk.word[i / 2] |= f(v[i]) << 16 * (i % 2); });
      };
      if (a.quant.dtype == QType::kInt8) {
        each([](float2 v) { return to_int8(v); });
      } else if (a.quant.dtype == QType::kFloat8E4M3) {
        each([](float2 v) { return to_float8(v, true); });
      } else {
        each([](float2 v) { return to_float8(v, false); });
      }
      if constexpr (N::kPlain) {
        store_whole(codes, col, chunk);
      } else {
        store_chunk(codes + col, chunk, count, a.codes_aligned);
      }
    }
  };
};

inline QuantEnd quant_end(const RmsNormForward& p) {
  const int elems = vector_elems(p.x_dtype);
  QuantEnd a{p.quant, p.cols};
  a.largest_value = max_value(p.quant.dtype);
  a.inverse_largest = 1.0f / a.largest_value;
  a.codes_aligned = p.cols % elems == 0 && reinterpret_cast<uintptr_t>(p.quant.data) % elems == 0;
  a.per_token = p.quant.block == p.cols;
  if (!a.per_token) a.lanes_per_block = static_cast<int>(p.quant.block) / elems;
  while (2 << a.lanes_per_block_log2 <= a.lanes_per_block) ++a.lanes_per_block_log2;
  return a;
}

}  // namespace rmsnorm::cuda
