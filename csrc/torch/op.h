// An op of torch.ops.rmsnorm_cuda: how C++ calls it, and all that torch's dispatcher is told of it.
#pragma once
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "checks.h"

namespace rmsnorm {

using at::Tensor;
using c10::DispatchKeySet;
using c10::SymIntArrayRef;

// Whether another copy of this library registered these ops in the process before. Then this copy
// registers nothing: torch would refuse it while the library is loaded, which ends the process.
__attribute__((visibility("default"))) bool registered_elsewhere();

// The three ways of a differentiable op; see Op::define.
enum class Way { kKernel, kFormula, kRecord };

// functorch has no C++ interface to ask; it throws where an autograd::Function would be wrong.
inline bool in_functorch_transform() {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return false;
  try {
    functorch->checkSupportsCppAutogradFunction();
    return false;
  } catch (const c10::Error&) {
    return true;
  }
}

template <class T>
const Tensor* tensor_of(const T& argument) {
  if constexpr (std::is_same_v<T, Tensor>) return &argument;
  if constexpr (std::is_same_v<T, OptionalTensor>) return argument ? &*argument : nullptr;
  return nullptr;
}
template <class... Args>
bool have_tangent(const Args&... args) {
  const auto has = [](const Tensor* t) { return t && t->_fw_grad(/*level=*/0).defined(); };
  return (has(tensor_of(args)) || ...);
}
template <class... Args>
bool record_grad(const Args&... args) {
  const auto requires_grad = [](const Tensor* t) { return t && t->requires_grad(); };
  return at::GradMode::is_enabled() && (requires_grad(tensor_of(args)) || ...);
}

// `Name` derives from Op<Name, Signature> and has `name` and `overload`; Signature is the C++ type
// of its schema. A body takes the arguments as one aggregate, which is filled in their order.
template <class Name, class Signature>
struct Op;
template <class Name, class Result, class... Args>
struct Op<Name, Result(Args...)> {
  using Arguments = std::tuple<std::decay_t<Args>...>;
  static constexpr bool kWrites = std::is_void_v<Result>;  // to some of its arguments

  static const auto& handle() {
    static const auto found = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow(Name::name, Name::overload)
                                  .template typed<Result(Args...)>();
    return found;
  }
  static Result call(Args... args) { return handle().call(std::forward<Args>(args)...); }

  // A differentiable op. Its gradient has three ways:
  //   1. nothing is recorded: straight to the kernel, or to what a functorch transform has below
  //      (vmap: vmap.py);
  //   2. a functorch transform records, or there is a forward-mode tangent: the formula in ATen
  //      ops, which torch differentiates and batches itself, in any nesting;
  //   3. else record(), an autograd::Function over forward and backward ops.
  // `composite` is the op "<name>_formula", for compilers that fuse the formula with its
  // neighbours.
  template <auto body, auto formula, auto record, auto composite>
  static void define(torch::Library& m, const std::string& arguments, const char* results) {
    define_schema(m, full_name(), arguments, results);
    define_kernels<body>(m);
    m.impl(Name::name, torch::dispatch(c10::DispatchKey::Autograd,
                                       TORCH_FN((differentiable<formula, record>))));
    const std::string formula_name = full_name() + "_formula";
    define_schema(m, formula_name, arguments, results);
    m.impl(formula_name.c_str(), torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd,
                                                 TORCH_FN(checked<composite>)));
  }

  // An op for inference: refused where a gradient would be recorded. One that writes to arguments
  // returns nothing, so that functionalization takes it as it is: an op that returns its argument
  // needs the tag at::Tag::out for that, and then Inductor (2.13) calls it into buffers of its own,
  // but wrongly: rms_norm.out with its arguments out of order, and ops of several results with
  // buffers that it never made, where one is not used.
  template <auto body>
  static void define(torch::Library& m, const std::string& arguments, const char* results) {
    define_schema(m, full_name(), arguments, results);
    define_kernels<body>(m);
    const auto implement = [&](c10::DispatchKey key, auto function) {
      m.impl(full_name().c_str(), torch::dispatch(key, function));
    };
    implement(c10::DispatchKey::Autograd, TORCH_FN(refuse_grad));
    if constexpr (kWrites) {
      implement(c10::DispatchKey::ADInplaceOrView, TORCH_FN(bump_versions));
      implement(c10::DispatchKey::Negative, TORCH_FN(refuse_negative));
    }
  }

 private:
  static std::string full_name() {
    return *Name::overload ? std::string(Name::name) + "." + Name::overload : Name::name;
  }
  static void define_schema(torch::Library& m, const std::string& name,
                            const std::string& arguments, const char* results) {
    m.def((name + "(" + arguments + ") -> " + results).c_str());
  }
  // The Meta kernel is the fake: the same body stops before it would touch memory.
  template <auto body>
  static void define_kernels(torch::Library& m) {
    for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::Meta}) {
      m.impl(full_name().c_str(), torch::dispatch(key, TORCH_FN(checked<body>)));
    }
  }

  template <class Call>
  static Call pack(Result (*)(const Call&), Args... args) {
    return Call{args...};
  }
  template <auto body>
  static Result unpacked(Args... args) {
    return body(pack(body, std::forward<Args>(args)...));
  }
  template <auto body>
  static Result checked(Args... args) {
    check_tensors<Op>({tensor_of(args)...});
    return unpacked<body>(std::forward<Args>(args)...);
  }
  static Result redispatch(DispatchKeySet keys, Args... args) {
    return handle().redispatch(keys, std::forward<Args>(args)...);
  }

  template <auto formula, auto record>
  static Result differentiable(DispatchKeySet keys, Args... args) {
    const Way way = have_tangent(args...)      ? Way::kFormula
                    : !record_grad(args...)    ? Way::kKernel
                    : in_functorch_transform() ? Way::kFormula
                                               : Way::kRecord;
    if (way == Way::kKernel) return redispatch(keys & c10::after_autograd_keyset, args...);
    if (way == Way::kFormula) return checked<formula>(args...);
    return unpacked<record>(args...);
  }

  static Result refuse_grad(DispatchKeySet keys, Args... args) {
    TORCH_CHECK(
        !record_grad(args...) && !have_tangent(args...), handle().operator_name(),
        ": it does not support automatic differentiation, but one of the arguments requires "
        "grad; call it under torch.no_grad()");
    return redispatch(keys & c10::after_autograd_keyset, args...);
  }

  // What is written gets a new version, in inference mode too, so that autograd notices if it had
  // saved the old values.
  static void bump_versions(DispatchKeySet keys, Args... args) {
    redispatch(keys & c10::after_ADInplaceOrView_keyset, args...);
    const auto* argument = handle().schema().arguments().data();
    for (const Tensor* t : {tensor_of(args)...}) {
      const auto* alias = argument++->alias_info();
      if (t && alias && alias->isWrite()) t->unsafeGetTensorImpl()->bump_version();
    }
  }

  // torch's own way with lazily negated tensors expects an op that writes to return what it wrote.
  static void refuse_negative(DispatchKeySet, Args...) {
    TORCH_CHECK(false, handle().operator_name(),
                ": expected tensors without the negative bit; call resolve_neg() on them first");
  }
};

}  // namespace rmsnorm
