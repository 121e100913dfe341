//! Tiers: named slices of a model's capacity, and the sets of them that a request may use.
//!
//! A [`TierId`] is a name, a [`TierConfig`] says what a tier holds, a [`TierSet`] which tiers one
//! request runs with. The order of tiers in a model is their order of capacity.

use std::{borrow::Cow, fmt, str::FromStr};

use lite_llm_kernels::dtype::DType;
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
    /// Inner width of its experts; absent: [`MoeConfig::intermediate`].
    ///
    /// [`MoeConfig::intermediate`]: crate::config::MoeConfig::intermediate
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intermediate: Option<usize>,
    /// Format of its experts' weights; absent: the checkpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<DType>,
    /// Groups per token that chose this tier; absent: the model's routing says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k_group: Option<u32>,
    /// Experts per chosen group; absent: the model's routing says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k_expert: Option<u32>,
    /// The checkpoint that was opened lacks this tier's files: the model runs without it. Never
    /// stored.
    #[serde(skip)]
    pub absent: bool,
}

impl TierConfig {
    /// A tier that has everything else as the model has it, and would like to be in DRAM.
    pub fn new(id: TierId, groups: u32, experts_per_group: u32, parameters: u64) -> Self {
        Self {
            id,
            groups,
            experts_per_group,
            parameters,
            placement: Residence::Dram,
            intermediate: None,
            dtype: None,
            k_group: None,
            k_expert: None,
            absent: false,
        }
    }

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
    /// The model has this tier, but its files are not in the checkpoint that was opened.
    #[error(
        "the files of tier {tier} are not in the checkpoint; copy them there, or choose among {here}"
    )]
    NotHere {
        /// What was asked for.
        tier: TierId,
        /// Tiers whose files are there.
        here: String,
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
    /// By tier index, whether it may be used.
    pub fn new(allowed: Vec<bool>) -> Self {
        Self(allowed)
    }

    /// A byte for each tier.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.iter().map(|&allowed| allowed.into()).collect()
    }

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
        let names = |wanted: &dyn Fn(&TierConfig) -> bool| {
            let names: Vec<_> = tiers.iter().filter(|t| wanted(t)).map(|t| t.id.as_str()).collect();
            names.join(", ")
        };
        let (known, here) = (|| names(&|_| true), || names(&|t| !t.absent));
        let index = |id: &TierId| match tiers.iter().position(|t| t.id == *id) {
            Some(index) if tiers[index].absent => {
                Err(TierSetError::NotHere { tier: id.clone(), here: here() })
            }
            Some(index) => Ok(index),
            None => Err(TierSetError::Unknown { tier: id.clone(), known: known() }),
        };
        let mut mask = vec![false; tiers.len()];
        let here_up_to = |mask: &mut [bool]| {
            mask.iter_mut().zip(tiers).for_each(|(allowed, tier)| *allowed = !tier.absent);
        };
        match self {
            TierSet::All => here_up_to(&mut mask),
            TierSet::UpTo(last) => here_up_to(&mut mask[..=index(last)?]),
            TierSet::Only(ids) => {
                for id in ids {
                    mask[index(id)?] = true;
                }
            }
        }
        // A model without experts has no tier to choose, and every set but a wrong name suits it.
        if !tiers.is_empty() && !mask.contains(&true) {
            return Err(TierSetError::Empty { known: here() });
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
        [TIER_1B, TIER_10B, TIER_100B].into_iter().map(|id| TierConfig::new(id, 1, 2, 0)).collect()
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
    fn a_tier_without_files_is_left_out_unless_it_is_asked_for() {
        let mut tiers = tiers();
        tiers[1].absent = true;
        let mask = |text: &str| text.parse::<TierSet>().unwrap().mask(&tiers);
        assert_eq!(mask("all").unwrap().0, [true, false, true]);
        assert_eq!(mask("..tier_100b").unwrap().0, [true, false, true]);
        for asked in ["tier_10b", "tier_1b,tier_10b", "..tier_10b"] {
            let error = mask(asked).unwrap_err().to_string();
            assert!(error.contains("tier_10b") && error.contains("tier_1b, tier_100b"), "{error}");
        }
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
