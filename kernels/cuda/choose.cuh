// Softmax and stable top-k of one level of routing.
// CPU truth: runtime/src/routing/select.rs and kernels/src/ops/softmax.rs.

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

// Scores as numbers whose order is theirs: above 0, and equal where scores are.
DI u32 ordered(float score) {
  u32 u = bits(add(score, 0.0f));
  return u ^ ((u32)((i32)u >> 31) | 0x80000000u);
}

// Of the candidates whose key is `best`, the one with the least hash, then index: their place.
DI u32 first_of(const u32* keys, u32 count, u32 best, const Among& among, const u32* names) {
  u64 least = ~0ull;
  u32 at = FULL;
  for (u32 i = lane_id(); i < count; i += 32) {
    if (keys[i] != best) continue;
    u64 h = tie_break(among, names[i]);
    // Names grow with places.
    if (at == FULL || h < least) { least = h; at = i; }
  }
  for (int d = 16; d; d /= 2) {
    u64 h = __shfl_xor_sync(FULL, least, d);
    u32 o = __shfl_xor_sync(FULL, at, d);
    if (o != FULL && (at == FULL || h < least || (h == least && o < at))) { least = h; at = o; }
  }
  return at;
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

// What is chosen among: `n` candidates of which the `k` best are taken. `masks`: a bit per candidate
// that is open, `mask_words` per branch, or null. `tiers` and `groups` say where each branch is (null
// for 0), `parents` the weight it has so far (null for 1).
struct Choice {
  u64 seed;
  const u64* tier_names;
  const u32* masks;
  const u32* tiers;
  const u32* groups;
  const float* parents;
  u32 n, k, mask_words, level, renormalise, pad;
};

// By one warp, `s` being its shared memory, of four words a candidate and one a leaf: the k best, best first, with parent weight times
// probability. Too few candidates leave index FULL. A score that is no finite number sets
// bad[branch], and nothing else is written.
template <class Score> DI void choose_branch(Score score, const Choice& c, u32 branch, float* s, u32* index, float* weight, u32* bad) {
  float* e = s + c.n;
  u32* keys = (u32*)(e + c.n);
  u32* names = keys + c.n;
  float* leaves = (float*)(names + c.n);
  u32 lane = lane_id(), count = 0;
  bool finite = true;
  for (u32 base = 0; base < c.n; base += 32) {
    u32 i = base + lane;
    bool open = i < c.n && (c.masks == nullptr || (c.masks[(u64)branch * c.mask_words + i / 32] >> (i % 32) & 1));
    u32 all = __ballot_sync(FULL, open);
    if (open) {
      u32 at = count + __popc(all & ((1u << lane) - 1));
      float v = score(i);
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
  for (u32 i = lane; i < count; i += 32) {
    float v = s[i];
    e[i] = exp_(add(v, -m));
    keys[i] = ordered(v);
  }
  __syncwarp();
  float total = sum_row(e, count, leaves), parent = c.parents ? c.parents[branch] : 1.0f, sum = 0.0f;
  Among among = {c.seed, c.tier_names, c.level, c.tiers ? c.tiers[branch] : 0, c.groups ? c.groups[branch] : 0};
  for (u32 r = 0; r < c.k; r++) {
    u32 own = 0, at = FULL, same = 0;
    for (u32 i = lane; i < count; i += 32) own = max(own, keys[i]);
    u32 best = __reduce_max_sync(FULL, own);
    if (best != 0) {
      for (u32 i = lane; i < count; i += 32) if (keys[i] == best) { at = i; same++; }
      at = __reduce_add_sync(FULL, same) == 1 ? __reduce_min_sync(FULL, at) : first_of(keys, count, best, among, names);
    }
    u64 to = (u64)branch * c.k + r;
    bool some = at != FULL;
    float p = some ? mul(parent, __fdiv_rn(e[at], total)) : 0.0f;
    sum = add(sum, p);
    __syncwarp();
    if (lane == 0) {
      index[to] = some ? names[at] : FULL;
      weight[to] = p;
      if (some) keys[at] = 0;
    }
    __syncwarp();
  }
  if (c.renormalise && sum > 0.0f)
    for (u32 r = lane; r < c.k; r += 32) weight[(u64)branch * c.k + r] = __fdiv_rn(weight[(u64)branch * c.k + r], sum);
}

// The same for all of at most 32 · J candidates and k of at most 32, in registers: lane r gets
// route r. `e` is shared memory for a value per candidate.
template <int J, class Score> DI bool choose_few(Score score, const Choice& c, u32 branch, float* e, u32& route, float& weight) {
  u32 lane = lane_id(), keys[J], most = 0;
  float v[J];
  bool finite = true;
#pragma unroll
  for (int j = 0; j < J; j++) v[j] = j * 32 + lane < c.n ? score(j * 32 + lane) : 0.0f;
#pragma unroll
  for (int j = 0; j < J; j++) {
    bool some = j * 32 + lane < c.n;
    finite = finite && (bits(v[j]) & 0x7f800000u) != 0x7f800000u;
    keys[j] = some ? ordered(v[j]) : 0;
    most = max(most, keys[j]);
  }
  if (!__all_sync(FULL, finite)) return false;
  u32 top = __reduce_max_sync(FULL, most);
  float m = bits(top >> 31 ? top ^ 0x80000000u : ~top), own[J];
#pragma unroll
  for (int j = 0; j < J; j++) {
    own[j] = exp_(add(v[j], -m));
    if (j * 32 + lane < c.n) e[j * 32 + lane] = own[j];
  }
  __syncwarp();
  float l = 0.0f;
#pragma unroll
  for (int i = 0; i < 4 * J; i++)
    if (i * 8 + lane % 8 < c.n) l = add(l, e[i * 8 + lane % 8]);
  float total = lanes8(l), parent = c.parents ? c.parents[branch] : 1.0f, mine = 0.0f;
  route = FULL;
  for (u32 r = 0; r < c.k; r++) {
    u32 best = r == 0 ? top : __reduce_max_sync(FULL, most), same = 0, at = FULL;
    if (best == 0) break;
#pragma unroll
    for (int j = 0; j < J; j++) {
      u32 who = __ballot_sync(FULL, keys[j] == best);
      if (at == FULL && who) at = j * 32 + __ffs(who) - 1;
      same += __popc(who);
    }
    if (same > 1) {
      Among among = {c.seed, c.tier_names, c.level, c.tiers ? c.tiers[branch] : 0, c.groups ? c.groups[branch] : 0};
      u64 least = ~0ull;
      at = FULL;
#pragma unroll
      for (int j = 0; j < J; j++)
        if (keys[j] == best) {
          u64 h = tie_break(among, j * 32 + lane);
          if (at == FULL || h < least) { least = h; at = j * 32 + lane; }
        }
      for (int d = 16; d; d /= 2) {
        u64 h = __shfl_xor_sync(FULL, least, d);
        u32 o = __shfl_xor_sync(FULL, at, d);
        if (o != FULL && (at == FULL || h < least || (h == least && o < at))) { least = h; at = o; }
      }
    }
    if (lane == r) { route = at; mine = e[at]; }
    if (lane == at % 32) {
      most = 0;
#pragma unroll
      for (int j = 0; j < J; j++) {
        if (j == at / 32) keys[j] = 0;
        most = max(most, keys[j]);
      }
    }
  }
  weight = route != FULL ? mul(parent, __fdiv_rn(mine, total)) : 0.0f;
  if (c.renormalise) {
    float sum = 0.0f;
    for (u32 r = 0; r < c.k; r++) sum = add(sum, __shfl_sync(FULL, weight, r));
    if (sum > 0.0f) weight = __fdiv_rn(weight, sum);
  }
  return true;
}
DI bool few(const Choice& c) { return c.masks == nullptr && c.n <= 256 && c.k <= 32; }
