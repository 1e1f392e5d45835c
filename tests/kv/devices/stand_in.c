/* A stand-in for libcuda.so.1, compiled against NVIDIA's own header, so that a wrong struct or prototype does not compile
 * or is answered with an error. Its "GPU memory" is memfds: as with the real driver, an allocation is freed with its last
 * handle, descriptor or mapping. What it cannot show is that the real driver keeps that promise. */
#define _GNU_SOURCE
#include <cuda.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#undef cuDeviceTotalMem
#undef cuDeviceGetUuid
#undef cuMemcpyDtoH
#undef cuMemcpyHtoD
#undef cuMemAlloc
#undef cuMemGetInfo
#undef cuMemsetD8
#undef cuIpcOpenMemHandle

_Static_assert(sizeof(CUmemAllocationProp) == 32, "CUmemAllocationProp");
_Static_assert(sizeof(CUmemAccessDesc) == 12, "CUmemAccessDesc");
_Static_assert(sizeof(CUuuid) == 16, "CUuuid");
_Static_assert(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED == 102, "attribute");
_Static_assert(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED == 103, "attribute");

#define STEP (2u << 20)
#define TOTAL (128u << 20)

static int is_initialised;
static CUcontext current;

static int is_prop(const CUmemAllocationProp *prop) {
    return prop->type == CU_MEM_ALLOCATION_TYPE_PINNED && prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE &&
           prop->location.id == 0 && prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR &&
           prop->win32HandleMetaData == NULL && prop->allocFlags.compressionType == 0 && prop->allocFlags.usage == 0;
}

static const char *told(const char *name) { return getenv(name); }

CUresult cuInit(unsigned int flags) {
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (told("STAND_IN_HAS_NO_GPU")) return CUDA_ERROR_NO_DEVICE;
    is_initialised = 1;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_NO_DEVICE ? "no CUDA-capable device is detected" : "out of order";
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
    if (!is_initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *count = 1;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    if (ordinal != 0) return CUDA_ERROR_INVALID_DEVICE;
    *device = 0;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, "Stand-in");
    return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    for (int i = 0; i < 16; i++) uuid->bytes[i] = (char)(0xa0 + i);
    return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    *bytes = TOTAL;
    return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED ||
             attribute == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
    return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)0x7000000000000008ull; /* Does not fit into an int: a truncated one is found out. */
    if (told("STAND_IN_TELLS")) fprintf(stderr, "context\n");
    return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = current;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    if (context != (CUcontext)0x7000000000000008ull) return CUDA_ERROR_INVALID_CONTEXT;
    current = context;
    return CUDA_SUCCESS;
}
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *prop,
                                       CUmemAllocationGranularity_flags option) {
    *size = STEP;
    return is_prop(prop) && option == CU_MEM_ALLOC_GRANULARITY_RECOMMENDED ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* A handle is a descriptor plus a number that does not fit into an int. */
#define HANDLE 0x100000000ull
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
                     unsigned long long flags) {
    if (!is_prop(prop) || size == 0 || size % STEP || flags) return CUDA_ERROR_INVALID_VALUE;
    if (size > TOTAL) return CUDA_ERROR_OUT_OF_MEMORY;
    int fd = memfd_create("stand-in", 0);
    if (ftruncate(fd, size)) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = HANDLE + fd;
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    return handle < HANDLE || close((int)(handle - HANDLE)) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
    if (handle < HANDLE || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || flags) return CUDA_ERROR_INVALID_VALUE;
    int fd = dup((int)(handle - HANDLE));
    memcpy(shareable, &fd, sizeof fd);
    return fd < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *shareable,
                                        CUmemAllocationHandleType type) {
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
    int fd = dup((int)(size_t)shareable); /* The descriptor itself, as a pointer: cuda.h says void *osHandle. */
    if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
    *handle = HANDLE + fd;
    return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
    if (size % STEP || alignment || hint || flags) return CUDA_ERROR_INVALID_VALUE;
    void *at = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *address = (CUdeviceptr)at;
    return at == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    return munmap((void *)address, size) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
    if (offset || flags || handle < HANDLE) return CUDA_ERROR_INVALID_VALUE;
    if (lseek((int)(handle - HANDLE), 0, SEEK_END) < (off_t)size) return CUDA_ERROR_INVALID_VALUE;
    void *at = mmap((void *)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)(handle - HANDLE), 0);
    return at == MAP_FAILED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *access, size_t count) {
    if (count != 1 || access->location.type != CU_MEM_LOCATION_TYPE_DEVICE || access->location.id != 0 ||
        access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        return CUDA_ERROR_INVALID_VALUE;
    return mprotect((void *)address, size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    void *at = mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return at == MAP_FAILED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH_v2(void *host, CUdeviceptr device, size_t size) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    memcpy(host, (void *)device, size);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr device, const void *host, size_t size) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    memcpy((void *)device, host, size);
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) { return stream || !current ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

/* What tests/gpu/survival.py asks besides. */
static int plain_fd = -1;
CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    *available = *total = TOTAL;
    return CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    plain_fd = memfd_create("stand-in", 0);
    if (ftruncate(plain_fd, size)) return CUDA_ERROR_OUT_OF_MEMORY;
    *address = (CUdeviceptr)mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, plain_fd, 0);
    return CUDA_SUCCESS;
}
CUresult cuMemsetD8_v2(CUdeviceptr address, unsigned char value, size_t size) {
    memset((void *)address, value, size);
    return CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t size, CUstream stream) {
    return stream ? CUDA_ERROR_INVALID_VALUE : cuMemsetD8_v2(address, value, size);
}
CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    snprintf(handle->reserved, sizeof handle->reserved, "/proc/%d/fd/%d", getpid(), plain_fd);
    return address ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned int flags) {
    int fd = open(handle.reserved, O_RDWR);
    if (fd < 0 || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) return CUDA_ERROR_INVALID_HANDLE;
    *address = (CUdeviceptr)mmap(NULL, lseek(fd, 0, SEEK_END), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return CUDA_SUCCESS;
}
