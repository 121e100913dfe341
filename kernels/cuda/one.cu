// Products of a single row, where all that counts is that memory never waits: a warp reads one leaf
// of a panel through a ring of bulk copies, a block of eight warps joins the leaves. Weights that
// are known beforehand are on their way before the kernel before this one has ended.
// CPU truth: kernels/src/ops/{matmul,norm,swiglu}.rs, kernels/src/blocks.rs. Whole leaves only, and
// at most eight, or sixteen without a norm; all else is for matmul.cu and swiglu.cu.

#define FORMAT_OF Format<FORMAT>
constexpr int CHUNK_K = FORMAT == F32 || FORMAT == BF16 || FORMAT == FAST ? 32 : FORMAT == INT4 ? 128 : 64;
constexpr int CHUNKS = LEAF / CHUNK_K;                      // of a leaf
constexpr int CHUNK_BYTES = FORMAT_OF::LEAF_BYTES / CHUNKS;
constexpr bool BLOCKS = FORMAT_OF::BLOCKS;
constexpr bool OWN_ROWS = BLOCKS || FORMAT == FAST;         // products read something else than f32
constexpr int ROW = FORMAT_OF::X;                           // words of a leaf of x

// Shared memory: the ring of each warp, its barriers, then x.
struct Shared {
  char* ring;     // this warp's: [depth][CHUNK_BYTES]
  u64* barriers;  // this warp's: [depth]
  float* x;       // [8][LEAF], as it comes and normed
  float* rows;    // [8][ROW], what products read
  float* sums;    // [8][2][32]
  float* few;     // 8 values
};
DI Shared shared_of(u32 depth, u32 rings = 8) {
  extern __shared__ float4 memory[];
  char* base = (char*)memory;
  Shared s;
  u32 ring = rings == 1 ? 0 : warp_id();
  s.ring = base + ring * depth * CHUNK_BYTES;
  s.barriers = (u64*)(base + rings * depth * CHUNK_BYTES) + ring * depth;
  s.x = (float*)(base + rings * depth * (CHUNK_BYTES + 8));
  s.rows = OWN_ROWS ? s.x + 8 * LEAF : s.x;
  s.sums = s.rows + 8 * ROW;
  s.few = s.sums + 8 * 2 * 32;
  return s;
}

// A warp's leaf of T panels, one after the other, chunk by chunk through its ring.
template <int T> struct Stream {
  const char* w[T];
  u32 depth, next;

  DI void ask(const Shared& s) {
    u32 slot = next & (depth - 1), in = next % CHUNKS;
    const char* from = next < CHUNKS ? w[0] : w[T - 1];
    barrier_expect(s.barriers + slot, CHUNK_BYTES);
    bulk_copy(s.ring + slot * CHUNK_BYTES, from + in * CHUNK_BYTES, CHUNK_BYTES, s.barriers + slot);
    next++;
  }
  // By lane 0: barriers, and as many chunks as there is room for.
  DI void fill(const Shared& s) {
    next = 0;
    for (u32 i = 0; i < depth; i++) barrier_init(s.barriers + i);
    barriers_made();
    for (u32 i = 0; i < depth && next < T * CHUNKS; i++) ask(s);
  }
};

DI float chunk_sum(float acc, const u32* p, const float* x) {
  u32 lane = lane_id();
  if constexpr (FORMAT == BF16) {
#pragma unroll
    for (int i = 0; i < CHUNK_K / 4; i++) {
      u32 a = p[i * 64 + lane], b = p[i * 64 + 32 + lane];
      float4 v = ((const float4*)x)[i];
      acc = fma(v.x, low(a), acc);
      acc = fma(v.y, high(a), acc);
      acc = fma(v.z, low(b), acc);
      acc = fma(v.w, high(b), acc);
    }
  } else if constexpr (FORMAT == F32) {
#pragma unroll
    for (int i = 0; i < CHUNK_K / 4; i++) {
      float4 v = ((const float4*)x)[i];
      acc = fma(v.x, bits(p[i * 128 + lane]), acc);
      acc = fma(v.y, bits(p[i * 128 + 32 + lane]), acc);
      acc = fma(v.z, bits(p[i * 128 + 64 + lane]), acc);
      acc = fma(v.w, bits(p[i * 128 + 96 + lane]), acc);
    }
  } else {
    constexpr int W = FORMAT_OF::WORDS;
#pragma unroll
    for (int b = 0; b < CHUNK_K / 32; b++) {
      const u32* block = p + b * (FORMAT_OF::BLOCK_BYTES / 4);
      u32 v[W], q[8], scales = block[lane % 16];
#pragma unroll
      for (int i = 0; i < W; i++) v[i] = block[16 + i * 32 + lane];
      open<FORMAT>(v, q);
      const u32* at = (const u32*)x + b * 12;
      uint4 a = *(const uint4*)at, c = *(const uint4*)(at + 4);
      uint2 s = *(const uint2*)(at + 8);
      i32 d = (i32)s.y * FORMAT_OF::OFFSET + MAGIC_BITS, e = 0;
      d = dp4a(q[0], a.x, d);
      e = dp4a(q[1], a.y, e);
      d = dp4a(q[2], a.z, d);
      e = dp4a(q[3], a.w, e);
      d = dp4a(q[4], c.x, d);
      e = dp4a(q[5], c.y, e);
      d = dp4a(q[6], c.z, d);
      e = dp4a(q[7], c.w, e);
      acc = fma(add(bits((u32)(d + e)), -MAGIC), mul(lane < 16 ? low(scales) : high(scales), bits(s.x)), acc);
    }
  }
  return acc;
}

// This lane's output of the first of eight rows.
DI float first_row(const Fast& acc) {
  u32 lane = lane_id(), from = lane & ~3u;
  float a = __shfl_sync(FULL, acc.s[0][0], from), b = __shfl_sync(FULL, acc.s[0][2], from);
  float c = __shfl_sync(FULL, acc.s[1][0], from), d = __shfl_sync(FULL, acc.s[1][2], from);
  return lane % 4 == 0 ? a : lane % 4 == 1 ? b : lane % 4 == 2 ? c : d;
}
DI void chunk_fast(Fast& acc, const char* p, const u32* x) {
  u32 t = lane_id() % 4, g = lane_id() / 4;
#pragma unroll
  for (int i = 0; i < CHUNK_K / 16; i++) {
    const char* at = p + (i * 8 + t) * 128 + g * 16;
    fast_step(acc, *(const uint4*)at, *(const uint4*)(at + 4 * 128), x[i * 8 + t], x[i * 8 + 4 + t]);
  }
}

// The warp's leaf of each panel, times its leaf of x, or the last one's times another leaf.
template <int T> DI void leaf_sums(Stream<T>& stream, const Shared& s, const float* x, float (&acc)[T], const float* last = nullptr) {
  u32 used = 0, lane = lane_id();
#pragma unroll
  for (int t = 0; t < T; t++) {
    acc[t] = 0.0f;
    Fast fast = {};
    if (t == T - 1 && last) x = last;
#pragma unroll 1
    for (int c = 0; c < CHUNKS; c++, used++) {
      u32 slot = used & (stream.depth - 1);
      barrier_wait(s.barriers + slot, (used / stream.depth) & 1);
      if constexpr (FORMAT == FAST) chunk_fast(fast, s.ring + slot * CHUNK_BYTES, (const u32*)x + c * (CHUNK_K / 2));
      else acc[t] = chunk_sum(acc[t], (const u32*)(s.ring + slot * CHUNK_BYTES), x + c * (BLOCKS ? CHUNK_K / 32 * 12 : CHUNK_K));
      __syncwarp();
      if (lane == 0 && stream.next < T * CHUNKS) stream.ask(s);
    }
    if constexpr (FORMAT == FAST) acc[t] = first_row(fast);
  }
}

// What products read of a row of x: an f32 row, normed where there is a weight, in records where
// weights are blocks. Each warp makes the leaf that it needs.
struct Norm { const float* weight; float eps; u32 pad; };

// This lane's part of a leaf of the norm's weights, which can be read beforehand.
DI void take_norm(const Norm& norm, u32 leaf, bool mine, float (&weight)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) weight[i] = mine && norm.weight ? norm.weight[leaf * LEAF + i * 32 + lane_id()] : 0.0f;
}

DI void take_row(const float* row, const Norm& norm, const float (&weight)[8], u32 k, u32 leaf, bool mine, u32 leaves, const Shared& s) {
  u32 lane = lane_id();
  float v[8];
  float* x = s.x + warp_id() * LEAF;
  if (mine) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = row[leaf * LEAF + i * 32 + lane];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i * 32 + lane] = v[i];
  }
  if (norm.weight) {
    __syncwarp();
    if (mine) {
      float l = 0.0f;
      if (lane < 8) {
#pragma unroll
        for (int i = 0; i < 32; i++) { float a = x[i * 8 + lane]; l = fma(a, a, l); }
      }
      l = lanes8(l);
      if (lane == 0 && warp_id() < leaves) s.few[leaf] = l;
    }
    __syncthreads();
    float sum = tree8(s.few, 1, leaves);
    float scale = __fdiv_rn(1.0f, __fsqrt_rn(add(__fdiv_rn(sum, (float)k), norm.eps)));
    if (mine) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        v[i] = mul(mul(v[i], scale), weight[i]);
        if (!OWN_ROWS) x[i * 32 + lane] = v[i];
      }
    }
  }
  if (BLOCKS && mine) {
#pragma unroll
    for (int i = 0; i < 8; i++) quantise_block(v[i], (u32*)s.rows + warp_id() * ROW + i * 12);
  } else if (FORMAT == FAST && mine) {
#pragma unroll
    for (int i = 0; i < 8; i++) keep_pair(v[i], true, (u32*)s.rows + warp_id() * ROW + i * 16 + lane / 2);
  }
  __syncwarp();
}

// A row that lies as products read it: f32, or records.
DI void take_words(const float* row, u32 leaf, bool mine, const Shared& s) {
  if (mine) stage<FORMAT>(s.rows + warp_id() * ROW, row, leaf, LEAF);
  __syncwarp();
}

struct Place { u32 leaves, lw, group, groups, leaf; bool mine; };
DI Place place(u32 k) {
  Place p;
  p.leaves = k / LEAF;
  p.lw = leaf_warps(p.leaves);
  p.group = warp_id() / p.lw;
  p.groups = 8 / p.lw;
  p.leaf = warp_id() % p.lw;
  p.mine = p.leaf < p.leaves;
  return p;
}

// The sums of this block's panels: true for the warps that have one, of group `warp`.
template <int T> DI bool join(const Place& at, const Shared& s, const float (&acc)[T], float (&sum)[T]) {
#pragma unroll
  for (int t = 0; t < T; t++) s.sums[(t * 8 + warp_id()) * 32 + lane_id()] = acc[t];
  __syncthreads();
  if (warp_id() >= at.groups) return false;
#pragma unroll
  for (int t = 0; t < T; t++) sum[t] = tree8(s.sums + (t * 8 + warp_id() * at.lw) * 32 + lane_id(), 32, at.leaves);
  return true;
}

DI void linear_one(const float* x, const Norm& norm, u32 k, const Linear& l, u32 block, u32 depth, u32 adds) {
  Shared s = shared_of(depth);
  Place at = place(k);
  u32 panels = (l.n + 31) / 32, panel = block * at.groups + at.group;
  bool mine = at.mine && panel < panels;
  Stream<1> stream;
  stream.depth = depth;
  stream.w[0] = l.w + panel * FORMAT_OF::panel_bytes(k) + (u64)at.leaf * FORMAT_OF::LEAF_BYTES;
  if (mine && lane_id() == 0) stream.fill(s);
  float norms[8];
  take_norm(norm, at.leaf, at.mine, norms);
  begin_early();
  take_row(x, norm, norms, k, at.leaf, at.mine, at.leaves, s);
  float acc[1] = {0.0f}, sum[1];
  if (mine) leaf_sums(stream, s, s.rows + warp_id() * ROW, acc);
  if (!join(at, s, acc, sum)) return;
  u32 j = (block * at.groups + warp_id()) * 32 + lane_id();
  if (j >= l.n) return;
  float v = l.bias ? add(sum[0], l.bias[j]) : sum[0];
  l.y[j] = adds ? add(l.y[j], v) : v;
}

// out = norm(x) · wᵀ (+ bias) (+ out), several matrices at once.
ENTRY __launch_bounds__(256) one_linear(const float* x, Norm norm, u32 k, Linears many, u32 adds, u32 depth) {
  Linear l = find(many, blockIdx.x);
  linear_one(x, norm, k, l, blockIdx.x - l.first, depth, adds);
}

// The same of nine leaves to sixteen, without a norm: a block per panel, two leaves a warp.
ENTRY __launch_bounds__(256) one_linear_long(const float* x, u32 k, Linears many, u32 adds, u32 depth) {
  Linear l = find(many, blockIdx.x);
  u32 panel = blockIdx.x - l.first, leaves = k / LEAF, leaf = warp_id();
  bool both = leaf + 8 < leaves;
  Shared s = shared_of(depth), second = s;
  second.x = s.few + 8;
  second.rows = OWN_ROWS ? second.x + 8 * LEAF : second.x;
  Stream<2> stream;
  stream.depth = depth;
#pragma unroll
  for (u32 t = 0; t < 2; t++) stream.w[t] = l.w + panel * FORMAT_OF::panel_bytes(k) + (u64)(leaf + (both ? 8 * t : 0)) * FORMAT_OF::LEAF_BYTES;
  if (lane_id() == 0) stream.fill(s);
  const Norm norm = {nullptr, 0.0f, 0};
  const float norms[8] = {};
  begin_early();
  take_row(x, norm, norms, k, leaf, true, leaves, s);
  take_row(x, norm, norms, k, leaf + 8, both, leaves, second);
  float acc[2];
  leaf_sums(stream, s, s.rows + warp_id() * ROW, acc, second.rows + warp_id() * ROW);
#pragma unroll
  for (int t = 0; t < 2; t++) s.sums[(t * 8 + warp_id()) * 32 + lane_id()] = acc[t];
  __syncthreads();
  u32 j = panel * 32 + lane_id();
  if (warp_id() || j >= l.n) return;
  float sum = add(tree8(s.sums + lane_id(), 32, 8), tree8(s.sums + 8 * 32 + lane_id(), 32, leaves - 8));
  if (l.bias) sum = add(sum, l.bias[j]);
  l.y[j] = adds ? add(l.y[j], sum) : sum;
}

// Scores of norm(x), then the routes: a block per panel and leaf, the last of which chooses.
// sums: [leaves][n]; chosen[r]: the matrices of route r.
ENTRY __launch_bounds__(256) one_route(const float* x, Norm norm, const char* gate, u32 n, u32 k, u32 depth, Choice choice, const Expert* table, float* sums, u32* counter, u32* index, float* weight, u32* bad, Expert* chosen) {
  // Only the warp of the leaf has a ring.
  Shared s = shared_of(depth, 1);
  Place at = place(k);
  u32 panel = blockIdx.x / at.leaves, leaf = blockIdx.x % at.leaves;
  Stream<1> stream;
  stream.depth = depth;
  stream.w[0] = gate + panel * FORMAT_OF::panel_bytes(k) + (u64)leaf * FORMAT_OF::LEAF_BYTES;
  bool own = warp_id() == leaf;
  if (own && lane_id() == 0) stream.fill(s);
  if (threadIdx.x * 128 < n * sizeof(Expert)) ask((const char*)table + threadIdx.x * 128);
  float norms[8];
  take_norm(norm, at.leaf, at.mine, norms);
  begin();
  take_row(x, norm, norms, k, at.leaf, at.mine, at.leaves, s);
  if (own) {
    float acc[1];
    leaf_sums(stream, s, s.rows + warp_id() * ROW, acc);
    u32 j = panel * 32 + lane_id();
    if (j < n) sums[leaf * n + j] = acc[0];
  }
  if (!last_of(counter, gridDim.x) || warp_id() > 0) return;
  auto score = [&](u32 i) {
    float v[8];
#pragma unroll
    for (int l = 0; l < 8; l++) v[l] = l < at.leaves ? __ldcg(sums + l * n + i) : 0.0f;
#pragma unroll
    for (int d = 1; d < 8; d *= 2)
#pragma unroll
      for (int l = 0; l + d < 8; l += 2 * d)
        if (l + d < at.leaves) v[l] = add(v[l], v[l + d]);
    return v[0];
  };
  u32 lane = lane_id();
  if (few(choice)) {
    u32 route;
    float w;
    bool fine = n <= 64 ? choose_few<2>(score, choice, 0, s.x, route, w) : choose_few<8>(score, choice, 0, s.x, route, w);
    if (lane == 0) bad[0] = !fine;
    if (lane >= choice.k) return;
    chosen[lane] = fine && route != FULL ? table[route] : Expert{nullptr, nullptr, nullptr};
    if (fine) { index[lane] = route; weight[lane] = w; }
    return;
  }
  choose_branch(score, choice, 0, s.x, index, weight, bad);
  __syncwarp();
  bool fine = bad[0] == 0;
  for (u32 r = lane; r < choice.k; r += 32) {
    u32 e = fine ? index[r] : FULL;
    chosen[r] = e == FULL ? Expert{nullptr, nullptr, nullptr} : table[e];
  }
}

// silu(gate · x) * (up · x) of every route, x normed here; h: [routes][row_words(n)].
ENTRY __launch_bounds__(256) one_gate_up(const float* x, Norm norm, u32 n, u32 k, const Expert* chosen, float* h, u32 depth) {
  Shared s = shared_of(depth);
  Place at = place(k);
  u32 panels = (n + 31) / 32, panel = blockIdx.x * at.groups + at.group;
  bool mine = at.mine && panel < panels;
  // x was ready before the routes were.
  float norms[8];
  take_norm(norm, at.leaf, at.mine, norms);
  take_row(x, norm, norms, k, at.leaf, at.mine, at.leaves, s);
  begin();
  Expert e = chosen[blockIdx.y];
  if (e.gate == nullptr) return;
  u64 offset = panel * FORMAT_OF::panel_bytes(k) + (u64)at.leaf * FORMAT_OF::LEAF_BYTES;
  Stream<2> stream;
  stream.depth = depth;
  stream.w[0] = e.gate + offset;
  stream.w[1] = e.up + offset;
  float acc[2] = {0.0f, 0.0f}, sum[2];
  if (mine) {
    if (lane_id() == 0) stream.fill(s);
    __syncwarp();
    leaf_sums(stream, s, s.rows + warp_id() * ROW, acc);
  }
  if (!join(at, s, acc, sum)) return;
  panel = blockIdx.x * at.groups + warp_id();
  if (panel >= panels) return;
  u32 j = panel * 32 + lane_id();
  float v = mul(sum[1], silu(sum[0]));
  float* to = h + (u64)blockIdx.y * FORMAT_OF::row_words(n);
  if (BLOCKS) quantise_block(j < n ? v : 0.0f, (u32*)to + panel * RECORD);
  else if (FORMAT == FAST) keep_pair(j < n ? v : 0.0f, j < n, (u32*)to + j / 2);
  else if (j < n) to[j] = v;
}

// The down product of every route; the last of a panel's routes adds them up: out += Σ weight · part.
// No expert may be absent: only routes that were not to be had count as none.
ENTRY __launch_bounds__(256) one_down(const float* h, u32 n, u32 k, const Expert* chosen, const float* weight, float* parts, u32* counters, float* out, u32 depth) {
  Shared s = shared_of(depth);
  Place at = place(k);
  u32 panels = (n + 31) / 32, panel = blockIdx.x * at.groups + at.group, route = blockIdx.y;
  bool mine = at.mine && panel < panels;
  Expert e = chosen[route];
  mine = mine && e.down != nullptr;
  Stream<1> stream;
  stream.depth = depth;
  stream.w[0] = e.down + panel * FORMAT_OF::panel_bytes(k) + (u64)at.leaf * FORMAT_OF::LEAF_BYTES;
  if (mine && lane_id() == 0) stream.fill(s);
  begin_early();
  take_words(h + (u64)route * FORMAT_OF::row_words(k), at.leaf, mine, s);
  float acc[1] = {0.0f}, sum[1];
  if (mine) leaf_sums(stream, s, s.rows + warp_id() * ROW, acc);
  u32 j = (blockIdx.x * at.groups + warp_id()) * 32 + lane_id();
  bool has = join(at, s, acc, sum) && j < n;
  if (has) parts[(u64)route * n + j] = e.down != nullptr ? sum[0] : 0.0f;
  if (!last_of(counters + blockIdx.x, gridDim.y) || !has) return;
  float total = 0.0f;
  for (u32 r = 0; r < gridDim.y; r++) total = fma(weight[r], __ldcg(parts + (u64)r * n + j), total);
  out[j] = add(out[j], total);
}
