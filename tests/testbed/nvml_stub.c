/* libnvidia-ml.so.1 for a machine without a driver, so that the real nvidia-ml-py bindings run.
   NVML_STUB=mig: GPU 1 is cut into two MIG devices, which tell memory and no utilisation. NVML_STUB=broken: no driver. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };
enum { GPUS = 2, MIG_DEVICES = 2 };
typedef struct { int index, mig; } device_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;
static device_t gpus[GPUS] = {{0, 0}, {1, 0}};
static device_t migs[MIG_DEVICES] = {{0, 1}, {1, 1}};

static int stub_is(const char *mode) {
    const char *set = getenv("NVML_STUB");
    return set && !strcmp(set, mode);
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return stub_is("broken") ? DRIVER_NOT_LOADED : OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { (void)code; return "stub"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = GPUS; return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t **device) {
    if (index >= GPUS) return INVALID_ARGUMENT;
    *device = &gpus[index];
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device_t **device) {
    int index;
    if (sscanf(uuid, "GPU-stub-%d", &index) == 1 && index < GPUS) *device = &gpus[index];
    else if (sscanf(uuid, "MIG-stub-%d", &index) == 1 && index < MIG_DEVICES) *device = &migs[index];
    else return NOT_FOUND;
    return OK;
}

int nvmlDeviceGetName(device_t *device, char *name, unsigned length) {
    snprintf(name, length, device->mig ? "Stub H100 MIG %d" : "Stub H100 %d", device->index);
    return OK;
}

int nvmlDeviceGetMemoryInfo(device_t *device, memory_t *memory) {
    memory->total = (device->mig ? 10ull : 80ull) << 30;
    memory->used = (unsigned long long)(device->index + 1) << 30;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetUtilizationRates(device_t *device, utilization_t *rates) {
    if (device->mig) return NOT_SUPPORTED;
    rates->gpu = 42;
    rates->memory = 7;
    return OK;
}

int nvmlDeviceGetPowerUsage(device_t *device, unsigned *milliwatts) {
    if (device->mig) return NOT_SUPPORTED;
    *milliwatts = 350500;
    return OK;
}

int nvmlDeviceGetTemperature(device_t *device, int sensor, unsigned *celsius) {
    (void)sensor;
    if (device->mig) return NOT_SUPPORTED;
    *celsius = 55;
    return OK;
}

int nvmlDeviceGetMigMode(device_t *device, unsigned *current, unsigned *pending) {
    if (!stub_is("mig") || device->mig) return NOT_SUPPORTED;
    *current = *pending = device->index == 1;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(device_t *device, unsigned *count) { (void)device; *count = 7; return OK; }

int nvmlDeviceGetMigDeviceHandleByIndex(device_t *device, unsigned index, device_t **mig) {
    (void)device;
    if (index >= MIG_DEVICES) return NOT_FOUND;
    *mig = &migs[index];
    return OK;
}
