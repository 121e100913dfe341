// Attention by `--math fast`: scores and values by the tensor cores, keys and values kept in bf16, heads
// of 64 or 128. Cut as the exact one is: leaves of 256 absolute positions, each with its own maximum, sum
// of weights and sums of values, then rule 1's tree; at its end the values times 1 / the weights. So the bits of a row depend on its position alone.
//
// In a leaf: scores are sums over the head upwards, sixteen at a time; with c = scale · log2 e, which is
// above 0, weights are 2^(score · c - m) where m is c times the greatest score, rounded to bf16; sums of values go over positions upwards, sixteen at a time.
// Weights are added per page of 64: in each of four lanes (positions 8t..8t+7 of 32, then of the next
// 32) upwards, lanes by twos, pages by twos. What a row does not see has weight 0, which changes no sum;
// values past the last position of a tile count as 0, whatever lies there.
//
// The instruction's rows are rows of q, its columns are positions, then columns of values: column g of
// tile j is position or column 4g + j of 32. So the weights of positions 8t.. 8t + 7 are where the second
// product wants them, its slots being positions 8t, 8t + 1 | 8t + 2, 8t + 3, then the other four.

constexpr float LOG2_E = 1.44269504088896340736f;
#define NONE bits(0xff800000u)  // below all scores

// Weights of a row and 32 positions in a lane: v[j][i] is position 8t + 4i + j.
DI void weights_of(const float (&v)[4][4], int row, u32 (&w)[4]) {
  w[0] = rounded(v[0][2 * row], v[1][2 * row]);
  w[1] = rounded(v[2][2 * row], v[3][2 * row]);
  w[2] = rounded(v[0][2 * row + 1], v[1][2 * row + 1]);
  w[3] = rounded(v[2][2 * row + 1], v[3][2 * row + 1]);
}
DI float sum_of(float sum, const u32 (&w)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) sum = add(add(sum, low(w[i])), high(w[i]));
  return sum;
}
DI float quad_sum(float x) {
  x = add(x, __shfl_xor_sync(FULL, x, 1));
  return add(x, __shfl_xor_sync(FULL, x, 2));
}
DI float quad_max(float x) {
#pragma unroll
  for (int d = 1; d < 4; d *= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, d));
  return x;
}
DI u32 part_of(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A block of four warps has one row, one key/value head with its group of at most sixteen heads, and one
// leaf: a warp per page for scores, then a warp per 32 columns.
template <int HD> DI void leaf_fast(const float* q, const Cache& cache, const u32* tables, u32 table_stride, const u32* positions,
                                    u32 heads, float scale, u32 window, u32 leaves_max, float2* part_ms, float* part_a, float* out) {
  constexpr int STEPS = HD / 16, PITCH = LEAF / 2 + 4;
  __shared__ u32 weights[16 * PITCH];
  __shared__ float most_of[4 * 16], sum_of_page[4 * 16];
  u32 leaf = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z, group = heads / cache.kv_heads;
  u32 p = positions[row], first = window && p + 1 > window ? p + 1 - window : 0;
  if (leaf > p / LEAF || leaf < first / LEAF) return;
  u32 base = leaf * LEAF;
  int lo = max(first, base) - base, hi = min(p + 1, base + LEAF) - base;
  u32 lane = lane_id(), warp = warp_id(), t = lane % 4, g = lane / 4;
  auto page_at = [&](u32 page) {
    return cache.pages + tables[(u64)row * table_stride + leaf * 4 + page] * cache.page_bytes + cache.layer_at + (u64)kv_head * cache.head_bytes;
  };
  auto sees = [&](u32 page) { return lo < (int)(page + 1) * PAGE && hi > (int)page * PAGE; };
  const float* q_head = q + ((u64)row * heads + kv_head * group) * HD;
  float s[2][4][4];
  float most[2] = {NONE, NONE};
  bool seen = sees(warp);
  scale = mul(scale, LOG2_E);
  if (seen) {
    const char* keys = page_at(warp) + t * PAGE * 4 + g * 16;
#pragma unroll
    for (int n = 0; n < 32; n++) s[n / 16][n / 4 % 4][n % 4] = 0.0f;
#pragma unroll 4
    for (int i = 0; i < STEPS; i++) {
      u32 a[4];
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float2 v = g + 8 * r < group ? *(const float2*)(q_head + (g + 8 * r) * HD + i * 16 + h * 8 + 2 * t) : make_float2(0, 0);
          a[h * 2 + r] = rounded(v.x, v.y);
        }
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const char* at = keys + i * 8 * PAGE * 4 + n * 128;
        uint4 x = stream16(at), y = stream16(at + 4 * PAGE * 4);
#pragma unroll
        for (int j = 0; j < 4; j++) dots16(s[n][j], a[0], a[1], a[2], a[3], part_of(x, j), part_of(y, j));
      }
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int at = warp * PAGE + n * 32 + t * 8 + i % 2 * 4 + j;
          // A NaN is left out.
          if (at >= lo && at < hi) most[i / 2] = fmaxf(most[i / 2], s[n][j][i]);
        }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    most[r] = quad_max(most[r]);
    if (t == 0) most_of[warp * 16 + g + 8 * r] = most[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float m = most_of[g + 8 * r];
#pragma unroll
    for (int w = 1; w < 4; w++) m = fmaxf(m, most_of[w * 16 + g + 8 * r]);
    m = mul(m, scale);
    most[r] = m;
    float sum = 0.0f;
    if (seen) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; i++) {
            int at = warp * PAGE + n * 32 + t * 8 + i % 2 * 4 + j;
            s[n][j][i] = at >= lo && at < hi ? exp2_(fma(s[n][j][i], scale, -m)) : 0.0f;
          }
        u32 w[4];
        weights_of(s[n], r, w);
        sum = sum_of(sum, w);
        *(uint4*)(weights + (g + 8 * r) * PITCH + warp * 32 + n * 16 + t * 4) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
    sum = quad_sum(sum);
    if (t == 0) sum_of_page[warp * 16 + g + 8 * r] = sum;
  }
  __syncthreads();
  if (warp >= HD / 32) return;
  float o[4][4];
#pragma unroll
  for (int i = 0; i < 16; i++) o[i / 4][i % 4] = 0.0f;
#pragma unroll 1
  for (u32 page = 0; page < 4; page++) {
    if (!sees(page)) continue;
    const char* values = page_at(page) + HD * PAGE * 2 + warp * 128 + g * 16;
    int end = hi - (int)page * PAGE;  // of what counts
    uint4 v[2][2][2];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int pair = n * 16 + t * 4 + i;
        u32 mask = 2 * pair + 1 < end ? FULL : 2 * pair < end ? 0xffffu : 0u;
        uint4 x = mask ? stream16(values + pair * HD * 4) : make_uint4(0, 0, 0, 0);
        v[n][i / 2][i % 2] = make_uint4(x.x & mask, x.y & mask, x.z & mask, x.w & mask);
      }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const u32* w = weights + g * PITCH + page * 32 + n * 16 + t * 4;
      uint4 a = *(const uint4*)w, b = *(const uint4*)(w + 8 * PITCH);
#pragma unroll
      for (int j = 0; j < 4; j++) dots16(o[j], a.x, b.x, a.y, b.y, part_of(v[n][0][0], j), part_of(v[n][0][1], j));
#pragma unroll
      for (int j = 0; j < 4; j++) dots16(o[j], a.z, b.z, a.w, b.w, part_of(v[n][1][0], j), part_of(v[n][1][1], j));
    }
  }
  bool alone = first / LEAF == p / LEAF;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    u32 h = g + 8 * r;
    if (h >= group) continue;
    float sum = add(add(sum_of_page[h], sum_of_page[16 + h]), add(sum_of_page[32 + h], sum_of_page[48 + h]));
    u64 head = (u64)row * heads + kv_head * group + h, part = head * leaves_max + leaf;
    float inverse = __fdiv_rn(1.0f, sum);
    float* to = (alone ? out + head * HD : part_a + part * HD) + warp * 32 + t * 8;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float4 v = make_float4(o[0][2 * r + i], o[1][2 * r + i], o[2][2 * r + i], o[3][2 * r + i]);
      if (alone) v = make_float4(mul(v.x, inverse), mul(v.y, inverse), mul(v.z, inverse), mul(v.w, inverse));
      *(float4*)(to + 4 * i) = v;
    }
    if (!alone && warp == 0 && t == 0) part_ms[part] = make_float2(most[r], sum);
  }
}

// The tree over the leaves of a row and head: a thread per column.
ENTRY fast_tree(const u32* positions, u32 heads, u32 hd, u32 window, u32 leaves_max, const float2* part_ms, const float* part_a, float* out) {
  begin();
  u32 head = blockIdx.x, row = blockIdx.y;
  u32 p = positions[row], first = window && p + 1 > window ? p + 1 - window : 0;
  u32 left = first / LEAF, count = p / LEAF + 1;
  if (left + 1 == count) return;
  u64 at = ((u64)row * heads + head) * leaves_max;
  part_ms += at;
  for (u32 c = threadIdx.x; c < hd; c += blockDim.x) {
    float m[24], s[24], a[24], cm = 0, cs = 0, ca = 0;
    for (u32 i = left; i < count; i++) {
      cm = part_ms[i].x; cs = part_ms[i].y; ca = part_a[(at + i) * hd + c];
      u32 rest = i;
      for (int n = merges(i, count); n > 0; n--) {
        int level = __ffs(rest) - 1;
        bool some = rest > left;
        rest &= rest - 1;
        // A side of which nothing is seen is left out.
        if (!some) continue;
        float top = cm > m[level] ? cm : m[level];
        float e = exp2_(add(m[level], -top)), f = exp2_(add(cm, -top));
        cs = add(mul(s[level], e), mul(cs, f));
        ca = add(mul(a[level], e), mul(ca, f));
        cm = top;
      }
      int level = __ffs(~i) - 1;
      m[level] = cm; s[level] = cs; a[level] = ca;
    }
    out[((u64)row * heads + head) * hd + c] = mul(ca, __fdiv_rn(1.0f, cs));
  }
}

// Many rows of one sequence: a block has up to 128 rows of consecutive positions, one head and all leaves
// that they see, one after the other; a warp has sixteen rows. Subtrees that wait lie in parts, by level.
constexpr u32 TILE_ROWS = 128;

// Weights of a leaf's scores, their sum, and the maximum; of a row that sees nothing, nothing that counts.
DI void leaf_weights(float (&s)[8][4][4], float scale, u32 (&w)[8][2][4], float (&most)[2], float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float m = NONE;
    // A NaN is left out.
#pragma unroll
    for (int i = 0; i < 64; i++) m = fmaxf(m, s[i / 8][i / 2 % 4][2 * r + i % 2]);
    m = mul(quad_max(m), scale);
    most[r] = m;
    float pages[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& x = s[n][i / 2][2 * r + i % 2];
        x = exp2_(fma(x, scale, -m));
      }
      weights_of(s[n], r, w[n][r]);
      pages[n / 2] = sum_of(pages[n / 2], w[n][r]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) pages[i] = quad_sum(pages[i]);
    sum[r] = add(add(pages[0], pages[1]), add(pages[2], pages[3]));
  }
}

template <int HD> DI void rows_fast(const float* q, const Cache& cache, const u32* tables, u32 table_stride, const u32* positions, const uint2* tiles,
                                    u32 heads, float scale, u32 window, u32 leaves_max, float2* part_ms, float* part_a, float* out) {
  constexpr u32 SIDE = HD * PAGE * 2, STEPS = HD / 16, COLS = HD / 32;
  constexpr u32 Q_BYTES = HD * 2, V_BYTES = HD * 4, V_PIECES = HD / 4;  // rows, and pieces of sixteen bytes
  extern __shared__ float4 memory[];
  char* qs = (char*)memory;                // [TILE_ROWS] rows of q
  char* keys = qs + TILE_ROWS * Q_BYTES;   // [4][SIDE]
  char* values = keys + 4 * SIDE;          // [4][SIDE]
  u32 tid = threadIdx.x, lane = lane_id(), warp = warp_id(), t = lane % 4, g = lane / 4;
  // Later rows see more: they go first.
  uint2 rows = tiles[gridDim.y - 1 - blockIdx.y];
  u32 head = blockIdx.x, kv_head = head / (heads / cache.kv_heads);
  u32 p0 = positions[rows.x], p1 = p0 + rows.y - 1;
  auto first = [&](u32 p) { return window && p + 1 > window ? p + 1 - window : 0; };
  const u32* table = tables + (u64)rows.x * table_stride;
  u32 from = first(p0) / LEAF, to = p1 / LEAF;
  // Asks for a leaf's keys (side 0) or values (1), where there is such a leaf.
  auto bring = [&](u32 leaf, u32 side) {
    if (leaf <= to) {
      u32 low_page = max(first(p0), leaf * LEAF) / PAGE, high_page = min(p1, leaf * LEAF + LEAF - 1) / PAGE;
      for (u32 page = low_page; page <= high_page; page++) {
        const char* at = cache.pages + table[page] * cache.page_bytes + cache.layer_at + (u64)kv_head * cache.head_bytes + side * SIDE;
        u32 to_at = shared_at((side ? values : keys) + page % 4 * SIDE);
        for (u32 i = tid; i < SIDE / 16; i += 256) {
          if (side == 0) {
            u32 r = i / 16, c = i % 16;
            copy16(to_at + r * 256 + (c ^ 2 * (r & 3)) * 16, at + i * 16);
          } else {
            u32 r = i / V_PIECES, c = i % V_PIECES;
            copy16_of(to_at + r * V_BYTES + (c ^ 2 * (r / 4 & 3)) * 16, at + i * 16, page * PAGE + 2 * r > p1 ? 0 : 16);
          }
        }
      }
    }
    copies_end();
  };
  bring(from, 0);
  bring(from, 1);
  for (u32 i = tid; i < TILE_ROWS * HD / 8; i += 256) {
    u32 r = i / (HD / 8), c = i % (HD / 8);
    const float4* at = (const float4*)(q + ((u64)(rows.x + r) * heads + head) * HD) + c * 2;
    float4 a = r < rows.y ? at[0] : make_float4(0, 0, 0, 0), b = r < rows.y ? at[1] : make_float4(0, 0, 0, 0);
    *(uint4*)(qs + r * Q_BYTES + (c ^ r & 7) * 16) = make_uint4(rounded(a.x, a.y), rounded(a.z, a.w), rounded(b.x, b.y), rounded(b.z, b.w));
  }
  scale = mul(scale, LOG2_E);
  u32 w0 = warp * 16, wp0 = p0 + w0, wp1 = min(p1, wp0 + 15);  // positions of this warp's rows
#pragma unroll 1
  for (u32 leaf = from; leaf <= to; leaf++) {
    u32 base = leaf * LEAF;
    // What this warp sees of the leaf, in pieces of 32 positions; nothing unless some < end.
    bool active = w0 < rows.y && wp1 >= base && first(wp0) < base + LEAF;
    u32 some = active && first(wp0) > base ? (first(wp0) - base) / 32 : 0, end = active ? min(wp1 - base, (u32)LEAF - 1) / 32 + 1 : 0;
    copies_wait<1>();
    __syncthreads();
    float s[8][4][4];
    if (active) {
#pragma unroll
      for (int i = 0; i < 128; i++) s[i / 16][i / 4 % 4][i % 4] = 0.0f;
#pragma unroll 1
      for (u32 i = 0; i < STEPS; i++) {
        u32 a[4], r = w0 + lane / 8 % 2 * 8 + lane % 8;
        four_matrices(a[0], a[1], a[2], a[3], qs + r * Q_BYTES + ((i * 2 + lane / 16) ^ r & 7) * 16);
#pragma unroll
        for (u32 n = 0; n < 8; n++) {
          if (n < some || n >= end) continue;
          const char* at = keys + n / 2 * SIDE + (i * 8 + t) * 256 + ((n % 2 * 8 + g) ^ 2 * t) * 16;
          uint4 x = *(const uint4*)at, y = *(const uint4*)(at + 4 * 256);
#pragma unroll
          for (int j = 0; j < 4; j++) dots16(s[n][j], a[0], a[1], a[2], a[3], part_of(x, j), part_of(y, j));
        }
      }
    }
    __syncthreads();
    bring(leaf + 1, 0);
    // What each of two rows sees; none unless lo < hi.
    int lo[2], hi[2];
    float most[2], sum[2];
    u32 w[8][2][4];
    if (active) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        u32 p = wp0 + g + 8 * r, f = first(p);
        bool valid = w0 + g + 8 * r < rows.y && p >= base && f < base + LEAF;
        lo[r] = valid && f > base ? f - base : 0;
        hi[r] = valid ? min(p + 1 - base, (u32)LEAF) : 0;
      }
      // Mostly all of it is seen by all rows; else what is not seen is below all scores.
      if (w0 + 16 > rows.y || wp0 + 1 < base + LEAF || first(wp1) > base) {
#pragma unroll
        for (int i = 0; i < 128; i++) {
          int at = i / 16 * 32 + t * 8 + i % 2 * 4 + i / 4 % 4, r = i / 2 % 2;
          if (at < lo[r] || at >= hi[r]) s[i / 16][i / 4 % 4][i % 4] = NONE;
        }
      }
      leaf_weights(s, scale, w, most, sum);
    }
    copies_wait<1>();
    __syncthreads();
    // The position past the last shares a word with it.
    if (leaf == to && p1 % 2 == 0) {
      u32 r = p1 % PAGE / 2;
      for (u32 i = tid; i < HD; i += 256) *(u32*)(values + p1 % LEAF / PAGE * SIDE + r * V_BYTES + (i / 4 ^ 2 * (r / 4 & 3)) * 16 + i % 4 * 4) &= 0xffffu;
      __syncthreads();
    }
    float o[COLS][4][4];
    if (active) {
#pragma unroll
      for (int i = 0; i < HD / 2; i++) o[i / 16][i / 4 % 4][i % 4] = 0.0f;
#pragma unroll
      for (u32 n = 0; n < 8; n++) {
        if (n < some || n >= end) continue;
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
          const char* at = values + n / 2 * SIDE + (n % 2 * 16 + t * 4 + h * 2) * V_BYTES;
#pragma unroll
          for (u32 c = 0; c < COLS; c++) {
            u32 piece = ((c * 8 + g) ^ 2 * t) * 16;
            uint4 x = *(const uint4*)(at + piece), y = *(const uint4*)(at + V_BYTES + piece);
#pragma unroll
            for (int j = 0; j < 4; j++) dots16(o[c][j], w[n][0][2 * h], w[n][1][2 * h], w[n][0][2 * h + 1], w[n][1][2 * h + 1], part_of(x, j), part_of(y, j));
          }
        }
      }
    }
    __syncthreads();
    bring(leaf + 1, 1);
    if (!active) continue;
    // The tree, row by row.
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (lo[r] >= hi[r]) continue;
      u32 p = wp0 + g + 8 * r, left = first(p) / LEAF, count = p / LEAF + 1;
      u64 place = (u64)(rows.x + w0 + g + 8 * r) * heads + head;
      float2* ms = part_ms + place * leaves_max;
      float* as = part_a + place * leaves_max * HD + t * 8;
      float cm = most[r], cs = sum[r];
      u32 rest = leaf;
      for (int n = merges(leaf, count); n > 0; n--) {
        int level = __ffs(rest) - 1;
        bool before = rest > left;
        rest &= rest - 1;
        // A side of which nothing is seen is left out.
        if (!before) continue;
        float2 b = ms[level];
        float top = cm > b.x ? cm : b.x;
        float e = exp2_(add(b.x, -top)), f = exp2_(add(cm, -top));
        cs = add(mul(b.y, e), mul(cs, f));
#pragma unroll
        for (u32 c = 0; c < COLS; c++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float4 v = *(const float4*)(as + level * HD + c * 32 + i * 4);
            const float a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) o[c][j][2 * r + i] = add(mul(a[j], e), mul(o[c][j][2 * r + i], f));
          }
        cm = top;
      }
      bool ends = leaf + 1 == count;
      int level = __ffs(~leaf) - 1;
      float inverse = ends ? __fdiv_rn(1.0f, cs) : 1.0f;
      float* to_at = ends ? out + place * HD + t * 8 : as + level * HD;
#pragma unroll
      for (u32 c = 0; c < COLS; c++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          *(float4*)(to_at + c * 32 + i * 4) = make_float4(mul(o[c][0][2 * r + i], inverse), mul(o[c][1][2 * r + i], inverse), mul(o[c][2][2 * r + i], inverse), mul(o[c][3][2 * r + i], inverse));
      // Others read it after the next barrier.
      if (!ends && t == 0) ms[level] = make_float2(cm, cs);
    }
  }
  copies_wait<0>();
}

#define FAST_ATTENTION(HD) \
  ENTRY __launch_bounds__(128) fast_leaf_##HD(const float* q, Cache cache, const u32* tables, u32 table_stride, const u32* positions, \
      u32 heads, float scale, u32 window, u32 leaves_max, float2* part_ms, float* part_a, float* out) { \
    begin(); \
    leaf_fast<HD>(q, cache, tables, table_stride, positions, heads, scale, window, leaves_max, part_ms, part_a, out); \
  } \
  ENTRY __launch_bounds__(256, 1) fast_rows_##HD(const float* q, Cache cache, const u32* tables, u32 table_stride, const u32* positions, const uint2* tiles, \
      u32 heads, float scale, u32 window, u32 leaves_max, float2* part_ms, float* part_a, float* out) { \
    begin(); \
    rows_fast<HD>(q, cache, tables, table_stride, positions, tiles, heads, scale, window, leaves_max, part_ms, part_a, out); \
  }
FAST_ATTENTION(64)
FAST_ATTENTION(128)
