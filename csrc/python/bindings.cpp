// _C: the eager entry points, the instruction set in use, and what was built.
//
// An entry point takes arguments of the plainest types, by position, and calls the dispatcher:
// there is no second path. It returns what the op returns, or True where that is nothing; for any
// other arguments it returns None, and the caller goes to torch.ops. It is a plain C function in a
// pybind11 module: one with an at::Tensor caster costs more than the rest of the call.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "../torch/ops.h"
#include "../torch/options.h"

namespace py = pybind11;

namespace {

using namespace rmsnorm;

// To let go of the GIL and take it back costs 60 ns, and the kernels take a few us for so many
// elements.
constexpr int64_t kBriefElements = 16 << 10;

// A tensor that Python holds during the call. A copy would cost two locks of the GIL: torch counts
// Python's object too while C++ owns its tensor.
template <class T>  // Tensor or OptionalTensor
class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    if (const Tensor* t = tensor_of(value_)) Traits::destroyBorrow(const_cast<Tensor&>(*t));
  }
  void borrow(const Tensor& t) { value_ = Traits::createBorrow(t); }
  void own(Tensor t) { borrow(owned_ = std::move(t)); }
  operator const T&() const { return value_; }

 private:
  using Traits = c10::MaybeOwnedTraits<Tensor>;
  Tensor owned_;
  T value_;
};

// A shape of one dimension, which nearly all are.
struct Columns {
  c10::SymInt count;
  operator SymIntArrayRef() const { return count; }
};

// Sizes that are rarely there: torch.ops takes them.
struct NoSizes {
  operator at::OptionalIntArrayRef() const { return std::nullopt; }
};

// The C++ value of an argument of exactly the type that it mostly has; false: it is of another.
bool parse(PyObject* object, bool& value) {
  value = object == Py_True;
  return PyBool_Check(object);
}
bool parse(PyObject* object, at::ScalarType& value) {
  if (!THPDtype_Check(object)) return false;
  value = reinterpret_cast<THPDtype*>(object)->scalar_type;
  return true;
}
bool parse(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}
bool parse(PyObject* object, std::string_view& value) {
  if (!PyUnicode_CheckExact(object)) return false;
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(object, &size);
  if (!text) PyErr_Clear();
  value = {text, static_cast<size_t>(size)};
  return text;
}
bool parse(PyObject* object, double& value) {
  int64_t whole = 0;
  if (!PyFloat_CheckExact(object)) {  // the defaults of some, 0 and 1, are ints
    value = static_cast<double>(parse(object, whole) ? whole : 2);
    return value == 0 || value == 1;
  }
  value = PyFloat_AS_DOUBLE(object);
  return true;
}
bool parse(PyObject* object, Columns& value) {
  int64_t count = 0;
  const bool is_tuple = PyTuple_Check(object) && PyTuple_GET_SIZE(object) == 1;
  const bool parsed = parse(is_tuple ? PyTuple_GET_ITEM(object, 0) : object, count);
  value.count = count;
  return parsed && count >= 0;
}
bool parse(PyObject* object, NoSizes&) { return Py_IsNone(object); }
template <class T>
bool parse(PyObject* object, Borrowed<T>& value) {
  if (std::is_same_v<T, OptionalTensor> && Py_IsNone(object)) return true;
  if (!THPVariable_CheckExact(object)) return false;
  value.borrow(THPVariable_Unpack(object));
  return true;
}
template <class T>
bool parse(PyObject* object, std::optional<T>& value) {
  return Py_IsNone(object) || parse(object, value.emplace());
}

PyObject* wrap(Tensor result) { return THPVariable_Wrap(std::move(result)); }
template <class... Tensors>
PyObject* wrap(std::tuple<Tensors...> results) {
  return std::apply([](auto&... all) { return py::make_tuple(std::move(all)...); }, results)
      .release()
      .ptr();
}

// What is parsed for an argument of the op.
template <class T>
struct Parsed {
  using type = T;
};
template <>
struct Parsed<SymIntArrayRef> {
  using type = Columns;
};
template <>
struct Parsed<at::OptionalIntArrayRef> {
  using type = NoSizes;
};
template <>
struct Parsed<Tensor> {
  using type = Borrowed<Tensor>;
};
template <>
struct Parsed<OptionalTensor> {
  using type = Borrowed<OptionalTensor>;
};

template <class Op, size_t... i>
PyObject* call(PyObject* const* args, std::index_sequence<i...>) {
  std::tuple<typename Parsed<std::tuple_element_t<i, typename Op::Arguments>>::type...> values;
  const Tensor& input = std::get<0>(values);
  const auto parsed = [&](PyObject* object, auto& value) {
    if constexpr (Op::kWrites && std::is_same_v<decltype(value), Borrowed<Tensor>&>) {
      if (Py_IsNone(object) && input.defined()) {  // not asked for: a tensor without elements
        value.own(at::empty({0}, input.options().dtype(at::kFloat)));
        return true;
      }
    }
    return parse(object, value);
  };
  if (!(parsed(args[i], std::get<i>(values)) && ...)) Py_RETURN_NONE;
  std::optional<py::gil_scoped_release> no_gil;
  if (input.sym_numel().maybe_as_int().value_or(kBriefElements) >= kBriefElements) no_gil.emplace();
  if constexpr (Op::kWrites) {
    Op::call(std::get<i>(values)...);
    no_gil.reset();
    Py_RETURN_TRUE;
  } else {
    auto results = Op::call(std::get<i>(values)...);
    no_gil.reset();
    return wrap(std::move(results));
  }
}

template <class Op>
PyObject* entry(PyObject* /*module*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t kArguments = std::tuple_size_v<typename Op::Arguments>;
  if (count != kArguments || at::impl::torch_function_mode_enabled()) Py_RETURN_NONE;
  return call<Op>(args, std::make_index_sequence<kArguments>());
  END_HANDLE_TH_ERRORS
}
template <class Op>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<Op>)),
          METH_FASTCALL, "The op of this name, for arguments of the plainest types, by position."};
}

PyMethodDef kEntryPoints[] = {
    method<ops::rms_norm>("rms_norm"),
    method<ops::rms_norm_out>("rms_norm_out"),
    method<ops::fused_add_rms_norm>("fused_add_rms_norm"),
    method<ops::fused_add_rms_norm_out>("fused_add_rms_norm_out"),
    method<ops::fused_add_rms_norm_>("fused_add_rms_norm_"),
    method<ops::rms_norm_add>("rms_norm_add"),
    method<ops::rms_norm_add_out>("rms_norm_add_out"),
    method<ops::rms_norm_add_rms_norm>("rms_norm_add_rms_norm"),
    method<ops::rms_norm_add_rms_norm_out>("rms_norm_add_rms_norm_out"),
    method<ops::rms_norm_add_rms_norm_>("rms_norm_add_rms_norm_"),
    method<ops::rms_norm_gated>("rms_norm_gated"),
    method<ops::rms_norm_gated_out>("rms_norm_gated_out"),
    method<ops::rms_norm_rope>("rms_norm_rope"),
    method<ops::rms_norm_rope_out>("rms_norm_rope_out"),
    method<ops::rms_norm_rope_>("rms_norm_rope_"),
    method<ops::rms_norm_quant>("rms_norm_quant"),
    method<ops::rms_norm_quant_out>("rms_norm_quant_out"),
    method<ops::fused_add_rms_norm_quant>("fused_add_rms_norm_quant"),
    method<ops::fused_add_rms_norm_quant_out>("fused_add_rms_norm_quant_out"),
    method<ops::rms_norm_gated_quant>("rms_norm_gated_quant"),
    method<ops::rms_norm_gated_quant_out>("rms_norm_gated_quant_out"),
    // The monitor's, which looks at rstd.
    method<ops::rms_norm_forward>("rms_norm_forward"),
    method<ops::fused_add_rms_norm_forward>("fused_add_rms_norm_forward"),
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
  if ((!name || name->find('\0') == std::string::npos) &&
      cpu::set_isa(name ? name->c_str() : nullptr))
    return;
  std::string message =
      "unknown or unsupported instruction set '" + name.value_or("") + "': expected one of";
  for (int i = 0; i < cpu::isa_count(); ++i) {
    if (cpu::isa_supported(i)) message += std::string(" ") + cpu::isa_name(i);
  }
  throw py::value_error(message);
}

py::dict as_dict(const cuda::Plan& plan) {
  using namespace py::literals;
  return py::dict("kernel"_a = plan.kernel, "keep"_a = static_cast<int>(plan.keep),
                  "vectors"_a = plan.vectors, "lanes"_a = plan.lanes, "threads"_a = plan.threads,
                  "registers"_a = plan.registers, "bytes_in_flight"_a = plan.bytes_in_flight,
                  "cluster"_a = plan.cluster, "slice"_a = plan.slice,
                  "shared_bytes"_a = plan.shared_bytes, "resident"_a = plan.resident,
                  "blocks"_a = plan.blocks);
}

py::dict cuda_plan(bool backward, int64_t rows, int64_t cols, at::ScalarType dy, at::ScalarType x,
                   int arch, int multiprocessors, int64_t shared_bytes) {
  if (rows < 1 || cols < 1)
    throw py::value_error("cuda_plan: expected at least one row and one column");
  const cuda::Device device{arch, multiprocessors, shared_bytes, {}};
  const auto dtype = [](at::ScalarType type) {
    const auto known = as_dtype(type);
    if (!known || *known == DType::kFloat64)
      throw py::value_error("cuda_plan: expected float32, float16 or bfloat16");
    return *known;
  };
  return as_dict(backward ? cuda::rms_norm_backward_plan(rows, cols, dtype(dy), dtype(x), device)
                          : cuda::rms_norm_forward_plan(rows, cols, dtype(x), device));
}

py::dict cuda_limits(int arch) {
  py::dict result;
  for (const cuda::KernelLimits* k = cuda::kernel_limits(arch); k->kernel != nullptr; ++k) {
    result[k->kernel] = py::make_tuple(k->threads, k->registers, k->mixed_registers);
  }
  return result;
}

// The files that librmsnorm_torch.so and librmsnorm.so were loaded from: a namesake may have been
// there before.
py::tuple libraries() {
  const auto file_of = [](auto* function) {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<void*>(function), &info))
      throw py::import_error("dladdr finds no library");
    return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(info.dli_fname));
  };
  return py::make_tuple(file_of(registered_elsewhere), file_of(cpu::isa));
}

}  // namespace

// Ops are called without Python's lock where there is one, and hold no state of Python's:
// free-threaded Pythons need none.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled part of rmsnorm_cuda.";
  if (PyModule_AddFunctions(m.ptr(), kEntryPoints) != 0) throw py::error_already_set();
  m.def("isas", isas, "Instruction sets built in, best last, and whether this machine has them.");
  m.def("isa", cpu::isa, "The instruction set in use.");
  m.def("set_isa", set_isa, py::arg("name").none(true),
        "Use this instruction set; None: the best there is.");
  m.def("last_isa", cpu::last_isa, "The instruction set whose kernel ran last on this thread.");
  m.def("libraries", libraries,
        "The files of librmsnorm_torch.so and librmsnorm.so that are in use.");
  m.def("cuda_built", cuda::built, "Whether CUDA kernels were compiled in.");
  m.def("cuda_architectures", cuda::architectures, "Their architectures, or why there are none.");
  m.def(
      "cuda_versions", [] { return std::pair(cuda::runtime_version(), cuda::driver_version()); },
      "CUDA's, that the kernels were linked with and that the driver is of: 12090 is 12.9; 0: "
      "there is none.");
  m.def("cuda_error", cuda::error_string, "What a cudaError_t means here.");
  m.def("cuda_plan", cuda_plan,
        "The layout of a CUDA launch, in the terms of rmsnorm.h's Plan; needs no GPU.");
  m.def("cuda_limits", cuda_limits,
        "Of each CUDA kernel of an architecture: threads, registers, and those for mixed dtypes.");
  m.def(
      "last_plan", [] { return as_dict(cuda::last_plan()); },
      "The layout of the CUDA launch that this thread made last, as cuda_plan; its kernel is '' "
      "before the first.");
  m.attr("torch_version") = RMSNORM_TORCH_VERSION;
  m.attr("compiler") = "g++ " __VERSION__;
}
