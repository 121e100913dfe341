// What every kernel shares: names of sizes, arithmetic that rounds as it is written, the tree of
// rule 1, and the functions of kernels/src/ops/function.rs.
//
// Everything is compiled with --fmad=false --ftz=false, IEEE division and roots: the bits are
// those of the CPU (determinism contract). Prepended to each .cu file by kernels/src/cuda.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;

#define DI __device__ __forceinline__
#define ENTRY extern "C" __global__ void

constexpr int LEAF = 256;     // length of a leaf of rule 1 and 3
constexpr int PANEL = 32;     // outputs of a panel: the lanes of a warp
constexpr int BLOCK = 32;     // k's that share a scale
constexpr int RECORD = 10;    // words of the activations of a block
constexpr int PAGE = 64;      // positions of a page
constexpr u32 FULL = 0xffffffffu;
constexpr float MAGIC = 12582912.0f;      // adding it rounds to whole numbers
constexpr int MAGIC_BITS = 0x4b400000;
constexpr u32 NAN_BITS = 0x7fc00000u;

DI float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DI float add(float a, float b) { return __fadd_rn(a, b); }
DI float mul(float a, float b) { return __fmul_rn(a, b); }
DI float bits(u32 x) { return __uint_as_float(x); }
DI u32 bits(float x) { return __float_as_uint(x); }
DI float low(u32 w) { return bits(w << 16); }
DI float high(u32 w) { return bits(w & 0xffff0000u); }
DI u32 lane_id() { return threadIdx.x & 31; }
DI u32 warp_id() { return threadIdx.x >> 5; }

// The nearest bf16, ties to even; a NaN stays one.
DI u16 bf16_bits(float x) {
  u32 b = bits(x);
  return x != x ? 0x7fc0 : (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

// Two as a word, the first below.
DI u32 bf16_pair(float a, float b) { return (u32)bf16_bits(a) | (u32)bf16_bits(b) << 16; }
// A value in each lane of the warp: the even ones write theirs and the next lane's, where wanted.
DI void keep_pair(float x, bool wanted, u32* to) {
  float next = __shfl_down_sync(FULL, x, 1);
  if (wanted && lane_id() % 2 == 0) *to = bf16_pair(x, next);
}

// A word that is read once: past the first cache. Not volatile (several times slower in attention's
// loops, measured), so the compiler may move it before `begin` where its address is known there:
// only weights may be read so, which no kernel writes, or what is found through ordinary reads.
DI u32 stream(const void* p) {
  u32 v;
  asm("ld.global.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// A kernel may be started before the one before it has ended (programmatic dependent launch). What
// it reads before `begin` is constant for the whole pass, or was written before the kernel before it
// began: that one lets others start only when what it waits for itself has ended.
DI void begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// The same where the next kernel reads nothing beforehand but what is constant for the whole pass.
DI void begin_early() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DI void ask(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

DI u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Bulk copies into shared memory: a barrier counts the bytes of each of its phases.
#if __CUDA_ARCH__ >= 900
DI void barrier_init(u64* b) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_at(b)) : "memory"); }
// After the barriers are made, by the thread that made them.
DI void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DI void barrier_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_at(b)), "r"(bytes) : "memory");
}
DI void bulk_copy(void* to, const void* from, u32 bytes, u64* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_at(to)), "l"(from), "r"(bytes), "r"(shared_at(b)) : "memory");
}
DI void barrier_wait(u64* b, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra out;\nbra again;\nout:\n}" ::"r"(shared_at(b)), "r"(phase) : "memory");
}
#else
DI void barrier_init(u64*) {}
DI void barriers_made() {}
DI void barrier_expect(u64*, u32) {}
DI void bulk_copy(void*, const void*, u32, u64*) {}
DI void barrier_wait(u64*, u32) {}
#endif

// Whether this is the last of `count` blocks that come here with one counter, which is 0 before and
// after. All that the others wrote before can then be read.
DI bool last_of(u32* counter, u32 count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, count - 1) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The nodes of rule 1's tree over `count` values in place, by one thread; the sum is p[0].
DI float tree_in_place(float* p, u32 count) {
  for (u32 d = 1; d < count; d *= 2)
    for (u32 i = 0; i + d < count; i += 2 * d) p[i] = add(p[i], p[i + d]);
  return p[0];
}

// An expert's matrices; null where it is absent. An item is some consecutive entries of `order`, all
// of one expert.
struct Expert { const char* gate; const char* up; const char* down; };
struct Item { u32 expert, first, count; };

// Pages of keys and values, and one layer of them.
struct Cache {
  const char* pages;   // all pages, one after the other
  u64 page_bytes;
  u64 layer_at;        // where the layer's heads begin in a page
  u32 head_bytes;
  u32 kv_heads, head_dim, cols;  // cols: of a kept value row
};

// Subtrees that leaf `index` of `count` is added to: ops/tree.rs.
DI int merges(u32 index, u32 count) { return index + 1 == count ? __popc(index) : __ffs(~index) - 1; }

// Rule 1's tree over up to eight leaves that lie `stride` apart.
DI float tree8(const float* p, int stride, int count) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = i < count ? p[i * stride] : 0.0f;
#pragma unroll
  for (int d = 1; d < 8; d *= 2)
#pragma unroll
    for (int i = 0; i + d < 8; i += 2 * d)
      if (i + d < count) v[i] = add(v[i], v[i + d]);
  return v[0];
}

// The eight virtual lanes of rule 3, one in each of eight neighbouring lanes of the warp: all of
// them get the sum.
DI float lanes8(float l) {
  l = add(l, __shfl_xor_sync(FULL, l, 4));
  l = add(l, __shfl_xor_sync(FULL, l, 2));
  return add(l, __shfl_xor_sync(FULL, l, 1));
}

constexpr float LIMIT = 120.0f;

DI float limited(float x) {
  x = x > LIMIT ? LIMIT : x;
  return x < -LIMIT ? -LIMIT : x;
}

struct Factors { float p, a, b; };

DI Factors factors(float x) {
  x = limited(x);
  float shifted = fma(x, 1.44269504088896340736f, MAGIC);
  float n = add(shifted, -MAGIC);
  float r = fma(n, 2.1219444e-4f, fma(n, -0.6933594f, x));
  float p = 1.9875691e-4f;
  p = fma(p, r, 1.3981999e-3f);
  p = fma(p, r, 8.333452e-3f);
  p = fma(p, r, 4.1665796e-2f);
  p = fma(p, r, 1.6666665e-1f);
  p = fma(p, r, 0.5f);
  p = add(fma(mul(r, r), p, r), 1.0f);
  i32 e = (i32)(bits(shifted) - (u32)MAGIC_BITS), half = e >> 1;
  return {p, bits((u32)((half + 127) << 23)), bits((u32)((e - half + 127) << 23))};
}

DI float exp_(float x) { Factors f = factors(x); return mul(mul(f.p, f.a), f.b); }

DI float sigmoid(float x) {
  float e = exp_(-fabsf(x));
  return __fdiv_rn(x < 0.0f ? e : 1.0f, add(1.0f, e));
}

DI float silu(float x) {
  Factors f = factors(-fabsf(x));
  float numerator = x < 0.0f ? mul(mul(mul(limited(x), f.p), f.a), f.b) : x;
  return __fdiv_rn(numerator, add(1.0f, mul(mul(f.p, f.a), f.b)));
}

// One block of activations, a value in each lane of the warp: its record of ten words.
DI void quantise_block(float x, u32* record) {
  u32 lane = lane_id(), largest = bits(x) & 0x7fffffffu;
  for (int d = 16; d; d /= 2) largest = max(largest, __shfl_xor_sync(FULL, largest, d));
  // Below 2^-100 a block counts as zeros; as an integer, NaN is above infinity.
  bool nothing = largest < (27u << 23), finite = largest < 0x7f800000u;
  float l = bits(largest);
  float scale = nothing ? 0.0f : finite ? __fdiv_rn(l, 127.0f) : bits(NAN_BITS);
  i32 q = 0;
  if (!nothing && finite) q = (i32)(bits(add(mul(x, __fdiv_rn(127.0f, l)), MAGIC)) - (u32)MAGIC_BITS);
  i32 sum = q;
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
  u32 word = (u32)q & 255;
  word |= __shfl_down_sync(FULL, word, 1) << 8;
  word |= __shfl_down_sync(FULL, word, 2) << 16;
  if (lane % 4 == 0) record[lane / 4] = word;
  if (lane == 0) { record[8] = bits(scale); record[9] = (u32)-sum; }
}
