// out = x · wᵀ (+ bias) (+ out), several matrices over the same rows at once.
// CPU truth: kernels/src/ops/matmul.rs. x: rows of f32 [m, k], or of records for blocks.

template <int F, int T, int RM>
DI void linear(const float* x, const u32* rows, u32 m, u32 k, const Linears& many, u32 adds) {
  // Blocks of the same panels follow each other: they read the same weights.
  begin();
  extern __shared__ float4 memory[];
  Linear l = find(many, blockIdx.y);
  u32 leaves = k == 0 ? 1 : (k + LEAF - 1) / LEAF, groups = 8 / leaf_warps(leaves);
  u32 group = warp_id() / leaf_warps(leaves), panels = (l.n + 31) / 32;
  u32 base = (blockIdx.y - l.first) * groups * T;
  u64 panel_bytes = Format<F>::panel_bytes(k);
  const char* w[T];
#pragma unroll
  for (int t = 0; t < T; t++) {
    u32 panel = base + group * T + t;
    w[t] = panel < panels ? l.w + panel * panel_bytes : nullptr;
  }
  u32 from = blockIdx.x * RM;
  int count = min(m - from, (u32)RM);
  u32 words = Format<F>::row_words(k);
  auto row = [&](int r) { u32 i = from + r; return x + (u64)(rows ? rows[i] : i) * words; };
  product<F, T, 1, RM, false>(w, k, count, row, (float*)memory, [&](u32 g, u32 r, u32 u, u32 lane, float (&sum)[1]) {
    u32 j = (base + g * T + u) * 32 + lane;
    if (j >= l.n) return;
    float v = l.bias ? add(sum[0], l.bias[j]) : sum[0];
    float* y = l.y + (u64)(from + r) * l.n + j;
    *y = adds ? add(*y, v) : v;
  });
}

#define LINEAR(NAME, T, RM) \
  ENTRY __launch_bounds__(256, 2) NAME(const float* x, const u32* rows, u32 m, u32 k, Linears many, u32 adds) { linear<FORMAT, T, RM>(x, rows, m, k, many, adds); }

LINEAR(linear_1x1, 1, 1)
LINEAR(linear_4x1, 4, 1)
LINEAR(linear_1x4, 1, 4)
LINEAR(linear_4x4, 4, 4)
LINEAR(linear_2x8, 2, 8)
LINEAR(linear_4x8, 4, 8)
