// y = x * rstd * (weight + weight_offset), one reduction per row.
#include "launch.h"
#include "quant.cuh"
#include "reduce.cuh"

namespace rmsnorm::cuda {
namespace {

struct ForwardArgs {
  View x, weight, input, residual;  // x = input + residual is formed first, if there is an input
  void* y;
  void* rstd;
  Rows x_rows, y_rows, input_rows, residual_rows;
  int64_t rows, cols;
  double eps;
  Mean mean;
  float weight_offset;
  int lanes, cluster;
  int64_t slice;
  DType y_dtype;
  bool y_aligned;
  bool cast_before_weight;
  QuantArgs quant;
};

// W is the type the weight is held in (held_dtype in plan.h), and that of y after cast_before_weight. kAdd: x is a sum,
// of a residual and an input of type X or, where X is fp32, of any (and so may y be).
template <typename X, typename W, bool kCast, bool kAdd>
struct Forward {
  using Y = std::conditional_t<kCast, W, X>;
  static constexpr int kElems = 16 / sizeof(X);
  using XChunk = Chunk<X, kElems>;
  using WChunk = Chunk<W, kElems>;

  // Squares of 16-bit numbers are exact in fp32 (or nearly), and 16-bit results forgive the rest within a thread.
  template <int kChunks>
  static __device__ Total<X> sum_of_squares(const XChunk (&x)[kChunks]) {
    const auto pair = [&](int i) { return x[i / (kElems / 2)].get(i % (kElems / 2)); };
    constexpr int kPairs = kChunks * kElems / 2;
    if constexpr (sizeof(X) == 4) {
      return tree_sum<kPairs>([&](int i) { return Sum::of_square(pair(i).x) + Sum::of_square(pair(i).y); });
    } else {
      const auto square = [&](int i) { return __fmaf_rn(pair(i).y, pair(i).y, __fmul_rn(pair(i).x, pair(i).x)); };
      return tree_sum<kPairs>(square);
    }
  }

  static __device__ float2 apply(float2 x, float2 g, const Scale& s) {
    const float2 v = {x.x * s.pre, x.y * s.pre};
    if constexpr (kCast) {
      float2 n = {v.x * s.hi, v.y * s.hi};
      if constexpr (sizeof(X) == 4) n = {__fmaf_rn(v.x, s.hi, v.x * s.lo), __fmaf_rn(v.y, s.hi, v.y * s.lo)};
      n = round_to<X>(n);
      return {n.x * g.x, n.y * g.y};
    } else {
      return {scaled(v.x, g.x, s), scaled(v.y, g.y, s)};
    }
  }

  // fp32 results carry the rounding error of a product along (three roundings would be 2 to 3 ulp): that of the weight
  // and rstd, for then x may be subnormal. Where that product is beyond fp32, and in 16 bits, where no error shows,
  // x comes first: x * rstd is never large.
  static __device__ float scaled(float x, float g, const Scale& s) {
    const float plain = x * s.hi * g;
    if constexpr (sizeof(X) == 2) return plain;
    const float product = __fmul_rn(g, s.hi);
    const float rest = __fmaf_rn(g, s.lo, __fmaf_rn(g, s.hi, -product));
    return isfinite(product) ? __fmaf_rn(x, product, x * rest) : plain;
  }

  static __device__ void store(const ForwardArgs& a, int64_t index, int count, XChunk& x, WChunk& w, const Scale& s) {
    Chunk<Y, kElems> y;
    x.stay_packed();
    w.stay_packed();
#pragma unroll
    for (int i = 0; i < kElems / 2; ++i) {
      const float2 g = w.get(i);
      y.set(i, apply(x.get(i), {g.x + a.weight_offset, g.y + a.weight_offset}, s));
    }
    const auto store_as = [&](auto element) {
      using T = decltype(element);
      Chunk<T, kElems> narrow;
#pragma unroll
      for (int i = 0; i < kElems / 2; ++i) narrow.set(i, y.get(i));
      store_chunk(static_cast<T*>(a.y) + index, narrow, count, a.y_aligned);
    };
    if (kAdd && sizeof(X) == 4 && a.y_dtype == DType::kFloat16) return store_as(__half());
    if (kAdd && sizeof(X) == 4 && a.y_dtype == DType::kBFloat16) return store_as(__nv_bfloat16());
    store_chunk(static_cast<Y*>(a.y) + index, y, count, a.y_aligned);
  }

  // The norm as it is rounded before it is put into 8 bits, which all kernels share: cast and dtype are not known here.
  static __device__ void norm(const ForwardArgs& a, const XChunk& x, const WChunk& w, const Scale& s, float2 (&v)[kElems / 2]) {
#pragma unroll
    for (int i = 0; i < kElems / 2; ++i) {
      const float2 g = {w.get(i).x + a.weight_offset, w.get(i).y + a.weight_offset};
      v[i] = a.cast_before_weight ? Forward<X, W, true, kAdd>::apply(x.get(i), g, s) : apply(x.get(i), g, s);
      if (a.y_dtype == DType::kFloat16) v[i] = round_to<__half>(v[i]);
      if (a.y_dtype == DType::kBFloat16) v[i] = round_to<__nv_bfloat16>(v[i]);
    }
  }

  static __device__ Largest largest(const ForwardArgs& a, XChunk& x, WChunk& w, const Scale& s) {
    x.stay_packed();
    float2 v[kElems / 2];
    norm(a, x, w, s, v);
    Largest result;
#pragma unroll
    for (int i = 0; i < kElems / 2; ++i) result.take(v[i].x), result.take(v[i].y);
    return result;
  }

  // largest: of the row, if it has a scale of its own.
  static __device__ void store_quant(const ForwardArgs& a, int64_t row, int64_t col, int count, XChunk& x, WChunk& w,
                                     const Scale& s, const Largest& largest) {
    x.stay_packed();
    float2 v[kElems / 2];
    norm(a, x, w, s, v);
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
    const QuantArgs& q = a.quant;
    const int64_t index = row * a.cols + col;
    if (q.to.block == 0) return store_codes<kElems>(q, index, count, v, QuantScale(*q.to.scale));
    Largest top = largest;
    int64_t block = 0;
    if (!q.per_row) {  // the threads of a block of columns are side by side in a warp
      const int group = static_cast<int>(q.to.block) / kElems;
      block = col / q.to.block;
      top = Largest();
#pragma unroll
      for (int i = 0; i < kElems / 2; ++i) top.take(v[i].x), top.take(v[i].y);
      for (int o = group / 2; o > 0; o /= 2) top = top + Largest{__shfl_xor_sync(group_mask(group), top.bits, o)};
    }
    const QuantScale scale(q, top);
    if (col == block * q.to.block) q.to.scale[row * q.to.row_stride + block * q.to.block_stride] = scale.scale;
    store_codes<kElems>(q, index, count, v, scale);
  }

  // One chunk of x, or of the residual beside one of the input.
  static __device__ XChunk load(const ForwardArgs& a, int64_t row, int64_t col, int count, XChunk& input) {
    if constexpr (!kAdd) return load_chunk<X, kElems>(a.x, row_offset(a.x_rows, row) + col, count);
    input = load_chunk<X, kElems>(a.input, row_offset(a.input_rows, row) + col, count);
    return load_chunk<X, kElems>(a.residual, row_offset(a.residual_rows, row) + col, count);
  }
  // x as their sum; on its own, since a load does not go past a store.
  static __device__ void add(const ForwardArgs& a, int64_t row, int64_t col, int count, const XChunk& input, XChunk& x) {
    if constexpr (kAdd) {
#pragma unroll
      for (int i = 0; i < kElems / 2; ++i) {
        const float2 left = input.get(i), right = x.get(i);
        x.set(i, {left.x + right.x, left.y + right.y});
      }
      X* const to = static_cast<X*>(const_cast<void*>(a.x.data)) + row_offset(a.x_rows, row) + col;
      store_chunk(to, x, count, a.x.aligned);
    }
  }

  // Once x is summed up and before y, which may be x, is written.
  static __device__ Scale scale(const ForwardArgs& a, const Total<X>& sum, int64_t row, const Cluster& cluster, int lane) {
    Scale s;
    if (!fast_scale(sum, a.mean, s)) {
      if (kAdd && a.lanes <= 32) __syncwarp(group_mask(a.lanes));  // for what its other lanes wrote; longer rows have had a barrier
      s = rescued_scale(static_cast<const X*>(a.x.data) + row_offset(a.x_rows, row), a.cols, a.eps, a.lanes);
      if (a.lanes > 32) cluster.barrier();  // its warps read all of the row; the row is the block's only one
    }
    if (a.rstd != nullptr && lane == 0 && cluster.rank == 0) static_cast<float*>(a.rstd)[row] = s.hi * s.pre;
    return s;
  }
};

template <int kVectors>
constexpr int kThreads = kVectors < kForwardVectors ? kForwardThreads : kMaxThreads;
template <typename X, typename W, bool kAdd, int kVectors, bool kQuant>  // a residual is as many bytes in flight again
constexpr int kBlocks = kVectors < kForwardVectors ? 1 : kQuant || (kAdd && sizeof(W) > sizeof(X)) ? 2 : 3;

// Rows held in registers, kVectors chunks per thread.
template <typename X, typename W, bool kCast, bool kAdd, int kVectors, bool kQuant>
__global__ __launch_bounds__(kThreads<kVectors>, kBlocks<X, W, kAdd, kVectors, kQuant>) void forward_rows(const __grid_constant__ ForwardArgs a) {
  meet_neighbours();
  using F = Forward<X, W, kCast, kAdd>;
  constexpr int kElems = F::kElems;
  constexpr int kRows = kForwardVectors / kVectors;
  __shared__ Scratch scratch;
  const Cluster alone(1);
  const int lanes = a.lanes, cols = static_cast<int>(a.cols);
  const int slots = blockDim.x / lanes, lane = threadIdx.x % lanes;
  // A row of a thread's own is of whole warps, which may leave the loop one by one; else all of a block stay in it together.
  const int slot = kRows == 1 ? 0 : threadIdx.x / lanes;
  const auto column = [=](int k) { return (k * lanes + recomputed(lane)) * kElems; };

  const auto stride = [=] { return int64_t{gridDim.x} * recomputed(slots); };
  typename F::WChunk w[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int col = column(k);
    w[k] = load_weight<W, kElems>(a.weight, col, cols - col);
  }
  int turn = 0;
  for (int64_t first = int64_t{blockIdx.x} * slots + (kRows == 1 ? threadIdx.x / lanes : 0); first < a.rows; first += kRows * stride(), ++turn) {
    typename F::XChunk x[kRows][kVectors] = {}, input[kRows][kVectors] = {};
    Total<X> sum[kRows];
    const int live = live_rows<kRows>(first, stride(), a.rows);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * stride() + slot;
      if (row >= a.rows) continue;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) x[r][k] = F::load(a, row, column(k), cols - column(k), input[r][k]);
    }
#pragma unroll
    for (int r = 0; kAdd && r < kRows; ++r) {
      const int64_t row = first + r * stride() + slot;
      if (row >= a.rows) continue;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) F::add(a, row, column(k), cols - column(k), input[r][k], x[r][k]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= live) break;
      sum[r] = F::sum_of_squares(x[r]);
    }
    row_sum(sum, live, lanes, alone, scratch, turn);
    if constexpr (kQuant) {
      Scale s[kRows];
      Largest largest[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first + r * stride() + slot;
        if (row >= a.rows) continue;
        s[r] = F::scale(a, sum[r], row, alone, lane);
#pragma unroll
        for (int k = 0; k < kVectors && a.quant.per_row; ++k) largest[r] = largest[r] + F::largest(a, x[r][k], w[k], s[r]);
      }
      if (a.quant.per_row) row_sum(largest, live, lanes, alone, scratch, ++turn);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first + r * stride() + slot;
        if (row >= a.rows) continue;
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          const int col = column(k);
          if (col < cols) F::store_quant(a, row, col, cols - col, x[r][k], w[k], s[r], largest[r]);
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first + r * stride() + slot;
        if (row >= a.rows) continue;
        const Scale s = F::scale(a, sum[r], row, alone, lane);
        const int64_t offset = row_offset(a.y_rows, row);
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
          const int col = column(k);
          F::store(a, offset + col, cols - col, x[r][k], w[k], s);
        }
      }
    }
  }
}

// Longer rows, a tile of kForwardVectors chunks per thread at a time. With kKeep they are held in shared memory, by several
// blocks if need be. Without, they may be of any length and are read twice, the second time backward: what was read
// last is the likeliest still to be in the cache.
template <typename X, typename W, bool kCast, bool kAdd, bool kKeep, bool kQuant>
__global__ __launch_bounds__(kForwardSliceThreads, kKeep && !kAdd && !kQuant ? 2 : 1) void forward_long_rows(const __grid_constant__ ForwardArgs a) {
  meet_neighbours();
  using F = Forward<X, W, kCast, kAdd>;
  constexpr int kElems = F::kElems;
  extern __shared__ uint4 kept[];
  __shared__ Scratch scratch;
  const Cluster cluster(a.cluster);
  using Index = std::conditional_t<kKeep, int, int64_t>;  // of a chunk
  const int lane = threadIdx.x, lanes = blockDim.x;
  const Index step = lanes * kForwardVectors;
  // The block's columns, counted from `begin` in chunks; the last may be incomplete.
  const int64_t begin = cluster.rank * a.slice, end = min(a.cols, begin + a.slice);
  const Index chunks = static_cast<Index>((max(end - begin, int64_t{0}) + kElems - 1) / kElems);
  const auto column = [=](Index chunk) { return begin + int64_t{chunk} * kElems; };
  const auto count = [=](Index chunk) { return static_cast<int>(min(end - column(chunk), int64_t{kElems})); };

  int turn = 0;
  for (int64_t row = blockIdx.x / cluster.size; row < a.rows; row += gridDim.x / cluster.size, ++turn) {
    typename F::XChunk x[kForwardVectors];
    Sum total;
    for (Index tile = 0; tile < chunks; tile += step) {
      typename F::XChunk input[kForwardVectors];
#pragma unroll
      for (int k = 0; k < kForwardVectors; ++k) {
        const Index chunk = tile + k * lanes + lane;
        x[k] = F::load(a, row, column(chunk), count(chunk), input[k]);
      }
#pragma unroll
      for (int k = 0; k < kForwardVectors; ++k) {
        const Index chunk = tile + k * lanes + lane;
        F::add(a, row, column(chunk), count(chunk), input[k], x[k]);
      }
      total = total + Sum(F::sum_of_squares(x));
#pragma unroll
      for (int k = 0; k < kForwardVectors; ++k) {
        const Index chunk = tile + k * lanes + lane;
        if (kKeep && chunk < chunks) put_chunk(kept, chunks, chunk, x[k]);
      }
    }
    typename F::WChunk w[kForwardVectors];
    const auto load_weights = [&](Index tile) {
#pragma unroll
      for (int k = 0; k < kForwardVectors; ++k) {
        const Index chunk = tile + k * lanes + lane;
        w[k] = load_weight<W, kElems>(a.weight, column(chunk), count(chunk));
      }
    };
    Index tile = (chunks - 1) / step * step;
    load_weights(tile);
    Total<X> sum[] = {total};
    row_sum(sum, 1, lanes, cluster, scratch, turn);
    const Scale s = F::scale(a, sum[0], row, cluster, lane);
    const int64_t x_offset = kKeep ? 0 : row_offset(a.x_rows, row);
    Largest largest[1];
    if (kQuant && a.quant.per_row) {
      for (Index chunk = lane; chunk < chunks; chunk += lanes) {
        typename F::WChunk weight = load_weight<W, kElems>(a.weight, column(chunk), count(chunk));
        if (kKeep) {
          get_chunk(kept, chunks, chunk, x[0]);
        } else {
          x[0] = load_chunk<X, kElems>(a.x, x_offset + column(chunk), count(chunk));
        }
        largest[0] = largest[0] + F::largest(a, x[0], weight, s);
      }
      row_sum(largest, 1, lanes, cluster, scratch, ++turn);
    }
    for (; tile >= 0; tile -= step) {
      const int64_t y_offset = row_offset(a.y_rows, row);  // here, where it costs no register during the reduction
#pragma unroll
      for (int k = 0; !kKeep && k < kForwardVectors; ++k) {
        const Index chunk = tile + k * lanes + lane;
        x[k] = load_chunk<X, kElems>(a.x, x_offset + column(chunk), count(chunk));
      }
#pragma unroll
      for (int k = 0; k < kForwardVectors; ++k) {
        const Index chunk = tile + k * lanes + lane;
        if (chunk >= chunks) continue;
        if (kKeep) get_chunk(kept, chunks, chunk, x[k]);
        if constexpr (kQuant) {
          F::store_quant(a, row, column(chunk), count(chunk), x[k], w[k], s, largest[0]);
        } else {
          F::store(a, y_offset + column(chunk), count(chunk), x[k], w[k], s);
        }
      }
      if (tile > 0) load_weights(tile - step);
    }
  }
}

template <typename X, typename W, bool kCast, bool kAdd, bool kQuant = false>
int launch_forward(const ForwardArgs& a, const Plan& plan, cudaStream_t stream) {
  void (*kernel)(ForwardArgs) = plan.keep == Keep::kNowhere  ? forward_long_rows<X, W, kCast, kAdd, false, kQuant>
                                : plan.keep == Keep::kShared ? forward_long_rows<X, W, kCast, kAdd, true, kQuant>
                                : plan.vectors == 1          ? forward_rows<X, W, kCast, kAdd, 1, kQuant>
                                : plan.vectors == 2          ? forward_rows<X, W, kCast, kAdd, 2, kQuant>
                                                             : forward_rows<X, W, kCast, kAdd, 4, kQuant>;
  return launch(kernel, shape_of(plan), a, stream);
}

// In 8 bits: fewer kernels, in which the weight is held as fp32 and cast_before_weight is looked at.
template <typename X>
int launch_quant(const ForwardArgs& a, const Plan& plan, cudaStream_t stream) {
  return a.input.data != nullptr ? launch_forward<X, float, false, true, true>(a, plan, stream)
                                 : launch_forward<X, float, false, false, true>(a, plan, stream);
}

template <typename X, typename W>
int launch_forward(const RmsNormForward& p, const ForwardArgs& a, const Plan& plan, cudaStream_t stream) {
  if (a.input.data != nullptr) {
    return p.cast_before_weight ? launch_forward<X, W, true, true>(a, plan, stream)
                                : launch_forward<X, W, false, true>(a, plan, stream);
  }
  return p.cast_before_weight ? launch_forward<X, W, true, false>(a, plan, stream)
                              : launch_forward<X, W, false, false>(a, plan, stream);
}

}  // namespace

int rms_norm_forward(const RmsNormForward& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const DType w_dtype = p.weight != nullptr ? p.w_dtype : p.x_dtype;
  const Addends& addends = p.addends;
  const int wide = size_of(DType::kFloat64);
  const bool in_double = size_of(p.x_dtype) == wide || size_of(w_dtype) == wide;
  const bool adds = addends.input != nullptr && !in_double &&
                    (p.x_dtype == DType::kFloat32 ? size_of(addends.input_dtype) != wide : addends.input_dtype == p.x_dtype);
  if (addends.input != nullptr && !adds) {  // rare pairs of dtypes: two kernels
    const int error = add_any(p, s);
    if (error != 0) return error;
  }
  if (in_double) return forward_in_double(p, s);
  const Device here = device();
  if (here.multiprocessors == 0) return why_no_device();

  const Quant& quant = p.quant;
  const Plan plan = plan_forward(p.rows, p.cols, p.x_dtype, here, quant.data != nullptr);
  const int elems = vector_elems(p.x_dtype);
  ForwardArgs a{};
  a.x = {p.x, p.x_dtype, rows_aligned(p.x, p.x_rows, p.rows, p.x_dtype, elems)};
  a.weight = {p.weight, w_dtype, row_aligned(p.weight, w_dtype, elems)};
  if (adds) {
    const auto aligned = [&](const void* data, const Rows& rows, DType type) { return rows_aligned(data, rows, p.rows, type, elems); };
    a.input = {addends.input, addends.input_dtype, aligned(addends.input, addends.input_rows, addends.input_dtype)};
    a.residual = {addends.residual, p.x_dtype, aligned(addends.residual, addends.residual_rows, p.x_dtype)};
    a.input_rows = addends.input_rows;
    a.residual_rows = addends.residual_rows;
  }
  a.y_dtype = p.y_dtype;
  a.y = p.y;
  a.y_aligned = rows_aligned(p.y, p.y_rows, p.rows, p.y_dtype, elems);
  a.rstd = p.rstd;
  a.x_rows = p.x_rows;
  a.y_rows = p.y_rows;
  a.rows = p.rows;
  a.cols = p.cols;
  a.eps = p.eps;
  a.mean = mean_of(p.cols, p.eps);
  a.weight_offset = p.weight != nullptr ? static_cast<float>(p.weight_offset) : 0.0f;
  a.lanes = plan.lanes;
  a.cluster = plan.cluster;
  a.slice = plan.slice;
  if (quant.data != nullptr) {
    a.cast_before_weight = p.cast_before_weight && p.weight != nullptr;
    const float most = quant.dtype == QType::kInt8 ? 127.0f : quant.dtype == QType::kFloat8E4M3 ? 448.0f : 57344.0f;
    const bool aligned = p.cols % elems == 0 && reinterpret_cast<uintptr_t>(quant.data) % elems == 0;
    a.quant = {quant, most, aligned, quant.block == p.cols};
    return p.x_dtype == DType::kFloat32   ? launch_quant<float>(a, plan, s)
           : p.x_dtype == DType::kFloat16 ? launch_quant<__half>(a, plan, s)
                                          : launch_quant<__nv_bfloat16>(a, plan, s);
  }
  const bool same = held_dtype(p.x_dtype, w_dtype) == p.x_dtype;
  switch (p.x_dtype) {
    case DType::kFloat32:
      return launch_forward<float, float>(p, a, plan, s);
    case DType::kFloat16:
      return same ? launch_forward<__half, __half>(p, a, plan, s) : launch_forward<__half, float>(p, a, plan, s);
    default:
      return same ? launch_forward<__nv_bfloat16, __nv_bfloat16>(p, a, plan, s)
                  : launch_forward<__nv_bfloat16, float>(p, a, plan, s);
  }
}

}  // namespace rmsnorm::cuda
