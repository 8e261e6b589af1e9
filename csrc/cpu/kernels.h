// What the files of csrc/cpu/ share. Nothing here is seen outside of librmsnorm.so.
#pragma once
#include <cstdint>

#include "../rmsnorm.h"
#include "tuning.h"

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

// The weights that the fast path for fp32 takes, besides 0: at least 2 to this, and less than 2^128
// times that. Their product with an rstd stays normal.
constexpr int kMinWeightExponent = -70;

// If x and weight are at least 2 to this (the weight may also be 0), x * rstd * weight is no
// denormal.
constexpr int kSmallExponent = -31;

// One instruction set: everything but fp64 tensors, which have only fp64.cpp.
struct Kernels {
  const char* name;
  // Rows row_begin to row_end. p.y starts with row y_begin: 0, or the first one in a workspace.
  void (*forward)(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin);
  void (*backward)(const RmsNormBackward& p, int64_t block_begin, int64_t block_end);
  void (*dweight)(const RmsNormBackward& p, int64_t col_begin, int64_t col_end);
  void (*quantize)(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin);
};
extern const Kernels kFp64;  // every row in double: what the instruction sets are held against
extern const Kernels kScalar;
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;

// Memory of the thread for a tile of weights: on the stack it would be too much for threads with
// small ones.
float* weight_tile();

// Each entry point of a Kernels calls it with its own name: a test sees which code ran.
void set_last_isa(const char* name);

// The backward sums g * x without rstd. Beyond these the row is done in fp64, as it is where x is
// small and the sum so small that terms may have been lost below fp32's range.
constexpr double kMaxGradientSum = 0x1p120;
constexpr double kMinGradientSum = 0x1p-80;
constexpr float kMaxPlainRstd = 0x1p12f;

// Rows of a block of the backward, at most, and those whose dweight is summed up by itself: more
// rows of equal values would lose bits. A larger block has two rows of sums in the workspace.
constexpr int64_t kMaxBlockRows = 256;
constexpr int64_t kFoldRows = 32;
inline int64_t dweight_sums(int64_t block_rows) { return block_rows > kFoldRows ? 2 : 1; }

// fp64.cpp: rows in double with dtypes read at run time, for fp64 tensors, for the rows out of the
// fast path's range, and for kFp64.
bool wide(const RmsNormForward& p);  // is one of the tensors fp64?
bool wide(const RmsNormBackward& p);
void add_row_fp64(const RmsNormForward& p, int64_t row);
void forward_row_fp64(const RmsNormForward& p, int64_t row, int64_t y_begin);
void forward_fp64(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin);
// partial: [cols], to which dy * xhat is added; nullptr: dx alone.
void backward_row_fp64(const RmsNormBackward& p, int64_t row, float* partial);
void backward_fp64(const RmsNormBackward& p, int64_t block_begin, int64_t block_end);
void dweight_fp64(const RmsNormBackward& p, int64_t col_begin, int64_t col_end);

}  // namespace rmsnorm::cpu
