// What the CUDA runtime sees: devices, versions. A machine without a driver is an ordinary answer.

#include <cstring>

#include "common.cuh"

extern "C" {

int saek_cuda_count(int* devices, int* driver_version, int* runtime_version) {
  if (devices == nullptr || driver_version == nullptr || runtime_version == nullptr)
    return SAEK_BAD_ARGUMENT;
  *devices = *driver_version = *runtime_version = 0;
  // Both answer 0 and success without a driver, so their own errors would say nothing more.
  if (cudaRuntimeGetVersion(runtime_version) != cudaSuccess ||
      cudaDriverGetVersion(driver_version) != cudaSuccess ||
      cudaGetDeviceCount(devices) != cudaSuccess) {
    *devices = 0;
    (void)cudaGetLastError();  // or the next user of the runtime would be handed this error
    return SAEK_NO_DEVICE;
  }
  return *devices > 0 ? SAEK_OK : SAEK_NO_DEVICE;
}

int saek_cuda_describe(int device, saek_cuda_device* out) {
  if (out == nullptr || device < 0) return SAEK_BAD_ARGUMENT;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    (void)cudaGetLastError();
    return SAEK_NO_DEVICE;
  }
  std::memcpy(out->name, properties.name, sizeof(out->name));
  out->name[sizeof(out->name) - 1] = '\0';
  out->major = properties.major;
  out->minor = properties.minor;
  out->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  return SAEK_OK;
}

const char* saek_cuda_error(void) { return cudaGetErrorString(saek::cuda::last_error); }

}  // extern "C"
