//! Tiers: named slices of a model's capacity, and the sets of them that a request may use.
//!
//! A [`TierId`] is a name, a [`TierConfig`] says what a tier holds, a [`TierSet`] which tiers one
//! request runs with. The order of tiers in a model is their order of capacity.

use std::{borrow::Cow, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Name of a tier, by convention its approximate capacity: `tier_1b`, `tier_10b`, …
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TierId(Cow<'static, str>);

/// One billion parameters.
pub const TIER_1B: TierId = TierId(Cow::Borrowed("tier_1b"));
/// Ten billion parameters.
pub const TIER_10B: TierId = TierId(Cow::Borrowed("tier_10b"));
/// One hundred billion parameters.
pub const TIER_100B: TierId = TierId(Cow::Borrowed("tier_100b"));
/// One trillion parameters.
pub const TIER_1T: TierId = TierId(Cow::Borrowed("tier_1t"));

/// Longest name of a tier, in bytes.
pub const TIER_NAME_BYTES_MAX: usize = 64;

/// A string that cannot name a tier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot name a tier: 1 to 64 of a-z, 0-9, '_' and '-' are expected, a letter first")]
pub struct BadTierName(String);

impl TierId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TierId {
    type Err = BadTierName;

    /// A tier's name is also a folder's name in checkpoints, so its alphabet is narrow.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let fits = !name.is_empty()
            && name.len() <= TIER_NAME_BYTES_MAX
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'));
        if fits {
            Ok(Self(Cow::Owned(name.to_owned())))
        } else {
            Err(BadTierName(name.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for TierId {
    type Error = BadTierName;
    fn try_from(name: String) -> Result<Self, BadTierName> {
        name.parse()
    }
}

impl From<TierId> for String {
    fn from(id: TierId) -> String {
        id.0.into_owned()
    }
}

impl fmt::Display for TierId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where an expert's bytes are now, or where a tier would like them to be (its placement hint).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residence {
    /// Memory of a GPU.
    Hbm,
    /// Memory of the host.
    Dram,
    /// A local disk.
    Nvme,
    /// An object store.
    Archive,
}

/// What one tier holds. Every layer with experts has the same groups of the same size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierConfig {
    /// The tier's name.
    pub id: TierId,
    /// Groups per layer.
    pub groups: u32,
    /// Experts per group.
    pub experts_per_group: u32,
    /// Sum of the parameters of all experts of this tier, over all layers.
    pub parameters: u64,
    /// Residence that this tier would like.
    pub placement: Residence,
}

impl TierConfig {
    /// Experts of this tier in one layer.
    pub fn experts(&self) -> u32 {
        self.groups * self.experts_per_group
    }
}

/// The tiers that a request may use.
///
/// Written by people as `all`, `tier_1b,tier_10b` (just these) or `..tier_10b` (all up to it).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum TierSet {
    /// Every tier of the model.
    #[default]
    All,
    /// Exactly these tiers: one of them is exclusive use, several are cumulative.
    Only(Vec<TierId>),
    /// Every tier up to and including this one, in the model's order.
    UpTo(TierId),
}

/// A set that names no tier of the model, or one that the model lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TierSetError {
    /// The model has no such tier.
    #[error("the model has no tier {tier}; it has {known}")]
    Unknown {
        /// What was asked for.
        tier: TierId,
        /// What there is.
        known: String,
    },
    /// No tier is left to choose from.
    #[error("the set of tiers is empty; name at least one of {known}")]
    Empty {
        /// What there is.
        known: String,
    },
    /// A name in the set cannot be a tier's.
    #[error(transparent)]
    Name(#[from] BadTierName),
}

/// A [`TierSet`] resolved against one model: `allowed[t]` for tier index t.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TierMask(Vec<bool>);

impl TierMask {
    /// Whether the tier at this index may be used.
    pub fn allows(&self, tier: usize) -> bool {
        self.0.get(tier).copied().unwrap_or(false)
    }

    /// How many tiers may be used.
    pub fn count(&self) -> usize {
        self.0.iter().filter(|&&allowed| allowed).count()
    }
}

impl TierSet {
    /// Resolves the set against a model's tiers.
    pub fn mask(&self, tiers: &[TierConfig]) -> Result<TierMask, TierSetError> {
        let known = || {
            let names: Vec<_> = tiers.iter().map(|t| t.id.as_str()).collect();
            names.join(", ")
        };
        let index = |id: &TierId| {
            tiers
                .iter()
                .position(|t| t.id == *id)
                .ok_or_else(|| TierSetError::Unknown { tier: id.clone(), known: known() })
        };
        let mut mask = vec![false; tiers.len()];
        match self {
            TierSet::All => mask.fill(true),
            TierSet::UpTo(last) => mask[..=index(last)?].fill(true),
            TierSet::Only(ids) => {
                for id in ids {
                    mask[index(id)?] = true;
                }
            }
        }
        // A model without experts has no tier to choose, and every set but a wrong name suits it.
        if !tiers.is_empty() && !mask.contains(&true) {
            return Err(TierSetError::Empty { known: known() });
        }
        Ok(TierMask(mask))
    }
}

impl FromStr for TierSet {
    type Err = TierSetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "all" {
            return Ok(TierSet::All);
        }
        if let Some(last) = text.strip_prefix("..") {
            return Ok(TierSet::UpTo(last.trim_start_matches('=').parse()?));
        }
        let ids = text.split(',').map(|name| name.trim().parse()).collect::<Result<_, _>>()?;
        Ok(TierSet::Only(ids))
    }
}

impl fmt::Display for TierSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TierSet::All => f.write_str("all"),
            TierSet::UpTo(last) => write!(f, "..{last}"),
            TierSet::Only(ids) => {
                let names: Vec<_> = ids.iter().map(TierId::as_str).collect();
                f.write_str(&names.join(","))
            }
        }
    }
}

impl TryFrom<String> for TierSet {
    type Error = TierSetError;
    fn try_from(text: String) -> Result<Self, TierSetError> {
        text.parse()
    }
}

impl From<TierSet> for String {
    fn from(set: TierSet) -> String {
        set.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiers() -> Vec<TierConfig> {
        [TIER_1B, TIER_10B, TIER_100B]
            .into_iter()
            .map(|id| TierConfig {
                id,
                groups: 1,
                experts_per_group: 2,
                parameters: 0,
                placement: Residence::Dram,
            })
            .collect()
    }

    #[test]
    fn a_set_allows_exactly_what_it_says() {
        let mask = |text: &str| text.parse::<TierSet>().unwrap().mask(&tiers()).unwrap().0;
        assert_eq!(mask("all"), [true, true, true]);
        assert_eq!(mask("tier_10b"), [false, true, false]);
        assert_eq!(mask("tier_100b, tier_1b"), [true, false, true]);
        assert_eq!(mask("..tier_10b"), [true, true, false]);
    }

    #[test]
    fn an_unknown_tier_is_named_beside_those_that_exist() {
        let error = "tier_2b".parse::<TierSet>().unwrap().mask(&tiers()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the model has no tier tier_2b; it has tier_1b, tier_10b, tier_100b"
        );
        assert!(TierSet::Only(vec![]).mask(&tiers()).is_err());
    }

    #[test]
    fn a_name_that_could_leave_its_folder_is_refused() {
        for name in ["", "..", "a/b", "Tier", "1b", "tier 1"] {
            assert!(name.parse::<TierId>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_set_reads_back_what_it_prints() {
        for text in ["all", "..tier_1b", "tier_1b,tier_1t"] {
            assert_eq!(text.parse::<TierSet>().unwrap().to_string(), text);
        }
    }
}
