// Threads that call the CPU kernels at once, and set the instruction set meanwhile: for
// -fsanitize=thread, see .ci/sanitize.py. Every result has the bits of a call alone, of the
// instruction set that was in use: no other can be told while others set it.
#include <atomic>
#include <set>
#include <thread>

#include "check.h"

namespace {

constexpr int kThreads = 8, kRounds = 200;

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::isa_count(); ++i)
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
  std::vector<unsigned char> space;

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
  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all = y.bytes;
    for (const Tensor* t : {&gradients.dx, &gradients.dweight})
      all.insert(all.end(), t->bytes.begin(), t->bytes.end());
    return all;
  }
};

// While one thread sets instruction sets, a call may start in one and go on in another.
void check_calls(DType type, bool others_set) {
  Tensor x(type, 5, 300), w(type, 1, 300);
  fill_normal(x);
  fill_normal(w, 0.5, 1);
  Backward backward({type, type}, type, 5, 300);
  for (int64_t i = 0; i < 5; ++i) backward.rstd.set(0, i, 0.5L);
  std::set<std::vector<unsigned char>> wanted;
  if (others_set) {  // as many as there are pairs of the two calls' instruction sets
    const auto isas = instruction_sets();
    for (const auto& first : isas) {
      for (const auto& second : isas) {
        Work work(x, w, backward);
        cpu::set_isa(second.c_str());
        work.run();
        const auto of_second = work;
        cpu::set_isa(first.c_str());
        work.run();
        work.gradients = of_second.gradients;
        wanted.insert(work.bytes());
      }
    }
    cpu::set_isa(nullptr);
  } else {
    Work work(x, w, backward);
    work.run();
    wanted.insert(work.bytes());
  }
  std::atomic<int> wrong = 0, running = kThreads;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      Work work(x, w, backward);
      for (int round = 0; round < kRounds; ++round) {
        work.run();
        wrong += wanted.count(work.bytes()) == 0 || !*cpu::last_isa() || !*cpu::isa();
      }
      --running;
    });
  }
  const auto isas = instruction_sets();
  for (size_t i = 0; others_set && running; ++i) {
    cpu::set_isa(i % (isas.size() + 1) ? isas[i % isas.size()].c_str() : nullptr);
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
  check_calls(DType::kFloat32, true);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
