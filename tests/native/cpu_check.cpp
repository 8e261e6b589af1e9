// The CPU kernels against the formula in long double, without torch:
//   g++ -std=c++17 -O2 -ffp-contract=off tests/native/cpu_check.cpp csrc/cpu/*.cpp -o cpu_check &&
//   ./cpu_check
// or with the objects of the build in place of csrc/cpu/*.cpp. Also with
// -fsanitize=address,undefined. Every instruction set that the machine has is run. Silent but for
// failures and the last line. Arguments choose: parts (choice, forward, quant, backward,
// gated, rope), instruction sets (avx2, ...) and the only dtypes (of=bf16, ...).
#include <sys/syscall.h>

#include "check.h"

namespace {

int64_t mapped_ahead = 0;  // bytes that the kernels had mapped before they wrote them

}  // namespace

extern "C" int madvise(void* data, size_t bytes, int advice) noexcept {
  if (advice == MADV_POPULATE_WRITE) mapped_ahead += bytes;
  return syscall(SYS_madvise, data, bytes, advice);
}

namespace {

// ---------------------------------------------------------------- instruction sets

std::vector<std::string> arguments;

bool is_argument(const std::string& name) {
  return std::find(arguments.begin(), arguments.end(), name) != arguments.end();
}

// No argument of the same kind, or this one.
bool is_chosen(const std::string& name, const std::vector<std::string>& kind) {
  return is_argument(name) || std::none_of(kind.begin(), kind.end(), is_argument);
}

bool is_chosen(std::initializer_list<DType> dtypes) {
  static const std::vector<std::string> kAll = {"of=fp32", "of=fp16", "of=bf16", "of=fp64"};
  return std::all_of(dtypes.begin(), dtypes.end(),
                     [&](DType t) { return is_chosen(std::string("of=") + format(t).name, kAll); });
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names, chosen;
  for (int i = 0; i < cpu::isa_count(); ++i)
    if (cpu::isa_supported(i)) names.push_back(cpu::isa_name(i));
  for (const std::string& name : names)
    if (is_chosen(name, names)) chosen.push_back(name);
  return chosen;
}

void use(const std::string& isa) {
  check(cpu::set_isa(isa.c_str()) && isa == cpu::isa(), "set_isa(%s)", isa.c_str());
}

void check_instruction_sets() {
  check(!std::strcmp(cpu::last_isa(), ""), "last_isa() before the first kernel");
  check(!cpu::set_isa("sse9"), "set_isa of an unknown name");
  check(instruction_sets()[0] == "fp64" && instruction_sets()[1] == "scalar", "always there");
  check(cpu::set_isa(nullptr) && cpu::isa() == instruction_sets().back(),
        "the best is the default");
}

// What is small stays in the caches; memory that malloc maps afresh on every call is not streamed
// to.
void check_writes_past_caches() {
  for (int64_t bytes = 64 << 10; bytes <= 64 << 20; bytes *= 2) {
    const bool owned = cpu::writes_past_caches(bytes, false);
    check(owned >= cpu::writes_past_caches(bytes, true), "new memory is sooner in a cache: %ld",
          bytes);
    check(bytes < 1 << 20 ? !owned : bytes < 4 << 20 || owned, "writes_past_caches(%ld)", bytes);
  }
  check(cpu::writes_past_caches(31 << 20, true), "a large new output");
  check(!cpu::writes_past_caches(32 << 20, true), "an output that is mapped afresh");
}

// The bits of dweight follow from how the rows are split into blocks.
void check_backward_plan() {
  struct Case {
    int64_t rows, cols, block_rows, blocks;
  };
  for (const Case& c : {Case{1, 1, 256, 1},
                        {256, 128, 256, 1},
                        {257, 128, 256, 2},
                        {1000, 129, 254, 4},
                        {1000, 4096, 8, 125},
                        {1024, 9000, 8, 128},
                        {1025, 9000, 9, 114},
                        {1152, 9000, 9, 128},
                        {1153, 9000, 10, 116},
                        {40000, 3640, 256, 157},
                        {100, 3640, 9, 12}}) {
    RmsNormBackward p{};
    p.rows = c.rows, p.cols = c.cols;
    check(cpu::rms_norm_backward_plan(p).workspace_bytes == 0, "workspace without dweight");
    p.dweight = &p;
    const cpu::BackwardPlan plan = cpu::rms_norm_backward_plan(p);
    check(plan.block_rows == c.block_rows && plan.blocks == c.blocks &&
              plan.workspace_bytes == 8 * c.blocks * c.cols,
          "plan of %ldx%ld: %ld blocks of %ld", c.rows, c.cols, plan.blocks, plan.block_rows);
  }
}

// ---------------------------------------------------------------- forward

bool is_other_nan(Tensor& t, int64_t row, int64_t i) {
  const Format& f = format(t.dtype);
  const uint64_t nan = f.infinity() | uint64_t(1) << (f.fraction_bits - 1);
  return std::isnan(t.get(row, i)) && t.bits(row, i) != nan;
}

// Whichever NaN a row held, and where it held Inf: a positive quiet one without a payload.
bool has_one_nan(Tensor& y, Tensor& rstd) {
  for (int64_t row = 0; row < y.rows; ++row) {
    if (is_other_nan(rstd, 0, row)) return false;
    for (int64_t i = 0; i < y.cols && !(rstd.get(0, row) > 0); ++i)
      if (is_other_nan(y, row, i)) return false;
  }
  return true;
}

// Runs f on every instruction set, checks each against the formula and all against each other.
void check_forward(const Forward& f, Tensor& x, Tensor& w, Layout y_layout, const char* what) {
  const int64_t rows = x.rows, cols = x.cols;
  std::vector<Tensor> results, rstds;
  const std::vector<std::string> isas = instruction_sets();
  for (const std::string& isa : isas) {
    use(isa);
    Tensor& y = results.emplace_back(f.y_type(), rows, cols, y_layout, kGuard);
    Tensor& r = rstds.emplace_back(f.rstd_type(), 1, rows, Layout::kDense, kGuard);
    cpu::rms_norm_forward(params(f, x, w, y, r.data()), 0, rows);
    const std::string run = std::string(what) + ": " + isa + " " + f.name() + " " +
                            std::to_string(rows) + "x" + std::to_string(cols);
    const char* name = run.c_str();
    compare_forward(f, x, w, y, r, name, 1, isa == "fp64");
    check(f.wide() || isa == cpu::last_isa(), "%s: ran %s", name, cpu::last_isa());
    check(has_one_nan(y, r), "%s: another NaN", name);
    // Only fp64 rounds once. Products of 16-bit values are exact in fp32, with or without FMA.
    const std::string below = results.size() > 1 ? isas[results.size() - 2] : "fp64";
    if (below == "fp64" || (below == "scalar" && f.x_type == DType::kFloat32)) continue;
    const size_t other = results.size() - 2;
    check(y.same_bits(results[other]) && r.same_bits(rstds[other]),
          "%s: not the bits of the ISA below", name);
  }
}

// Around one vector, one block of 64 lanes, one fold (256), a tile of gradients (1024), and sizes
// of models; around a tile of weights (8192).
const int64_t kSizes[] = {1,   2,   3,   4,   5,   7,    8,    9,    15,   16,   17,  31,
                          32,  33,  48,  63,  64,  65,   80,   96,   127,  128,  129, 191,
                          255, 256, 257, 319, 511, 1000, 1024, 1025, 4095, 4096, 4097};
const int64_t kLongSizes[] = {8191, 8192, 8193, 20000};

void check_forward_sizes() {
  int turn = 0;
  for (const Forward& f : forward_mixes()) {
    if (!is_chosen({f.x_type, f.w_type})) continue;
    const auto run = [&](int64_t cols, int64_t rows) {
      Tensor x(f.x_type, rows, cols, kLayouts[turn % 4]),
          w(f.w_type, 1, cols, kLayouts[turn / 4 % 2]);
      fill_normal(x, std::ldexp(1.0L, turn % 7 - 3));
      fill_normal(w, 0.5, f.offset != 0 ? 0 : 1);
      check_forward(f, x, w, kLayouts[turn / 3 % 4], "sizes");
      ++turn;
    };
    // 19 rows: two groups of eight, or four of four, and a rest.
    for (const int64_t cols : kSizes) run(cols, cols < 300 ? 19 : 1);
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
  const DType f32 = DType::kFloat32, f16 = DType::kFloat16, bf16 = DType::kBFloat16,
              f64 = DType::kFloat64;
  const auto scaled = [](Real scale) { return [=](int64_t, int64_t) { return scale * normal(); }; };
  const auto one_odd = [](Real odd) {
    return [=](int64_t r, int64_t c) { return r == 1 && c == 3 ? odd : normal(); };
  };
  const auto constant = [](Real value) {
    return [=](int64_t r, int64_t) { return value * (1 + r / 3.0L); };
  };
  const std::vector<Case> cases = {
      {"huge", f32, 1e-6, scaled(1e38L)},
      {"squares overflow", f32, 1e-6, scaled(1e19L)},
      {"upper edge", f32, 1e-6, scaled(0x1p30L)},
      {"lower edge", f32, 0, scaled(0x1p-30L)},
      {"squares underflow", f32, 0, scaled(1e-25L)},
      {"tiny under eps", f32, 1e-6, scaled(1e-25L)},
      {"denormal", f32, 0, scaled(1e-40L)},
      {"denormal under eps", f32, 1e-6, scaled(1e-40L)},
      {"denormals among numbers", f32, 1e-6,
       [](int64_t, int64_t c) { return normal() * (c % 3 ? 1 : 1e-40L); }},
      {"denormals among small numbers", f32, 0,
       [](int64_t, int64_t c) { return normal() * (c % 3 ? 1e-6L : 1e-41L); }},
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
      {"denormals among numbers", bf16, 1e-6,
       [](int64_t, int64_t c) { return normal() * (c % 3 ? 1 : 1e-39L); }},
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
      {"constant", f64, 0, constant(0.1L)},
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
    if (!is_chosen({c.type})) continue;
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
  // In each vector of a step of the look at a weight, behind the steps, and everywhere (-1); where
  // its product with rstd leaves the range of fp32, though y does not.
  for (const auto& [place, scale] : {std::pair<int64_t, Real>{0, 1},
                                     {9, 1e-3L},
                                     {9, 1e3L},
                                     {17, 1e-3L},
                                     {18, 1},
                                     {31, 1e3L},
                                     {45, 1e3L},
                                     {69, 1e-3L},
                                     {69, 1e3L},
                                     {-1, 1},
                                     {-1, 1e3L}}) {
    for (const Real odd :
         {Real(1e35), Real(-3e38), Real(1e-40), Real(1e-6), Real(INFINITY), Real(NAN), Real(0)}) {
      for (const Forward& f :
           {Forward{f32, f32}, {f32, f32, true, true}, {bf16, f32}, {bf16, bf16}, {f16, f16}}) {
        if (!is_chosen({f.x_type, f.w_type})) continue;
        const int64_t cols = place < 0 ? 64 : 70;
        Tensor w(f.w_type, 1, cols);
        fill(w, [&, at = place](int64_t, int64_t i) { return at < 0 || i == at ? odd : 1; });
        // To round this NaN would make it 0.
        if (std::isnan(odd) && place >= 0)
          std::memset(w.at(0, place), 0xff, format(f.w_type).bytes);
        for (const int64_t rows : {1, 3}) {
          Tensor x(f.x_type, rows, cols);
          fill_normal(x, scale);
          check_forward(f, x, w, Layout::kDense, "one odd weight");
        }
      }
    }
  }
  // Neither factor is a small number by itself, and their product is a denormal.
  for (int64_t rows = 1; rows <= 3 && is_chosen({bf16}); rows += 2) {
    Tensor x(bf16, rows, 70), w(bf16, 1, 70);
    fill(x, [](int64_t, int64_t i) { return i == 9 ? 0x1p-62L : 16 * normal(); });
    fill(w, [](int64_t, int64_t i) { return i == 9 ? 0x1.8p-62L : 1; });
    check_forward({bf16, bf16}, x, w, Layout::kDense, "two small factors");
  }
  for (const Forward& f : forward_mixes()) {
    if (!is_chosen({f.x_type, f.w_type})) continue;
    Tensor x(f.x_type, 3, 70), w(f.w_type, 1, 70);
    fill_normal(x);
    fill(w, [](int64_t, int64_t i) {
      return i % 3 ? i % 2 - 0.5L : std::copysign(0.0L, i % 2 - 0.5L);
    });
    check_forward(f, x, w, Layout::kDense, "zeros in the weight");
  }
  // The fast way is left by one row of a group, whichever it is.
  for (const DType type : {f32, bf16}) {
    for (int64_t odd = 0; odd < 9 && is_chosen({type}); ++odd) {
      Tensor x(type, 9, 64), w(type, 1, 64);
      fill(x, [&](int64_t row, int64_t) { return (row == odd ? 1e25L : 1) * normal(); });
      fill_normal(w, 0.2, 1);
      check_forward({type, type}, x, w, Layout::kDense, "one row out of range");
    }
  }
  // In fp32 each of the small squares is added to the large one by itself, and rounds it up by half
  // a unit: together by three. So are those of a second large one, in the next lane.
  for (const int64_t large : {1, 2}) {
    for (const auto& [rows, scale] : {std::pair<int64_t, Real>{3, 1}, {8, 1}, {8, 0.25}, {8, 4}}) {
      for (int64_t first = 0; first < 8 && is_chosen({f32}); first += rows) {
        Tensor x(f32, rows, 256), w(f32, 1, 256);
        fill(x, [&](int64_t row, int64_t col) {
          const int64_t lane = (col - (first + row)) & 7, i = col - (first + row) % 8 - lane;
          const bool is_small = i == 8 || i == 16 || i == 32 || i == 64 || i == 128 || i == 192;
          if (lane >= large) return Real(0);
          return scale * (i == 0 ? 1 : is_small ? std::sqrt(0.51L * 0x1p-23L) : 0);
        });
        check_forward({f32, f32, false, false, 0, 0}, x, w, Layout::kDense,
                      large == 1 ? "one dominates" : "two dominate");
      }
    }
  }
  for (const Forward& f :
       {Forward{f32, f64}, Forward{f64, bf16, true, false, 1}, Forward{bf16, f64, true, true}}) {
    if (!is_chosen({f.x_type, f.w_type})) continue;
    Tensor x(f.x_type, 3, 70), w(f.w_type, 1, 70);
    fill_normal(x);
    fill_normal(w);
    check_forward(f, x, w, Layout::kStrided, "some fp64");
  }
}

// Every 16-bit value goes through a load and a store.
void check_forward_all_values() {
  for (const DType type : {DType::kFloat16, DType::kBFloat16}) {
    if (!is_chosen({type})) continue;
    Tensor x(type, 65536, 3), w(type, 1, 3);
    fill(x, [&](int64_t row, int64_t col) { return col ? 0.75L * col : decode(type, row); });
    fill(w, [](int64_t, int64_t) { return 1; });
    check_forward({type, type}, x, w, Layout::kDense, "all values");
    check_forward({type, type, true, true}, x, w, Layout::kDense, "all values");
  }
}

// See Fused.
void check_fused(Fused fused) {
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    const auto run = [](const RmsNormForward& p) { cpu::rms_norm_forward(p, 0, p.rows); };
    Tensor expected(fused.f.y_type(), fused.sum.rows, fused.sum.cols);
    run(params(fused.f, fused.sum, fused.w, expected, nullptr));
    Fused there = fused;
    run(there.params());
    there.compare(expected, isa.c_str());
    if (fused.input.dtype == DType::kFloat64) continue;
    there = fused;
    there.unrounded = true;
    run(there.params());
    there.compare(expected, isa.c_str());
  }
}

void check_fused_mixes() {
  int turn = 0;
  const DType all[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64};
  for (const DType input : all)
    for (const DType residual : all)
      for (const bool weighted : {false, true})
        for (const bool cast : {false, true})
          for (const int64_t cols : {3, 64, 128, 300, 4100, 9000}) {
            const Forward f = {residual, turn % 3 ? residual : DType::kFloat32, weighted, cast};
            ++turn;
            if (!is_chosen({f.x_type, f.w_type, input})) continue;
            check_fused(Fused(f, input, cols < 200 ? 21 : 3, cols, kLayouts[turn % 4], turn % 2));
          }
  for (const DType type : {DType::kBFloat16, DType::kFloat16}) {
    if (!is_chosen({type})) continue;
    const Real small = type == DType::kBFloat16 ? 0x1p-130L : 0x1p-18L;
    Fused all({type, type}, type, 3, 300, Layout::kDense, false);
    all.fill_addends([&](int64_t, int64_t) { return small * normal(); });
    check_fused(all);
    Fused one({type, type}, type, 128, 192, Layout::kDense, false);  // a row for each of its places
    one.fill_addends([&](int64_t row, int64_t col) { return (row == col ? small : 1) * normal(); });
    check_fused(one);
  }
  Forward odd = {DType::kFloat32, DType::kFloat32};
  odd.offset = 1e35;  // weights beyond the fast path
  if (is_chosen({odd.x_type, DType::kBFloat16}))
    check_fused(Fused(odd, DType::kBFloat16, 3, 70, Layout::kDense, false));
}

// 8 bits: of every instruction set the codes and scales that plain C++ makes of its own norm, and
// nothing beside them.
uint8_t code_of(QType type, float v) {
  if (type == QType::kInt8)
    return uint8_t(int8_t(v != v ? 0 : std::nearbyint(std::fmin(std::fmax(v, -128.0f), 127.0f))));
  const bool e4m3 = type == QType::kFloat8E4M3;
  const int fraction = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15;
  const uint8_t sign = std::signbit(v) ? 0x80 : 0;
  if (v != v) return sign | 0x7f;
  const Real size = std::fmin(std::fabs(Real(v)), e4m3 ? 448.0L : 57344.0L);
  const int exponent = size == 0 ? 1 - bias : std::max(std::ilogb(size), 1 - bias);
  const int units = int(std::nearbyint(std::ldexp(size, fraction - exponent)));
  return sign | uint8_t(units + ((exponent + bias - 1) << fraction));
}

// What a quantization writes: of a given scale, of rows, of bounded rows, of blocks in columns or
// in rows.
struct Codes {
  int64_t rows, cols;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  Quant quant;

  static bool has(int way, int64_t cols) { return way < 3 || cols % 64 == 0; }

  Codes(QType type, int way, int64_t row_count, int64_t col_count)
      : rows(row_count), cols(col_count), codes(rows * cols + 2 * kGuard, 0xa5) {
    const int64_t block = way >= 3 ? 64 : cols, blocks = cols / block;
    scales.assign(way ? rows * blocks + 2 : 3, -1.0f);
    if (!way) scales[1] = 0.0137f;
    const float least = type == QType::kInt8 ? 0x1p-23f : 1 / (512 * max_value(type));
    quant = {
        codes.data() + kGuard, scales.data() + 1,          way ? block : 0, way == 3 ? 1 : blocks,
        way == 3 ? rows : 1,   way == 2 ? 1.5f : INFINITY, least,           type};
  }
  Codes(const Codes&) = delete;

  bool are_of(Tensor& norm) const {
    const Quant& q = quant;
    const bool int8 = q.dtype == QType::kInt8;
    const int64_t width = q.block ? q.block : cols;
    bool same = true;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t b = 0; b < cols / width; ++b) {
        float largest = 0;
        for (int64_t i = b * width; i < (b + 1) * width; ++i) {
          const float v = std::fabs(float(norm.get(row, i)));
          if (!(v <= largest)) largest = largest != largest ? largest : v;
        }
        float scale = (largest > q.bound ? q.bound : largest) / max_value(q.dtype);
        scale = q.block ? (scale < q.least ? q.least : scale) : 0.0137f;
        const float there = q.scale[q.block ? row * q.row_stride + b * q.block_stride : 0];
        same &= there == scale || (there != there && scale != scale);
        for (int64_t i = b * width; i < (b + 1) * width; ++i) {
          const float v = float(norm.get(row, i));
          const float scaled = q.block && !int8 ? v / scale : v * (1 / scale);
          const uint8_t code = codes[kGuard + row * cols + i], want = code_of(q.dtype, scaled);
          same &= code == want || (scaled != scaled && !int8 && (code & 0x7f) == 0x7f);
        }
      }
    return same;
  }

  bool guards_intact() const {
    bool intact = scales.front() == -1 && scales.back() == -1;
    for (size_t i = 0; i < kGuard; ++i)
      intact &= codes[i] == 0xa5 && codes[codes.size() - 1 - i] == 0xa5;
    return intact;
  }
};

void check_quant() {
  int turn = 0;
  for (const DType x_type : kFast)
    for (const bool cast : {false, true})
      for (const QType type : {QType::kFloat8E4M3, QType::kFloat8E5M2, QType::kInt8})
        for (const int64_t cols : {1, 7, 33, 64, 128, 300, 4224, 9000})
          for (const int way : {0, 1, 2, 3, 4}) {
            if (!Codes::has(way, cols)) continue;
            ++turn;
            const Forward f = {x_type, turn % 2 ? x_type : DType::kFloat32, true, cast};
            if (!is_chosen({f.x_type, f.w_type})) continue;
            const int64_t rows = cols < 200 ? 21 : 3;
            Tensor x(f.x_type, rows, cols, kLayouts[turn % 4]), w(f.w_type, 1, cols);
            fill_normal(x);
            fill_normal(w, 0.5, 1);
            for (int64_t i = 0; i < cols && rows > 2; ++i)
              x.set(1, i, x.get(1, i) * (x_type == DType::kFloat16 ? 1e-4L : 1e30L)),
                  x.set(2, i, 0);
            if (rows > 3 && turn % 3 == 0) x.set(3, cols / 2, NAN);
            if (turn % 5 == 0) w.set(0, 0, INFINITY);
            for (const std::string& isa : instruction_sets()) {
              use(isa);
              Tensor norm(f.y_type(), rows, cols),
                  y(f.y_type(), rows, cols, Layout::kDense, kGuard);
              cpu::rms_norm_forward(params(f, x, w, norm, nullptr), 0, rows);
              const Codes codes(type, way, rows, cols);
              RmsNormForward p = params(f, x, w, y, nullptr);
              if (turn % 3) p.y = nullptr;
              p.quant = codes.quant;
              const int64_t workspace_bytes = cpu::rms_norm_forward_workspace(p),
                            row_bytes = cols * format(f.y_type()).bytes;
              check(p.y ? workspace_bytes == 0
                        : workspace_bytes % row_bytes == 0 && workspace_bytes > 0 &&
                              workspace_bytes <= rows * row_bytes,
                    "quant: workspace of %ld", workspace_bytes);
              std::vector<uint8_t> workspace(workspace_bytes + 64 + kGuard, 0xa5);
              uint8_t* const space =
                  workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64;
              for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{1, rows}, {0, 1}}) {
                if (begin < end)
                  cpu::rms_norm_forward(p, begin, end, workspace_bytes ? space : nullptr);
              }
              const std::string name = isa + " " + f.name() + " " + std::to_string(rows) + "x" +
                                       std::to_string(cols) + " format " +
                                       std::to_string(int(type)) + " way " + std::to_string(way);
              check(codes.are_of(norm), "quant: %s", name.c_str());
              check(!p.y || y.same_bits(norm), "quant: %s: norm", name.c_str());
              bool intact = codes.guards_intact() && y.guards_intact();
              for (const uint8_t* at = space + workspace_bytes;
                   at < workspace.data() + workspace.size(); ++at)
                intact &= *at == 0xa5;
              check(intact, "quant: %s: wrote outside", name.c_str());
            }
          }
}

// A row has the same bits wherever it lies and whatever is done with the rows beside it.
void check_forward_invariance(const std::string& isa) {
  use(isa);
  for (const Forward& f : forward_mixes()) {
    if (!is_chosen({f.x_type, f.w_type})) continue;
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
        check(y.same_bits(y2) && y2.guards_intact(),
              "%s %s %ld: bits depend on the layout %d or the split", isa.c_str(), f.name().c_str(),
              cols, int(layout));
        if (f.y_type() != f.x_type) continue;
        cpu::rms_norm_forward(params(f, x2, w2, x2, nullptr), 0, rows);
        check(y.same_bits(x2), "%s %s %ld: in place", isa.c_str(), f.name().c_str(), cols);
      }
    }
  }
}

// A row alone has the bits of the row among others, and no weight is a weight of ones. So many
// elements of 16 bits that a row in double, which is rounded once, has other bits somewhere.
void check_rows_alone(const std::string& isa) {
  use(isa);
  const int64_t rows = 256, cols = 2048;
  for (const DType type : kFast) {
    if (!is_chosen({type})) continue;
    Tensor x(type, rows, cols), w(type, 1, cols), y(type, rows, cols), alone(type, rows, cols);
    fill_normal(x);
    for (const char* weight : {"none", "one", "normal", "small"}) {
      const Forward f = {type, type, std::strcmp(weight, "none") != 0};
      const bool is_one = !std::strcmp(weight, "one");
      fill(w, [&](int64_t, int64_t) { return is_one ? Real(1) : normal(); });
      if (!std::strcmp(weight, "small")) w.set(0, 1000, 1e-39L);
      cpu::rms_norm_forward(params(f, x, w, is_one ? alone : y, nullptr), 0, rows);
      for (int64_t row = 0; row < rows && !is_one; ++row)
        cpu::rms_norm_forward(params(f, x, w, alone, nullptr), row, row + 1);
      check(y.same_bits(alone), "%s %s, weight %s: bits depend on it, or on the other rows",
            isa.c_str(), f.name().c_str(), weight);
    }
  }
}

// ---------------------------------------------------------------- past the caches

constexpr int64_t kPage = 4096;

// Moves what has a guard of a page to this place in its page.
void place_in_page(Tensor& t, uintptr_t place) {
  t.origin = kPage;
  t.origin -= (reinterpret_cast<uintptr_t>(t.data()) - place) % kPage;
}

// A row is streamed from its first element or from its last, as it lies beside what is read: see
// waits(). The bits are those of an output in the caches.
void check_forward_streams() {
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    for (const DType type : kFast) {
      if (!is_chosen({type})) continue;
      for (const bool weighted : {false, true}) {
        for (const int64_t cols : {64, 100, 160, 2112, 9248}) {
          const Forward f = {type, type, weighted};
          Tensor x(type, 3, cols, Layout::kDense, kPage), w(type, 1, cols, Layout::kDense, kPage);
          Tensor want(type, 3, cols);
          place_in_page(x, 0);
          for (const int64_t w_place : {0, 1024}) {
            place_in_page(w, w_place);
            fill_normal(x);
            fill_normal(w, 0.5, 1);
            cpu::rms_norm_forward(params(f, x, w, want, nullptr), 0, 3);
            for (int64_t place = -192; place <= 192; place += 32) {
              Tensor y(type, 3, cols, Layout::kDense, kPage);
              place_in_page(y, place);
              RmsNormForward p = params(f, x, w, y, nullptr);
              p.stream = true;
              cpu::rms_norm_forward(p, 0, 3);
              check(y.same_bits(want) && y.guards_intact(), "streamed: %s %s 3x%ld at %ld",
                    isa.c_str(), f.name().c_str(), cols, place);
            }
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------- new memory

// Of rows of bytes that nobody has touched yet. It begins within a page.
struct NewMemory {
  static constexpr int64_t kRows = 4100, kCols = 2056;
  const int64_t row_bytes, size;
  char* const pages;
  void* const data;

  explicit NewMemory(DType type)
      : row_bytes(kCols * format(type).bytes),
        size((kRows * row_bytes / kPage + 2) * kPage),
        pages(static_cast<char*>(
            mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))),
        data(pages + 192) {}
  ~NewMemory() { munmap(pages, size); }

  // Whole pages of these rows, in bytes.
  int64_t whole_pages(int64_t row_begin, int64_t row_end) const {
    return ((row_end * row_bytes + 192) / kPage -
            (row_begin * row_bytes + 192 + kPage - 1) / kPage) *
           kPage;
  }
  // Is no page there but those that these rows touch?
  bool is_there_only(int64_t row_begin, int64_t row_end) const {
    std::vector<unsigned char> there(size / kPage);
    mincore(pages, size, there.data());
    const int64_t first = (192 + row_begin * row_bytes) / kPage;
    const int64_t last = (192 + row_end * row_bytes - 1) / kPage;
    for (int64_t page = 0; page < size / kPage; ++page) {
      if ((there[page] & 1) != (page >= first && page <= last)) return false;
    }
    return true;
  }
  bool same_rows(const NewMemory& other, int64_t row_begin, int64_t row_end) const {
    const auto at = [&](const NewMemory& m) { return m.pages + 192 + row_begin * row_bytes; };
    return !std::memcmp(at(*this), at(other), (row_end - row_begin) * row_bytes);
  }
};

// What is large and new is mapped before it is written, where a call writes it, once, and holds the
// same bits.
void check_new_memory() {
  constexpr int64_t kRows = NewMemory::kRows, kCols = NewMemory::kCols;
  constexpr int64_t kBegin = 131, kEnd = 1000;
  const Rows dense{1, {}, {kCols}};
  cpu::set_isa(nullptr);
  if (!is_chosen({DType::kFloat32})) return;
  Tensor in(DType::kFloat32, kRows, kCols), w(DType::kFloat32, 1, kCols);
  fill_normal(in);
  fill_normal(w);
  for (const bool is_sum : {false, true}) {
    const Forward f = {DType::kFloat32, DType::kFloat32, true};
    NewMemory y(f.x_type), want(f.x_type), x(f.x_type), sum(f.x_type);
    RmsNormForward p = params(f, in, w, in, nullptr);
    if (is_sum) p.addends = {in.data(), in.data(), in.dtype, dense, dense};
    const auto run = [&](const NewMemory& to, const NewMemory& x, bool fresh, int64_t rows) {
      mapped_ahead = 0;
      p.y = to.data;
      p.y_rows = dense;
      if (is_sum) p.x = x.data, p.x_rows = dense;
      p.rows = rows;
      p.fresh = fresh;
      cpu::rms_norm_forward(p, kBegin, kEnd);
      return mapped_ahead;
    };
    const char* what = is_sum ? "of a sum" : "of x";
    check(run(want, sum, false, kRows) == 0, "norm %s: mapped what is not new", what);
    const int64_t whole = y.whole_pages(kBegin, kEnd) * (is_sum ? 2 : 1);
    const int64_t ahead = run(y, x, true, kRows);
    // A page between two parts is mapped by the first touch.
    check(ahead <= whole && ahead >= whole * 9 / 10, "norm %s: mapped %ld of %ld", what, ahead,
          whole);
    check(y.is_there_only(kBegin, kEnd), "norm %s: touched other rows of y", what);
    check(y.same_rows(want, kBegin, kEnd), "norm %s: other bits in new memory", what);
    if (is_sum) {
      check(x.is_there_only(kBegin, kEnd) && x.same_rows(sum, kBegin, kEnd), "another sum");
    }
    check(run(y, x, true, kRows) == 0, "norm %s: mapped what is there", what);
    NewMemory small(f.x_type);
    check(run(small, sum, true, kEnd) == 0, "norm %s: mapped what malloc keeps", what);
  }
}

void check_new_gradient() {
  if (!is_chosen({DType::kFloat32})) return;
  cpu::set_isa(nullptr);
  Backward b({DType::kFloat32, DType::kFloat32}, DType::kFloat32, NewMemory::kRows,
             NewMemory::kCols);
  fill_normal(b.x);
  for (int64_t i = 0; i < b.x.rows; ++i) b.rstd.set(0, i, 1 + i % 3);
  NewMemory want(b.f.x_type), dx(b.f.x_type);
  Gradients unused(b);
  RmsNormBackward p = params(b, unused, true, false);
  const cpu::BackwardPlan plan = cpu::rms_norm_backward_plan(p);
  const int64_t begin = 3 * plan.block_rows, end = 40 * plan.block_rows;
  for (const int turn : {0, 1, 2}) {
    mapped_ahead = 0;
    p.dx = turn == 0 ? want.data : dx.data;
    p.fresh = turn > 0;
    cpu::rms_norm_backward(p, 3, 40);
    const int64_t whole = turn == 1 ? dx.whole_pages(begin, end) : 0;
    check(mapped_ahead <= whole && mapped_ahead >= whole * 9 / 10, "dx: mapped %ld of %ld",
          mapped_ahead, whole);
  }
  check(dx.is_there_only(begin, end), "dx: touched other rows");
  check(dx.same_rows(want, begin, end), "dx: other bits in new memory");
}

// ---------------------------------------------------------------- backward

// step < 0: all blocks and columns at once; else so many of them per call, last first. place: dx is
// streamed there in its page.
Gradients run(Backward& b, bool want_dx, bool want_dweight, int64_t step = -1,
              std::optional<uintptr_t> place = std::nullopt) {
  Tensor y(b.f.y_type(), b.x.rows, b.x.cols);
  cpu::rms_norm_forward(params(b.f, b.x, b.w, y, b.rstd.data()), 0, b.x.rows);
  Gradients result(b);
  if (place) {
    result.dx = Tensor(b.f.x_type, b.x.rows, b.x.cols, Layout::kDense, kPage);
    place_in_page(result.dx, *place);
  }
  RmsNormBackward p = params(b, result, want_dx, want_dweight);
  p.stream = place.has_value();
  const cpu::BackwardPlan plan = cpu::rms_norm_backward_plan(p);
  std::vector<unsigned char> space(plan.workspace_bytes + 64, 0xff);
  p.workspace = space.data() + (64 - reinterpret_cast<uintptr_t>(space.data()) % 64) % 64;
  const auto parts = [step](int64_t count, const std::function<void(int64_t, int64_t)>& work) {
    const int64_t n = step < 0 ? count : step;
    for (int64_t begin = (count - 1) / n * n; begin >= 0; begin -= n)
      work(begin, std::min(begin + n, count));
  };
  parts(plan.blocks, [&](int64_t begin, int64_t end) { cpu::rms_norm_backward(p, begin, end); });
  if (want_dweight) {
    parts(b.x.cols,
          [&](int64_t begin, int64_t end) { cpu::rms_norm_backward_dweight(p, begin, end); });
  }
  return result;
}

void check_backward(Backward& b, const char* what) {
  BackwardReference reference(b);
  std::vector<Gradients> results;
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    results.push_back(run(b, true, true));
    Gradients& got = results.back();
    reference.compare(got, (std::string(what) + ": " + isa + " " + b.name()).c_str());
    if (isa == "avx512" && results.size() > 1) {
      check(got.same_bits(results[results.size() - 2]), "%s: %s: AVX-512 is not AVX2", what,
            b.name().c_str());
    }
    for (const int64_t step : {1, 3}) {
      Gradients split = run(b, true, true, step);
      check(split.same_bits(got), "%s: %s %s: bits depend on the split", what, isa.c_str(),
            b.name().c_str());
    }
    Gradients only_dx = run(b, true, false), only_dweight = run(b, false, true);
    check(only_dx.dx.same_bits(got.dx) && only_dweight.dweight.same_bits(got.dweight),
          "%s: %s %s: bits depend on what is wanted", what, isa.c_str(), b.name().c_str());
  }
}

void check_backward_streams() {
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    for (const DType type : kFast) {
      if (!is_chosen({type})) continue;
      for (const int64_t cols : {64, 100, 160, 2112, 9248}) {
        Backward b({type, type}, type, 3, cols);
        b.with_dresidual = cols == 160;
        const uintptr_t beside_x = (reinterpret_cast<uintptr_t>(b.x.data()) + 63) / 64 * 64;
        for (const bool dweight : {false, true}) {
          Gradients want = run(b, true, dweight);
          for (int64_t place = -128; place <= 128; place += 64) {
            Gradients got = run(b, true, dweight, -1, beside_x + place);
            check(got.same_bits(want) && got.guards_intact(), "streamed dx: %s %s at %ld",
                  isa.c_str(), b.name().c_str(), place);
          }
        }
      }
    }
  }
}

void check_backward_sizes() {
  int turn = 0;
  for (const Forward& f : forward_mixes()) {
    for (const DType dy : kFast) {
      if (!is_chosen({f.x_type, f.w_type, dy})) continue;
      for (const int64_t cols : {1, 7, 64, 65, 130, 300}) {
        Backward b(f, dy, cols == 64 ? 40 : 5, cols, kLayouts[turn++ % 4]);
        b.with_dresidual = turn % 3 == 0;
        check_backward(b, "sizes");
      }
    }
    if (!is_chosen({f.x_type, f.w_type, f.y_type()})) continue;
    Backward wide_rows(f, f.y_type(), 19, 8259);  // three blocks, two tiles of weights
    wide_rows.with_dresidual = turn % 2;
    check_backward(wide_rows, "long");
    if (f.offset == 0) {
      Backward many(f, f.y_type(), 1000, 9);  // four blocks
      check_backward(many, "many rows");
    }
  }
  const DType f64 = DType::kFloat64, f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  for (const auto& [f, dy] : {std::pair<Forward, DType>{{f64, f64}, f64},
                              {{f64, f64, false}, f64},
                              {{f32, f32}, f64},
                              {{f32, f64}, f32},
                              {{bf16, f64, true, true}, f64},
                              {{f64, f32, true, true, 1}, f64}}) {
    if (!is_chosen({f.x_type, f.w_type, dy})) continue;
    Backward b(f, dy, 300, 70, Layout::kTwoDims);
    check_backward(b, "some fp64");
  }
  if (!is_chosen({f32})) return;
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
  for (const Case& c : {Case{"huge", f32, 1e-6, 1e37L},
                        {"huge", bf16, 1e-6, 1e37L},
                        {"tiny", f32, 0, 1e-25L},
                        {"rstd overflows", f32, 0, 1e-40L, 1e-10L},
                        {"huge", f64, 1e-6, 1e160L},
                        {"tiny", f64, 0, 1e-170L},
                        {"tiny under eps", f64, 1e-6, 1e-170L},
                        {"g * x overflows", f32, 0, 1e8L, 1e34L},
                        {"g * x overflows", bf16, 0, 1e8L, 1e34L},
                        {"g * x underflows", f32, 0, 1e-8L, 1e-33L},
                        {"g * x underflows", bf16, 0, 1e-8L, 1e-33L},
                        {"no gradient", bf16, 0, 1e-8L, 0}}) {
    if (!is_chosen({c.type})) continue;
    for (int64_t cols : {70, 1100}) {
      Backward b({c.type, c.type, true, false, 0, c.eps}, c.type, 9, cols);
      b.with_dresidual = cols > 1000;
      fill(b.x, [&](int64_t row, int64_t) { return (row == 4 ? c.scale : 1) * normal(); });
      fill(b.dy, [&](int64_t row, int64_t) { return (row == 4 ? c.dy_scale : 1) * normal(); });
      check_backward(b, c.what);
    }
  }
  if (!is_chosen({f32})) return;
  // rstd is a denormal, alone; and in two blocks, in the second at another place than in the first.
  for (const int64_t rows : {1, 300}) {
    Backward b({f32, f32, true, false, 0, 1e-6}, f32, rows, 70);
    fill(b.x, [&](int64_t row, int64_t) {
      const bool is_odd = rows == 1 || row == 44 || row == 261;
      return is_odd ? std::copysign(3e38L, normal()) : normal();
    });
    check_backward(b, "hugest");
  }
  // All terms of a sum are equal, and so are what their additions round off.
  Backward equal({f32, f32}, f32, 256, 64);
  fill(equal.x, [&](int64_t row, int64_t i) { return row ? equal.x.get(0, i) : normal(); });
  fill(equal.dy, [&](int64_t row, int64_t i) { return row ? equal.dy.get(0, i) : normal(); });
  check_backward(equal, "equal rows");
  Backward b({f32, f32}, f32, 9, 70);
  b.x.set(3, 5, NAN);
  check_backward(b, "one NaN");
}

// ---------------------------------------------------------------- with a gate

struct Activated {
  Real value, slope, size;  // size: of the terms of the slope
};
Activated activate(Activation activation, Real g) {
  const Real e = std::exp(-std::fabs(g));
  const Real s = (g < 0 ? e : 1) / (1 + e), rest = (g < 0 ? 1 : e) / (1 + e);
  if (activation == Activation::kSigmoid) return {s, s * rest, s * rest};
  return {g * s, s + g * s * rest, s + std::fabs(g) * s * rest};
}

// A norm and its gate, in one of the ways that they lie in.
struct Gated {
  Forward f;
  int64_t groups;
  bool has_gate = true;
  Gate how{};
  Tensor x, w, gate, dy;

  Gated(const Forward& forward, int64_t rows, int64_t cols, int64_t groups, DType gate_type,
        int turn)
      : f(forward),
        groups(groups),
        x(f.x_type, rows, cols, kLayouts[turn % 4], kGuard),
        w(f.w_type, 1, cols),
        gate(gate_type, rows, cols, kLayouts[(turn + 2) % 4]),
        dy(f.x_type, rows, cols, kLayouts[(turn + 1) % 4]) {
    how.before_norm = turn % 2;
    how.activation = turn % 3 == 2 ? Activation::kSigmoid : Activation::kSilu;
    how.dtype = gate_type;
    how.rows = gate.place;
    fill_normal(x);
    fill_normal(w, 0.5, f.offset != 0 ? 0 : 1);
    fill_normal(dy);
    fill(gate, [&](int64_t row, int64_t col) {
      const Real odd[] = {0, -0.0L, 30, -30, 80, -100, 1000, -1000};
      return (row + col) % 17 == 5 ? odd[(row + col / 17) % 8] : 3 * normal();
    });
  }

  int64_t group_cols() const { return x.cols / groups; }
  bool wide() const { return f.wide() || how.dtype == DType::kFloat64; }
  bool cast() const { return f.cast && f.weighted; }
  Real unit() const { return wide() ? 0x1p-50L : 0x1p-23L; }
  // A first rounding may fall to either side of a tie, relative to a unit.
  Real tie() const {
    return cast() && !wide() ? std::ldexp(1.0L, 1 - format(f.x_type).fraction_bits) / unit() : 0;
  }
  DType y_type() const { return how.before_norm || !has_gate ? f.y_type() : f.x_type; }
  DType rstd_type() const {
    return f.x_type == DType::kFloat64 || (how.before_norm && wide()) ? DType::kFloat64
                                                                      : DType::kFloat32;
  }
  Tensor result() const {
    return {y_type(), x.rows, x.cols, x.place.ndim > 1 ? Layout::kStrided : Layout::kTwoDims,
            kGuard};
  }
  RmsNormGated params(Tensor& y, void* rstd) {
    how.data = has_gate ? gate.data() : nullptr;
    RmsNormForward norm = ::params(f, x, w, y, rstd);
    norm.y_dtype = y.dtype;
    return {norm, how, groups};
  }
  std::string name() const {
    return f.name() + " gate=" + format(how.dtype).name + " " + std::to_string(x.rows) + "x" +
           std::to_string(groups) + "x" + std::to_string(group_cols()) +
           (how.before_norm ? " before" : "") + (has_gate ? "" : " without a gate") +
           (how.activation == Activation::kSigmoid ? " sigmoid" : "");
  }

  Activated act(int64_t row, int64_t i) {
    return has_gate ? activate(how.activation, gate.get(row, i)) : Activated{1, 0, 0};
  }
  // What is normalized.
  Real u(int64_t row, int64_t i) {
    return how.before_norm ? x.get(row, i) * act(row, i).value : x.get(row, i);
  }
  Real rstd(int64_t row, int64_t group) {
    Real sum = 0;
    for (int64_t i = group * group_cols(); i < (group + 1) * group_cols(); ++i)
      sum += u(row, i) * u(row, i);
    return 1 / std::sqrt(sum / group_cols() + f.eps);
  }
  // A gate of fp64 is enough for the offset to be added in fp64.
  Real weight(int64_t i) {
    return wide() && f.weighted && f.offset != 0 ? w.get(0, i) + f.offset : f.weight(w, i);
  }
  Real rounded(DType type, Real v) const { return cast() ? round_to(type, v) : v; }
};

const unsigned char* end_of(const std::vector<unsigned char>& v) { return v.data() + v.size(); }

void run(const RmsNormGated& p, int64_t step) {
  std::vector<unsigned char> space(cpu::rms_norm_gated_workspace(p) + 64 + kGuard, 0xa5);
  unsigned char* const begin = space.data() + (64 - reinterpret_cast<uintptr_t>(space.data()) % 64);
  for (int64_t row = (p.norm.rows - 1) / step * step; row >= 0; row -= step)
    cpu::rms_norm_gated_forward(p, row, std::min(row + step, p.norm.rows), begin);
  const unsigned char* behind = begin + cpu::rms_norm_gated_workspace(p);
  check(std::all_of(behind, end_of(space), [](unsigned char c) { return c == 0xa5; }),
        "gated: wrote outside of its workspace");
}

// Half a unit of a result, and what is rounded before, relative to its size.
bool is_near(Tensor& t, int64_t row, int64_t i, Real want, Real error) {
  const Real got = t.get(row, i);
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
  const Format& f = format(t.dtype);
  if (std::isinf(round_to(t.dtype, want))) return std::isinf(got) || std::fabs(got) > 1e30L;
  const int exponent = want == 0 ? -20000 : std::ilogb(want);
  const Real ulp = std::ldexp(1.0L, std::max(exponent, 1 - f.bias()) - f.fraction_bits);
  return std::fabs(got - want) <= ulp * 0.5001L + error;
}

constexpr Real kTiny = 0x1p-140L;  // of a gate's activation among the denormals

void compare_gated(Gated& g, Tensor& y, Tensor& rstd, const std::string& name) {
  bool close = true;
  for (int64_t row = 0; row < g.x.rows; ++row)
    for (int64_t group = 0; group < g.groups; ++group) {
      const Real r = g.rstd(row, group);
      close &= is_near(rstd, 0, group * g.x.rows + row, r, r * g.unit() * 4);
      for (int64_t i = group * g.group_cols(); i < (group + 1) * g.group_cols(); ++i) {
        const Real act = g.act(row, i).value, xhat = g.rounded(g.f.x_type, g.u(row, i) * r);
        Real want = xhat * g.weight(i);
        Real tiny = g.how.before_norm ? r * std::fabs(g.x.get(row, i)) * kTiny : kTiny;
        if (!g.how.before_norm) want = g.rounded(g.f.promoted_or_x(), want) * act;
        if (g.wide()) tiny = 0;
        const bool ok = is_near(y, row, i, want, g.unit() * (6 + g.tie()) * std::fabs(want) + tiny);
        if (!ok && close)
          std::printf("%s: [%ld][%ld] = %Lg, not %Lg\n", name.c_str(), row, i, y.get(row, i), want);
        close &= ok;
      }
    }
  check(close, "gated: %s", name.c_str());
}

// In two parts, the last rows first, with y and without it.
void check_gated_quant(Gated& g, Tensor& y, const std::string& name) {
  static int turn = 0;
  const int way = ++turn % 5;
  if (g.wide() || !Codes::has(way, g.x.cols)) return;
  for (const bool keeps_y : {false, true}) {
    const Codes codes(QType(turn / 5 % 3), way, g.x.rows, g.x.cols);
    Tensor kept = g.result();
    RmsNormGated p = g.params(kept, nullptr);
    if (!keeps_y) p.norm.y = nullptr;
    p.norm.quant = codes.quant;
    run(p, (g.x.rows + 1) / 2);
    check(codes.are_of(y), "gated: %s in 8 bits, way %d", name.c_str(), way);
    check(codes.guards_intact() && kept.guards_intact(), "gated: %s in 8 bits: wrote outside",
          name.c_str());
    check(!keeps_y || kept.same_bits(y), "gated: %s in 8 bits: norm", name.c_str());
  }
}

void check_gated_forward(Gated g) {
  std::vector<Tensor> results;
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    const std::string name = isa + " " + g.name();
    Tensor y = g.result(), rstd(g.rstd_type(), 1, g.groups * g.x.rows, Layout::kDense, kGuard);
    run(g.params(y, rstd.data()), g.x.rows);
    check(g.wide() || isa == cpu::last_isa(), "gated: ran %s", cpu::last_isa());
    check(y.guards_intact() && rstd.guards_intact(), "gated: %s: wrote outside", name.c_str());
    compare_gated(g, y, rstd, name);
    check_gated_quant(g, y, name);
    if (isa.find("avx512") == 0 && !results.empty())
      check(y.same_bits(results.back()), "gated: %s: AVX-512 is not AVX2", name.c_str());
    results.push_back(y);
    Tensor parts = g.result();
    run(g.params(parts, nullptr), 2);
    check(parts.same_bits(y), "gated: %s: bits depend on the split", name.c_str());
    if (g.y_type() != g.f.x_type) continue;
    Gated there = g;
    run(there.params(there.x, nullptr), g.x.rows);
    check(there.x.same_bits(y) && there.x.guards_intact(), "gated: %s: in place", name.c_str());
  }
}

struct GatedGradients {
  Tensor dx, dweight, dgate;
  explicit GatedGradients(const Gated& g)
      : dx(g.f.x_type, g.x.rows, g.x.cols, Layout::kDense, kGuard),
        dweight(g.f.w_type, 1, g.x.cols, Layout::kDense, kGuard),
        dgate(g.how.dtype, g.x.rows, g.x.cols, Layout::kDense, kGuard) {}
};

GatedGradients run(Gated& g, Tensor& rstd, int64_t step, bool dx, bool dweight, bool dgate) {
  GatedGradients result(g);
  Tensor y = g.result();
  const RmsNormForward norm = g.params(y, nullptr).norm;
  RmsNormGatedBackward p{};
  p.norm.dy = g.dy.data(), p.norm.dy_rows = g.dy.place, p.norm.dy_dtype = g.dy.dtype;
  p.norm.x = norm.x, p.norm.x_rows = norm.x_rows, p.norm.x_dtype = norm.x_dtype;
  p.norm.weight = norm.weight, p.norm.w_dtype = norm.w_dtype, p.norm.rstd = rstd.data();
  p.norm.rows = norm.rows, p.norm.cols = norm.cols, p.norm.eps = norm.eps;
  p.norm.weight_offset = norm.weight_offset;
  p.norm.cast_before_weight = norm.cast_before_weight;
  p.norm.dx = dx ? result.dx.data() : nullptr;
  p.norm.dweight = dweight ? result.dweight.data() : nullptr;
  p.dgate = dgate ? result.dgate.data() : nullptr;
  p.gate = g.how, p.groups = g.groups;
  const cpu::BackwardPlan plan = cpu::rms_norm_gated_backward_plan(p);
  std::vector<double> sums(plan.workspace_bytes / 8 + 8);
  p.norm.workspace = sums.data() + (64 - reinterpret_cast<uintptr_t>(sums.data()) % 64) / 8 % 8;
  std::vector<unsigned char> space(cpu::rms_norm_gated_backward_workspace(p) + 64 + kGuard, 0xa5);
  unsigned char* const tiles = space.data() + (64 - reinterpret_cast<uintptr_t>(space.data()) % 64);
  for (int64_t begin = (plan.blocks - 1) / step * step; begin >= 0; begin -= step)
    cpu::rms_norm_gated_backward(p, begin, std::min(begin + step, plan.blocks), tiles);
  for (int64_t end = p.norm.cols, part = step == 1 ? 100 : end; dweight && end > 0; end -= part)
    cpu::rms_norm_gated_backward_dweight(p, std::max(end - part, int64_t(0)), end);
  const unsigned char* behind = tiles + cpu::rms_norm_gated_backward_workspace(p);
  check(std::all_of(behind, end_of(space), [](unsigned char c) { return c == 0xa5; }),
        "gated: gradients wrote outside of their workspace");
  return result;
}

void compare_gradients(Gated& g, GatedGradients& got, const std::string& name) {
  std::vector<Real> dweight(g.x.cols), dweight_size(g.x.cols), dweight_tiny(g.x.cols);
  const Real unit = g.unit() * 8, cast = g.unit() * g.tie();
  bool close = true;
  const auto see = [&](bool ok, const char* what, int64_t row, int64_t i, Real value, Real want) {
    if (!ok && close)
      std::printf("%s: %s[%ld][%ld] = %Lg, not %Lg\n", name.c_str(), what, row, i, value, want);
    close &= ok;
  };
  for (int64_t row = 0; row < g.x.rows; ++row)
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t first = group * g.group_cols(), last = first + g.group_cols();
      const Real r = g.rstd(row, group);
      const auto dy = [&](int64_t i) {
        return g.dy.get(row, i) * (g.how.before_norm ? 1 : g.act(row, i).value);
      };
      Real mean = 0, mean_size = 0;
      for (int64_t i = first; i < last; ++i) {
        const Real term = dy(i) * g.weight(i) * g.u(row, i) * r / g.group_cols();
        mean += term, mean_size += std::fabs(term);
      }
      for (int64_t i = first; i < last; ++i) {
        const Activated act = g.act(row, i);
        const Real w = g.weight(i), xhat = g.u(row, i) * r;
        const Real du = r * (dy(i) * w - xhat * mean);
        const Real du_size = r * (std::fabs(dy(i) * w) + std::fabs(xhat) * mean_size);
        const bool before = g.how.before_norm;
        const Real dx = before ? du * act.value : du;
        const Real dx_size = before ? du_size * std::fabs(act.value) : du_size;
        const Real v = before ? g.x.get(row, i)
                              : g.rounded(g.f.promoted_or_x(), g.rounded(g.f.x_type, xhat) * w);
        const Real upstream = before ? du : g.dy.get(row, i);
        const Real dgate = upstream * v * act.slope;
        const Real dgate_size = (before ? du_size : std::fabs(upstream)) * std::fabs(v) * act.size;
        const Real tiny = g.wide() ? 0 : kTiny * (1 + du_size);
        see(is_near(got.dx, row, i, dx, unit * dx_size + tiny), "dx", row, i, got.dx.get(row, i),
            dx);
        if (g.has_gate)
          see(is_near(got.dgate, row, i, dgate, (unit + cast) * dgate_size + tiny), "dgate", row, i,
              got.dgate.get(row, i), dgate);
        dweight[i] += dy(i) * (before ? xhat : g.rounded(g.f.x_type, xhat));
        dweight_size[i] += std::fabs(dy(i) * xhat);
        if (!g.wide()) dweight_tiny[i] += kTiny * r * std::fabs(g.dy.get(row, i) * g.x.get(row, i));
      }
    }
  for (int64_t i = 0; i < g.x.cols; ++i)
    see(is_near(got.dweight, 0, i, dweight[i], (unit + cast) * dweight_size[i] + dweight_tiny[i]),
        "dweight", 0, i, got.dweight.get(0, i), dweight[i]);
  check(close, "gated: gradients of %s", name.c_str());
}

void check_gated_backward(Gated g) {
  std::vector<GatedGradients> results;
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    const std::string name = isa + " " + g.name();
    Tensor y = g.result(), rstd(g.rstd_type(), 1, g.groups * g.x.rows);
    run(g.params(y, rstd.data()), g.x.rows);
    GatedGradients& got = results.emplace_back(run(g, rstd, 1000, true, true, true));
    compare_gradients(g, got, name);
    const auto same = [&](GatedGradients& a, bool dx, bool dweight, bool dgate) {
      return (!dx || a.dx.same_bits(got.dx)) && (!dweight || a.dweight.same_bits(got.dweight)) &&
             (!dgate || a.dgate.same_bits(got.dgate));
    };
    if (isa.find("avx512") == 0 && results.size() > 1)
      check(same(results[results.size() - 2], true, true, true), "gated: %s: AVX-512 is not AVX2",
            name.c_str());
    check(got.dx.guards_intact() && got.dweight.guards_intact() && got.dgate.guards_intact(),
          "gated: gradients of %s: wrote outside", name.c_str());
    GatedGradients parts = run(g, rstd, 1, true, true, true);
    check(same(parts, true, true, true), "gated: %s: bits depend on the split", name.c_str());
    for (int wanted = 1; wanted < 7; ++wanted) {
      const bool dx = wanted & 1, dweight = wanted & 2, dgate = wanted & 4;
      GatedGradients some = run(g, rstd, 1000, dx, dweight, dgate);
      check(same(some, dx, dweight, dgate), "gated: %s: bits depend on what is wanted (%d)",
            name.c_str(), wanted);
    }
  }
}

void check_gated() {
  struct Shape {
    int64_t rows, cols, groups;
  };
  const Shape shapes[] = {{5, 64, 1},  {3, 128, 1}, {7, 96, 4},  {2, 300, 1},  {9, 33, 3},
                          {1, 257, 1}, {19, 10, 2}, {40, 64, 2}, {2, 5000, 1}, {3, 1024, 8}};
  std::vector<Forward> mixes = forward_mixes();
  const DType f64 = DType::kFloat64, f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  for (const Forward& f : {Forward{f64, f64}, {f32, f64}, {bf16, f64, true, true}})
    mixes.push_back(f);
  int turn = 0;
  for (const Forward& f : mixes)
    for (int i = 0; i < 4; ++i) {
      const int way = turn++;
      const Shape& s = shapes[way % 10];
      const DType gate = way % 5 == 0 ? f32 : way % 7 == 0 ? bf16 : way % 23 == 0 ? f64 : f.x_type;
      if (!is_chosen({f.x_type, f.w_type})) continue;
      const Gated g(f, s.rows, s.cols, s.groups, gate, way);
      check_gated_forward(g);
      check_gated_backward(g);
      Gated groups_alone(f, s.rows, s.cols, s.groups, f.x_type, 2 * way);
      groups_alone.has_gate = false;
      check_gated_forward(groups_alone);
      check_gated_backward(groups_alone);
    }
  // What is no number, and rows out of the fast path's range.
  for (const DType type : {f32, bf16, DType::kFloat16})
    for (const int turn : {0, 1}) {
      if (!is_chosen({type})) continue;
      Gated g({type, type}, 6, 64, 1, type, turn);
      g.x.set(1, 5, NAN);
      g.gate.set(2, 7, NAN);
      g.x.set(3, 5, INFINITY);
      g.gate.set(4, 9, INFINITY);
      for (int64_t i = 0; i < 64; ++i) g.x.set(5, i, g.x.get(5, i) * (type == f32 ? 1e25L : 1e-5L));
      check_gated_forward(g);
    }
}

// ---------------------------------------------------------------- rotary embedding

// q or k of some tokens, and their angles, in one of the ways that they lie in.
struct Rotary {
  Forward f;
  int64_t tokens, heads, cols, pairs;
  bool across, interleaved, cached;  // across: one variance for all heads of a token
  int axis_count;
  DType angle_type;
  Tensor x, w, cos, sin;
  std::vector<int64_t> positions;
  Rope rope{};

  Rotary(const Forward& forward, int64_t tokens, int64_t heads, int64_t cols, int64_t pairs,
         int turn)
      : f(forward),
        tokens(tokens),
        heads(heads),
        cols(cols),
        pairs(pairs),
        across(turn % 5 == 0),
        interleaved(turn % 2),
        cached(turn % 3 == 0),
        axis_count(turn % 4 == 3 ? 3 : 1),
        angle_type(turn % 7 < 4   ? f.y_type()
                   : turn % 7 < 6 ? DType::kFloat32
                                  : DType::kFloat64),
        x(f.x_type, across ? tokens : tokens * heads, across ? heads * cols : cols,
          kLayouts[turn % 4], kGuard),
        w(f.w_type, 1, x.cols),
        cos(angle_type, angle_rows(), pairs, angle_layout(turn)),
        sin(angle_type, angle_rows(), pairs, angle_layout(turn)) {
    fill_normal(x);
    fill_normal(w, 0.5, f.offset != 0 ? 0 : 1);
    fill_normal(cos, 0.5);
    fill_normal(sin, 0.5);
    rope.cos = cos.data();
    rope.sin = sin.data();
    rope.angle_rows = cos.place;
    rope.tokens = tokens;
    rope.pairs = pairs;
    rope.axis_count = axis_count;
    rope.axis_stride = cached ? 0 : tokens * cos.place.stride[0];
    rope.dtype = angle_type;
    rope.interleaved = interleaved;
    for (int64_t i = 0; i < pairs; ++i) rope.axes[i] = uint8_t(i * 7 % axis_count);
    for (int64_t i = 0; cached && i < axis_count * tokens; ++i)
      positions.push_back((i * 5 + 3) % angle_rows());
    if (cached) rope.positions = positions.data();
  }

  int64_t angle_rows() const { return cached ? 11 : axis_count * tokens; }
  Layout angle_layout(int turn) const {
    if (!cached && axis_count == 1 && turn % 6 == 1) return Layout::kExpanded;
    if (!cached && axis_count == 1 && turn % 6 == 5) return Layout::kTwoDims;
    return turn % 2 ? Layout::kDense : Layout::kStrided;
  }
  Tensor result() const {
    return {f.y_type(), x.rows, x.cols, x.place.ndim > 1 ? Layout::kTwoDims : Layout::kStrided,
            kGuard};
  }
  int64_t token_of(int64_t row) const { return across ? row : row / heads; }
  // The row of cos and sin, of a pair.
  int64_t angle_row(int64_t row, int64_t pair) const {
    const int64_t axis = axis_count == 1 ? 0 : rope.axes[pair], token = token_of(row);
    return cached ? positions[axis * tokens + token] : axis * tokens + token;
  }
  // f(row, column a, column b, cos, sin) for all pairs.
  template <class F>
  void for_each_pair(const F& f) {
    for (int64_t row = 0; row < x.rows; ++row)
      for (int64_t head = 0; head < x.cols; head += cols)
        for (int64_t i = 0; i < pairs; ++i) {
          const int64_t from = angle_row(row, i), a = head + (interleaved ? 2 * i : i);
          f(row, a, interleaved ? a + 1 : a + pairs, cos.get(from, i), sin.get(from, i));
        }
  }
  RmsNormRope params(Tensor& y, void* rstd) {
    return {::params(f, x, w, y, rstd), rope, across ? 1 : heads, across ? heads : 1, 1};
  }
  std::string name() const {
    return f.name() + " angles=" + format(angle_type).name + " " + std::to_string(tokens) + "x" +
           std::to_string(heads) + "x" + std::to_string(cols) + (across ? " across" : "") +
           (interleaved ? " interleaved" : "") + (cached ? " cached" : "") +
           (axis_count > 1 ? " axes" : "") + (rope.round_each_step ? " each step rounded" : "");
  }
};

// In parts of `step` rows, the last first.
void run(const RmsNormRope& p, int64_t step) {
  const int64_t bytes = cpu::rms_norm_rope_workspace(p);
  std::vector<unsigned char> space(bytes + 2 * kGuard, 0xa5);
  for (int64_t begin = (p.norm.rows - 1) / step * step; begin >= 0; begin -= step)
    cpu::rms_norm_rope_forward(p, begin, std::min(begin + step, p.norm.rows),
                               space.data() + kGuard);
  bool intact = true;
  for (size_t i = 0; i < kGuard; ++i)
    intact &= space[i] == 0xa5 && space[space.size() - 1 - i] == 0xa5;
  check(intact, "rope: wrote outside of its workspace");
}

// Each step as it is rounded: from the norm of the same kernels.
void rotate_in_steps(Rotary& r, Tensor& norm) {
  const bool fp64 = norm.dtype == DType::kFloat64;
  const DType type = fp64 || r.angle_type == norm.dtype ? norm.dtype : DType::kFloat32;
  // In fp64 by its own operators: by way of Real it would be rounded twice.
  const auto product = [&](Real v, Real w) {
    return fp64 ? Real(double(v) * double(w)) : round_to(type, v * w);
  };
  const auto sum = [&](Real v, Real w) {
    return fp64 ? Real(double(v) + double(w)) : round_to(type, v + w);
  };
  r.for_each_pair([&](int64_t row, int64_t a, int64_t b, Real cos, Real sin) {
    const Real c = fp64 ? cos : Real(float(cos)), s = fp64 ? sin : Real(float(sin));
    const Real left = norm.get(row, a), right = norm.get(row, b);
    norm.set(row, a, sum(product(left, c), -product(right, s)));
    norm.set(row, b, sum(product(right, c), product(left, s)));
  });
}

// Half a unit of the result, and what is rounded before: the norm, of fp32 (twice), and a product.
// A first rounding may fall to either side of a tie.
void compare_rotated(Rotary& r, Tensor& y, const char* name) {
  const Forward& f = r.f;
  const Real unit = f.wide() ? 0x1p-50L : 0x1p-23L;
  const Real tie =
      f.cast && !f.wide() ? std::ldexp(1.0L, -format(f.x_type).fraction_bits) / unit : 0;
  const Tensor& x = r.x;
  std::vector<Real> want(x.rows * x.cols), size(x.rows * x.cols);
  for (int64_t row = 0; row < x.rows; ++row) {
    const Real rstd = reference_rstd(f, r.x, row);
    for (int64_t i = 0; i < x.cols; ++i) {
      Real xhat = r.x.get(row, i) * rstd;
      if (f.cast) xhat = round_to(f.x_type, xhat);
      want[row * x.cols + i] = xhat * f.weight(r.w, i);
      size[row * x.cols + i] = std::fabs(want[row * x.cols + i]);
    }
  }
  r.for_each_pair([&](int64_t row, int64_t a, int64_t b, Real cos, Real sin) {
    Real* const v = &want[row * x.cols];
    Real* const s = &size[row * x.cols];
    const Real turned = v[a] * cos - v[b] * sin;
    v[b] = v[b] * cos + v[a] * sin;
    v[a] = turned;
    const Real larger = s[a] * std::fabs(cos) + s[b] * std::fabs(sin);
    s[b] = s[b] * std::fabs(cos) + s[a] * std::fabs(sin);
    s[a] = larger;
  });
  bool close = true;
  for (int64_t row = 0; row < x.rows; ++row)
    for (int64_t i = 0; i < x.cols; ++i) {
      const Real expected = want[row * x.cols + i], got = y.get(row, i);
      if (std::isnan(expected) || std::isinf(expected)) {
        close &= std::isnan(expected) == std::isnan(got) && (std::isnan(got) || got == expected);
        continue;
      }
      const int exponent = expected == 0 ? -20000 : std::ilogb(expected);
      const Real ulp = std::ldexp(
          1.0L, std::max(exponent, 1 - format(y.dtype).bias()) - format(y.dtype).fraction_bits);
      const Real bound = ulp * 0.5001L + unit * (2 + tie) * size[row * x.cols + i];
      const bool ok = std::fabs(got - expected) <= bound;
      if (!ok && close) std::printf("%s: [%ld][%ld] = %Lg, not %Lg\n", name, row, i, got, expected);
      close &= ok;
    }
  check(close, "rope: %s", name);
}

void check_rope_forward(Rotary r) {
  std::vector<Tensor> results;
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    for (const bool each : {false, true}) {
      r.rope.round_each_step = each;
      const std::string name = isa + " " + r.name();
      Tensor y = r.result(), rstd(r.f.rstd_type(), 1, r.x.rows, Layout::kDense, kGuard);
      Tensor norm(r.f.y_type(), r.x.rows, r.x.cols), norms_rstd = rstd;
      run(r.params(y, rstd.data()), r.x.rows);
      check(r.f.wide() || isa == cpu::last_isa(), "rope: ran %s", cpu::last_isa());
      check(y.guards_intact() && rstd.guards_intact(), "rope: %s: wrote outside", name.c_str());
      cpu::rms_norm_forward(params(r.f, r.x, r.w, norm, norms_rstd.data()), 0, r.x.rows);
      check(rstd.same_bits(norms_rstd), "rope: %s: rstd", name.c_str());
      if (each) {
        rotate_in_steps(r, norm);
        bool same = true;
        for (int64_t row = 0; row < y.rows; ++row)
          for (int64_t i = 0; i < y.cols; ++i)
            same &= ulps(y.dtype, y.bits(row, i), norm.bits(row, i)) == 0;
        check(same, "rope: %s: other bits than step by step", name.c_str());
      } else {
        compare_rotated(r, y, name.c_str());
        if (isa.find("avx512") == 0 && !results.empty())
          check(y.same_bits(results.back()), "rope: %s: AVX-512 is not AVX2", name.c_str());
        results.push_back(y);
      }
      Tensor parts = r.result();
      run(r.params(parts, nullptr), 2);
      check(parts.same_bits(y), "rope: %s: bits depend on the split", name.c_str());
      if (r.f.y_type() != r.f.x_type) continue;
      Rotary there = r;
      there.rope.cos = there.cos.data(), there.rope.sin = there.sin.data();
      if (there.cached) there.rope.positions = there.positions.data();
      run(there.params(there.x, nullptr), r.x.rows);
      check(there.x.same_bits(y) && there.x.guards_intact(), "rope: %s: in place", name.c_str());
    }
  }
}

void check_rope_backward(Rotary r, DType dy_type) {
  Backward b(r.f, dy_type, r.x.rows, r.x.cols);
  Backward turned(r.f, r.f.wide() || dy_type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
                  r.x.rows, r.x.cols);
  b.x = turned.x = r.x;
  b.w = turned.w = r.w;
  std::vector<Real> size(r.x.rows * r.x.cols);
  fill(turned.dy, [&](int64_t row, int64_t i) {
    size[row * r.x.cols + i] = std::fabs(b.dy.get(row, i));
    return b.dy.get(row, i);
  });
  r.for_each_pair([&](int64_t row, int64_t a, int64_t b_col, Real cos, Real sin) {
    const Real left = b.dy.get(row, a), right = b.dy.get(row, b_col);
    turned.dy.set(row, a, left * cos + right * sin);
    turned.dy.set(row, b_col, right * cos - left * sin);
    size[row * r.x.cols + a] = std::fabs(left * cos) + std::fabs(right * sin);
    size[row * r.x.cols + b_col] = std::fabs(right * cos) + std::fabs(left * sin);
  });
  BackwardReference reference(turned);
  reference.unit = std::max(reference.unit, r.f.wide() ? 0 : 0x1p-23L);
  for (int64_t row = 0; row < r.x.rows; ++row) {  // two roundings of what was turned
    const Real rstd = reference_rstd(r.f, r.x, row);
    Real mean = 0;
    const auto of_x = [&](int64_t i) {
      return 2 * size[row * r.x.cols + i] * std::fabs(r.x.get(row, i) * rstd);
    };
    const auto weight = [&](int64_t i) { return std::fabs(r.f.weight(r.w, i)); };
    for (int64_t i = 0; i < r.x.cols; ++i) {
      mean += of_x(i) * weight(i) / r.x.cols;
      reference.dweight_size[i] += of_x(i);
    }
    for (int64_t i = 0; i < r.x.cols; ++i)
      reference.dx_size[row * r.x.cols + i] += rstd * (2 * size[row * r.x.cols + i] * weight(i) +
                                                       std::fabs(r.x.get(row, i) * rstd) * mean);
  }
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    Tensor y(r.f.y_type(), r.x.rows, r.x.cols);
    cpu::rms_norm_forward(params(b.f, b.x, b.w, y, b.rstd.data()), 0, b.x.rows);
    std::vector<Gradients> results;
    for (const int64_t step : {int64_t(1), int64_t(1000)}) {
      Gradients& got = results.emplace_back(b);
      RmsNormRopeBackward p = {params(b, got, true, true), r.rope, r.across ? 1 : r.heads,
                               r.across ? r.heads : 1, 1};
      const cpu::BackwardPlan plan = cpu::rms_norm_backward_plan(p.norm);
      std::vector<double> sums(plan.workspace_bytes / 8 + 8);
      p.norm.workspace = sums.data() + (64 - reinterpret_cast<uintptr_t>(sums.data()) % 64) / 8 % 8;
      std::vector<unsigned char> tile(cpu::rms_norm_rope_backward_workspace(p) + 1, 0xa5);
      for (int64_t begin = (plan.blocks - 1) / step * step; begin >= 0; begin -= step)
        cpu::rms_norm_rope_backward(p, begin, std::min(begin + step, plan.blocks), tile.data());
      check(tile.back() == 0xa5, "rope: gradient's workspace");
      cpu::rms_norm_backward_dweight(p.norm, 0, p.norm.cols);
    }
    const std::string name = "rope " + isa + " " + r.name() + " dy=" + format(dy_type).name;
    reference.compare(results[0], name.c_str());
    check(results[0].same_bits(results[1]), "%s: bits depend on the split", name.c_str());
  }
}

// Past the caches and through them, by where y lies; turns: interleaved heads and others.
void check_rope_streams() {
  for (const std::string& isa : instruction_sets()) {
    use(isa);
    for (const DType type : kFast)
      for (const int turn : {1, 2, 5})
        for (int64_t place = -192; is_chosen({type}) && place <= 192; place += 32) {
          Rotary r({type, type}, 3, 2, 128, 32, turn);
          r.rope.round_each_step = place % 64;
          Tensor want(type, r.x.rows, r.x.cols), y(type, r.x.rows, r.x.cols, Layout::kDense, kPage);
          run(r.params(want, nullptr), r.x.rows);
          place_in_page(y, place);
          RmsNormRope p = r.params(y, nullptr);
          p.norm.stream = true;
          run(p, 4);
          check(y.same_bits(want) && y.guards_intact(), "rope streamed: %s %s at %ld", isa.c_str(),
                r.name().c_str(), place);
        }
  }
}

void check_rope() {
  struct Shape {
    int64_t tokens, heads, cols, pairs;
  };
  const Shape shapes[] = {{5, 4, 64, 32},   {3, 2, 128, 64}, {7, 1, 96, 48},
                          {2, 3, 256, 32},  {9, 2, 32, 16},  {1, 8, 80, 40},
                          {2, 1, 512, 256}, {3, 3, 10, 3},   {40, 3, 128, 64}};
  int turn = 0;
  std::vector<Forward> mixes = forward_mixes();
  const DType f64 = DType::kFloat64, f32 = DType::kFloat32, bf16 = DType::kBFloat16;
  for (const Forward& f : {Forward{f64, f64}, {f32, f64}, {bf16, f64, true, true}})
    mixes.push_back(f);
  for (const Forward& f : mixes)
    for (int i = 0; i < 3; ++i) {
      const Shape& s = shapes[turn % 9];
      const int way = turn++;
      if (!is_chosen({f.x_type, f.w_type})) continue;
      const Rotary r(f, s.tokens, s.heads, s.cols, s.pairs, way);
      check_rope_forward(r);
      check_rope_backward(r, way % 4 ? f.y_type() : f32);
    }
  // What is no number, what has no exponent, and rows out of the fast path's range.
  for (const DType type : {f32, bf16, DType::kFloat16})
    for (const int turn : {1, 2}) {
      if (!is_chosen({type})) continue;
      Rotary r({type, type}, 6, 2, 64, 32, turn);
      for (const auto& [row, value] :
           {std::pair<int64_t, Real>{1, NAN}, {3, INFINITY}, {5, 0}, {6, -0.0L}, {7, 1e30L}})
        r.x.set(row, 5, value);
      r.w.set(0, 7, type == f32 ? 1e-30L : 1e-39L);  // of BFloat16 a denormal
      r.w.set(0, 39, 0);
      check_rope_forward(r);
      r.cos.set(2, 3, NAN);
      r.sin.set(3, 3, INFINITY);
      for (int64_t i = 0; i < r.pairs; ++i) r.sin.set(4, i, 0);
      check_rope_forward(r);
    }
}

}  // namespace

int main(int argc, char** argv) {
  arguments.assign(argv + 1, argv + argc);
  const auto is_part = [](const char* name) {
    return is_chosen(name, {"choice", "forward", "quant", "backward", "gated", "rope"});
  };
  if (is_part("choice")) {
    check_instruction_sets();
    check_writes_past_caches();
    check_backward_plan();
  }
  if (is_part("forward")) {
    check_forward_sizes();
    check_forward_extremes();
    check_forward_all_values();
    check_fused_mixes();
    for (const std::string& isa : instruction_sets()) {
      check_forward_invariance(isa);
      check_rows_alone(isa);
    }
    check_forward_streams();
    check_new_memory();
  }
  if (is_part("quant")) check_quant();
  if (is_part("backward")) {
    check_backward_streams();
    check_new_gradient();
    check_backward_sizes();
    check_backward_extremes();
  }
  if (is_part("gated")) check_gated();
  if (is_part("rope")) {
    check_rope();
    check_rope_streams();
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
