// What the files of csrc/cpu/ share. Nothing here is seen outside of librmsnorm.so.
#pragma once
#include <cstdint>

#include "../rmsnorm.h"
#include "../weight_offset.h"
#include "tuning.h"

// The x86 instruction sets are opened by GCC's target pragma, which clang does not have: there and
// on every other machine the scalar kernels are the only ones.
#ifndef RMSNORM_X86
#define RMSNORM_X86 (__x86_64__ && __GNUC__ && !__clang__)
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace rmsnorm::cpu {

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

enum class Half : uint16_t {};
enum class BFloat16 : uint16_t {};

// The weights that the fast path for fp32 takes, besides 0: at least 2 to this, and less than 2^128
// times that. Their product with an rstd stays normal.
constexpr int kMinWeightExponent = -70;

// If x and weight are at least 2 to this (the weight may also be 0), x * rstd * weight is no
// denormal.
constexpr int kSmallExponent = -31;

// Heads that are rotated on their way from one tensor, or a tile, to another.
struct RotatedRows {
  const void* from;
  void* to;
  Rows from_rows, to_rows;
  int64_t from_begin, to_begin;  // the rows that they start with: 0, or the first one of a tile
  int64_t rows_per_token, heads_per_row, head_cols;
  DType from_dtype, to_dtype;
  bool reversed;  // by the negative angles, as gradients are
};

// Rows as they lie, or a tile of some: `begin` is the first.
struct RowsAt {
  const void* data;
  Rows rows;
  DType dtype;
  int64_t begin;

  int64_t offset(int64_t row) const { return rows.offset(row - begin); }
};

// Rows that are multiplied by a gate's activation. Of gradients: d of a result, which is v *
// act(gate), is turned into those of v and of the gate.
struct GatedRows {
  RowsAt v, gate, result;  // result: v * act(gate); of gradients d * act(gate)
  RowsAt d, dgate;         // of gradients; dgate: d * v * act'(gate)
  int64_t cols;
  Activation activation;
  bool stream;  // the result, or dgate, as of RmsNormForward
  // Of these, which may be nullptr, the row `ahead` of each is fetched, if it is before fetch_end.
  const RowsAt *fetch_x, *fetch_gate;
  int64_t ahead, fetch_end;
};
constexpr Activation kIdentity{-1};  // the gate itself, of a forward alone

// One instruction set.
struct Kernels {
  const char* name;
  // p.y starts with row y_begin: 0, or the first one in a workspace.
  void (*forward)(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin);
  void (*backward)(const RmsNormBackward& p, int64_t block_begin, int64_t block_end);
  void (*dweight)(const RmsNormBackward& p, int64_t col_begin, int64_t col_end);
  void (*quantize)(const RmsNormForward& p, int64_t row_begin, int64_t row_end, int64_t y_begin);
  void (*gate)(const GatedRows& rows, int64_t row_begin, int64_t row_end);
  void (*gate_gradients)(const GatedRows& rows, int64_t row_begin, int64_t row_end);
  void (*rotate)(const Rope& rope, const RotatedRows& rows, int64_t row_begin, int64_t row_end);
  // Norm and rotation of a row at once. False: that is not for these tensors, and nothing is done.
  // tile: a row of it. nullptr: for none.
  bool (*rope_forward)(const RmsNormRope& p, int64_t row_begin, int64_t row_end, void* tile);
};
// The first: every row in double, of fp64 tensors too, which the others do not take.
extern const Kernels kFp64, kScalar, kAvx2, kAvx512, kAvx512Bf16;

const Kernels& kernels();  // those in use

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

// Are y and rstd of another sum than x is?
inline bool is_unrounded(const RmsNormForward& p) {
  return p.addends.input && p.addends.unrounded && size_of(p.x_dtype) == 2;
}

// fp64.cpp: a row in double with dtypes read at run time, for those out of the fast path's range.
bool has_fp64(const RmsNormForward& p);  // is one of the tensors fp64?
bool has_fp64(const RmsNormBackward& p);
void add_row_fp64(const RmsNormForward& p, int64_t row);
// Of an unrounded sum: of its squares. And forward_row_fp64() forms x too.
double sum_of_squares_fp64(const RmsNormForward& p, int64_t row);
void forward_row_fp64(const RmsNormForward& p, int64_t row, int64_t y_begin);
// The weight with its offset, to a row of that type; without one, ones.
void weight_row_fp64(const RmsNormForward& p, DType to_dtype, void* to);
// partial: [cols], to which dy * xhat is added; nullptr: dx alone.
template <class T>
void backward_row_fp64(const RmsNormBackward& p, int64_t row, T* partial);

}  // namespace rmsnorm::cpu
