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
