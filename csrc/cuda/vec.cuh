// Elements in registers: a chunk is the consecutive elements of a row that one thread handles at a
// time, as many as 16 bytes of x hold, kept packed as they come from memory. How it is accessed (16
// bytes at a time or element by element) depends on the alignment; which thread gets which elements
// never does.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../rmsnorm.h"
#include "../round_to_odd.h"

namespace rmsnorm::cuda {

// First in every kernel. A launch under RMSNORM_CUDA_PDL (launch.h) may start before the kernel
// ahead of it has ended: here it is waited for, and the next one is let in. Otherwise nothing.
__device__ inline void sync_dependent_launch() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

// f(0), f(1), ... f(kCount - 1), without a loop.
template <int kCount, typename F>
__device__ void unrolled(const F& f) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) f(i);
}

// f(std::true_type()) or f(std::false_type()): a choice ahead of a loop, not in it.
template <typename F>
__device__ void with_choice(bool flag, const F& f) {
  if (flag) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

// f(T()) with T the type of dtype, of those that the kernels of rows are compiled for.
#pragma nv_exec_check_disable
template <typename F>
RMSNORM_HOST_DEVICE auto with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat16:
      return f(__half());
    default:
      return f(__nv_bfloat16());
  }
}

template <typename T>
__device__ float2 unpack(const uint32_t* w) {
  if constexpr (std::is_same_v<T, float>) {
    return {__uint_as_float(w[0]), __uint_as_float(w[1])};
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(*w));
  } else {
    return {__uint_as_float(*w << 16), __uint_as_float(*w & 0xffff0000u)};
  }
}

template <typename T>
__device__ void pack(uint32_t* w, float2 v) {
  if constexpr (std::is_same_v<T, float>) {
    w[0] = __float_as_uint(v.x);
    w[1] = __float_as_uint(v.y);
  } else if constexpr (std::is_same_v<T, __half>) {
    reinterpret_cast<__half2&>(*w) = __float22half2_rn(v);
  } else {
    reinterpret_cast<__nv_bfloat162&>(*w) = __float22bfloat162_rn(v);
  }
}

// a * b + c, rounded once. From compute capability 10.0 on, a pair takes one instruction.
#if __CUDA_ARCH__ >= 1000
__device__ inline uint64_t packed(float2 v) {
  uint64_t result;
  asm("mov.b64 %0, {%1, %2};" : "=l"(result) : "f"(v.x), "f"(v.y));
  return result;
}
__device__ inline float2 unpacked(uint64_t v) {
  float2 result;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(result.x), "=f"(result.y) : "l"(v));
  return result;
}
__device__ inline float2 multiply_add(float2 a, float2 b, float2 c) {
  uint64_t v;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(v) : "l"(packed(a)), "l"(packed(b)), "l"(packed(c)));
  return unpacked(v);
}
__device__ inline float2 operator+(float2 a, float2 b) {
  uint64_t v;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(v) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(v);
}
__device__ inline float2 operator*(float2 a, float2 b) {
  uint64_t v;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(v) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(v);
}
#else
__device__ inline float2 multiply_add(float2 a, float2 b, float2 c) {
  return {__fmaf_rn(a.x, b.x, c.x), __fmaf_rn(a.y, b.y, c.y)};
}
__device__ inline float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ inline float2 operator*(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
#endif
// One by one: what is known to the compiler, a factor of 1 say, leaves no instruction.
__device__ inline float2 operator+(float2 a, float b) { return {a.x + b, a.y + b}; }
__device__ inline float2 operator*(float2 a, float b) { return {a.x * b, a.y * b}; }

// v rounded to T and back.
template <typename T>
__device__ float2 round_to(float2 v) {
  uint32_t w[2];
  pack<T>(w, v);
  return unpack<T>(w);
}

// v again, but nothing computed from it is shared with other places or moved out of a loop: a few
// integer instructions per row cost less than the registers that would hold their results.
__device__ inline int recomputed(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

template <typename T, int kElems>
struct Chunk {
  static constexpr int kBytes = kElems * sizeof(T);
  // The widest access that it is a multiple of; and elements as they are in memory.
  using Vector =
      std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  using Raw = std::conditional_t<sizeof(T) == 4, uint32_t,
                                 std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;
  static constexpr int kVectors = kBytes / sizeof(Vector);
  alignas(Vector) uint32_t word[kBytes / 4];

  // Elements 2i and 2i + 1.
  __device__ float2 get(int i) const { return unpack<T>(word + i * sizeof(T) / 2); }
  __device__ void set(int i, float2 v) { pack<T>(word + i * sizeof(T) / 2, v); }

  __device__ Vector vector(int i) const { return reinterpret_cast<const Vector*>(word)[i]; }
  __device__ void set_vector(int i, Vector v) { reinterpret_cast<Vector*>(word)[i] = v; }

  template <typename To>
  __device__ Chunk<To, kElems> to() const {
    if constexpr (std::is_same_v<To, T>) {
      return *this;
    } else {
      Chunk<To, kElems> result;
      unrolled<kElems / 2>([&](int i) { result.set(i, get(i)); });
      return result;
    }
  }

  // Keeps the compiler from unpacking ahead, which would hold twice the registers over a reduction
  // or a loop.
  __device__ void stay_packed() {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (uint32_t& w : word) asm volatile("" : "+r"(w));
    }
  }
};

// The chunk that starts at element col of a row, by the widest accesses. Index: int, where a
// row's columns fit it. Written so that an address takes one instruction.
template <typename T, int kElems, typename Index>
__device__ Chunk<T, kElems> load_whole(const T* row, Index col) {
  using C = Chunk<T, kElems>;
  const auto from = reinterpret_cast<const typename C::Vector*>(row) + col / kElems * C::kVectors;
  C c;
  unrolled<C::kVectors>([&](int i) { c.set_vector(i, from[i]); });
  return c;
}

// To global memory. __stwb is the plain store; written as an assignment, nvcc split it into words
// in most kernels.
template <typename T, int kElems, typename Index>
__device__ void store_whole(T* row, Index col, const Chunk<T, kElems>& c) {
  using C = Chunk<T, kElems>;
  const auto to = reinterpret_cast<typename C::Vector*>(row) + col / kElems * C::kVectors;
  unrolled<C::kVectors>([&](int i) { __stwb(to + i, c.vector(i)); });
}

// `count` elements are there (none if negative); the others read as zero. aligned: p is at an
// address that the widest access can take.
template <typename T, int kElems>
__device__ Chunk<T, kElems> load_chunk(const T* p, int count, bool aligned) {
  using C = Chunk<T, kElems>;
  if (aligned && count >= kElems) return load_whole<T, kElems>(p, 0);
  C c = {};
  unrolled<kElems>([&](int i) {
    if (i >= count) return;
    const uint32_t raw = reinterpret_cast<const typename C::Raw*>(p)[i];
    c.word[i * sizeof(T) / 4] |= raw << 8 * sizeof(T) * i % 32;
  });
  return c;
}

template <typename T, int kElems>
__device__ void store_chunk(T* p, const Chunk<T, kElems>& c, int count, bool aligned) {
  if (aligned && count >= kElems) return store_whole(p, 0, c);
  unrolled<kElems>([&](int i) {
    if (i >= count) return;
    const uint32_t word = c.word[i * sizeof(T) / 4];
    reinterpret_cast<typename Chunk<T, kElems>::Raw*>(p)[i] = word >> 8 * sizeof(T) * i % 32;
  });
}

// Chunk i of n in shared memory, as 16-byte vectors that the threads of a warp find side by side.
template <typename C>
__device__ void put_chunk(uint4* kept, int n, int i, const C& c) {
  unrolled<C::kVectors>([&](int k) { kept[k * n + i] = c.vector(k); });
}
template <typename C>
__device__ C get_chunk(const uint4* kept, int n, int i) {
  C c;
  unrolled<C::kVectors>([&](int k) { c.set_vector(k, kept[k * n + i]); });
  return c;
}

// Rows::offset() on the device. A 64-bit division there is a subroutine that takes some twenty
// registers from the kernel around it. So 32 bits where they do, and one bit at a time for the rare
// row beyond 2^32.
__device__ inline int64_t row_offset(const Rows& rows, int64_t row) {
  int64_t result = 0;
#pragma unroll 1
  for (int d = rows.ndim - 1; d > 0; --d) {
    const uint64_t size = rows.size[d];
    uint64_t next, rest = row;
    if ((rest | size) >> 32 == 0) {
      next = static_cast<uint32_t>(rest) / static_cast<uint32_t>(size);
      rest -= next * size;
    } else {
      next = 0;
#pragma unroll 1
      for (int shift = __clzll(size) - 1; shift >= 0; --shift) {
        next <<= 1;
        if (rest >> shift >= size) rest -= size << shift, next |= 1;
      }
    }
    result += static_cast<int64_t>(rest) * rows.stride[d];
    row = static_cast<int64_t>(next);
  }
  return result + row * rows.stride[0];
}

// A tensor argument as a kernel sees it. A weight is one row.
struct View {
  const void* data;
  DType dtype;
  bool aligned;  // every chunk is
  Rows rows;

  // Where a row starts, in elements.
  template <bool kPlain>
  __device__ int64_t offset(int64_t row) const {
    return kPlain ? row * rows.stride[0] : row_offset(rows, row);
  }
};

// `count` elements from column col on of the row of v that starts at `offset`, held as T, by a
// kernel that is plain (Form in launch.h) or not. Plain ones have whole chunks of T, or none.
template <bool kPlain, typename T, int kElems, typename Index>
__device__ Chunk<T, kElems> load_chunk(const View& v, int64_t offset, Index col, int count) {
  const auto load_as = [&](auto element) {
    using From = decltype(element);
    const From* const row = static_cast<const From*>(v.data) + offset;
    if constexpr (kPlain) {
      return count > 0 ? load_whole<From, kElems>(row, col).template to<T>() : Chunk<T, kElems>{};
    } else {
      return load_chunk<From, kElems>(row + col, count, v.aligned).template to<T>();
    }
  };
  if constexpr (std::is_same_v<T, float> && !kPlain) return with_type(v.dtype, load_as);
  return load_as(T());
}

// c rounded to To, the type of v, to the same place.
template <bool kPlain, typename To, typename T, int kElems, typename Index>
__device__ void store_chunk(const View& v, int64_t offset, Index col, const Chunk<T, kElems>& c,
                            int count) {
  To* const row = static_cast<To*>(const_cast<void*>(v.data)) + offset;
  if constexpr (kPlain) {
    if (count > 0) store_whole(row, col, c.template to<To>());
  } else {
    store_chunk(row + col, c.template to<To>(), count, v.aligned);
  }
}

// Single elements of a dtype known at run time, as double: for what is off the hot path.

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
