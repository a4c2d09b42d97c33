// Stands for the CUDA driver where there is none: memory is the host's, and a launch is a line of
// text with its grid and its parameters. SPARSEK_TYPES names every kernel's parameter types:
// "kernel=pilf" with p pointer, i int32, l int64, f float; FAKE_ARCH is the compute capability.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include <cuda.h>

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = reinterpret_cast<CUcontext>(1);
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, 0); }
CUresult cuCtxGetDevice(CUdevice* device) { return cuDeviceGet(device, 0); }
CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  const int arch = atoi(getenv("FAKE_ARCH"));
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? arch / 10 : arch % 10;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) { *text = "fake"; return CUDA_SUCCESS; }
CUresult cuMemAlloc(CUdeviceptr* memory, size_t bytes) {
  *memory = reinterpret_cast<CUdeviceptr>(aligned_alloc(256, (bytes + 255) / 256 * 256));
  printf("alloc %llu %zu\n", *memory, bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemsetD8(CUdeviceptr memory, unsigned char value, size_t bytes) {
  memset(reinterpret_cast<void*>(memory), value, bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
  memcpy(reinterpret_cast<void*>(to), from, bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
  memcpy(to, reinterpret_cast<void*>(from), bytes);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = reinterpret_cast<CUmodule>(const_cast<void*>(image));
  printf("load\n");
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(strdup(name));
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  printf("attribute %s %d %d\n", reinterpret_cast<char*>(function), attribute, value);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads,
                        unsigned, unsigned, unsigned shared, CUstream, void** parameters, void**) {
  const std::string name = reinterpret_cast<char*>(function);
  const std::string all = getenv("SPARSEK_TYPES");
  const size_t at = all.find(name + "=") + name.size() + 1;
  printf("launch %s %u %u %u %u %u", name.c_str(), x, y, z, threads, shared);
  for (size_t i = 0; all[at + i] != ';'; ++i) {
    switch (all[at + i]) {
      case 'p': printf(" %llu", *static_cast<unsigned long long*>(parameters[i])); break;
      case 'i': printf(" %d", *static_cast<int*>(parameters[i])); break;
      case 'l': printf(" %lld", *static_cast<long long*>(parameters[i])); break;
      case 'f': printf(" %.9g", *static_cast<float*>(parameters[i])); break;
    }
  }
  printf("\n");
  return CUDA_SUCCESS;
}

}  // extern "C"
