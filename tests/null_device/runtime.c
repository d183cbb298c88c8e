/* A CUDA device that computes nothing, for tests of what the host waits for: allocations, copies and streams are real,
   kernels return at once. build.py adds all other functions that PyTorch imports, which return 0. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "cuda_runtime_api.h"
#undef cudaGetDeviceProperties

#define MEMORY (8ULL << 30)
#define CALL(name, ...) cudaError_t name(__VA_ARGS__)

/* counters, read by driver.py */
long null_waits, null_pageable, null_launches;

/* who owns an address: 0 the device, 1 pinned memory, -1 other memory */
static struct { char *start; size_t size; int pinned; } blocks[1 << 16];
static int count;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void add(void *start, size_t size, int pinned) {
    pthread_mutex_lock(&mutex);
    int slot = 0;
    while (slot < count && blocks[slot].start) slot++;
    if (slot == 1 << 16) abort();
    if (slot == count) count++;
    blocks[slot].size = size, blocks[slot].pinned = pinned, blocks[slot].start = start;
    pthread_mutex_unlock(&mutex);
}

static void drop(void *start) {
    pthread_mutex_lock(&mutex);
    for (int slot = 0; slot < count; slot++)
        if (start && blocks[slot].start == start) blocks[slot].start = NULL;
    pthread_mutex_unlock(&mutex);
}

static int owner(const void *address) {
    int found = -1;
    const char *a = address;
    pthread_mutex_lock(&mutex);
    for (int slot = 0; slot < count && found < 0; slot++)
        if (blocks[slot].start && a >= blocks[slot].start && a < blocks[slot].start + blocks[slot].size)
            found = blocks[slot].pinned;
    pthread_mutex_unlock(&mutex);
    return found;
}

static cudaError_t allocate(void **p, size_t size, int pinned) {
    if (size > MEMORY / 8 || posix_memalign(p, 4096, size ? size : 512)) return cudaErrorMemoryAllocation;
    memset(*p, 0, size);
    add(*p, size ? size : 512, pinned);
    return cudaSuccess;
}

CALL(cudaMalloc, void **p, size_t n) { return allocate(p, n, 0); }
CALL(cudaHostAlloc, void **p, size_t n, unsigned flags) { return allocate(p, n, 1); }
CALL(cudaFree, void *p) { drop(p); free(p); return cudaSuccess; }
CALL(cudaFreeHost, void *p) { drop(p); free(p); return cudaSuccess; }
CALL(cudaMemGetInfo, size_t *available, size_t *total) { *available = *total = MEMORY; return cudaSuccess; }

CALL(cudaMemcpyAsync, void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if ((owner(to) == 0 && owner(from) < 0) || (owner(from) == 0 && owner(to) < 0)) null_pageable++;
    memmove(to, from, n);
    return cudaSuccess;
}
CALL(cudaMemcpy, void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
    null_waits++;
    memmove(to, from, n);
    return cudaSuccess;
}
CALL(cudaMemsetAsync, void *p, int value, size_t n, cudaStream_t stream) { memset(p, value, n); return cudaSuccess; }
CALL(cudaPointerGetAttributes, struct cudaPointerAttributes *a, const void *p) {
    int found = owner(p);
    memset(a, 0, sizeof *a);
    a->type = found == 0 ? cudaMemoryTypeDevice : found == 1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->devicePointer = a->hostPointer = (void *)p;
    return cudaSuccess;
}

CALL(cudaDeviceSynchronize, void) { null_waits++; return cudaSuccess; }
CALL(cudaStreamSynchronize, cudaStream_t stream) { null_waits++; return cudaSuccess; }
CALL(cudaEventSynchronize, cudaEvent_t event) { null_waits++; return cudaSuccess; }
CALL(cudaEventCreateWithFlags, cudaEvent_t *event, unsigned flags) { *event = malloc(8); return cudaSuccess; }
CALL(cudaEventElapsedTime, float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return cudaSuccess; }
CALL(cudaStreamCreateWithPriority, cudaStream_t *s, unsigned f, int p) { *s = malloc(8); return cudaSuccess; }
CALL(cudaStreamIsCapturing, cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = 0; return cudaSuccess; }
CALL(cudaStreamGetCaptureInfo, cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id, cudaGraph_t *g,
     const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) { *c = 0; return cudaSuccess; }
CALL(cudaDeviceGetStreamPriorityRange, int *least, int *greatest) { *least = 0, *greatest = -5; return cudaSuccess; }

CALL(cudaGetDeviceCount, int *n) { *n = 1; return cudaSuccess; }
CALL(cudaGetDevice, int *device) { *device = 0; return cudaSuccess; }
CALL(cudaDriverGetVersion, int *version) { *version = CUDART_VERSION; return cudaSuccess; }
CALL(cudaRuntimeGetVersion, int *version) { *version = CUDART_VERSION; return cudaSuccess; }
CALL(cudaGetDeviceProperties, struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "null device");
    p->totalGlobalMem = MEMORY, p->major = 9, p->multiProcessorCount = 132, p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = INT32_MAX, p->maxGridSize[1] = p->maxGridSize[2] = 65535, p->maxBlocksPerMultiProcessor = 32;
    p->sharedMemPerBlock = 49152, p->sharedMemPerMultiprocessor = 233472, p->sharedMemPerBlockOptin = 232448;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->maxThreadsPerMultiProcessor = 2048, p->l2CacheSize = 50 << 20;
    return cudaSuccess;
}
CALL(cudaDeviceGetAttribute, int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, 0);
    *value = attribute == cudaDevAttrMaxThreadsPerBlock ? 1024
           : attribute == cudaDevAttrMaxSharedMemoryPerBlock ? (int)p.sharedMemPerBlock
           : attribute == cudaDevAttrWarpSize ? 32
           : attribute == cudaDevAttrMultiProcessorCount ? 132
           : attribute == cudaDevAttrMaxThreadsPerMultiProcessor ? 2048
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? (int)p.sharedMemPerMultiprocessor
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? (int)p.sharedMemPerBlockOptin
           : attribute == cudaDevAttrMaxGridDimX ? INT32_MAX
           : attribute == cudaDevAttrMaxGridDimY || attribute == cudaDevAttrMaxGridDimZ ? 65535 : 0;
    return cudaSuccess;
}
CALL(cudaFuncGetAttributes, struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
    return cudaSuccess;
}
CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int *n, const void *f, int b, size_t s, unsigned flags) {
    *n = 2;
    return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t error) { return "null device"; }
const char *cudaGetErrorName(cudaError_t error) { return "null device"; }

CALL(cudaLaunchKernel, const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { null_launches++; return 0; }
CALL(cudaLaunchKernelExC, const cudaLaunchConfig_t *c, const void *f, void **a) { null_launches++; return 0; }
CALL(__cudaLaunchKernel, void *k, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { null_launches++; return 0; }
CALL(__cudaGetKernel, const void **kernel, const void *f) { *kernel = f; return cudaSuccess; }
static __thread dim3 grid, block;
static __thread size_t shared_bytes;
static __thread void *launch_stream;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t n, void *s) {
    grid = g, block = b, shared_bytes = n, launch_stream = s;
    return 0;
}
CALL(__cudaPopCallConfiguration, dim3 *g, dim3 *b, size_t *n, void *s) {
    *g = grid, *b = block, *n = shared_bytes, *(void **)s = launch_stream;
    return cudaSuccess;
}
static void *handle[64];
void **__cudaRegisterFatBinary(void *binary) { return handle; }
char __cudaInitModule(void **h) { return 1; }

static int nothing(void) { return 0; }
static int context_state(int device, unsigned *flags, int *active) { *active = 1; return 0; }
CALL(cudaGetDriverEntryPointByVersion, const char *name, void **f, unsigned version, unsigned long long flags,
     enum cudaDriverEntryPointQueryResult *result) {
    if (result) *result = cudaDriverEntryPointSuccess;
    *f = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)nothing : (void *)context_state;
    return cudaSuccess;
}
int cublasCreate_v2(void **p) { *p = handle; return 0; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulDescCreate(void **p, int a, int b) { *p = handle; return 0; }
int cublasLtMatmulPreferenceCreate(void **p) { *p = handle; return 0; }
int cublasLtMatrixLayoutCreate(void **p, int t, uint64_t r, uint64_t c, int64_t l) { *p = handle; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int n, void *r,
                                   int *found) { *found = 1; return 0; }
size_t cublasLtGetVersion(void) { return CUDART_VERSION * 10; }
