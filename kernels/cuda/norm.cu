// RMS norm by rule 3: leaves of 256, eight virtual lanes in a leaf, rule 1's tree over leaves.
// CPU truth: kernels/src/ops/norm.rs. In place where out is x.

// One block of 256 threads per run of `width` values; f32, or what products read (records of blocks,
// or pairs of bf16 where `pairs`), or both.
ENTRY rms_norm(const float* x, const float* weight, u32 width, float eps, float* out, u32* records, u32 pairs) {
  begin();
  __shared__ float sums[32], stack[32][32];
  __shared__ float total;
  const float* row = x + (u64)blockIdx.x * width;
  u32 leaves = width == 0 ? 1 : (width + LEAF - 1) / LEAF;
  // Eight threads per leaf: 32 leaves a round, whose subtree is one node of the tree.
  u32 rounds = (leaves + 31) / 32;
  for (u32 round = 0; round < rounds; round++) {
    u32 leaf = round * 32 + threadIdx.x / 8, lane = threadIdx.x % 8;
    u32 end = min(width, (leaf + 1) * LEAF);
    float l = 0.0f;
    if ((leaf + 1) * LEAF <= width) {
      float v[32];
#pragma unroll
      for (int i = 0; i < 32; i++) v[i] = row[leaf * LEAF + i * 8 + lane];
#pragma unroll
      for (int i = 0; i < 32; i++) l = fma(v[i], v[i], l);
    } else {
      for (u32 i = leaf * LEAF + lane; i < end; i += 8) { float v = row[i]; l = fma(v, v, l); }
    }
    l = lanes8(l);
    if (lane == 0) sums[threadIdx.x / 8] = l;
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 count = min(leaves - round * 32, 32u);
      for (u32 d = 1; d < 32; d *= 2)
        for (u32 i = 0; i + d < count; i += 2 * d) sums[i] = add(sums[i], sums[i + d]);
      float sum = sums[0];
      u32 top = __popc(round);
      for (int m = merges(round, rounds); m > 0; m--) sum = add(stack[--top][0], sum);
      stack[top][0] = sum;
      total = __fdiv_rn(1.0f, __fsqrt_rn(add(__fdiv_rn(sum, (float)width), eps)));
    }
    __syncthreads();
  }
  float scale = total;
  float* to = out + (u64)blockIdx.x * width;
  u32 blocks = (width + 31) / 32;
  for (u32 i = threadIdx.x; i < (records ? blocks * 32 : width); i += blockDim.x) {
    float v = i < width ? mul(mul(row[i], scale), weight[i]) : 0.0f;
    if (out && i < width) to[i] = v;
    if (records && pairs) keep_pair(v, i < width, records + (u64)blockIdx.x * ((width + 1) / 2) + i / 2);
    else if (records) quantise_block(v, records + ((u64)blockIdx.x * blocks + i / 32) * RECORD);
  }
}

// One warp per run, of at most 256 values.
ENTRY rms_norm_short(const float* x, const float* weight, u32 width, float eps, float* out, u32 runs) {
  begin();
  u32 run = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = lane_id();
  if (run >= runs) return;
  const float* row = x + (u64)run * width;
  float l = 0.0f;
  if (lane < 8)
    for (u32 i = lane; i < width; i += 8) { float v = row[i]; l = fma(v, v, l); }
  float sum = __shfl_sync(FULL, lanes8(l), 0);
  float scale = __fdiv_rn(1.0f, __fsqrt_rn(add(__fdiv_rn(sum, (float)width), eps)));
  float* to = out + (u64)run * width;
  for (u32 i = lane; i < width; i += 32) to[i] = mul(mul(row[i], scale), weight[i]);
}
