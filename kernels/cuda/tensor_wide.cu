// The tiles of tensor.cu by Hopper's instruction for four warps (`wgmma`): weights from registers, rows of
// x from shared memory as they lie there. Whether its sums inside sixteen k have the bits of the smaller
// instruction is for check.sh to say; until it has, nobody takes these kernels but for measuring.
//
// A block of two times four warps computes 128 outputs (four panels) of 64 or 128 rows: four warps have two
// panels, each warp sixteen outputs and all rows.

constexpr u32 STAGE_K = 64, STAGES = 3, LEAF_STAGES = LEAF / STAGE_K, COLS = 4, THREADS = 256;
constexpr u32 X_BYTES = STAGE_K * 2, PANEL_BYTES = STAGE_K * 64;

// Where a piece of 16 bytes lies in its row of 128; for x that is the layout that the instruction reads.
DI u32 x_at(u32 row, u32 piece) { return row * X_BYTES + (piece ^ (row & 7)) * 16; }
DI u32 w_at(u32 row, u32 piece) { return row * 128 + (piece ^ 2 * (row & 3)) * 16; }

// What says where rows of x lie: 128 bytes each, pieces swapped by x_at, eight rows being 1024 bytes. `at`
// is at whole 1024 but for the k that is read first.
DI u64 rows_at(u32 at) { return (u64)(at & 0x3ffff) >> 4 | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62; }

#if __CUDA_ARCH__ >= 900
// Before the first of some, when registers that they use have been written otherwise.
DI void wide_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DI void wide_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DI void wide_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
DI void wide_sum(float& s) { asm volatile("" : "+f"(s)::"memory"); }
// What was written to shared memory can be read by the instruction after the next barrier.
DI void wide_show() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#define F8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
// d = a · b (+ d where `adds`): sixteen outputs of each of four warps, sixteen k, 64 or 128 rows.
DI void wide_dots(float (&d)[32], const u32 (&a)[4], u64 b, u32 adds) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "{%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
      : F8(0), F8(8), F8(16), F8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}
DI void wide_dots(float (&d)[64], const u32 (&a)[4], u64 b, u32 adds) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "{%64,%65,%66,%67}, %68, p, 1, 1, 0;\n}"
      : F8(0), F8(8), F8(16), F8(24), F8(32), F8(40), F8(48), F8(56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}
#else
// Never launched there.
DI void wide_begin() {}
DI void wide_end() {}
DI void wide_wait() {}
DI void wide_show() {}
DI void wide_sum(float&) {}
template <int N> DI void wide_dots(float (&)[N], const u32 (&)[4], u64, u32) {}
#endif

// s[4n] and the next are output 2 (lane / 4) of a warp's sixteen for rows 8n + 2 (lane % 4) and the next, s[4n + 2]
// and the next are the output after it. row(i), panel(i) as in tensor.cu; `shared` is at whole 1024.
template <u32 ROWS, class Row, class Panel> DI void tile(u32 k, Row row, Panel panel, float (&s)[ROWS / 2], char* shared) {
  constexpr u32 X_SPACE = ROWS * X_BYTES, STAGE_SPACE = X_SPACE + COLS * PANEL_BYTES, SUMS = ROWS / 2;
  constexpr u32 XS = ROWS * 8 / THREADS, WS = COLS * (PANEL_BYTES / 16) / THREADS;
  u32 tid = threadIdx.x, warp = warp_id(), t = lane_id() % 4, g = lane_id() / 4;
  u32 stages = (k + STAGE_K - 1) / STAGE_K, leaves = (k + LEAF - 1) / LEAF;
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
  // Two warps share a panel.
  const char* ws = shared + X_SPACE + warp / 2 * PANEL_BYTES + g % 2 * 8;
  u32 piece = warp % 2 * 4 + g / 2;
  float held[SUMS];
  u32 slot = 0, next = STAGES - 1, k_left = k;
#pragma unroll 1
  for (u32 leaf = 0; leaf < leaves; leaf++) {
    u32 here = min(LEAF_STAGES, (k_left + STAGE_K - 1) / STAGE_K);
#pragma unroll 1
    for (u32 i = 0; i < here; i++) {
      copies_wait<STAGES - 2>();
      wide_show();
      __syncthreads();
      const char* w = ws + slot * STAGE_SPACE;
      u32 x = shared_at(shared) + slot * STAGE_SPACE;
      u32 a[4][4];
#pragma unroll
      for (u32 step = 0; step < 4; step++) {
        uint2 lo = *(const uint2*)(w + w_at(step * 8 + t, piece)), hi = *(const uint2*)(w + w_at(step * 8 + 4 + t, piece));
        a[step][0] = lo.x; a[step][1] = lo.y; a[step][2] = hi.x; a[step][3] = hi.y;
      }
      wide_begin();
      // One after the other, without a branch between them.
      if (k_left > 32) {
        wide_dots(s, a[0], rows_at(x), i > 0);
        wide_dots(s, a[1], rows_at(x + 32), 1);
        wide_dots(s, a[2], rows_at(x + 64), 1);
        wide_dots(s, a[3], rows_at(x + 96), 1);
      } else {
        wide_dots(s, a[0], rows_at(x), i > 0);
        wide_dots(s, a[1], rows_at(x + 32), 1);
      }
      wide_end();
      // All have read what is overwritten now: they waited for their sums before the barrier.
      if (filled < stages) load(next);
      copies_end();
      wide_wait();
      // Sums are not looked at before.
#pragma unroll
      for (u32 j = 0; j < SUMS; j++) wide_sum(s[j]);
      k_left -= min(k_left, STAGE_K);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      next = next + 1 == STAGES ? 0 : next + 1;
    }
    // Rule 1's tree.
    bool last = leaf + 1 == leaves;
    if (leaf % 2 == 0 && !last) {
#pragma unroll
      for (u32 i = 0; i < SUMS; i++) held[i] = s[i];
      continue;
    }
    int merged = merges(leaf, leaves);
    if (leaf % 2 == 1) {
#pragma unroll
      for (u32 i = 0; i < SUMS; i++) s[i] = add(held[i], s[i]);
      merged--;
    }
    u32 top = __popc(leaf >> 1);
#pragma unroll 1
    for (; merged > 0; merged--) {
      top--;
#pragma unroll
      for (u32 i = 0; i < SUMS; i++) s[i] = add(stack[top * LEVEL + i * THREADS], s[i]);
    }
    if (!last) {
#pragma unroll
      for (u32 i = 0; i < SUMS; i++) stack[top * LEVEL + i * THREADS] = s[i];
    }
  }
}

DI char* whole_kib(void* memory) { return (char*)memory + (0u - shared_at(memory) & 1023); }

// Calls put(row, output of the block, its sum, the next one's).
template <u32 ROWS, class Put> DI void each_sum(const float (&s)[ROWS / 2], Put put) {
#pragma unroll
  for (u32 n = 0; n < ROWS / 4; n++) put(n / 2 * 8 + lane_id() % 4 * 2 + n % 2, warp_id() * 16 + lane_id() / 4 * 2, s[n / 2 * 4 + n % 2], s[n / 2 * 4 + 2 + n % 2]);
}

template <u32 ROWS> DI void linear_tile(const u32* x, u32 m, u32 k, const Linears& many, u32 adds) {
  begin();
  extern __shared__ float4 memory[];
  Linear l = find(many, blockIdx.y);
  u32 panels = (l.n + 31) / 32, first = (blockIdx.y - l.first) * COLS, from = blockIdx.x * ROWS;
  u64 panel_bytes = Format<FAST>::panel_bytes(k);
  float s[ROWS / 2];
  tile<ROWS>(k, [&](u32 r) { return (const char*)(x + (u64)min(from + r, m - 1) * (k / 2)); },
             [&](u32 p) { return l.w + min(first + p, panels - 1) * panel_bytes; }, s, whole_kib(memory));
  each_sum<ROWS>(s, [&](u32 r, u32 out, float a, float b) {
    u32 j = first * 32 + out;
    if (from + r >= m || j >= l.n) return;
    float* y = l.y + (u64)(from + r) * l.n + j;
    if (l.bias) a = add(a, l.bias[j]);
    y[0] = adds ? add(y[0], a) : a;
    if (j + 1 >= l.n) return;
    if (l.bias) b = add(b, l.bias[j + 1]);
    y[1] = adds ? add(y[1], b) : b;
  });
}

// Two panels of gate and the same two of up: the warps of gate get what those of up have.
template <u32 ROWS> DI void gate_up_tile(const Expert* table, const Item* items, const u32* item_count, const u32* order, u32 per_row, const u32* x, u32 n, u32 k, u32* h) {
  begin();
  extern __shared__ float4 memory[];
  if (blockIdx.y >= *item_count) return;
  Item item = items[blockIdx.y];
  Expert e = table[item.expert];
  if (e.gate == nullptr) return;
  u32 panels = (n + 31) / 32, first = blockIdx.x * 2;
  u64 panel_bytes = Format<FAST>::panel_bytes(k);
  float s[ROWS / 2];
  char* shared = whole_kib(memory);
  tile<ROWS>(k, [&](u32 r) { return (const char*)(x + (u64)(order[item.first + min(r, item.count - 1)] / per_row) * (k / 2)); },
             [&](u32 p) { return (p < 2 ? e.gate : e.up) + min(first + p % 2, panels - 1) * panel_bytes; }, s, shared);
  float* swap = (float*)shared + threadIdx.x % 128;
  __syncthreads();
  if (warp_id() >= 4) {
#pragma unroll
    for (u32 i = 0; i < ROWS / 2; i++) swap[i * 128] = s[i];
  }
  __syncthreads();
  if (warp_id() >= 4) return;
  u32 words = (n + 1) / 2;
#pragma unroll
  for (u32 t = 0; t < ROWS / 4; t++) {
    u32 r = t / 2 * 8 + lane_id() % 4 * 2 + t % 2, j = first * 32 + warp_id() * 16 + lane_id() / 4 * 2, at = t / 2 * 4 + t % 2;
    if (r >= item.count || j >= n) continue;
    float a = mul(swap[at * 128], silu(s[at])), b = j + 1 < n ? mul(swap[(at + 2) * 128], silu(s[at + 2])) : 0.0f;
    h[(u64)(item.first + r) * words + j / 2] = bf16_pair(a, b);
  }
}

template <u32 ROWS> DI void down_tile(const Expert* table, const Item* items, const u32* item_count, const u32* order, const u32* h, u32 n, u32 k, float* parts) {
  begin();
  extern __shared__ float4 memory[];
  if (blockIdx.y >= *item_count) return;
  Item item = items[blockIdx.y];
  Expert e = table[item.expert];
  if (e.down == nullptr) return;
  u32 panels = (n + 31) / 32, first = blockIdx.x * COLS;
  u64 panel_bytes = Format<FAST>::panel_bytes(k);
  float s[ROWS / 2];
  tile<ROWS>(k, [&](u32 r) { return (const char*)(h + (u64)(item.first + min(r, item.count - 1)) * (k / 2)); },
             [&](u32 p) { return e.down + min(first + p, panels - 1) * panel_bytes; }, s, whole_kib(memory));
  each_sum<ROWS>(s, [&](u32 r, u32 out, float a, float b) {
    u32 j = first * 32 + out;
    if (r >= item.count || j >= n) return;
    float* y = parts + (u64)order[item.first + r] * n + j;
    if (n % 2 == 0) { *(float2*)y = make_float2(a, b); return; }
    y[0] = a;
    if (j + 1 < n) y[1] = b;
  });
}

// Named by 64s of rows.
#define TILES(NAME, ROWS) \
  ENTRY __launch_bounds__(THREADS, 1) linear_tile_##NAME(const u32* x, u32 m, u32 k, Linears many, u32 adds) { linear_tile<ROWS>(x, m, k, many, adds); } \
  ENTRY __launch_bounds__(THREADS, 1) gate_up_tile_##NAME(const Expert* t, const Item* i, const u32* c, const u32* o, u32 p, const u32* x, u32 n, u32 k, u32* h) { gate_up_tile<ROWS>(t, i, c, o, p, x, n, k, h); } \
  ENTRY __launch_bounds__(THREADS, 1) down_tile_##NAME(const Expert* t, const Item* i, const u32* c, const u32* o, const u32* h, u32 n, u32 k, float* y) { down_tile<ROWS>(t, i, c, o, h, n, k, y); }

TILES(1, 64)
TILES(2, 128)
