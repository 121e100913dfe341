// Products of many rows by `--math fast`, for prefills: a block computes 128 outputs (four panels) of
// 64 or 128 rows. K is whole 32s. Bits are those of product.cuh with FAST: the same instruction, the
// same k in each of its slots, leaves in rule 1's tree.
//
// A warp has two panels of 32 rows. Weights are the instruction's sixteen outputs: a panel's words are
// its registers as they lie. Single leaves wait in registers, larger subtrees in shared memory.

constexpr u32 STAGE_K = 64, STAGES = 3, LEAF_STAGES = LEAF / STAGE_K;
constexpr u32 WARP_ROWS = 32, COLS = 4;                 // rows of a warp, panels of a block
constexpr u32 X_BYTES = STAGE_K * 2, PANEL_BYTES = STAGE_K * 64;
constexpr int SUMS = 64;                                // of a thread

// Of a warp's two panels, two sixteens of outputs and four times eight rows: s[p][h][n][0] and [1] are
// output 16h + 2 (lane / 4) of rows 8n + 2 (lane % 4) and the next, [2] and [3] the output after it.
struct Sums { float s[2][2][4][4]; };

// Where a piece of 16 bytes lies in its row of 128: what a warp reads at once is spread over all banks.
DI u32 x_at(u32 row, u32 piece) { return row * X_BYTES + (piece ^ (row & 7)) * 16; }
DI u32 w_at(u32 row, u32 piece) { return row * 128 + (piece ^ 2 * (row & 3)) * 16; }

DI void step_sums(Sums& acc, const char* x, const char* w, u32 step) {
  u32 lane = lane_id(), t = lane % 4, g = lane / 4;
  u32 b[4][2];
#pragma unroll
  for (u32 h = 0; h < 2; h++)
    four_matrices(b[2 * h][0], b[2 * h][1], b[2 * h + 1][0], b[2 * h + 1][1], x + x_at(h * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
  for (u32 p = 0; p < 2; p++)
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
      // Pairs of words, so that they are loaded to where the instruction wants them.
      const char* at = w + p * PANEL_BYTES + g % 2 * 8;
      uint2 lo = *(const uint2*)(at + w_at(step * 8 + t, h * 4 + g / 2)), hi = *(const uint2*)(at + w_at(step * 8 + 4 + t, h * 4 + g / 2));
#pragma unroll
      for (u32 n = 0; n < 4; n++) dots16(acc.s[p][h][n], lo.x, lo.y, hi.x, hi.y, b[n][0], b[n][1]);
    }
}

// RG times 32 rows, of which `count` are wanted. row(i) is where row i of x begins, panel(i) where panel
// i of four; warps of column c have panels 2c and 2c + 1.
template <u32 RG, class Row, class Panel> DI void tile(u32 k, Row row, Panel panel, Sums& acc, char* shared, u32 count) {
  constexpr u32 ROWS = RG * WARP_ROWS, THREADS = RG * 64;
  constexpr u32 X_SPACE = ROWS * X_BYTES, STAGE_SPACE = X_SPACE + COLS * PANEL_BYTES;
  constexpr u32 XS = ROWS * 8 / THREADS, WS = COLS * (PANEL_BYTES / 16) / THREADS;
  u32 tid = threadIdx.x, warp = warp_id(), rg = warp / 2, col = warp % 2;
  u32 stages = (k + STAGE_K - 1) / STAGE_K, leaves = (k + LEAF - 1) / LEAF;
  // The pieces that this thread copies of every stage; a last stage may be a half.
  const char* x_from[XS];
  const char* w_from[WS];
#pragma unroll
  for (u32 i = 0; i < XS; i++) { u32 id = tid + i * THREADS; x_from[i] = row(id / 8) + id % 8 * 16; }
#pragma unroll
  for (u32 i = 0; i < WS; i++) { u32 id = tid + i * THREADS; w_from[i] = panel(id / 256) + id % 256 * 16; }
  u32 filled = 0;
  auto load = [&](u32 slot) {
    u32 to = shared_at(shared) + slot * STAGE_SPACE, rest = k - filled * STAGE_K;
#pragma unroll
    for (u32 i = 0; i < XS; i++) {
      u32 id = tid + i * THREADS;
      if (id % 8 * 8 < rest) copy16(to + x_at(id / 8, id % 8), x_from[i]);
      x_from[i] += X_BYTES;
    }
#pragma unroll
    for (u32 i = 0; i < WS; i++) {
      u32 id = tid + i * THREADS, in = id % 256;
      if (in / 8 * 2 < rest) copy16(to + X_SPACE + id / 256 * PANEL_BYTES + w_at(in / 8, in % 8), w_from[i]);
      w_from[i] += PANEL_BYTES;
    }
    filled++;
  };
  for (u32 i = 0; i < STAGES - 1; i++) {
    if (filled < stages) load(i);
    copies_end();
  }
  float* stack = (float*)(shared + STAGES * STAGE_SPACE) + tid;
  constexpr u32 LEVEL = SUMS * THREADS;
  const char* xs = shared + rg * WARP_ROWS * X_BYTES;
  const char* ws = shared + X_SPACE + col * 2 * PANEL_BYTES;
  bool wanted = rg * WARP_ROWS < count;
  float held[SUMS];
  float* s = &acc.s[0][0][0][0];
  u32 slot = 0, next = STAGES - 1, k_left = k;
#pragma unroll 1
  for (u32 leaf = 0; leaf < leaves; leaf++) {
#pragma unroll
    for (int i = 0; i < SUMS; i++) s[i] = 0.0f;
    u32 here = min(LEAF_STAGES, (k_left + STAGE_K - 1) / STAGE_K);
#pragma unroll 1
    for (u32 i = 0; i < here; i++) {
      copies_wait<STAGES - 2>();
      __syncthreads();
      if (filled < stages) load(next);
      copies_end();
      const char* x = xs + slot * STAGE_SPACE;
      const char* w = ws + slot * STAGE_SPACE;
      if (wanted) {
        step_sums(acc, x, w, 0);
        step_sums(acc, x, w, 1);
        if (k_left > 32) {
          step_sums(acc, x, w, 2);
          step_sums(acc, x, w, 3);
        }
      }
      k_left -= min(k_left, STAGE_K);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      next = next + 1 == STAGES ? 0 : next + 1;
    }
    // Rule 1's tree.
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
      for (int i = 0; i < SUMS; i++) s[i] = add(stack[top * LEVEL + i * THREADS], s[i]);
    }
    if (!last) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) stack[top * LEVEL + i * THREADS] = s[i];
    }
  }
}

// Calls put(row, output of the block, its sum, the next one's).
template <class Put> DI void each_sum(const Sums& acc, Put put) {
  u32 warp = warp_id(), row = warp / 2 * WARP_ROWS + lane_id() % 4 * 2, j = warp % 2 * 64 + lane_id() / 4 * 2;
#pragma unroll
  for (u32 p = 0; p < 2; p++)
#pragma unroll
    for (u32 h = 0; h < 2; h++)
#pragma unroll
      for (u32 n = 0; n < 8; n++) {
        const float* s = acc.s[p][h][n / 2] + n % 2;
        put(row + n / 2 * 8 + n % 2, j + p * 32 + h * 16, s[0], s[2]);
      }
}

template <u32 RG> DI void linear_tile(const u32* x, u32 m, u32 k, const Linears& many, u32 adds) {
  begin();
  extern __shared__ float4 memory[];
  Linear l = find(many, blockIdx.y);
  u32 panels = (l.n + 31) / 32, first = (blockIdx.y - l.first) * COLS, from = blockIdx.x * RG * WARP_ROWS;
  u64 panel_bytes = Format<FAST>::panel_bytes(k);
  Sums acc;
  tile<RG>(k, [&](u32 r) { return (const char*)(x + (u64)min(from + r, m - 1) * (k / 2)); },
           [&](u32 p) { return l.w + min(first + p, panels - 1) * panel_bytes; }, acc, (char*)memory, m - from);
  each_sum(acc, [&](u32 r, u32 out, float a, float b) {
    u32 j = first * 32 + out;
    if (from + r >= m || j >= l.n) return;
    float* y = l.y + (u64)(from + r) * l.n + j;
    if (l.n % 2 == 0) {
      if (l.bias) { a = add(a, l.bias[j]); b = add(b, l.bias[j + 1]); }
      float2* to = (float2*)y;
      if (adds) { a = add(to->x, a); b = add(to->y, b); }
      *to = make_float2(a, b);
      return;
    }
    if (l.bias) a = add(a, l.bias[j]);
    y[0] = adds ? add(y[0], a) : a;
    if (j + 1 >= l.n) return;
    if (l.bias) b = add(b, l.bias[j + 1]);
    y[1] = adds ? add(y[1], b) : b;
  });
}

// A warp has a panel of gate and the same of up.
template <u32 RG> DI void gate_up_tile(const Expert* table, const Item* items, const u32* item_count, const u32* order, u32 per_row, const u32* x, u32 n, u32 k, u32* h) {
  begin();
  extern __shared__ float4 memory[];
  if (blockIdx.y >= *item_count) return;
  Item item = items[blockIdx.y];
  Expert e = table[item.expert];
  if (e.gate == nullptr) return;
  u32 panels = (n + 31) / 32, first = blockIdx.x * 2;
  u64 panel_bytes = Format<FAST>::panel_bytes(k);
  Sums acc;
  tile<RG>(k, [&](u32 r) { return (const char*)(x + (u64)(order[item.first + min(r, item.count - 1)] / per_row) * (k / 2)); },
           [&](u32 p) { return (p % 2 ? e.up : e.gate) + min(first + p / 2, panels - 1) * panel_bytes; }, acc, (char*)memory, item.count);
  u32 warp = warp_id(), words = (n + 1) / 2;
#pragma unroll
  for (u32 half = 0; half < 2; half++)
#pragma unroll
    for (u32 t = 0; t < 8; t++) {
      u32 r = warp / 2 * WARP_ROWS + t / 2 * 8 + lane_id() % 4 * 2 + t % 2, j = (first + warp % 2) * 32 + half * 16 + lane_id() / 4 * 2;
      if (r >= item.count || j >= n) continue;
      const float* gate = acc.s[0][half][t / 2] + t % 2;
      const float* up = acc.s[1][half][t / 2] + t % 2;
      float a = mul(up[0], silu(gate[0])), b = j + 1 < n ? mul(up[2], silu(gate[2])) : 0.0f;
      h[(u64)(item.first + r) * words + j / 2] = bf16_pair(a, b);
    }
}

template <u32 RG> DI void down_tile(const Expert* table, const Item* items, const u32* item_count, const u32* order, const u32* h, u32 n, u32 k, float* parts) {
  begin();
  extern __shared__ float4 memory[];
  if (blockIdx.y >= *item_count) return;
  Item item = items[blockIdx.y];
  Expert e = table[item.expert];
  if (e.down == nullptr) return;
  u32 panels = (n + 31) / 32, first = blockIdx.x * COLS;
  u64 panel_bytes = Format<FAST>::panel_bytes(k);
  Sums acc;
  tile<RG>(k, [&](u32 r) { return (const char*)(h + (u64)(item.first + min(r, item.count - 1)) * (k / 2)); },
           [&](u32 p) { return e.down + min(first + p, panels - 1) * panel_bytes; }, acc, (char*)memory, item.count);
  each_sum(acc, [&](u32 r, u32 out, float a, float b) {
    u32 j = first * 32 + out;
    if (r >= item.count || j >= n) return;
    float* y = parts + (u64)order[item.first + r] * n + j;
    if (n % 2 == 0) { *(float2*)y = make_float2(a, b); return; }
    y[0] = a;
    if (j + 1 < n) y[1] = b;
  });
}

// Named by 64s of rows.
#define TILES(NAME, RG) \
  ENTRY __launch_bounds__(RG * 64, 1) linear_tile_##NAME(const u32* x, u32 m, u32 k, Linears many, u32 adds) { linear_tile<RG>(x, m, k, many, adds); } \
  ENTRY __launch_bounds__(RG * 64, 1) gate_up_tile_##NAME(const Expert* t, const Item* i, const u32* c, const u32* o, u32 p, const u32* x, u32 n, u32 k, u32* h) { gate_up_tile<RG>(t, i, c, o, p, x, n, k, h); } \
  ENTRY __launch_bounds__(RG * 64, 1) down_tile_##NAME(const Expert* t, const Item* i, const u32* c, const u32* o, const u32* h, u32 n, u32 k, float* y) { down_tile<RG>(t, i, c, o, h, n, k, y); }

TILES(1, 2)
TILES(2, 4)
