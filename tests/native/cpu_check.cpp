// The CPU kernels against the formula in long double, without torch:
//   g++ -std=c++17 -O2 -ffp-contract=off tests/native/cpu_check.cpp csrc/cpu/*.cpp -o cpu_check && ./cpu_check
// or with the objects of the build in place of csrc/cpu/*.cpp. Also with -fsanitize=address,undefined. Every instruction
// set that the machine has is run. Silent but for failures and the last line.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
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
  static const Format kFormats[] = {{"fp32", 4, 23, 8}, {"fp16", 2, 10, 5}, {"bf16", 2, 7, 8}, {"fp64", 8, 52, 11}};
  return kFormats[int(t)];
}

uint64_t encode(DType t, Real value) {
  const Format& f = format(t);
  const uint64_t sign = uint64_t(std::signbit(value)) << (8 * f.bytes - 1);
  if (std::isnan(value)) return f.infinity() | 1;
  const Real magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  if (std::isinf(magnitude)) return sign | f.infinity();
  // Units of the last place: a carry out of the fraction runs into the exponent, and into Inf, as it should.
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

// Rows in a buffer of NaN bytes. An output has guard zones; an input ends with its buffer, where a
// sanitizer sees the first byte too many.
enum class Layout { kDense, kMisaligned, kStrided, kTwoDims, kExpanded };
constexpr Layout kLayouts[] = {Layout::kDense, Layout::kMisaligned, Layout::kStrided, Layout::kTwoDims};

struct Tensor {
  DType dtype;
  int64_t rows, cols;
  Rows place = {1, {0}, {0}};
  size_t origin = 0;
  std::vector<unsigned char> bytes;

  Tensor(DType t, int64_t n, int64_t m, Layout layout = Layout::kDense, size_t guard = 0) : dtype(t), rows(n), cols(m) {
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
    bytes.assign(origin + (last + m) * size + guard, 0xff);
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

// ---------------------------------------------------------------- instruction sets

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::isa_count(); ++i)
    if (cpu::isa_supported(i)) names.push_back(cpu::isa_name(i));
  return names;
}

void use(const std::string& isa) { check(cpu::set_isa(isa.c_str()) && isa == cpu::isa(), "set_isa(%s)", isa.c_str()); }

void check_instruction_sets() {
  check(!std::strcmp(cpu::last_isa(), ""), "last_isa() before the first kernel");
  check(!cpu::set_isa("sse9"), "set_isa of an unknown name");
  check(instruction_sets().front() == "scalar", "scalar is always there");
  check(cpu::set_isa(nullptr) && cpu::isa() == instruction_sets().back(), "the best is the default");
}

// ---------------------------------------------------------------- forward

struct Forward {
  DType x_type, w_type;
  bool weighted = true, cast = false;
  double offset = 0, eps = 1e-6;
  DType y_type() const { return cast && weighted && w_type != x_type ? promoted() : x_type; }
  DType promoted() const {
    return x_type == DType::kFloat64 || w_type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }
  DType rstd_type() const { return x_type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  bool wide() const { return x_type == DType::kFloat64 || (weighted && w_type == DType::kFloat64); }
  std::string name() const {
    return std::string(format(x_type).name) + " w=" + (weighted ? format(w_type).name : "none") + (cast ? " cast" : "") +
           (offset != 0 ? " offset" : "");
  }
  Real weight(Tensor& w, int64_t i) const {
    if (!weighted) return 1;
    return wide() ? w.get(0, i) + offset : Real(float(w.get(0, i)) + float(offset));
  }
};

RmsNormForward params(const Forward& f, Tensor& x, Tensor& w, Tensor& y, void* rstd) {
  return {x.data(), f.weighted ? w.data() : nullptr, y.data(), rstd,     x.place,  y.place, x.rows,
          x.cols,   f.eps,                           f.offset, f.cast,   f.x_type, f.w_type, f.y_type()};
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

// Runs f on every instruction set, checks each against the formula and all against each other.
void check_forward(const Forward& f, Tensor& x, Tensor& w, Layout y_layout, const char* what) {
  const int64_t rows = x.rows, cols = x.cols;
  std::vector<Real> rstd(rows);
  for (int64_t row = 0; row < rows; ++row) rstd[row] = reference_rstd(f, x, row);
  std::vector<Tensor> results;
  const std::vector<std::string> isas = instruction_sets();
  for (const std::string& isa : isas) {
    use(isa);
    Tensor& y = results.emplace_back(f.y_type(), rows, cols, y_layout, kGuard);
    Tensor r(f.rstd_type(), 1, rows, Layout::kDense, kGuard);
    cpu::rms_norm_forward(params(f, x, w, y, r.data()), 0, rows);
    const std::string run = std::string(what) + ": " + isa + " " + f.name() + " " + std::to_string(rows) + "x" +
                            std::to_string(cols);
    const char* name = run.c_str();
    int64_t worst = 0, worst_row = 0, worst_col = 0, worst_rstd = 0;
    for (int64_t row = 0; row < rows; ++row) {
      worst_rstd = std::max(worst_rstd, ulps(r.dtype, encode(r.dtype, rstd[row]), r.bits(0, row)));
      for (int64_t col = 0; col < cols; ++col) {
        const int64_t e = error(f, x.get(row, col), rstd[row], f.weight(w, col), y.bits(row, col));
        if (e > worst) worst = e, worst_row = row, worst_col = col;
      }
    }
    // Plain double arithmetic in fp64: five roundings, and those of the sum, which grow with sqrt(cols / 8).
    const int64_t fp64_bound = f.rstd_type() == DType::kFloat64 ? 8 : 0;
    check(worst <= std::max<int64_t>(f.cast ? 2 : 1, fp64_bound), "%s: %ld ulp at %ld,%ld: x %Lg y %Lg not %Lg", name,
          worst, worst_row, worst_col, x.get(worst_row, worst_col), y.get(worst_row, worst_col),
          x.get(worst_row, worst_col) * rstd[worst_row] * f.weight(w, worst_col));
    check(worst_rstd <= std::max<int64_t>(1, fp64_bound), "%s: rstd %ld ulp", name, worst_rstd);
    check(y.guards_intact() && r.guards_intact(), "%s: wrote outside", name);
    check(f.wide() || isa == cpu::last_isa(), "%s: ran %s", name, cpu::last_isa());
    // Products of 16-bit values are exact in fp32, with or without FMA.
    if (results.size() == 1 || (results.size() == 2 && f.x_type == DType::kFloat32)) continue;
    check(y.same_bits(results[results.size() - 2]), "%s: not the bits of the ISA below", name);
  }
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

// Around one vector, one block of 64 lanes, one fold (256), a tile of weights (4096), and sizes of models.
const int64_t kSizes[] = {1,   2,   3,   4,   5,   7,   8,   9,   15,  16,  17,  31,   32,   33,   48,   63,   64,  65,
                          80,  96,  127, 128, 129, 191, 255, 256, 257, 319, 511, 1000, 1024, 1025, 4095, 4096, 4097};
const int64_t kLongSizes[] = {8191, 8192, 8193, 20000};

void check_forward_sizes() {
  int turn = 0;
  for (const Forward& f : forward_mixes()) {
    const auto run = [&](int64_t cols, int64_t rows) {
      Tensor x(f.x_type, rows, cols, kLayouts[turn % 4]), w(f.w_type, 1, cols, kLayouts[turn / 4 % 2]);
      fill_normal(x, std::ldexp(1.0L, turn % 7 - 3));
      fill_normal(w, 0.5, f.offset != 0 ? 0 : 1);
      check_forward(f, x, w, kLayouts[turn / 3 % 4], "sizes");
      ++turn;
    };
    for (const int64_t cols : kSizes) run(cols, cols < 300 ? 6 : 1);
    if (f.offset == 0) run(kLongSizes[turn % 4], 1);
  }
}

// Rows that fp32 cannot sum, and values that are no numbers.
void check_forward_extremes() {
  struct Case {
    const char* what;
    DType type;
    double eps;
    std::function<Real(int64_t, int64_t)> value;
  };
  const DType f32 = DType::kFloat32, f16 = DType::kFloat16, bf16 = DType::kBFloat16, f64 = DType::kFloat64;
  const auto scaled = [](Real scale) { return [=](int64_t, int64_t) { return scale * normal(); }; };
  const auto one_odd = [](Real odd) { return [=](int64_t r, int64_t c) { return r == 1 && c == 3 ? odd : normal(); }; };
  const auto constant = [](Real value) { return [=](int64_t r, int64_t) { return value * (1 + r / 3.0L); }; };
  const std::vector<Case> cases = {
      {"huge", f32, 1e-6, scaled(1e38L)},
      {"squares overflow", f32, 1e-6, scaled(1e19L)},
      {"upper edge", f32, 1e-6, scaled(0x1p30L)},
      {"lower edge", f32, 0, scaled(0x1p-30L)},
      {"squares underflow", f32, 0, scaled(1e-25L)},
      {"tiny under eps", f32, 1e-6, scaled(1e-25L)},
      {"denormal", f32, 0, scaled(1e-40L)},
      {"denormal under eps", f32, 1e-6, scaled(1e-40L)},
      {"denormals among numbers", f32, 1e-6, [](int64_t, int64_t c) { return normal() * (c % 3 ? 1 : 1e-40L); }},
      {"denormals among small numbers", f32, 0, [](int64_t, int64_t c) { return normal() * (c % 3 ? 1e-6L : 1e-41L); }},
      {"zeros", f32, 1e-6, scaled(0)},
      {"zeros without eps", f32, 0, scaled(0)},
      {"one NaN", f32, 1e-6, one_odd(NAN)},
      {"one Inf", f32, 1e-6, one_odd(INFINITY)},
      {"one huge", f32, 1e-6, one_odd(-3e38L)},
      {"large eps", f32, 1e30, scaled(1)},
      {"constant", f32, 1e-6, constant(1.0000005L)},
      {"constant", f32, 0, constant(0.1L)},
      {"constant", f32, 0, constant(1 + 0x1p-23L)},
      {"huge", bf16, 1e-6, scaled(1e38L)},
      {"denormal", bf16, 0, scaled(1e-39L)},
      {"denormals among numbers", bf16, 1e-6, [](int64_t, int64_t c) { return normal() * (c % 3 ? 1 : 1e-39L); }},
      {"a denormal among numbers", bf16, 1e-6, one_odd(3e-39L)},
      {"a zero among numbers", bf16, 1e-6, one_odd(0)},
      {"one NaN", bf16, 1e-6, one_odd(NAN)},
      {"one Inf", bf16, 1e-6, one_odd(-INFINITY)},
      {"largest", f16, 1e-6, scaled(21000)},
      {"denormal", f16, 0, scaled(1e-6L)},
      {"denormal under eps", f16, 1e-6, scaled(1e-6L)},
      {"one NaN", f16, 1e-6, one_odd(NAN)},
      {"one Inf", f16, 1e-6, one_odd(INFINITY)},
      {"plain", f64, 1e-6, scaled(1)},
      {"huge", f64, 1e-6, scaled(1e160L)},
      {"hugest", f64, 0, scaled(5e307L)},
      {"tiny", f64, 0, scaled(1e-170L)},
      {"tiny under eps", f64, 1e-6, scaled(1e-170L)},
      {"tiny beside eps", f64, 1e-320, scaled(1e-160L)},
      {"denormal", f64, 0, scaled(1e-310L)},
      {"denormal under eps", f64, 1e-300, scaled(1e-310L)},
      {"one NaN", f64, 1e-6, one_odd(NAN)},
      {"one Inf", f64, 1e-6, one_odd(INFINITY)},
  };
  for (const Case& c : cases) {
    for (const int64_t cols : {5, 64, 300, 4100}) {
      for (const bool cast : {false, true}) {
        Tensor x(c.type, 3, cols), w(c.type, 1, cols);
        fill(x, c.value);
        fill_normal(w, 0.2, 1);
        check_forward({c.type, c.type, true, cast, 0, c.eps}, x, w, Layout::kDense, c.what);
        check_forward({c.type, c.type, false, cast, 0, c.eps}, x, w, Layout::kDense, c.what);
      }
    }
  }
  for (const Real odd : {Real(1e35), Real(-3e38), Real(1e-40), Real(INFINITY), Real(NAN), Real(0)}) {
    Tensor x(f32, 3, 70), w(f32, 1, 70);
    fill_normal(x);
    fill(w, [&](int64_t, int64_t col) { return col == 9 ? odd : 1; });
    check_forward({f32, f32}, x, w, Layout::kDense, "one odd weight");
    check_forward({f32, f32, true, true}, x, w, Layout::kDense, "one odd weight");
  }
  for (const Forward& f : {Forward{f32, f64}, Forward{f64, bf16, true, false, 1}, Forward{bf16, f64, true, true}}) {
    Tensor x(f.x_type, 3, 70), w(f.w_type, 1, 70);
    fill_normal(x);
    fill_normal(w);
    check_forward(f, x, w, Layout::kStrided, "some fp64");
  }
}

// Every 16-bit value goes through a load and a store.
void check_forward_all_values() {
  for (const DType type : {DType::kFloat16, DType::kBFloat16}) {
    Tensor x(type, 65536, 3), w(type, 1, 3);
    fill(x, [&](int64_t row, int64_t col) { return col ? 0.75L * col : decode(type, row); });
    fill(w, [](int64_t, int64_t) { return 1; });
    check_forward({type, type}, x, w, Layout::kDense, "all values");
    check_forward({type, type, true, true}, x, w, Layout::kDense, "all values");
  }
}

// A row has the same bits wherever it lies and whatever is done with the rows beside it.
void check_forward_invariance(const std::string& isa) {
  use(isa);
  for (const Forward& f : forward_mixes()) {
    for (const int64_t cols : {3, 64, 130, 1500, 4103}) {
      const int64_t rows = 7;
      Tensor x(f.x_type, rows, cols), w(f.w_type, 1, cols), y(f.y_type(), rows, cols);
      fill_normal(x);
      x.set(5, 2, 1e30L);  // a row for the slow path, if the format has that number
      fill_normal(w);
      cpu::rms_norm_forward(params(f, x, w, y, nullptr), 0, rows);
      for (const Layout layout : kLayouts) {
        Tensor x2(f.x_type, rows, cols, layout), w2(f.w_type, 1, cols, layout);
        Tensor y2(f.y_type(), rows, cols, layout, kGuard);
        fill(x2, [&](int64_t row, int64_t col) { return x.get(row, col); });
        fill(w2, [&](int64_t, int64_t col) { return w.get(0, col); });
        for (const auto& [begin, end] : {std::pair<int, int>{6, 7}, {0, 1}, {1, 6}})
          cpu::rms_norm_forward(params(f, x2, w2, y2, nullptr), begin, end);
        check(y.same_bits(y2) && y2.guards_intact(), "%s %s %ld: bits depend on the layout %d or the split",
              isa.c_str(), f.name().c_str(), cols, int(layout));
        if (f.y_type() != f.x_type) continue;
        cpu::rms_norm_forward(params(f, x2, w2, x2, nullptr), 0, rows);
        check(y.same_bits(x2), "%s %s %ld: in place", isa.c_str(), f.name().c_str(), cols);
      }
    }
  }
}

// ---------------------------------------------------------------- backward

struct Backward {
  Forward f;
  DType dy_type;
  Tensor x, dy, w, rstd;

  Backward(const Forward& forward, DType dy_dtype, int64_t rows, int64_t cols, Layout layout = Layout::kDense)
      : f(forward), dy_type(dy_dtype), x(f.x_type, rows, cols, layout), dy(dy_type, rows, cols, layout),
        w(f.w_type, 1, cols), rstd(f.rstd_type(), 1, rows) {
    fill_normal(x);
    fill_normal(dy);
    fill_normal(w, 0.2, f.offset != 0 ? 0 : 1);
  }
  std::string name() {
    return f.name() + " dy=" + format(dy_type).name + " " + std::to_string(x.rows) + "x" + std::to_string(x.cols);
  }
};

struct Gradients {
  Tensor dx, dweight;
  explicit Gradients(Backward& b)
      : dx(b.f.x_type, b.x.rows, b.x.cols, Layout::kDense, kGuard), dweight(b.f.w_type, 1, b.x.cols, Layout::kDense, kGuard) {}
  bool same_bits(Gradients& other) { return dx.same_bits(other.dx) && dweight.same_bits(other.dweight); }
  bool guards_intact() { return dx.guards_intact() && dweight.guards_intact(); }
};

// step < 0: all blocks and columns at once; else so many of them per call, last first.
Gradients run(Backward& b, bool want_dx, bool want_dweight, int64_t step = -1) {
  Tensor y(b.f.y_type(), b.x.rows, b.x.cols);
  cpu::rms_norm_forward(params(b.f, b.x, b.w, y, b.rstd.data()), 0, b.x.rows);
  Gradients result(b);
  RmsNormBackward p = {b.dy.data(), b.x.data(), b.f.weighted ? b.w.data() : nullptr, b.rstd.data(),
                       want_dx ? result.dx.data() : nullptr, want_dweight ? result.dweight.data() : nullptr, nullptr,
                       b.dy.place, b.x.place, b.x.rows, b.x.cols, b.f.eps, b.f.offset, b.f.cast, b.dy_type, b.f.x_type,
                       b.f.w_type};
  const cpu::BackwardPlan plan = cpu::rms_norm_backward_plan(p);
  std::vector<unsigned char> space(plan.workspace_bytes + 64, 0xff);
  p.workspace = space.data() + (64 - reinterpret_cast<uintptr_t>(space.data()) % 64) % 64;
  const auto parts = [step](int64_t count, const std::function<void(int64_t, int64_t)>& work) {
    const int64_t n = step < 0 ? count : step;
    for (int64_t begin = (count - 1) / n * n; begin >= 0; begin -= n) work(begin, std::min(begin + n, count));
  };
  parts(plan.blocks, [&](int64_t begin, int64_t end) { cpu::rms_norm_backward(p, begin, end); });
  if (want_dweight) {
    parts(b.x.cols, [&](int64_t begin, int64_t end) { cpu::rms_norm_backward_dweight(p, begin, end); });
  }
  return result;
}

// Each tolerance: half an ulp of the result (its one rounding), plus the roundings before it, each a
// unit of the compute type, times the sum of the magnitudes that were rounded.
void check_backward(Backward& b, const char* what) {
  const int64_t rows = b.x.rows, cols = b.x.cols;
  const Real unit = b.f.wide() || b.dy_type == DType::kFloat64 ? 0x1p-52L : 0x1p-23L;
  std::vector<Real> dweight(cols), dweight_size(cols), dx(rows * cols), dx_size(rows * cols);
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
      const Real tie = b.f.cast && unit > 0x1p-30L ? std::ldexp(1.0L, -format(b.f.x_type).fraction_bits) / unit : 0;
      dweight_size[i] += std::fabs(b.dy.get(row, i) * xhat) * (2 + std::min<int64_t>(rows, 8) + tie);
    }
    for (int64_t i = 0; i < cols; ++i) {
      const Real xhat = b.x.get(row, i) * r, gdy = b.f.weight(b.w, i) * b.dy.get(row, i);
      dx[row * cols + i] = r * (gdy - xhat * c);
      dx_size[row * cols + i] = r * (3 * std::fabs(gdy) + std::fabs(xhat) * (3 * std::fabs(c) + 3 * c_size));
    }
  }
  const auto close = [&](DType type, Real got, Real expected, Real size) {
    if (std::isnan(expected) || std::isnan(size)) return bool(std::isnan(got));
    const int64_t exponent = expected == 0 ? -20000 : std::ilogb(expected);
    const Real ulp = std::ldexp(1.0L, std::max<int64_t>(exponent, 1 - format(type).bias()) - format(type).fraction_bits);
    return got == round_to(type, expected) || std::fabs(got - expected) <= ulp * 0.5001L + unit * size;
  };
  std::vector<Gradients> results;
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    results.push_back(run(b, true, true));
    Gradients& got = results.back();
    bool dx_close = true, dweight_close = true;
    for (int64_t i = 0; i < cols; ++i) {
      const bool ok = close(b.f.w_type, got.dweight.get(0, i), dweight[i], dweight_size[i]);
      if (!ok && dweight_close) {
        std::printf("dweight[%ld] = %Lg, not %Lg\n", i, got.dweight.get(0, i), dweight[i]);
      }
      dweight_close &= ok;
      for (int64_t row = 0; row < rows; ++row) {
        const bool fine = close(b.f.x_type, got.dx.get(row, i), dx[row * cols + i], dx_size[row * cols + i]);
        if (!fine && dx_close) {
          std::printf("dx[%ld][%ld] = %Lg, not %Lg\n", row, i, got.dx.get(row, i), dx[row * cols + i]);
        }
        dx_close &= fine;
      }
    }
    check(dx_close, "%s: %s %s: dx", what, isa.c_str(), b.name().c_str());
    check(dweight_close, "%s: %s %s: dweight", what, isa.c_str(), b.name().c_str());
    check(got.guards_intact(), "%s: %s %s: wrote outside", what, isa.c_str(), b.name().c_str());
    if (results.size() == 3) check(got.same_bits(results[1]), "%s: %s: AVX-512 is not AVX2", what, b.name().c_str());
    for (const int64_t step : {1, 3}) {
      Gradients split = run(b, true, true, step);
      check(split.same_bits(got), "%s: %s %s: bits depend on the split", what, isa.c_str(), b.name().c_str());
    }
    Gradients only_dx = run(b, true, false), only_dweight = run(b, false, true);
    check(only_dx.dx.same_bits(got.dx) && only_dweight.dweight.same_bits(got.dweight),
          "%s: %s %s: bits depend on what is wanted", what, isa.c_str(), b.name().c_str());
  }
}

void check_backward_sizes() {
  int turn = 0;
  for (const Forward& f : forward_mixes()) {
    for (const DType dy : kFast) {
      for (const int64_t cols : {1, 7, 64, 65, 130, 300}) {
        Backward b(f, dy, cols == 64 ? 40 : 5, cols, kLayouts[turn++ % 4]);
        check_backward(b, "sizes");
      }
    }
    Backward wide_rows(f, f.y_type(), 19, 8259);  // three blocks, two tiles of weights
    check_backward(wide_rows, "long");
    if (f.offset == 0) {
      Backward many(f, f.y_type(), 1000, 9);  // four blocks
      check_backward(many, "many rows");
    }
  }
  const DType f64 = DType::kFloat64, f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  for (const auto& [f, dy] : {std::pair<Forward, DType>{{f64, f64}, f64}, {{f64, f64, false}, f64}, {{f32, f32}, f64},
                              {{f32, f64}, f32}, {{bf16, f64, true, true}, f64}, {{f64, f32, true, true, 1}, f64}}) {
    Backward b(f, dy, 300, 70, Layout::kTwoDims);
    check_backward(b, "some fp64");
  }
  Backward expanded({f32, f32}, f32, 9, 33);
  expanded.dy = Tensor(f32, 9, 33, Layout::kExpanded);
  fill_normal(expanded.dy);
  check_backward(expanded, "dy expanded");
}

void check_backward_extremes() {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f64 = DType::kFloat64;
  struct Case {
    const char* what;
    DType type;
    double eps;
    Real scale, dy_scale = 1;
  };
  for (const Case& c : {Case{"huge", f32, 1e-6, 1e37L}, {"huge", bf16, 1e-6, 1e37L}, {"tiny", f32, 0, 1e-25L},
                        {"huge", f64, 1e-6, 1e160L}, {"tiny", f64, 0, 1e-170L}, {"tiny under eps", f64, 1e-6, 1e-170L},
                        {"g * x overflows", f32, 0, 1e8L, 1e34L}, {"g * x overflows", bf16, 0, 1e8L, 1e34L},
                        {"g * x underflows", f32, 0, 1e-8L, 1e-33L}, {"g * x underflows", bf16, 0, 1e-8L, 1e-33L},
                        {"no gradient", bf16, 0, 1e-8L, 0}}) {
    for (int64_t cols : {70, 1100}) {
      Backward b({c.type, c.type, true, false, 0, c.eps}, c.type, 9, cols);
      fill(b.x, [&](int64_t row, int64_t) { return (row == 4 ? c.scale : 1) * normal(); });
      fill(b.dy, [&](int64_t row, int64_t) { return (row == 4 ? c.dy_scale : 1) * normal(); });
      check_backward(b, c.what);
    }
  }
  Backward b({f32, f32}, f32, 9, 70);
  b.x.set(3, 5, NAN);
  check_backward(b, "one NaN");
}

}  // namespace

int main() {
  check_instruction_sets();
  check_forward_sizes();
  check_forward_extremes();
  check_forward_all_values();
  for (const std::string& isa : instruction_sets()) check_forward_invariance(isa);
  check_backward_sizes();
  check_backward_extremes();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
