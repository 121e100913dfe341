// Causal attention over paged keys and values: leaves of 256 absolute positions, then their tree.
// CPU truth: kernels/src/ops/attention.rs (the rule is written there); pages: kernels/src/ops/arena.rs.
// Compiled once per format of the cache: KV is 0 for f32, 1 for bf16, 2 for int8.
//
// A block of `attention_leaf` has one row, one key/value head and one leaf: a thread per key for
// the scores, then a thread per column for the values, positions upwards.

constexpr int KEY_BYTES = KV == 0 ? 4 : KV == 1 ? 2 : 1;

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

// The same for G heads, whose x are `apart` elements from each other: what is read counts for all of
// them. x and `apart` are multiples of four floats.
template <int G> DI void columns(float (&acc)[G], const float* x, u32 apart, const char* at, u32 step, int from, int to) {
  if (G == 1) { acc[0] = column(acc[0], x, at, step, from, to); return; }
  constexpr int N = KV == 1 ? 32 : 16, WORDS = KV == 1 ? N / 2 : N;
  auto row = [&](int i) {
    if (KV == 1) { u32 w = ((const u32*)at)[i / 2 * step]; return i % 2 ? high(w) : low(w); }
    return KV == 0 ? ((const float*)at)[i * step] : (float)((const i8*)at)[i * step];
  };
  auto one = [&](int i) {
    float y = row(i);
#pragma unroll
    for (int g = 0; g < G; g++) acc[g] = fma(x[g * apart + i], y, acc[g]);
  };
  int i = from;
  for (; i < to && i % 4; i++) one(i);
  for (; i + N <= to; i += N) {
    u32 v[WORDS];
#pragma unroll
    for (int j = 0; j < WORDS; j++)
      v[j] = KV == 1 ? stream((const u32*)at + (i / 2 + j) * step) : KV == 0 ? (u32)stream(at + (u64)((i + j) * step) * 4) : (u32)stream8(at + (i + j) * step);
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      float y[4];
#pragma unroll
      for (int l = 0; l < 4; l++) y[l] = KV == 1 ? (l % 2 ? high(v[(j + l) / 2]) : low(v[(j + l) / 2])) : KV == 0 ? __int_as_float((i32)v[(j + l) % WORDS]) : (float)(i32)v[(j + l) % WORDS];
#pragma unroll
      for (int g = 0; g < G; g++) {
        float4 z = *(const float4*)(x + g * apart + i + j);
        acc[g] = fma(z.x, y[0], acc[g]);
        acc[g] = fma(z.y, y[1], acc[g]);
        acc[g] = fma(z.z, y[2], acc[g]);
        acc[g] = fma(z.w, y[3], acc[g]);
      }
    }
  }
#pragma unroll 1
  for (; i < to; i++) one(i);
}

// The maximum of 32 scores that are numbers, to `reduce` of this warp: a NaN compares false and is left out.
DI void warp_max(float score, float* reduce) {
  float m = score == score ? score : -__int_as_float(0x7f800000);
  for (int d = 16; d; d /= 2) { float o = __shfl_xor_sync(FULL, m, d); m = o > m ? o : m; }
  if (lane_id() == 0) reduce[warp_id()] = m;
}

// Scores of a thread's key, G heads at a time.
template <int G> DI void leaf_scores(const float* qs, u32 group, u32 hd, const char* keys, u32 offset, bool seen, float scale, u32 head_bytes, float* weights, float* reduce) {
  for (u32 g = 0; g < group; g += G) {
    float score[G];
#pragma unroll
    for (int j = 0; j < G; j++) score[j] = -__int_as_float(0x7f800000);
    if (seen) {
      float s[4][G] = {};
#pragma unroll
      for (int l = 0; l < 4; l++)
        if (l == 0 || l * LEAF < hd) columns<G>(s[l], qs + g * hd, hd, keys + offset * (KV == 2 ? 1 : 4), PAGE, l * LEAF, min((int)hd, (l + 1) * LEAF));
      float own = KV == 2 ? *(const float*)(keys + head_bytes - 2 * PAGE * 4 + offset * 4) : 0.0f;
#pragma unroll
      for (int j = 0; j < G; j++) {
        float sum = s[0][j];
        if (hd > LEAF) sum = add(sum, s[1][j]);
        if (hd > 2 * LEAF) sum = add(sum, hd > 3 * LEAF ? add(s[2][j], s[3][j]) : s[2][j]);
        if (KV == 2) sum = mul(sum, own);
        score[j] = mul(sum, scale);
      }
    }
#pragma unroll
    for (int j = 0; j < G; j++) {
      weights[(g + j) * LEAF + threadIdx.x] = score[j];
      warp_max(score[j], reduce + (g + j) * 8);
    }
  }
}

// Values times weights, positions upwards: a thread per column and G heads.
template <int G, class Write> DI void leaf_values(const float* weights, u32 group, u32 hd, const u64* heads_at, u32 values_at, u32 cols, u32 base, u32 from, u32 to, Write write) {
  for (u32 i = threadIdx.x; i < group / G * hd; i += 256) {
    u32 g = i / hd * G, c = i % hd;
    float a[G] = {};
    for (u32 page = 0; page < 4; page++) {
      u32 at = base + page * PAGE;
      int lo = from > at ? from - at : 0, hi = to > at ? min(to - at, (u32)PAGE) : 0;
      if (lo < hi) columns<G>(a, weights + g * LEAF + page * PAGE, LEAF, (const char*)heads_at[page] + values_at + c * (KV == 2 ? 1 : 4), cols, lo, hi);
    }
#pragma unroll
    for (int j = 0; j < G; j++) write(g + j, c, a[j]);
  }
}

// q: [rows][heads][head_dim]; tables: pages of each row's sequence, `table_stride` apart; positions
// [rows]. Leaf sums go to parts: [rows][heads][leaves_max] of m and s, and of head_dim values.
// A row with one visible leaf is written to `out` at once.
ENTRY __launch_bounds__(256, 4) attention_leaf(const float* q, Cache cache, const u32* tables, u32 table_stride, const u32* positions,
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
  if (group % 4 || hd % 4) leaf_scores<1>(qs, group, hd, keys, offset, seen, scale, cache.head_bytes, weights, reduce);
  else leaf_scores<4>(qs, group, hd, keys, offset, seen, scale, cache.head_bytes, weights, reduce);
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
  u64 head_0 = (u64)row * heads + kv_head * group;
  auto write = [&](u32 g, u32 c, float a) {
    u64 head = head_0 + g;
    if (alone) {
      out[head * hd + c] = __fdiv_rn(a, ms[2 * g + 1]);
    } else {
      u64 part = head * leaves_max + leaf;
      part_a[part * hd + c] = a;
      if (c == 0) part_ms[part] = make_float2(ms[2 * g], ms[2 * g + 1]);
    }
  };
  if (group % 4 || hd % 4) leaf_values<1>(weights, group, hd, heads_at, values_at, cache.cols, leaf * LEAF, from, to, write);
  else leaf_values<4>(weights, group, hd, heads_at, values_at, cache.cols, leaf * LEAF, from, to, write);
}

// The tree over leaves `left`..`count` of one column, divided by the sum of weights.
DI float tree_column(u32 left, u32 count, const float2* part_ms, const float* part_a, u32 hd) {
  float m[24], s[24], a[24], cm = 0, cs = 0, ca = 0;
  for (u32 i = left; i < count; i++) {
    float2 part = __ldcg(part_ms + i);
    cm = part.x; cs = part.y; ca = __ldcg(part_a + (u64)i * hd);
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
  return __fdiv_rn(ca, cs);
}

// The tree over the leaves of a row and head: a thread per column.
ENTRY attention_tree(const u32* positions, u32 heads, u32 hd, u32 window, u32 leaves_max, const float2* part_ms, const float* part_a, float* out) {
  begin();
  u32 head = blockIdx.x, row = blockIdx.y;
  u32 p = positions[row], first = window && p + 1 > window ? p + 1 - window : 0;
  u32 left = first / LEAF, count = p / LEAF + 1;
  if (left + 1 == count) return;
  u64 at = ((u64)row * heads + head) * leaves_max;
  for (u32 c = threadIdx.x; c < hd; c += blockDim.x) out[((u64)row * heads + head) * hd + c] = tree_column(left, count, part_ms + at, part_a + at * hd + c, hd);
}

// Keeps one head's key (side 0) or value (1) at an offset of a page; `at` is the head in the page.
// By one warp.
DI void keep(const float* x, char* at, u32 side, u32 offset, const Cache& cache) {
  u32 lane = lane_id(), hd = cache.head_dim;
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

// Writes keys and values into their slots (page, offset): a warp per row, head and side.
ENTRY kv_append(const float* k, const float* v, Cache cache, const uint2* slots, u32 rows) {
  begin();
  u32 task = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  u32 side = task % 2, head = task / 2 % cache.kv_heads, row = task / 2 / cache.kv_heads;
  if (row >= rows) return;
  const float* x = (side ? v : k) + ((u64)row * cache.kv_heads + head) * cache.head_dim;
  char* at = (char*)cache.pages + slots[row].x * cache.page_bytes + cache.layer_at + (u64)head * cache.head_bytes;
  keep(x, at, side, slots[row].y, cache);
}

// Queries, keys and values as they come from their products; norms over whole rows (norm_width is
// that of q's row), over heads (head_dim) or none (0), then rotary; table row: cosines, then sines.
struct Heads {
  const float* q;
  const float* k;
  const float* v;
  const float* q_norm;
  const float* k_norm;
  const float* rotary;
  u32 heads, norm_width;
  float eps;
  u32 pad;
};

// Rule 3's sums of squares of some runs at once, eight threads a leaf: run(i) says where leaf i of all
// begins and how long it is.
struct Leaf { const float* at; u32 len; };
template <class Run> DI void squares(u32 count, Run run, float* sums) {
  for (u32 i = threadIdx.x / 8; i < (count + 3) / 4 * 4; i += blockDim.x / 8) {
    Leaf leaf = run(min(i, count - 1));
    u32 lane = threadIdx.x % 8;
    float l = 0.0f;
    if (leaf.len == LEAF) {
      float v[32];
#pragma unroll
      for (int j = 0; j < 32; j++) v[j] = leaf.at[j * 8 + lane];
#pragma unroll
      for (int j = 0; j < 32; j++) l = fma(v[j], v[j], l);
    } else {
      for (u32 j = lane; j < leaf.len; j += 8) { float v = leaf.at[j]; l = fma(v, v, l); }
    }
    l = lanes8(l);
    if (lane == 0 && i < count) sums[i] = l;
  }
}
// Leaf i of runs of `width` values that follow each other.
DI Leaf leaf_of(const float* rows, u32 width, u32 leaves, u32 i) {
  u32 from = i % leaves * LEAF;
  return {rows + (u64)(i / leaves) * width + from, min(width - from, (u32)LEAF)};
}
DI float inverse_root(float sum, u32 width, float eps) { return __fdiv_rn(1.0f, __fsqrt_rn(add(__fdiv_rn(sum, (float)width), eps))); }

// One head, normed and turned, by all threads from `from` of `step`.
DI void turned(const float* x, const float* weight, float scale, const float* table, u32 hd, float* to, u32 from, u32 step) {
  u32 half = hd / 2;
  for (u32 d = from; d < half; d += step) {
    float p = x[d], q = x[d + half];
    if (weight) { p = mul(mul(p, scale), weight[d]); q = mul(mul(q, scale), weight[d + half]); }
    if (table) {
      float c = table[d], s = table[half + d];
      to[d] = fma(p, c, -mul(q, s));
      to[d + half] = fma(q, c, mul(p, s));
    } else {
      to[d] = p;
      to[d + half] = q;
    }
  }
}

// Norms, turns and keeps all heads of a row; q in place. A block per row; shared: k's row and sums.
ENTRY __launch_bounds__(512) heads_keep(Heads in, float* q, Cache cache, const uint2* slots) {
  begin();
  extern __shared__ float4 memory[];
  u32 row = blockIdx.x, hd = cache.head_dim, kvh = cache.kv_heads;
  bool whole = in.norm_width > hd;
  u32 q_width = whole ? in.heads * hd : hd, k_width = whole ? kvh * hd : hd;
  u32 q_leaves = (q_width + LEAF - 1) / LEAF, k_leaves = (k_width + LEAF - 1) / LEAF;
  u32 q_tasks = whole ? 1 : in.heads, k_tasks = whole ? 1 : kvh;
  float* ks = (float*)memory;
  float* q_sums = ks + kvh * hd;
  float* k_sums = q_sums + q_tasks * q_leaves;
  float* q_row = q + (u64)row * in.heads * hd;
  const float* k_row = in.k + (u64)row * kvh * hd;
  if (in.norm_width) {
    u32 qs = q_tasks * q_leaves;
    squares(qs + k_tasks * k_leaves, [&](u32 i) { return i < qs ? leaf_of(q_row, q_width, q_leaves, i) : leaf_of(k_row, k_width, k_leaves, i - qs); }, q_sums);
    __syncthreads();
    for (u32 t = threadIdx.x; t < q_tasks + k_tasks; t += blockDim.x) {
      bool is_q = t < q_tasks;
      float* sums = is_q ? q_sums + t * q_leaves : k_sums + (t - q_tasks) * k_leaves;
      sums[0] = inverse_root(tree_in_place(sums, is_q ? q_leaves : k_leaves), is_q ? q_width : k_width, in.eps);
    }
    __syncthreads();
  }
  const float* table = in.rotary ? in.rotary + (u64)row * hd : nullptr;
  u32 warps = blockDim.x / 32;
  for (u32 h = warp_id(); h < in.heads + kvh; h += warps) {
    bool is_q = h < in.heads;
    u32 head = is_q ? h : h - in.heads;
    const float* norm = is_q ? in.q_norm : in.k_norm;
    const float* sums = is_q ? q_sums : k_sums;
    float scale = in.norm_width ? sums[whole ? 0 : head * (is_q ? q_leaves : k_leaves)] : 0.0f;
    turned((is_q ? q_row : k_row) + head * hd, in.norm_width ? norm + (whole ? head * hd : 0) : nullptr, scale, table, hd,
           (is_q ? q_row : ks) + head * hd, lane_id(), 32);
  }
  __syncthreads();
  char* page = (char*)cache.pages + slots[row].x * cache.page_bytes + cache.layer_at;
  for (u32 i = warp_id(); i < 2 * kvh; i += warps)
    keep(i % 2 ? in.v + ((u64)row * kvh + i / 2) * hd : ks + i / 2 * hd, page + (u64)(i / 2) * cache.head_bytes, i % 2, slots[row].y, cache);
}

// All of N rows of a column in shared memory, at once.
template <int N> DI float whole_column(float acc, const float* x, const char* at, u32 step) {
  if (KV == 1) {
    const u32* p = (const u32*)at;
    u32 v[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) v[i] = p[i * step];
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float4 y = *(const float4*)(x + i);
      acc = fma(y.x, low(v[i / 2]), acc);
      acc = fma(y.y, high(v[i / 2]), acc);
      acc = fma(y.z, low(v[i / 2 + 1]), acc);
      acc = fma(y.w, high(v[i / 2 + 1]), acc);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float4 y = *(const float4*)(x + i);
      const float z[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int j = 0; j < 4; j++) acc = fma(z[j], KV == 0 ? ((const float*)at)[(i + j) * step] : (float)((const i8*)at)[(i + j) * step], acc);
    }
  }
  return acc;
}

// acc += x[i] · row i of a column in shared memory, as `column`.
DI float near_column(float acc, const float* x, const char* at, u32 step, int from, int to) {
  int i = from;
  if (KV == 1) {
    const u32* p = (const u32*)at;
    if (i < to && i % 2) { acc = fma(x[i], high(p[i / 2 * step]), acc); i++; }
    if (i < to && i % 4 && i + 2 <= to) {
      u32 w = p[i / 2 * step];
      acc = fma(x[i], low(w), acc);
      acc = fma(x[i + 1], high(w), acc);
      i += 2;
    }
#pragma unroll 4
    for (; i + 4 <= to; i += 4) {
      u32 v = p[i / 2 * step], w = p[(i / 2 + 1) * step];
      float4 y = *(const float4*)(x + i);
      acc = fma(y.x, low(v), acc);
      acc = fma(y.y, high(v), acc);
      acc = fma(y.z, low(w), acc);
      acc = fma(y.w, high(w), acc);
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
#pragma unroll 8
  for (; i < to; i++) acc = fma(x[i], KV == 0 ? ((const float*)at)[i * step] : (float)((const i8*)at)[i * step], acc);
  return acc;
}

// Both for G heads, as `columns`.
template <int G, int N> DI void whole_columns(float (&acc)[G], const float* x, u32 apart, const char* at, u32 step) {
  if (G == 1) { acc[0] = whole_column<N>(acc[0], x, at, step); return; }
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    float y[4];
    if (KV == 1) {
      u32 v = ((const u32*)at)[i / 2 * step], w = ((const u32*)at)[(i / 2 + 1) * step];
      y[0] = low(v); y[1] = high(v); y[2] = low(w); y[3] = high(w);
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) y[j] = KV == 0 ? ((const float*)at)[(i + j) * step] : (float)((const i8*)at)[(i + j) * step];
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
      float4 z = *(const float4*)(x + g * apart + i);
      acc[g] = fma(z.x, y[0], acc[g]);
      acc[g] = fma(z.y, y[1], acc[g]);
      acc[g] = fma(z.z, y[2], acc[g]);
      acc[g] = fma(z.w, y[3], acc[g]);
    }
  }
}
template <int G> DI void near_columns(float (&acc)[G], const float* x, u32 apart, const char* at, u32 step, int from, int to) {
  if (G == 1) { acc[0] = near_column(acc[0], x, at, step, from, to); return; }
#pragma unroll 4
  for (int i = from; i < to; i++) {
    float y;
    if (KV == 1) { u32 w = ((const u32*)at)[i / 2 * step]; y = i % 2 ? high(w) : low(w); }
    else y = KV == 0 ? ((const float*)at)[i * step] : (float)((const i8*)at)[i * step];
#pragma unroll
    for (int g = 0; g < G; g++) acc[g] = fma(x[g * apart + i], y, acc[g]);
  }
}

// As `leaf_scores` and `leaf_values`, of pages in shared memory.
template <int G> DI void step_scores(const float* qs, u32 group, u32 hd, const char* keys, u32 offset, bool seen, float scale, u32 head_bytes, float* weights, float* reduce) {
  for (u32 g = 0; g < group; g += G) {
    float score[G];
#pragma unroll
    for (int j = 0; j < G; j++) score[j] = seen ? 0.0f : -__int_as_float(0x7f800000);
    if (seen) {
      const char* key = keys + offset * (KV == 2 ? 1 : 4);
      u32 d = 0;
      for (; d + 64 <= hd; d += 64) whole_columns<G, 64>(score, qs + g * hd + d, hd, key + d * PAGE * KEY_BYTES, PAGE);
      if (d < hd) near_columns<G>(score, qs + g * hd + d, hd, key + d * PAGE * KEY_BYTES, PAGE, 0, hd - d);
      float own = KV == 2 ? *(const float*)(keys + head_bytes - 2 * PAGE * 4 + offset * 4) : 0.0f;
#pragma unroll
      for (int j = 0; j < G; j++) score[j] = mul(KV == 2 ? mul(score[j], own) : score[j], scale);
    }
#pragma unroll
    for (int j = 0; j < G; j++) {
      weights[(g + j) * LEAF + threadIdx.x] = score[j];
      warp_max(score[j], reduce + (g + j) * 8);
    }
  }
}
template <int G, class Write> DI void step_values(const float* values, u32 group, u32 hd, const char* pages, u32 head_bytes, u32 values_at, u32 cols, u32 base, u32 from, u32 to, Write write) {
  for (u32 i = threadIdx.x; i < group / G * hd; i += 256) {
    u32 g = i / hd * G, c = i % hd;
    float a[G] = {};
    for (u32 page = 0; page < 4; page++) {
      u32 at = base + page * PAGE;
      int lo = from > at ? from - at : 0, hi = to > at ? min(to - at, (u32)PAGE) : 0;
      const float* x = values + g * LEAF + page * PAGE;
      const char* own = pages + page * head_bytes + values_at + c * (KV == 2 ? 1 : 4);
      if (lo == 0 && hi == PAGE) whole_columns<G, PAGE>(a, x, LEAF, own, cols);
      else if (lo < hi) near_columns<G>(a, x, LEAF, own, cols, lo, hi);
    }
#pragma unroll
    for (int j = 0; j < G; j++) write(g + j, c, a[j]);
  }
}

// One new position of each row's own sequence, from products to attended values: norms, rotary, the
// new key and value, leaves, and their tree by the last leaf's block. The leaf's pages, of which
// only the new position is written in this pass, are copied to shared memory beforehand.
// Grid and parts as attention_leaf, but that `splits` blocks, `group` heads each, share a key/value head;
// the first of them writes the new key and value. A counter per row and y. Heads of at most LEAF.
ENTRY __launch_bounds__(256) attention_step(Heads in, Cache cache, const u32* tables, u32 table_stride, const u32* positions,
                          float scale, u32 window, u32 leaves_max, u32 splits, u32 group, float2* part_ms, float* part_a, u32* counters, float* out) {
  u32 leaf = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z, split = 0;
  if (splits > 1) {
    split = kv_head % splits;
    kv_head /= splits;
  }
  u32 p = positions[row], first = window && p + 1 > window ? p + 1 - window : 0;
  u32 from = max(first, leaf * LEAF), to = min(p + 1, (leaf + 1) * LEAF);
  if (leaf > p / LEAF || leaf < first / LEAF) return;
  extern __shared__ float4 memory[];
  u32 hd = cache.head_dim, heads = in.heads, first_head = blockIdx.y * group, tid = threadIdx.x;
  bool last = leaf == p / LEAF, whole = in.norm_width > hd;
  char* pages = (char*)memory;                                   // [4][head_bytes]
  float* weights = (float*)(pages + 4 * cache.head_bytes);       // [group][LEAF]
  float* values = KV == 2 ? weights + group * LEAF : weights;    // [group][LEAF], times the values' scales
  float* qs = values + group * LEAF;                             // [group][hd]
  float* ks = qs + group * hd;                                   // [hd]
  float* raw = ks + hd;                                          // [group + 2][hd]: q, k and v as they come
  float* norm = raw + (group + 2) * hd;                          // [group + 1][hd]
  float* rotary = norm + (group + 1) * hd;                       // [hd]
  float* reduce = rotary + hd;                                   // [group][8]
  float* ms = reduce + group * 8;                                // [group] of m and s
  float* sums = ms + group * 2;                                  // of squares
  __shared__ u64 barrier;
  const u32* table = tables + (u64)row * table_stride;
  auto head_at = [&](u32 page) { return (char*)cache.pages + table[page] * cache.page_bytes + cache.layer_at + (u64)kv_head * cache.head_bytes; };
  char* newest = head_at(p / PAGE);
  if (tid == 0) {
    barrier_init(&barrier);
    barriers_made();
    u32 low_page = from / PAGE, high_page = (to - 1) / PAGE;
    barrier_expect(&barrier, (high_page - low_page + 1) * cache.head_bytes);
    for (u32 page = low_page; page <= high_page; page++) bulk_copy(pages + page % 4 * cache.head_bytes, head_at(page), cache.head_bytes, &barrier);
  }
  if (in.norm_width)
    for (u32 i = tid; i < (group + last) * hd; i += 256) {
      u32 h = i / hd, d = i % hd;
      norm[i] = h < group ? in.q_norm[whole ? (first_head + h) * hd + d : d] : in.k_norm[whole ? kv_head * hd + d : d];
    }
  if (in.rotary) for (u32 i = tid; i < hd; i += 256) rotary[i] = in.rotary[(u64)row * hd + i];
  begin_early();
  const float* q_row = in.q + (u64)row * heads * hd;
  const float* k_row = in.k + (u64)row * cache.kv_heads * hd;
  const float* q_own = q_row + first_head * hd;
  const float* k_own = k_row + kv_head * hd;
  const float* v_own = in.v + ((u64)row * cache.kv_heads + kv_head) * hd;
  for (u32 i = tid; i < (group + 2 * last) * hd; i += 256) raw[i] = i < group * hd ? q_own[i] : i < (group + 1) * hd ? k_own[i - group * hd] : v_own[i - (group + 1) * hd];
  u32 q_width = whole ? heads * hd : hd, k_width = whole ? cache.kv_heads * hd : hd, tasks = whole ? 1 : group;
  u32 q_leaves = (q_width + LEAF - 1) / LEAF, k_leaves = (k_width + LEAF - 1) / LEAF;
  float* k_sums = sums + tasks * q_leaves;
  if (in.norm_width) {
    u32 of_q = tasks * q_leaves;
    squares(of_q + (last ? k_leaves : 0), [&](u32 i) { return i < of_q ? leaf_of(whole ? q_row : q_own, q_width, q_leaves, i) : leaf_of(whole ? k_row : k_own, k_width, k_leaves, i - of_q); }, sums);
    __syncthreads();
    if (tid < tasks + last) {
      bool is_q = tid < tasks;
      float* s = is_q ? sums + tid * q_leaves : k_sums;
      u32 count = is_q ? q_leaves : k_leaves;
      s[0] = inverse_root(count <= 8 ? tree8(s, 1, count) : tree_in_place(s, count), is_q ? q_width : k_width, in.eps);
    }
  }
  __syncthreads();
  for (u32 h = warp_id(); h < group + last; h += 8) {
    float inverse = in.norm_width ? (h < group ? sums[whole ? 0 : h * q_leaves] : k_sums[0]) : 0.0f;
    turned(raw + h * hd, in.norm_width ? norm + h * hd : nullptr, inverse, in.rotary ? rotary : nullptr, hd, qs + h * hd, lane_id(), 32);
  }
  barrier_wait(&barrier, 0);
  __syncthreads();
  if (last) {
    if (warp_id() < (split ? 2 : 4)) {
      u32 side = warp_id() % 2;
      keep(side ? raw + (group + 1) * hd : ks, warp_id() < 2 ? pages + p / PAGE % 4 * cache.head_bytes : newest, side, p % PAGE, cache);
    }
    __syncthreads();
  }
  u32 position = leaf * LEAF + tid, offset = tid % PAGE;
  bool seen = position >= from && position < to;
  const char* keys = pages + tid / PAGE * cache.head_bytes;
  u32 scales_at = cache.head_bytes - 2 * PAGE * 4;
  if (group % 4 || hd % 4) step_scores<1>(qs, group, hd, keys, offset, seen, scale, cache.head_bytes, weights, reduce);
  else step_scores<4>(qs, group, hd, keys, offset, seen, scale, cache.head_bytes, weights, reduce);
  __syncthreads();
  for (u32 g = 0; g < group; g++) {
    float m = reduce[g * 8];
#pragma unroll
    for (int i = 1; i < 8; i++) { float o = reduce[g * 8 + i]; m = o > m ? o : m; }
    float w = seen ? exp_(add(weights[g * LEAF + tid], -m)) : 0.0f;
    weights[g * LEAF + tid] = w;
    if (KV == 2) values[g * LEAF + tid] = seen ? mul(w, *(const float*)(keys + scales_at + (PAGE + offset) * 4)) : 0.0f;
    if (tid == 0) ms[2 * g] = m;
  }
  __syncthreads();
  // The sum of weights; what is not seen adds +0.
  for (u32 g = 7 - warp_id(); g < group; g += 8) {
    float l = 0.0f;
    if (lane_id() < 8) {
#pragma unroll
      for (int i = 0; i < LEAF; i += 8) l = add(l, weights[g * LEAF + i + lane_id()]);
    }
    l = lanes8(l);
    if (lane_id() == 0) ms[2 * g + 1] = l;
  }
  u32 left = first / LEAF, count = p / LEAF + 1;
  bool alone = left + 1 == count;
  u32 values_at = (hd + hd % 2) * PAGE * KEY_BYTES;
  u64 head_0 = (u64)row * heads + first_head;
  auto write = [&](u32 g, u32 c, float a) {
    if (alone) qs[g * hd + c] = a;
    else part_a[((head_0 + g) * leaves_max + leaf) * hd + c] = a;
  };
  if (group % 4 || hd % 4) step_values<1>(values, group, hd, pages, cache.head_bytes, values_at, cache.cols, leaf * LEAF, from, to, write);
  else step_values<4>(values, group, hd, pages, cache.head_bytes, values_at, cache.cols, leaf * LEAF, from, to, write);
  __syncthreads();
  if (alone) {
    for (u32 i = tid; i < group * hd; i += 256) out[head_0 * hd + i] = __fdiv_rn(qs[i], ms[2 * (i / hd) + 1]);
  } else if (tid < group) {
    part_ms[(head_0 + tid) * leaves_max + leaf] = make_float2(ms[2 * tid], ms[2 * tid + 1]);
  }
  if (alone || !last_of(counters + row * gridDim.y + blockIdx.y, count - left)) return;
  for (u32 i = tid; i < group * hd; i += 256) {
    u64 head = head_0 + i / hd;
    out[head * hd + i % hd] = tree_column(left, count, part_ms + head * leaves_max, part_a + head * leaves_max * hd + i % hd, hd);
  }
}
