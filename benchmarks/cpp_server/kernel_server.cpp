// Serves RMSNorm by the kernels alone, rmsnorm.h and librmsnorm.so: neither torch nor Python.
//
//   kernel_server fp32|fp16|bf16 COLS INPUT WEIGHT OUTPUT [THREADS [CALLS]]
//
// The files hold bare numbers: INPUT rows of COLS, WEIGHT one row; OUTPUT is written. Each row is a
// request, which the next thread that is free takes. Then every thread makes CALLS calls on a row
// of its own, for the time of one at batch 1.
#include <rmsnorm.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <iterator>

#include "arguments.h"

using namespace rmsnorm;

namespace {

struct Format {
  DType dtype;
  int64_t bytes;
};

Format format(const std::string& name) {
  if (name == "fp32") return {DType::kFloat32, 4};
  if (name == "fp16") return {DType::kFloat16, 2};
  if (name == "bf16") return {DType::kBFloat16, 2};
  throw std::invalid_argument("expected fp32, fp16 or bf16, but got '" + name + "'");
}

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), bytes.size()).flush())
    throw std::runtime_error("cannot write " + path);
}

void serve(int argc, char** argv) {
  if (argc < 6 || argc > 8)
    throw std::invalid_argument(
        "usage: kernel_server fp32|fp16|bf16 COLS INPUT WEIGHT OUTPUT [THREADS [CALLS]]");
  const auto [dtype, bytes] = format(argv[1]);
  const int64_t cols = positive("COLS", argv[2]);
  const std::vector<char> x = read(argv[3]), weight = read(argv[4]);
  const int64_t threads = argc > 6 ? positive("THREADS", argv[6]) : 1;
  const int64_t calls = argc > 7 ? positive("CALLS", argv[7]) : 1'000'000;
  const int64_t row_bytes = cols * bytes, rows = x.size() / row_bytes;
  if (rows * row_bytes != int64_t(x.size()) || rows < threads)
    throw std::invalid_argument("INPUT: expected rows of " + std::to_string(row_bytes) +
                                " bytes, one or more for each of " + std::to_string(threads) +
                                " threads, but got " + std::to_string(x.size()) + " bytes");
  if (int64_t(weight.size()) != row_bytes)
    throw std::invalid_argument("WEIGHT: expected " + std::to_string(row_bytes) +
                                " bytes, but got " + std::to_string(weight.size()));

  std::vector<char> y(x.size());
  RmsNormForward p{};  // what is left at zero is not wanted: see rmsnorm.h
  p.x = x.data();
  p.weight = weight.data();
  p.y = y.data();
  p.x_rows = p.y_rows = {1, {rows}, {cols}};
  p.rows = rows;
  p.cols = cols;
  p.eps = 1e-6;
  p.x_dtype = p.w_dtype = p.y_dtype = dtype;

  const std::string isa =
      cpu::isa();  // throws here, not in a thread, if RMSNORM_CUDA_ISA names none that is there
  std::atomic<int64_t> next = 0;
  in_threads(threads, [&](int64_t) {
    for (int64_t row; (row = next++) < rows;) cpu::rms_norm_forward(p, row, row + 1);
  });
  write(argv[5], y);
  const double seconds = in_threads(threads, [&](int64_t i) {
    for (int64_t call = 0; call < calls; ++call) cpu::rms_norm_forward(p, i, i + 1);
  });
  std::printf("1x%ld %s, %s, %ld threads: %.3f us a call\n", cols, argv[1], isa.c_str(), threads,
              seconds / calls * 1e6);
}

}  // namespace

int main(int argc, char** argv) try { serve(argc, argv); } catch (const std::exception& error) {
  std::fprintf(stderr, "kernel_server: %s\n", error.what());
  return 1;
}
