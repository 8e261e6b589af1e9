// Which kernels run: scalar first, better ones laid over it, as far as the machine goes. And what
// all instruction sets share: the plan of the backward, and the way to fp64.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace rmsnorm::cpu {
namespace {

// fp64 is no better than scalar, and stands before it: the last one that the machine has is the
// best.
#if RMSNORM_X86
const Kernels* const kTable[] = {&kFp64, &kScalar, &kAvx2, &kAvx512, &kAvx512Bf16};
#else
const Kernels* const kTable[] = {&kFp64, &kScalar};
#endif
constexpr int kCount = sizeof kTable / sizeof kTable[0];

int supported_count() {
#if RMSNORM_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return 2;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return 3;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return 4;
#endif
  return kCount;
}

// What runs, and what runs where x is Half.
struct Choice {
  const Kernels* kernels;
  const Kernels* for_half;
};

const Choice* best() {
  static const Choice choice = [] {
    const int count = supported_count();
    const Kernels* const kernels = kTable[count - 1];
#if RMSNORM_X86
    // On a Zen 4 the AVX2 kernels take an eighth to a fifth less time for cached rows of Half.
    if (count > 3 && __builtin_cpu_is("amdfam19h")) return Choice{kernels, &kAvx2};
#endif
    return Choice{kernels, kernels};
  }();
  return &choice;
}

// nullptr: not built, or not supported.
const Choice* find(const char* name) {
  static Choice choices[kCount];
  static const bool filled = [] {
    for (int i = 0; i < kCount; ++i) choices[i] = {kTable[i], kTable[i]};
    return true;
  }();
  for (int i = 0; filled && i < supported_count(); ++i) {
    if (!std::strcmp(name, kTable[i]->name)) return &choices[i];
  }
  return nullptr;
}

std::atomic<const Choice*> current{nullptr};
thread_local const char* last = "";

// The choice at first use. Two threads that race here choose the same.
const Choice& choose() {
  const char* name = std::getenv("RMSNORM_CUDA_ISA");
  const Choice* chosen = name && *name ? find(name) : best();
  if (!chosen) {
    std::string available;
    for (int i = 0; i < supported_count(); ++i) {
      available += std::string(i ? ", " : "") + kTable[i]->name;
    }
    throw std::runtime_error("RMSNORM_CUDA_ISA is '" + std::string(name) +
                             "', but this machine and build have only: " + available);
  }
  const Choice* none = nullptr;
  current.compare_exchange_strong(none, chosen);
  return *current.load();
}

const Choice& choice() {
  // Acquired, for what it points to may have been written by the thread that chose it.
  const Choice* chosen = current.load(std::memory_order_acquire);
  return chosen ? *chosen : choose();
}

const Kernels& kernels() { return *choice().kernels; }

int64_t cache_size([[maybe_unused]] int name, int64_t otherwise) {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  if (const long size = sysconf(name); size > 0) return size;
#endif
  return otherwise;
}

}  // namespace

#ifndef _SC_LEVEL1_DCACHE_SIZE  // musl: the usual sizes
enum { _SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE };
#endif
const CacheSizes kCaches = {
    between(cache_size(_SC_LEVEL1_DCACHE_SIZE, 32 << 10), kMinL1, 256 << 10),
    between(cache_size(_SC_LEVEL2_CACHE_SIZE, 512 << 10), 256 << 10, 4 << 20),
    between(cache_size(_SC_LEVEL3_CACHE_SIZE, 32 << 20), 4 << 20, 32 << 20),
};

bool writes_past_caches(int64_t bytes, bool is_new) {
  return is_new ? bytes >= new_stream_bytes() && bytes < kMappedBytes : bytes >= stream_bytes();
}

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
  const Choice* chosen = name ? find(name) : best();
  if (chosen) current = chosen;
  return chosen != nullptr;
}

namespace {

void norm_rows(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin) {
  if (wide(p)) return forward_fp64(p, row_begin, row_end, y_begin);
  const Choice& chosen = choice();
  (p.x_dtype == DType::kFloat16 ? chosen.for_half : chosen.kernels)
      ->forward(p, row_begin, row_end, y_begin);
}

int64_t quant_row_bytes(const RmsNormForward& p) {
  return p.cols * (p.y_dtype == DType::kFloat32 ? 4 : 2);
}
int64_t quant_rows(const RmsNormForward& p) {
  return std::max<int64_t>(1, quant_bytes() / quant_row_bytes(p));
}

}  // namespace

int64_t rms_norm_forward_workspace(const RmsNormForward& p) {
  return p.quant.data && !p.y ? std::min(quant_rows(p), p.rows) * quant_row_bytes(p) : 0;
}

void rms_norm_forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end,
                      void* workspace) {
  if (!p.quant.data) return norm_rows(p, row_begin, row_end, 0);
  RmsNormForward part = p;
  if (!p.y) {  // the workspace is some rows of it
    part.y = workspace;
    part.y_rows = {1, {}, {p.cols}};
    part.stream = false;
  }
  const int64_t rows = quant_rows(p);
  for (int64_t row = row_begin; row < row_end; row += rows) {
    const int64_t end = std::min(row + rows, row_end), y_begin = p.y ? 0 : row;
    norm_rows(part, row, end, y_begin);
    kernels().quantize(part, row, end, y_begin);
  }
}

// A block of 32768 elements is some 10 us of work and enough rows to pay for its row of partial
// sums. At most 128 blocks, until a block has 256 rows.
BackwardPlan rms_norm_backward_plan(const RmsNormBackward& p) {
  const int64_t worth_it = std::clamp<int64_t>(32768 / p.cols, 8, kMaxBlockRows);
  const int64_t block_rows = std::min(std::max(worth_it, (p.rows + 127) / 128), kMaxBlockRows);
  const int64_t blocks = (p.rows + block_rows - 1) / block_rows;
  // Two rows of float, or one of double where fp64.cpp sums.
  return {block_rows, blocks, p.dweight ? blocks * p.cols * int64_t(sizeof(double)) : 0};
}

void rms_norm_backward(const RmsNormBackward& p, int64_t block_begin, int64_t block_end) {
  (wide(p) ? backward_fp64 : kernels().backward)(p, block_begin, block_end);
}

void rms_norm_backward_dweight(const RmsNormBackward& p, int64_t col_begin, int64_t col_end) {
  (wide(p) ? dweight_fp64 : kernels().dweight)(p, col_begin, col_end);
}

}  // namespace rmsnorm::cpu
