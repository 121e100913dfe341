//! Numbers as bytes, little-endian, every bit kept; and back, with every length checked before memory is used.

use std::ops::Range;

/// Bytes that are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bytes of training that have no valid layout; the peer sends damaged data")]
pub struct Damaged;

/// Appends values.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    /// With room for so many bytes before it grows.
    pub(super) fn with_room(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub(super) fn number(&mut self, n: usize) {
        self.0.extend((n as u64).to_le_bytes());
    }

    pub(super) fn range(&mut self, range: &Range<usize>) {
        self.number(range.start);
        self.number(range.end);
    }

    pub(super) fn f32(&mut self, x: f32) {
        self.0.extend(x.to_bits().to_le_bytes());
    }

    pub(super) fn f64(&mut self, x: f64) {
        self.0.extend(x.to_bits().to_le_bytes());
    }

    pub(super) fn text(&mut self, text: &str) {
        self.number(text.len());
        self.0.extend(text.as_bytes());
    }

    pub(super) fn flags(&mut self, flags: &[bool]) {
        self.number(flags.len());
        self.0.extend(flags.iter().map(|flag| u8::from(*flag)));
    }

    pub(super) fn f32s(&mut self, values: &[f32]) {
        self.number(values.len());
        self.0.extend_from_slice(bytemuck::cast_slice(values));
    }

    pub(super) fn u32s(&mut self, values: &[u32]) {
        self.number(values.len());
        self.0.extend_from_slice(bytemuck::cast_slice(values));
    }

    pub(super) fn u64s(&mut self, values: &[u64]) {
        self.number(values.len());
        self.0.extend_from_slice(bytemuck::cast_slice(values));
    }
}

/// Takes values.
#[derive(Debug)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// There is nothing left.
    pub(super) fn end(&self) -> Result<(), Damaged> {
        if self.0.is_empty() { Ok(()) } else { Err(Damaged) }
    }

    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Damaged> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(Damaged)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Damaged> {
        self.take(N)?.try_into().map_err(|_| Damaged)
    }

    pub(super) fn number(&mut self) -> Result<usize, Damaged> {
        usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|_| Damaged)
    }

    pub(super) fn range(&mut self) -> Result<Range<usize>, Damaged> {
        Ok(self.number()?..self.number()?)
    }

    /// How many things follow that take so many bytes each at least.
    pub(super) fn count(&mut self, bytes_each: usize) -> Result<usize, Damaged> {
        let count = self.number()?;
        if count.checked_mul(bytes_each).is_none_or(|bytes| bytes > self.0.len()) {
            return Err(Damaged);
        }
        Ok(count)
    }

    pub(super) fn f32(&mut self) -> Result<f32, Damaged> {
        Ok(f32::from_bits(u32::from_le_bytes(self.array()?)))
    }

    pub(super) fn f64(&mut self) -> Result<f64, Damaged> {
        Ok(f64::from_bits(u64::from_le_bytes(self.array()?)))
    }

    pub(super) fn text(&mut self) -> Result<String, Damaged> {
        let bytes = self.count(1)?;
        String::from_utf8(self.take(bytes)?.to_vec()).map_err(|_| Damaged)
    }

    pub(super) fn flags(&mut self) -> Result<Vec<bool>, Damaged> {
        let count = self.count(1)?;
        Ok(self.take(count)?.iter().map(|flag| *flag != 0).collect())
    }

    pub(super) fn f32s(&mut self) -> Result<Vec<f32>, Damaged> {
        let count = self.count(4)?;
        Ok(bytemuck::pod_collect_to_vec(self.take(count * 4)?))
    }

    pub(super) fn u32s(&mut self) -> Result<Vec<u32>, Damaged> {
        let count = self.count(4)?;
        Ok(bytemuck::pod_collect_to_vec(self.take(count * 4)?))
    }

    pub(super) fn u64s(&mut self) -> Result<Vec<u64>, Damaged> {
        let count = self.count(8)?;
        Ok(bytemuck::pod_collect_to_vec(self.take(count * 8)?))
    }
}
