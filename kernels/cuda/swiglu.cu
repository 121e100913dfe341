// Gated feed-forward networks, many at once: down( silu(gate·x) * (up·x) ), in two launches.
// CPU truth: kernels/src/ops/swiglu.rs.
//
// Experts are found through a device table; a null entry is absent, and its routes are left to
// others. An item is some consecutive entries of `order`, all of one expert: order[i] is a route,
// route / k its row of x. h lies in the order of items, parts in the order of routes.

template <int F, int TG, int RM>
DI void gate_up(const Expert* table, const Item* items, const u32* item_count, const u32* order, u32 per_row, const float* x, u32 n, u32 k, float* h) {
  begin();
  extern __shared__ float4 memory[];
  if (blockIdx.y >= *item_count) return;
  Item item = items[blockIdx.y];
  Expert e = table[item.expert];
  if (e.gate == nullptr) return;
  u32 leaves = k == 0 ? 1 : (k + LEAF - 1) / LEAF, groups = 8 / leaf_warps(leaves);
  u32 group = warp_id() / leaf_warps(leaves), panels = (n + 31) / 32, base = blockIdx.x * groups * TG;
  u64 panel_bytes = Format<F>::panel_bytes(k);
  const char* w[2 * TG];
#pragma unroll
  for (int t = 0; t < TG; t++) {
    u32 panel = base + group * TG + t;
    w[t] = panel < panels ? e.gate + panel * panel_bytes : nullptr;
    w[TG + t] = panel < panels ? e.up + panel * panel_bytes : nullptr;
  }
  u32 words = Format<F>::row_words(k), out_words = Format<F>::row_words(n);
  auto row = [&](int r) { return x + (u64)(order[item.first + r] / per_row) * words; };
  product<F, 2 * TG, 2, RM, true>(w, k, item.count, row, (float*)memory, [&](u32 g, u32 r, u32 u, u32 lane, float (&sum)[2]) {
    u32 panel = base + g * TG + u, j = panel * 32 + lane;
    if (panel >= panels) return;
    float v = mul(sum[1], silu(sum[0]));
    float* to = h + (u64)(item.first + r) * out_words;
    if (Format<F>::BLOCKS) quantise_block(j < n ? v : 0.0f, (u32*)to + panel * RECORD);
    else if (F == FAST) keep_pair(j < n ? v : 0.0f, j < n, (u32*)to + j / 2);
    else if (j < n) to[j] = v;
  });
}

template <int F, int T, int RM>
DI void down(const Expert* table, const Item* items, const u32* item_count, const u32* order, const float* h, u32 n, u32 k, float* parts) {
  begin();
  extern __shared__ float4 memory[];
  if (blockIdx.y >= *item_count) return;
  Item item = items[blockIdx.y];
  Expert e = table[item.expert];
  if (e.down == nullptr) return;
  u32 leaves = k == 0 ? 1 : (k + LEAF - 1) / LEAF, groups = 8 / leaf_warps(leaves);
  u32 group = warp_id() / leaf_warps(leaves), panels = (n + 31) / 32, base = blockIdx.x * groups * T;
  u64 panel_bytes = Format<F>::panel_bytes(k);
  const char* w[T];
#pragma unroll
  for (int t = 0; t < T; t++) {
    u32 panel = base + group * T + t;
    w[t] = panel < panels ? e.down + panel * panel_bytes : nullptr;
  }
  u32 words = Format<F>::row_words(k);
  auto row = [&](int r) { return h + (u64)(item.first + r) * words; };
  product<F, T, 1, RM, true>(w, k, item.count, row, (float*)memory, [&](u32 g, u32 r, u32 u, u32 lane, float (&sum)[1]) {
    u32 j = (base + g * T + u) * 32 + lane;
    if (j < n) parts[(u64)order[item.first + r] * n + j] = sum[0];
  });
}

#define NETWORK(RM, TG, BLOCKS_EACH) \
  ENTRY __launch_bounds__(256, BLOCKS_EACH) gate_up_##RM(const Expert* t, const Item* i, const u32* c, const u32* o, u32 p, const float* x, u32 n, u32 k, float* h) { gate_up<FORMAT, TG, RM>(t, i, c, o, p, x, n, k, h); } \
  ENTRY __launch_bounds__(256, BLOCKS_EACH) down_##RM(const Expert* t, const Item* i, const u32* c, const u32* o, const float* h, u32 n, u32 k, float* y) { down<FORMAT, 2 * TG, RM>(t, i, c, o, h, n, k, y); }

NETWORK(1, 1, 2)
NETWORK(4, 1, 2)
NETWORK(8, 2, 2)
NETWORK(16, 2, 1)
