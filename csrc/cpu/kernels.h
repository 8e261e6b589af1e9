// What the files of csrc/cpu/ share. Nothing here is seen outside of librmsnorm.so.
#pragma once
#include <cstdint>

#include "../rmsnorm.h"

// The x86 instruction sets are opened by GCC's target pragma, which clang does not have: there and
// on every other machine the scalar kernels are the only ones.
#ifndef RMSNORM_X86
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RMSNORM_X86 1
#else
#define RMSNORM_X86 0
#endif
#endif

namespace rmsnorm::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int kLine = 64;  // bytes in a line of the caches

// A call that reads and writes so much finds its next row in memory rather than in a cache, and fetches it ahead. On a
// Zen 3 with 32 MiB of L3 for several machines this takes 15 % off rows from memory, and adds as much to fp32 rows from
// the L3 cache, but next to nothing to 16-bit rows, which are bound by their conversion.
constexpr int64_t kFarBytes = 8 << 20;
constexpr int64_t kFarBytes16 = 1 << 20;

constexpr int64_t kFetchInHalves = 8 << 10;  // a row of so many bytes is long, see Fetch

// The weights that the fast path for fp32 takes, besides 0: at least 2 to this, and less than 2^128 times that. Their
// product with an rstd stays normal.
constexpr int kLeastWeightExponent = -70;

// If x and weight are at least 2 to this (the weight may also be 0), x * rstd * weight is no denormal.
constexpr int kLargeExponent = -31;

// Rows that are summed as a group, see forward_rows: half of an L1 cache.
constexpr int64_t kGroupBytes = 16 << 10;
constexpr int64_t kFarGroupBytes = 2 << 10;

// Columns of addends that are added at a time: a part of an L1 cache.
constexpr int64_t kAddTile = 1024;

// A 16-bit weight of more than these is read as it is, not from a tile of floats.
constexpr int64_t kDirectCols = 2048;

// Rows that are normalized before they are put into 8 bits: a part of an L1 cache.
constexpr int64_t kQuantBytes = 16 << 10;

// One instruction set: everything but fp64, which has only the functions of fp64.cpp.
struct Kernels {
  const char* name;
  void (*forward)(const RmsNormForward& p, int64_t row_begin, int64_t row_end);
  void (*backward)(const RmsNormBackward& p, int64_t block_begin, int64_t block_end);
  void (*dweight)(const RmsNormBackward& p, int64_t col_begin, int64_t col_end);
  void (*quantize)(const RmsNormForward& p, int64_t row_begin, int64_t row_end);
};
extern const Kernels kScalar;
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;

// Memory of the thread for a tile of weights: on the stack it would be too much for threads with small ones.
constexpr int64_t kWeightTile = 8192;
float* weight_tile();

// Each entry point of a Kernels calls it with its own name: a test sees which code ran.
void set_last_isa(const char* name);

// The fast path of a row holds while its rstd is in this range. Then mean(x^2) + eps is in [2^-60, 2^60], and neither the
// sum in fp32 nor a product with rstd over- or underflows.
constexpr float kMinRstd = 0x1p-30f;
constexpr float kMaxRstd = 0x1p30f;

// The backward sums g * x without rstd. Beyond these the row is done in fp64, as it is where x is small and the sum so
// small that terms may have been lost below fp32's range.
constexpr double kMaxGradientSum = 0x1p120;
constexpr double kMinGradientSum = 0x1p-80;
constexpr float kMaxPlainRstd = 0x1p12f;

constexpr int64_t kMaxBlockRows = 256;  // of the backward
constexpr int64_t kFoldRows = 32;       // whose dweight is summed up by itself: more rows of equal values would lose bits
inline int64_t dweight_sums(int64_t block_rows) { return block_rows > kFoldRows ? 2 : 1; }  // rows of the workspace of a block

// The backward's groups of rows, see backward_blocks: a part of an L2 cache; and columns at a time, a part of an L1 cache.
constexpr int64_t kGradientBytes = 128 << 10;
constexpr int64_t kGradientRows = 16;
constexpr int64_t kGradientTile = 1024;

// fp64.cpp: one row in double with dtypes read at run time, for fp64 tensors and for the rows out
// of that range. partial is the block's row of the workspace; double if `wide`, else float.
bool wide(const RmsNormForward& p);
void add_row_fp64(const RmsNormForward& p, int64_t row);
bool wide(const RmsNormBackward& p);
void forward_row_fp64(const RmsNormForward& p, int64_t row);
void backward_row_fp64(const RmsNormBackward& p, int64_t row, void* partial);
void dweight_fp64(const RmsNormBackward& p, int64_t col_begin, int64_t col_end);

}  // namespace rmsnorm::cpu
