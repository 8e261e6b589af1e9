// The CUDA build: what it holds and what it runs on.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
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

// A runtime works with every driver of its own series, and newer ones. Text by snprintf: what
// std::string instantiates here would be a symbol of this library that others see.
const char* error_string(int error) {
  if (error != cudaErrorInsufficientDriver) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
  const int series = runtime_version() / 1000, driver = driver_version();
  const char* const branch = series == 12 ? " (R525)" : series == 13 ? " (R580)" : "";
  char problem[64] = "there is no NVIDIA driver, and";
  if (driver != 0) {
    std::snprintf(problem, sizeof problem,
                  "the NVIDIA driver is of CUDA %d.%d, too old:", driver / 1000,
                  driver % 1000 / 10);
  }
  thread_local char text[200];
  std::snprintf(text, sizeof text, "%s these kernels need one of CUDA %d.0%s or newer", problem,
                series, branch);
  return text;
}

namespace {

thread_local Plan last;

__global__ void probe() {}

int ask(cudaDeviceAttr what, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, what, device) == cudaSuccess ? value : 0;
}

// A block of so much shared memory that `room` of them fit a multiprocessor, which has 1 KiB more
// than a block may ask for, and takes 1 KiB for each. 0 if nobody answers.
int ask_clusters(int64_t shared_bytes, int room, unsigned size) {
  const auto kernel = reinterpret_cast<const void*>(probe);
  const auto bytes = static_cast<int>((shared_bytes + 1024) / room - 1024);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {size, 1, 1};
  cudaLaunchConfig_t config{size, kWarp, static_cast<size_t>(bytes), nullptr, &cluster, 1};
  int count = 0;
  const bool answered = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes)) == cudaSuccess &&
                        cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess;
  if (!answered) cudaGetLastError();
  return answered ? count : 0;
}

Device ask(int device) {
  Device d{};
  cudaFuncAttributes code{};  // that of an older architecture may be what runs here
  if (cudaFuncGetAttributes(&code, probe) == cudaSuccess) d.arch = code.ptxVersion;
  d.multiprocessors = ask(cudaDevAttrMultiProcessorCount, device);
  d.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (d.multiprocessors == 0 || d.arch == 0) cudaGetLastError();
  if (tuning_of(d.arch).max_cluster == 1) return d;
  for (int i = 0; i < kClusterCounts; ++i) {
    d.clusters[i] = ask_clusters(d.shared_bytes, 1 + i / 3, 2u << i % 3);
  }
  return d;
}

}  // namespace

int allow_shared_bytes(const void* function) {
  struct Allowed {
    const void* function;
    int device;
  };
  constexpr int kSlots = 64;
  thread_local Allowed known[kSlots];
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  Allowed& slot = known[reinterpret_cast<uintptr_t>(function) / 16 % kSlots];
  if (slot.function == function && slot.device == current) return error;
  const auto limit = static_cast<int>(device().shared_bytes - kOtherSharedBytes);
  error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error == cudaSuccess) slot = {function, current};
  return error;
}

void set_last_plan(const Plan& plan) { last = plan; }
Plan last_plan() { return last; }

bool overlapping() {
  static const bool wanted = [] {
    const char* const set = std::getenv("RMSNORM_CUDA_PDL");
    const char* const value = set != nullptr ? set : "";
    if (std::strcmp(value, "") == 0 || std::strcmp(value, "0") == 0) return false;
    if (std::strcmp(value, "1") == 0) return true;
    char text[200];
    std::snprintf(text, sizeof text, "RMSNORM_CUDA_PDL is '%s': expected 1, 0 or unset", value);
    throw std::runtime_error(text);
  }();
  return wanted && device().arch >= 90;
}

int why_no_device() {
  int current = 0;
  const cudaError_t error = cudaGetDevice(&current);
  cudaGetLastError();
  return error == cudaSuccess ? cudaErrorNoDevice : error;
}

Device device() {
  constexpr int kKnownDevices = 64;
  thread_local Device known[kKnownDevices];  // the answer costs microseconds, and never changes
  int current = 0;
  if (cudaGetDevice(&current) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  if (current >= kKnownDevices) return ask(current);
  if (known[current].multiprocessors == 0) known[current] = ask(current);
  return known[current];
}

}  // namespace rmsnorm::cuda
