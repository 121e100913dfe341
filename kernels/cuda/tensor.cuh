// Copies that do not wait, and the tensor cores: what only some kernels need.

DI void copy16(u32 to, const void* from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
// The first `bytes` of sixteen; the rest becomes zero.
DI void copy16_of(u32 to, const void* from, u32 bytes) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory"); }
DI void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DI void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DI uint4 stream16(const void* p) {
  uint4 v;
  asm("ld.global.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Four matrices of eight rows of sixteen bytes; lane i says where row i % 8 of matrix i / 8 lies.
DI void four_matrices(u32& a, u32& b, u32& c, u32& d, const void* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(shared_at(at)) : "memory");
}

// d += a · b: sixteen rows of a, sixteen k, eight columns of b, bf16, sums of f32.
DI void dots16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two values as bf16, the first below; a NaN's bits are the hardware's own.
DI u32 rounded(float a, float b) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  return d;
}

// 2^x, 0 where that is below 2^-126.
DI float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
