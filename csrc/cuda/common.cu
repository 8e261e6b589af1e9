// The CUDA build: what it holds and what it runs on.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

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

std::string major_minor(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// A runtime works with every driver of its own series, and newer ones.
std::string driver_too_old() {
  const int series = runtime_version() / 1000;
  const std::string branch = series == 12 ? " (R525)" : series == 13 ? " (R580)" : "";
  const std::string wanted = "these kernels need one of CUDA " + major_minor(series * 1000) + branch + " or newer";
  const int driver = driver_version();
  if (driver == 0) return "there is no NVIDIA driver, and " + wanted;
  return "the NVIDIA driver is of CUDA " + major_minor(driver) + ", too old: " + wanted;
}

}  // namespace

const char* error_string(int error) {
  if (error == cudaErrorInsufficientDriver) {
    static const std::string sentence = driver_too_old();
    return sentence.c_str();
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
    const std::string wish = value != nullptr && *value ? value : "0";
    if (wish != "0" && wish != "1") throw std::runtime_error("RMSNORM_CUDA_PDL is '" + wish + "': expected 1, 0 or unset");
    return wish == "1";
  }();
  return wanted && device().arch >= 90;
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
