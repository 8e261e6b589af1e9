// Norms with a gate, and norms of groups of columns: the steps of an instruction set (gated.inl and
// the norm's own), a few rows at a time, with what lies between them in tiles. Where y is quantized
// and not wanted itself, it is a tile too.
#include <algorithm>
#include <type_traits>

#include "fresh.h"

namespace rmsnorm::cpu {
namespace {

constexpr DType kDouble = DType::kFloat64;

// What is computed in, and the tiles are of.
DType compute_type(const RmsNormGated& p) {
  return has_fp64(p.norm) || p.gate.dtype == kDouble ? kDouble : DType::kFloat32;
}
DType compute_type(const RmsNormGatedBackward& p) {
  return has_fp64(p.norm) || p.gate.dtype == kDouble ? kDouble : DType::kFloat32;
}
template <class P>
const Kernels& kernels_for(const P& p) {
  return compute_type(p) == kDouble ? kFp64 : kernels();
}

// Of a product of two tensors.
DType promoted(DType a, DType b) {
  if (a == b) return a;
  return a == kDouble || b == kDouble ? kDouble : DType::kFloat32;
}

template <class T>
T* behind(T* data, int64_t elements, DType dtype) {
  using Bytes = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data ? reinterpret_cast<Bytes*>(data) + elements * size_of(dtype) : nullptr;
}

// One group of columns: `first` is its first. What lies there of the tensors that both directions
// have.
template <class P>
P group_of(const P& p, int64_t group, int64_t& first) {
  P result = p;
  auto& norm = result.norm;
  norm.cols /= p.groups;
  first = group * norm.cols;
  norm.x = behind(norm.x, first, norm.x_dtype);
  norm.weight = behind(norm.weight, first, norm.w_dtype);
  const DType normalized = p.gate.before_norm ? compute_type(p) : norm.x_dtype;
  norm.rstd = behind(norm.rstd, group * norm.rows, promoted(normalized, DType::kFloat32));
  norm.cast_before_weight = norm.cast_before_weight && norm.weight;
  result.gate.data = behind(p.gate.data, first, p.gate.dtype);
  result.groups = 1;
  return result;
}
RmsNormGated group_of(const RmsNormGated& p, int64_t group) {
  int64_t first;
  RmsNormGated result = group_of(p, group, first);
  result.norm.y = behind(p.norm.y, first, p.norm.y_dtype);
  return result;
}
// The sums of a block for dweight lie behind those of the groups before it.
RmsNormGatedBackward group_of(const RmsNormGatedBackward& p, int64_t group) {
  int64_t first;
  RmsNormGatedBackward result = group_of(p, group, first);
  RmsNormBackward& norm = result.norm;
  norm.dy = behind(norm.dy, first, norm.dy_dtype);
  norm.dx = behind(norm.dx, first, norm.x_dtype);
  norm.dweight = behind(norm.dweight, first, norm.w_dtype);
  result.dgate = behind(p.dgate, first, p.gate.dtype);
  const int64_t bytes = rms_norm_backward_plan(norm).workspace_bytes;
  if (norm.workspace) norm.workspace = static_cast<char*>(norm.workspace) + group * bytes;
  return result;
}

// A workspace, cut into tiles; of a null one how much they take.
class Tiles {
 public:
  explicit Tiles(void* workspace) : next_(static_cast<char*>(workspace)) {}

  void* take(int64_t rows, int64_t cols, DType dtype) {
    const int64_t bytes = (rows * cols * size_of(dtype) + kLine - 1) / kLine * kLine;
    if (bytes == 0) return nullptr;
    char* const taken = next_;
    bytes_ += bytes;
    if (next_) next_ += bytes;
    return taken;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* next_;
  int64_t bytes_ = 0;
};

Rows dense(int64_t cols) { return {1, {}, {cols}}; }
RowsAt tile_at(void* tile, int64_t row, int64_t cols, DType dtype) {
  return {tile, dense(cols), dtype, row};
}
// Of an fp64 gate alone a norm knows nothing: it would add the offset in fp32.
void set_weight(RmsNormForward& norm, void* weight_with_offset) {
  norm.weight = weight_with_offset;
  norm.w_dtype = kDouble;
  norm.weight_offset = 0;
}
// For what takes no first row: where row 0 would be.
void* row_0_of(void* tile, int64_t row, int64_t cols, DType dtype) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(tile) - row * cols * size_of(dtype));
}

// ---------------------------------------------------------------- forward

struct ForwardTiles {
  int64_t rows;  // at a time
  void *tile, *rounded;
  void* weight;  // with its offset; nullptr: it is read as it is
  void* y;       // of whole rows
  int64_t bytes;

  ForwardTiles(const RmsNormGated& p, void* workspace) {
    const DType type = compute_type(p);
    const int64_t cols = p.norm.cols / p.groups, row_bytes = cols * size_of(type);
    const int64_t wanted = std::max(gated_tile_bytes() / row_bytes, kLeastGatedRows);
    int64_t most = tile_bytes() / row_bytes;
    const bool holds_y = p.norm.quant.data && !p.norm.y;
    if (holds_y) most = std::min(most, tile_bytes() / (p.norm.cols * size_of(p.norm.y_dtype)));
    rows = std::clamp<int64_t>(std::min(wanted, most), 1, p.norm.rows);
    Tiles tiles(workspace);
    y = tiles.take(holds_y ? rows : 0, p.norm.cols, p.norm.y_dtype);
    tile = tiles.take(rows, cols, type);
    const bool is_cast = p.norm.cast_before_weight && p.norm.weight, first = p.gate.before_norm;
    rounded = tiles.take(is_cast && first ? rows : 0, cols, p.norm.x_dtype);
    weight =
        tiles.take(is_cast && (first || type == kDouble) && p.norm.weight_offset != 0, cols, type);
    bytes = tiles.bytes();
  }
};

// Some rows of one group, as many as the tiles hold. y starts with row y_begin. Those of the next
// tile, before `last`, are fetched while the gate of these has the processor busy.
void forward(const Kernels& chosen, const RmsNormGated& p, const ForwardTiles& tiles, int64_t row,
             int64_t end, int64_t last, int64_t y_begin) {
  const RmsNormForward& norm = p.norm;
  const DType type = compute_type(p);
  const RowsAt x{norm.x, norm.x_rows, norm.x_dtype, 0};
  const RowsAt y{norm.y, norm.y_rows, norm.y_dtype, y_begin};
  const RowsAt gate{p.gate.data, p.gate.rows, p.gate.dtype, 0};
  if (!p.gate.data) return chosen.forward(norm, row, end, y_begin);
  GatedRows gated{};
  gated.gate = gate;
  gated.cols = norm.cols;
  gated.activation = p.gate.activation;
  gated.fetch_x = &x, gated.fetch_gate = &gate;
  gated.ahead = tiles.rows, gated.fetch_end = last;
  RmsNormForward inner = norm;
  if (!p.gate.before_norm) {
    inner.stream = false;
    inner.y = tiles.tile;
    inner.y_rows = dense(norm.cols);
    inner.y_dtype = norm.cast_before_weight ? promoted(norm.x_dtype, norm.w_dtype) : type;
    if (tiles.weight) set_weight(inner, tiles.weight);
    chosen.forward(inner, row, end, row);
    gated.v = tile_at(tiles.tile, row, norm.cols, inner.y_dtype);
    gated.result = y;
    gated.stream = norm.stream;
    return chosen.gate(gated, row, end);
  }
  gated.v = x;
  gated.result = tile_at(tiles.tile, row, norm.cols, type);
  chosen.gate(gated, row, end);
  inner.x = row_0_of(tiles.tile, row, norm.cols, type);
  inner.x_rows = dense(norm.cols);
  inner.x_dtype = type;
  if (!norm.cast_before_weight) return chosen.forward(inner, row, end, y_begin);
  // Rounded to x's own dtype, and then multiplied by the weight.
  inner.weight = nullptr;
  inner.cast_before_weight = inner.stream = false;
  inner.y = tiles.rounded;
  inner.y_rows = dense(norm.cols);
  inner.y_dtype = norm.x_dtype;
  chosen.forward(inner, row, end, row);
  gated.v = tile_at(tiles.rounded, row, norm.cols, norm.x_dtype);
  gated.gate = {tiles.weight ? tiles.weight : norm.weight,
                {1, {}, {0}},
                tiles.weight ? type : norm.w_dtype,
                0};
  gated.activation = kIdentity;
  gated.result = y;
  gated.stream = norm.stream;
  gated.fetch_x = gated.fetch_gate = nullptr;
  chosen.gate(gated, row, end);
}

// ---------------------------------------------------------------- backward

struct BackwardTiles {
  void *dy, *v, *dx, *ones, *weight;
  DType dx_dtype;
  int64_t bytes;

  BackwardTiles(const RmsNormGatedBackward& p, void* workspace) {
    const DType type = compute_type(p);
    const int64_t cols = p.norm.cols / p.groups;
    const int64_t rows = rms_norm_gated_backward_plan(p).block_rows;
    const bool gated = p.gate.data, before_norm = gated && p.gate.before_norm;
    Tiles tiles(workspace);
    dy = tiles.take(gated && !before_norm ? rows : 0, cols, type);
    v = tiles.take(gated ? rows : 0, cols, type);
    dx_dtype = before_norm ? type : p.norm.x_dtype;
    dx = tiles.take(before_norm || p.groups > 1 ? rows : 0, cols, dx_dtype);
    ones = tiles.take(p.groups > 1, cols, type);
    const bool casts = p.norm.cast_before_weight && p.norm.weight && p.norm.weight_offset != 0;
    weight = tiles.take(gated && !before_norm && casts && type == kDouble, cols, type);
    bytes = tiles.bytes();
  }
};

// A block of one group.
class GroupBackward {
 public:
  // all_cols: of all groups, among which dx and dgate lie.
  GroupBackward(const RmsNormGatedBackward& params, const BackwardTiles& t, int64_t block_index,
                int64_t all_cols)
      : p(params), tiles(t), block(block_index) {
    dx = {norm.dx, dense(all_cols), norm.x_dtype, 0};
    gated.gate = {p.gate.data, p.gate.rows, p.gate.dtype, 0};
    gated.dgate = {p.dgate, dense(all_cols), p.gate.dtype, 0};
    gated.cols = cols;
    gated.activation = p.gate.activation;
  }

  void run() {
    if (p.gate.data && p.gate.before_norm) return of_gated_x();
    RmsNormBackward inner = norm;
    gated.stream = norm.stream;
    if (p.gate.data) {
      gate_dy();
      inner.dy = row_0_of(tiles.dy, row, cols, type);
      inner.dy_rows = dense(cols);
      inner.dy_dtype = type;
    }
    if (!norm.dx && !norm.dweight) return;
    const bool by_tile = norm.dx && tiles.ones;  // of several groups
    if (by_tile) {
      inner.dx = row_0_of(tiles.dx, row, cols, tiles.dx_dtype);
      inner.stream = false;
    }
    chosen.backward(inner, block, block + 1);
    if (!by_tile) return;
    gated.v = {tiles.ones, {1, {}, {0}}, type, 0};
    gated.gate = tile_at(tiles.dx, row, cols, tiles.dx_dtype);
    gated.activation = kIdentity;
    gated.result = dx;
    chosen.gate(gated, row, end);
  }

 private:
  // dy becomes that of the norm; and dgate, for which the norm is formed again.
  void gate_dy() {
    const RowsAt dy{norm.dy, norm.dy_rows, norm.dy_dtype, 0};
    gated.result = tile_at(tiles.dy, row, cols, type);
    if (!p.dgate) {
      gated.v = dy;
      gated.stream = false;
      chosen.gate(gated, row, end);
      gated.stream = norm.stream;
      return;
    }
    RmsNormForward again{};
    again.x = norm.x, again.x_rows = norm.x_rows, again.x_dtype = norm.x_dtype;
    again.weight = norm.weight, again.w_dtype = norm.w_dtype;
    again.weight_offset = norm.weight_offset;
    again.cast_before_weight = norm.cast_before_weight;
    again.rows = norm.rows, again.cols = cols, again.eps = norm.eps;
    again.y = tiles.v, again.y_rows = dense(cols);
    again.y_dtype = norm.cast_before_weight ? promoted(norm.x_dtype, norm.w_dtype) : type;
    if (tiles.weight) {
      weight_row_fp64(again, type, tiles.weight);
      set_weight(again, tiles.weight);
    }
    chosen.forward(again, row, end, row);
    gated.d = dy;
    gated.v = tile_at(tiles.v, row, cols, again.y_dtype);
    chosen.gate_gradients(gated, row, end);
  }

  void of_gated_x() {
    const RowsAt x{norm.x, norm.x_rows, norm.x_dtype, 0};
    gated.v = x;
    gated.result = tile_at(tiles.v, row, cols, type);
    chosen.gate(gated, row, end);
    RmsNormBackward inner = norm;
    inner.x = row_0_of(tiles.v, row, cols, type);
    inner.x_rows = dense(cols);
    inner.x_dtype = type;
    const bool wants_dx = norm.dx || p.dgate;
    inner.dx = wants_dx ? row_0_of(tiles.dx, row, cols, type) : nullptr;
    inner.stream = false;
    chosen.backward(inner, block, block + 1);
    if (!wants_dx) return;
    gated.stream = norm.stream;
    gated.result = norm.dx ? dx : gated.result;
    gated.d = gated.v = tile_at(tiles.dx, row, cols, type);
    if (!p.dgate) return chosen.gate(gated, row, end);
    gated.v = x;
    chosen.gate_gradients(gated, row, end);
  }

  const RmsNormGatedBackward& p;
  const BackwardTiles& tiles;
  const int64_t block;
  const RmsNormBackward& norm = p.norm;
  const Kernels& chosen = kernels_for(p);
  const DType type = compute_type(p);
  const int64_t cols = norm.cols, block_rows = rms_norm_backward_plan(norm).block_rows;
  const int64_t row = block * block_rows, end = std::min(row + block_rows, norm.rows);
  RowsAt dx;
  GatedRows gated{};
};

}  // namespace

int64_t rms_norm_gated_workspace(const RmsNormGated& p) { return ForwardTiles(p, nullptr).bytes; }

void rms_norm_gated_forward(const RmsNormGated& p, int64_t row_begin, int64_t row_end,
                            void* workspace) {
  const Kernels& chosen = kernels_for(p);
  const ForwardTiles tiles(p, workspace);
  RmsNormGated whole = p;
  if (tiles.y) {
    whole.norm.y = tiles.y;
    whole.norm.y_rows = dense(p.norm.cols);
  }
  const auto run = [&](int64_t begin, int64_t last) {
    for (int64_t row = begin, end; row < last; row = end) {
      end = std::min(row + tiles.rows, last);
      const int64_t y_begin = tiles.y ? row : 0;
      for (int64_t group = 0; group < p.groups; ++group) {
        const RmsNormGated part = group_of(whole, group);
        if (tiles.weight && (p.groups > 1 || row == row_begin)) {
          weight_row_fp64(part.norm, compute_type(p), tiles.weight);
        }
        forward(chosen, part, tiles, row, end, row_end, y_begin);
      }
      if (p.norm.quant.data) chosen.quantize(whole.norm, row, end, y_begin);
    }
  };
  map_and_forward(p.norm, row_begin, row_end, run);
}

BackwardPlan rms_norm_gated_backward_plan(const RmsNormGatedBackward& p) {
  RmsNormBackward norm = p.norm;
  norm.cols /= p.groups;
  BackwardPlan plan = rms_norm_backward_plan(norm);
  plan.workspace_bytes *= p.groups;
  return plan;
}

int64_t rms_norm_gated_backward_workspace(const RmsNormGatedBackward& p) {
  return BackwardTiles(p, nullptr).bytes;
}

void rms_norm_gated_backward(const RmsNormGatedBackward& p, int64_t block_begin, int64_t block_end,
                             void* workspace) {
  const BackwardTiles tiles(p, workspace);
  if (tiles.ones) {  // the weight of none
    RmsNormForward none{};
    none.cols = p.norm.cols / p.groups;
    weight_row_fp64(none, compute_type(p), tiles.ones);
  }
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t group = 0; group < p.groups; ++group) {
        const RmsNormGatedBackward part = group_of(p, group);
        GroupBackward(part, tiles, block, p.norm.cols).run();
      }
    }
  };
  const int64_t block_rows = rms_norm_gated_backward_plan(p).block_rows;
  map_and_backward(p.norm, block_rows, block_begin, block_end, run, p.dgate, p.gate.dtype);
}

void rms_norm_gated_backward_dweight(const RmsNormGatedBackward& p, int64_t col_begin,
                                     int64_t col_end) {
  const int64_t cols = p.norm.cols / p.groups;
  for (int64_t begin = col_begin, end; begin < col_end; begin = end) {
    const int64_t group = begin / cols, first = group * cols;
    end = std::min(first + cols, col_end);
    const RmsNormGatedBackward part = group_of(p, group);
    kernels_for(p).dweight(part.norm, begin - first, end - first);
  }
}

}  // namespace rmsnorm::cpu
