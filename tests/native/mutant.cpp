// For .ci/mutate.py: an instruction set in which a mutant's kernels do the calls of one dtype, or
// all, and the originals the others. Kernels for one dtype compile in a tenth of the time.
//   ISA, ORIGINAL, MUTANT: names of Kernels; the mutant's are nullptr where its family has none
//   ALL: 1, or 0 and DTYPE: the only dtype of the calls that are the mutant's
#include "../../csrc/cpu/kernels.h"

namespace rmsnorm::cpu {

extern const Kernels ORIGINAL, MUTANT;

namespace {

bool is(DType dtype) { return ALL || dtype == DType::DTYPE; }
bool is_of_mutant(const RmsNormForward& p) {
  return is(p.x_dtype) && is(p.y_dtype) && (!p.weight || is(p.w_dtype)) &&
         (!p.addends.input || is(p.addends.input_dtype));
}
bool is_of_mutant(const RmsNormBackward& p) {
  return is(p.x_dtype) && is(p.dy_dtype) && (!(p.weight || p.dweight) || is(p.w_dtype));
}
// From one dtype to another.
bool is_of_mutant(const Rope&) { return ALL; }
bool is_of_mutant(const GatedRows&) { return ALL; }

template <auto kKernel, class P, class... Range>
void run(const P& p, Range... range) {
  if (MUTANT.*kKernel && is_of_mutant(p)) return (MUTANT.*kKernel)(p, range...);
  (ORIGINAL.*kKernel)(p, range...);
  set_last_isa(ISA.name);
}

void forward(const RmsNormForward& p, int64_t begin, int64_t end, int64_t y_begin) {
  run<&Kernels::forward>(p, begin, end, y_begin);
}
void backward(const RmsNormBackward& p, int64_t begin, int64_t end) {
  run<&Kernels::backward>(p, begin, end);
}
void dweight(const RmsNormBackward& p, int64_t begin, int64_t end) {
  run<&Kernels::dweight>(p, begin, end);
}
void quantize(const RmsNormForward& p, int64_t begin, int64_t end, int64_t y_begin) {
  run<&Kernels::quantize>(p, begin, end, y_begin);
}

void gate(const GatedRows& rows, int64_t begin, int64_t end) {
  run<&Kernels::gate>(rows, begin, end);
}
void gate_gradients(const GatedRows& rows, int64_t begin, int64_t end) {
  run<&Kernels::gate_gradients>(rows, begin, end);
}

void rotate(const Rope& rope, const RotatedRows& rows, int64_t begin, int64_t end) {
  run<&Kernels::rotate, Rope, const RotatedRows&>(rope, rows, begin, end);
}

bool rope_forward(const RmsNormRope& p, int64_t begin, int64_t end, void* tile) {
  const bool is_mutants = MUTANT.rope_forward && is_of_mutant(p.norm);
  const bool done = (is_mutants ? MUTANT : ORIGINAL).rope_forward(p, begin, end, tile);
  set_last_isa(ISA.name);
  return done;
}

}  // namespace

const Kernels ISA = {NAME, forward,        backward, dweight,     quantize,
                     gate, gate_gradients, rotate,   rope_forward};

}  // namespace rmsnorm::cpu
