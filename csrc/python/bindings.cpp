// _C: the eager entry points, the instruction set in use, and what was built.
//
// An entry point parses its arguments and calls the dispatcher: there is no second path. Arguments of the plainest types
// are taken as they are; any others go to torch's own parser, as those of torch.nn.functional do. It is a plain C
// function in a pybind11 module: a pybind11 function with an at::Tensor caster costs more than the rest of the call.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include <cstring>

#include "../torch/checks.h"
#include "../torch/signatures.h"

namespace py = pybind11;

namespace {

using namespace rmsnorm;

// To let go of the GIL and take it back costs 60 ns, and the kernels take a few us for so many elements.
constexpr int64_t kBriefElements = 16 << 10;

PyObject* call(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
               std::optional<double> eps, double weight_offset, bool cast_before_weight, const OptionalTensor& out) {
  static const auto op = find<Signature>("rmsnorm_cuda::rms_norm");
  static const auto out_op = find<OutSignature>("rmsnorm_cuda::rms_norm", "out");
  Tensor result;
  {
    std::optional<py::gil_scoped_release> no_gil;
    if (input.sym_numel().maybe_as_int().value_or(kBriefElements) >= kBriefElements) no_gil.emplace();
    if (out) {
      out_op.call(input, normalized_shape, weight, eps, weight_offset, cast_before_weight, *out);
      result = *out;
    } else {
      result = op.call(input, normalized_shape, weight, eps, weight_offset, cast_before_weight);
    }
  }
  return THPVariable_Wrap(std::move(result));
}

constexpr Py_ssize_t kArguments = 7;

// numpy's numbers stand for an integer (normalized_shape) or a bool (cast_before_weight), and torch's parser refuses them.
py::object of_numpy(py::handle object) {
  const bool is = std::strncmp(Py_TYPE(object.ptr())->tp_name, "numpy.", 6) == 0;
  if (is && std::strncmp(Py_TYPE(object.ptr())->tp_name, "numpy.bool", 10) == 0) return py::bool_(PyObject_IsTrue(object.ptr()) == 1);
  if (is && PyIndex_Check(object.ptr()) && !PySequence_Check(object.ptr())) {
    return py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  }
  return py::reinterpret_borrow<py::object>(object);
}

PyObject* parse_and_call(PyObject* args) {
  static torch::PythonArgParser parser(
      {"rms_norm(Tensor input, SymIntArrayRef[1] normalized_shape, Tensor? weight=None, double? eps=None, "
       "double weight_offset=0.0, bool cast_before_weight=False, Tensor? out=None)"},
      /*traceable=*/false);
  torch::ParsedArgs<kArguments> parsed;
  torch::PythonArgs r = parser.parse(args, nullptr, parsed);
  // Of nested tensors' override F.rms_norm is all that it knows; they have our ops (integrations/jagged.py).
  PyObject* const input = PyTuple_GET_ITEM(args, 0);
  const bool is_nested = THPVariable_Check(input) && THPVariable_Unpack(input).is_nested();
  if (r.has_torch_function() && (at::impl::torch_function_mode_enabled() || !is_nested)) {
    // The override is handed the public function, and what torch.nn.functional.rms_norm would hand it: the options that
    // are ours only where they are not at their defaults.
    const py::module_ package = py::module_::import("rmsnorm_cuda");
    const py::tuple all = py::reinterpret_borrow<py::tuple>(args);
    py::dict keywords;
    constexpr const char* names[] = {"weight", "eps", "weight_offset", "cast_before_weight", "out"};
    const py::object defaults[] = {py::object(), py::object(), py::int_(0), py::bool_(false), py::none()};
    for (size_t i = 2; i < all.size(); ++i) {
      const bool is_default = defaults[i - 2] && !THPVariable_Check(all[i].ptr()) && py::object(all[i]).equal(defaults[i - 2]);
      if (!is_default) keywords[names[i - 2]] = all[i];
    }
    const py::tuple positional = all[py::slice(0, 2, 1)];
    return torch::handle_torch_function_no_python_arg_parser(r.overloaded_args, positional.ptr(), keywords.ptr(),
                                                             "rms_norm", package.attr("rms_norm").ptr(),
                                                             "rmsnorm_cuda");
  }
  return call(r.tensor(0), r.symintlist(1), r.optionalTensor(2), r.toDoubleOptional(3), r.toDouble(4), r.toBool(5),
              r.optionalTensor(6));
}

// The C++ value of an argument of exactly the type that it mostly has; false: it is of another.
bool plain(PyObject* object, Tensor& value) {
  if (!THPVariable_CheckExact(object)) return false;
  value = THPVariable_Unpack(object);
  return true;
}
bool plain(PyObject* object, bool& value) {
  value = object == Py_True;
  return PyBool_Check(object);
}
bool plain(PyObject* object, at::ScalarType& value) {
  if (!THPDtype_Check(object)) return false;
  value = reinterpret_cast<THPDtype*>(object)->scalar_type;
  return true;
}
bool plain(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0 && value >= 0;
}
bool plain(PyObject* object, double& value) {
  value = PyFloat_CheckExact(object) ? PyFloat_AS_DOUBLE(object) : 0;
  int64_t whole = 0;
  return PyFloat_CheckExact(object) || (plain(object, whole) && whole == 0);
}
// A shape of one dimension, which nearly all are.
struct Shape {
  c10::SymInt cols;
  operator SymIntArrayRef() const { return cols; }
};
bool plain(PyObject* object, Shape& value) {
  int64_t cols = 0;
  const bool is = plain(PyTuple_Check(object) && PyTuple_GET_SIZE(object) == 1 ? PyTuple_GET_ITEM(object, 0) : object, cols);
  value.cols = cols;
  return is;
}
template <class T>
bool plain(PyObject* object, std::optional<T>& value) {
  return Py_IsNone(object) || plain(object, value.emplace());
}
// rms_norm(input, normalized_shape, weight, eps, weight_offset, cast_before_weight, out): the Python
// function of the same name passes all seven by position.
PyObject* rms_norm(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensor input;
  Shape normalized_shape;
  OptionalTensor weight, out;
  std::optional<double> eps;
  double weight_offset = 0;
  bool cast_before_weight = false;
  if (count == kArguments && !at::impl::torch_function_mode_enabled() && plain(args[0], input) &&
      plain(args[1], normalized_shape) && plain(args[2], weight) && plain(args[3], eps) && plain(args[4], weight_offset) &&
      plain(args[5], cast_before_weight) && plain(args[6], out)) {
    return call(input, normalized_shape, weight, eps, weight_offset, cast_before_weight, out);
  }
  py::tuple all(count);
  for (Py_ssize_t i = 0; i < count; ++i) all[i] = i == 1 || i == 5 ? of_numpy(args[i]) : py::reinterpret_borrow<py::object>(args[i]);
  return parse_and_call(all.ptr());
  END_HANDLE_TH_ERRORS
}

// Arguments of the plainest types, one after the other.
struct Plain {
  PyObject* const* args;
  bool all = !at::impl::torch_function_mode_enabled();

  template <class T>
  T next() {
    T value{};
    all = all && plain(*args++, value);
    return value;
  }
};

// An op of (input, residual or normalized_shape, weight, eps, weight_offset, cast_before_weight): its result or results, or
// NotImplemented for arguments that are not of the plainest types: those are for torch.ops.
template <const char* kName, class OpSignature>
PyObject* plain_call(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto op = find<OpSignature>(kName);
  constexpr bool kFused = !std::is_same_v<OpSignature, ForwardSignature>;
  if (count != 6) Py_RETURN_NOTIMPLEMENTED;
  Plain in{args};
  const auto input = in.next<Tensor>();
  const auto second = in.next<std::conditional_t<kFused, Tensor, Shape>>();
  const auto weight = in.next<OptionalTensor>();
  const auto eps = in.next<std::optional<double>>();
  const auto weight_offset = in.next<double>();
  const auto cast = in.next<bool>();
  if (!in.all) Py_RETURN_NOTIMPLEMENTED;
  std::optional<py::gil_scoped_release> no_gil;
  if (input.sym_numel().maybe_as_int().value_or(kBriefElements) >= kBriefElements) no_gil.emplace();
  if constexpr (std::is_void_v<decltype(op.call(input, second, weight, eps, weight_offset, cast))>) {
    op.call(input, second, weight, eps, weight_offset, cast);
    no_gil.reset();
    Py_RETURN_NONE;
  } else {
    auto results = op.call(input, second, weight, eps, weight_offset, cast);
    no_gil.reset();
    return std::apply([](auto&... all) { return py::make_tuple(std::move(all)...); }, results).release().ptr();
  }
  END_HANDLE_TH_ERRORS
}
constexpr char kForwardName[] = "rmsnorm_cuda::rms_norm_forward", kFusedName[] = "rmsnorm_cuda::fused_add_rms_norm",
               kFusedForwardName[] = "rmsnorm_cuda::fused_add_rms_norm_forward", kFusedInPlaceName[] = "rmsnorm_cuda::fused_add_rms_norm_";

// rms_norm_quant(input, weight, scale, eps, dtype, block, scale_ub, column_major, return_norm, weight_offset,
// cast_before_weight, out), and fused_add_rms_norm_quant with residual after input: what the public functions return, or
// NotImplemented as above.
template <bool kFused>
PyObject* rms_norm_quant(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 12 + kFused) Py_RETURN_NOTIMPLEMENTED;
  Plain in{args};
  const auto input = in.next<Tensor>();
  const auto residual = kFused ? in.next<Tensor>() : Tensor();
  const auto weight = in.next<OptionalTensor>(), scale = in.next<OptionalTensor>();
  const auto eps = in.next<std::optional<double>>();
  const auto dtype = in.next<at::ScalarType>();
  const auto block = in.next<std::optional<int64_t>>();
  const auto scale_ub = in.next<std::optional<double>>();
  const auto column_major = in.next<bool>(), return_norm = in.next<bool>();
  const auto weight_offset = in.next<double>();
  const auto cast = in.next<bool>();
  if (!in.all) Py_RETURN_NOTIMPLEMENTED;

  std::array<Tensor, 4> results;  // in order: output, scale, residual_out if kFused, norm
  PyObject* const out = args[count - 1];
  const size_t wanted = 2 + kFused + return_norm;
  if (out != Py_None) {
    if (!PyTuple_CheckExact(out) || PyTuple_GET_SIZE(out) != static_cast<Py_ssize_t>(wanted)) Py_RETURN_NOTIMPLEMENTED;
    for (size_t i = 0; i < wanted; ++i) {
      if (!plain(PyTuple_GET_ITEM(out, i), results[i])) Py_RETURN_NOTIMPLEMENTED;
    }
    // What is not wanted is a tensor without elements.
    if (scale) results[1] = at::empty({0}, input.options().dtype(at::kFloat));
    if (!return_norm) results[wanted] = at::empty({0}, input.options().dtype(output_type(input, weight, cast)));
  }
  std::optional<py::gil_scoped_release> no_gil;
  if (input.sym_numel().maybe_as_int().value_or(kBriefElements) >= kBriefElements) no_gil.emplace();
  constexpr const char* name = kFused ? "rmsnorm_cuda::fused_add_rms_norm_quant" : "rmsnorm_cuda::rms_norm_quant";
  auto& [output, found, third, fourth] = results;
  const auto run = [&](const auto&... tensors) {
    if (out == Py_None) {
      static const auto op = find<std::conditional_t<kFused, FusedQuantSignature, QuantSignature>>(name);
      auto made = op.call(tensors..., weight, scale, eps, dtype, block, scale_ub, column_major, return_norm, weight_offset, cast);
      std::tie(output, found, third) = std::tie(std::get<0>(made), std::get<1>(made), std::get<2>(made));
      if constexpr (kFused) fourth = std::get<3>(made);
    } else {
      static const auto op = find<std::conditional_t<kFused, FusedQuantOutSignature, QuantOutSignature>>(name, "out");
      const auto to = [&](const auto&... more) {
        op.call(tensors..., weight, scale, eps, dtype, block, scale_ub, column_major, return_norm, weight_offset, cast, output,
                found, third, more...);
      };
      if constexpr (kFused) {
        to(fourth);
      } else {
        to();
      }
    }
  };
  if constexpr (kFused) {
    run(input, residual);
  } else {
    run(input);
  }
  no_gil.reset();
  if (scale) found = *scale;
  py::tuple all(wanted);
  for (size_t i = 0; i < wanted; ++i) all[i] = std::move(results[i]);
  return all.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef kEntryPoints[] = {
    {"rms_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rms_norm)), METH_FASTCALL,
     "Eager entry point of rmsnorm_cuda.rms_norm."},
    {"fused_add_rms_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_call<kFusedName, FusedSignature>)), METH_FASTCALL,
     "Eager entry point of rmsnorm_cuda.fused_add_rms_norm, for plain arguments."},
    {"fused_add_rms_norm_", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_call<kFusedInPlaceName, FusedInPlaceSignature>)), METH_FASTCALL,
     "The same in place."},
    {"rms_norm_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_call<kForwardName, ForwardSignature>)), METH_FASTCALL,
     "The norm and rstd, for plain arguments."},
    {"fused_add_rms_norm_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_call<kFusedForwardName, FusedForwardSignature>)), METH_FASTCALL,
     "The norm, the sum and rstd, for plain arguments."},
    {"rms_norm_quant", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rms_norm_quant<false>)), METH_FASTCALL,
     "Eager entry point of rmsnorm_cuda.rms_norm_quant, for plain arguments."},
    {"fused_add_rms_norm_quant", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rms_norm_quant<true>)), METH_FASTCALL,
     "Eager entry point of rmsnorm_cuda.fused_add_rms_norm_quant, for plain arguments."},
    {nullptr, nullptr, 0, nullptr},
};

py::dict isas() {
  py::dict result;
  for (int i = 0; i < cpu::isa_count(); ++i) {
    result[cpu::isa_name(i)] = cpu::isa_supported(i);
  }
  return result;
}

void set_isa(const std::optional<std::string>& name) {
  if ((!name || name->find('\0') == std::string::npos) && cpu::set_isa(name ? name->c_str() : nullptr)) return;
  std::string message = "unknown or unsupported instruction set '" + name.value_or("") + "': expected one of";
  for (int i = 0; i < cpu::isa_count(); ++i) {
    if (cpu::isa_supported(i)) message += std::string(" ") + cpu::isa_name(i);
  }
  throw py::value_error(message);
}

py::dict as_dict(const cuda::Plan& plan) {
  using namespace py::literals;
  return py::dict("kernel"_a = plan.kernel, "keep"_a = static_cast<int>(plan.keep), "vectors"_a = plan.vectors,
                  "lanes"_a = plan.lanes, "threads"_a = plan.threads, "registers"_a = plan.registers,
                  "bytes_in_flight"_a = plan.bytes_in_flight, "cluster"_a = plan.cluster, "slice"_a = plan.slice,
                  "shared_bytes"_a = plan.shared_bytes, "resident"_a = plan.resident, "blocks"_a = plan.blocks);
}

py::dict cuda_plan(bool backward, int64_t rows, int64_t cols, at::ScalarType dy, at::ScalarType x, at::ScalarType w,
                   int arch, int multiprocessors, int64_t shared_bytes) {
  if (rows < 1 || cols < 1) throw py::value_error("cuda_plan: expected at least one row and one column");
  const cuda::Device device{arch, multiprocessors, shared_bytes};
  const auto dtype = [](at::ScalarType type) {
    const auto known = as_dtype(type);
    if (!known || *known == DType::kFloat64) throw py::value_error("cuda_plan: expected float32, float16 or bfloat16");
    return *known;
  };
  return as_dict(backward ? cuda::rms_norm_backward_plan(rows, cols, dtype(dy), dtype(x), dtype(w), device)
                          : cuda::rms_norm_forward_plan(rows, cols, dtype(x), device));
}

py::dict cuda_limits(int arch) {
  py::dict result;
  for (const cuda::KernelLimits* k = cuda::kernel_limits(arch); k->kernel != nullptr; ++k) {
    result[k->kernel] = py::make_tuple(k->threads, k->registers, k->mixed_registers);
  }
  return result;
}

// The files that librmsnorm_torch.so and librmsnorm.so were loaded from: a namesake may have been there before.
py::tuple libraries() {
  const auto file_of = [](auto* function) {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<void*>(function), &info)) throw py::import_error("dladdr finds no library");
    return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(info.dli_fname));
  };
  return py::make_tuple(file_of(registered_elsewhere), file_of(cpu::isa));
}

}  // namespace

// Ops are called without Python's lock where there is one, and hold no state of Python's: free-threaded Pythons need none.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled part of rmsnorm_cuda.";
  if (PyModule_AddFunctions(m.ptr(), kEntryPoints) != 0) throw py::error_already_set();
  m.def("isas", isas, "Instruction sets built in, best last, and whether this machine has them.");
  m.def("isa", cpu::isa, "The instruction set in use.");
  m.def("set_isa", set_isa, py::arg("name").none(true), "Use this instruction set; None: the best there is.");
  m.def("last_isa", cpu::last_isa, "The instruction set whose kernel ran last on this thread.");
  m.def("libraries", libraries, "The files of librmsnorm_torch.so and librmsnorm.so that are in use.");
  m.def("cuda_built", cuda::built, "Whether CUDA kernels were compiled in.");
  m.def("cuda_architectures", cuda::architectures, "Their architectures, or why there are none.");
  m.def("cuda_versions", [] { return std::pair(cuda::runtime_version(), cuda::driver_version()); },
        "CUDA's, that the kernels were linked with and that the driver is of: 12090 is 12.9; 0: there is none.");
  m.def("cuda_error", cuda::error_string, "What a cudaError_t means here.");
  m.def("cuda_plan", cuda_plan, "The layout of a CUDA launch, in the terms of rmsnorm.h's Plan; needs no GPU.");
  m.def("cuda_limits", cuda_limits, "Of each CUDA kernel of an architecture: threads, registers, and those for mixed dtypes.");
  m.def("last_plan", [] { return as_dict(cuda::last_plan()); },
        "The layout of the CUDA launch that this thread made last, as cuda_plan; its kernel is '' before the first.");
  m.attr("torch_version") = RMSNORM_TORCH_VERSION;
  m.attr("compiler") = "g++ " __VERSION__;
}
