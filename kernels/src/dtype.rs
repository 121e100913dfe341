//! Number formats of weights.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How a weight is stored. Products always accumulate in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// Blocks of 32 weights of 8 bits with one bf16 scale: 8.5 bits a weight.
    Int8,
    /// Blocks of 32 weights of 6 bits with one bf16 scale: 6.5 bits a weight.
    Int6,
    /// Blocks of 32 weights of 4 bits with one bf16 scale: 4.5 bits a weight.
    Int4,
}

/// A name that is no number format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no weight format; expected f32, bf16, int8, int6 or int4")]
pub struct UnknownDType(String);

impl DType {
    /// Every format, widest first.
    pub const ALL: [DType; 5] = [DType::F32, DType::Bf16, DType::Int8, DType::Int6, DType::Int4];

    /// Bytes of one weight; `None` where weights are stored in blocks.
    pub fn bytes(self) -> Option<usize> {
        match self {
            DType::F32 => Some(4),
            DType::Bf16 => Some(2),
            DType::Int8 | DType::Int6 | DType::Int4 => None,
        }
    }

    /// Bits of one weight, scales included.
    pub fn bits(self) -> f64 {
        match self {
            DType::F32 => 32.0,
            DType::Bf16 => 16.0,
            DType::Int8 => 8.5,
            DType::Int6 => 6.5,
            DType::Int4 => 4.5,
        }
    }

    /// Whether weights are integers in blocks that share a scale.
    pub fn is_quantised(self) -> bool {
        matches!(self, DType::Int8 | DType::Int6 | DType::Int4)
    }

    /// Name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::Int8 => "int8",
            DType::Int6 => "int6",
            DType::Int4 => "int4",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|dtype| dtype.name() == name);
        found.ok_or_else(|| UnknownDType(name.to_owned()))
    }
}
