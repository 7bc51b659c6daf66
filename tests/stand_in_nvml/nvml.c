/* A stand-in for libnvidia-ml.so.1: answers from a description file instead of a driver.
 *
 * The file named by STAND_IN_NVML is read anew on every call, so a test can change the machine
 * while a program runs. One fact a line, "key value"; its writer and the meaning of every key are
 * in __init__.py. "gpu" opens a GPU, "mig <slot>" a MIG device of the last GPU; what stands before
 * the first "gpu" belongs to the machine. A fact that is not there is NVML_ERROR_NOT_SUPPORTED.
 * With STAND_IN_NVML_CALLS set, the name of every function called is appended to that file.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, VERSION_MISMATCH = 25,
};
enum { MAX_LINES = 4096, MAX_LINE = 256, MAX_GPUS = 64, MAX_LINKS = 36 };

typedef unsigned int uint;
typedef unsigned long long ull;
typedef void *handle_t; /* (gpu + 1) * 256 + (MIG slot + 1), the slot part 0 for a whole GPU */
typedef struct { ull total, free, used; } memory_v1;
typedef struct { uint version; ull total, reserved, free, used; } memory_v2;
typedef struct { uint pid; ull used; uint gpu_instance, compute_instance; } process_v2;
typedef struct { uint version, sensor; int temperature; } temperature_v1;
typedef struct { uint gpu, memory; } utilization;
typedef struct {
    char legacy[16];
    uint domain, bus, device, pci_device, pci_subsystem;
    char id[32];
} pci_v3;
typedef struct {
    char id[16];
    uint domain, bus, device, pci_device, pci_subsystem, reserved[4];
} pci_v2;

static _Thread_local char lines[MAX_LINES][MAX_LINE];
static _Thread_local int line_count;
static int inits;
static ull loaded; /* which loading of the driver the session belongs to */
static long calls_of[MAX_GPUS];

typedef struct { int from, to; } section; /* the lines [from, to) */

static int starts(int at, const char *key) {
    size_t n = strlen(key);
    return !strncmp(lines[at], key, n) && (lines[at][n] == ' ' || lines[at][n] == 0);
}

static int load(void) {
    const char *path = getenv("STAND_IN_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    line_count = 0;
    if (!file) return DRIVER_NOT_LOADED;
    while (line_count < MAX_LINES && fgets(lines[line_count], MAX_LINE, file)) {
        lines[line_count][strcspn(lines[line_count], "\n")] = 0;
        line_count++;
    }
    fclose(file);
    return OK;
}

/* The value of the nth line of that key, or NULL. */
static const char *fact(section in, const char *key, int nth) {
    for (int at = in.from; at < in.to; at++)
        if (starts(at, key) && nth-- == 0) return lines[at] + strlen(key) + (lines[at][strlen(key)] == ' ');
    return NULL;
}

static int number(section in, const char *key, ull *value) {
    const char *text = fact(in, key, 0);
    if (!text) return NOT_SUPPORTED;
    *value = strtoull(text, NULL, 0);
    return OK;
}

static section opened_by(section in, const char *key, const char *until, int nth) {
    for (int at = in.from; at < in.to; at++)
        if (starts(at, key) && nth-- == 0) {
            int to = at + 1;
            while (to < in.to && !starts(to, until)) to++;
            return (section){at, to};
        }
    return (section){0, 0};
}

static section whole(void) { return (section){0, line_count}; }

static section machine(void) {
    int to = 0;
    while (to < line_count && !starts(to, "gpu")) to++;
    return (section){0, to};
}

static section gpu_at(int gpu) { return opened_by(whole(), "gpu", "gpu", gpu); }

static section own(section gpu) { /* without its MIG devices */
    int to = gpu.from;
    while (to < gpu.to && !starts(to, "mig")) to++;
    return (section){gpu.from, to};
}

static section mig_at(section gpu, int slot) {
    for (int nth = 0;; nth++) {
        section mig = opened_by(gpu, "mig", "mig", nth);
        if (mig.to == 0 || atoi(lines[mig.from] + 4) == slot) return mig;
    }
}

static int fault(section in, const char *function) {
    const char *text;
    for (int nth = 0; (text = fact(in, "fault", nth)); nth++) {
        char name[128];
        int code;
        if (sscanf(text, "%127s %d", name, &code) == 2 && (!strcmp(name, function) || !strcmp(name, "*")))
            return code;
    }
    return OK;
}

static void note_call(const char *function) {
    const char *path = getenv("STAND_IN_NVML_CALLS");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s\n", function);
    fclose(file);
}

/* What every call begins with: the machine as it is now, and a fault of the whole machine. */
static int enter(const char *function) {
    note_call(function);
    int rc = load();
    if (rc) return rc;
    ull now = 0;
    number(machine(), "loaded", &now);
    if (strncmp(function, "nvmlInit", 8)) {
        if (!inits) return UNINITIALIZED;
        if (now != loaded) return DRIVER_NOT_LOADED;
    } else if (!inits) {
        loaded = now;
    }
    return fault(machine(), function);
}

/* The same for a call about one GPU: also counts it, and loses the GPU when its time has come. */
static int enter_gpu(const char *function, int gpu, section *found) {
    int rc = enter(function);
    if (rc) return rc;
    *found = gpu_at(gpu);
    if (gpu < 0 || gpu >= MAX_GPUS || found->to == 0) return inits ? INVALID_ARGUMENT : UNINITIALIZED;
    ull lost_after;
    calls_of[gpu]++;
    if (!number(own(*found), "lost_after", &lost_after) && calls_of[gpu] > (long)lost_after) return GPU_IS_LOST;
    return fault(own(*found), function);
}

static int enter_handle(const char *function, handle_t handle, section *found) {
    size_t value = (size_t)handle;
    int rc = enter_gpu(function, (int)(value >> 8) - 1, found);
    if (rc) return rc;
    if (!(value & 255)) {
        *found = own(*found);
        return OK;
    }
    *found = mig_at(*found, (int)(value & 255) - 1);
    return found->to ? fault(*found, function) : NOT_FOUND;
}

static int is_mig(handle_t handle) { return ((size_t)handle & 255) != 0; }
static handle_t handle_of(int gpu, int slot) { return (handle_t)(size_t)((gpu + 1) * 256 + slot + 1); }

#define DEVICE(handle)                                        \
    section device;                                           \
    do {                                                      \
        int entered = enter_handle(__func__, handle, &device); \
        if (entered) return entered;                          \
    } while (0)

static int text_of(section in, const char *key, char *out, uint size) {
    const char *text = fact(in, key, 0);
    if (!text) return NOT_SUPPORTED;
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return OK;
}

static int uint_of(section in, const char *key, uint *out) {
    ull value = 0;
    int rc = number(in, key, &value);
    if (!rc) *out = (uint)value;
    return rc;
}

/* ---- the library ---- */

int nvmlInitWithFlags(uint flags) {
    (void)flags;
    int rc = enter(__func__);
    if (!rc) inits++;
    return rc;
}

int nvmlInit_v2(void) {
    int rc = enter(__func__);
    if (!rc) inits++;
    return rc;
}

int nvmlShutdown(void) {
    int rc = enter(__func__);
    if (inits) inits--;
    return rc;
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *out, uint size) {
    int rc = enter(__func__);
    return rc ? rc : text_of(machine(), "driver", out, size);
}

/* ---- which GPUs there are ---- */

int nvmlDeviceGetCount_v2(uint *count) {
    int rc = enter(__func__);
    if (rc) return rc;
    *count = 0;
    while (gpu_at((int)*count).to) ++*count;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(uint index, handle_t *out) {
    section gpu;
    int rc = enter_gpu(__func__, (int)index, &gpu);
    if (!rc) *out = handle_of((int)index, -1);
    return rc;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, handle_t *out) {
    int rc = enter(__func__);
    if (rc) return rc;
    for (int gpu = 0; gpu_at(gpu).to; gpu++)
        for (int slot = -1; slot < 8; slot++) {
            section in = slot < 0 ? own(gpu_at(gpu)) : mig_at(gpu_at(gpu), slot);
            const char *text = fact(in, "uuid", 0);
            if (text && !strcmp(text, uuid)) {
                *out = handle_of(gpu, slot);
                return OK;
            }
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(handle_t handle, char *out, uint size) {
    DEVICE(handle);
    return text_of(device, "uuid", out, size);
}

int nvmlDeviceGetName(handle_t handle, char *out, uint size) {
    DEVICE(handle);
    return text_of(device, "name", out, size);
}

int nvmlDeviceGetIndex(handle_t handle, uint *out) {
    DEVICE(handle);
    if (is_mig(handle)) return NOT_SUPPORTED;
    *out = (uint)((size_t)handle >> 8) - 1;
    return OK;
}

static int pci_of(const char *text, pci_v3 *out) {
    memset(out, 0, sizeof *out);
    if (!text) return NOT_SUPPORTED;
    if (sscanf(text, "%x:%x:%x", &out->domain, &out->bus, &out->device) != 3) return INVALID_ARGUMENT;
    snprintf(out->id, sizeof out->id, "%s", text);
    snprintf(out->legacy, sizeof out->legacy, "%04X:%02X:%02X.0", out->domain & 0xFFFF, out->bus & 0xFF,
             out->device & 0xFF);
    return OK;
}

int nvmlDeviceGetPciInfo_v3(handle_t handle, pci_v3 *out) {
    DEVICE(handle);
    return pci_of(fact(device, "pci", 0), out);
}

int nvmlDeviceGetPciInfo_v2(handle_t handle, pci_v2 *out) {
    DEVICE(handle);
    pci_v3 pci;
    int rc = pci_of(fact(device, "pci", 0), &pci);
    if (rc) return rc;
    memset(out, 0, sizeof *out);
    memcpy(out->id, pci.legacy, sizeof out->id);
    out->domain = pci.domain, out->bus = pci.bus, out->device = pci.device;
    return OK;
}

int nvmlDeviceGetCudaComputeCapability(handle_t handle, int *major, int *minor) {
    DEVICE(handle);
    const char *text = fact(device, "capability", 0);
    return text && sscanf(text, "%d.%d", major, minor) == 2 ? OK : NOT_SUPPORTED;
}

int nvmlDeviceGetNumaNodeId(handle_t handle, int *out) {
    DEVICE(handle);
    return uint_of(device, "numa_node_id", (uint *)out);
}

int nvmlDeviceGetMemoryAffinity(handle_t handle, uint size, unsigned long *out, uint scope) {
    (void)scope;
    DEVICE(handle);
    uint node;
    int rc = uint_of(device, "numa_node", &node);
    if (rc) return rc;
    memset(out, 0, size * sizeof *out);
    if (node / 64 >= size) return INSUFFICIENT_SIZE;
    out[node / 64] = 1UL << node % 64;
    return OK;
}

/* ---- memory and who holds it ---- */

static int memory_of(section in, memory_v2 *out) {
    if (number(in, "total", &out->total)) return NOT_SUPPORTED;
    out->reserved = out->used = 0;
    number(in, "reserved", &out->reserved);
    number(in, "used", &out->used);
    out->free = out->total - out->reserved - out->used;
    return OK;
}

int nvmlDeviceGetMemoryInfo(handle_t handle, memory_v1 *out) {
    DEVICE(handle);
    memory_v2 memory;
    int rc = memory_of(device, &memory);
    if (!rc) *out = (memory_v1){memory.total, memory.free, memory.used + memory.reserved};
    return rc;
}

int nvmlDeviceGetMemoryInfo_v2(handle_t handle, memory_v2 *out) {
    DEVICE(handle);
    if (out->version != (sizeof *out | 2u << 24)) return VERSION_MISMATCH;
    return memory_of(device, out);
}

static int processes_of(section in, const char *kind, uint *count, process_v2 *out) {
    uint room = *count, found = 0;
    const char *text;
    for (int nth = 0; (text = fact(in, "process", nth)); nth++) {
        char name[16];
        uint pid;
        long long used;
        if (sscanf(text, "%15s %u %lld", name, &pid, &used) != 3 || strcmp(name, kind)) continue;
        if (found < room && out) out[found] = (process_v2){pid, (ull)used, ~0u, ~0u}; /* -1: not available */
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}

#define PROCESSES(function, kind)                                       \
    int function(handle_t handle, uint *count, process_v2 *out) {       \
        DEVICE(handle);                                                 \
        return processes_of(device, kind, count, out);                  \
    }

PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, "compute")
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "compute")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics")
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics")
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2, "mps")
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, "mps")

/* ---- how it does ---- */

int nvmlDeviceGetUtilizationRates(handle_t handle, utilization *out) {
    DEVICE(handle);
    out->memory = 0;
    return uint_of(device, "utilization", &out->gpu);
}

int nvmlDeviceGetTemperature(handle_t handle, uint sensor, uint *out) {
    (void)sensor;
    DEVICE(handle);
    return uint_of(device, "temperature", out);
}

int nvmlDeviceGetTemperatureV(handle_t handle, temperature_v1 *out) {
    DEVICE(handle);
    if (out->version != (sizeof *out | 1u << 24)) return VERSION_MISMATCH;
    return uint_of(device, "temperature", (uint *)&out->temperature);
}

int nvmlDeviceGetPowerUsage(handle_t handle, uint *out) {
    DEVICE(handle);
    return uint_of(device, "power", out);
}

int nvmlDeviceGetComputeMode(handle_t handle, uint *out) {
    DEVICE(handle);
    return uint_of(device, "compute_mode", out);
}

int nvmlDeviceGetTotalEccErrors(handle_t handle, uint kind, uint counter, ull *out) {
    DEVICE(handle);
    static const char *keys[2][2] = {{"corrected_volatile", "corrected_aggregate"},
                                     {"uncorrected_volatile", "uncorrected_aggregate"}};
    if (kind > 1 || counter > 1) return INVALID_ARGUMENT;
    return number(device, keys[kind][counter], out);
}

int nvmlDeviceGetRemappedRows(handle_t handle, uint *corrected, uint *uncorrected, uint *pending, uint *failed) {
    DEVICE(handle);
    const char *text = fact(device, "remapped", 0);
    return text && sscanf(text, "%u %u %u %u", corrected, uncorrected, pending, failed) == 4 ? OK : NOT_SUPPORTED;
}

int nvmlDeviceGetRetiredPagesPendingStatus(handle_t handle, uint *out) {
    DEVICE(handle);
    return uint_of(device, "retired_pending", out);
}

int nvmlDeviceGetRetiredPages(handle_t handle, uint cause, uint *count, ull *out) {
    DEVICE(handle);
    uint room = *count, found = 0;
    ull address;
    uint why;
    const char *text;
    for (int nth = 0; (text = fact(device, "retired", nth)); nth++) {
        if (sscanf(text, "%u %llx", &why, &address) != 2 || why != cause) continue;
        if (found < room && out) out[found] = address;
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : OK;
}

/* ---- MIG ---- */

int nvmlDeviceGetMigMode(handle_t handle, uint *current, uint *pending) {
    DEVICE(handle);
    if (is_mig(handle)) return INVALID_ARGUMENT;
    int rc = uint_of(device, "mig_mode", current);
    *pending = *current;
    return rc;
}

int nvmlDeviceIsMigDeviceHandle(handle_t handle, uint *out) {
    DEVICE(handle);
    *out = is_mig(handle);
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(handle_t handle, uint *out) {
    DEVICE(handle);
    ull mode = 0;
    if (number(device, "mig_mode", &mode)) return NOT_SUPPORTED;
    *out = 7;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(handle_t handle, uint slot, handle_t *out) {
    DEVICE(handle);
    int gpu = (int)((size_t)handle >> 8) - 1;
    section mig = mig_at(gpu_at(gpu), (int)slot);
    if (!mig.to) return NOT_FOUND;
    *out = handle_of(gpu, (int)slot);
    return fault(mig, __func__);
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle_t handle, handle_t *out) {
    DEVICE(handle);
    if (!is_mig(handle)) return INVALID_ARGUMENT;
    *out = handle_of((int)((size_t)handle >> 8) - 1, -1);
    return OK;
}

int nvmlDeviceGetGpuInstanceId(handle_t handle, uint *out) {
    DEVICE(handle);
    if (!is_mig(handle)) return NOT_SUPPORTED;
    *out = (uint)((size_t)handle & 255);
    return OK;
}

int nvmlDeviceGetComputeInstanceId(handle_t handle, uint *out) {
    DEVICE(handle);
    if (!is_mig(handle)) return NOT_SUPPORTED;
    *out = 0;
    return OK;
}

/* ---- how the GPUs are joined ---- */

int nvmlDeviceGetTopologyCommonAncestor(handle_t one, handle_t other, uint *level) {
    section second;
    int rc = enter_handle(__func__, other, &second);
    if (rc) return rc;
    DEVICE(one);
    const char *text;
    for (int nth = 0; (text = fact(device, "ancestor", nth)); nth++) {
        uint peer;
        if (sscanf(text, "%u %u", &peer, level) == 2 && peer == (uint)((size_t)other >> 8) - 1) return OK;
    }
    return NOT_SUPPORTED;
}

static const char *link_of(section in, uint link) { /* "<link> <0|1> <pci id of the other end> [<its type>]" */
    const char *text;
    for (int nth = 0; (text = fact(in, "nvlink", nth)); nth++)
        if ((uint)strtoul(text, NULL, 10) == link) return text;
    return NULL;
}

int nvmlDeviceGetNvLinkState(handle_t handle, uint link, uint *active) {
    DEVICE(handle);
    if (link >= MAX_LINKS) return INVALID_ARGUMENT;
    const char *text = link_of(device, link);
    return text && sscanf(text, "%*u %u", active) == 1 ? OK : NOT_SUPPORTED;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(handle_t handle, uint link, pci_v3 *out) {
    DEVICE(handle);
    if (link >= MAX_LINKS) return INVALID_ARGUMENT;
    const char *text = link_of(device, link);
    char remote[32];
    return text && sscanf(text, "%*u %*u %31s", remote) == 1 ? pci_of(remote, out) : NOT_SUPPORTED;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(handle_t handle, uint link, uint *out) {
    DEVICE(handle);
    if (link >= MAX_LINKS) return INVALID_ARGUMENT;
    const char *text = link_of(device, link);
    return text && sscanf(text, "%*u %*u %*31s %u", out) == 1 ? OK : NOT_SUPPORTED;
}

int nvmlDeviceGetNvLinkCapability(handle_t handle, uint link, uint capability, uint *out) {
    (void)capability;
    DEVICE(handle);
    if (link >= MAX_LINKS) return INVALID_ARGUMENT;
    *out = 1;
    return link_of(device, link) ? OK : NOT_SUPPORTED;
}
