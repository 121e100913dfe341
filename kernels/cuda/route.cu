// Softmax and stable top-k of one level of routing, and how routes are put in order of experts.
// CPU truth: runtime/src/routing/{select,hierarchical}.rs and kernels/src/ops/softmax.rs.

DI u64 mix(u64 z) {
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// A random number of purpose 2, the order of equal scores.
DI u64 random2(u64 seed, u64 index) {
  return mix(mix(seed ^ 2 * 0x9e3779b97f4a7c15ull) + index * 0x9e3779b97f4a7c15ull);
}

// What names a candidate: level 0 chooses among tiers, 1 among groups of a tier, 2 among experts
// of a group. `seed` is that of (seed, layer, level).
struct Among { u64 seed; const u64* names; u32 level, tier, group; };

DI u64 tie_break(const Among& a, u32 i) {
  u64 name = a.level == 0 ? a.names[i] : a.names[a.tier];
  u64 candidate = a.level == 0 ? 0 : a.level == 1 ? (u64)i << 32 : (u64)a.group << 32 | i;
  return random2(random2(a.seed, name), candidate);
}

struct Best { float score; u32 at; };

// Whether candidate a comes before b: the greater score, then the hash, then the index.
DI bool before(Best a, Best b, const Among& among, const u32* index) {
  if (a.at == FULL || b.at == FULL) return b.at == FULL && a.at != FULL;
  if (a.score != b.score) return a.score > b.score;
  if (a.at == b.at) return false;
  u64 x = tie_break(among, index[a.at]), y = tie_break(among, index[b.at]);
  return x != y ? x < y : index[a.at] < index[b.at];
}

// The sum of `count` values by rule 3, by one warp; `leaves` has room for a sum per leaf.
DI float sum_row(const float* x, u32 count, float* leaves) {
  u32 n = count == 0 ? 1 : (count + LEAF - 1) / LEAF, lane = lane_id();
  for (u32 base = 0; base < n; base += 4) {
    u32 leaf = base + lane / 8, end = min(count, (leaf + 1) * LEAF);
    float l = 0.0f;
    for (u32 i = leaf * LEAF + lane % 8; i < end; i += 8) l = add(l, x[i]);
    l = lanes8(l);
    if (lane % 8 == 0 && leaf < n) leaves[leaf] = l;
  }
  __syncwarp();
  if (lane == 0) {
    for (u32 d = 1; d < n; d *= 2)
      for (u32 i = 0; i + d < n; i += 2 * d) leaves[i] = add(leaves[i], leaves[i + d]);
  }
  __syncwarp();
  return leaves[0];
}

// One warp per branch: the k best of its `n` scores, best first, with parent weight times
// probability. `masks`: a bit per candidate that is open, `mask_words` per branch, or null.
// `tiers` and `groups` say where each branch is (null for 0). Too few candidates leave index FULL. A score that is no finite
// number sets bad[branch], and nothing else is written.
ENTRY choose(const float* scores, u32 n, u32 k, const u32* masks, u32 mask_words, u64 seed, const u64* tier_names, u32 level, const u32* tiers, const u32* groups,
             const float* parents, u32 renormalise, u32* index, float* weight, u32* bad) {
  begin();
  extern __shared__ float4 memory[];
  float* s = (float*)memory;
  float* e = s + n;
  u32* names = (u32*)(e + n);
  float* leaves = (float*)(names + n);
  u32 branch = blockIdx.x, lane = lane_id(), count = 0;
  const float* row = scores + (u64)branch * n;
  bool finite = true;
  for (u32 base = 0; base < n; base += 32) {
    u32 i = base + lane;
    bool open = i < n && (masks == nullptr || (masks[(u64)branch * mask_words + i / 32] >> (i % 32) & 1));
    u32 all = __ballot_sync(FULL, open);
    if (open) {
      u32 at = count + __popc(all & ((1u << lane) - 1));
      float v = row[i];
      s[at] = v;
      names[at] = i;
      finite = finite && (bits(v) & 0x7f800000u) != 0x7f800000u;
    }
    count += __popc(all);
  }
  __syncwarp();
  bool fine = __all_sync(FULL, finite);
  if (lane == 0) bad[branch] = !fine;
  if (!fine) return;
  float m = -__int_as_float(0x7f800000);
  for (u32 i = lane; i < count; i += 32) m = s[i] > m ? s[i] : m;
  for (int d = 16; d; d /= 2) { float o = __shfl_xor_sync(FULL, m, d); m = o > m ? o : m; }
  for (u32 i = lane; i < count; i += 32) e[i] = exp_(add(s[i], -m));
  __syncwarp();
  float total = sum_row(e, count, leaves), parent = parents ? parents[branch] : 1.0f, sum = 0.0f;
  Among among = {seed, tier_names, level, tiers ? tiers[branch] : 0, groups ? groups[branch] : 0};
  for (u32 r = 0; r < k; r++) {
    Best best = {0.0f, FULL};
    for (u32 i = lane; i < count; i += 32) {
      Best c = {s[i], bits(e[i]) == FULL ? FULL : i};
      if (before(c, best, among, names)) best = c;
    }
    for (int d = 16; d; d /= 2) {
      Best o = {__shfl_xor_sync(FULL, best.score, d), __shfl_xor_sync(FULL, best.at, d)};
      if (before(o, best, among, names)) best = o;
    }
    u64 to = (u64)branch * k + r;
    bool some = best.at != FULL;
    float p = some ? mul(parent, __fdiv_rn(e[best.at], total)) : 0.0f;
    sum = add(sum, p);
    __syncwarp();
    if (lane == 0) {
      index[to] = some ? names[best.at] : FULL;
      weight[to] = p;
      // Taken: no exp has these bits.
      if (some) e[best.at] = bits(FULL);
    }
    __syncwarp();
  }
  if (renormalise && sum > 0.0f)
    for (u32 r = lane; r < k; r += 32) weight[(u64)branch * k + r] = __fdiv_rn(weight[(u64)branch * k + r], sum);
}

// The same for rows whose routes come from several branches.
ENTRY renormalise(float* weight, u32 per_row, u32 rows) {
  begin();
  u32 row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  float* w = weight + (u64)row * per_row;
  float sum = 0.0f;
  for (u32 r = 0; r < per_row; r++) sum = add(sum, w[r]);
  if (sum > 0.0f)
    for (u32 r = 0; r < per_row; r++) w[r] = __fdiv_rn(w[r], sum);
}

// Puts routes in order of their experts, stable, and cuts each expert's into items of at most
// `item_rows` (as swiglu.cu takes them). One block, of a power of two of threads.
struct Item { u32 expert, first, count; };

ENTRY __launch_bounds__(1024) group_routes(const u32* expert, u32 routes, u32 experts, u32 item_rows, u32* order, Item* items, u32* item_count) {
  begin();
  __shared__ u32 chunk[1024];
  __shared__ u64 scan[1024];
  u32 tid = threadIdx.x, width = blockDim.x;
  u64 done = 0;  // routes << 32 | items of the experts before
  for (u32 base = 0; base < experts; base += width) {
    u32 e = base + tid, count = 0;
    for (u32 from = 0; from < routes; from += width) {
      __syncthreads();
      if (from + tid < routes) chunk[tid] = expert[from + tid];
      __syncthreads();
      u32 len = min(routes - from, width);
      for (u32 i = 0; i < len; i++) count += chunk[i] == e;
    }
    if (e >= experts) count = 0;
    u64 own = (u64)count << 32 | (count + item_rows - 1) / item_rows;
    scan[tid] = own;
    __syncthreads();
    for (u32 d = 1; d < width; d *= 2) {
      u64 o = tid >= d ? scan[tid - d] : 0;
      __syncthreads();
      scan[tid] += o;
      __syncthreads();
    }
    u64 at = done + scan[tid] - own;
    u32 first = at >> 32, item = (u32)at, to = first;
    for (u32 from = 0; from < routes; from += width) {
      __syncthreads();
      if (from + tid < routes) chunk[tid] = expert[from + tid];
      __syncthreads();
      u32 len = min(routes - from, width);
      if (count > 0)
        for (u32 i = 0; i < len; i++)
          if (chunk[i] == e) order[to++] = from + i;
    }
    for (u32 r = 0; r < count; r += item_rows) items[item++] = {e, first + r, min(item_rows, count - r)};
    done += scan[width - 1];
    __syncthreads();
  }
  if (tid == 0) *item_count = (u32)done;
}
