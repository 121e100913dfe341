//! x86-64 registers: eight lanes of AVX2, sixteen of AVX-512.

// Registers are arrays that are indexed alike; closures would be compiled without the instructions.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{Kernel, OPENED_OUTPUTS, Vector};
use crate::{
    blocks::{BLOCK, SCALE_BYTES},
    matrix::PANEL,
};

/// Bytes from one row of words of a block to the next.
const WORDS: usize = PANEL * 4;

/// The same of an opened strip.
const OPENED_WORDS: usize = OPENED_OUTPUTS * 4;

/// Where −Σ q lies in a record of activations.
const MINUS_SUM: usize = BLOCK + 4;

/// Runs a kernel compiled for AVX2 and FMA.
///
/// # Safety
/// The machine has them.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller promises the instructions.
    unsafe { kernel.run::<F32x8>() }
}

/// Runs a kernel compiled for AVX-512.
///
/// # Safety
/// The machine has F, BW, VL and DQ.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(crate) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller promises the instructions.
    unsafe { kernel.run::<F32x16>() }
}

/// Runs a kernel compiled for AVX-512 with VNNI.
///
/// # Safety
/// The machine has F, BW, VL, DQ and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
pub(crate) unsafe fn run_avx512_vnni<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller promises the instructions.
    unsafe { kernel.run::<F32x16>() }
}

/// The weights, plus 32, of four groups of 4 k in int6, from k = 16h on: of a vector of outputs
/// whose words begin at `w`.
///
/// # Safety
/// The machine has AVX2; the block is readable.
#[inline(always)]
unsafe fn int6_words_256(w: *const u8, h: usize) -> [__m256i; 4] {
    // SAFETY: promised by the caller.
    unsafe {
        macro_rules! row {
            ($r:expr) => {
                _mm256_loadu_si256(w.add((3 * h + $r) * WORDS).cast())
            };
        }
        macro_rules! keep {
            ($bits:expr, $mask:expr) => {
                _mm256_and_si256($bits, _mm256_set1_epi8($mask))
            };
        }
        let (a, b, c) = (row!(0), row!(1), row!(2));
        let low = keep!(_mm256_srli_epi16::<6>(a), 3);
        let middle = keep!(_mm256_srli_epi16::<4>(b), 12);
        let high = keep!(_mm256_srli_epi16::<2>(c), 48);
        let d = _mm256_or_si256(_mm256_or_si256(low, middle), high);
        [keep!(a, 63), keep!(b, 63), keep!(c, 63), d]
    }
}

/// The same of a wider vector.
///
/// # Safety
/// The machine has AVX-512 F and BW; the block is readable.
#[inline(always)]
unsafe fn int6_words_512(w: *const u8, h: usize) -> [__m512i; 4] {
    // SAFETY: promised by the caller.
    unsafe {
        macro_rules! row {
            ($r:expr) => {
                _mm512_loadu_si512(w.add((3 * h + $r) * WORDS).cast())
            };
        }
        macro_rules! keep {
            ($bits:expr, $mask:expr) => {
                _mm512_and_si512($bits, _mm512_set1_epi8($mask))
            };
        }
        let (a, b, c) = (row!(0), row!(1), row!(2));
        let low = keep!(_mm512_srli_epi16::<6>(a), 3);
        let middle = keep!(_mm512_srli_epi16::<4>(b), 12);
        let high = keep!(_mm512_srli_epi16::<2>(c), 48);
        let d = _mm512_or_si512(_mm512_or_si512(low, middle), high);
        [keep!(a, 63), keep!(b, 63), keep!(c, 63), d]
    }
}

#[derive(Clone, Copy)]
pub(crate) struct F32x8(__m256);

// SAFETY of every block below: the caller promises the instructions and pointers that are valid
// for 8 lanes.
impl Vector for F32x8 {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm256_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm256_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see the impl.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[*const f32; 16], to: *mut f32, stride: usize) {
        // SAFETY: see the impl.
        unsafe {
            let mut pairs = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                let (a, b) = (_mm256_loadu_ps(rows[2 * i]), _mm256_loadu_ps(rows[2 * i + 1]));
                pairs[2 * i] = _mm256_unpacklo_ps(a, b);
                pairs[2 * i + 1] = _mm256_unpackhi_ps(a, b);
            }
            // fours[g][c] has, in its part of 128 bits number l, column 4 l + c of rows 4 g to 4 g + 3.
            let mut fours = [[_mm256_setzero_ps(); 4]; 2];
            for g in 0..2 {
                for half in 0..2 {
                    let a = _mm256_castps_pd(pairs[4 * g + half]);
                    let b = _mm256_castps_pd(pairs[4 * g + half + 2]);
                    fours[g][2 * half] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
                    fours[g][2 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
                }
            }
            for c in 0..4 {
                let (a, b) = (fours[0][c], fours[1][c]);
                _mm256_storeu_ps(to.add(c * stride), _mm256_permute2f128_ps::<0x20>(a, b));
                _mm256_storeu_ps(to.add((c + 4) * stride), _mm256_permute2f128_ps::<0x31>(a, b));
            }
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_low(from: *const u32) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let words = _mm256_loadu_si256(from.cast());
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_high(from: *const u32) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let words = _mm256_loadu_si256(from.cast());
            let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            Self(_mm256_castsi256_ps(_mm256_and_si256(words, high)))
        }
    }

    #[inline(always)]
    unsafe fn dots_int8<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: see the impl; records and blocks are promised by the caller.
        unsafe {
            // |w| · (x with the sign of w): pairs are at most 2 · 128 · 127 and fit in 16 bits.
            let (flip, ones) = (_mm256_set1_epi8(-128), _mm256_set1_epi16(1));
            macro_rules! weights {
                ($p:expr, $g:expr, $v:expr) => {{
                    let w = _mm256_loadu_si256(w[$p].add($g * WORDS + $v * 32).cast());
                    let w = _mm256_xor_si256(w, flip);
                    (w, _mm256_abs_epi8(w))
                }};
            }
            macro_rules! add_dots {
                ($sum:expr, $w:expr, $r:expr, $g:expr) => {{
                    let x = x[$r].add(4 * $g).cast::<i32>().read_unaligned();
                    let x = _mm256_sign_epi8(_mm256_set1_epi32(x), $w.0);
                    let dots = _mm256_madd_epi16(_mm256_maddubs_epi16($w.1, x), ones);
                    $sum = _mm256_add_epi32($sum, dots);
                }};
            }
            let mut sums = [[[_mm256_setzero_si256(); N]; R]; P];
            for g in 0..BLOCK / 4 {
                // Keep the fewer in registers, and stream the others past them.
                if R > N {
                    for p in 0..P {
                        let mut ws = [(flip, flip); N];
                        for v in 0..N {
                            ws[v] = weights!(p, g, v);
                        }
                        for r in 0..R {
                            for v in 0..N {
                                add_dots!(sums[p][r][v], ws[v], r, g);
                            }
                        }
                    }
                } else {
                    for v in 0..N {
                        for p in 0..P {
                            let w = weights!(p, g, v);
                            for r in 0..R {
                                add_dots!(sums[p][r][v], w, r, g);
                            }
                        }
                    }
                }
            }
            let mut out = [[[Self::zero(); N]; R]; P];
            for p in 0..P {
                for r in 0..R {
                    for v in 0..N {
                        out[p][r][v] = Self(_mm256_cvtepi32_ps(sums[p][r][v]));
                    }
                }
            }
            out
        }
    }

    const OPENS_INT8: bool = true;

    #[inline(always)]
    unsafe fn open_int8(block: *const u8, lane: usize, opened: *mut u8) {
        // SAFETY: see the impl; the caller promises room for an opened block.
        unsafe {
            for v in 0..OPENED_OUTPUTS / 8 {
                let words = block.cast::<u32>().add(v * 8);
                let scales = if lane < 16 {
                    Self::load_bf16_low(words)
                } else {
                    Self::load_bf16_high(words)
                };
                scales.store(opened.cast::<f32>().add(v * 8));
            }
            let (block, opened) = (block.add(SCALE_BYTES + lane * 4), opened.add(OPENED_WORDS));
            let (flip, zero) = (_mm256_set1_epi8(-128), _mm256_setzero_si256());
            for at in (0..OPENED_WORDS).step_by(32) {
                // Eight pairs of at most 2 · 128 fit in 16 bits.
                let mut negative = zero;
                for g in 0..BLOCK / 4 {
                    let w = _mm256_loadu_si256(block.add(g * WORDS + at).cast());
                    let w = _mm256_xor_si256(w, flip);
                    let (size, sign) = (_mm256_abs_epi8(w), _mm256_cmpgt_epi8(zero, w));
                    let to = opened.add((2 * g + 1) * OPENED_WORDS + at);
                    _mm256_storeu_si256(to.cast(), size);
                    _mm256_storeu_si256(to.add(OPENED_WORDS).cast(), sign);
                    // Times -1 where w < 0.
                    negative = _mm256_sub_epi16(negative, _mm256_maddubs_epi16(size, sign));
                }
                let negative = _mm256_madd_epi16(negative, _mm256_set1_epi16(1));
                _mm256_storeu_si256(opened.add(at).cast(), negative);
            }
        }
    }

    #[inline(always)]
    unsafe fn dots_opened_int8<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: see the impl; records and blocks are promised by the caller.
        unsafe {
            // |w| · (x or -1 - x): pairs are at most 2 · 128 · 128, as negative numbers, and fit.
            let ones = _mm256_set1_epi16(1);
            let mut out = [[[Self::zero(); N]; R]; P];
            for p in 0..P {
                let mut sums = [[_mm256_setzero_si256(); N]; R];
                for v in 0..N {
                    let negative = _mm256_loadu_si256(w[p].add(v * 32).cast());
                    for r in 0..R {
                        sums[r][v] = negative;
                    }
                }
                for g in 0..BLOCK / 4 {
                    let mut sizes = [ones; N];
                    let mut signs = [ones; N];
                    for v in 0..N {
                        let at = w[p].add((2 * g + 1) * OPENED_WORDS + v * 32);
                        sizes[v] = _mm256_loadu_si256(at.cast());
                        signs[v] = _mm256_loadu_si256(at.add(OPENED_WORDS).cast());
                    }
                    for r in 0..R {
                        let x = x[r].add(4 * g).cast::<i32>().read_unaligned();
                        let x = _mm256_set1_epi32(x);
                        for v in 0..N {
                            let x = _mm256_xor_si256(x, signs[v]);
                            let dots = _mm256_madd_epi16(_mm256_maddubs_epi16(sizes[v], x), ones);
                            sums[r][v] = _mm256_add_epi32(sums[r][v], dots);
                        }
                    }
                }
                for r in 0..R {
                    for v in 0..N {
                        out[p][r][v] = Self(_mm256_cvtepi32_ps(sums[r][v]));
                    }
                }
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn dots_int6<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: see the impl; records and blocks are promised by the caller.
        unsafe {
            // A lane of 16 bits adds 4 products of at most 63 · 127, which fit.
            let ones = _mm256_set1_epi16(1);
            let mut sums = [[[_mm256_setzero_si256(); N]; R]; P];
            for h in 0..BLOCK / 16 {
                for v in 0..N {
                    for p in 0..P {
                        let ws = int6_words_256(w[p].add(v * 32), h);
                        for r in 0..R {
                            let x = x[r].add(16 * h).cast::<i32>();
                            let mut dots = [ones; 4];
                            for i in 0..4 {
                                let x = _mm256_set1_epi32(x.add(i).read_unaligned());
                                dots[i] = _mm256_maddubs_epi16(ws[i], x);
                            }
                            let two = _mm256_madd_epi16(_mm256_add_epi16(dots[0], dots[1]), ones);
                            let more = _mm256_madd_epi16(_mm256_add_epi16(dots[2], dots[3]), ones);
                            let sum = &mut sums[p][r][v];
                            *sum = _mm256_add_epi32(*sum, _mm256_add_epi32(two, more));
                        }
                    }
                }
            }
            let mut out = [[[Self::zero(); N]; R]; P];
            for r in 0..R {
                let offset = x[r].add(MINUS_SUM).cast::<i32>().read_unaligned() << 5;
                let offset = _mm256_set1_epi32(offset);
                for p in 0..P {
                    for v in 0..N {
                        out[p][r][v] =
                            Self(_mm256_cvtepi32_ps(_mm256_add_epi32(sums[p][r][v], offset)));
                    }
                }
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn dots_int4<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: see the impl; records and blocks are promised by the caller.
        unsafe {
            // A lane of 16 bits adds 16 products of at most 15 · 127, which fit.
            let (low, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
            let mut pairs = [[[_mm256_setzero_si256(); N]; R]; P];
            for g in 0..BLOCK / 8 {
                for v in 0..N {
                    for p in 0..P {
                        let both = _mm256_loadu_si256(w[p].add(g * WORDS + v * 32).cast());
                        let first = _mm256_and_si256(both, low);
                        let second = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
                        for r in 0..R {
                            let x = x[r].add(8 * g).cast::<i32>();
                            let (a, b) = (x.read_unaligned(), x.add(1).read_unaligned());
                            let a = _mm256_maddubs_epi16(first, _mm256_set1_epi32(a));
                            let b = _mm256_maddubs_epi16(second, _mm256_set1_epi32(b));
                            let sum = &mut pairs[p][r][v];
                            *sum = _mm256_add_epi16(*sum, _mm256_add_epi16(a, b));
                        }
                    }
                }
            }
            let mut out = [[[Self::zero(); N]; R]; P];
            for r in 0..R {
                let offset = x[r].add(MINUS_SUM).cast::<i32>().read_unaligned() << 3;
                let offset = _mm256_set1_epi32(offset);
                for p in 0..P {
                    for v in 0..N {
                        let sum = _mm256_madd_epi16(pairs[p][r][v], ones);
                        out[p][r][v] = Self(_mm256_cvtepi32_ps(_mm256_add_epi32(sum, offset)));
                    }
                }
            }
            out
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct F32x16(__m512);

// SAFETY of every block below: the caller promises the instructions and pointers that are valid
// for 16 lanes.
impl Vector for F32x16 {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see the impl.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[*const f32; 16], to: *mut f32, stride: usize) {
        // SAFETY: see the impl.
        unsafe {
            let mut pairs = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                let (a, b) = (_mm512_loadu_ps(rows[2 * i]), _mm512_loadu_ps(rows[2 * i + 1]));
                pairs[2 * i] = _mm512_unpacklo_ps(a, b);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(a, b);
            }
            // fours[g][c] has, in its part of 128 bits number l, column 4 l + c of rows 4 g to 4 g + 3.
            let mut fours = [[_mm512_setzero_ps(); 4]; 4];
            for g in 0..4 {
                for half in 0..2 {
                    let a = _mm512_castps_pd(pairs[4 * g + half]);
                    let b = _mm512_castps_pd(pairs[4 * g + half + 2]);
                    fours[g][2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                    fours[g][2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
                }
            }
            for c in 0..4 {
                let [a, b, d, e] = [fours[0][c], fours[1][c], fours[2][c], fours[3][c]];
                // Parts 0 and 2, then 1 and 3.
                let (even, even2) =
                    (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(d, e));
                let (odd, odd2) =
                    (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(d, e));
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(even, even2),
                    _mm512_shuffle_f32x4::<0x88>(odd, odd2),
                    _mm512_shuffle_f32x4::<0xdd>(even, even2),
                    _mm512_shuffle_f32x4::<0xdd>(odd, odd2),
                ];
                for l in 0..4 {
                    _mm512_storeu_ps(to.add((4 * l + c) * stride), columns[l]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_low(from: *const u32) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_high(from: *const u32) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            Self(_mm512_castsi512_ps(_mm512_and_si512(words, high)))
        }
    }

    #[inline(always)]
    unsafe fn dots_int8<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: see the impl; records and blocks are promised by the caller.
        unsafe {
            let mut sums = [[[_mm512_setzero_si512(); N]; R]; P];
            for r in 0..R {
                let offset = x[r].add(MINUS_SUM).cast::<i32>().read_unaligned() << 7;
                for p in 0..P {
                    sums[p][r] = [_mm512_set1_epi32(offset); N];
                }
            }
            for g in 0..BLOCK / 4 {
                for v in 0..N {
                    for p in 0..P {
                        let w = _mm512_loadu_si512(w[p].add(g * WORDS + v * 64).cast());
                        for r in 0..R {
                            let x = x[r].add(4 * g).cast::<i32>().read_unaligned();
                            let sum = &mut sums[p][r][v];
                            *sum = _mm512_dpbusd_epi32(*sum, w, _mm512_set1_epi32(x));
                        }
                    }
                }
            }
            let mut out = [[[Self::zero(); N]; R]; P];
            for p in 0..P {
                for r in 0..R {
                    for v in 0..N {
                        out[p][r][v] = Self(_mm512_cvtepi32_ps(sums[p][r][v]));
                    }
                }
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn dots_int6<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: see the impl; records and blocks are promised by the caller.
        unsafe {
            let mut sums = [[[_mm512_setzero_si512(); N]; R]; P];
            for r in 0..R {
                let offset = x[r].add(MINUS_SUM).cast::<i32>().read_unaligned() << 5;
                for p in 0..P {
                    sums[p][r] = [_mm512_set1_epi32(offset); N];
                }
            }
            for h in 0..BLOCK / 16 {
                for v in 0..N {
                    for p in 0..P {
                        let ws = int6_words_512(w[p].add(v * 64), h);
                        for i in 0..4 {
                            for r in 0..R {
                                let x = x[r].add(16 * h + 4 * i).cast::<i32>().read_unaligned();
                                let sum = &mut sums[p][r][v];
                                *sum = _mm512_dpbusd_epi32(*sum, ws[i], _mm512_set1_epi32(x));
                            }
                        }
                    }
                }
            }
            let mut out = [[[Self::zero(); N]; R]; P];
            for p in 0..P {
                for r in 0..R {
                    for v in 0..N {
                        out[p][r][v] = Self(_mm512_cvtepi32_ps(sums[p][r][v]));
                    }
                }
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn dots_int4<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: see the impl; records and blocks are promised by the caller.
        unsafe {
            let low = _mm512_set1_epi8(15);
            let mut sums = [[[_mm512_setzero_si512(); N]; R]; P];
            for r in 0..R {
                let offset = x[r].add(MINUS_SUM).cast::<i32>().read_unaligned() << 3;
                for p in 0..P {
                    sums[p][r] = [_mm512_set1_epi32(offset); N];
                }
            }
            for g in 0..BLOCK / 8 {
                for v in 0..N {
                    for p in 0..P {
                        let both = _mm512_loadu_si512(w[p].add(g * WORDS + v * 64).cast());
                        let first = _mm512_and_si512(both, low);
                        let second = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                        for r in 0..R {
                            let x = x[r].add(8 * g).cast::<i32>();
                            let (a, b) = (x.read_unaligned(), x.add(1).read_unaligned());
                            let sum = &mut sums[p][r][v];
                            *sum = _mm512_dpbusd_epi32(*sum, first, _mm512_set1_epi32(a));
                            *sum = _mm512_dpbusd_epi32(*sum, second, _mm512_set1_epi32(b));
                        }
                    }
                }
            }
            let mut out = [[[Self::zero(); N]; R]; P];
            for p in 0..P {
                for r in 0..R {
                    for v in 0..N {
                        out[p][r][v] = Self(_mm512_cvtepi32_ps(sums[p][r][v]));
                    }
                }
            }
            out
        }
    }
}
