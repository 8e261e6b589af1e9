// Norms with a gate, and norms of groups of columns: what their kernels of both directions share.
//
// A group's columns are a row of their own: blockIdx.x tells the group of a block (and its rank in
// a cluster), blockIdx.y which of the group's rows it has. So a block has one part of the weight,
// and the groups of a row are worked on at about the same time.
//
// Kernels of rows in registers or in shared memory take what is plain. All other launches go to one
// that reads a row twice; it is laid out like the others, and a row's bits are the same in all.
#pragma once
#include "launch.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace rmsnorm::cuda {

struct GateArgs {
  View gate;         // without data: none
  int64_t all_cols;  // of a row; RowArgs has those of a group
  bool before_norm, is_sigmoid;
  bool is_exact;        // the activation; else it is for 16 bits
  bool rounds_product;  // with the weight, to the type of x
};

struct GroupBlocks {
  static __device__ unsigned index() { return blockIdx.y; }
  static __device__ unsigned count() { return gridDim.y; }
};

// sigmoid(g) = over / (over + under): of e^-|g| and 1, so that nothing overflows. kExact: to about
// an ulp; else within 2^-18, which is enough for 16 bits.
struct Sigmoid {
  float value, rest;  // and 1 - sigmoid(g)

  template <bool kExact>
  static __device__ Sigmoid of(float g) {
    // All times 2^24 where the hardware makes zeros of denormals.
    constexpr float kOne = kExact ? 1.0f : 0x1p24f;
    float e, inverse;
    if (kExact) {
      e = expf(-fabsf(g));
    } else {
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(__fmaf_rn(fabsf(g), -0x1.715476p0f, 24.0f)));
    }
    const float sum = kOne + e;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(sum));
    if (kExact) inverse = __fmaf_rn(__fmaf_rn(-sum, inverse, 1.0f), inverse, inverse);  // Newton
    return {(g < 0 ? e : kOne) * inverse, (g < 0 ? kOne : e) * inverse};
  }
  __device__ float activated(float g, bool is_sigmoid) const {
    return is_sigmoid ? value : g * value;
  }
  __device__ float slope(float g, bool is_sigmoid) const {
    return __fmul_rn(value, is_sigmoid ? rest : __fmaf_rn(g, rest, 1.0f));
  }
};

// What a kernel is for: plain rows, and a gate before the norm or behind it (or none), this with
// cast_before_weight too; or all.
enum class Order { kBefore, kBehind, kBehindCast, kAny };

// x has type X. What else is read is of that type too where the kernel is plain, else of any.
template <typename X, Order kOrder>
struct Gated {
  static constexpr bool kPlain = kOrder != Order::kAny;
  static constexpr int kElems = 16 / sizeof(X), kPairs = kElems / 2;
  using XChunk = Chunk<X, kElems>;
  using Other = std::conditional_t<kPlain, X, float>;
  using OtherChunk = Chunk<Other, kElems>;
  using Floats = Chunk<float, kElems>;

  static __device__ bool before_norm(const GateArgs& a) {
    return kPlain ? kOrder == Order::kBefore : a.before_norm;
  }

  // In place of a gate that is not there: sigmoid(inf) is 1. Zeros beside rows that are not there.
  static __device__ OtherChunk no_gate(const GateArgs& a) {
    OtherChunk gate = {};
    const float v = a.gate.data == nullptr ? INFINITY : 0.0f;
    unrolled<kPairs>([&](int i) { gate.set(i, {v, v}); });
    return gate;
  }

  static __device__ Sigmoid sigmoid(const GateArgs& a, float g) {
    const bool exact = sizeof(X) == 4 || (!kPlain && a.is_exact);
    return exact ? Sigmoid::of<true>(g) : Sigmoid::of<false>(g);
  }
  // The activation of a gate.
  static __device__ float activated(const GateArgs& a, float g) {
    return sigmoid(a, g).activated(g, a.is_sigmoid);
  }
  static __device__ float2 activated(const GateArgs& a, float2 g) {
    return {activated(a, g.x), activated(a, g.y)};
  }
  // v times the activation, where that is in front of the norm; where it is behind it.
  static __device__ float2 times_before(const GateArgs& a, float2 v, float2 activated) {
    return before_norm(a) ? v * activated : v;
  }
  static __device__ float2 times_behind(const GateArgs& a, float2 v, float2 activated) {
    return before_norm(a) ? v : v * activated;
  }

  // Where x and the gate of a row begin.
  struct Place {
    int64_t x, gate;
    __device__ Place(const RowArgs& row_args, const GateArgs& a, int64_t row, int64_t begin)
        : x(begin + row_args.x.offset<kPlain>(row)), gate(begin + a.gate.offset<kPlain>(row)) {}
  };

  // A row out of the range of fast_scale: what is normalized, again from memory.
  static __device__ Scale rescued(const RowArgs& row_args, const GateArgs& a, const Place& place) {
    const X* const x = static_cast<const X*>(row_args.x.data) + place.x;
    const auto load = [&](int64_t i) {
      const float v = static_cast<float>(x[i]);
      if (!before_norm(a)) return double{v};
      const float g = static_cast<float>(load_any(a.gate.data, a.gate.dtype, place.gate + i));
      return double{__fmul_rn(v, activated(a, g))};
    };
    return rescued_scale_of(load, row_args.cols, row_args.eps, row_args.lanes);
  }

  // The weight from column `begin` on, its offset added; f(k, column, count) as of load_weights in
  // launch.h, but that count ends with the group.
  template <typename Each, int kChunks>
  static __device__ void load_weights(const RowArgs& a, int64_t begin, const Each& each,
                                      Floats (&w)[kChunks]) {
    View weight = a.weight;
    asm volatile("" : "+l"(weight.data));
    const bool there = a.weight_cols > 0;
    with_type(weight.dtype, [&](auto element) {
      using W = decltype(element);
      each([&](int k, auto col, int count) {
        const auto packed = load_chunk<kPlain, W, kElems>(weight, begin, col, there ? count : 0);
        unrolled<kPairs>([&](int i) { w[k].set(i, packed.get(i) + a.weight_offset); });
      });
    });
  }
};

// ---------------------------------------------------------------- launches

// Of one group; p is that of all.
template <typename Norm>
RowArgs group_args(const Norm& p, int64_t groups) {
  Norm group = p;
  group.cols /= groups;
  return row_args(group);
}

template <typename P>
GateArgs gate_args(const P& p) {
  GateArgs a{view_of(p.norm, p.gate.data, p.gate.dtype, p.gate.rows)};
  a.all_cols = p.norm.cols;
  a.before_norm = p.gate.data != nullptr && p.gate.before_norm;
  a.is_sigmoid = p.gate.data == nullptr || p.gate.activation == Activation::kSigmoid;
  a.is_exact = size_of(p.norm.x_dtype) == 4 || size_of(p.gate.dtype) == 4;
  a.rounds_product = p.norm.cast_before_weight && weight_dtype(p.norm) == p.norm.x_dtype;
  return a;
}

// Each group has to begin where the widest instruction can access it.
template <typename P>
bool has_whole_groups(const P& p) {
  return p.groups == 1 || p.norm.cols / p.groups % vector_elems(p.norm.x_dtype) == 0;
}
template <typename... Views>
void align_groups(bool whole, Views&... views) {
  ((views.aligned = views.aligned && whole), ...);
}

template <typename P>
bool in_double(const P& p) {
  return is_double(p.norm.x_dtype) || is_double(weight_dtype(p.norm)) || is_double(p.gate.dtype);
}

template <typename Args>
int launch_groups(void (*kernel)(Args), const GatedPlan& plan, int64_t groups, const Args& args,
                  cudaStream_t stream) {
  set_last_plan(plan);
  const dim3 grid(static_cast<unsigned>(groups * plan.cluster),
                  static_cast<unsigned>(plan.group_blocks));
  const dim3 threads(plan.lanes, plan.threads / plan.lanes);  // of a row, by rows
  return launch(kernel, grid, threads, args, stream, static_cast<unsigned>(plan.shared_bytes),
                plan.cluster);
}

}  // namespace rmsnorm::cuda
