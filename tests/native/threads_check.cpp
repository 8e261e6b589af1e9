// Threads that call the CPU kernels at once, and set the instruction set meanwhile. Every result
// has the bits of a call alone. For -fsanitize=thread, see .ci/sanitize.py.
#include <atomic>
#include <set>
#include <thread>

#include "check.h"

namespace {

constexpr int kThreads = 8, kRounds = 200;
using Bytes = decltype(Tensor::bytes);

// All but "fp64": see set_isa().
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int i = 1; i < cpu::isa_count(); ++i)
    if (cpu::isa_supported(i)) names.push_back(cpu::isa_name(i));
  return names;
}

// A forward and a backward in memory of its own; the inputs are shared.
struct Work {
  Forward f;
  Tensor &x, &w;
  Tensor y, rstd;
  Backward b;
  Gradients gradients;
  Bytes space;

  Work(Tensor& input, Tensor& weight, Backward& backward)
      : f{input.dtype, weight.dtype},
        x(input),
        w(weight),
        y(f.y_type(), x.rows, x.cols),
        rstd(f.rstd_type(), 1, x.rows),
        b(backward),
        gradients(b) {}

  RmsNormBackward backward() {
    RmsNormBackward p = params(b, gradients, true, true);
    const cpu::BackwardPlan plan = cpu::rms_norm_backward_plan(p);
    space.resize(plan.workspace_bytes + 64);
    p.workspace = space.data() + (64 - reinterpret_cast<uintptr_t>(space.data()) % 64) % 64;
    return p;
  }
  void run() {
    cpu::rms_norm_forward(params(f, x, w, y, rstd.data()), 0, x.rows);
    const RmsNormBackward p = backward();
    cpu::rms_norm_backward(p, 0, cpu::rms_norm_backward_plan(p).blocks);
    cpu::rms_norm_backward_dweight(p, 0, x.cols);
  }
  // Of the gradients, which are of one instruction set, whichever the forward was of.
  Bytes gradient_bytes() const {
    Bytes both = gradients.dx.bytes;
    both.insert(both.end(), gradients.dweight.bytes.begin(), gradients.dweight.bytes.end());
    return both;
  }
};

// others_set: while another thread sets one instruction set after the other.
void check_calls(DType type, bool others_set) {
  Tensor x(type, 5, 300), w(type, 1, 300);
  fill_normal(x);
  fill_normal(w, 0.5, 1);
  Backward backward({type, type}, type, 5, 300);
  for (int64_t i = 0; i < 5; ++i) backward.rstd.set(0, i, 0.5L);
  std::vector<std::string> isas = instruction_sets();
  if (!others_set) isas = {isas.back()};
  std::set<Bytes> outputs, gradients;
  for (const std::string& isa : isas) {
    cpu::set_isa(isa.c_str());
    Work work(x, w, backward);
    work.run();
    outputs.insert(work.y.bytes);
    gradients.insert(work.gradient_bytes());
  }
  std::atomic<int> wrong = 0, running = kThreads;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      Work work(x, w, backward);
      for (int round = 0; round < kRounds; ++round) {
        work.run();
        wrong += !outputs.count(work.y.bytes) || !gradients.count(work.gradient_bytes());
        wrong += !*cpu::last_isa() || !*cpu::isa();
      }
      --running;
    });
  }
  for (size_t i = 0; others_set && running; ++i) {
    cpu::set_isa(isas[i % isas.size()].c_str());
    std::this_thread::yield();
  }
  for (std::thread& t : threads) t.join();
  cpu::set_isa(nullptr);
  check(wrong == 0, "%s: %d results are those of no call alone", format(type).name, int(wrong));
}

// The parts of one call, each on a thread of its own, as at::parallel_for runs them.
void check_parts(DType type) {
  Tensor x(type, 64, 300), w(type, 1, 300);
  fill_normal(x);
  fill_normal(w, 0.5, 1);
  const Forward f = {type, type};
  Tensor want(type, 64, 300), y(type, 64, 300);
  cpu::rms_norm_forward(params(f, x, w, want, nullptr), 0, 64);
  const RmsNormForward p = params(f, x, w, y, nullptr);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i)
    threads.emplace_back([&p, i] { cpu::rms_norm_forward(p, i * 8, i * 8 + 8); });
  for (std::thread& t : threads) t.join();
  check(y.same_bits(want), "%s: parts on threads", format(type).name);
}

}  // namespace

int main() {
  for (const DType type : kFast) {
    check_calls(type, false);
    check_parts(type);
  }
  for (const DType type : kFast) check_calls(type, true);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
