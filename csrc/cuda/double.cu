// Everything in double, for any dtypes: taken where one of them is double. One warp per row,
// element by element: speed is no concern here.
#include "launch.h"
#include "reduce.cuh"

namespace rmsnorm::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxBlocks = 1 << 16;

// A warp, or a thread, for each of so many items.
Plan plan_items(const char* kernel, int64_t items, int lanes) {
  Plan plan{kernel, Keep::kNowhere};
  plan.lanes = lanes;
  plan.threads = kThreads;
  plan.cluster = 1;
  plan.blocks = std::min(ceil_div(items, kThreads / lanes), kMaxBlocks);
  return plan;
}

__device__ inline int64_t first_item() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
__device__ inline int64_t items_apart() { return int64_t{gridDim.x} * blockDim.y; }

template <typename P>
__device__ double weight_at(const P& p, int64_t col) {
  if (p.weight == nullptr) return 1;
  return load_any(p.weight, p.w_dtype, col) + addend_of(p.weight_offset);
}

// What the kernels have in common with rotary embedding and without.
__device__ const RmsNormBackward& norm_of(const RmsNormBackward& p) { return p; }
__device__ const RmsNormBackward& norm_of(const RmsNormRopeBackward& p) { return p.norm; }
RMSNORM_HOST_DEVICE int64_t weights_of(const RmsNormBackward&) { return 1; }
template <typename P>
RMSNORM_HOST_DEVICE int64_t weights_of(const P& rope) {
  return rope.weights;
}

// Where a row's weight begins.
template <typename P>
__device__ int64_t weight_begin(const P& p, int64_t rows, int64_t cols, int64_t row) {
  return weights_of(p) > 1 ? row / (rows / weights_of(p)) * cols : 0;
}

// Column `col` of a row with rotary embedding: f(its pair, the column's partner, is it the second?)
// or, of one that is not rotated, rest().
template <typename P, typename F, typename Rest>
__device__ double of_pair(const P& p, int64_t col, const F& f, const Rest& rest) {
  const Rope& r = p.rope;
  const int64_t in_head = col % (p.norm.cols / p.heads_per_row);
  if (in_head >= 2 * r.pairs) return rest();
  const bool second = r.interleaved ? in_head % 2 : in_head >= r.pairs;
  const int64_t pair = r.interleaved ? in_head / 2 : in_head - (second ? r.pairs : 0);
  const int64_t apart = r.interleaved ? 1 : r.pairs;
  return f(pair, second ? col - apart : col + apart, second);
}

struct Angle {
  double cos, sin;
};
// narrow: all is rounded to a narrower type, to which fp64 comes by way of fp32.
template <typename P>
__device__ Angle angle_of(const P& p, int64_t row, int64_t pair, bool narrow) {
  const Rope& r = p.rope;
  const int64_t token = p.rows_per_token > 1 ? row / p.rows_per_token : row % r.tokens;
  const int axis = r.axis_count == 1 ? 0 : r.axes[pair];
  const int64_t first = r.positions ? r.positions[axis * r.tokens + token] * r.angle_rows.stride[0]
                                    : row_offset(r.angle_rows, token) + axis * r.axis_stride;
  const auto load = [&](const void* table) {
    const double v = load_any(table, r.dtype, first + pair);
    return narrow ? static_cast<float>(v) : v;
  };
  return {load(r.cos), load(r.sin)};
}

struct Normalized {
  double r, pre;  // 1 / sqrt(mean(x^2) + eps) = r * pre
  __device__ double operator()(double x) const { return x * pre * r; }
};

// Of the elements that load(i) gives.
template <typename Load>
__device__ Normalized normalize_by(const Load& load, int64_t cols, double eps) {
  const DoubleScale s = double_scale(load, cols, {eps, sqrt(eps), double(cols)}, kWarp);
  const int pre = s.exponent > 0 ? s.exponent : min(0, s.exponent + 900);  // as in rescued_scale
  return {s.r * pow2(s.exponent - pre), pow2(pre)};
}
template <typename P>
__device__ Normalized normalize(const P& p, int64_t x_offset) {
  const auto load = [&](int64_t i) { return load_any(p.x, p.x_dtype, x_offset + i); };
  return normalize_by(load, p.cols, p.eps);
}

// A row of x before it is formed, and rounded.
struct RowOfSum {
  const RmsNormForward& p;
  const int64_t input, residual;

  __device__ RowOfSum(const RmsNormForward& p, int64_t row)
      : p(p),
        input(row_offset(p.addends.input_rows, row)),
        residual(row_offset(p.addends.residual_rows, row)) {}

  __device__ double operator[](int64_t col) const {
    return with(load_any(p.addends.input, p.addends.input_dtype, input + col), col);
  }
  // Of the input's element.
  __device__ double with(double left, int64_t col) const {
    const Addends& a = p.addends;
    const double right = load_any(a.residual, p.x_dtype, residual + col);
    if (is_double(a.input_dtype) || is_double(p.x_dtype)) return __dadd_rn(left, right);
    return double{static_cast<float>(left) + static_cast<float>(right)};
  }
};

__device__ void store_rstd(const RmsNormForward& p, int64_t row, const Normalized& normalized) {
  if (p.rstd == nullptr || threadIdx.x != 0) return;
  store_any(p.rstd, is_double(p.x_dtype) ? DType::kFloat64 : DType::kFloat32, row,
            normalized.r * normalized.pre);
}

// The norm of x, in column col, before it is rounded to y_dtype.
__device__ double norm_of(const RmsNormForward& p, const Normalized& normalized, double x,
                          int64_t col) {
  double n = normalized(x);
  if (p.cast_before_weight) n = round_any(p.x_dtype, n);
  n *= weight_at(p, col);
  // The norm of a sum in fp32 is in fp32 before it takes input's dtype.
  const bool by_way_of_fp32 = p.x_dtype == DType::kFloat32 && !is_double(p.y_dtype);
  return by_way_of_fp32 ? static_cast<float>(n) : n;
}

__global__ void forward_double(const __grid_constant__ RmsNormForward p) {
  sync_dependent_launch();
  for (int64_t row = first_item(); row < p.rows; row += items_apart()) {
    const int64_t x_offset = row_offset(p.x_rows, row), y_offset = row_offset(p.y_rows, row);
    const bool unrounded = is_unrounded(p);
    const auto element = [&](int64_t i) {
      return unrounded ? RowOfSum(p, row)[i] : load_any(p.x, p.x_dtype, x_offset + i);
    };
    const Normalized normalized = normalize_by(element, p.cols, p.eps);
    store_rstd(p, row, normalized);
    __syncwarp();  // all of x is read before y, which may be x, is written
    for (int64_t col = threadIdx.x; col < p.cols; col += kWarp) {
      const double x = element(col), y = norm_of(p, normalized, x, col);
      if (unrounded) store_any(const_cast<void*>(p.x), p.x_dtype, x_offset + col, x);
      store_any(p.y, p.y_dtype, y_offset + col, y);
    }
  }
}

__global__ void sandwich_forward_double(const __grid_constant__ RmsNormSandwich p) {
  sync_dependent_launch();
  const RmsNormForward &norm = p.norm, &next = p.next;
  for (int64_t row = first_item(); row < norm.rows; row += items_apart()) {
    const int64_t x_offset = row_offset(norm.x_rows, row), offset = row_offset(next.x_rows, row);
    const RowOfSum sum(next, row);
    const Normalized normalized = normalize(norm, x_offset);
    store_rstd(norm, row, normalized);
    __syncwarp();
    for (int64_t col = threadIdx.x; col < norm.cols; col += kWarp) {
      const double x = load_any(norm.x, norm.x_dtype, x_offset + col);
      const double n = round_any(norm.y_dtype, norm_of(norm, normalized, x, col));
      double v = round_any(next.x_dtype, sum.with(n, col));
      if (p.scale != 1) {
        v = is_double(next.x_dtype) ? v * p.scale
                                    : double{static_cast<float>(v) * static_cast<float>(p.scale)};
      }
      store_any(const_cast<void*>(next.x), next.x_dtype, offset + col, v);
    }
    if (next.y == nullptr) continue;
    __syncwarp();
    const Normalized of_sum = normalize(next, offset);
    store_rstd(next, row, of_sum);
    const int64_t y_offset = row_offset(next.y_rows, row);
    for (int64_t col = threadIdx.x; col < norm.cols; col += kWarp) {
      const double v = load_any(next.x, next.x_dtype, offset + col);
      store_any(next.y, next.y_dtype, y_offset + col, norm_of(next, of_sum, v, col));
    }
  }
}

// The same, and then the rotary embedding. The lane of a pair's first column has the pair.
__global__ void rope_forward_double(const __grid_constant__ RmsNormRope r) {
  sync_dependent_launch();
  const RmsNormForward& p = r.norm;
  const bool each = r.rope.round_each_step;
  const auto rounded = [&](DType to, double v) { return each ? round_any(to, v) : v; };
  const auto step = [&](double v) { return rounded(r.rope.step_dtype(p.y_dtype), v); };
  for (int64_t row = first_item(); row < p.rows; row += items_apart()) {
    const int64_t x_offset = row_offset(p.x_rows, row), y_offset = row_offset(p.y_rows, row);
    const int64_t weight = weight_begin(r, p.rows, p.cols, row);
    const Normalized normalized = normalize(p, x_offset);
    store_rstd(p, row, normalized);
    const auto norm = [&](int64_t col) {
      double n = normalized(load_any(p.x, p.x_dtype, x_offset + col));
      if (p.cast_before_weight) n = round_any(p.x_dtype, n);
      return rounded(p.y_dtype, n * weight_at(p, weight + col));
    };
    __syncwarp();
    for (int64_t col = threadIdx.x; col < p.cols; col += kWarp) {
      const auto store = [&](int64_t at, double v) {
        store_any(p.y, p.y_dtype, y_offset + at, v);
        return v;
      };
      const auto turn = [&](int64_t pair, int64_t partner, bool second) {
        if (second) return 0.0;
        const Angle angle = angle_of(r, row, pair, each && p.y_dtype != DType::kFloat64);
        const double a = norm(col), b = norm(partner);
        const auto product = [&](double v, double w) { return step(__dmul_rn(v, w)); };
        store(col, step(__dsub_rn(product(a, angle.cos), product(b, angle.sin))));
        return store(partner, step(__dadd_rn(product(b, angle.cos), product(a, angle.sin))));
      };
      of_pair(r, col, turn, [&] { return store(col, norm(col)); });
    }
  }
}

// x as the sum of its addends.
__global__ void add_rows(const __grid_constant__ RmsNormForward p) {
  sync_dependent_launch();
  for (int64_t row = first_item(); row < p.rows; row += items_apart()) {
    const RowOfSum sum(p, row);
    const int64_t x = row_offset(p.x_rows, row);
    for (int64_t col = threadIdx.x; col < p.cols; col += kWarp) {
      store_any(const_cast<void*>(p.x), p.x_dtype, x + col, sum[col]);
    }
  }
}

// dy, or what it was before the rotary embedding.
__device__ double gradient(const RmsNormBackward& p, int64_t, int64_t dy_offset, int64_t col) {
  return load_any(p.dy, p.dy_dtype, dy_offset + col);
}
__device__ double gradient(const RmsNormRopeBackward& p, int64_t row, int64_t dy_offset,
                           int64_t col) {
  const auto dy = [&](int64_t at) { return gradient(p.norm, row, dy_offset, at); };
  const auto turn = [&](int64_t pair, int64_t partner, bool second) {
    const Angle angle = angle_of(p, row, pair, false);
    return dy(col) * angle.cos + (second ? -dy(partner) : dy(partner)) * angle.sin;
  };
  return of_pair(p, col, turn, [&] { return dy(col); });
}

// dx, and what the sums over columns need of each row: the workspace, if there is one.
template <typename P>
__global__ void backward_double(const __grid_constant__ P all) {
  sync_dependent_launch();
  const RmsNormBackward& p = norm_of(all);
  const int lane = threadIdx.x;
  for (int64_t row = first_item(); row < p.rows; row += items_apart()) {
    const int64_t x_offset = row_offset(p.x_rows, row), dy_offset = row_offset(p.dy_rows, row);
    const int64_t weight = weight_begin(all, p.rows, p.cols, row);
    const Normalized normalized = normalize(p, x_offset);
    if (p.workspace != nullptr && lane == 0)
      static_cast<Normalized*>(p.workspace)[row] = normalized;
    if (p.dx == nullptr) continue;
    const auto xhat = [&](int64_t col) {
      return normalized(load_any(p.x, p.x_dtype, x_offset + col));
    };
    const auto g = [&](int64_t col) {
      return gradient(all, row, dy_offset, col) * weight_at(p, weight + col);
    };
    DoubleSum products;
    for (int64_t col = lane; col < p.cols; col += kWarp) products.add(g(col), xhat(col));
    double sum = products.sum;
    for (int o = kWarp / 2; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    const double mean = sum / p.cols;
    for (int64_t col = lane; col < p.cols; col += kWarp) {
      double dx = normalized(g(col) - xhat(col) * mean);
      if (p.dresidual != nullptr)
        dx += load_any(p.dresidual, p.x_dtype, row_offset(p.dresidual_rows, row) + col);
      store_any(p.dx, p.x_dtype, row * p.cols + col, dx);
    }
  }
}

// A thread for each column of each weight.
template <typename P>
__global__ void dweight_double(const __grid_constant__ P all) {
  sync_dependent_launch();
  const RmsNormBackward& p = norm_of(all);
  const int64_t rows = p.rows / weights_of(all);
  for (int64_t item = first_item(); item < weights_of(all) * p.cols; item += items_apart()) {
    const int64_t begin = item / p.cols * rows, col = item % p.cols;
    DoubleSum products;
    for (int64_t row = begin; row < begin + rows; ++row) {
      double xhat = static_cast<const Normalized*>(p.workspace)[row](
          load_any(p.x, p.x_dtype, row_offset(p.x_rows, row) + col));
      if (p.cast_before_weight) xhat = round_any(p.x_dtype, xhat);
      products.add(gradient(all, row, row_offset(p.dy_rows, row), col), xhat);
    }
    store_any(p.dweight, p.w_dtype, item, products.sum);
  }
}

__device__ DType promotion(DType a, DType b) {
  if (a == b) return a;
  const bool wide = a == DType::kFloat64 || b == DType::kFloat64;
  return wide ? DType::kFloat64 : DType::kFloat32;
}

// A group of a row, and its gate.
template <typename P>
struct GatedRow {
  const P& p;
  const int64_t row, cols, group, begin, x, gate;

  // item: of all groups, [groups, rows].
  __device__ GatedRow(const P& p, int64_t item)
      : GatedRow(p, item % p.norm.rows, item / p.norm.rows) {}
  __device__ GatedRow(const P& p, int64_t row, int64_t group)
      : p(p),
        row(row),
        cols(p.norm.cols / p.groups),
        group(group),
        begin(group * cols),
        x(begin + row_offset(p.norm.x_rows, row)),
        gate(p.gate.data != nullptr ? begin + row_offset(p.gate.rows, row) : 0) {}

  struct Activated {
    double value, slope;
  };
  __device__ Activated activated(int64_t col) const {
    if (p.gate.data == nullptr) return {1, 0};
    const double g = load_any(p.gate.data, p.gate.dtype, gate + col);
    const double e = exp(-fabs(g)), sum = 1 + e;
    const double over = g < 0 ? e : 1, rest = (g < 0 ? 1 : e) / sum, sigmoid = over / sum;
    if (p.gate.activation == Activation::kSigmoid) return {sigmoid, sigmoid * rest};
    return {g * over / sum, sigmoid * fma(g, rest, 1.0)};
  }
  __device__ bool before_norm() const { return p.gate.data != nullptr && p.gate.before_norm; }
  __device__ double x_at(int64_t col) const { return load_any(p.norm.x, p.norm.x_dtype, x + col); }
  // What is normalized.
  __device__ double operator()(int64_t col) const {
    return before_norm() ? x_at(col) * activated(col).value : x_at(col);
  }
  __device__ double weight(int64_t col) const { return weight_at(p.norm, begin + col); }
  __device__ Normalized normalized() const { return normalize_by(*this, cols, p.norm.eps); }

  // The product of the norm, an xhat, and the weight, rounded as the forward does.
  __device__ bool cast() const { return p.norm.cast_before_weight && p.norm.weight != nullptr; }
  __device__ double seen(double xhat) const {
    return cast() ? round_any(p.norm.x_dtype, xhat) : xhat;
  }
  __device__ double product(double xhat, int64_t col) const {
    const DType promoted = promotion(p.norm.x_dtype, p.norm.w_dtype);
    const double result = seen(xhat) * weight(col);
    return cast() ? round_any(promoted, result) : result;
  }
};

__global__ void gated_forward_double(const __grid_constant__ RmsNormGated p) {
  sync_dependent_launch();
  const int lane = threadIdx.x;
  const RmsNormForward& norm = p.norm;
  for (int64_t item = first_item(); item < norm.rows * p.groups; item += items_apart()) {
    const GatedRow<RmsNormGated> row(p, item);
    const int64_t y = row.begin + row_offset(norm.y_rows, row.row);
    const Normalized normalized = row.normalized();
    if (norm.rstd != nullptr && lane == 0) {
      const bool wide = norm.x_dtype == DType::kFloat64 || p.gate.before_norm;
      store_any(norm.rstd, wide ? DType::kFloat64 : DType::kFloat32, item,
                normalized.r * normalized.pre);
    }
    __syncwarp();  // all of x is read before y, which may be x, is written
    for (int64_t col = lane; col < row.cols; col += kWarp) {
      double n = row.product(normalized(row(col)), col);
      if (!row.before_norm()) n *= row.activated(col).value;
      store_any(norm.y, norm.y_dtype, y + col, n);
    }
  }
}

// dx and dgate, and what the sums over columns need of each row: the workspace, if there is one.
__global__ void gated_backward_double(const __grid_constant__ RmsNormGatedBackward p) {
  sync_dependent_launch();
  const int lane = threadIdx.x;
  const RmsNormBackward& norm = p.norm;
  for (int64_t item = first_item(); item < norm.rows * p.groups; item += items_apart()) {
    const GatedRow<RmsNormGatedBackward> row(p, item);
    const int64_t dy_begin = row.begin + row_offset(norm.dy_rows, row.row);
    const int64_t result = row.begin + row.row * norm.cols;
    const Normalized normalized = row.normalized();
    if (norm.workspace != nullptr && lane == 0) {
      static_cast<Normalized*>(norm.workspace)[item] = normalized;
    }
    const auto dy = [&](int64_t col) { return load_any(norm.dy, norm.dy_dtype, dy_begin + col); };
    const auto g = [&](int64_t col) {
      return dy(col) * row.weight(col) * (row.before_norm() ? 1 : row.activated(col).value);
    };
    DoubleSum products;
    for (int64_t col = lane; col < row.cols; col += kWarp) {
      products.add(g(col), normalized(row(col)));
    }
    double sum = products.sum;
    for (int o = kWarp / 2; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    const double mean = sum / row.cols;
    for (int64_t col = lane; col < row.cols; col += kWarp) {
      const double xhat = normalized(row(col)), dv = normalized(g(col) - xhat * mean);
      const auto activated = row.activated(col);
      const bool before = row.before_norm();
      if (norm.dx != nullptr) {
        store_any(norm.dx, norm.x_dtype, result + col, before ? dv * activated.value : dv);
      }
      if (p.dgate != nullptr && p.gate.data != nullptr) {
        const double upstream = before ? dv * row.x_at(col) : dy(col) * row.product(xhat, col);
        store_any(p.dgate, p.gate.dtype, result + col, upstream * activated.slope);
      }
    }
  }
}

// A thread for each column.
__global__ void gated_dweight_double(const __grid_constant__ RmsNormGatedBackward p) {
  sync_dependent_launch();
  const RmsNormBackward& norm = p.norm;
  for (int64_t item = first_item(); item < norm.cols; item += items_apart()) {
    const int64_t cols = norm.cols / p.groups, group = item / cols, col = item % cols;
    DoubleSum products;
    for (int64_t i = 0; i < norm.rows; ++i) {
      const GatedRow<RmsNormGatedBackward> row(p, i, group);
      const double xhat =
          static_cast<const Normalized*>(norm.workspace)[group * norm.rows + i](row(col));
      const double dy = load_any(norm.dy, norm.dy_dtype, item + row_offset(norm.dy_rows, i));
      if (row.before_norm()) {
        products.add(dy, xhat);
      } else {
        products.add(dy * row.activated(col).value, row.seen(xhat));
      }
    }
    store_any(norm.dweight, norm.w_dtype, item, products.sum);
  }
}

}  // namespace

int add_any(const RmsNormForward& p, cudaStream_t stream) {
  return launch(add_rows, plan_items("add_rows", p.rows, kWarp), p, stream);
}

int forward_in_double(const RmsNormForward& p, cudaStream_t stream) {
  return launch(forward_double, plan_items("forward_double", p.rows, kWarp), p, stream);
}

int forward_in_double(const RmsNormSandwich& p, cudaStream_t stream) {
  const Plan plan = plan_items("sandwich_forward_double", p.norm.rows, kWarp);
  return launch(sandwich_forward_double, plan, p, stream);
}

int forward_in_double(const RmsNormRope& p, cudaStream_t stream) {
  return launch(rope_forward_double, plan_items("rope_forward_double", p.norm.rows, kWarp), p,
                stream);
}

int64_t backward_in_double_workspace(const RmsNormBackward& p) {
  return p.dweight != nullptr ? p.rows * static_cast<int64_t>(sizeof(Normalized)) : 0;
}

namespace {

template <typename P>
int launch_backward(const P& all, const RmsNormBackward& p, cudaStream_t stream) {
  const int error =
      launch(backward_double<P>, plan_items("backward_double", p.rows, kWarp), all, stream);
  if (error != 0 || p.dweight == nullptr) return error;
  const int64_t sums = weights_of(all) * p.cols;
  return launch(dweight_double<P>, plan_items("dweight_double", sums, 1), all, stream);
}

}  // namespace

int backward_in_double(const RmsNormBackward& p, cudaStream_t stream) {
  return launch_backward(p, p, stream);
}

int backward_in_double(const RmsNormRopeBackward& p, cudaStream_t stream) {
  return launch_backward(p, p.norm, stream);
}

int forward_in_double(const RmsNormGated& p, cudaStream_t stream) {
  const Plan plan = plan_items("gated_forward_double", p.norm.rows * p.groups, kWarp);
  return launch(gated_forward_double, plan, p, stream);
}

int64_t backward_in_double_workspace(const RmsNormGatedBackward& p) {
  return p.groups * backward_in_double_workspace(p.norm);
}

int backward_in_double(const RmsNormGatedBackward& p, cudaStream_t stream) {
  const Plan plan = plan_items("gated_backward_double", p.norm.rows * p.groups, kWarp);
  const int error = launch(gated_backward_double, plan, p, stream);
  if (error != 0 || p.norm.dweight == nullptr) return error;
  return launch(gated_dweight_double, plan_items("gated_dweight_double", p.norm.cols, 1), p,
                stream);
}

}  // namespace rmsnorm::cuda
