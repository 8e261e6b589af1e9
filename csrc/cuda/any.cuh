// Single elements of a dtype known at run time, as double: for what is off the hot path.
#pragma once
#include "../round_to_odd.h"
#include "vec.cuh"

namespace rmsnorm::cuda {

// f(T()) with T the type of dtype.
template <typename F>
__device__ auto with_any_type(DType dtype, const F& f) {
  return dtype == DType::kFloat64 ? f(double()) : with_type(dtype, f);
}

template <typename T>
__device__ double to_double(T v) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<float>(v);
  } else {
    return v;
  }
}

template <typename T>
__device__ T from_double(double v) {
  if constexpr (sizeof(T) == 2) {
    return T(round_to_odd(v));
  } else {
    return static_cast<T>(v);
  }
}

__device__ inline double load_any(const void* p, DType dtype, int64_t i) {
  return with_any_type(
      dtype, [=](auto type) { return to_double(static_cast<const decltype(type)*>(p)[i]); });
}

__device__ inline void store_any(void* p, DType dtype, int64_t i, double v) {
  with_any_type(dtype, [=](auto type) {
    using T = decltype(type);
    static_cast<T*>(p)[i] = from_double<T>(v);
  });
}

__device__ inline double round_any(DType dtype, double v) {
  return with_any_type(dtype, [=](auto type) { return to_double(from_double<decltype(type)>(v)); });
}

}  // namespace rmsnorm::cuda
