//! Which vector instructions to compute with; chosen at run time, without effect on results.
//!
//! Two ways to write an operation once for every instruction set:
//! - `vectorised!` compiles a plain Rust body once per set, and LLVM vectorises it. Rust never
//!   reorders float arithmetic, so the bits are those of the plain loop;
//! - a `Kernel` is generic over a `Vector` of f32 lanes, for the few loops whose registers must
//!   be laid out by hand.
//!
//! Invariant: code of a set runs only where [`Simd::is_available`] said yes; [`crate::cpu::Cpu`]
//! asks once when it is made.

use std::{fmt, str::FromStr};

use crate::{blocks::BLOCK, matrix::PANEL};

#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

/// A set of vector instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Simd {
    /// Plain Rust; the truth that the others are tested against.
    Scalar,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and DQ.
    Avx512,
    /// AArch64 with NEON.
    Neon,
}

/// A name that is no instruction set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no instruction set; expected scalar, avx2, avx512 or neon")]
pub struct UnknownSimd(String);

impl Simd {
    /// Every set there is, slowest first.
    pub const ALL: [Simd; 4] = [Simd::Scalar, Simd::Neon, Simd::Avx2, Simd::Avx512];

    /// The fastest set of this machine.
    pub fn best() -> Self {
        Self::ALL.into_iter().rfind(|s| s.is_available()).unwrap_or(Simd::Scalar)
    }

    /// The sets of this machine, slowest first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|s| s.is_available()).collect()
    }

    /// Whether this machine has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Simd::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => {
                Simd::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "aarch64")]
            Simd::Neon => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Simd::Scalar => "scalar",
            Simd::Avx2 => "avx2",
            Simd::Avx512 => "avx512",
            Simd::Neon => "neon",
        }
    }

    /// Most rows that one tile of a product holds in registers.
    pub(crate) fn tile_rows(self) -> usize {
        if self == Simd::Avx512 { 12 } else { 6 }
    }

    /// f32 values of one vector.
    pub(crate) fn lanes(self) -> usize {
        match self {
            Simd::Scalar | Simd::Avx2 => 8,
            Simd::Avx512 => 16,
            Simd::Neon => 4,
        }
    }

    /// The set to multiply blocks of integers with: AVX-512 only with VNNI, else AVX2.
    pub(crate) fn for_blocks(self) -> Self {
        #[cfg(target_arch = "x86_64")]
        if self == Simd::Avx512 && !is_x86_feature_detected!("avx512vnni") {
            return Simd::Avx2;
        }
        self
    }

    /// Most rows that one tile of a product of blocks holds in registers.
    pub(crate) fn block_tile_rows(self) -> usize {
        if self.for_blocks() == Simd::Avx512 { 6 } else { 4 }
    }

    /// Runs a kernel over blocks of integers with this set's vectors.
    #[inline]
    pub(crate) fn run_blocks<K: Kernel>(self, kernel: K) -> K::Output {
        match self.for_blocks() {
            // SAFETY: `Cpu::new` refuses sets that this machine lacks; VNNI was just asked for.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { x86::run_avx512_vnni(kernel) },
            other => other.run(kernel),
        }
    }

    /// Runs a kernel with this set's vectors.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            // SAFETY: `Cpu::new` refuses sets that this machine lacks.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { x86::run_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { x86::run_avx512(kernel) },
            // SAFETY: every aarch64 target that Rust supports here has NEON.
            #[cfg(target_arch = "aarch64")]
            Simd::Neon => unsafe { kernel.run::<neon::F32x4>() },
            // SAFETY: plain Rust needs no instruction set.
            _ => unsafe { kernel.run::<scalar::F32x8>() },
        }
    }
}

impl fmt::Display for Simd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Simd {
    type Err = UnknownSimd;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| UnknownSimd(name.to_owned()))
    }
}

/// Asks for a cache line that will be read soon, wherever that is: it goes to the second cache,
/// for the first is too small to wait in. Never faults.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it takes any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Outputs of a strip that is opened.
pub(crate) const OPENED_OUTPUTS: usize = PANEL / 2;
/// Bytes of a block of int8 after [`Vector::open_int8`]. For each output of the strip its scale
/// (f32), then for each Σ |w| over w < 0 (i32), then for each row of words the magnitudes of all
/// and their signs (all bits set where w < 0).
pub(crate) const OPENED_INT8_BYTES: usize = 2 * OPENED_OUTPUTS * 4 + 2 * BLOCK * OPENED_OUTPUTS;

/// Work that is compiled once per instruction set. Everything that `run` calls must be
/// `#[inline(always)]`, or it is compiled without the set's instructions.
pub(crate) trait Kernel {
    type Output;

    /// # Safety
    /// The machine has V's instructions.
    unsafe fn run<V: Vector>(self) -> Self::Output;
}

/// f32 lanes in one register. Every method is one instruction, lane by lane.
///
/// # Safety
/// All methods: the machine has the instructions; pointers are valid for all lanes. No alignment
/// is asked for.
pub(crate) trait Vector: Copy {
    const LANES: usize;

    unsafe fn zero() -> Self;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `self + a * b`, rounded once.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// The low halves of words of two bf16 each, widened.
    unsafe fn load_bf16_low(from: *const u32) -> Self;
    /// The high halves of words of two bf16 each, widened.
    unsafe fn load_bf16_high(from: *const u32) -> Self;

    /// Turns LANES rows of LANES values each over: value j of row i becomes value i of row j of the result,
    /// whose rows are `stride` values apart.
    #[inline(always)]
    unsafe fn transpose(rows: &[*const f32; 16], to: *mut f32, stride: usize) {
        for (i, row) in rows.iter().enumerate().take(Self::LANES) {
            for j in 0..Self::LANES {
                // SAFETY: promised by the caller.
                unsafe { *to.add(j * stride + i) = *row.add(j) };
            }
        }
    }

    /// Exact products of one block (see [`crate::blocks`]) of int8: R activations, each record at
    /// its own address, with N vectors of outputs of each of P panels, whose words begin at `w`
    /// and are [`PANEL`] words apart from one row of words to the next. Panels take turns vector by
    /// vector, so that memory sees P streams that advance together: the nearer they keep in step,
    /// the faster it answers.
    #[inline(always)]
    unsafe fn dots_int8<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: promised by the caller.
        unsafe { plain_dots::<Self, R, P, N>(x, w, int8_of) }
    }

    /// Whether products of many rows gain by [`Vector::open_int8`].
    const OPENS_INT8: bool = false;

    /// Prepares one strip of a block of int8, the [`OPENED_OUTPUTS`] from `lane` on, for
    /// [`Vector::dots_opened_int8`], by
    /// `Σ w·x = Σ_{w>=0} |w|·x + Σ_{w<0} |w|·!x + Σ_{w<0} |w|`, for `!x = −1 − x` (all bits
    /// flipped): the first two are one dot of |w| with `x ^ sign(w)`, and the third, which does not
    /// depend on x, is summed up here. A strip lies in one piece, so that it finds room in the
    /// first cache beside the rows.
    #[inline(always)]
    unsafe fn open_int8(_block: *const u8, _lane: usize, _opened: *mut u8) {
        unreachable!("nothing is gained by it")
    }

    /// As [`Vector::dots_int8`], of blocks that were opened; `w` are their words of outputs.
    #[inline(always)]
    unsafe fn dots_opened_int8<const R: usize, const P: usize, const N: usize>(
        _x: &[*const u8; R],
        _w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        unreachable!("nothing is gained by it")
    }

    /// As [`Vector::dots_int8`], of int6.
    #[inline(always)]
    unsafe fn dots_int6<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: promised by the caller.
        unsafe { plain_dots::<Self, R, P, N>(x, w, int6_of) }
    }

    /// As [`Vector::dots_int8`], of int4.
    #[inline(always)]
    unsafe fn dots_int4<const R: usize, const P: usize, const N: usize>(
        x: &[*const u8; R],
        w: &[*const u8; P],
    ) -> [[[Self; N]; R]; P] {
        // SAFETY: promised by the caller.
        unsafe { plain_dots::<Self, R, P, N>(x, w, int4_of) }
    }
}

/// The integer of k of the output whose words begin at `w`, in int8.
#[inline(always)]
unsafe fn int8_of(w: *const u8, k: usize) -> i32 {
    // SAFETY: the caller promises a block.
    i32::from(unsafe { *w.add(k / 4 * PANEL * 4 + k % 4) }) - 128
}

/// The same in int6.
#[inline(always)]
unsafe fn int6_of(w: *const u8, k: usize) -> i32 {
    // SAFETY: the caller promises a block.
    let row = |r: usize| i32::from(unsafe { *w.add((k / 16 * 3 + r) * PANEL * 4 + k % 4) });
    match k % 16 / 4 {
        3 => (row(0) >> 6 | row(1) >> 6 << 2 | row(2) >> 6 << 4) - 32,
        r => (row(r) & 63) - 32,
    }
}

/// The same in int4.
#[inline(always)]
unsafe fn int4_of(w: *const u8, k: usize) -> i32 {
    // SAFETY: the caller promises a block.
    let byte = unsafe { *w.add(k / 8 * PANEL * 4 + k % 4) };
    i32::from(if k % 8 < 4 { byte & 15 } else { byte >> 4 }) - 8
}

/// The truth that the products of blocks are tested against.
#[inline(always)]
unsafe fn plain_dots<V: Vector, const R: usize, const P: usize, const N: usize>(
    x: &[*const u8; R],
    w: &[*const u8; P],
    weight: unsafe fn(*const u8, usize) -> i32,
) -> [[[V; N]; R]; P] {
    // SAFETY: promised by the caller.
    unsafe {
        let mut out = [[[V::zero(); N]; R]; P];
        for (w, out) in w.iter().zip(&mut out) {
            for (x, out) in x.iter().zip(out) {
                for (v, out) in out.iter_mut().enumerate() {
                    let mut lanes = [0.0f32; 16];
                    for (lane, sum) in lanes[..V::LANES].iter_mut().enumerate() {
                        let w = w.add((v * V::LANES + lane) * 4);
                        let mut whole = 0;
                        for k in 0..BLOCK {
                            whole += weight(w, k) * i32::from((*x.add(k)).cast_signed());
                        }
                        *sum = whole as f32;
                    }
                    *out = V::load(lanes.as_ptr());
                }
            }
        }
        out
    }
}

/// Compiles one plain Rust function per instruction set and a front that takes the set first.
macro_rules! vectorised {
    ($(#[$attr:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$attr])*
        $vis fn $name(simd: $crate::simd::Simd, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match simd {
                // SAFETY: `Cpu::new` refuses sets that this machine lacks.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Simd::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Simd::Avx512 => unsafe { avx512($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(crate) use vectorised;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_the_best_set_is_available() {
        for simd in Simd::ALL {
            assert_eq!(simd.name().parse::<Simd>(), Ok(simd));
        }
        assert!("sse9".parse::<Simd>().unwrap_err().to_string().contains("avx512"));
        assert_eq!(Simd::available().last(), Some(&Simd::best()));
        assert!(Simd::available().contains(&Simd::Scalar));
    }
}
