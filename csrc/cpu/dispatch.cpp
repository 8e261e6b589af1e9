// Which kernels run: scalar first, better ones laid over it, as far as the machine goes. And what
// all instruction sets share: the plan of the backward, and the way to fp64.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fresh.h"

#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // Linux 5.14; glibc names it since 2.35
#endif

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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return 2 + avx2 + avx512 + (avx512 && __builtin_cpu_supports("avx512bf16"));
#else
  return kCount;
#endif
}

const Kernels* best() {
  const int count = supported_count();
#if RMSNORM_X86
  // On a Zen 4 the AVX2 kernels take an eighth to a fifth less time for cached rows of Half.
  static const Kernels* const usual = kTable[count - 1];
  static const Kernels zen4 = {
      usual->name,
      [](const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin) {
        (p.x_dtype == DType::kFloat16 ? kAvx2 : *usual).forward(p, row_begin, row_end, y_begin);
      },
      usual->backward,
      usual->dweight,
      usual->quantize,
      usual->gate,
      usual->gate_gradients,
      usual->rotate,
      usual->rope_forward};
  if (count > 3 && __builtin_cpu_is("amdfam19h")) return &zen4;
#endif
  return kTable[count - 1];
}

// nullptr: not built, or not supported.
const Kernels* find(const char* name) {
  for (int i = 0; i < supported_count(); ++i) {
    if (!std::strcmp(name, kTable[i]->name)) return kTable[i];
  }
  return nullptr;
}

std::atomic<const Kernels*> current{nullptr};
thread_local const char* last = "";

// The choice at first use. Two threads that race here choose the same.
const Kernels& choose() {
  const char* name = std::getenv("RMSNORM_CUDA_ISA");
  const Kernels* chosen = name && *name ? find(name) : best();
  if (!chosen) {
    std::string available;
    for (int i = 0; i < supported_count(); ++i) {
      available += std::string(i ? ", " : "") + kTable[i]->name;
    }
    throw std::runtime_error("RMSNORM_CUDA_ISA is '" + std::string(name) +
                             "', but this machine and build have only: " + available);
  }
  const Kernels* none = nullptr;
  current.compare_exchange_strong(none, chosen);
  return *current.load();
}

#ifndef _SC_LEVEL1_DCACHE_SIZE  // musl: the usual sizes
enum { _SC_LEVEL1_DCACHE_SIZE = -1, _SC_LEVEL2_CACHE_SIZE = -1, _SC_LEVEL3_CACHE_SIZE = -1 };
#endif
int64_t cache_size(int name, int64_t usual, int64_t low, int64_t high) {
  const long size = sysconf(name);
  return between(size > 0 ? size : usual, low, high);
}
// Linux tells what a group of cores shares; glibc, on AMD's, the sum of all groups.
int64_t last_level_size() {
  constexpr int64_t kLeast = 4 << 20, kMost = 32 << 20;
  int64_t kib = 0;
  if (FILE* const file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re")) {
    if (std::fscanf(file, "%" SCNd64 "K", &kib) != 1) kib = 0;
    std::fclose(file);
  }
  if (kib > 0) return between(kib << 10, kLeast, kMost);
  return cache_size(_SC_LEVEL3_CACHE_SIZE, kMost, kLeast, kMost);
}

}  // namespace

const Kernels& kernels() {
  // Acquired, for the thread that chose it may have written what it points to.
  const Kernels* chosen = current.load(std::memory_order_acquire);
  return chosen ? *chosen : choose();
}

const CacheSizes kCaches = {
    cache_size(_SC_LEVEL1_DCACHE_SIZE, 32 << 10, 16 << 10, 256 << 10),
    cache_size(_SC_LEVEL2_CACHE_SIZE, 512 << 10, 256 << 10, 4 << 20),
    last_level_size(),
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
  const Kernels* chosen = name ? find(name) : best();
  if (chosen) current = chosen;
  return chosen != nullptr;
}

namespace {

template <class P>
const Kernels& kernels_for(const P& p) {
  return has_fp64(p) ? kFp64 : kernels();
}
const Kernels& kernels_for(const RmsNormForward& p) {
  const bool odd = is_unrounded(p) && p.addends.input_dtype != p.x_dtype;
  return has_fp64(p) || odd ? kFp64 : kernels();
}

// Rows of a tile of y, which the step behind the norm reads.
int64_t tile_rows(const RmsNormForward& p) {
  return std::clamp<int64_t>(tile_bytes() / (p.cols * size_of(p.y_dtype)), 1, p.rows);
}
int64_t tile_bytes_of(const RmsNormForward& p) {
  return tile_rows(p) * p.cols * size_of(p.y_dtype);
}

}  // namespace

int64_t rms_norm_forward_workspace(const RmsNormForward& p) {
  return p.quant.data && !p.y ? tile_bytes_of(p) : 0;
}

namespace {

void forward_and_quantize(const RmsNormForward& p, int64_t row_begin, int64_t row_end,
                          void* workspace) {
  const Kernels& chosen = kernels_for(p);
  RmsNormForward part = p;
  if (!p.y) {  // the workspace is some rows of it
    part.y = workspace;
    part.y_rows = {1, {}, {p.cols}};
    part.stream = false;
  }
  const int64_t rows = tile_rows(p);
  for (int64_t row = row_begin; row < row_end; row += rows) {
    const int64_t end = std::min(row + rows, row_end), y_begin = p.y ? 0 : row;
    chosen.forward(part, row, end, y_begin);
    chosen.quantize(part, row, end, y_begin);
  }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& p, int64_t row_begin, int64_t row_end,
                      void* workspace) {
  if (p.quant.data) return forward_and_quantize(p, row_begin, row_end, workspace);
  const Kernels& chosen = kernels_for(p);
  map_and_forward(p, row_begin, row_end,
                  [&](int64_t begin, int64_t end) { chosen.forward(p, begin, end, 0); });
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
  const Kernels& chosen = kernels_for(p);
  map_and_backward(p, rms_norm_backward_plan(p).block_rows, block_begin, block_end,
                   [&](int64_t begin, int64_t end) { chosen.backward(p, begin, end); });
}

void rms_norm_backward_dweight(const RmsNormBackward& p, int64_t col_begin, int64_t col_end) {
  kernels_for(p).dweight(p, col_begin, col_end);
}

// ---------------------------------------------------------------- with rotary embedding

namespace {

template <class P>
RotatedRows rotated_rows(const P& p) {
  RotatedRows r{};
  r.rows_per_token = p.rows_per_token;
  r.heads_per_row = p.heads_per_row;
  r.head_cols = p.norm.cols / p.heads_per_row;
  return r;
}

template <class P>
DType tile_type(const P& norm) {
  return has_fp64(norm) ? DType::kFloat64 : DType::kFloat32;
}

// The norm alone, to a tile.
RmsNormForward norm_to_tile(const RmsNormRope& p) {
  RmsNormForward norm = p.norm;
  norm.cast_before_weight = norm.cast_before_weight && norm.weight;
  if (!p.rope.round_each_step) norm.y_dtype = tile_type(norm);
  norm.y_rows = {1, {}, {norm.cols}};
  norm.stream = false;
  return norm;
}

// The gradient alone, from a tile.
RmsNormBackward gradient_from_tile(const RmsNormRopeBackward& p) {
  RmsNormBackward norm = p.norm;
  norm.dy_dtype = tile_type(norm);
  norm.dy_rows = {1, {}, {norm.cols}};
  return norm;
}

}  // namespace

int64_t rms_norm_rope_workspace(const RmsNormRope& p) { return tile_bytes_of(norm_to_tile(p)); }

namespace {

void forward_and_rotate(const Kernels& chosen, const RmsNormRope& p, int64_t row_begin,
                        int64_t row_end, void* workspace) {
  RmsNormForward norm = norm_to_tile(p);
  norm.y = workspace;
  RotatedRows rotated = rotated_rows(p);
  rotated.from = workspace;
  rotated.from_rows = norm.y_rows;
  rotated.from_dtype = norm.y_dtype;
  rotated.to = p.norm.y;
  rotated.to_rows = p.norm.y_rows;
  rotated.to_dtype = p.norm.y_dtype;
  const int64_t rows = tile_rows(norm);
  for (int64_t row = row_begin, end; row < row_end; row = end) {
    end = std::min(row + rows, row_end);
    chosen.forward(norm, row, end, row);
    rotated.from_begin = row;
    chosen.rotate(p.rope, rotated, row, end);
  }
}

}  // namespace

void rms_norm_rope_forward(const RmsNormRope& p, int64_t row_begin, int64_t row_end,
                           void* workspace) {
  const Kernels& chosen = kernels_for(p.norm);
  map_and_forward(p.norm, row_begin, row_end, [&](int64_t begin, int64_t end) {
    if (chosen.rope_forward && chosen.rope_forward(p, begin, end, workspace)) return;
    forward_and_rotate(chosen, p, begin, end, workspace);
  });
}

int64_t rms_norm_rope_backward_workspace(const RmsNormRopeBackward& p) {
  const RmsNormBackward norm = gradient_from_tile(p);
  return rms_norm_backward_plan(norm).block_rows * norm.cols * size_of(norm.dy_dtype);
}

namespace {

void rotate_and_backward(const RmsNormRopeBackward& p, int64_t block_begin, int64_t block_end,
                         void* workspace) {
  const Kernels& chosen = kernels_for(p.norm);
  RmsNormBackward norm = gradient_from_tile(p);
  const int64_t block_rows = rms_norm_backward_plan(norm).block_rows;
  RotatedRows rotated = rotated_rows(p);
  rotated.from = p.norm.dy;
  rotated.from_rows = p.norm.dy_rows;
  rotated.from_dtype = p.norm.dy_dtype;
  rotated.to = workspace;
  rotated.to_rows = norm.dy_rows;
  rotated.to_dtype = norm.dy_dtype;
  rotated.reversed = true;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t row = block * block_rows, end = std::min(row + block_rows, norm.rows);
    rotated.to_begin = row;
    chosen.rotate(p.rope, rotated, row, end);
    norm.dy = reinterpret_cast<const void*>(  // where row 0 would be
        reinterpret_cast<uintptr_t>(workspace) - row * norm.cols * size_of(norm.dy_dtype));
    chosen.backward(norm, block, block + 1);
  }
}

}  // namespace

void rms_norm_rope_backward(const RmsNormRopeBackward& p, int64_t block_begin, int64_t block_end,
                            void* workspace) {
  map_and_backward(
      p.norm, rms_norm_backward_plan(p.norm).block_rows, block_begin, block_end,
      [&](int64_t begin, int64_t end) { rotate_and_backward(p, begin, end, workspace); });
}

}  // namespace rmsnorm::cpu
