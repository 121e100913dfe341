// The core of every product: one warp computes one leaf of T panels for up to R rows, a lane per
// output of a panel; eight warps of a block meet in rule 1's tree through shared memory.
// CPU truth: kernels/src/ops/{tile,blocked}.rs; layouts: kernels/src/{matrix,blocks}.rs.
//
// FAST is bf16 by `--math fast`: rows of bf16 pairs, a leaf's sums by the tensor cores, always of the
// same instruction, sixteen k after sixteen; leaves meet as ever. What a slot of k in the instruction
// is, is the same in every kernel, so that an output's bits do not depend on the number of rows.
//
// x lies in shared memory, one leaf per warp: f32 rows of LEAF, or records of 12 words (ten and
// two to fill a line). A thread reads four k of a row at once and uses them for T outputs: what
// binds at many rows is the words per multiplication that come from shared memory.

enum { F32, BF16, INT8, INT6, INT4, FAST };

template <int F> struct Format {
  static constexpr bool BLOCKS = F >= INT8 && F <= INT4;
  // Bytes of a block of a panel, and of a leaf.
  static constexpr int BLOCK_BYTES = F == INT8 ? 1088 : F == INT6 ? 832 : 576;
  static constexpr int LEAF_BYTES = F == F32 ? 32768 : F == BF16 || F == FAST ? 16384 : 8 * BLOCK_BYTES;
  static constexpr int WORDS = F == INT8 ? 8 : F == INT6 ? 6 : 4;
  static constexpr int OFFSET = F == INT8 ? 128 : F == INT6 ? 32 : 8;
  // Words of a row of x in a leaf, in shared memory.
  static constexpr int X = BLOCKS ? 96 : F == FAST ? LEAF / 2 + 4 : LEAF;
  static DI u64 panel_bytes(u32 k) {
    return BLOCKS ? (u64)((k + 31) / 32) * BLOCK_BYTES : F == F32 ? (u64)k * 128 : (u64)((k + 1) / 2) * 128;
  }
  static DI u32 row_words(u32 k) { return BLOCKS ? (k + 31) / 32 * RECORD : F == FAST ? (k + 1) / 2 : k; }
};

// acc[t][r] of one leaf of `len` k; w points at this lane's first word.
template <int F, int T, int R> DI void float_leaf(const char* const (&w)[T], const float* x, int len, float (&acc)[T][R]) {
  // More where a block has the processor for itself.
  constexpr int LOADS = (R > 8 ? 32 : 16) / T, K = F == F32 ? LOADS : 2 * LOADS;
  int k = 0;
  // The next words are on their way while these are used.
  u32 next[T][LOADS];
  if (K <= len) {
#pragma unroll
    for (int i = 0; i < LOADS; i++)
#pragma unroll
      for (int t = 0; t < T; t++) next[t][i] = stream(w[t] + i * 128);
  }
#pragma unroll 1
  for (; k + K <= len; k += K) {
    u32 v[T][LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++)
#pragma unroll
      for (int t = 0; t < T; t++) v[t][i] = next[t][i];
    if (k + 2 * K <= len) {
#pragma unroll
      for (int i = 0; i < LOADS; i++)
#pragma unroll
        for (int t = 0; t < T; t++) next[t][i] = stream(w[t] + (u32)(F == F32 ? k + K : (k + K) / 2) * 128 + i * 128);
    }
#pragma unroll
    for (int c = 0; c < K; c += 4) {
      float f[T][4];
#pragma unroll
      for (int t = 0; t < T; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          f[t][i] = F == F32 ? bits(v[t][(c + i) % LOADS]) : i % 2 ? high(v[t][(c + i) / 2 % LOADS]) : low(v[t][(c + i) / 2 % LOADS]);
#pragma unroll
      for (int r = 0; r < R; r++) {
        float4 xs = *(const float4*)(x + r * LEAF + k + c);
#pragma unroll
        for (int t = 0; t < T; t++) {
          acc[t][r] = fma(xs.x, f[t][0], acc[t][r]);
          acc[t][r] = fma(xs.y, f[t][1], acc[t][r]);
          acc[t][r] = fma(xs.z, f[t][2], acc[t][r]);
          acc[t][r] = fma(xs.w, f[t][3], acc[t][r]);
        }
      }
    }
  }
#pragma unroll 1
  for (; k < len; k++) {
#pragma unroll
    for (int t = 0; t < T; t++) {
      u32 v = stream(w[t] + (u32)(F == F32 ? k : k / 2) * 128);
      float f = F == F32 ? bits(v) : k % 2 ? high(v) : low(v);
#pragma unroll
      for (int r = 0; r < R; r++) acc[t][r] = fma(x[r * LEAF + k], f, acc[t][r]);
    }
  }
}

// Four products of unsigned and signed bytes.
DI i32 dp4a(u32 w, u32 x, i32 sum) {
  i32 d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(w), "r"(x), "r"(sum));
  return d;
}

// The 32 integers of an output in the order of a record's words.
template <int F> DI void open(const u32 (&v)[Format<F>::WORDS], u32 (&q)[8]) {
  if (F == INT8) {
#pragma unroll
    for (int g = 0; g < 8; g++) q[g] = v[g % Format<F>::WORDS];
  } else if (F == INT4) {
#pragma unroll
    for (int g = 0; g < 4; g++) {
      q[2 * g] = v[g] & 0x0f0f0f0fu;
      q[2 * g + 1] = (v[g] >> 4) & 0x0f0f0f0fu;
    }
  } else {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 rest = 0;
#pragma unroll
      for (int r = 0; r < 3; r++) {
        u32 word = v[(3 * h + r) % Format<F>::WORDS];
        q[4 * h + r] = word & 0x3f3f3f3fu;
        rest |= ((word >> 6) & 0x03030303u) << (2 * r);
      }
      q[4 * h + 3] = rest;
    }
  }
}

// The same for blocks: w points at the leaf's first block.
template <int F, int T, int R> DI void block_leaf(const char* const (&w)[T], const u32* x, int blocks, float (&acc)[T][R]) {
  constexpr int W = Format<F>::WORDS;
  u32 lane = lane_id();
#pragma unroll(T == 1 ? 2 : 1)
  for (int b = 0; b < blocks; b++) {
    u32 v[T][W];
    float scale[T];
#pragma unroll
    for (int t = 0; t < T; t++) {
      const char* p = w[t] + b * Format<F>::BLOCK_BYTES;
      u32 s = stream(p + lane % 16 * 4);
#pragma unroll
      for (int i = 0; i < W; i++) v[t][i] = stream(p + 64 + i * 128 + lane * 4);
      scale[t] = lane < 16 ? low(s) : high(s);
    }
    u32 q[T][8];
#pragma unroll
    for (int t = 0; t < T; t++) open<F>(v[t], q[t]);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const u32* at = x + r * 96 + b * 12;
      uint4 a = *(const uint4*)at, c = *(const uint4*)(at + 4);
      uint2 s = *(const uint2*)(at + 8);
      // The sum starts at what the offset of the weights adds too much, and at MAGIC, which makes
      // a float of it.
      i32 from = (i32)s.y * Format<F>::OFFSET + MAGIC_BITS;
#pragma unroll
      for (int t = 0; t < T; t++) {
        i32 d = dp4a(q[t][0], a.x, from);
        d = dp4a(q[t][1], a.y, d);
        d = dp4a(q[t][2], a.z, d);
        d = dp4a(q[t][3], a.w, d);
        d = dp4a(q[t][4], c.x, d);
        d = dp4a(q[t][5], c.y, d);
        d = dp4a(q[t][6], c.z, d);
        d = dp4a(q[t][7], c.w, d);
        acc[t][r] = fma(add(bits((u32)d), -MAGIC), mul(scale[t], bits(s.x)), acc[t][r]);
      }
    }
  }
}

// Sums of a panel for eight rows: s[i][0] and s[i][1] are output 4 (lane / 4) + 2i of rows
// 2 (lane % 4) and the next, s[i][2] and s[i][3] are the output after it.
struct Fast { float s[2][4]; };

// Sixteen k of a panel: words 4 (lane / 4).. of rows lane % 4 and lane % 4 + 4 of eight rows of words.
DI void fast_step(Fast& acc, uint4 lo, uint4 hi, u32 b0, u32 b1) {
  dots16(acc.s[0], lo.x, lo.y, hi.x, hi.y, b0, b1);
  dots16(acc.s[1], lo.z, lo.w, hi.z, hi.w, b0, b1);
}

// A leaf of T panels and R rows; w points at the leaf's first word. What is past `len` counts as 0.
template <int T, int R> DI void fast_leaf(const char* const (&w)[T], const u32* x, int len, Fast (&acc)[T][(R + 7) / 8]) {
  constexpr int N = (R + 7) / 8, STEPS = T >= 4 ? 1 : 4 / T;
  u32 lane = lane_id(), t = lane % 4, g = lane / 4;
  const u32* row[N];
#pragma unroll
  for (int n = 0; n < N; n++) row[n] = x + min(n * 8 + g, R - 1) * Format<FAST>::X + t;
#pragma unroll
  for (int p = 0; p < T; p++)
#pragma unroll
    for (int i = 0; i < 8 * N; i++) acc[p][i / 8].s[i / 4 % 2][i % 4] = 0.0f;
  int steps = (len + 15) / 16, whole = len / 16, words = (len + 1) / 2;
  auto take = [&](int p, int step, int half) {
    int k = step * 8 + half * 4 + t;
    if (step < whole || k < words) return stream16(w[p] + k * 128 + g * 16);
    return make_uint4(0, 0, 0, 0);
  };
  // The next words are on their way while these are used.
  uint4 next[STEPS][T][2];
#pragma unroll
  for (int i = 0; i < STEPS; i++)
#pragma unroll
    for (int p = 0; p < T; p++)
#pragma unroll
      for (int h = 0; h < 2; h++) next[i][p][h] = take(p, i, h);
#pragma unroll 1
  for (int step = 0; step < steps; step += STEPS) {
    uint4 v[STEPS][T][2];
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
      for (int p = 0; p < T; p++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          v[i][p][h] = next[i][p][h];
          next[i][p][h] = take(p, step + STEPS + i, h);
        }
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      if (step + i >= steps) continue;
#pragma unroll
      for (int n = 0; n < N; n++) {
        u32 b0 = row[n][(step + i) * 8], b1 = row[n][(step + i) * 8 + 4];
#pragma unroll
        for (int p = 0; p < T; p++) fast_step(acc[p][n], v[i][p][0], v[i][p][1], b0, b1);
      }
    }
  }
}

template <int F, int T, int R> DI void leaf(const char* const (&w)[T], const float* x, int len, float* red) {
  if constexpr (F == FAST) {
    constexpr int N = (R + 7) / 8;
    Fast acc[T][N];
    fast_leaf<T, R>(w, (const u32*)x, len, acc);
    u32 r = lane_id() % 4 * 2, j = lane_id() / 4 * 4;
    // x of all warps has been read before sums are written where it was.
    __syncthreads();
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
      for (int n = 0; n < 2 * N; n++) {
        u32 i = n % 2, to = r + n / 2 * 8 + i;
        const Fast& f = acc[t][n / 2];
        if (to < R) *(float4*)(red + (to * T + t) * 32 + j) = make_float4(f.s[0][i], f.s[0][2 + i], f.s[1][i], f.s[1][2 + i]);
      }
    return;
  }
  float acc[T][R];
#pragma unroll
  for (int t = 0; t < T; t++)
#pragma unroll
    for (int r = 0; r < R; r++) acc[t][r] = 0.0f;
  u32 lane = lane_id();
  if constexpr (Format<F>::BLOCKS) {
    block_leaf<F, T, R>(w, (const u32*)x, (len + 31) / 32, acc);
  } else {
    const char* at[T];
#pragma unroll
    for (int t = 0; t < T; t++) at[t] = w[t] + lane * 4;
    float_leaf<F, T, R>(at, x, len, acc);
  }
  // x of all warps has been read before sums are written where it was.
  __syncthreads();
#pragma unroll
  for (int t = 0; t < T; t++)
#pragma unroll
    for (int r = 0; r < R; r++) red[(r * T + t) * 32 + lane] = acc[t][r];
}

// Copies a leaf of a row into shared memory, by one warp.
template <int F> DI void stage(float* to, const float* row, u32 leaf_index, int len) {
  u32 lane = lane_id();
  if (Format<F>::BLOCKS) {
    const u32* from = (const u32*)row + leaf_index * 8 * RECORD;
    int words = (len + 31) / 32 * RECORD;
    for (int i = lane; i < words; i += 32) ((u32*)to)[i / RECORD * 12 + i % RECORD] = from[i];
  } else if (F == FAST) {
    const u32* from = (const u32*)row + leaf_index * (LEAF / 2);
    int words = (len + 1) / 2;
#pragma unroll
    for (int i = 0; i < 4; i++) ((u32*)to)[lane + 32 * i] = lane + 32 * i < words ? from[lane + 32 * i] : 0;
  } else {
    const float* from = row + leaf_index * LEAF;
    if (len == LEAF && ((u64)from & 15) == 0) {
#pragma unroll
      for (int i = 0; i < 2; i++) ((float4*)to)[lane + 32 * i] = ((const float4*)from)[lane + 32 * i];
    } else {
      for (int i = lane; i < LEAF; i += 32) to[i] = i < len ? from[i] : 0.0f;
    }
  }
}

// Warps that share the leaves of a panel: the rest of the eight take other panels.
DI u32 leaf_warps(u32 leaves) { return leaves > 4 ? 8 : leaves > 2 ? 4 : leaves; }

// Products of `count` rows with T panels of each group of warps, w[t] being the first byte of
// panel t of this warp's group (null where there is none). For each row and each of T / N units,
// `put(group, row, unit, lane, sums of panels unit, unit + T / N, ..)` is called by a whole warp.
template <int F, int T, int N, int RM, bool RAGGED, class Row, class Put>
DI void product(const char* const (&panels)[T], u32 k, int count, Row row, float* shared, Put put) {
  constexpr int X = Format<F>::X, UNITS = T / N, RED = RM * T * 32;
  u32 leaves = k == 0 ? 1 : (k + LEAF - 1) / LEAF, lw = leaf_warps(leaves);
  u32 rounds = (leaves + 7) / 8, warp = warp_id(), lane = lane_id();
  u32 mine = warp % lw, groups = 8 / lw;
  float* x = shared + warp * RM * X;
  float* red = shared + warp * RED;
  float* stack = shared + 8 * (RM * X > RED ? RM * X : RED);
  for (u32 round = 0; round < rounds; round++) {
    u32 index = round * 8 + mine;
    bool work = index < leaves && panels[0] != nullptr;
    int len = index < leaves ? min((int)(k - index * LEAF), LEAF) : 0;
    if (work) {
      const char* w[T];
#pragma unroll
      for (int t = 0; t < T; t++) w[t] = (panels[t] ? panels[t] : panels[0]) + (u64)index * Format<F>::LEAF_BYTES;
      u32 bytes = (u32)Format<F>::panel_bytes(len);

      for (int r = 0; r < count; r++) stage<F>(x + r * X, row(r), index, len);
      __syncwarp();
      // Registers are arrays, so a body for each number of rows; rows past `count` are never put.
      if constexpr (RAGGED && RM == 4) {
        if (count == 1) leaf<F, T, 1>(w, x, len, red);
        else if (count == 2) leaf<F, T, 2>(w, x, len, red);
        else leaf<F, T, 4>(w, x, len, red);
      } else if constexpr (RAGGED && RM == 8) {
        if (count <= 2) leaf<F, T, 2>(w, x, len, red);
        else if (count <= 4) leaf<F, T, 4>(w, x, len, red);
        else if (count <= 6) leaf<F, T, 6>(w, x, len, red);
        else leaf<F, T, 8>(w, x, len, red);
      } else if constexpr (RAGGED && RM == 16) {
        if (count <= 4) leaf<F, T, 4>(w, x, len, red);
        else if (count <= 8) leaf<F, T, 8>(w, x, len, red);
        else if (count <= 12) leaf<F, T, 12>(w, x, len, red);
        else leaf<F, T, 16>(w, x, len, red);
      } else {
        leaf<F, T, RM>(w, x, len, red);
      }
    } else {
      __syncthreads();
    }
    __syncthreads();
    int here = min(leaves - round * 8, lw);
    for (u32 unit = warp; unit < groups * count * UNITS; unit += 8) {
      u32 group = unit / (count * UNITS), r = unit / UNITS % count, u = unit % UNITS;
      float sums[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float* p = shared + group * lw * RED + (r * T + u + i * UNITS) * 32 + lane;
        sums[i] = tree8(p, RED, here);
        if (rounds > 1) {
          float* s = stack + (unit * N + i) * 32 + lane;
          u32 level = RM * T * 32, top = __popc(round);
          for (int m = merges(round, rounds); m > 0; m--) sums[i] = add(s[--top * level], sums[i]);
          s[top * level] = sums[i];
        }
      }
      if (round + 1 == rounds) put(group, r, u, lane, sums);
    }
    if (round + 1 < rounds) __syncthreads();
  }
}

// A linear map of several over the same rows.
struct Linear {
  const char* w;      // panels of [n, k]
  const float* bias;  // [n] or null
  float* y;           // [m, n]
  u32 n;
  u32 first;          // the first block of the grid that works on it
};
struct Linears { Linear of[4]; u32 count; };
DI Linear find(const Linears& many, u32 block) {
  Linear l = many.of[0];
#pragma unroll
  for (int i = 1; i < 4; i++)
    if (i < many.count && block >= many.of[i].first) l = many.of[i];
  return l;
}
