// Selection of routes, and how they are put in order of experts.
// CPU truth: runtime/src/routing/{select,hierarchical}.rs.

// One warp per branch.
ENTRY choose(const float* scores, Choice c, u32* index, float* weight, u32* bad) {
  begin();
  extern __shared__ float4 memory[];
  const float* row = scores + (u64)blockIdx.x * c.n;
  if (few(c)) {
    u32 route, lane = lane_id();
    float w;
    auto score = [&](u32 i) { return row[i]; };
    bool fine = c.n <= 64 ? choose_few<2>(score, c, blockIdx.x, (float*)memory, route, w) : choose_few<8>(score, c, blockIdx.x, (float*)memory, route, w);
    if (lane == 0) bad[blockIdx.x] = !fine;
    if (fine && lane < c.k) {
      index[(u64)blockIdx.x * c.k + lane] = route;
      weight[(u64)blockIdx.x * c.k + lane] = w;
    }
    return;
  }
  choose_branch([&](u32 i) { return row[i]; }, c, blockIdx.x, (float*)memory, index, weight, bad);
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
// `item_rows`. One block; each warp counts, and then places, the routes of a part. Shared: a count
// per warp and expert, and where each expert begins.
ENTRY __launch_bounds__(1024) group_routes(const u32* expert, u32 routes, u32 experts, u32 item_rows, u32* order, Item* items, u32* item_count) {
  begin();
  extern __shared__ float4 memory[];
  __shared__ u64 scan[1024];
  u32 tid = threadIdx.x, width = blockDim.x, warps = width / 32, lane = lane_id();
  u32* counts = (u32*)memory + warp_id() * experts;
  u32* starts = (u32*)memory + warps * experts;
  for (u32 e = tid; e < warps * experts; e += width) ((u32*)memory)[e] = 0;
  __syncthreads();
  u32 part = (routes + width - 1) / width * 32, from = warp_id() * part, to = min(from + part, routes);
  for (u32 base = from; base < to; base += 32) {
    u32 e = base + lane < to ? expert[base + lane] : FULL, same = __match_any_sync(FULL, e);
    if (e < experts && lane == __ffs(same) - 1) counts[e] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  u64 done = 0;  // routes << 32 | items of the experts before
  for (u32 base = 0; base < experts; base += width) {
    u32 e = base + tid, count = 0;
    if (e < experts)
      for (u32 w = 0; w < warps; w++) {
        u32 own = ((u32*)memory)[w * experts + e];
        ((u32*)memory)[w * experts + e] = count;
        count += own;
      }
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
    if (e < experts) {
      u32 first = at >> 32, item = (u32)at;
      starts[e] = first;
      for (u32 r = 0; r < count; r += item_rows) items[item++] = {e, first + r, min(item_rows, count - r)};
    }
    done += scan[width - 1];
    __syncthreads();
  }
  for (u32 base = from; base < to; base += 32) {
    u32 e = base + lane < to ? expert[base + lane] : FULL, same = __match_any_sync(FULL, e);
    if (e < experts) order[starts[e] + counts[e] + __popc(same & ((1u << lane) - 1))] = base + lane;
    __syncwarp();
    if (e < experts && lane == __ffs(same) - 1) counts[e] += __popc(same);
    __syncwarp();
  }
  if (tid == 0) *item_count = (u32)done;
}

// A tier of a layer: its sizes, where the scores of its gates lie in a row (FULL: one group, no gate), and
// its first expert in the layer's table.
struct TierGates { u32 groups, experts, k_group, k_expert, groups_at, experts_at, first, pad; };

// A layer's gates. The scores of tiers, where there are several, begin the row. `branches` and `routes`:
// the most that a row can have, `room` the shared words of a warp.
struct Descent {
  const TierGates* tiers;
  const u64* names;
  const u32* masks;  // a bit per tier that is open, mask_words a row; null: all are
  u64 seed;
  u32 layer, count, k_tier, mask_words, cols, branches, routes, room, renormalise, pad;
};

// One choice by one warp, best first; whether all scores were finite.
template <class Score> DI bool choose_here(Score score, const Choice& c, float* s, u32* index, float* weight, u32* bad) {
  if (few(c)) {
    u32 route;
    float w;
    bool fine = c.n <= 64 ? choose_few<2>(score, c, 0, s, route, w) : choose_few<8>(score, c, 0, s, route, w);
    if (fine && lane_id() < c.k) { index[lane_id()] = route; weight[lane_id()] = w; }
    __syncwarp();
    return fine;
  }
  choose_branch(score, c, 0, s, index, weight, bad);
  __syncwarp();
  return *bad == 0;
}

// By one warp: the first score, of those that are open, that is no finite number.
DI u32 first_bad(const float* scores, u32 n, const u32* mask) {
  for (u32 base = 0; base < n; base += 32) {
    u32 i = base + lane_id();
    bool bad = i < n && (mask == nullptr || (mask[i / 32] >> (i % 32) & 1)) && (bits(scores[i]) & 0x7f800000u) == 0x7f800000u;
    u32 who = __ballot_sync(FULL, bad);
    if (who) return bits(scores[base + __ffs(who) - 1]);
  }
  return 0;
}

// Tier, groups, experts of a row, by one block. index, weight: [rows][routes], FULL and 0 past the row's
// count. bad: level + 1 of the gate that the CPU would name, and the score that is no finite number; such a
// row has no routes.
ENTRY __launch_bounds__(256) descend(const float* scores, Descent d, u32* index, float* weight, u32* count, uint2* bad) {
  begin();
  extern __shared__ float4 memory[];
  __shared__ u64 failed[2];  // the first gate of groups, of experts, that failed: tier << 32 | group
  __shared__ u32 flags[8], tiers, branches, routes;
  __shared__ float divisor;
  u32 lane = lane_id(), warp = warp_id(), warps = blockDim.x / 32;
  u32* tier = (u32*)memory;              // chosen tiers, their weights, first branches and first routes
  float* tier_weight = (float*)(tier + d.k_tier);
  u32* first_branch = (u32*)(tier_weight + d.k_tier);
  u32* first_route = first_branch + d.k_tier;
  u32* group = first_route + d.k_tier;   // branches: chosen groups, their weights, whose choice they are
  float* group_weight = (float*)(group + d.branches);
  u32* owner = (u32*)(group_weight + d.branches);
  u32* expert = owner + d.branches;      // routes
  float* expert_weight = (float*)(expert + d.routes);
  float* own = expert_weight + d.routes + warp * d.room;
  const float* row = scores + (u64)blockIdx.x * d.cols;
  auto choice = [&](u32 level, u32 n, u32 k) {
    Choice c = {random2(d.seed, (u64)d.layer << 8 | level), d.names, nullptr, nullptr, nullptr, nullptr, n, k, 0, level, 0, 0};
    return c;
  };
  if (warp == 0) {
    bool fine = true;
    const u32* mask = d.masks ? d.masks + (u64)blockIdx.x * d.mask_words : nullptr;
    if (d.count > 1) {
      Choice c = choice(0, d.count, d.k_tier);
      c.masks = mask;
      c.mask_words = d.mask_words;
      fine = choose_here([&](u32 i) { return row[i]; }, c, own, tier, tier_weight, flags);
      u32 score = fine ? 0 : first_bad(row, d.count, mask);
      if (lane == 0) bad[blockIdx.x] = {fine ? 0u : 1u, score};
    } else if (lane == 0) {
      tier[0] = 0;
      tier_weight[0] = 1.0f;
      bad[blockIdx.x] = {0, 0};
    }
    __syncwarp();
    if (lane == 0) {
      failed[0] = failed[1] = ~0ull;
      tiers = branches = routes = 0;
      u32 most = d.count > 1 ? d.k_tier : 1;
      for (; fine && tiers < most && tier[tiers] != FULL; tiers++) {
        TierGates t = d.tiers[tier[tiers]];
        u32 groups = min(t.k_group, t.groups);
        first_branch[tiers] = branches;
        first_route[tiers] = routes;
        for (u32 g = 0; g < groups; g++) owner[branches + g] = tiers;
        branches += groups;
        routes += groups * min(t.k_expert, t.experts);
      }
    }
  }
  __syncthreads();
  for (u32 i = warp; i < tiers; i += warps) {
    TierGates t = d.tiers[tier[i]];
    u32 at = first_branch[i];
    if (t.groups_at == FULL) {
      if (lane == 0) { group[at] = 0; group_weight[at] = tier_weight[i]; }
      continue;
    }
    Choice c = choice(1, t.groups, min(t.k_group, t.groups));
    c.tiers = tier + i;
    c.parents = tier_weight + i;
    const float* gate = row + t.groups_at;
    bool fine = choose_here([&](u32 j) { return gate[j]; }, c, own, group + at, group_weight + at, flags + warp);
    if (!fine && lane == 0) atomicMin(failed, (u64)tier[i] << 32);
  }
  __syncthreads();
  bool fine = failed[0] == ~0ull;
  if (!fine && warp == 0) {
    TierGates t = d.tiers[failed[0] >> 32];
    u32 score = first_bad(row + t.groups_at, t.groups, nullptr);
    if (lane == 0) bad[blockIdx.x] = {2, score};
  }
  for (u32 b = warp; fine && b < branches; b += warps) {
    u32 i = owner[b];
    TierGates t = d.tiers[tier[i]];
    u32 k = min(t.k_expert, t.experts), at = first_route[i] + (b - first_branch[i]) * k;
    Choice c = choice(2, t.experts, k);
    c.tiers = tier + i;
    c.groups = group + b;
    c.parents = group_weight + b;
    const float* gate = row + t.experts_at + group[b] * t.experts;
    bool good = choose_here([&](u32 j) { return gate[j]; }, c, own, expert + at, expert_weight + at, flags + warp);
    if (!good) {
      if (lane == 0) atomicMin(failed + 1, (u64)tier[i] << 32 | group[b]);
      continue;
    }
    for (u32 r = lane; r < k; r += 32) expert[at + r] += t.first + group[b] * t.experts;
  }
  __syncthreads();
  if (failed[1] != ~0ull && warp == 0) {
    TierGates t = d.tiers[failed[1] >> 32];
    u32 score = first_bad(row + t.experts_at + (u32)failed[1] * t.experts, t.experts, nullptr);
    if (lane == 0) bad[blockIdx.x] = {3, score};
  }
  u32 some = fine && failed[1] == ~0ull ? routes : 0;
  if (threadIdx.x == 0) {
    count[blockIdx.x] = some;
    float sum = 0.0f;
    if (d.renormalise)
      for (u32 r = 0; r < some; r++) sum = add(sum, expert_weight[r]);
    divisor = sum > 0.0f ? sum : 1.0f;
  }
  __syncthreads();
  for (u32 r = threadIdx.x; r < d.routes; r += blockDim.x) {
    u64 to = (u64)blockIdx.x * d.routes + r;
    index[to] = r < some ? expert[r] : FULL;
    weight[to] = r < some ? __fdiv_rn(expert_weight[r], divisor) : 0.0f;
  }
}

// out[0]: how many routes go to experts that the table lacks; from out[1] on, which, in order. One block.
ENTRY __launch_bounds__(1024) absent_routes(const u32* expert, u32 routes, const Expert* table, u32 experts, u32* out) {
  begin();
  __shared__ u32 sums[32];
  u32 done = 0, warps = blockDim.x / 32;
  for (u32 base = 0; base < routes; base += blockDim.x) {
    u32 r = base + threadIdx.x, e = r < routes ? expert[r] : FULL;
    bool absent = e < experts && table[e].gate == nullptr;
    u32 who = __ballot_sync(FULL, absent);
    if (lane_id() == 0) sums[warp_id()] = __popc(who);
    __syncthreads();
    u32 before = done, all = done;
    for (u32 w = 0; w < warps; w++) {
      before += w < warp_id() ? sums[w] : 0;
      all += sums[w];
    }
    if (absent) out[1 + before + __popc(who & ((1u << lane_id()) - 1))] = r;
    done = all;
    __syncthreads();
  }
  if (threadIdx.x == 0) out[0] = done;
}
