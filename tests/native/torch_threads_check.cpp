// Threads that call the ops at once, each with a number of OpenMP's threads that changes, while
// others set the instruction set and register and unregister an op. Every result has the bits of a
// call alone. For -fsanitize=thread, see .ci/sanitize.py.
//
// OpenMP's few functions are defined here, over std::thread: they go before those of libgomp, whose
// barriers TSan does not see.
#include <ATen/Parallel.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <torch/csrc/autograd/autograd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "../../csrc/torch/ops.h"

namespace {

thread_local int wanted = 1, team = 1, number = 0;

}  // namespace

extern "C" {
void GOMP_parallel(void (*run)(void*), void* data, unsigned count, unsigned /*flags*/) {
  const int members = count ? static_cast<int>(count) : wanted;
  std::vector<std::thread> threads;
  for (int i = 1; i < members; ++i) {
    threads.emplace_back([=] {
      team = members, number = i;
      run(data);
    });
  }
  team = members;
  run(data);
  team = 1;
  for (std::thread& t : threads) t.join();
}
int omp_get_num_threads() { return team; }
int omp_get_thread_num() { return number; }
int omp_get_max_threads() { return wanted; }
int omp_in_parallel() { return team > 1; }
void omp_set_num_threads(int count) { wanted = count; }
}

namespace {

using rmsnorm::Tensor;
namespace ops = rmsnorm::ops;
constexpr int kThreads = 6, kRounds = 30, kCols = 1000;

// Results of all kinds of calls. The inputs are shared by all threads.
std::vector<Tensor> work(const Tensor& x, const Tensor& residual, const Tensor& weight) {
  const c10::SymInt cols = kCols;
  const Tensor leaf = x.detach().set_requires_grad(true);
  const auto [y, sum] = ops::fused_add_rms_norm::call(leaf, residual, weight, 1e-6, 0, false, true);
  std::vector<Tensor> results = torch::autograd::grad({y}, {leaf}, {residual.to(y.scalar_type())});
  const Tensor out = at::empty_like(x);
  ops::rms_norm_out::call(x, cols, weight, 1e-6, 0, false, out);
  const auto [codes, scale, norm] = ops::rms_norm_quant::call(
      x, weight, std::nullopt, 1e-6, at::kChar, std::nullopt, std::nullopt, false, false, 0, false);
  results.insert(results.end(), {y.detach(), sum.detach(), out, codes, scale});
  return results;
}

int check(at::ScalarType type) {
  const auto options = at::TensorOptions().dtype(type);
  const Tensor x = at::randn({300, kCols}, options), residual = at::randn({300, kCols}, options);
  const Tensor weight = at::randn({kCols});
  const std::vector<Tensor> want = work(x, residual, weight);
  std::atomic<int> wrong = 0, running = kThreads;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < kRounds; ++round) {
        at::set_num_threads(1 + (i + round) % 3);
        const std::vector<Tensor> got = work(x, residual, weight);
        for (size_t k = 0; k < want.size(); ++k) wrong += !got[k].equal(want[k]);
      }
      --running;
    });
  }
  std::thread registrar([&] {
    while (running) {
      torch::Library library(torch::Library::DEF, "rmsnorm_check", std::nullopt, __FILE__, 0);
      library.def("twice(Tensor x) -> Tensor", [](const Tensor& t) { return t; });
    }
  });
  const int count = rmsnorm::cpu::isa_count();
  for (int i = 2; running; ++i) {  // of those whose bits agree
    const int isa = 2 + i % (count - 2);
    if (rmsnorm::cpu::isa_supported(isa)) rmsnorm::cpu::set_isa(rmsnorm::cpu::isa_name(isa));
    std::this_thread::yield();
  }
  registrar.join();
  for (std::thread& t : threads) t.join();
  rmsnorm::cpu::set_isa(nullptr);
  return wrong;
}

}  // namespace

int main() {
  int wrong = 0;
  for (const auto type : {at::kFloat, at::kBFloat16}) wrong += check(type);
  std::printf("%d wrong results\n", wrong);
  return wrong != 0;
}
