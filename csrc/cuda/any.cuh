// Single elements of a dtype known at run time, as double: for what is off the hot path.
#pragma once
#include "../round_to_odd.h"
#include "vec.cuh"

namespace rmsnorm::cuda {

__device__ inline double load_any(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(p)[i];
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(p)[i]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const double*>(p)[i];
  }
}

__device__ inline void store_any(void* p, DType dtype, int64_t i, double v) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(p)[i] = static_cast<float>(v);
      return;
    case DType::kFloat16:
      static_cast<__half*>(p)[i] = __float2half_rn(round_to_odd(v));
      return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(round_to_odd(v));
      return;
    default:
      static_cast<double*>(p)[i] = v;
  }
}

__device__ inline double round_any(DType dtype, double v) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<float>(v);
    case DType::kFloat16:
      return __half2float(__float2half_rn(round_to_odd(v)));
    case DType::kBFloat16:
      return __bfloat162float(__float2bfloat16_rn(round_to_odd(v)));
    default:
      return v;
  }
}

}  // namespace rmsnorm::cuda
