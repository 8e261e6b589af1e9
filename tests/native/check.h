// What the checks of the kernels share: number formats, tensors between guard zones, the formula in
// long double.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "../../csrc/rmsnorm.h"

using namespace rmsnorm;
using Real = long double;

namespace {

int passed = 0, failed = 0;

void check(bool ok, const char* format, ...) {
  ok ? ++passed : ++failed;
  if (ok || failed > 40) return;
  va_list args;
  va_start(args, format);
  std::printf("FAILED: ");
  std::vprintf(format, args);
  std::printf("\n");
  std::fflush(stdout);
  va_end(args);
}

// ---------------------------------------------------------------- number formats

struct Format {
  const char* name;
  int bytes, fraction_bits, exponent_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint64_t infinity() const { return ((uint64_t(1) << exponent_bits) - 1) << fraction_bits; }
};

const Format& format(DType t) {
  static const Format kFormats[] = {
      {"fp32", 4, 23, 8}, {"fp16", 2, 10, 5}, {"bf16", 2, 7, 8}, {"fp64", 8, 52, 11}};
  return kFormats[int(t)];
}

uint64_t encode(DType t, Real value) {
  const Format& f = format(t);
  const uint64_t sign = uint64_t(std::signbit(value)) << (8 * f.bytes - 1);
  if (std::isnan(value)) return f.infinity() | 1;
  const Real magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  if (std::isinf(magnitude)) return sign | f.infinity();
  // Units of the last place: a carry out of the fraction runs into the exponent, and into Inf, as
  // it should.
  const int exponent = std::max(std::ilogb(magnitude), 1 - f.bias());
  if (exponent > f.bias()) return sign | f.infinity();
  const Real units = std::nearbyint(std::ldexp(magnitude, f.fraction_bits - exponent));
  return sign | (uint64_t(units) + (uint64_t(exponent + f.bias() - 1) << f.fraction_bits));
}

Real decode(DType t, uint64_t bits) {
  const Format& f = format(t);
  const bool negative = bits >> (8 * f.bytes - 1) & 1;
  const uint64_t magnitude = bits & ((uint64_t(1) << (8 * f.bytes - 1)) - 1);
  Real value;
  if (magnitude >= f.infinity()) {
    value = magnitude == f.infinity() ? INFINITY : NAN;
  } else {
    const int exponent = std::max(int(magnitude >> f.fraction_bits), 1);
    const uint64_t hidden = magnitude >> f.fraction_bits ? uint64_t(1) << f.fraction_bits : 0;
    const uint64_t fraction = magnitude & ((uint64_t(1) << f.fraction_bits) - 1);
    value = std::ldexp(Real(hidden | fraction), exponent - f.bias() - f.fraction_bits);
  }
  return negative ? -value : value;
}

Real round_to(DType t, Real value) { return decode(t, encode(t, value)); }

// Distance in units in the last place; any NaN equals any other, and is far from all numbers.
int64_t ulps(DType t, uint64_t a, uint64_t b) {
  const Format& f = format(t);
  const uint64_t sign = uint64_t(1) << (8 * f.bytes - 1);
  const bool a_nan = (a & ~sign) > f.infinity(), b_nan = (b & ~sign) > f.infinity();
  if (a_nan || b_nan) return a_nan && b_nan ? 0 : INT64_MAX;
  const auto ordered = [&](uint64_t v) { return v & sign ? -int64_t(v & ~sign) : int64_t(v); };
  return std::abs(ordered(a) - ordered(b));
}

// ---------------------------------------------------------------- tensors

// Memory that ends where a page does, before one that nobody may touch: the first byte too many
// ends the process.
template <class T>
struct BeforePage {
  using value_type = T;

  static size_t pages_of(size_t count) {
    const size_t page = sysconf(_SC_PAGESIZE);
    return (count * sizeof(T) + page - 1) / page * page;
  }
  T* allocate(size_t count) {
    const size_t pages = pages_of(count), page = sysconf(_SC_PAGESIZE);
    void* const p =
        mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    char* const end = static_cast<char*>(p) + pages;
    mprotect(end, page, PROT_NONE);
    return reinterpret_cast<T*>(end - count * sizeof(T));
  }
  void deallocate(T* p, size_t count) {
    char* const end = reinterpret_cast<char*>(p + count);
    munmap(end - pages_of(count), pages_of(count) + sysconf(_SC_PAGESIZE));
  }
  bool operator==(const BeforePage&) const { return true; }
  bool operator!=(const BeforePage&) const { return false; }
};

// Rows in a buffer of NaN bytes. An output has guard zones, and is aligned as far as its layout
// lets it; an input ends with its buffer.
enum class Layout { kDense, kMisaligned, kStrided, kTwoDims, kExpanded };
constexpr Layout kLayouts[] = {Layout::kDense, Layout::kMisaligned, Layout::kStrided,
                               Layout::kTwoDims};

struct Tensor {
  DType dtype;
  int64_t rows, cols;
  Rows place = {1, {0}, {0}};
  size_t origin = 0;
  std::vector<unsigned char, BeforePage<unsigned char>> bytes;

  Tensor(DType t, int64_t n, int64_t m, Layout layout = Layout::kDense, size_t guard = 0)
      : dtype(t), rows(n), cols(m) {
    const size_t size = format(t).bytes;
    place.size[0] = n;
    place.stride[0] = m;
    origin = guard;
    if (layout == Layout::kMisaligned) origin += size;
    if (layout == Layout::kStrided) place.stride[0] = m + 3;
    if (layout == Layout::kExpanded) place.stride[0] = 0;
    if (layout == Layout::kTwoDims) place = {2, {(n + 1) / 2, 2}, {2 * m + 5, m + 1}};
    int64_t last = 0;
    for (int64_t row = 0; row < n; ++row) last = std::max(last, place.offset(row));
    const size_t length = origin + (last + m) * size + guard;
    bytes.assign(guard ? (length + 63) / 64 * 64 : length, 0xff);
  }
  void* data() { return bytes.data() + origin; }
  unsigned char* at(int64_t row, int64_t col) {
    return bytes.data() + origin + (place.offset(row) + col) * format(dtype).bytes;
  }
  uint64_t bits(int64_t row, int64_t col) {
    uint64_t v = 0;
    std::memcpy(&v, at(row, col), format(dtype).bytes);
    return v;
  }
  Real get(int64_t row, int64_t col) { return decode(dtype, bits(row, col)); }
  void set(int64_t row, int64_t col, Real value) {
    const uint64_t v = encode(dtype, value);
    std::memcpy(at(row, col), &v, format(dtype).bytes);
  }
  bool same_bits(Tensor& other) {
    for (int64_t row = 0; row < rows; ++row)
      if (std::memcmp(at(row, 0), other.at(row, 0), cols * format(dtype).bytes)) return false;
    return true;
  }
  bool guards_intact() {
    std::vector<bool> inside(bytes.size());
    for (int64_t row = 0; row < rows; ++row) {
      const size_t begin = at(row, 0) - bytes.data();
      std::fill_n(inside.begin() + begin, cols * format(dtype).bytes, true);
    }
    for (size_t i = 0; i < bytes.size(); ++i)
      if (!inside[i] && bytes[i] != 0xff) return false;
    return true;
  }
};

constexpr size_t kGuard = 192;  // three vectors of AVX-512

uint64_t random_state = 1;
Real uniform() {  // [-1, 1)
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return std::ldexp(Real(int64_t(random_state)), -63);
}
Real normal() { return (uniform() + uniform() + uniform()) * 1.0L; }

void fill(Tensor& t, const std::function<Real(int64_t, int64_t)>& value) {
  for (int64_t row = 0; row < t.rows; ++row)
    for (int64_t col = 0; col < t.cols; ++col) t.set(row, col, value(row, col));
}
void fill_normal(Tensor& t, Real scale = 1, Real center = 0) {
  fill(t, [&](int64_t, int64_t) { return center + scale * normal(); });
}

// ---------------------------------------------------------------- forward

struct Forward {
  DType x_type, w_type;
  bool weighted = true, cast = false;
  double offset = 0, eps = 1e-6;
  DType y_type() const { return cast && weighted && w_type != x_type ? promoted() : x_type; }
  DType promoted_or_x() const { return w_type != x_type ? promoted() : x_type; }
  DType promoted() const {
    return x_type == DType::kFloat64 || w_type == DType::kFloat64 ? DType::kFloat64
                                                                  : DType::kFloat32;
  }
  DType rstd_type() const { return x_type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  bool wide() const { return x_type == DType::kFloat64 || (weighted && w_type == DType::kFloat64); }
  std::string name() const {
    return std::string(format(x_type).name) + " w=" + (weighted ? format(w_type).name : "none") +
           (cast ? " cast" : "") + (offset != 0 ? " offset" : "");
  }
  Real weight(Tensor& w, int64_t i) const {
    if (!weighted) return 1;
    if (offset == 0) return w.get(0, i);  // a sum would lose the sign of -0
    return wide() ? w.get(0, i) + offset : Real(float(w.get(0, i)) + float(offset));
  }
};

RmsNormForward params(const Forward& f, Tensor& x, Tensor& w, Tensor& y, void* rstd) {
  return {x.data(), f.weighted ? w.data() : nullptr,
          y.data(), rstd,
          x.place,  y.place,
          x.rows,   x.cols,
          f.eps,    f.offset,
          f.cast,   f.x_type,
          f.w_type, f.y_type(),
          false,    {}};
}

Real reference_rstd(const Forward& f, Tensor& x, int64_t row) {
  Real sum = 0;
  for (int64_t i = 0; i < x.cols; ++i) sum += x.get(row, i) * x.get(row, i);
  return 1 / std::sqrt(sum / x.cols + Real(f.eps));
}

// Within 1 ulp of the formula rounded once; within 2 where there are two roundings, of which the
// first may fall to either side if it is closer to a tie than fp32 can tell.
int64_t error(const Forward& f, Real x, Real rstd, Real g, uint64_t y) {
  if (!f.cast) return ulps(f.y_type(), encode(f.y_type(), x * rstd * g), y);
  const Real slack = f.wide() || f.x_type == DType::kFloat32 ? 0 : 0x1p-22L;
  int64_t least = INT64_MAX;
  for (const Real side : {1 - slack, 1 + slack}) {
    const Real xhat = round_to(f.x_type, x * rstd * side);
    least = std::min(least, ulps(f.y_type(), encode(f.y_type(), xhat * g), y));
  }
  return least;
}

// y and r against the formula. exact: y is the formula in double, whose last bits decide ties only.
void compare_forward(const Forward& f, Tensor& x, Tensor& w, Tensor& y, Tensor& r, const char* name,
                     int64_t rstd_bound = 1, bool exact = false, bool in_fp32 = false) {
  int64_t worst = 0, worst_row = 0, worst_col = 0, worst_rstd = 0, other_zeros = 0;
  Real rstd_there = 0;
  for (int64_t row = 0; row < x.rows; ++row) {
    const Real rstd = reference_rstd(f, x, row);
    worst_rstd = std::max(worst_rstd, ulps(r.dtype, encode(r.dtype, rstd), r.bits(0, row)));
    for (int64_t col = 0; col < x.cols; ++col) {
      int64_t e = error(f, x.get(row, col), rstd, f.weight(w, col), y.bits(row, col));
      for (const Real side : {1 - 0x1p-50L, 1 + 0x1p-50L}) {
        if (!exact) break;
        e = std::min(e, error(f, x.get(row, col), rstd * side, f.weight(w, col), y.bits(row, col)));
      }
      if (e > worst) worst = e, worst_row = row, worst_col = col, rstd_there = rstd;
      const Real product = x.get(row, col) * rstd * f.weight(w, col);
      // In fp32 a zero is a sum of two products, which may have other signs.
      other_zeros += (exact || !(in_fp32 || f.x_type == DType::kFloat32)) && product == 0 &&
                     std::signbit(product) != std::signbit(y.get(row, col));
    }
  }
  // Plain double arithmetic in fp64: five roundings, and those of the sum, which grow with
  // sqrt(cols / 8).
  const int64_t fp64_bound = f.rstd_type() == DType::kFloat64 ? 8 : 0;
  // A product of two values of 16 bits is exact in fp32.
  const bool one_rounding = format(f.x_type).bytes == 2 && format(f.w_type).bytes == 2 &&
                            f.y_type() == f.x_type && f.offset == 0;
  check(worst <= std::max<int64_t>(f.cast ? (one_rounding ? 0 : 2) : !exact, fp64_bound),
        "%s: %ld ulp at %ld,%ld: x %Lg y %Lg not %Lg", name, worst, worst_row, worst_col,
        x.get(worst_row, worst_col), y.get(worst_row, worst_col),
        x.get(worst_row, worst_col) * rstd_there * f.weight(w, worst_col));
  check(other_zeros == 0, "%s: %ld zeros of the other sign", name, other_zeros);
  check(worst_rstd <= std::max(rstd_bound, fp64_bound), "%s: rstd %ld ulp", name, worst_rstd);
  check(y.guards_intact() && r.guards_intact(), "%s: wrote outside", name);
}

const DType kFast[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

std::vector<Forward> forward_mixes() {
  std::vector<Forward> mixes;
  for (const DType x : kFast)
    for (const bool cast : {false, true}) {
      mixes.push_back({x, x, false, cast});
      for (const DType w : kFast)
        for (const double offset : {0.0, 1.0}) mixes.push_back({x, w, true, cast, offset});
    }
  return mixes;
}

// A sum that is formed before it is normalized. Its bits are those of the sum rounded once, y's
// those of the norm of that, rounded to the dtype of the input where the residual is a wider one.
// In place: the sum takes the place of the residual, and y that of the input if it has its dtype.
// unrounded: y and rstd are those of the formula, of the sum in fp32.
struct Fused {
  Forward f;
  bool narrow, in_place;
  DType y_type;
  Tensor input, residual, sum, unrounded_sum, w, x, y, rstd;
  bool unrounded = false;

  Fused(const Forward& forward, DType input_type, int64_t rows, int64_t cols, Layout layout,
        bool replace)
      : f(forward),
        narrow(f.x_type == DType::kFloat32 && !f.cast && format(input_type).bytes == 2),
        in_place(replace),
        y_type(narrow ? input_type : f.y_type()),
        input(input_type, rows, cols, layout, kGuard),
        residual(f.x_type, rows, cols, layout, kGuard),
        sum(f.x_type, rows, cols),
        unrounded_sum(DType::kFloat32, rows, cols),
        w(f.w_type, 1, cols),
        x(f.x_type, rows, cols, layout, kGuard),
        y(y_type, rows, cols, layout, kGuard),
        rstd(f.rstd_type(), 1, rows, Layout::kDense, kGuard) {
    fill_normal(input);
    fill_normal(residual, 3);
    fill_normal(w, 0.5, 1);
    if (rows > 2) residual.set(2, 0, 1e30L);
    add();
  }

  void add() {
    const bool in_double = f.x_type == DType::kFloat64 || input.dtype == DType::kFloat64;
    const auto total = [&](int64_t row, int64_t col) {
      const Real left = input.get(row, col), right = residual.get(row, col);
      return in_double ? Real(double(left) + double(right)) : Real(float(left) + float(right));
    };
    fill(sum, total);
    fill(unrounded_sum, total);
  }
  template <class F>
  void fill_addends(const F& value) {
    fill(input, value);
    fill(residual, value);
    add();
  }

  Tensor& x_there() { return in_place ? residual : x; }
  Tensor& y_there() { return in_place && y_type == input.dtype ? input : y; }
  RmsNormForward params() {
    RmsNormForward p = ::params(f, x_there(), w, y_there(), unrounded ? rstd.data() : nullptr);
    p.y_dtype = y_type;
    p.addends = {input.data(), residual.data(), input.dtype,
                 input.place,  residual.place,  unrounded};
    return p;
  }
  bool is_unrounded() const { return unrounded && format(f.x_type).bytes == 2; }
  // norm: that of `sum`, by the same kernels.
  // in_fp32: an unrounded sum is normalized by the kernels of fp32 rows.
  void compare(Tensor& norm, const char* where, int64_t rstd_bound = 1, bool in_fp32 = false) {
    const std::string name = std::string(unrounded ? "unrounded " : "fused ") + where + " " +
                             f.name() + " input=" + format(input.dtype).name + " " +
                             std::to_string(sum.rows) + "x" + std::to_string(sum.cols) +
                             (in_place ? " in place" : "");
    if (is_unrounded()) {
      compare_forward(f, unrounded_sum, w, y_there(), rstd, name.c_str(), rstd_bound,
                      /*exact=*/false, in_fp32);
      int64_t others = 0;  // a rounded sum has a norm within an ulp too
      for (int64_t row = 0; row < sum.rows; ++row) {
        const Real of_row = reference_rstd(f, unrounded_sum, row);
        for (int64_t col = 0; col < sum.cols; ++col)
          others += error(f, unrounded_sum.get(row, col), of_row, f.weight(w, col),
                          y_there().bits(row, col)) != 0;
      }
      check(others <= 2 + sum.rows * sum.cols / 100, "%s: %ld are not rounded to nearest",
            name.c_str(), others);
      check(x_there().same_bits(sum), "%s: sum", name.c_str());
      check(x_there().guards_intact(), "%s: wrote outside", name.c_str());
      return;
    }
    bool same = true;
    for (int64_t row = 0; row < sum.rows; ++row)
      for (int64_t col = 0; col < sum.cols; ++col)
        same &= ulps(y_type, y_there().bits(row, col), encode(y_type, norm.get(row, col))) == 0;
    check(same, "%s: y", name.c_str());
    check(x_there().same_bits(sum), "%s: sum", name.c_str());
    check(x_there().guards_intact() && y_there().guards_intact(), "%s: wrote outside",
          name.c_str());
  }
};

// ---------------------------------------------------------------- backward

struct Backward {
  Forward f;
  DType dy_type;
  Tensor x, dy, w, rstd, dresidual;
  bool with_dresidual = false;

  Backward(const Forward& forward, DType dy_dtype, int64_t rows, int64_t cols,
           Layout layout = Layout::kDense)
      : f(forward),
        dy_type(dy_dtype),
        x(f.x_type, rows, cols, layout),
        dy(dy_type, rows, cols, layout),
        w(f.w_type, 1, cols),
        rstd(f.rstd_type(), 1, rows),
        dresidual(f.x_type, rows, cols, layout) {
    fill_normal(dresidual);
    fill_normal(x);
    fill_normal(dy);
    fill_normal(w, 0.2, f.offset != 0 ? 0 : 1);
  }
  std::string name() {
    return f.name() + " dy=" + format(dy_type).name + " " + std::to_string(x.rows) + "x" +
           std::to_string(x.cols);
  }
};

struct Gradients {
  Tensor dx, dweight;
  explicit Gradients(Backward& b)
      : dx(b.f.x_type, b.x.rows, b.x.cols, Layout::kDense, kGuard),
        dweight(b.f.w_type, 1, b.x.cols, Layout::kDense, kGuard) {}
  bool same_bits(Gradients& other) {
    return dx.same_bits(other.dx) && dweight.same_bits(other.dweight);
  }
  bool guards_intact() { return dx.guards_intact() && dweight.guards_intact(); }
};

// Each tolerance: half an ulp of the result (its one rounding), plus the roundings before it, each
// a unit of the compute type, times the sum of the magnitudes that were rounded.
struct BackwardReference {
  Backward& b;
  int64_t rows, cols;
  Real unit;
  std::vector<Real> dweight, dweight_size, dx, dx_size;

  explicit BackwardReference(Backward& of) : b(of), rows(of.x.rows), cols(of.x.cols) {
    unit = b.f.wide() || b.dy_type == DType::kFloat64 ? 0x1p-52L : 0x1p-23L;
    dweight.resize(cols), dweight_size.resize(cols), dx.resize(rows * cols),
        dx_size.resize(rows * cols);
    for (int64_t row = 0; row < rows; ++row) {
      const Real r = reference_rstd(b.f, b.x, row);
      Real c = 0, c_size = 0;
      for (int64_t i = 0; i < cols; ++i) {
        const Real xhat = b.x.get(row, i) * r, t = b.f.weight(b.w, i) * b.dy.get(row, i) * xhat;
        c += t / cols;
        c_size += std::fabs(t) / cols;
        const Real rounded = b.f.cast ? round_to(b.f.x_type, xhat) : xhat;
        dweight[i] += b.dy.get(row, i) * rounded;
        // A first rounding close to a tie may fall to either side: one unit of x's format.
        const Real tie = b.f.cast && unit > 0x1p-30L
                             ? std::ldexp(1.0L, -format(b.f.x_type).fraction_bits) / unit
                             : 0;
        dweight_size[i] +=
            std::fabs(b.dy.get(row, i) * xhat) * (2 + std::min<int64_t>(rows, 8) + tie);
      }
      for (int64_t i = 0; i < cols; ++i) {
        const Real xhat = b.x.get(row, i) * r, gdy = b.f.weight(b.w, i) * b.dy.get(row, i);
        dx[row * cols + i] =
            r * (gdy - xhat * c) + (b.with_dresidual ? b.dresidual.get(row, i) : 0);
        dx_size[row * cols + i] =
            r * (3 * std::fabs(gdy) + std::fabs(xhat) * (3 * std::fabs(c) + 3 * c_size));
        if (b.with_dresidual)
          dx_size[row * cols + i] += std::fabs(dx[row * cols + i]);  // the sum rounds once more
      }
    }
  }

  bool close(DType type, Real got, Real expected, Real size) const {
    if (std::isnan(expected) || std::isnan(size)) return bool(std::isnan(got));
    const int64_t exponent = expected == 0 ? -20000 : std::ilogb(expected);
    const Real ulp = std::ldexp(
        1.0L, std::max<int64_t>(exponent, 1 - format(type).bias()) - format(type).fraction_bits);
    return got == round_to(type, expected) ||
           std::fabs(got - expected) <= ulp * 0.5001L + unit * size;
  }

  void compare(Gradients& got, const char* name) {
    bool dx_close = true, dweight_close = true;
    for (int64_t i = 0; i < cols; ++i) {
      const bool ok = close(b.f.w_type, got.dweight.get(0, i), dweight[i], dweight_size[i]);
      if (!ok && dweight_close) {
        std::printf("dweight[%ld] = %Lg, not %Lg\n", i, got.dweight.get(0, i), dweight[i]);
      }
      dweight_close &= ok;
      for (int64_t row = 0; row < rows; ++row) {
        const bool fine =
            close(b.f.x_type, got.dx.get(row, i), dx[row * cols + i], dx_size[row * cols + i]);
        if (!fine && dx_close) {
          std::printf("dx[%ld][%ld] = %Lg, not %Lg\n", row, i, got.dx.get(row, i),
                      dx[row * cols + i]);
        }
        dx_close &= fine;
      }
    }
    check(dx_close, "%s: dx", name);
    check(dweight_close, "%s: dweight", name);
    check(got.guards_intact(), "%s: wrote outside", name);
  }
};

RmsNormBackward params(Backward& b, Gradients& to, bool want_dx, bool want_dweight) {
  return {b.dy.data(),
          b.x.data(),
          b.f.weighted ? b.w.data() : nullptr,
          b.rstd.data(),
          b.with_dresidual ? b.dresidual.data() : nullptr,
          want_dx ? to.dx.data() : nullptr,
          want_dweight ? to.dweight.data() : nullptr,
          nullptr,
          b.dy.place,
          b.x.place,
          b.dresidual.place,
          b.x.rows,
          b.x.cols,
          b.f.eps,
          b.f.offset,
          b.f.cast,
          b.dy_type,
          b.f.x_type,
          b.f.w_type,
          false};
}

}  // namespace
