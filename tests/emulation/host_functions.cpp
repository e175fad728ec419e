// The host functions of the CUDA runtime that csrc/cuda calls, and the settings that tests change.
#include "emulator.h"

using namespace emulation;

static cudaError_t failed(cudaError_t error) { return last_error = error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? failure_message.c_str() : cudaGetErrorName(error);
}

cudaError_t cudaPeekAtLastError() { return last_error; }

// a failed launch is forgotten once it is told, where a GPU's process would be lost to it
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = static_cast<int>(settings["device"]);
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings["device_count"]) return failed(cudaErrorInvalidDevice);
  settings["device"] = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(settings["device_count"]);
  if (!settings["driver_version"]) return failed(cudaErrorInsufficientDriver);
  return *count ? cudaSuccess : failed(cudaErrorNoDevice);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = static_cast<int>(settings["driver_version"]);
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

static long attribute_value(cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock: return shared_without_opt_in;
    case cudaDevAttrMultiProcessorCount: return settings["multiprocessors"];
    case cudaDevAttrComputeCapabilityMajor: return settings["compute_capability"] / 10;
    case cudaDevAttrComputeCapabilityMinor: return settings["compute_capability"] % 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return settings["shared_limit"];
  }
  return -1;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= settings["device_count"]) return failed(cudaErrorInvalidDevice);
  *value = static_cast<int>(attribute_value(attribute));
  return *value < 0 ? failed(cudaErrorInvalidValue) : cudaSuccess;
}

cudaError_t emulation::set_dynamic_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > settings["shared_limit"]) return failed(cudaErrorInvalidValue);
  dynamic_shared_limits[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

// where the setting of this name is kept; null: there is none
extern "C" __attribute__((visibility("default"))) long* calguide_emulator_setting(const char* name) {
  const auto found = settings.find(name);
  return found == settings.end() ? nullptr : &found->second;
}
