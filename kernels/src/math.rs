//! Names of the ways in which products are computed, for flags and for people.

use std::{fmt, str::FromStr};

pub use crate::cuda::fast::Math;

/// A name of no way to compute.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no way to compute; expected exact or fast")]
pub struct UnknownMath(String);

impl Math {
    /// All of them.
    pub const ALL: [Math; 2] = [Math::Exact, Math::Fast];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Math::Exact => "exact",
            Math::Fast => "fast",
        }
    }
}

impl fmt::Display for Math {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Math {
    type Err = UnknownMath;

    fn from_str(name: &str) -> Result<Self, UnknownMath> {
        let known = Self::ALL.into_iter().find(|math| math.name() == name);
        known.ok_or_else(|| UnknownMath(name.to_owned()))
    }
}
