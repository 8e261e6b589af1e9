// The CUDA kernels against the formula in long double, without torch and without Python: one shape
// or more of every kernel but those with rotary embedding. For a GPU, and compute-sanitizer:
//   nvcc -std=c++17 -O3 -lineinfo -arch=native '-DRMSNORM_CUDA_ARCHS="native"'
//   tests/native/cuda_check.cpp csrc/cuda/*.cu -o cuda_check
//   ./cuda_check && compute-sanitizer --tool racecheck ./cuda_check
// For a simulator of the runtime: -cudart shared, and the library of cuda_check.py for
// csrc/cuda/*.cu. More dtypes, lengths and layouts, and rotary embedding, are in cuda_check.py.
#include <cuda_runtime.h>

#include "check.h"

namespace {

void expect(int error, const char* what) {
  if (error == 0) return;
  std::printf("%s: %s\n", what, cuda::error_string(error));
  std::exit(2);
}

// A tensor with its guard zones on the device, and nothing behind them.
class OnDevice {
 public:
  explicit OnDevice(Tensor& t) : tensor_(t) {
    expect(cudaMalloc(&memory_, t.bytes.size()), "cudaMalloc");
    expect(cudaMemcpy(memory_, t.bytes.data(), t.bytes.size(), cudaMemcpyHostToDevice),
           "cudaMemcpy");
  }
  ~OnDevice() { cudaFree(memory_); }
  OnDevice(const OnDevice&) = delete;

  void* data() const { return static_cast<char*>(memory_) + tensor_.origin; }
  void fetch() {
    expect(cudaMemcpy(tensor_.bytes.data(), memory_, tensor_.bytes.size(), cudaMemcpyDeviceToHost),
           "cudaMemcpy");
  }

 private:
  Tensor& tensor_;
  void* memory_ = nullptr;
};

void run_forward(const Forward& f, Tensor& x, Tensor& w, Tensor& y, Tensor* r) {
  OnDevice x_there(x), w_there(w);
  std::vector<std::unique_ptr<OnDevice>> outputs;
  RmsNormForward p = params(f, x, w, y, nullptr);
  p.x = x_there.data();
  if (f.weighted) p.weight = w_there.data();
  if (&y == &x) {
    p.y = x_there.data();
  } else {
    p.y = outputs.emplace_back(new OnDevice(y))->data();
  }
  if (r) p.rstd = outputs.emplace_back(new OnDevice(*r))->data();
  expect(cuda::rms_norm_forward(p, nullptr), "rms_norm_forward");
  expect(cudaDeviceSynchronize(), "rms_norm_forward");
  if (&y == &x) x_there.fetch();
  for (const auto& output : outputs) output->fetch();
}

void check_forward(const Forward& f, int64_t rows, int64_t cols, Layout layout) {
  Tensor x(f.x_type, rows, cols, layout), w(f.w_type, 1, cols);
  Tensor y(f.y_type(), rows, cols, layout, kGuard),
      r(f.rstd_type(), 1, rows, Layout::kDense, kGuard);
  fill_normal(x);
  if (rows > 1)
    x.set(1, cols / 2, 1e30L);  // a row that fp32 cannot sum, if the format has that number
  fill_normal(w, 0.5, f.offset != 0 ? 0 : 1);
  run_forward(f, x, w, y, &r);
  const std::string name =
      "forward " + f.name() + " " + std::to_string(rows) + "x" + std::to_string(cols);
  // rstd of 16-bit rows comes of plain fp32 sums: see Total in reduce.cuh.
  compare_forward(f, x, w, y, r, name.c_str(), f.x_type == DType::kFloat32 ? 1 : 4);

  Tensor one(f.x_type, 1, cols), y_of_one(f.y_type(), 1, cols, Layout::kDense, kGuard);
  fill(one, [&](int64_t, int64_t col) { return x.get(rows - 1, col); });
  run_forward(f, one, w, y_of_one, nullptr);
  check(!std::memcmp(y_of_one.at(0, 0), y.at(rows - 1, 0), cols * format(y.dtype).bytes),
        "%s: one row alone has other bits", name.c_str());
  if (f.y_type() != f.x_type) return;
  run_forward(f, x, w, x, nullptr);
  check(x.same_bits(y), "%s: in place", name.c_str());
}

void check_fused(Fused fused, bool unrounded = false) {
  if (!unrounded && fused.input.dtype != DType::kFloat64) check_fused(fused, true);
  fused.unrounded = unrounded;
  Tensor norm(fused.f.y_type(), fused.sum.rows, fused.sum.cols);
  run_forward(fused.f, fused.sum, fused.w, norm, nullptr);
  RmsNormForward p = fused.params();
  OnDevice input(fused.input), residual(fused.residual), w(fused.w), x(fused.x), y(fused.y);
  OnDevice rstd(fused.rstd);
  if (p.weight) p.weight = w.data();
  if (p.rstd) p.rstd = rstd.data();
  p.addends.input = input.data(), p.addends.residual = residual.data();
  p.x = fused.in_place ? residual.data() : x.data();
  p.y = &fused.y_there() == &fused.input ? input.data() : y.data();
  expect(cuda::rms_norm_forward(p, nullptr), "rms_norm_forward");
  expect(cudaDeviceSynchronize(), "rms_norm_forward");
  input.fetch(), residual.fetch(), x.fetch(), y.fetch(), rstd.fetch();
  fused.compare(norm, "", 2, /*in_fp32=*/true);
}

// Of one dtype, in place: the bits of the steps.
void check_sandwich(const Forward& f, int64_t rows, int64_t cols, Layout layout) {
  if (f.y_type() != f.x_type) return;
  Tensor x(f.x_type, rows, cols, layout, kGuard), residual = x, w(f.w_type, 1, cols);
  Tensor rstd(f.rstd_type(), 1, rows, Layout::kDense, kGuard), next_rstd = rstd;
  fill_normal(x);
  fill_normal(residual);
  const Real huge = f.x_type == DType::kFloat16 ? 1e4L : 1e30L;
  if (rows > 1) x.set(1, 0, huge), residual.set(rows - 1, cols - 1, -huge);
  fill_normal(w, 0.5, f.offset != 0 ? 0 : 1);
  Tensor norm = x, sum = x, y = x, want_rstd = rstd, want_next_rstd = rstd;
  run_forward(f, x, w, norm, &want_rstd);
  fill(sum, [&](int64_t row, int64_t col) {
    const Real exact = norm.get(row, col) + residual.get(row, col);
    return f.x_type == DType::kFloat64 ? exact : Real(float(exact));
  });
  run_forward(f, sum, w, y, &want_next_rstd);

  OnDevice x_there(x), residual_there(residual), w_there(w), rstd_there(rstd),
      next_rstd_there(next_rstd);
  RmsNormSandwich p{params(f, x, w, x, rstd_there.data()),
                    params(f, residual, w, x, next_rstd_there.data()), 1};
  p.norm.x = p.next.y = x_there.data();
  p.norm.y = nullptr;
  p.next.x = p.next.addends.residual = residual_there.data();
  p.next.addends.residual_rows = residual.place;
  p.next.addends.input_dtype = f.x_type;
  if (f.weighted) p.norm.weight = p.next.weight = w_there.data();
  expect(cuda::rms_norm_sandwich_forward(p, nullptr), "rms_norm_sandwich_forward");
  expect(cudaDeviceSynchronize(), "rms_norm_sandwich_forward");
  x_there.fetch(), residual_there.fetch(), rstd_there.fetch(), next_rstd_there.fetch();
  const std::string name =
      "sandwich " + f.name() + " " + std::to_string(rows) + "x" + std::to_string(cols);
  check(residual.same_bits(sum), "%s: the sum", name.c_str());
  check(x.same_bits(y), "%s: y", name.c_str());
  check(rstd.same_bits(want_rstd) && next_rstd.same_bits(want_next_rstd), "%s: rstd", name.c_str());
  check(x.guards_intact() && residual.guards_intact() && rstd.guards_intact() &&
            next_rstd.guards_intact(),
        "%s: wrote outside", name.c_str());
}

Gradients run_backward(Backward& b, bool want_dx, bool want_dweight) {
  Gradients result(b);
  OnDevice x(b.x), dy(b.dy), w(b.w), rstd(b.rstd), dresidual(b.dresidual), dx(result.dx),
      dweight(result.dweight);
  RmsNormBackward p = params(b, result, want_dx, want_dweight);
  p.x = x.data(), p.dy = dy.data(), p.rstd = rstd.data();
  if (p.weight) p.weight = w.data();
  if (p.dresidual) p.dresidual = dresidual.data();
  if (p.dx) p.dx = dx.data();
  if (p.dweight) p.dweight = dweight.data();
  const int64_t bytes = cuda::rms_norm_backward_workspace(p);
  Tensor space(DType::kFloat64, 1, ceil(bytes / 8.0), Layout::kDense, kGuard);
  OnDevice workspace(space);
  p.workspace = bytes > 0 ? workspace.data() : nullptr;
  expect(cuda::rms_norm_backward(p, nullptr), "rms_norm_backward");
  expect(cudaDeviceSynchronize(), "rms_norm_backward");
  dx.fetch(), dweight.fetch(), workspace.fetch();
  for (size_t i = 0; i < kGuard; ++i) {
    if (space.bytes[i] == 0xff && space.bytes[space.bytes.size() - 1 - i] == 0xff) continue;
    check(false, "%s: wrote outside of its workspace", b.name().c_str());
    break;
  }
  return result;
}

void check_backward(const Forward& f, DType dy, int64_t rows, int64_t cols, Layout layout) {
  Backward b(f, dy, rows, cols, layout);
  b.with_dresidual = cols % 4 != 0 || cols > 100000;
  Tensor y(f.y_type(), rows, cols);
  Tensor r(f.rstd_type(), 1, rows, Layout::kDense, kGuard);
  run_forward(f, b.x, b.w, y, &r);
  fill(b.rstd, [&](int64_t, int64_t row) { return r.get(0, row); });
  const std::string name = "backward " + b.name();
  Gradients got = run_backward(b, true, true);
  BackwardReference(b).compare(got, name.c_str());
  check(run_backward(b, true, true).same_bits(got), "%s: other bits in a second run", name.c_str());
  check(run_backward(b, true, false).dx.same_bits(got.dx), "%s: dx alone", name.c_str());
  check(run_backward(b, false, true).dweight.same_bits(got.dweight), "%s: dweight alone",
        name.c_str());
}

}  // namespace

int main() {
  // Short rows several to a warp, one warp, a block in registers, shared memory, clusters of each
  // size.
  const int64_t sizes[] = {1,   7,    64,   96,   128,  200,  256,   300,
                           600, 1000, 2050, 4096, 5121, 9000, 20004, 40000};
  const int64_t long_sizes[] = {70001, 140000, 280008};
  const DType bf16 = DType::kBFloat16, f32 = DType::kFloat32, f64 = DType::kFloat64;
  int turn = 0;
  for (const Forward& f : forward_mixes()) {
    for (const int64_t cols : sizes) {
      if (cols > 10000 && ++turn % 3) continue;
      const Layout layout = kLayouts[turn % 4];
      const int64_t rows = cols < 300 ? 20 : 3;
      check_forward(f, rows, cols, layout);
      check_fused(Fused(f, f.x_type == f32 || turn % 4 == 0 ? kFast[turn % 3] : f.x_type, rows,
                        cols, layout, turn % 2));
      check_backward(f, kFast[turn++ / 4 % 3], rows, cols, layout);
    }
  }
  for (const int64_t cols : long_sizes) {
    for (const DType type : {bf16, f32}) {
      check_forward({type, type}, 2, cols, Layout::kDense);
      check_fused(Fused({type, type}, bf16, 3, cols, Layout::kDense, type == bf16));
      check_backward({type, type}, type, 2, cols, Layout::kDense);
    }
  }
  check_forward({bf16, f32}, 2, 1000003, Layout::kDense);  // read twice
  check_backward({bf16, f32}, bf16, 2, 1000003, Layout::kDense);
  check_forward({bf16, bf16}, 5000, 64, Layout::kDense);  // more rows than the grid holds
  check_backward({bf16, bf16}, bf16, 5000, 64, Layout::kDense);
  check_forward({f64, f64}, 5, 300, Layout::kTwoDims);
  check_fused(Fused({f64, f64}, f32, 5, 300, Layout::kTwoDims, true));
  check_fused(Fused({f32, f32}, f64, 5, 300, Layout::kDense, false));
  check_fused(Fused({bf16, f32}, bf16, 2, 1000003, Layout::kDense, true));
  check_backward({f32, f64}, f32, 5, 300, Layout::kDense);
  for (const Forward& f : forward_mixes()) {
    for (const int64_t cols : sizes) {
      if (cols > 10000 && ++turn % 3) continue;
      check_sandwich(f, cols < 300 ? 20 : 3, cols, kLayouts[turn++ % 4]);
    }
  }
  for (const int64_t cols : long_sizes) check_sandwich({bf16, bf16}, 2, cols, Layout::kDense);
  check_sandwich({bf16, bf16}, 2, 1000003, Layout::kDense);
  check_sandwich({bf16, bf16}, 5000, 64, Layout::kDense);
  check_sandwich({f64, f64}, 5, 300, Layout::kTwoDims);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
