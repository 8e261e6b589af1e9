// Which kernels run: scalar first, better ones laid over it, as far as the machine goes. And what
// all instruction sets share: the plan of the backward, and the way to fp64.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace rmsnorm::cpu {
namespace {

#if RMSNORM_X86
const Kernels* const kTable[] = {&kScalar, &kAvx2, &kAvx512, &kAvx512Bf16};
#else
const Kernels* const kTable[] = {&kScalar};
#endif
constexpr int kCount = sizeof kTable / sizeof kTable[0];

int supported_count() {
#if RMSNORM_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 1;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return 3;
#endif
  return kCount;
}

const Kernels* find(const char* name) {
  const int count = supported_count();
  for (int i = 0; i < count; ++i) {
    if (!std::strcmp(name, kTable[i]->name)) return kTable[i];
  }
  return nullptr;
}

const Kernels* best() { return kTable[supported_count() - 1]; }

// On a Zen 4 the AVX2 kernels take an eighth to a fifth less time for cached rows of Half.
bool avx2_is_better_for_half() {
#if RMSNORM_X86
  static const bool better = supported_count() > 2 && __builtin_cpu_is("amdfam19h");
  return better;
#else
  return false;
#endif
}

std::atomic<const Kernels*> current{nullptr};
std::atomic<bool> named{false};  // was the current one asked for by name?
thread_local const char* last = "";

// The choice at first use. Two threads that race here choose the same.
const Kernels& choose() {
  const char* name = std::getenv("RMSNORM_CUDA_ISA");
  const Kernels* chosen = name && *name ? find(name) : best();
  if (!chosen) {
    std::string available;
    for (int i = 0; i < supported_count(); ++i) available += std::string(i ? ", " : "") + kTable[i]->name;
    throw std::runtime_error("RMSNORM_CUDA_ISA is '" + std::string(name) + "', but this machine and build have only: " +
                             available);
  }
  const Kernels* none = nullptr;
  if (current.compare_exchange_strong(none, chosen)) named = name && *name;
  return *current.load();
}

const Kernels& kernels() {
  const Kernels* chosen = current.load(std::memory_order_relaxed);
  return chosen ? *chosen : choose();
}

}  // namespace

int isa_count() { return kCount; }
const char* isa_name(int i) { return kTable[i]->name; }
bool isa_supported(int i) { return i < supported_count(); }
const char* isa() { return kernels().name; }
const char* last_isa() { return last; }
void set_last_isa(const char* name) { last = name; }

float* weight_tile() {
  alignas(kLine) thread_local float tile[kWeightTile];
  return tile;
}

bool set_isa(const char* name) {
  const Kernels* chosen = name ? find(name) : best();
  if (!chosen) return false;
  current = chosen;
  named = name != nullptr;
  return true;
}

namespace {

void forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end) {
  const Kernels& k = kernels();
  if (!wide(p)) {
    const bool other = p.x_dtype == DType::kFloat16 && !named.load(std::memory_order_relaxed) && avx2_is_better_for_half();
    return (other ? *find("avx2") : k).forward(p, row_begin, row_end);
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    if (p.addends.input) add_row_fp64(p, row);
    forward_row_fp64(p, row);
  }
}

int64_t quant_row_bytes(const RmsNormForward& p) { return p.cols * (p.y_dtype == DType::kFloat32 ? 4 : 2); }
int64_t quant_rows(const RmsNormForward& p) { return std::max<int64_t>(1, kQuantBytes / quant_row_bytes(p)); }

}  // namespace

int64_t rms_norm_forward_workspace(const RmsNormForward& p) {
  return p.quant.data && !p.y ? std::min(quant_rows(p), p.rows) * quant_row_bytes(p) : 0;
}

void rms_norm_forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end, void* workspace) {
  if (!p.quant.data) return forward(p, row_begin, row_end);
  RmsNormForward part = p;
  const int64_t rows = quant_rows(p);
  for (int64_t row = row_begin; row < row_end; row += rows) {
    if (!p.y) {  // the workspace is these rows of it
      part.y = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(workspace) - row * quant_row_bytes(p));
      part.y_rows = {1, {}, {p.cols}};
      part.stream = false;
    }
    const int64_t end = std::min(row + rows, row_end);
    forward(part, row, end);
    kernels().quantize(part, row, end);
  }
}

// A block of 32768 elements is some 10 us of work and enough rows to pay for its row of partial
// sums. At most 128 blocks, until a block has 256 rows.
BackwardPlan rms_norm_backward_plan(const RmsNormBackward& p) {
  const int64_t least = std::clamp<int64_t>(32768 / p.cols, 8, kMaxBlockRows);
  const int64_t block_rows = std::min(std::max(least, (p.rows + 127) / 128), kMaxBlockRows);
  const int64_t blocks = (p.rows + block_rows - 1) / block_rows;
  const int64_t bytes = p.dweight ? blocks * p.cols * (wide(p) ? 8 : 4 * dweight_sums(block_rows)) : 0;
  return {block_rows, blocks, bytes};
}

void rms_norm_backward(const RmsNormBackward& p, int64_t block_begin, int64_t block_end) {
  const Kernels& k = kernels();
  if (!wide(p)) return k.backward(p, block_begin, block_end);
  const int64_t block_rows = rms_norm_backward_plan(p).block_rows;
  for (int64_t block = block_begin; block < block_end; ++block) {
    double* partial = p.dweight ? static_cast<double*>(p.workspace) + block * p.cols : nullptr;
    if (partial) std::fill_n(partial, p.cols, 0.0);
    const int64_t end = std::min((block + 1) * block_rows, p.rows);
    for (int64_t row = block * block_rows; row < end; ++row) backward_row_fp64(p, row, partial);
  }
}

void rms_norm_backward_dweight(const RmsNormBackward& p, int64_t col_begin, int64_t col_end) {
  wide(p) ? dweight_fp64(p, col_begin, col_end) : kernels().dweight(p, col_begin, col_end);
}

}  // namespace rmsnorm::cpu
