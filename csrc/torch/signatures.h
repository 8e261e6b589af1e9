// The C++ types of the ops, as their schemas in ops.cpp have them: for whoever calls them through the dispatcher.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <tuple>

namespace rmsnorm {

using at::Tensor;
using c10::SymIntArrayRef;
using OptionalTensor = std::optional<Tensor>;

using Signature = Tensor(const Tensor&, SymIntArrayRef, const OptionalTensor&, std::optional<double>, double, bool);
using OutSignature = void(const Tensor&, SymIntArrayRef, const OptionalTensor&, std::optional<double>, double, bool,
                          const Tensor&);
using ForwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, SymIntArrayRef, const OptionalTensor&,
                                                    std::optional<double>, double, bool);
using BackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, SymIntArrayRef, const OptionalTensor&,
                                                     const Tensor&, std::optional<double>, std::array<bool, 2>,
                                                     const OptionalTensor&, double, bool);
using FusedSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                  std::optional<double>, double, bool);
using FusedForwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                                                 std::optional<double>, double, bool);
using FusedInPlaceSignature = void(const Tensor&, const Tensor&, const OptionalTensor&, std::optional<double>, double, bool);

using FusedOutSignature = void(const Tensor&, const Tensor&, const OptionalTensor&, std::optional<double>, double, bool,
                               const Tensor&, const Tensor&);
using QuantSignature = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const OptionalTensor&, const OptionalTensor&, std::optional<double>, at::ScalarType, std::optional<int64_t>,
    std::optional<double>, bool, bool, double, bool);
using QuantOutSignature = void(const Tensor&, const OptionalTensor&, const OptionalTensor&, std::optional<double>, at::ScalarType,
                               std::optional<int64_t>, std::optional<double>, bool, bool, double, bool, const Tensor&,
                               const Tensor&, const Tensor&);
using FusedQuantSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, std::optional<double>, at::ScalarType,
    std::optional<int64_t>, std::optional<double>, bool, bool, double, bool);
using FusedQuantOutSignature = void(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                    std::optional<double>, at::ScalarType, std::optional<int64_t>, std::optional<double>, bool,
                                    bool, double, bool, const Tensor&, const Tensor&, const Tensor&, const Tensor&);

// Another copy of this library registered these ops in the process before: this one registers nothing. It would be refused
// while the library is loaded, where the exception ends the process.
__attribute__((visibility("default"))) bool registered_elsewhere();

template <class T>
c10::TypedOperatorHandle<T> find(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<T>();
}

}  // namespace rmsnorm
