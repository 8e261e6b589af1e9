// dx and dweight of the norm of q and k and their rotary embedding: dy is rotated back, and then is
// the dy of the norm (backward.cuh).
#include "backward.cuh"
#include "rope.cuh"

namespace rmsnorm::cuda {
namespace {

struct RopeBackwardArgs : BackwardArgs, RopeArgs {
  Place x_place, dy_place;
  bool shares_sums;  // those for dweight are in shared memory until the end
};

// Plain rows: see rope.cuh. kApart: the second form. Partners in other lanes are read from memory.
template <typename X, bool kCast, bool kApart>
ROW_KERNEL(kRopeBackwardRows, false)
rope_backward_rows(const __grid_constant__ Sides<RopeBackwardArgs> sides) {
  sync_dependent_launch();
  using B = Backward<X, float, kCast ? Form::kPlainCast : Form::kPlain>;
  constexpr int kElems = B::kElems;
  __shared__ alignas(8) float slot_sums[kThreads<kRopeBackwardRows> * 2 * kElems];
  const RopeBackwardArgs& a = sides.here();
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
  typename B::WChunk w[2];
  typename B::DWeightChunk dweight[2] = {};
  bool is_first = true;

  for (unsigned first = sides.block() * lanes.slots; first < rows;
       first += a.blocks * lanes.slots, is_first = false) {
    const bool is_there = first + lanes.slot < rows;  // or with those of the last row, for shuffles
    const unsigned row = is_there ? first + lanes.slot : rows - 1;
    const HeadIndex index(a, row);
    const X* const x_row = static_cast<const X*>(a.x.data) + index.offset(a.x_place);
    const X* const dy_row = static_cast<const X*>(a.dy.data) + index.offset(a.dy_place);
    typename B::XChunk x[2] = {}, dy[2] = {}, others[2] = {};
    each_chunk([&](int k, int col, int count) {
      if (count <= 0) return;
      x[k] = load_whole<X, kElems>(x_row, col);
      dy[k] = load_whole<X, kElems>(dy_row, col);
      if (kApart && !a.rope.interleaved && col < 2 * pairs) {
        others[k] = load_whole<X, kElems>(dy_row, col < pairs ? col + pairs : col - pairs);
      }
    });
    const float rstd = a.rstd[row];
    typename B::DYChunk turned_dy[2];
    Angles<kElems> angles;
    if constexpr (kApart) {
      each_chunk([&](int k, int col, int) {
        turned_dy[k] = dy[k].template to<float>();
        if (col >= 2 * pairs) return;
        if (a.rope.interleaved) {
          Angles<kElems / 2> angles;
          angles.template load<true>(a, index, col / 2);
          return angles.template turn_neighbours<Unrounded>(turned_dy[k], true);
        }
        angles.template load<true>(a, index, col < pairs ? col : col - pairs);
        unrolled<kElems / 2>([&](int i) {
          const float2 sin = angles.sin.get(i);
          turned_dy[k].set(i, turned<Unrounded>(dy[k].get(i), others[k].get(i), angles.cos.get(i),
                                                col < pairs ? sin : negative(sin)));
        });
      });
    } else {
      angles.template load<false>(a, index, lane * kElems);
      unrolled<kElems / 2>([&](int i) {
        const float2 left = dy[0].get(i), right = dy[1].get(i);
        const float2 cos = angles.cos.get(i), sin = angles.sin.get(i);
        turned_dy[0].set(i, turned<Unrounded>(left, right, cos, sin));
        turned_dy[1].set(i, turned<Unrounded>(right, left, cos, negative(sin)));
      });
    }
    if (is_first) load_weights<true>(a, 0, each_chunk, w);
    RowStats stats{rstd, 1.0f, 0.0f};
    if (rstd < kMinFastRstd || rstd > kMaxFastRstd) {
      const Scale s = rescued_scale(x_row, a.cols, a.eps, a.lanes);
      stats = {s.hi, s.pre, 0.0f};
    }
    stats.mean = sum_of_group(B::dot(x, turned_dy, w, stats), a.lanes) * a.inv_cols;
    if (!is_there) continue;
    B::with_stats(stats, [&](const RowStats& s) {
      each_chunk([&](int k, int col, int count) {
        B::finish(a, row, 0, col, count, x[k], turned_dy[k], w[k], s, dweight[k]);
      });
    });
  }
  if (!B::wants_sums(a)) return;
  const int row_elems = 2 * a.lanes * kElems;
  each_chunk([&](int k, int col, int) {
    float2* const sums = reinterpret_cast<float2*>(slot_sums + lanes.slot * row_elems + col);
    unrolled<B::kPairs>([&](int i) { sums[i] = dweight[k].get(i); });
  });
  __syncthreads();
  sum_slots(a, sides.block(), slot_sums, row_elems, lanes.slots);
}

// All others, in units (rope.cuh): once for the mean of g * xhat, and once more for the results.
// A thread has the same columns of each row, and adds up those of its slot for dweight.
template <typename X>
ROW_KERNEL(kRopeBackwardAnyRows, false)
rope_backward_any_rows(const __grid_constant__ Sides<RopeBackwardArgs> sides) {
  sync_dependent_launch();
  using B = Backward<X, float, Form::kAny>;
  constexpr int kElems = B::kElems;
  extern __shared__ uint4 kept_sums[];
  const RopeBackwardArgs& a = sides.here();
  const Cluster alone(1);
  const Lanes lanes(a.lanes);
  const BlockRows rows(a, sides.block(), lanes.slots);
  const int64_t weight = rows.weight * a.cols;
  // Of the rows of partial sums, which are [blocks, weights, cols].
  const int64_t weights = a.rows / a.weight_rows;
  const int64_t partial_row = (sides.block() - rows.weight * a.blocks) * weights + rows.weight;
  float* const block_sums =
      a.shares_sums ? reinterpret_cast<float*>(kept_sums) : a.partial + partial_row * a.cols;
  float* const sums = block_sums + lanes.slot * a.cols;
  if (a.partial != nullptr) {
    for (int64_t i = threadIdx.x; i < lanes.slots * a.cols; i += blockDim.x) block_sums[i] = 0;
    __syncthreads();
  }
  const Units<kElems> units{a};
  int turn = 0;
  for (int64_t first = rows.begin; first < rows.end; first += rows.stride, ++turn) {
    const bool is_there = first + lanes.slot < rows.end;
    const int64_t row = is_there ? first + lanes.slot : rows.end - 1;
    const AnyRow place(a, row, a.x, a.x_place, a.dy, a.dy_place);
    // f(column, count, x, dy, weight) for each chunk of the thread.
    const auto visit = [&](const auto& f) {
#pragma unroll 1
      for (int64_t i = lanes.lane; i < units.all; i += a.lanes) {
        const auto unit = units[i];
        const auto dy = [&](int64_t col) {
          return load_floats<kElems>(a.dy, place.right, col, unit.count);
        };
        turn_unit<X, kElems>(
            place, unit, false, true, dy, [&](int64_t col, const Chunk<float, kElems>& d) {
              const auto x = load_at<X, kElems>(a.x, place.left, col, unit.count);
              f(col, unit.count, x, d, load_weight<kElems>(a, weight, col, unit.count));
            });
      }
    };
    RowStats s = B::row_scale(a, row, a.rstd[row], [] {});
    Sum total;
    visit([&](int64_t, int, const auto& x, const auto& dy, const auto& w) {
      const float2 rstd{s.rstd, s.rstd};
      total = total + Sum(tree_sum<B::kPairs>([&](int i) {
                const float2 g = dy.get(i) * w.get(i), xhat = x.get(i) * s.pre * rstd;
                return __fmaf_rn(g.y, xhat.y, __fmul_rn(g.x, xhat.x));
              }));
    });
    float sum = total;
    if (a.lanes > kWarp) {
      row_sum(sum, alone, turn);
    } else {
      sum = sum_of_group(sum, a.lanes);
    }
    s.mean = sum * a.inv_cols;
    if (!is_there) continue;
    visit([&](int64_t col, int count, const auto& x, const auto& dy, const auto& w) {
      Chunk<float, kElems> dx;
      const float2 rstd{s.rstd, s.rstd};
      unrolled<B::kPairs>([&](int i) {
        const float2 d = dy.get(i);
        float2 xhat = x.get(i) * s.pre * rstd;
        dx.set(i, multiply_add(xhat, {-s.mean, -s.mean}, d * w.get(i)) * rstd * s.pre);
        if (a.cast_before_weight) xhat = round_to<X>(xhat);
        if (a.partial == nullptr) return;
        const int at = 2 * i;
        if (at < count) sums[col + at] = __fmaf_rn(d.x, xhat.x, sums[col + at]);
        if (at + 1 < count) sums[col + at + 1] = __fmaf_rn(d.y, xhat.y, sums[col + at + 1]);
      });
      if (a.dx.data != nullptr) store_at<X, kElems>(a.dx, row * a.cols, col, count, dx);
    });
  }
  if (a.partial == nullptr || !a.shares_sums) return;
  __syncthreads();
  sum_slots(a, partial_row, block_sums, static_cast<int>(a.cols), lanes.slots);
}

// How a side is laid out. share: of the machine, of several sides.
struct RopeLayout {
  Plan plan;
  unsigned blocks;  // of a weight: rows of partial sums
  int64_t partial_bytes;

  RopeLayout(const RmsNormRopeBackward& r, bool plain, double share, const Device& here) {
    const RmsNormBackward& p = r.norm;
    const Tuning& tuning = tuning_for(here);
    const KernelLimits& kernel = tuning.limits[plain ? kRopeBackwardRows : kRopeBackwardAnyRows];
    plan = {kernel.kernel, plain ? Keep::kRegisters : Keep::kNowhere};
    plan.vectors = plain ? 2 : 1;
    plan.threads = kernel.threads;
    plan.registers = kernel.registers;
    plan.bytes_in_flight = plain ? kBytesInFlight : 32;
    plan.cluster = 1;
    plan.slice = p.cols;
    const int64_t chunks = ceil_div(p.cols, vector_elems(p.x_dtype));
    if (plain) {
      plan.lanes = plain_lanes(p.cols, p.x_dtype);
    } else {
      plan.lanes = 1;
      while (plan.lanes < chunks && plan.lanes < kWarp) plan.lanes *= 2;
      if (chunks > 4 * kWarp) plan.lanes = kernel.threads;
      const int64_t bytes = plan.threads / plan.lanes * p.cols * int64_t{sizeof(float)};
      constexpr int64_t kMostBytes = 32 << 10;
      if (p.dweight != nullptr && bytes <= kMostBytes) plan.shared_bytes = bytes;
    }
    plan.resident = resident_blocks(plan, here);
    const int64_t groups = ceil_div(p.rows / r.weights, plan.threads / plan.lanes);
    const double limit = static_cast<double>(resident_rows(plan, here)) * share;
    const double least = 2.0 * here.multiprocessors * share;
    const int64_t of_weight = std::max(static_cast<int64_t>(limit / r.weights), int64_t{1});
    const int64_t spread = std::max(ceil_div(groups, tuning.backward_min_rows),
                                    static_cast<int64_t>(least / r.weights));
    blocks = static_cast<unsigned>(even_blocks(groups, std::min(spread, of_weight)));
    plan.blocks = blocks * r.weights;
    const bool sums = p.dweight != nullptr && !(plain && blocks == 1);
    partial_bytes = sums ? blocks * r.weights * p.cols * int64_t{sizeof(float)} : 0;
  }
};

bool in_double(const RmsNormRopeBackward& r) {
  return is_double(r.norm.dy_dtype) || is_double(r.norm.x_dtype) || is_double(weight_dtype(r.norm));
}

bool may_be_plain(const RmsNormRopeBackward& r) {
  const RmsNormBackward& p = r.norm;
  return p.dy_dtype == p.x_dtype && has_plain_rows(p.cols, r.rope.pairs, p.x_dtype) &&
         r.weights == 1 && r.heads_per_row == 1;
}

// Of the workspace: enough for both ways, since the pointers may not be known yet.
int64_t side_bytes(const RmsNormRopeBackward& r, double share, const Device& here) {
  int64_t bytes;
  if (in_double(r)) {
    bytes = backward_in_double_workspace(r.norm);
  } else {
    bytes = RopeLayout(r, false, share, here).partial_bytes;
    if (may_be_plain(r)) {
      bytes = std::max(bytes, RopeLayout(r, true, share, here).partial_bytes);
    }
  }
  return ceil_div(bytes, 64) * 64;
}

double share_of(const RmsNormRopeBackward* sides, int count, int i) {
  double all = 0;
  for (int j = 0; j < count; ++j) all += static_cast<double>(sides[j].norm.rows);
  return static_cast<double>(sides[i].norm.rows) / all;
}

Side<RopeBackwardArgs> side_of(const RmsNormRopeBackward& r, double share, void* workspace,
                               const Device& here, PartialSums& sums) {
  const RmsNormBackward& p = r.norm;
  Side<RopeBackwardArgs> side{nullptr, {BackwardArgs{row_args(p)}, rope_args(r)}};
  RopeBackwardArgs& a = side.args;
  a.dy = view_of(p, p.dy, p.dy_dtype, p.dy_rows);
  a.dx = view_of(p, p.dx, p.x_dtype, Rows{1, {}, {p.cols}});
  a.rstd = static_cast<const float*>(p.rstd);
  a.inv_cols = static_cast<float>(1.0 / static_cast<double>(p.cols));
  align_weights(a, r);

  const Rows* const rows[] = {&p.x_rows, &p.dy_rows};
  Place* const places[] = {&a.x_place, &a.dy_place};
  place_rows(a, r, rows, places);
  const bool plain = may_be_plain(r) && is_plain(r, a) && a.x.aligned && a.dy.aligned &&
                     a.dx.aligned && a.weight.aligned;
  const RopeLayout layout(r, plain, share, here);
  side.plan = layout.plan;
  lay_out(a, layout.plan);
  a.blocks = layout.blocks;
  a.shares_sums = layout.plan.shared_bytes > 0;
  sums = {};
  if (layout.partial_bytes > 0) {
    a.partial = static_cast<float*>(workspace);
    sums = {a.partial, layout.blocks, r.weights * p.cols, p.dweight, p.w_dtype};
  } else if (p.dweight != nullptr) {
    a.dweight = view_of(p, p.dweight, p.w_dtype, Rows{1, {}, {0}});
  }
  with_type(p.x_dtype, [&](auto x) {
    using X = decltype(x);
    if (!plain) {
      side.kernel = rope_backward_any_rows<X>;
      return 0;
    }
    return with_flag(p.cast_before_weight, [&](auto cast) {
      return with_flag(is_apart(r.rope, p.cols, p.x_dtype), [&](auto apart) {
        side.kernel = rope_backward_rows<X, decltype(cast)::value, decltype(apart)::value>;
        return 0;
      });
    });
  });
  return side;
}

}  // namespace

int64_t rms_norm_rope_backward_workspace(const RmsNormRopeBackward* sides, int count) {
  const Device here = device();
  if (here.multiprocessors == 0) return 0;
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i) {
    bytes += side_bytes(sides[i], share_of(sides, count, i), here);
  }
  return bytes;
}

int rms_norm_rope_backward(const RmsNormRopeBackward* sides, int count, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const Device here = device();
  if (here.multiprocessors == 0) return why_no_device();
  char* workspace = static_cast<char*>(sides[0].norm.workspace);
  Side<RopeBackwardArgs> planned[kMostSides];
  PartialSums sums[kMostSides];
  int ready = 0, summed = 0;
  for (int i = 0; i < count; ++i) {
    const double share = share_of(sides, count, i);
    const int64_t bytes = side_bytes(sides[i], share, here);
    void* const own = bytes > 0 ? workspace : nullptr;
    workspace += bytes;
    if (in_double(sides[i])) {
      RmsNormRopeBackward r = sides[i];
      r.norm.workspace = own;
      const int error = backward_in_double(r, s);
      if (error != 0) return error;
    } else {
      planned[ready++] = side_of(sides[i], share, own, here, sums[summed]);
      if (sums[summed].partial != nullptr) ++summed;
    }
  }
  const int error = launch_sides(planned, ready, s);
  if (error != 0 || summed == 0) return error;
  return sum_partials(sums, summed, s);
}

}  // namespace rmsnorm::cuda
