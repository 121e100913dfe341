// Exact attention of many rows, keys and values kept in bf16: goes behind attention.cu, whose leaves and
// tree it is made of.
//
// Many rows of one sequence: a block has up to 64 rows of consecutive positions, one head and all
// leaves that they see, one after the other. Each warp has eight rows: 256 scores of each, eight in
// a lane, then all columns of their values. Subtrees that wait lie in parts, by level.
constexpr int TILE_ROWS = 64, WEIGHTS_PITCH = LEAF + 8;

// Scores of eight rows with 4 · N keys a lane: those of page lane / 16 (+ 2).
template <int HD, int N> DI void tile_scores(const float* q, const char* keys, float (&s)[8][8]) {
  u32 lane = lane_id();
  const char* at = keys + lane / 16 * (HD * PAGE * 2) + lane % 16 * 16;
#pragma unroll
  for (int r = 0; r < 8; r++)
#pragma unroll
    for (int i = 0; i < 8; i++) s[r][i] = 0.0f;
#pragma unroll 2
  for (int d = 0; d < HD; d += 4) {
    u32 v[2][4 * N];
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint4 w = *(const uint4*)(at + n * 2 * (HD * PAGE * 2) + (d / 2 + i) * PAGE * 4);
        v[i][4 * n] = w.x; v[i][4 * n + 1] = w.y; v[i][4 * n + 2] = w.z; v[i][4 * n + 3] = w.w;
      }
#pragma unroll
    for (int r = 0; r < 8; r++) {
      float4 x = *(const float4*)(q + r * HD + d);
#pragma unroll
      for (int i = 0; i < 4 * N; i++) {
        s[r][i] = fma(x.x, low(v[0][i]), s[r][i]);
        s[r][i] = fma(x.y, high(v[0][i]), s[r][i]);
        s[r][i] = fma(x.z, low(v[1][i]), s[r][i]);
        s[r][i] = fma(x.w, high(v[1][i]), s[r][i]);
      }
    }
  }
}

template <int C> DI void take(u32 (&x)[C], const char* at) {
  if constexpr (C == 4) {
    uint4 v = *(const uint4*)at;
    x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
  } else {
    uint2 v = *(const uint2*)at;
    x[0] = v.x; x[1] = v.y;
  }
}

template <int HD> DI void attention_tile(const float* q, const Cache& cache, const u32* tables, u32 table_stride, const u32* positions, const uint2* tiles,
                                         u32 heads, float scale, u32 window, u32 leaves_max, float2* part_ms, float* part_a, float* out) {
  constexpr int C = HD / 32, SIDE = HD * PAGE * 2;
  extern __shared__ float4 memory[];
  float* qs = (float*)memory;                    // [64][HD]
  char* keys = (char*)(qs + TILE_ROWS * HD);     // [4][SIDE]
  char* values = keys + 4 * SIDE;                // [4][SIDE]
  float* weights = (float*)(values + 4 * SIDE);  // [64][WEIGHTS_PITCH]
  __shared__ u64 barriers[2];
  u32 tid = threadIdx.x, lane = lane_id(), warp = warp_id();
  // Later rows see more: they go first.
  uint2 rows = tiles[gridDim.y - 1 - blockIdx.y];
  u32 head = blockIdx.x, kv_head = head / (heads / cache.kv_heads);
  u32 p0 = positions[rows.x], p1 = p0 + rows.y - 1;
  auto first = [&](u32 p) { return window && p + 1 > window ? p + 1 - window : 0; };
  const u32* table = tables + (u64)rows.x * table_stride;
  auto bring = [&](u32 leaf, u32 side) {
    u32 low_page = max(first(p0), leaf * LEAF) / PAGE, high_page = min(p1, leaf * LEAF + LEAF - 1) / PAGE;
    barrier_expect(barriers + side, (high_page - low_page + 1) * SIDE);
    for (u32 page = low_page; page <= high_page; page++) {
      const char* at = cache.pages + table[page] * cache.page_bytes + cache.layer_at + (u64)kv_head * cache.head_bytes;
      bulk_copy((side ? values : keys) + page % 4 * SIDE, at + side * SIDE, SIDE, barriers + side);
    }
  };
  u32 from = first(p0) / LEAF, to = p1 / LEAF;
  if (tid == 0) {
    barrier_init(barriers);
    barrier_init(barriers + 1);
    barriers_made();
    bring(from, 0);
    bring(from, 1);
  }
  for (u32 i = tid; i < TILE_ROWS * HD / 4; i += 256) {
    u32 r = i / (HD / 4), in = i % (HD / 4);
    ((float4*)qs)[i] = r < rows.y ? ((const float4*)(q + ((u64)(rows.x + r) * heads + head) * HD))[in] : make_float4(0, 0, 0, 0);
  }
  __syncthreads();
  float* own = weights + warp * 8 * WEIGHTS_PITCH;
  for (u32 leaf = from; leaf <= to; leaf++) {
    u32 phase = (leaf - from) & 1, base = leaf * LEAF;
    float s[8][8];
    barrier_wait(barriers, phase);
    if (min(p1, base + LEAF - 1) % LEAF >= 2 * PAGE) tile_scores<HD, 2>(qs + warp * 8 * HD, keys, s);
    else tile_scores<HD, 1>(qs + warp * 8 * HD, keys, s);
    __syncthreads();
    if (tid == 0 && leaf < to) bring(leaf + 1, 0);
    // What each row sees of the leaf; none unless lo < hi.
    int lo[8], hi[8], lo_min = LEAF, lo_max = 0, hi_min = LEAF, hi_max = 0;
    float m[8], sums[2];
#pragma unroll
    for (int r = 0; r < 8; r++) {
      u32 p = p0 + warp * 8 + r, f = first(p);
      bool valid = warp * 8 + r < rows.y && p >= base && f < base + LEAF;
      lo[r] = valid && f > base ? f - base : 0;
      hi[r] = valid ? min(p + 1 - base, (u32)LEAF) : 0;
      if (valid) {
        lo_min = min(lo_min, lo[r]); lo_max = max(lo_max, lo[r]);
        hi_min = min(hi_min, hi[r]); hi_max = max(hi_max, hi[r]);
      }
      float most = -__int_as_float(0x7f800000);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        int at = lane / 16 * PAGE + i / 4 * 2 * PAGE + lane % 16 * 4 + i % 4;
        float v = mul(s[r][i], scale);
        s[r][i] = v;
        // A NaN compares false and is left out.
        if (at >= lo[r] && at < hi[r] && v > most) most = v;
      }
      for (int d = 16; d; d /= 2) { float o = __shfl_xor_sync(FULL, most, d); most = o > most ? o : most; }
      m[r] = most;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int at = lane / 16 * PAGE + h * 2 * PAGE + lane % 16 * 4 + i;
          w[i] = at >= lo[r] && at < hi[r] ? exp_(add(s[r][4 * h + i], -most)) : 0.0f;
        }
        *(float4*)(own + r * WEIGHTS_PITCH + lane / 16 * PAGE + h * 2 * PAGE + lane % 16 * 4) = make_float4(w[0], w[1], w[2], w[3]);
      }
    }
    __syncwarp();
    // Sums of weights; what is not seen adds +0.
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float* row = own + (4 * h + lane / 8) * WEIGHTS_PITCH + lane % 8;
      float l = 0.0f;
#pragma unroll
      for (int i = 0; i < LEAF; i += 8) l = add(l, row[i]);
      sums[h] = lanes8(l);
    }
    barrier_wait(barriers + 1, phase);
    float a[8][C];
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
      for (int c = 0; c < C; c++) a[r][c] = 0.0f;
    const char* at = values + lane * C * 4;
    auto one = [&](int i) {
      const u32* v = (const u32*)(at + i / PAGE * SIDE + i % PAGE / 2 * HD * 4);
#pragma unroll
      for (int r = 0; r < 8; r++)
        if (i >= lo[r] && i < hi[r]) {
          float w = own[r * WEIGHTS_PITCH + i];
#pragma unroll
          for (int c = 0; c < C; c++) a[r][c] = fma(w, i % 2 ? high(v[c]) : low(v[c]), a[r][c]);
        }
    };
    int i = lo_min, start = (lo_max + 3) / 4 * 4, end = hi_min / 4 * 4;
    if (start >= end) start = end = hi_max;
#pragma unroll 1
    for (; i < start; i++) one(i);
#pragma unroll 2
    for (; i < end; i += 4) {
      const char* v = at + i / PAGE * SIDE + i % PAGE / 2 * HD * 4;
      u32 x[C], y[C];
      take(x, v);
      take(y, v + HD * 4);
#pragma unroll
      for (int r = 0; r < 8; r++) {
        float4 w = *(const float4*)(own + r * WEIGHTS_PITCH + i);
#pragma unroll
        for (int c = 0; c < C; c++) {
          a[r][c] = fma(w.x, low(x[c]), a[r][c]);
          a[r][c] = fma(w.y, high(x[c]), a[r][c]);
          a[r][c] = fma(w.z, low(y[c]), a[r][c]);
          a[r][c] = fma(w.w, high(y[c]), a[r][c]);
        }
      }
    }
#pragma unroll 1
    for (; i < hi_max; i++) one(i);
    __syncthreads();
    if (tid == 0 && leaf < to) bring(leaf + 1, 1);
    // The tree, row by row.
#pragma unroll
    for (int r = 0; r < 8; r++) {
      float sum = __shfl_sync(FULL, sums[r / 4], r % 4 * 8);
      if (lo[r] >= hi[r]) continue;
      u32 p = p0 + warp * 8 + r, left = first(p) / LEAF, count = p / LEAF + 1;
      u64 place = (u64)(rows.x + warp * 8 + r) * heads + head;
      float2* ms = part_ms + place * leaves_max;
      float* as = part_a + place * leaves_max * HD + lane * C;
      float cm = m[r], cs = sum;
      u32 rest = leaf;
      for (int n = merges(leaf, count); n > 0; n--) {
        int level = __ffs(rest) - 1;
        bool some = rest > left;
        rest &= rest - 1;
        // A side of which nothing is seen is left out.
        if (!some) continue;
        float2 before = ms[level];
        float top = cm > before.x ? cm : before.x;
        float e = exp_(add(before.x, -top)), f = exp_(add(cm, -top));
        cs = add(mul(before.y, e), mul(cs, f));
#pragma unroll
        for (int c = 0; c < C; c++) a[r][c] = add(mul(as[level * HD + c], e), mul(a[r][c], f));
        cm = top;
      }
      if (leaf + 1 == count) {
#pragma unroll
        for (int c = 0; c < C; c++) out[place * HD + lane * C + c] = __fdiv_rn(a[r][c], cs);
      } else {
        int level = __ffs(~leaf) - 1;
        __syncwarp();
        if (lane == 0) ms[level] = make_float2(cm, cs);
#pragma unroll
        for (int c = 0; c < C; c++) as[level * HD + c] = a[r][c];
        __syncwarp();
      }
    }
  }
}

#define ATTENTION_ROWS(HD) \
  ENTRY __launch_bounds__(256, 1) attention_rows_##HD(const float* q, Cache cache, const u32* tables, u32 table_stride, const u32* positions, const uint2* tiles, \
      u32 heads, float scale, u32 window, u32 leaves_max, float2* part_ms, float* part_a, float* out) { \
    begin(); \
    attention_tile<HD>(q, cache, tables, table_stride, positions, tiles, heads, scale, window, leaves_max, part_ms, part_a, out); \
  }
ATTENTION_ROWS(64)
ATTENTION_ROWS(128)
