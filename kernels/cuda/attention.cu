// Causal attention over paged keys and values: leaves of 256 absolute positions, then their tree.
// CPU truth: kernels/src/ops/attention.rs (the rule is written there); pages: kernels/src/ops/arena.rs.
// Compiled once per format of the cache: KV is 0 for f32, 1 for bf16, 2 for int8.
//
// A block of `attention_leaf` has one row, one key/value head and one leaf: a thread per key for
// the scores, then a thread per column for the values, positions upwards.

constexpr int KEY_BYTES = KV == 0 ? 4 : KV == 1 ? 2 : 1;

struct Cache {
  const char* pages;   // all pages, one after the other
  u64 page_bytes;
  u64 layer_at;        // where the layer's heads begin in a page
  u32 head_bytes;
  u32 kv_heads, head_dim, cols;  // cols: of a kept value row
};

// Bytes that are read once.
DI i32 stream8(const char* p) {
  i32 v;
  asm("ld.global.L1::no_allocate.s8 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// acc += x[i] · row i of a column, i from..to upwards; rows are `step` elements apart, and bf16
// lies in words of two rows. Many loads are on their way before the first is used.
DI float column(float acc, const float* x, const char* at, u32 step, int from, int to) {
  constexpr int N = 16;
  int i = from;
  if (KV == 1) {
    const u32* p = (const u32*)at;
    if (i < to && i % 2) { acc = fma(x[i], high(p[i / 2 * step]), acc); i++; }
    for (; i + 2 * N <= to; i += 2 * N) {
      u32 v[N];
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = stream(p + (i / 2 + j) * step);
#pragma unroll
      for (int j = 0; j < N; j++) {
        acc = fma(x[i + 2 * j], low(v[j]), acc);
        acc = fma(x[i + 2 * j + 1], high(v[j]), acc);
      }
    }
#pragma unroll 1
    for (; i + 2 <= to; i += 2) {
      u32 w = p[i / 2 * step];
      acc = fma(x[i], low(w), acc);
      acc = fma(x[i + 1], high(w), acc);
    }
    if (i < to) acc = fma(x[i], low(p[i / 2 * step]), acc);
    return acc;
  }
  for (; i + N <= to; i += N) {
    i32 v[N];
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = KV == 0 ? (i32)stream(at + (u64)((i + j) * step) * 4) : stream8(at + (i + j) * step);
#pragma unroll
    for (int j = 0; j < N; j++) acc = fma(x[i + j], KV == 0 ? __int_as_float(v[j]) : (float)v[j], acc);
  }
#pragma unroll 1
  for (; i < to; i++) acc = fma(x[i], KV == 0 ? ((const float*)at)[i * step] : (float)((const i8*)at)[i * step], acc);
  return acc;
}

// q: [rows][heads][head_dim]; tables: pages of each row's sequence, `table_stride` apart; positions
// [rows]. Leaf sums go to parts: [rows][heads][leaves_max] of m and s, and of head_dim values.
// A row with one visible leaf is written to `out` at once.
ENTRY __launch_bounds__(256) attention_leaf(const float* q, Cache cache, const u32* tables, u32 table_stride, const u32* positions,
                          u32 heads, float scale, u32 window, u32 leaves_max, float2* part_ms, float* part_a, float* out) {
  begin();
  u32 leaf = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z;
  u32 p = positions[row], first = window && p + 1 > window ? p + 1 - window : 0;
  u32 from = max(first, leaf * LEAF), to = min(p + 1, (leaf + 1) * LEAF);
  if (leaf > p / LEAF || leaf < first / LEAF) return;
  extern __shared__ float4 memory[];
  u32 hd = cache.head_dim, group = heads / cache.kv_heads, tid = threadIdx.x;
  float* qs = (float*)memory;               // [group][hd]
  float* weights = qs + group * hd;         // [group][LEAF]
  float* reduce = weights + group * LEAF;   // [group][8], then m and s of each head
  float* ms = reduce + group * 8;
  __shared__ u64 heads_at[4];
  if (tid < 4) {
    u32 page = leaf * 4 + tid;
    heads_at[tid] = page <= p / PAGE && page >= first / PAGE
        ? (u64)cache.pages + tables[(u64)row * table_stride + page] * cache.page_bytes + cache.layer_at + (u64)kv_head * cache.head_bytes : 0;
  }
  __syncthreads();
  // Where few blocks are on their way, all of the leaf is asked for at once; where there are many,
  // that only costs (measured on an H100: 14 against 20 us for one row, 119 against 102 for 64).
  for (u32 at = tid * 128; gridDim.z <= 4 && at < 4 * cache.head_bytes; at += 256 * 128) {
    u32 page = at / cache.head_bytes;
    if (heads_at[page]) ask((const char*)heads_at[page] + at % cache.head_bytes);
  }
  const float* q_row = q + ((u64)row * heads + kv_head * group) * hd;
  for (u32 i = tid; i < group * hd; i += 256) qs[i] = q_row[i];
  __syncthreads();
  u32 position = leaf * LEAF + tid, offset = tid % PAGE;
  bool seen = position >= from && position < to;
  const char* keys = (const char*)heads_at[tid / PAGE];
  u32 scales_at = cache.head_bytes - 2 * PAGE * 4;
  for (u32 g = 0; g < group; g++) {
    float score = -__int_as_float(0x7f800000);
    if (seen) {
      float s[4];
#pragma unroll
      for (int l = 0; l < 4; l++)
        s[l] = l == 0 || l * LEAF < hd ? column(0.0f, qs + g * hd, keys + offset * (KV == 0 ? 4 : KV == 1 ? 4 : 1), PAGE, l * LEAF, min((int)hd, (l + 1) * LEAF)) : 0.0f;
      score = s[0];
      if (hd > LEAF) score = add(score, s[1]);
      if (hd > 2 * LEAF) score = add(score, hd > 3 * LEAF ? add(s[2], s[3]) : s[2]);
      if (KV == 2) score = mul(score, *(const float*)(keys + scales_at + offset * 4));
      score = mul(score, scale);
    }
    weights[g * LEAF + tid] = score;
    float m = score;
    // A NaN compares false and is left out.
    m = m == m ? m : -__int_as_float(0x7f800000);
    for (int d = 16; d; d /= 2) { float o = __shfl_xor_sync(FULL, m, d); m = o > m ? o : m; }
    if (lane_id() == 0) reduce[g * 8 + warp_id()] = m;
  }
  __syncthreads();
  for (u32 g = 0; g < group; g++) {
    float m = reduce[g * 8];
#pragma unroll
    for (int i = 1; i < 8; i++) { float o = reduce[g * 8 + i]; m = o > m ? o : m; }
    float w = seen ? exp_(add(weights[g * LEAF + tid], -m)) : 0.0f;
    weights[g * LEAF + tid] = w;
    if (tid == 0) ms[2 * g] = m;
  }
  __syncthreads();
  // A warp per head adds its weights: eight virtual lanes, in lanes of the warp.
  for (u32 g = warp_id(); g < group; g += 8) {
    float l = 0.0f;
    if (lane_id() < 8)
      for (u32 i = lane_id(); i < LEAF; i += 8)
        if (leaf * LEAF + i >= from && leaf * LEAF + i < to) l = add(l, weights[g * LEAF + i]);
    l = lanes8(l);
    if (lane_id() == 0) ms[2 * g + 1] = l;
  }
  if (KV == 2) {
    __syncthreads();
    float s = seen ? *(const float*)(keys + scales_at + (PAGE + offset) * 4) : 0.0f;
    for (u32 g = 0; g < group; g++) weights[g * LEAF + tid] = mul(weights[g * LEAF + tid], s);
  }
  __syncthreads();
  bool alone = first / LEAF == p / LEAF;
  u32 values_at = (hd + hd % 2) * PAGE * KEY_BYTES;
  for (u32 i = tid; i < group * hd; i += 256) {
    u32 g = i / hd, c = i % hd;
    const float* w = weights + g * LEAF;
    float a = 0.0f;
    for (int page = 0; page < 4; page++) {
      u32 base = leaf * LEAF + page * PAGE;
      int lo = from > base ? from - base : 0, hi = to > base ? min(to - base, (u32)PAGE) : 0;
      if (lo >= hi) continue;
      const char* values = (const char*)heads_at[page] + values_at;
      a = column(a, w + page * PAGE, values + c * (KV == 2 ? 1 : 4), cache.cols, lo, hi);
    }
    u64 head = (u64)row * heads + kv_head * group + g;
    if (alone) {
      out[head * hd + c] = __fdiv_rn(a, ms[2 * g + 1]);
    } else {
      u64 part = head * leaves_max + leaf;
      part_a[part * hd + c] = a;
      if (c == 0) part_ms[part] = make_float2(ms[2 * g], ms[2 * g + 1]);
    }
  }
}

// The tree over the leaves of a row and head: a thread per column.
ENTRY attention_tree(const u32* positions, u32 heads, u32 hd, u32 window, u32 leaves_max, const float2* part_ms, const float* part_a, float* out) {
  begin();
  u32 head = blockIdx.x, row = blockIdx.y;
  u32 p = positions[row], first = window && p + 1 > window ? p + 1 - window : 0;
  u32 left = first / LEAF, count = p / LEAF + 1;
  if (left + 1 == count) return;
  u64 at = ((u64)row * heads + head) * leaves_max;
  for (u32 c = threadIdx.x; c < hd; c += blockDim.x) {
    float m[24], s[24], a[24], cm = 0, cs = 0, ca = 0;
    for (u32 i = left; i < count; i++) {
      float2 part = part_ms[at + i];
      cm = part.x; cs = part.y; ca = part_a[(at + i) * hd + c];
      u32 rest = i;
      for (int n = merges(i, count); n > 0; n--) {
        int level = __ffs(rest) - 1;
        bool some = rest > left;
        rest &= rest - 1;
        // A side of which nothing is seen is left out.
        if (!some) continue;
        float top = cm > m[level] ? cm : m[level];
        float e = exp_(add(m[level], -top)), f = exp_(add(cm, -top));
        cs = add(mul(s[level], e), mul(cs, f));
        ca = add(mul(a[level], e), mul(ca, f));
        cm = top;
      }
      int level = __ffs(~i) - 1;
      m[level] = cm; s[level] = cs; a[level] = ca;
    }
    out[((u64)row * heads + head) * hd + c] = __fdiv_rn(ca, cs);
  }
}

// Writes keys and values into their slots (page, offset): a warp per row, head and side.
ENTRY kv_append(const float* k, const float* v, Cache cache, const uint2* slots, u32 rows) {
  begin();
  u32 task = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = lane_id();
  u32 side = task % 2, head = task / 2 % cache.kv_heads, row = task / 2 / cache.kv_heads;
  if (row >= rows) return;
  u32 hd = cache.head_dim, offset = slots[row].y;
  const float* x = (side ? v : k) + ((u64)row * cache.kv_heads + head) * hd;
  char* at = (char*)cache.pages + slots[row].x * cache.page_bytes + cache.layer_at + (u64)head * cache.head_bytes;
  char* to = at + (side ? (hd + hd % 2) * PAGE * KEY_BYTES : 0);
  float scale = 0.0f;
  if (KV == 2) {
    u32 largest = 0;
    for (u32 d = lane; d < hd; d += 32) largest = max(largest, bits(x[d]) & 0x7fffffffu);
    for (int d = 16; d; d /= 2) largest = max(largest, __shfl_xor_sync(FULL, largest, d));
    scale = largest >= 0x7f800000u ? bits(NAN_BITS) : __fdiv_rn(bits(largest), 127.0f);
    if (lane == 0) *(float*)(at + cache.head_bytes - 2 * PAGE * 4 + (side * PAGE + offset) * 4) = scale;
  }
  for (u32 d = lane; d < hd; d += 32) {
    float y = x[d];
    bool finite = (bits(y) & 0x7f800000u) != 0x7f800000u;
    if (KV == 0) {
      if (side) ((float*)to)[offset * cache.cols + d] = y;
      else ((float*)to)[d * PAGE + offset] = finite ? y : bits(NAN_BITS);
    } else if (KV == 1) {
      u16 b = bf16_bits(y);
      if (side) ((u16*)to)[offset / 2 * 2 * cache.cols + 2 * d + offset % 2] = b;
      else ((u16*)to)[d / 2 * 2 * PAGE + 2 * offset + d % 2] = (b & 0x7f80) == 0x7f80 ? 0x7fc0 : b;
    } else {
      float n = rintf(__fdiv_rn(y, scale));
      n = n < -127.0f ? -127.0f : n > 127.0f ? 127.0f : n;
      i8 b = scale > 0.0f ? (i8)n : 0;
      if (side) ((i8*)to)[offset * cache.cols + d] = b;
      else ((i8*)to)[d * PAGE + offset] = b;
    }
  }
}
