// Serves an AOTInductor package whose model holds this package's ops: libtorch, but no Python.
//
//   torch_server MODEL.pt2 REQUESTS.pt [THREADS [ROUNDS [OPS.so]]]
//
// export.py writes both files. Every thread answers all requests ROUNDS times, and the answers are
// compared with those that Python gave, bit for bit. OPS.so is librmsnorm_torch.so.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>

#include "arguments.h"

namespace {

struct Request {
  at::Tensor input;
  std::vector<at::Tensor> answers;  // rms_norm of the input, and what the model returns
};

std::vector<Request> read_requests(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue saved = torch::jit::pickle_load(bytes);
  std::vector<Request> requests;
  for (const c10::IValue& item : saved.toListRef()) {
    const auto& tensors = item.toTupleRef().elements();
    Request& request = requests.emplace_back(Request{tensors[0].toTensor(), {}});
    for (size_t i = 1; i < tensors.size(); ++i) request.answers.push_back(tensors[i].toTensor());
  }
  return requests;
}

// An op, called by its name: any server can, with or without a compiled model.
at::Tensor rms_norm(const at::Tensor& input) {
  using Signature =
      at::Tensor(const at::Tensor&, c10::SymIntArrayRef, const std::optional<at::Tensor>&,
                 std::optional<double>, double, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rmsnorm_cuda::rms_norm", "")
                             .typed<Signature>();
  return op.call(input, input.sym_sizes().slice(input.dim() - 1), {}, 1e-6, 0, false);
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  return !std::memcmp(a.contiguous().const_data_ptr(), b.contiguous().const_data_ptr(), a.nbytes());
}

int serve(int argc, char** argv) {
  if (argc < 3 || argc > 6)
    throw std::invalid_argument(
        "usage: torch_server MODEL.pt2 REQUESTS.pt [THREADS [ROUNDS [OPS.so]]]");
  const int64_t threads = argc > 3 ? positive("THREADS", argv[3]) : 1,
                rounds = argc > 4 ? positive("ROUNDS", argv[4]) : 1;
  const std::vector<Request> requests = read_requests(argv[2]);
  // Before the model: loading a package looks its ops up.
  if (!dlopen(argc > 5 ? argv[5] : RMSNORM_OPS, RTLD_NOW)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(argv[1], "model", /*run_single_threaded=*/false,
                                                /*num_runners=*/threads);

  std::atomic<int64_t> wrong = 0;
  const double seconds = in_threads(threads, [&](int64_t i) {
    const c10::InferenceMode guard;
    at::set_num_threads(1);  // requests run side by side, each on one core
    for (int64_t n = 0; n < rounds * int64_t(requests.size()); ++n) {
      const Request& request = requests[(i + n) % requests.size()];
      std::vector<at::Tensor> results = model.run({request.input});
      results.insert(results.begin(), rms_norm(request.input));
      bool same = results.size() == request.answers.size();
      for (size_t k = 0; same && k < results.size(); ++k)
        same = same_bits(results[k], request.answers[k]);
      wrong += !same;
    }
  });
  const int64_t count = threads * rounds * requests.size();
  std::printf("%ld requests, %ld threads: %.0f a second, %ld with other bits than Python's\n",
              count, threads, count / seconds, wrong.load());
  return wrong != 0;
}

}  // namespace

int main(int argc, char** argv) try { return serve(argc, argv); } catch (const c10::Error& error) {
  std::fprintf(stderr, "torch_server: %s\n", error.what_without_backtrace());
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "torch_server: %s\n", error.what());
  return 1;
}
