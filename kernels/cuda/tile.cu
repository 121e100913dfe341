// Products of many rows, for prefills: a block computes 128 outputs (four panels) of 64 or 128 rows.
// CPU truth: kernels/src/ops/{tile,blocked,swiglu}.rs. K is whole stages.
//
// Blocks of integers: the tensor cores give the exact dots of a block, then one f32 multiply-add per
// block and output, in block order. Floats: a fused multiply-add per k, in order.
// A leaf's sums stay in registers; single leaves wait there, larger subtrees in shared memory.

constexpr bool BLOCKS = Format<FORMAT>::BLOCKS;
constexpr int STAGE_K = BLOCKS ? 64 : 32;
// With 64 rows two blocks share a processor.
template <int RG> constexpr int STAGES_OF = BLOCKS ? (RG == 1 ? 3 : 4) : FORMAT == BF16 ? 3 : 2;
constexpr int MT = 4;                                                     // sixteens of rows of a warp
constexpr int WARP_ROWS = 16 * MT, SUMS = 16 * MT;
constexpr int COLS = 4;                                                   // panels of a block
constexpr int ROW_BYTES = BLOCKS ? 80 : STAGE_K * 4;                      // of x in a stage
constexpr int PANEL_BYTES = BLOCKS ? 2 * Format<FORMAT>::BLOCK_BYTES : FORMAT == F32 ? STAGE_K * 128 : STAGE_K * 64;
// In shared memory rows are apart so that what a warp reads at once lies in different banks.
constexpr int ROW_PITCH = BLOCKS ? 80 : ROW_BYTES + 16;
// Integers are kept as 2^SHIFT times themselves, where that makes signed bytes of them; their sums
// then become floats by starting at what adds 1.5 · 2^(23 - SHIFT). Those of int8 are converted.
constexpr int SHIFT = FORMAT == INT8 ? 0 : FORMAT == INT6 ? 2 : 4;
constexpr int FROM = SHIFT ? MAGIC_BITS - (SHIFT << 23) : 0;
DI float whole(i32 sum) { return SHIFT ? add(bits((u32)sum), -bits((u32)FROM)) : __int2float_rn(sum); }

// d = a · b + c, exactly: 16 rows, 8 outputs, 32 k.
DI void dots(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(FROM));
}

// Where piece i, of 16 bytes, of a panel's stage lies in shared memory: what a warp reads of a row of
// words at once is spread over all banks.
DI u32 piece_at(u32 i) {
  if constexpr (BLOCKS) {
    constexpr u32 PIECES = Format<FORMAT>::BLOCK_BYTES / 16;
    u32 b = i / PIECES, r = i % PIECES;
    if (r < 4) return i * 16;
    u32 g = (r - 4) / 8, c = (r - 4) % 8;
    return b * Format<FORMAT>::BLOCK_BYTES + 64 + g * 128 + (c ^ 2 * (g & 3)) * 16;
  }
  return i * 16;
}

// Words 4c..4c + 3 of row g of a block.
DI uint4 row_words(const char* block, u32 g, u32 c) { return *(const uint4*)(block + 64 + g * 128 + (c ^ 2 * (g & 3)) * 16); }

// The integers of k = 4r.. and 4r + 16.. (four each) of outputs 4c.. of a block, as signed bytes.
DI void open_block(const char* block, u32 r, u32 c, u32 (&lo)[4], u32 (&hi)[4]) {
  if constexpr (FORMAT == INT8) {
    uint4 v = row_words(block, r, c), w = row_words(block, r + 4, c);
    lo[0] = v.x ^ 0x80808080u; lo[1] = v.y ^ 0x80808080u; lo[2] = v.z ^ 0x80808080u; lo[3] = v.w ^ 0x80808080u;
    hi[0] = w.x ^ 0x80808080u; hi[1] = w.y ^ 0x80808080u; hi[2] = w.z ^ 0x80808080u; hi[3] = w.w ^ 0x80808080u;
  } else if constexpr (FORMAT == INT4) {
    uint4 v = row_words(block, r / 2, c), w = row_words(block, 2 + r / 2, c);
    u32 s = r % 2 ? 0 : 4;
    const u32 a[4] = {v.x, v.y, v.z, v.w}, b[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      lo[j] = ((a[j] << s) & 0xf0f0f0f0u) ^ 0x80808080u;
      hi[j] = ((b[j] << s) & 0xf0f0f0f0u) ^ 0x80808080u;
    }
  } else {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint4 v[3];
#pragma unroll
      for (int i = 0; i < 3; i++) v[i] = row_words(block, 3 * h + i, c);
      const u32 a[3][4] = {{v[0].x, v[0].y, v[0].z, v[0].w}, {v[1].x, v[1].y, v[1].z, v[1].w}, {v[2].x, v[2].y, v[2].z, v[2].w}};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 rest = (a[0][j] >> 6 & 0x03030303u) | (a[1][j] >> 6 & 0x03030303u) << 2 | (a[2][j] >> 6 & 0x03030303u) << 4;
        u32 q = r == 0 ? a[0][j] : r == 1 ? a[1][j] : r == 2 ? a[2][j] : rest;
        (h ? hi : lo)[j] = ((q & 0x3f3f3f3fu) << 2) ^ 0x80808080u;
      }
    }
  }
}

// This thread's sums of a warp's rows and 32 outputs. Blocks: s[m][j][i] is row 16m + lane / 4 (+ 8
// where i > 1) and output 8 (lane % 4) + 4 (i % 2) + j.
struct Sums { float s[MT][4][4]; };

// Of floats, the same rows and outputs: s[m][j][i] is as above.
DI void stage_floats(Sums& acc, const char* x, const char* w) {
  u32 lane = lane_id();
  const char* row = x + lane / 4 * ROW_PITCH;
  const char* words = w + lane % 4 * 32;
#pragma unroll 2
  for (int k = 0; k < STAGE_K; k += 4) {
    float f[4][8];
#pragma unroll
    for (int i = 0; i < (FORMAT == F32 ? 4 : 2); i++) {
      const uint4* at = (const uint4*)(words + (FORMAT == F32 ? k + i : k / 2 + i) * 128);
      uint4 a = at[0], b = at[1];
      const u32 v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int o = 0; o < 8; o++) {
        if (FORMAT == F32) f[i][o] = bits(v[o]);
        else { f[2 * i][o] = low(v[o]); f[2 * i + 1][o] = high(v[o]); }
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * MT; r++) {
      float4 v = *(const float4*)(row + r * 8 * ROW_PITCH + k * 4);
#pragma unroll
      for (int o = 0; o < 8; o++) {
        float& sum = acc.s[r / 2][o % 4][r % 2 * 2 + o / 4];
        sum = fma(v.x, f[0][o], sum);
        sum = fma(v.y, f[1][o], sum);
        sum = fma(v.z, f[2][o], sum);
        sum = fma(v.w, f[3][o], sum);
      }
    }
  }
}

DI void stage_blocks(Sums& acc, const char* x, const char* w) {
  u32 lane = lane_id(), r = lane % 4, c = lane / 4, half = r < 2 ? 0x1044 : 0x3244;
#pragma unroll 1
  for (int b = 0; b < 2; b++) {
    const char* block = w + b * Format<FORMAT>::BLOCK_BYTES;
    u32 lo[4], hi[4];
    open_block(block, r, c, lo, hi);
    float scale[8];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint4 v = *(const uint4*)(block + (r % 2) * 32 + i * 16);
      scale[4 * i] = bits(__byte_perm(v.x, 0, half));
      scale[4 * i + 1] = bits(__byte_perm(v.y, 0, half));
      scale[4 * i + 2] = bits(__byte_perm(v.z, 0, half));
      scale[4 * i + 3] = bits(__byte_perm(v.w, 0, half));
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const char* row = x + (m * 16 + c) * ROW_PITCH + b * 40;
      u32 a[4] = {*(const u32*)(row + r * 4), *(const u32*)(row + 8 * ROW_PITCH + r * 4), *(const u32*)(row + 16 + r * 4), *(const u32*)(row + 8 * ROW_PITCH + 16 + r * 4)};
      float first = *(const float*)(row + 32), second = *(const float*)(row + 8 * ROW_PITCH + 32);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        i32 d[4];
        dots(d, a, lo[j], hi[j]);
#pragma unroll
        for (int i = 0; i < 4; i++)
          acc.s[m][j][i] = fma(whole(d[i]), mul(scale[4 * (i % 2) + j], i < 2 ? first : second), acc.s[m][j][i]);
      }
    }
  }
}

// RG times 64 rows. `count` of them are wanted. row(i) is where row i of x begins, panel(i) where panel i of four.
// Of K, `leaves` leaves from `leaf_from` on: a node of the tree.
template <int RG, class Row, class Panel> DI void tile(u32 k, Row row, Panel panel, Sums& acc, char* shared, u32 count, u32 leaf_from, u32 leaves) {
  constexpr int STAGES = STAGES_OF<RG>, ROWS = RG * 64, THREADS = ROWS / WARP_ROWS * COLS * 32;
  constexpr int X_SPACE = ROWS * ROW_PITCH, STAGE_SPACE = X_SPACE + COLS * PANEL_BYTES;
  constexpr int X_PIECES = ROW_BYTES / 16, W_PIECES = PANEL_BYTES / 16;
  constexpr int XS = (ROWS * X_PIECES + THREADS - 1) / THREADS, WS = (COLS * W_PIECES + THREADS - 1) / THREADS;
  constexpr u32 LEAF_STAGES = LEAF / STAGE_K;
  u32 tid = threadIdx.x, warp = warp_id(), rg = warp / COLS, col = warp % COLS;
  u32 stage_from = leaf_from * LEAF_STAGES, stages = min(k / STAGE_K - stage_from, leaves * LEAF_STAGES);
  // The pieces that this thread copies of every stage.
  const char* x_from[XS];
  const char* w_from[WS];
  u32 w_to[WS];
#pragma unroll
  for (int i = 0; i < XS; i++) {
    u32 id = tid + i * THREADS;
    x_from[i] = row(min(id / X_PIECES, ROWS - 1)) + (u64)stage_from * ROW_BYTES + id % X_PIECES * 16;
  }
#pragma unroll
  for (int i = 0; i < WS; i++) {
    u32 id = tid + i * THREADS, p = min(id / W_PIECES, COLS - 1), in = id % W_PIECES;
    w_from[i] = panel(p) + (u64)stage_from * PANEL_BYTES + in * 16;
    w_to[i] = X_SPACE + p * PANEL_BYTES + piece_at(in);
  }
  auto load = [&](u32 slot) {
    u32 to = shared_at(shared) + slot * STAGE_SPACE;
#pragma unroll
    for (int i = 0; i < XS; i++) {
      u32 id = tid + i * THREADS;
      if (ROWS * X_PIECES % THREADS == 0 || id < ROWS * X_PIECES) copy16(to + id / X_PIECES * ROW_PITCH + id % X_PIECES * 16, x_from[i]);
      x_from[i] += ROW_BYTES;
    }
#pragma unroll
    for (int i = 0; i < WS; i++) {
      if (COLS * W_PIECES % THREADS == 0 || tid + i * THREADS < COLS * W_PIECES) copy16(to + w_to[i], w_from[i]);
      w_from[i] += PANEL_BYTES;
    }
  };
  for (u32 i = 0; i < STAGES - 1; i++) {
    if (i < stages) load(i);
    copies_end();
  }
  float* stack = (float*)(shared + STAGES * STAGE_SPACE) + warp * SUMS * 32 + lane_id();
  constexpr u32 LEVEL = ROWS / WARP_ROWS * COLS * SUMS * 32;
  const char* xs = shared + rg * WARP_ROWS * ROW_PITCH;
  bool wanted = rg * WARP_ROWS < count;
  const char* ws = shared + X_SPACE + col * PANEL_BYTES;
  float held[SUMS];
  float* s = &acc.s[0][0][0];
  u32 slot = 0, next = STAGES - 1, left = stages;
#pragma unroll 1
  for (u32 leaf = 0; leaf < leaves; leaf++) {
#pragma unroll
    for (int i = 0; i < SUMS; i++) s[i] = 0.0f;
    u32 here = min(left, LEAF_STAGES);
#pragma unroll 1
    for (u32 i = 0; i < here; i++) {
      copies_wait<STAGES - 2>();
      __syncthreads();
      if (left > STAGES - 1) load(next);
      copies_end();
      if (!wanted) {}
      else if constexpr (BLOCKS) stage_blocks(acc, xs + slot * STAGE_SPACE, ws + slot * STAGE_SPACE);
      else stage_floats(acc, xs + slot * STAGE_SPACE, ws + slot * STAGE_SPACE);
      left--;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      next = next + 1 == STAGES ? 0 : next + 1;
    }
    // Rule 1's tree: a single leaf waits in registers.
    bool last = leaf + 1 == leaves;
    if (leaf % 2 == 0 && !last) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) held[i] = s[i];
      continue;
    }
    int merged = merges(leaf, leaves);
    if (leaf % 2 == 1) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) s[i] = add(held[i], s[i]);
      merged--;
    }
    u32 top = __popc(leaf >> 1);
#pragma unroll 1
    for (; merged > 0; merged--) {
      top--;
#pragma unroll
      for (int i = 0; i < SUMS; i++) s[i] = add(stack[top * LEVEL + i * 32], s[i]);
    }
    if (!last) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) stack[top * LEVEL + i * 32] = s[i];
    }
  }
}

// gridDim.z blocks share a tile, each with as many leaves, a power of two; the last adds what the
// others left in parts: [tile][z][SUMS][threads].
template <int RG> DI void linear_tile(const float* x, u32 m, u32 k, const Linears& many, u32 adds, float* parts, u32* counters) {
  begin();
  extern __shared__ float4 memory[];
  Linear l = find(many, blockIdx.y);
  u32 panels = (l.n + 31) / 32, first = (blockIdx.y - l.first) * COLS, from = blockIdx.x * RG * 64;
  u64 panel_bytes = Format<FORMAT>::panel_bytes(k), row_bytes = (u64)Format<FORMAT>::row_words(k) * 4;
  u32 each = ((k + LEAF - 1) / LEAF + gridDim.z - 1) / gridDim.z;
  Sums acc;
  tile<RG>(k, [&](u32 r) { return (const char*)x + min(from + r, m - 1) * row_bytes; },
           [&](u32 p) { return l.w + min(first + p, panels - 1) * panel_bytes; }, acc, (char*)memory, m - from, blockIdx.z * each, each);
  if (gridDim.z > 1) {
    u32 id = blockIdx.y * gridDim.x + blockIdx.x;
    float* s = &acc.s[0][0][0];
    u32 threads = blockDim.x;
    float* part = parts + ((u64)id * gridDim.z * SUMS) * threads + threadIdx.x;
    float* own = part + (u64)blockIdx.z * SUMS * threads;
#pragma unroll
    for (int i = 0; i < SUMS; i++) own[i * threads] = s[i];
    if (!last_of(counters + id, gridDim.z)) return;
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
      float v[8];
#pragma unroll
      for (int z = 0; z < 8; z++) v[z] = z < gridDim.z ? __ldcg(part + (u64)(z * SUMS + i) * threads) : 0.0f;
#pragma unroll
      for (int d = 1; d < 8; d *= 2)
#pragma unroll
        for (int z = 0; z + d < 8; z += 2 * d)
          if (z + d < gridDim.z) v[z] = add(v[z], v[z + d]);
      s[i] = v[0];
    }
  }
  u32 panel = first + warp_id() % COLS, lane = lane_id(), j = panel * 32 + 8 * (lane % 4);
  u32 top = from + warp_id() / COLS * WARP_ROWS + lane / 4;
#pragma unroll
  for (int t = 0; t < MT; t++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 r = top + t * 16 + h * 8;
      if (r >= m) continue;
      float* y = l.y + (u64)r * l.n + j;
      if (l.n % 4 == 0 && j + 8 <= l.n && !l.bias) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float4 v = make_float4(acc.s[t][0][2 * h + i], acc.s[t][1][2 * h + i], acc.s[t][2][2 * h + i], acc.s[t][3][2 * h + i]);
          if (adds) {
            float4 o = ((float4*)y)[i];
            v = make_float4(add(o.x, v.x), add(o.y, v.y), add(o.z, v.z), add(o.w, v.w));
          }
          ((float4*)y)[i] = v;
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (j + i >= l.n) continue;
        float v = acc.s[t][i % 4][2 * h + i / 4];
        if (l.bias) v = add(v, l.bias[j + i]);
        y[i] = adds ? add(y[i], v) : v;
      }
    }
}

// Eight values of a row in each of four lanes: a block's record.
DI void quantise_quad(const float (&v)[8], u32* record) {
  u32 largest = 0, quarter = lane_id() % 4;
#pragma unroll
  for (int i = 0; i < 8; i++) largest = max(largest, bits(v[i]) & 0x7fffffffu);
  largest = max(largest, __shfl_xor_sync(FULL, largest, 1));
  largest = max(largest, __shfl_xor_sync(FULL, largest, 2));
  bool nothing = largest < (27u << 23), finite = largest < 0x7f800000u;
  float l = bits(largest), scale = nothing ? 0.0f : finite ? __fdiv_rn(l, 127.0f) : bits(NAN_BITS);
  float inverse = __fdiv_rn(127.0f, l);
  i32 q[8], sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    q[i] = !nothing && finite ? (i32)(bits(add(mul(v[i], inverse), MAGIC)) - (u32)MAGIC_BITS) : 0;
    sum += q[i];
  }
  sum += __shfl_xor_sync(FULL, sum, 1);
  sum += __shfl_xor_sync(FULL, sum, 2);
  if (record == nullptr) return;
#pragma unroll
  for (int h = 0; h < 2; h++)
    record[quarter * 2 + h] = ((u32)q[4 * h] & 255) | ((u32)q[4 * h + 1] & 255) << 8 | ((u32)q[4 * h + 2] & 255) << 16 | (u32)q[4 * h + 3] << 24;
  if (quarter == 0) record[8] = bits(scale);
  if (quarter == 1) record[9] = (u32)-sum;
}

// Two panels of gate and the same two of up: the warps of gate get what those of up have.
template <int RG> DI void gate_up_tile(const Expert* table, const Item* items, const u32* item_count, const u32* order, u32 per_row, const float* x, u32 n, u32 k, float* h) {
  begin();
  extern __shared__ float4 memory[];
  if (blockIdx.y >= *item_count) return;
  Item item = items[blockIdx.y];
  Expert e = table[item.expert];
  if (e.gate == nullptr) return;
  u32 panels = (n + 31) / 32, first = blockIdx.x * 2;
  u64 panel_bytes = Format<FORMAT>::panel_bytes(k), row_bytes = (u64)Format<FORMAT>::row_words(k) * 4;
  __shared__ u32 rows[RG * 64];
  for (u32 i = threadIdx.x; i < RG * 64; i += blockDim.x) rows[i] = order[item.first + min(i, item.count - 1)] / per_row;
  __syncthreads();
  Sums acc;
  tile<RG>(k, [&](u32 r) { return (const char*)x + rows[r] * row_bytes; },
           [&](u32 p) { return (p < 2 ? e.gate : e.up) + min(first + p % 2, panels - 1) * panel_bytes; }, acc, (char*)memory, item.count, 0, (k + LEAF - 1) / LEAF);
  u32 warp = warp_id(), lane = lane_id(), col = warp % COLS, rg = warp / COLS;
  float* s = &acc.s[0][0][0];
  float* swap = (float*)memory + (rg * 2 + col % 2) * SUMS * 32 + lane;
  __syncthreads();
  if (col >= 2) {
#pragma unroll
    for (int i = 0; i < SUMS; i++) swap[i * 32] = s[i];
  }
  __syncthreads();
  if (col >= 2) return;
  u32 panel = first + col, j = panel * 32 + 8 * (lane % 4);
  if (panel >= panels) return;
  u32 out_words = BLOCKS ? panels * RECORD : n;
#pragma unroll
  for (int t = 0; t < MT; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 r = rg * WARP_ROWS + t * 16 + half * 8 + lane / 4;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        int at = (t * 4 + i % 4) * 4 + 2 * half + i / 4;
        v[i] = j + i < n ? mul(swap[at * 32], silu(s[at])) : 0.0f;
      }
      float* to = h + (u64)(item.first + r) * out_words;
      if (BLOCKS) {
        quantise_quad(v, r < item.count ? (u32*)to + panel * RECORD : nullptr);
      } else if (r < item.count) {
#pragma unroll
        for (int i = 0; i < 8; i++) if (j + i < n) to[j + i] = v[i];
      }
    }
}

template <int RG> DI void down_tile(const Expert* table, const Item* items, const u32* item_count, const u32* order, const float* h, u32 n, u32 k, float* parts) {
  begin();
  extern __shared__ float4 memory[];
  if (blockIdx.y >= *item_count) return;
  Item item = items[blockIdx.y];
  Expert e = table[item.expert];
  if (e.down == nullptr) return;
  u32 panels = (n + 31) / 32, first = blockIdx.x * COLS;
  u64 panel_bytes = Format<FORMAT>::panel_bytes(k), row_bytes = (u64)Format<FORMAT>::row_words(k) * 4;
  Sums acc;
  tile<RG>(k, [&](u32 r) { return (const char*)h + (item.first + min(r, item.count - 1)) * row_bytes; },
           [&](u32 p) { return e.down + min(first + p, panels - 1) * panel_bytes; }, acc, (char*)memory, item.count, 0, (k + LEAF - 1) / LEAF);
  u32 lane = lane_id(), j = (first + warp_id() % COLS) * 32 + 8 * (lane % 4);
#pragma unroll
  for (int t = 0; t < MT; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 r = warp_id() / COLS * WARP_ROWS + t * 16 + half * 8 + lane / 4;
      if (r >= item.count) continue;
      float* y = parts + (u64)order[item.first + r] * n + j;
      if (n % 4 == 0 && j + 8 <= n) {
#pragma unroll
        for (int i = 0; i < 2; i++) ((float4*)y)[i] = make_float4(acc.s[t][0][2 * half + i], acc.s[t][1][2 * half + i], acc.s[t][2][2 * half + i], acc.s[t][3][2 * half + i]);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 8; i++) if (j + i < n) y[i] = acc.s[t][i % 4][2 * half + i / 4];
    }
}

#define TILES(RG) \
  ENTRY __launch_bounds__(RG * 128) linear_tile_##RG(const float* x, u32 m, u32 k, Linears many, u32 adds, float* parts, u32* counters) { linear_tile<RG>(x, m, k, many, adds, parts, counters); } \
  ENTRY __launch_bounds__(RG * 128) gate_up_tile_##RG(const Expert* t, const Item* i, const u32* c, const u32* o, u32 p, const float* x, u32 n, u32 k, float* h) { gate_up_tile<RG>(t, i, c, o, p, x, n, k, h); } \
  ENTRY __launch_bounds__(RG * 128) down_tile_##RG(const Expert* t, const Item* i, const u32* c, const u32* o, const float* h, u32 n, u32 k, float* y) { down_tile<RG>(t, i, c, o, h, n, k, y); }

TILES(1)
TILES(2)
