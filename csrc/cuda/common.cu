// The CUDA build: what it holds and what it runs on.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "launch.h"

namespace rmsnorm::cuda {

bool built() { return true; }

const char* architectures() { return RMSNORM_CUDA_ARCHS; }

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;  // asked for without a context; stays 0 where no driver answers
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

namespace {

// Text by snprintf: what std::string instantiates here would be a symbol of this library that
// others see.
struct Text {
  char value[200];
};

// A runtime works with every driver of its own series, and newer ones.
Text driver_too_old() {
  Text text;
  const int series = runtime_version() / 1000, driver = driver_version();
  const char* branch = series == 12 ? " (R525)" : series == 13 ? " (R580)" : "";
  const auto write = [&](const char* format, auto... versions) {
    std::snprintf(text.value, sizeof text.value, format, versions..., series, branch);
  };
  if (driver == 0) {
    write("there is no NVIDIA driver, and these kernels need one of CUDA %d.0%s or newer");
  } else {
    write(
        "the NVIDIA driver is of CUDA %d.%d, too old: these kernels need one of CUDA %d.0%s or "
        "newer",
        driver / 1000, driver % 1000 / 10);
  }
  return text;
}

}  // namespace

const char* error_string(int error) {
  if (error == cudaErrorInsufficientDriver) {
    static const Text sentence = driver_too_old();
    return sentence.value;
  }
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

namespace {

__global__ void probe() {}

int ask(cudaDeviceAttr what, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, what, device) == cudaSuccess ? value : 0;
}

Device ask(int device) {
  Device d{};
  cudaFuncAttributes code{};  // that of an older architecture may be what runs here
  if (cudaFuncGetAttributes(&code, probe) == cudaSuccess) d.arch = code.ptxVersion;
  d.multiprocessors = ask(cudaDevAttrMultiProcessorCount, device);
  d.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (d.multiprocessors == 0 || d.arch == 0) cudaGetLastError();
  return d;
}

}  // namespace

bool overlapping() {
  static const bool wanted = [] {
    const char* value = std::getenv("RMSNORM_CUDA_PDL");
    if (value == nullptr || std::strcmp(value, "") == 0 || std::strcmp(value, "0") == 0)
      return false;
    if (std::strcmp(value, "1") == 0) return true;
    Text text;
    std::snprintf(text.value, sizeof text.value, "RMSNORM_CUDA_PDL is '%s': expected 1, 0 or unset",
                  value);
    throw std::runtime_error(text.value);
  }();
  return wanted && device().arch >= 90;
}

namespace {

thread_local Plan last;

}  // namespace

void set_last_plan(const Plan& plan) { last = plan; }

Plan last_plan() { return last; }

int why_no_device() {
  int current = 0;
  const cudaError_t error = cudaGetDevice(&current);
  cudaGetLastError();
  return error == cudaSuccess ? cudaErrorNoDevice : error;
}

Device device() {
  constexpr int kKnownDevices = 64;  // the answer costs microseconds, and never changes
  static Device known[kKnownDevices];
  static std::atomic<bool> is_known[kKnownDevices];
  static std::mutex asking;
  int current = 0;
  if (cudaGetDevice(&current) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  if (current >= kKnownDevices) return ask(current);
  if (is_known[current].load(std::memory_order_acquire)) return known[current];
  const Device d = ask(current);
  if (d.multiprocessors == 0) return d;
  const std::lock_guard<std::mutex> lock(asking);
  known[current] = d;
  is_known[current].store(true, std::memory_order_release);
  return d;
}

}  // namespace rmsnorm::cuda
