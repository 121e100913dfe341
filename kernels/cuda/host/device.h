// CUDA's words for kernels that are compiled for the host: prepended to a kernel's source by nvrtc.cpp,
// which takes out the functions that are written in the device's own instructions and are here instead.
//
// The tensor cores' order of sums inside one instruction is not theirs but the slots' own, k upwards, so
// that a kernel that puts a k elsewhere gets other bits.
#include <stddef.h>
#include "runtime.h"

static Runtime* rt;
extern "C" void host_runtime(Runtime* r) { rt = r; }

#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 900
#define threadIdx (Dim{rt->lane->index, 0, 0})
#define blockIdx (rt->block)
#define blockDim (rt->block_dim)
#define gridDim (rt->grid_dim)
#define __trap() rt->trap()

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class A, class B> inline auto min(A a, B b) { using C = decltype(a + b); return (C)a < (C)b ? (C)a : (C)b; }
template <class A, class B> inline auto max(A a, B b) { using C = decltype(a + b); return (C)a > (C)b ? (C)a : (C)b; }

template <class To, class From> inline To same_bits(From x) { To y; __builtin_memcpy(&y, &x, sizeof y); return y; }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __int2float_rn(int a) { return (float)a; }
inline float fabsf(float x) { return __builtin_fabsf(x); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline float rintf(float x) { return __builtin_rintf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned how) {
  unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned d = 0;
  for (int i = 0; i < 4; i++) d |= (unsigned)(both >> ((how >> 4 * i & 7) * 8) & 255) << 8 * i;
  return d;
}
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* p, unsigned limit) { unsigned old = *p; *p = old >= limit ? 0 : old + 1; return old; }
template <class T> inline T atomicAdd(T* p, T x) { T old = *p; *p += x; return old; }
template <class T> inline T atomicMin(T* p, T x) { T old = *p; *p = x < old ? x : old; return old; }
template <class T> inline T atomicMax(T* p, T x) { T old = *p; *p = x > old ? x : old; return old; }
inline void __syncthreads() { rt->block_barrier(); }
inline void __syncwarp() { rt->warp_barrier(); }

// Hands this lane's words to the warp; at(i) are those of lane i.
struct Exchange {
  unsigned (*words)[8];
  template <class T> explicit Exchange(const T& x) {
    Warp* w = rt->warp;
    unsigned lane = rt->lane->index % 32;
    words = w->words[w->lane_turn[lane]++ % 2];
    static_assert(sizeof(T) <= 32, "eight words");
    __builtin_memcpy(words[lane], &x, sizeof(T));
    rt->warp_barrier();
  }
  template <class T> T at(unsigned i) const { T x; __builtin_memcpy(&x, words[i % 32], sizeof(T)); return x; }
};
template <class T> inline T __shfl_sync(unsigned, T x, unsigned from) { return Exchange(x).template at<T>(from); }
template <class T> inline T __shfl_xor_sync(unsigned, T x, unsigned d) { return Exchange(x).template at<T>((rt->lane->index % 32) ^ d); }
template <class T> inline T __shfl_down_sync(unsigned, T x, unsigned d) {
  unsigned lane = rt->lane->index % 32;
  return Exchange(x).template at<T>(lane + d < 32 ? lane + d : lane);
}
inline unsigned __ballot_sync(unsigned, bool x) { Exchange e(x); unsigned d = 0; for (int i = 0; i < 32; i++) d |= (unsigned)e.at<bool>(i) << i; return d; }
inline bool __all_sync(unsigned m, bool x) { return __ballot_sync(m, x) == 0xffffffffu; }
template <class T> inline unsigned __match_any_sync(unsigned, T x) { Exchange e(x); unsigned d = 0; for (int i = 0; i < 32; i++) d |= (unsigned)(e.at<T>(i) == x) << i; return d; }
template <class T> inline T __reduce_add_sync(unsigned, T x) { Exchange e(x); T d = 0; for (int i = 0; i < 32; i++) d += e.at<T>(i); return d; }
template <class T> inline T __reduce_max_sync(unsigned, T x) { Exchange e(x); for (int i = 0; i < 32; i++) x = max(x, e.at<T>(i)); return x; }
template <class T> inline T __reduce_min_sync(unsigned, T x) { Exchange e(x); for (int i = 0; i < 32; i++) x = min(x, e.at<T>(i)); return x; }

// The functions of common.cuh, product.cuh, tensor.cuh, tile.cu and attention.cu that are the device's own.
inline unsigned stream(const void* p) { return *(const unsigned*)p; }
inline int stream8(const char* p) { return *(const signed char*)p; }
inline uint4 stream16(const void* p) { return *(const uint4*)p; }
inline void begin() {}
inline void begin_early() {}
inline void ask(const void*) {}
// A barrier: its phase, and the bytes that it waits for. Copies are done at once.
inline void barrier_init(unsigned long long* b) { *b = 0; }
inline void barriers_made() {}
inline void barrier_expect(unsigned long long* b, unsigned bytes) { *b += (unsigned long long)bytes << 32; }
inline void bulk_copy(void* to, const void* from, unsigned bytes, unsigned long long* b) {
  __builtin_memcpy(to, from, bytes);
  *b -= (unsigned long long)bytes << 32;
  if (*b >> 32 == 0) *b += 1;
}
inline void barrier_wait(unsigned long long* b, unsigned parity) { rt->wait_copies(b, parity); }
// Others are done as late as they may be.
inline void copy16(unsigned to, const void* from) { rt->copy(to, from, 16); }
inline void copy16_of(unsigned to, const void* from, unsigned bytes) { rt->copy(to, from, bytes); }
inline void copies_end() { rt->copies_end(); }
template <int N> inline void copies_wait() { rt->copies_wait(N); }
inline void four_matrices(unsigned& a, unsigned& b, unsigned& c, unsigned& d, const void* at) {
  Exchange e(at);
  unsigned lane = rt->lane->index % 32;
  unsigned* to[4] = {&a, &b, &c, &d};
  for (unsigned i = 0; i < 4; i++) *to[i] = ((const unsigned*)e.at<const void*>(8 * i + lane / 4))[lane % 4];
}
inline float of_bf16(unsigned pair, int half) { return __uint_as_float(half ? pair & 0xffff0000u : pair << 16); }
inline void dots16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  struct Six { unsigned x[6]; };
  Exchange e(Six{{a0, a1, a2, a3, b0, b1}});
  unsigned lane = rt->lane->index % 32, g = lane / 4, t = lane % 4;
  float a[2][16], b[2][16];
  for (unsigned p = 0; p < 8; p++)
    for (unsigned h = 0; h < 2; h++) {
      const unsigned* x = e.words[g * 4 + p % 4];
      const unsigned* y = e.words[(2 * t + h) * 4 + p % 4];
      for (int i = 0; i < 2; i++) {
        a[h][2 * p + i] = of_bf16(x[p / 4 * 2 + h], i);
        b[h][2 * p + i] = of_bf16(y[4 + p / 4], i);
      }
    }
  for (int i = 0; i < 4; i++) {
    float s = d[i];
    for (int k = 0; k < 16; k++) s = __builtin_fmaf(a[i / 2][k], b[i % 2][k], s);
    d[i] = s;
  }
}
// Of tensor_wide.cu; done at once. Where a row of b lies is as its words say: eight rows in so many bytes,
// pieces of sixteen swapped by the bits of their address.
inline void wide_begin() {}
inline void wide_end() {}
inline void wide_wait() {}
inline void wide_show() {}
inline void wide_sum(float&) {}
template <int N> inline void wide_dots(float (&d)[N], const unsigned (&a)[4], unsigned long long b, unsigned adds) {
  struct Four { unsigned x[4]; };
  Exchange e(Four{{a[0], a[1], a[2], a[3]}});
  unsigned lane = rt->lane->index % 32, g = lane / 4, t = lane % 4;
  unsigned from = (unsigned)(size_t)rt->shared & ~0x3ffffu | (unsigned)(b & 0x3fff) << 4, eight = (unsigned)(b >> 32 & 0x3fff) << 4;
  if (b >> 62 != 1) __builtin_trap();
  float own[2][16];
  for (unsigned p = 0; p < 8; p++)
    for (unsigned i = 0; i < 4; i++) own[i / 2][2 * p + i % 2] = of_bf16(e.words[g * 4 + p % 4][p / 4 * 2 + i / 2], i % 2);
  for (unsigned i = 0; i < N; i++) {
    unsigned row = i / 4 * 8 + 2 * t + i % 2;
    float s = adds ? d[i] : 0.0f;
    for (unsigned k = 0; k < 16; k++) {
      unsigned at = from + row / 8 * eight + row % 8 * 128 + k * 2;
      at ^= (at >> 7 & 7) << 4;
      s = __builtin_fmaf(own[i / 2 % 2][k], __uint_as_float((unsigned)*(const unsigned short*)(size_t)at << 16), s);
    }
    d[i] = s;
  }
}
inline int bytes_dot(unsigned a, unsigned b, int sum) {
  for (int i = 0; i < 4; i++) sum += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
  return sum;
}
template <class = void> inline void byte_dots(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int from) {
  struct Six { unsigned x[6]; };
  Exchange e(Six{{a[0], a[1], a[2], a[3], b0, b1}});
  unsigned lane = rt->lane->index % 32, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; i++) {
    d[i] = from;
    for (unsigned p = 0; p < 8; p++)
      d[i] = bytes_dot(e.words[g * 4 + p % 4][p / 4 * 2 + i / 2], e.words[(2 * t + i % 2) * 4 + p % 4][4 + p / 4], d[i]);
  }
}
#define dots(d, a, b0, b1) byte_dots(d, a, b0, b1, FROM)
inline int dp4a(unsigned w, unsigned x, int sum) {
  for (int i = 0; i < 4; i++) sum = (int)((unsigned)sum + (unsigned)((int)(w >> 8 * i & 255) * (int)(signed char)(x >> 8 * i)));
  return sum;
}
inline unsigned to_bf16(float x) {
  unsigned b = __float_as_uint(x);
  return x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline unsigned rounded(float a, float b) { return to_bf16(a) | to_bf16(b) << 16; }
inline float exp2_(float x) { return x < -126.0f ? 0.0f : __builtin_exp2f(x); }

// Calls a kernel with arguments that lie where the pointers say.
template <class T> struct Plain { using Type = T; };
template <class T> struct Plain<const T&> { using Type = T; };
template <class... A> inline void call(void (*kernel)(A...), void** args) {
  int i = sizeof...(A);
  // Braces are evaluated in order, a call's arguments need not be.
  struct Next { void** p; int at = 0; void* operator()() { return p[at++]; } } next{args};
  (void)i;
  struct All { void (*k)(A...); void operator()(A... a) { k(a...); } };
  struct { All all; } box{{kernel}};
  struct Run { Run(All& f, typename Plain<A>::Type... a) { f(a...); } };
  Run{box.all, *(typename Plain<A>::Type*)next()...};
}
// The arguments once more, for a recorded call; they stay as long as the process.
template <class... A> inline void** keep(void (*)(A...), void** args) {
  void** kept = new void*[sizeof...(A) + 1];
  unsigned i = 0;
  ((kept[i] = new typename Plain<A>::Type(*(typename Plain<A>::Type*)args[i]), i++), ...);
  return kept;
}
struct Entry { const char* name; void (*call)(void**); void** (*keep)(void**); };
