// Stands for libcuda.so.1 where there is no GPU: kernels that nvrtc.cpp made run on the host, one block
// after the other, each of its threads on a stack of its own. For checking, not for speed.
//
// A warp runs until all of its lanes wait, then the next one does: upwards, or downwards where
// LITE_LLM_HOST_ORDER=down. Shared memory is poisoned before each block; memory ends at a page that
// cannot be read; copies that need not have come yet have not.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <elf.h>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "runtime.h"

extern "C" void host_switch(void** from, void* to);
asm(R"(
.text
.globl host_switch
host_switch:
  push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx
  ret
)");

namespace {

constexpr size_t STACK = 128 << 10, PAGE = 4096, SHARED = 232448;
constexpr unsigned THREADS = 1024;

struct Copy { unsigned to, bytes; const void* from; };
struct Copies { std::vector<std::vector<Copy>> groups; std::vector<Copy> open; };

struct Entry { const char* name; void (*call)(void**); void** (*keep)(void**); };
struct Module { void* library; const Entry* entries; };

Runtime runtime;
Lane lanes[THREADS];
Warp warps[THREADS / 32];
Copies copies[THREADS];
char* stacks;
void* scheduler;
unsigned block_arrived, block_generation, block_alive;
void (*kernel)(void**);
void** arguments;
std::map<uint64_t, std::pair<void*, size_t>> memory;
bool lost;           // a kernel has trapped
typedef std::vector<std::function<int()>> Graph;
thread_local Graph* captured;  // the graph that this thread records
std::mutex one;                // one thread at a time runs kernels, or takes memory

void pause(Wait wait, unsigned seen) {
  Lane* lane = runtime.lane;
  lane->wait = wait;
  lane->seen = seen;
  host_switch(&lane->stack_pointer, scheduler);
}
void warp_barrier() {
  Warp* w = runtime.warp;
  if (++w->arrived == w->alive) { w->arrived = 0; w->generation++; return; }
  pause(AT_WARP, w->generation);
}
void block_barrier() {
  if (++block_arrived == block_alive) { block_arrived = 0; block_generation++; return; }
  pause(AT_BLOCK, block_generation);
}
bool came(const unsigned long long* barrier, unsigned parity) { return (unsigned)(*barrier & 1) != parity; }
void wait_copies(const unsigned long long* barrier, unsigned parity) {
  if (came(barrier, parity)) return;
  runtime.lane->barrier = barrier;
  runtime.lane->parity = parity;
  pause(AT_COPIES, 0);
}
void copy(unsigned to, const void* from, unsigned bytes) { copies[runtime.lane->index].open.push_back({to, bytes, from}); }
void copies_end() {
  Copies& c = copies[runtime.lane->index];
  c.groups.push_back(std::move(c.open));
  c.open.clear();
}
void copies_wait(int left) {
  Copies& c = copies[runtime.lane->index];
  while ((int)c.groups.size() > left) {
    for (const Copy& x : c.groups.front()) {
      char sixteen[16] = {};
      std::memcpy(sixteen, x.from, x.bytes);
      std::memcpy((void*)(uintptr_t)x.to, sixteen, 16);
    }
    c.groups.erase(c.groups.begin());
  }
}

void lane_main() {
  kernel(arguments);
  Lane* lane = runtime.lane;
  lane->done = true;
  // Those that wait for all need one less.
  Warp* w = runtime.warp;
  if (--w->alive && w->arrived == w->alive) { w->arrived = 0; w->generation++; }
  if (--block_alive && block_arrived == block_alive) { block_arrived = 0; block_generation++; }
  host_switch(&lane->stack_pointer, scheduler);
  std::abort();
}

bool ready(const Lane& lane, const Warp& warp) {
  switch (lane.wait) {
    case READY: return true;
    case AT_WARP: return warp.generation != lane.seen;
    case AT_BLOCK: return block_generation != lane.seen;
    case AT_COPIES: return came(lane.barrier, lane.parity);
  }
  return false;
}

void run_block(unsigned threads, bool down) {
  unsigned count = threads / 32;
  block_arrived = 0;
  block_alive = threads;
  for (unsigned i = 0; i < threads; i++) {
    void** top = (void**)(stacks + (i + 1) * STACK) - 2;
    *top = (void*)lane_main;  // what the first switch returns to
    lanes[i] = {top - 6, i, READY, 0, nullptr, 0, false};
    copies[i].groups.clear();
    copies[i].open.clear();
  }
  for (unsigned w = 0; w < count; w++) {
    warps[w].arrived = 0;
    warps[w].alive = 32;
    std::memset(warps[w].lane_turn, 0, sizeof warps[w].lane_turn);
  }
  while (block_alive) {
    bool any = false;
    for (unsigned i = 0; i < count; i++) {
      Warp& warp = warps[down ? count - 1 - i : i];
      unsigned first = (unsigned)(&warp - warps) * 32;
      for (bool some = true; some;) {
        some = false;
        for (unsigned l = first; l < first + 32; l++) {
          if (lanes[l].done || !ready(lanes[l], warp)) continue;
          some = any = true;
          runtime.lane = &lanes[l];
          runtime.warp = &warp;
          lanes[l].wait = READY;
          host_switch(&scheduler, lanes[l].stack_pointer);
        }
      }
    }
    if (!any) {
      std::fprintf(stderr, "all lanes wait, and for nothing that comes\n");
      std::abort();
    }
  }
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

}  // namespace

extern "C" {

#define GOOD { return 0; }
// As after CUDA_ERROR_LAUNCH_FAILED: what comes later fails, too.
#define ALIVE if (lost) return 719
#define ALIVE_GOOD { ALIVE; return 0; }
int cuInit(unsigned) GOOD
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGetCount(int* n) { *n = 2; return 0; }
int cuDeviceGet(int* d, int) { *d = 0; return 0; }
int cuDeviceGetName(char* name, int len, int) { std::snprintf(name, len, "this host, not a GPU"); return 0; }
int cuDeviceGetAttribute(int* v, int what, int) {
  // Multiprocessors, shared memory of a block, compute capability.
  *v = what == 16 ? 132 : what == 97 ? (int)SHARED : what == 75 ? 9 : what == 76 ? 0 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** c, int) { *c = (void*)1; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) GOOD
int cuDevicePrimaryCtxRelease(int) GOOD
int cuCtxSetCurrent(void*) GOOD
int cuCtxGetCurrent(void** c) { *c = (void*)1; return 0; }
int cuCtxSynchronize() ALIVE_GOOD
int cuStreamCreateWithPriority(void** s, unsigned, int) { *s = (void*)2; return 0; }
int cuStreamCreate(void** s, unsigned) { *s = (void*)2; return 0; }
int cuStreamDestroy_v2(void*) GOOD
int cuStreamSynchronize(void*) ALIVE_GOOD
int cuStreamWaitEvent(void*, void*, unsigned) GOOD
int cuEventCreate(void** e, unsigned) { *e = new double(0); return 0; }
int cuEventRecord(void* e, void*) { *(double*)e = now(); return 0; }
int cuEventSynchronize(void*) ALIVE_GOOD
int cuEventQuery(void*) ALIVE_GOOD
int cuMemHostAlloc(void** at, size_t bytes, unsigned) { *at = std::calloc(1, bytes); return *at ? 0 : 2; }
int cuMemHostRegister_v2(void*, size_t, unsigned) GOOD
int cuMemHostUnregister(void*) GOOD
int cuMemFreeHost(void* at) { std::free(at); return 0; }
int cuEventElapsedTime_v2(float* ms, void* a, void* b) { *ms = (float)((*(double*)b - *(double*)a) * 1e3); return 0; }
int cuEventElapsedTime(float* ms, void* a, void* b) { return cuEventElapsedTime_v2(ms, a, b); }
int cuEventDestroy_v2(void* e) { delete (double*)e; return 0; }
int cuStreamBeginCapture_v2(void*, int) { captured = new Graph; return 0; }
int cuStreamEndCapture(void*, Graph** graph) { *graph = captured; captured = nullptr; return 0; }
int cuGraphGetNodes(Graph* graph, void*, size_t* count) { *count = graph->size(); return 0; }
int cuGraphInstantiateWithFlags(Graph** e, Graph* graph, unsigned long long) { *e = new Graph(*graph); return 0; }
int cuGraphExecDestroy(Graph* e) { delete e; return 0; }
int cuGraphDestroy(Graph* graph) { delete graph; return 0; }
int cuGraphLaunch(Graph* e, void*) {
  for (auto& node : *e)
    if (int error = node()) return error;
  return 0;
}
int cuMemGetInfo_v2(size_t* free, size_t* all) { *free = *all = (size_t)4 << 30; return 0; }
int cuGetErrorName(int, const char** s) { *s = "HOST"; return 0; }
int cuGetErrorString(int, const char** s) { *s = "the host that stands for a GPU cannot do this"; return 0; }
int cuMemAlloc_v2(uint64_t* at, size_t bytes) {
  ALIVE;
  std::lock_guard<std::mutex> alone(one);
  size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
  char* base = (char*)mmap(nullptr, room + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return 2;
  mprotect(base + room, PAGE, PROT_NONE);
  *at = (uint64_t)(base + room - (bytes + 15) / 16 * 16);
  memory[*at] = {base, room + PAGE};
  return 0;
}
int cuMemFree_v2(uint64_t at) {
  std::lock_guard<std::mutex> alone(one);
  auto found = memory.find(at);
  if (found == memory.end()) return 1;
  munmap(found->second.first, found->second.second);
  memory.erase(found);
  return 0;
}
int cuMemsetD8Async(uint64_t at, unsigned char byte, size_t bytes, void*) {
  ALIVE;
  auto node = [=] { std::memset((void*)at, byte, bytes); return 0; };
  if (captured) { captured->push_back(node); return 0; }
  return node();
}
// Copies from and to memory that is not locked cannot be recorded.
int cuMemcpyHtoDAsync_v2(uint64_t at, const void* from, size_t bytes, void*) {
  ALIVE;
  if (captured) return 900;
  std::memcpy((void*)at, from, bytes);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t at, size_t bytes, void*) {
  ALIVE;
  if (captured) return 900;
  std::memcpy(to, (void*)at, bytes);
  return 0;
}

int cuCtxEnablePeerAccess(void*, unsigned) GOOD
int cuMemcpyPeerAsync(uint64_t at, void*, uint64_t from, void*, size_t bytes, void*) {
  ALIVE;
  auto node = [=] { std::memcpy((void*)at, (void*)from, bytes); return 0; };
  if (captured) { captured->push_back(node); return 0; }
  return node();
}

int cuModuleLoadData(Module** to, const void* data) {
  std::lock_guard<std::mutex> alone(one);
  const Elf64_Ehdr* head = (const Elf64_Ehdr*)data;
  if (std::memcmp(head->e_ident, ELFMAG, SELFMAG) != 0 || head->e_machine != EM_X86_64) return 200;
  size_t bytes = head->e_shoff + (size_t)head->e_shnum * head->e_shentsize;
  char name[] = "/tmp/lite-llm-host-XXXXXX";
  int file = mkstemp(name);
  if (file < 0 || write(file, data, bytes) != (ssize_t)bytes) return 200;
  close(file);
  void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  unlink(name);
  if (!library) { std::fprintf(stderr, "%s\n", dlerror()); return 200; }
  ((void (*)(Runtime*))dlsym(library, "host_runtime"))(&runtime);
  *to = new Module{library, (const Entry*)dlsym(library, "host_entries")};
  return 0;
}
int cuModuleUnload(Module*) GOOD
int cuModuleGetFunction(const Entry** to, Module* module, const char* name) {
  for (const Entry* e = module->entries; e->name; e++)
    if (std::strcmp(e->name, name) == 0) { *to = e; return 0; }
  return 500;
}
int cuFuncGetAttribute(int* v, int, const Entry*) { *v = 0; return 0; }
int cuFuncSetAttribute(const Entry*, int, int) GOOD

struct Config { unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared; };
int launch(const Config* c, const Entry* f, void** args) {
  ALIVE;
  std::lock_guard<std::mutex> alone(one);
  if (!stacks) {
    stacks = (char*)mmap(nullptr, STACK * THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // A page that cannot be read follows it, too; addresses differ in their lowest eighteen bits alone.
    char* shared = (char*)mmap(nullptr, 128 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    shared += -(uintptr_t)shared % (64 * PAGE);
    mprotect(shared + 63 * PAGE, PAGE, PROT_NONE);
    runtime.shared = shared;
    runtime.warp_barrier = warp_barrier;
    runtime.block_barrier = block_barrier;
    runtime.wait_copies = wait_copies;
    runtime.copy = copy;
    runtime.copies_end = copies_end;
    runtime.copies_wait = copies_wait;
    runtime.trap = [] { lost = true; };
  }
  if (c->shared > SHARED || c->block_x % 32 || c->block_x > THREADS) return 1;
  static char* base = runtime.shared;
  runtime.shared = base + 63 * PAGE - (c->shared + 127) / 128 * 128;
  runtime.grid_dim = {c->grid_x, c->grid_y, c->grid_z};
  runtime.block_dim = {c->block_x, 1, 1};
  kernel = f->call;
  arguments = args;
  const char* order = std::getenv("LITE_LLM_HOST_ORDER");
  bool down = order && std::strcmp(order, "down") == 0;
  for (unsigned z = 0; z < c->grid_z; z++)
    for (unsigned y = 0; y < c->grid_y; y++)
      for (unsigned x = 0; x < c->grid_x; x++) {
        runtime.block = {x, y, z};
        std::memset(runtime.shared, 0xff, c->shared);
        run_block(c->block_x, down);
      }
  return 0;
}
int cuLaunchKernelEx(const Config* c, const Entry* f, void** args, void**) {
  ALIVE;
  if (!captured) return launch(c, f, args);
  Config config = *c;
  void** kept = f->keep(args);
  captured->push_back([=] { return launch(&config, f, kept); });
  return 0;
}
}
