// From logits to a token. CPU truth: runtime/src/sampler.rs (rule 9 of the determinism contract).
//
// Ids rank by logit, then by id: as numbers of 64 bits, of which the greater come first. What top-k and
// top-p keep are the ids from one such number on; it is searched for by halving. Leaves of 256 ids whose
// best is below the number are not looked at.

struct Draw { float temperature, top_p, min_p; u32 top_k; double unit; };

// Scores as numbers whose order is theirs: above 0, and equal where scores are.
DI u32 ordered(float score) {
  u32 u = bits(add(score, 0.0f));
  return u ^ ((u32)((i32)u >> 31) | 0x80000000u);
}
DI bool finite(float x) { return (bits(x) & 0x7f800000u) != 0x7f800000u; }

// A row of logits as one block sees it.
struct Row {
  const float* z;
  float* w;     // weights
  u32 vocab, leaves;
  u32* most;    // the greatest key of each leaf
  float* sums;  // of leaves
  float* nodes; // of 32 leaves
};

// Rule 1's tree over the sums of leaves, by the block, which all have written; every thread gets the sum.
DI float tree_of(const float* sums, u32 count, float* nodes) {
  __syncthreads();
  u32 warps = blockDim.x / 32, lane = lane_id();
  // A warp has a node of 32; what they give is at most a node per warp, or goes on in the same way.
  const float* from = sums;
  for (;;) {
    u32 next = (count + 31) / 32;
    for (u32 n = warp_id(); n < next; n += warps) {
      u32 i = n * 32 + lane;
      float v = i < count ? from[i] : 0.0f;
      for (u32 d = 1; d < 32; d *= 2) {
        float o = __shfl_down_sync(FULL, v, d);
        if (lane % (2 * d) == 0 && i + d < count) v = add(v, o);
      }
      // Behind what was read: nodes of nodes follow nodes.
      if (lane == 0) nodes[n] = v;
    }
    __syncthreads();
    if (next == 1) return nodes[0];
    from = nodes;
    nodes += next;
    count = next;
  }
}

// Calls each(id, logit, weight) for this thread's ids of a leaf: those of its lane of rule 3, upwards.
// Weights are read where they are wanted, eight at a time, as logits are.
template <bool WEIGHTS, class Each> DI void ids_of(const Row& r, u32 leaf, Each each) {
  u32 from = leaf * LEAF + threadIdx.x % 8, end = min(r.vocab, (leaf + 1) * LEAF);
  for (u32 base = from; base < end; base += 64) {
    float z[8], w[8];
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
      bool some = base + 8 * j < end;
      z[j] = some ? r.z[base + 8 * j] : 0.0f;
      w[j] = WEIGHTS && some ? r.w[base + 8 * j] : 0.0f;
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++)
      if (base + 8 * j < end) each(base + 8 * j, z[j], w[j]);
  }
}
// Whether an id has at least this rank.
DI bool reaches(u32 key, u32 id, u64 rank) { return ((u64)key << 32 | (u32)~id) >= rank; }

// How many ids have at least this rank.
DI u32 count_from(const Row& r, u64 rank, u32* total) {
  __syncthreads();
  if (threadIdx.x == 0) *total = 0;
  __syncthreads();
  u32 own = 0;
  for (u32 leaf = threadIdx.x / 8; leaf < r.leaves; leaf += blockDim.x / 8)
    if (r.most[leaf] >= rank >> 32) ids_of<false>(r, leaf, [&](u32 i, float z, float) { own += reaches(ordered(z), i, rank); });
  __syncwarp();
  own = __reduce_add_sync(FULL, own);
  if (lane_id() == 0 && own) atomicAdd(total, own);
  __syncthreads();
  return *total;
}

// The sums by rule 3 of the weights, at least `least`, of ids that have at least this rank.
DI float sum_from(const Row& r, u64 rank, float least) {
  __syncthreads();
  for (u32 base = 0; base < r.leaves; base += blockDim.x / 8) {
    u32 leaf = base + threadIdx.x / 8;
    float l = 0.0f;
    if (leaf < r.leaves && r.most[leaf] >= rank >> 32)
      ids_of<true>(r, leaf, [&](u32 i, float z, float w) { l = add(l, reaches(ordered(z), i, rank) && w >= least ? w : 0.0f); });
    __syncwarp();
    l = lanes8(l);
    if (threadIdx.x % 8 == 0 && leaf < r.leaves) r.sums[leaf] = l;
  }
  return tree_of(r.sums, r.leaves, r.nodes);
}

// The greatest rank from `low` on, for which enough(rank); it is for `low`, and for no rank above the key
// `most`. enough falls as ranks grow.
template <class Enough> DI u64 search(const Row& r, u64 low, u32 most, u32* total, Enough enough) {
  // Keys first, with all of their ids; then, where there are several, the ids of one key.
  u32 key = low >> 32, above = most;
  while (key < above) {
    u32 middle = key + (above - key) / 2 + 1;
    if (enough((u64)middle << 32)) key = middle;
    else above = middle - 1;
  }
  u32 with = count_from(r, (u64)key << 32, total);
  if (with - count_from(r, (u64)(key + 1) << 32, total) == 1) return (u64)key << 32 > low ? (u64)key << 32 : low;
  u32 from = 0, to = r.vocab - 1;
  while (from < to) {
    u32 middle = from + (to - from) / 2;
    if (enough((u64)key << 32 | (u32)~middle)) to = middle;
    else from = middle + 1;
  }
  u64 found = (u64)key << 32 | (u32)~to;
  return found > low ? found : low;
}

// Takes parts from `left` until it would be negative: where; else the last part that is not 0.
template <class Part> DI u32 take(u32 count, double& left, Part part) {
  u32 last = 0;
  for (u32 i = 0; i < count; i++) {
    float p = part(i);
    if (p > 0.0f) {
      last = i;
      double rest = left - (double)p;
      if (rest < 0.0) return i;
      left = rest;
    }
  }
  return last;
}

// One block per row. out: the token, and the first id whose logit is no finite number (FULL: none), for
// which there is no token. Shared: two words a leaf, and one for each node above.
ENTRY __launch_bounds__(1024) sample(const float* logits, u32 vocab, const Draw* draws, float* weights, uint2* out) {
  begin();
  extern __shared__ float4 memory[];
  __shared__ u64 best;
  __shared__ u32 bad, total, leaf_at;
  __shared__ double left;
  __shared__ float part[LEAF];
  Draw d = draws[blockIdx.x];
  Row r;
  r.z = logits + (u64)blockIdx.x * vocab;
  r.w = weights + (u64)blockIdx.x * vocab;
  r.vocab = vocab;
  r.leaves = (vocab + LEAF - 1) / LEAF;
  r.most = (u32*)memory;
  r.sums = (float*)(r.most + r.leaves);
  r.nodes = r.sums + r.leaves;
  u32 tid = threadIdx.x;
  if (tid == 0) { best = 0; bad = FULL; }
  __syncthreads();
  u64 own = 0;
  u32 wrong = FULL;
  for (u32 base = 0; base < r.leaves; base += blockDim.x / 8) {
    u32 leaf = base + tid / 8, top = 0;
    if (leaf < r.leaves)
      ids_of<false>(r, leaf, [&](u32 i, float z, float) {
        if (!finite(z)) wrong = min(wrong, i);
        u32 key = ordered(z);
        if (key > top) top = key;
        u64 rank = (u64)key << 32 | (u32)~i;
        if (rank > own) own = rank;
      });
    __syncwarp();
    for (int x = 4; x; x /= 2) top = max(top, __shfl_xor_sync(FULL, top, x));
    if (tid % 8 == 0 && leaf < r.leaves) r.most[leaf] = top;
  }
  for (int x = 16; x; x /= 2) {
    u64 o = __shfl_xor_sync(FULL, own, x);
    own = o > own ? o : own;
  }
  wrong = __reduce_min_sync(FULL, wrong);
  if (lane_id() == 0) {
    atomicMax(&best, own);
    if (wrong != FULL) atomicMin(&bad, wrong);
  }
  __syncthreads();
  u64 first = best;
  u32 greedy = ~(u32)first, most = first >> 32;
  if (bad != FULL || d.temperature == 0.0f) {
    if (tid == 0) out[blockIdx.x] = {bad != FULL ? FULL : greedy, bad};
    return;
  }
  float largest = r.z[greedy];
  for (u32 i = tid; i < vocab; i += blockDim.x) r.w[i] = exp_(__fdiv_rn(add(r.z[i], -largest), d.temperature));
  __syncthreads();
  u64 rank = 0;
  if (d.top_k != 0 && d.top_k < vocab) rank = search(r, 0, most, &total, [&](u64 from) { return count_from(r, from, &total) >= d.top_k; });
  if (d.top_p < 1.0f) {
    float wanted = mul(d.top_p, sum_from(r, rank, 0.0f));
    rank = search(r, rank, most, &total, [&](u64 from) { return sum_from(r, from > rank ? from : rank, 0.0f) >= wanted; });
  }
  float least = d.min_p > 0.0f ? d.min_p : 0.0f;
  float sum = sum_from(r, rank, least);
  if (tid == 0) {
    left = d.unit * (double)sum;
    leaf_at = take(r.leaves, left, [&](u32 i) { return r.sums[i]; });
  }
  __syncthreads();
  u32 from = leaf_at * LEAF, count = min(vocab - from, (u32)LEAF);
  for (u32 i = tid; i < count; i += blockDim.x) {
    float w = reaches(ordered(r.z[from + i]), from + i, rank) ? r.w[from + i] : 0.0f;
    part[i] = w >= least ? w : 0.0f;
  }
  __syncthreads();
  if (tid == 0) out[blockIdx.x] = {from + take(count, left, [&](u32 i) { return part[i]; }), FULL};
}

// The first column of each row that holds no finite number, FULL where all are. One block per row.
ENTRY finite_rows(const float* x, u32 cols, u32* out) {
  begin();
  __shared__ u32 first;
  if (threadIdx.x == 0) first = FULL;
  __syncthreads();
  const float* row = x + (u64)blockIdx.x * cols;
  u32 own = FULL;
  // Eight at a time, of which none waits for another.
  for (u32 base = threadIdx.x; base < cols; base += 8 * blockDim.x) {
    float v[8];
#pragma unroll
    for (u32 j = 0; j < 8; j++) v[j] = base + j * blockDim.x < cols ? row[base + j * blockDim.x] : 0.0f;
#pragma unroll
    for (u32 j = 0; j < 8; j++)
      if (!finite(v[j])) own = min(own, base + j * blockDim.x);
  }
  __syncwarp();
  own = __reduce_min_sync(FULL, own);
  if (lane_id() == 0 && own != FULL) atomicMin(&first, own);
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = first;
}
