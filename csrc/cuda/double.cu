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

struct Normalized {
  double r, pre;  // 1 / sqrt(mean(x^2) + eps) = r * pre
  __device__ double operator()(double x) const { return x * pre * r; }
};

template <typename P>
__device__ Normalized normalize(const P& p, int64_t x_offset) {
  const DoubleScale s =
      double_scale([&](int64_t i) { return load_any(p.x, p.x_dtype, x_offset + i); }, p.cols,
                   {p.eps, sqrt(p.eps), double(p.cols)}, kWarp);
  const int pre = s.exponent > 0 ? s.exponent : min(0, s.exponent + 900);  // as in rescued_scale
  return {s.r * pow2(s.exponent - pre), pow2(pre)};
}

__global__ void forward_double(const __grid_constant__ RmsNormForward p) {
  sync_dependent_launch();
  const int lane = threadIdx.x;
  for (int64_t row = first_item(); row < p.rows; row += items_apart()) {
    const int64_t x_offset = row_offset(p.x_rows, row), y_offset = row_offset(p.y_rows, row);
    const Normalized normalized = normalize(p, x_offset);
    if (p.rstd != nullptr && lane == 0) {
      store_any(p.rstd, p.x_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32, row,
                normalized.r * normalized.pre);
    }
    __syncwarp();  // all of x is read before y, which may be x, is written
    for (int64_t col = lane; col < p.cols; col += kWarp) {
      double n = normalized(load_any(p.x, p.x_dtype, x_offset + col));
      if (p.cast_before_weight) n = round_any(p.x_dtype, n);
      n *= weight_at(p, col);
      // The norm of a sum in fp32 is in fp32 before it takes input's dtype.
      if (p.x_dtype == DType::kFloat32 && p.y_dtype != DType::kFloat64) n = static_cast<float>(n);
      store_any(p.y, p.y_dtype, y_offset + col, n);
    }
  }
}

// x as the sum of its addends.
__global__ void add_rows(const __grid_constant__ RmsNormForward p) {
  sync_dependent_launch();
  const Addends& a = p.addends;
  const bool in_double = a.input_dtype == DType::kFloat64 || p.x_dtype == DType::kFloat64;
  const int lane = threadIdx.x;
  for (int64_t row = first_item(); row < p.rows; row += items_apart()) {
    const int64_t input = row_offset(a.input_rows, row),
                  residual = row_offset(a.residual_rows, row);
    const int64_t x = row_offset(p.x_rows, row);
    for (int64_t col = lane; col < p.cols; col += kWarp) {
      const double left = load_any(a.input, a.input_dtype, input + col);
      const double right = load_any(a.residual, p.x_dtype, residual + col);
      const double sum =
          in_double ? left + right : double{static_cast<float>(left) + static_cast<float>(right)};
      store_any(const_cast<void*>(p.x), p.x_dtype, x + col, sum);
    }
  }
}

// dx, and what the sums over columns need of each row: the workspace, if there is one.
__global__ void backward_double(const __grid_constant__ RmsNormBackward p) {
  sync_dependent_launch();
  const int lane = threadIdx.x;
  for (int64_t row = first_item(); row < p.rows; row += items_apart()) {
    const int64_t x_offset = row_offset(p.x_rows, row), dy_offset = row_offset(p.dy_rows, row);
    const Normalized normalized = normalize(p, x_offset);
    if (p.workspace != nullptr && lane == 0)
      static_cast<Normalized*>(p.workspace)[row] = normalized;
    if (p.dx == nullptr) continue;
    const auto xhat = [&](int64_t col) {
      return normalized(load_any(p.x, p.x_dtype, x_offset + col));
    };
    const auto g = [&](int64_t col) {
      return load_any(p.dy, p.dy_dtype, dy_offset + col) * weight_at(p, col);
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

__global__ void dweight_double(const __grid_constant__ RmsNormBackward p) {
  sync_dependent_launch();
  for (int64_t col = first_item(); col < p.cols; col += items_apart()) {
    DoubleSum products;
    for (int64_t row = 0; row < p.rows; ++row) {
      double xhat = static_cast<const Normalized*>(p.workspace)[row](
          load_any(p.x, p.x_dtype, row_offset(p.x_rows, row) + col));
      if (p.cast_before_weight) xhat = round_any(p.x_dtype, xhat);
      products.add(load_any(p.dy, p.dy_dtype, row_offset(p.dy_rows, row) + col), xhat);
    }
    store_any(p.dweight, p.w_dtype, col, products.sum);
  }
}

}  // namespace

int add_any(const RmsNormForward& p, cudaStream_t stream) {
  return launch(add_rows, plan_items("add_rows", p.rows, kWarp), p, stream);
}

int forward_in_double(const RmsNormForward& p, cudaStream_t stream) {
  return launch(forward_double, plan_items("forward_double", p.rows, kWarp), p, stream);
}

int64_t backward_in_double_workspace(const RmsNormBackward& p) {
  return p.dweight != nullptr ? p.rows * static_cast<int64_t>(sizeof(Normalized)) : 0;
}

int backward_in_double(const RmsNormBackward& p, cudaStream_t stream) {
  const int error =
      launch(backward_double, plan_items("backward_double", p.rows, kWarp), p, stream);
  if (error != 0 || p.dweight == nullptr) return error;
  return launch(dweight_double, plan_items("dweight_double", p.cols, 1), p, stream);
}

}  // namespace rmsnorm::cuda
