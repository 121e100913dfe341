//! Compressed sections: one zstd frame each.
//!
//! Trained bf16 weights shrink to about three quarters, at every level of zstd: their exponents are
//! alike, their mantissas are noise. Sorting bytes by their place within a value first ("byte
//! shuffle") won 2 to 4 % more on the demo model and cost several times the time. Weights in blocks
//! of integers hardly shrink at all.
//!
//! Invariants: unpacking writes exactly as many bytes as the index says, or fails; it never writes
//! or allocates more, whatever the frame claims. The index cannot claim more than a frame of that
//! size can hold ([`EXPANSION_MAX`]).

use std::{
    io::{self, Write},
    time::Duration,
};

use lite_llm_kernels::buffer::Buffer;

use super::{
    CheckpointError,
    index::{Hash, Section, Shard, Stored},
    parallel::try_map,
    source::OpenFile,
};

/// Name of the only codec in an index.
pub const ZSTD: &str = "zstd";
/// Levels of zstd that can be asked for.
pub const LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

/// Bytes that a stored byte can stand for, at most: zstd says in 4 that 128 KiB are all alike.
pub const EXPANSION_MAX: u64 = 33_000;
/// Binary logarithm of the window that a frame may ask for: what level 19 takes.
const WINDOW_LOG_MAX: u32 = 23;

/// Sections that would not shrink to this share are stored as they are, and can be read in place.
const WORTH: f64 = 0.97;

/// How a writer compresses.
#[derive(Debug, Clone, Copy)]
pub struct Compression {
    /// Level of zstd, of [`LEVELS`].
    pub level: i32,
    /// The time: this crate has no clock of its own.
    pub now: fn() -> Duration,
}

/// What compression did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Packed {
    /// Sections that were tried.
    pub sections: u64,
    /// Those of them that are stored as they are, because they would hardly shrink.
    pub left: u64,
    /// Bytes before.
    pub bytes: u64,
    /// Bytes that are stored.
    pub stored: u64,
    /// Bytes that were unpacked again.
    pub unpacked: u64,
    /// Time that packing took, summed over threads.
    pub packing: Duration,
    /// Time that unpacking took, summed over threads: every section is unpacked again to see that
    /// nothing was lost.
    pub unpacking: Duration,
}

impl Packed {
    fn add(&mut self, other: &Self) {
        self.sections += other.sections;
        self.left += other.left;
        self.bytes += other.bytes;
        self.stored += other.stored;
        self.unpacked += other.unpacked;
        self.packing += other.packing;
        self.unpacking += other.unpacking;
    }
}

/// Reads a compressed section as it is stored, and verifies that: before memory is taken for what it
/// unpacks to.
pub(super) fn read_packed(
    shard: &Shard,
    section: &Section,
    stored: &Stored,
    file: &OpenFile,
) -> Result<Buffer, CheckpointError> {
    check_codec(shard, section, stored)?;
    let packed = file.read(&shard.path, section.offset..section.offset + stored.bytes)?;
    check_stored(shard, section, Hash::of(&packed))?;
    Ok(packed)
}

/// Unpacks a section into memory of its size. What comes of it is not verified.
pub(super) fn unpack_section(
    shard: &Shard,
    section: &Section,
    packed: &[u8],
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    unpack(packed, out).map_err(|reason| bad_frame(shard, section, reason))
}

/// Compares the hash of a section's bytes in the file with the index.
pub(super) fn check_stored(
    shard: &Shard,
    section: &Section,
    found: Hash,
) -> Result<(), CheckpointError> {
    let expected = section.stored_blake3();
    if found == expected {
        return Ok(());
    }
    let how = if section.stored.is_some() { " as it is stored" } else { "" };
    let (path, part) = (shard.path.clone(), format!("{}{how}", section.name));
    Err(CheckpointError::Damaged { path, part, found, expected })
}

/// Whether this program can unpack a section.
pub(super) fn check_codec(
    shard: &Shard,
    section: &Section,
    stored: &Stored,
) -> Result<(), CheckpointError> {
    if stored.codec == ZSTD {
        return Ok(());
    }
    let (path, section) = (shard.path.clone(), section.name.clone());
    Err(CheckpointError::Codec { path, section, codec: stored.codec.clone() })
}

/// A section that does not unpack.
pub(super) fn bad_frame(shard: &Shard, section: &Section, reason: String) -> CheckpointError {
    CheckpointError::Unpack { path: shard.path.clone(), section: section.name.clone(), reason }
}

/// Hashes what a frame unpacks to, in constant memory, whatever the frame claims.
pub(super) struct HashUnpacked {
    decoder: zstd::stream::write::Decoder<'static, Counted>,
}

struct Counted {
    hasher: blake3::Hasher,
    left: u64,
}

impl io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self
            .left
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| io::Error::other("it unpacks to more bytes than the index says"))?;
        self.hasher.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl HashUnpacked {
    pub(super) fn new(section: &Section) -> io::Result<Self> {
        let counted = Counted { hasher: blake3::Hasher::new(), left: section.bytes };
        let mut decoder = zstd::stream::write::Decoder::new(counted)?;
        decoder.window_log_max(WINDOW_LOG_MAX)?;
        Ok(Self { decoder })
    }

    pub(super) fn update(&mut self, packed: &[u8]) -> io::Result<()> {
        self.decoder.write_all(packed)
    }

    pub(super) fn finish(mut self) -> io::Result<Hash> {
        self.decoder.flush()?;
        let Counted { hasher, left } = self.decoder.into_inner();
        match left {
            0 => Ok(Hash(*hasher.finalize().as_bytes())),
            left => Err(io::Error::other(format!("it ends {left} bytes early"))),
        }
    }
}

/// Fills `out` with what was packed.
pub(super) fn unpack(packed: &[u8], out: &mut [u8]) -> Result<(), String> {
    match zstd::bulk::decompress_to_buffer(packed, out) {
        Ok(found) if found == out.len() => Ok(()),
        Ok(found) => Err(format!("{found} bytes, expected {}", out.len())),
        Err(error) => Err(error.to_string()),
    }
}

impl Compression {
    /// Packs sections on several threads, in their order; `None` stands for one that is better
    /// stored as it is.
    pub(super) fn pack_all(
        &self,
        path: &str,
        threads: usize,
        sections: &[Vec<u8>],
        did: &mut Packed,
    ) -> Result<Vec<Option<Vec<u8>>>, CheckpointError> {
        let packed = try_map(threads, sections, |bytes| self.pack(bytes));
        let packed = packed.map_err(CheckpointError::io(path, "compress"))?;
        Ok(packed
            .into_iter()
            .map(|(packed, this)| {
                did.add(&this);
                packed
            })
            .collect())
    }

    fn pack(&self, bytes: &[u8]) -> io::Result<(Option<Vec<u8>>, Packed)> {
        let began = (self.now)();
        let packed = zstd::bulk::compress(bytes, self.level)?;
        let ended = (self.now)();
        let mut did = Packed {
            sections: 1,
            bytes: bytes.len() as u64,
            packing: ended.saturating_sub(began),
            ..Packed::default()
        };
        if packed.len() as f64 > bytes.len() as f64 * WORTH {
            (did.left, did.stored) = (1, did.bytes);
            return Ok((None, did));
        }
        let mut out = vec![0; bytes.len()];
        let began = (self.now)();
        let unpacked = unpack(&packed, &mut out);
        did.unpacking = (self.now)().saturating_sub(began);
        (did.stored, did.unpacked) = (packed.len() as u64, did.bytes);
        match unpacked {
            Ok(()) if out == bytes => Ok((Some(packed), did)),
            Ok(()) => Err(io::Error::other("it unpacks to other bytes: this machine errs")),
            Err(reason) => Err(io::Error::other(reason)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_asks_for_more_memory_than_ours_do_is_refused() {
        let bytes = [7; 100];
        let (name, blake3) = ("x".into(), Hash::of(&bytes));
        let section = Section { name, offset: 0, bytes: 100, blake3, stored: None };
        for (log, good) in [(WINDOW_LOG_MAX, true), (WINDOW_LOG_MAX + 1, false)] {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(log).unwrap();
            encoder.write_all(&bytes).unwrap();
            // The frame does not say how long it is, so the window counts.
            encoder.flush().unwrap();
            let frame = encoder.finish().unwrap();
            let mut hash = HashUnpacked::new(&section).unwrap();
            let unpacked = hash.update(&frame).and_then(|()| hash.finish());
            assert_eq!(unpacked.ok() == Some(blake3), good, "{log}");
        }
    }

    #[test]
    fn what_is_unpacked_is_what_was_packed() {
        let compression = Compression { level: 3, now: || Duration::ZERO };
        let noise = |n: u32| n.wrapping_mul(2_654_435_761).rotate_left(n % 31) as u8;
        let sections: Vec<Vec<u8>> = [1000, 4096, 100_003]
            .map(|len| (0..len).map(|n| if n % 2 == 0 { noise(n) } else { 63 }).collect())
            .into();
        let mut did = Packed::default();
        for threads in [1, 3] {
            let packed = compression.pack_all("x", threads, &sections, &mut did).unwrap();
            for (bytes, packed) in sections.iter().zip(packed) {
                let packed = packed.expect("half of it is zeros");
                let mut out = vec![1; bytes.len()];
                unpack(&packed, &mut out).unwrap();
                assert!(out == *bytes);
                // What claims to be more or less than the index says is refused.
                assert!(unpack(&packed, &mut vec![0; bytes.len() + 1]).is_err());
                assert!(unpack(&packed, &mut out[1..]).is_err());
                assert!(unpack(&packed[..packed.len() - 1], &mut vec![0; bytes.len()]).is_err());
            }
        }
        assert_eq!((did.sections, did.left), (6, 0));
        assert!(did.stored < did.bytes);
        let mut random = vec![0; 4096];
        blake3::Hasher::new().finalize_xof().fill(&mut random);
        let packed = compression.pack_all("x", 1, &[random], &mut did).unwrap();
        assert_eq!((packed, did.left), (vec![None], 1));
    }
}
