// y = the norm of q and k (norm.cuh), and then their rotary embedding.
#include "norm.cuh"
#include "rope.cuh"

namespace rmsnorm::cuda {
namespace {

struct RopeForwardArgs : NormArgs, RopeArgs {
  Place x_place, y_place;
};

// Plain rows: see rope.cuh. kEach: each step is rounded. kApart: the second form. Its angles come
// late, which takes fewer registers.
template <typename X, bool kCast, bool kEach, bool kApart>
ROW_KERNEL(kRopeRows, kApart)
rope_rows(const __grid_constant__ Sides<RopeForwardArgs> sides) {
  sync_dependent_launch();
  using N = Norm<X, kCast ? Form::kPlainCast : Form::kPlain, false>;
  constexpr int kElems = N::kElems;
  using NormChunk = Chunk<float, kElems>;
  const RopeForwardArgs& a = sides.here();
  const Lanes lanes(a.lanes);
  const unsigned rows = static_cast<unsigned>(a.rows);
  const int lane = lanes.lane, cols = static_cast<int>(a.cols);
  const int pairs = static_cast<int>(a.rope.pairs);
  // f(k, column, count): the second chunk of a lane may be beyond the row.
  const auto each_chunk = [&](const auto& f) {
    unrolled<2>([&](int k) {
      const int col = (k * a.lanes + lane) * kElems;
      f(k, col, kApart ? cols - col : kElems);
    });
  };
  typename N::WChunk w[2];
  bool is_first = true;

  for (unsigned first = sides.block() * lanes.slots; first < rows;
       first += a.blocks * lanes.slots, is_first = false) {
    // Lanes without a row take part in the shuffles, with what is there of the last one.
    const bool is_there = first + lanes.slot < rows;
    const unsigned row = is_there ? first + lanes.slot : rows - 1;
    typename N::XChunk x[2] = {};
    Angles<kElems> angles;
    const HeadIndex index(a, row);
    const X* const x_row = static_cast<const X*>(a.x.data) + index.offset(a.x_place);
    each_chunk([&](int k, int col, int count) {
      if (count > 0) x[k] = load_whole<X, kElems>(x_row, col);
    });
    if (!kApart) angles.template load<false>(a, index, lane * kElems);
    if (is_first) load_weights<true>(a, 0, each_chunk, w);
    const auto sum = sum_of_group(N::sum_of_squares(x), a.lanes);
    Scale s;
    const HeadIndex again(a, recomputed(row));  // fewer registers over the sum
    if (!fast_scale(sum, a.mean, s)) {
      s = rescued_scale(static_cast<const X*>(a.x.data) + again.offset(a.x_place), a.cols, a.eps,
                        a.lanes);
    }
    if (a.rstd != nullptr && lane == 0 && is_there) static_cast<float*>(a.rstd)[row] = s.hi * s.pre;
    unrolled<2>([&](int k) { x[k].stay_packed(); });
    const auto norm = [&](int k, int i, const Scale& s) {
      const float2 v = normalized<X, kCast>(x[k].get(i), w[k].get(i), s);
      return kEach ? round_to<X>(v) : v;
    };
    typename N::XChunk y[2];
    if constexpr (!kApart) {
      with_scale<true>(s, [&](const Scale& s) {
        with_step<X, kEach>(a.steps_in_fp32, [&](auto step) {
          using Step = decltype(step);
          unrolled<kElems / 2>([&](int i) {
            const float2 left = norm(0, i, s), right = norm(1, i, s);
            const float2 cos = angles.cos.get(i), sin = angles.sin.get(i);
            y[0].set(i, turned<Step>(left, right, cos, negative(sin)));
            y[1].set(i, turned<Step>(right, left, cos, sin));
          });
        });
      });
    } else {
      NormChunk n[2];
      with_scale<true>(s, [&](const Scale& s) {
        unrolled<2>(
            [&](int k) { unrolled<kElems / 2>([&](int i) { n[k].set(i, norm(k, i, s)); }); });
      });
      if (a.rope.interleaved) {
        each_chunk([&](int k, int col, int) {
          if (col >= 2 * pairs) return;
          Angles<kElems / 2> angles;
          angles.template load<true>(a, again, col / 2);
          with_step<X, kEach>(a.steps_in_fp32, [&](auto step) {
            angles.template turn_neighbours<decltype(step)>(n[k], false);
          });
        });
      } else {
        // Chunks that are rotated meet their partners in shared memory, of their warp alone.
        __shared__ uint4 kept[kThreads<kRopeRows> * 2 * NormChunk::kVectors];
        constexpr int kWarpChunks = 2 * kWarp;
        const int in_warp = warp_lane();
        uint4* const warp_kept = kept + threadIdx.x / kWarp * (kWarpChunks * NormChunk::kVectors);
        __syncwarp();  // the row before has been read
        each_chunk([&](int k, int col, int) {
          if (col < 2 * pairs) put_chunk(warp_kept, kWarpChunks, k * kWarp + in_warp, n[k]);
        });
        __syncwarp();
        each_chunk([&](int k, int col, int) {
          if (col >= 2 * pairs) return;
          angles.template load<true>(a, again, col < pairs ? col : col - pairs);
          const int partner = (col < pairs ? col + pairs : col - pairs) / kElems;
          const int of_lane = partner & (a.lanes - 1), of_k = partner >= a.lanes;
          const auto other =
              get_chunk<NormChunk>(warp_kept, kWarpChunks, of_k * kWarp + in_warp - lane + of_lane);
          with_step<X, kEach>(a.steps_in_fp32, [&](auto step) {
            unrolled<kElems / 2>([&](int i) {
              const float2 sin = angles.sin.get(i);
              n[k].set(i, turned<decltype(step)>(n[k].get(i), other.get(i), angles.cos.get(i),
                                                 col < pairs ? negative(sin) : sin));
            });
          });
        });
      }
      unrolled<2>([&](int k) { y[k] = n[k].template to<X>(); });
    }
    if (!is_there) continue;
    X* const y_row = static_cast<X*>(const_cast<void*>(a.y.data)) + again.offset(a.y_place);
    each_chunk([&](int k, int col, int count) {
      if (count > 0) store_whole(y_row, col, y[k]);
    });
  }
}

// All others: the sum of a row as the norm's kernels form it, then its units (rope.cuh).
template <typename X>
ROW_KERNEL(kRopeAnyRows, false)
rope_any_rows(const __grid_constant__ Sides<RopeForwardArgs> sides) {
  sync_dependent_launch();
  using N = Norm<X, Form::kAny, false>;
  constexpr int kElems = N::kElems;
  using NormChunk = Chunk<float, kElems>;
  const RopeForwardArgs& a = sides.here();
  const Cluster cluster(a.cluster);
  const Lanes lanes(a.lanes);
  const BlockRows rows(a, sides.block() / cluster.size, lanes.slots);
  const int64_t weight = rows.weight * a.cols, begin = cluster.rank * a.slice;
  const int64_t end = min(a.cols, begin + a.slice);
  const Slice<int64_t, kForwardVectors, kElems> slice{begin, end, max(end - begin, int64_t{0}),
                                                      a.lanes, lanes.lane};
  const Units<kElems> units{a};
  int turn = 0;
  for (int64_t first = rows.begin; first < rows.end; first += rows.stride, ++turn) {
    const bool is_there = first + lanes.slot < rows.end;
    const int64_t row = is_there ? first + lanes.slot : rows.end - 1;
    const AnyRow place(a, row, a.x, a.x_place, a.y, a.y_place);
    const auto load = [&](int64_t col, int count) {
      return load_at<X, kElems>(a.x, place.left, col, count);
    };
    Sum total;
    if (slice.chunks <= a.lanes) {  // one for each: zeros beside it would not change the sum
      typename N::XChunk x[] = {load(begin + slice.column(lanes.lane), slice.count(lanes.lane))};
      total = Sum(N::sum_of_squares(x));
    } else {
      for (int64_t tile = 0; tile < slice.chunks; tile += slice.tile) {
        typename N::XChunk x[kForwardVectors];
        slice.each_chunk(tile,
                         [&](int k, int64_t col, int count) { x[k] = load(begin + col, count); });
        total = total + Sum(N::sum_of_squares(x));
      }
    }
    Total<X> sum = total;
    if (a.lanes > kWarp) {
      row_sum(sum, cluster, turn);
    } else {
      sum = sum_of_group(sum, a.lanes);
    }
    const Scale s = N::scale(a, sum, row, cluster, is_there ? lanes.lane : -1, [] {});
    if (!is_there) continue;
    const bool each = a.rope.round_each_step;
    const auto write = [&](auto type) {
      using Y = decltype(type);
#pragma unroll 1
      for (int64_t i = cluster.rank * int64_t{a.lanes} + lanes.lane; i < units.all;
           i += cluster.size * int64_t{a.lanes}) {
        const auto unit = units[i];
        const auto norm = [&](int64_t col) {
          const auto x = load(col, unit.count);
          const auto w = load_weight<kElems>(a, weight, col, unit.count);
          NormChunk n;
          with_choice(a.cast_before_weight, [&](auto cast) {
            unrolled<kElems / 2>([&](int i) {
              n.set(i, normalized<X, decltype(cast)::value>(x.get(i), w.get(i), s));
            });
          });
          if (each) n = n.template to<Y>().template to<float>();
          return n;
        };
        turn_unit<Y, kElems>(place, unit, each, false, norm, [&](int64_t col, const NormChunk& y) {
          store_at<Y, kElems>(a.y, place.right, col, unit.count, y);
        });
      }
    };
    if (a.y.dtype == DType::kFloat32) {
      write(float());
    } else {
      write(X());
    }
  }
}

// share: of the machine, of several sides.
Side<RopeForwardArgs> side_of(const RmsNormRope& r, double share, const Device& here) {
  const RmsNormForward& p = r.norm;
  Side<RopeForwardArgs> side{nullptr, {NormArgs{row_args(p)}, rope_args(r)}};
  RopeForwardArgs& a = side.args;
  a.y = view_of(p, p.y, p.y_dtype, p.y_rows);
  a.rstd = p.rstd;
  a.mean = mean_of(p.cols, p.eps);
  a.steps_in_fp32 = r.rope.step_dtype(p.y_dtype) == DType::kFloat32;
  align_weights(a, r);

  const Tuning& tuning = tuning_for(here);
  const bool fits = p.y_dtype == p.x_dtype && a.x.aligned && a.y.aligned && a.weight.aligned;
  const Rows* const rows[] = {&p.x_rows, &p.y_rows};
  Place* const places[] = {&a.x_place, &a.y_place};
  place_rows(a, r, rows, places);
  const bool plain = fits && is_plain(r, a);
  Plan& plan = side.plan;
  if (plain) {
    const KernelLimits& kernel = tuning.limits[kRopeRows];
    plan = {kernel.kernel, Keep::kRegisters, 2, plain_lanes(p.cols, p.x_dtype), kernel.threads};
    plan.registers =
        is_apart(r.rope, p.cols, p.x_dtype) ? kernel.mixed_registers : kernel.registers;
    plan.bytes_in_flight = 32;
    plan.cluster = 1;
    plan.slice = p.cols;
  } else {
    const KernelLimits& kernel = tuning.limits[kRopeAnyRows];
    plan = plan_forward(p.rows, p.cols, p.x_dtype, here, true);
    plan.kernel = kernel.kernel;
    plan.keep = Keep::kNowhere;
    plan.vectors = kForwardVectors;
    plan.registers = kernel.registers;
    plan.shared_bytes = 0;
  }
  plan.resident = resident_blocks(plan, here);
  lay_out(a, plan);
  const int64_t groups = ceil_div(a.weight_rows, plan.threads / plan.lanes);
  const double limit =
      static_cast<double>(resident_rows(plan, here) * tuning.forward_waves) * share;
  a.blocks = static_cast<unsigned>(even_blocks(groups, static_cast<int64_t>(limit / r.weights)));
  plan.blocks = a.blocks * r.weights * plan.cluster;

  with_type(p.x_dtype, [&](auto x) {
    using X = decltype(x);
    if (!plain) {
      side.kernel = rope_any_rows<X>;
      return 0;
    }
    return with_flag(p.cast_before_weight, [&](auto cast) {
      return with_flag(r.rope.round_each_step, [&](auto each) {
        return with_flag(is_apart(r.rope, p.cols, p.x_dtype), [&](auto apart) {
          side.kernel =
              rope_rows<X, decltype(cast)::value, decltype(each)::value, decltype(apart)::value>;
          return 0;
        });
      });
    });
  });
  return side;
}

bool in_double(const RmsNormRope& p) {
  return is_double(p.norm.x_dtype) || is_double(weight_dtype(p.norm));
}

}  // namespace

int rms_norm_rope_forward(const RmsNormRope* sides, int count, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Device here = device();
  if (here.multiprocessors == 0) return why_no_device();
  double all = 0;
  for (int i = 0; i < count; ++i) all += static_cast<double>(sides[i].norm.rows);
  Side<RopeForwardArgs> planned[kMostSides];
  int ready = 0;
  for (int i = 0; i < count; ++i) {
    if (in_double(sides[i])) {
      const int error = forward_in_double(sides[i], s);
      if (error != 0) return error;
    } else {
      planned[ready++] = side_of(sides[i], static_cast<double>(sides[i].norm.rows) / all, here);
    }
  }
  return launch_sides(planned, ready, s);
}

}  // namespace rmsnorm::cuda
