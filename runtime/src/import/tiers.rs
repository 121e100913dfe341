//! Cutting the flat list of a model's experts into tiers and groups, for experiments.
//!
//! Experts keep their order: the first tier gets the first ones. Gates over tiers and groups,
//! which the source lacks, are the means of their experts' gates.

use std::str::FromStr;

use lite_llm_kernels::dtype::DType;

use super::ImportError;
use crate::{
    config::ModelConfig,
    tier::{TIER_1B, TIER_1T, TIER_10B, TIER_100B, TierConfig, TierId},
};

/// Tiers to cut, written `tier_1b:2x4,tier_10b:1x8:int4:k1x2`: name, groups × experts in a group
/// and, where they are not the model's, the format of the experts and how many groups × experts a
/// token that chose the tier goes to.
#[derive(Debug, Clone, PartialEq)]
pub struct TierCut {
    pub(super) text: String,
    /// Without their parameters, which depend on the model.
    tiers: Vec<TierConfig>,
}

/// Choices per token, written `1x1x2`: tiers × groups in a tier × experts in a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routes {
    pub(super) text: String,
    k: [u32; 3],
}

impl FromStr for TierCut {
    type Err = ImportError;

    fn from_str(text: &str) -> Result<Self, ImportError> {
        let error = |reason: String| ImportError::Cut {
            option: "--tiers",
            text: text.into(),
            reason: format!("{reason}; write it like tier_1b:2x4,tier_10b:1x8:int4:k1x2"),
        };
        let pair = |sizes: &str| {
            let (left, right) = sizes
                .split_once('x')
                .ok_or_else(|| error(format!("{sizes:?} is not GROUPSxEXPERTS")))?;
            let count = |n: &str| match n.trim().parse::<u32>() {
                Ok(n) if n > 0 => Ok(n),
                _ => Err(error(format!("{n:?} is not a whole number from 1"))),
            };
            Ok::<_, ImportError>((count(left)?, count(right)?))
        };
        let mut tiers: Vec<TierConfig> = Vec::new();
        for tier in text.split(',') {
            let mut parts = tier.split(':').map(str::trim);
            let (Some(id), Some(sizes)) = (parts.next(), parts.next()) else {
                return Err(error(format!("{tier:?} is not NAME:GROUPSxEXPERTS")));
            };
            let id: TierId = id.parse().map_err(|e| error(format!("{e}")))?;
            if tiers.iter().any(|t| t.id == id) {
                return Err(error(format!("{id} occurs twice")));
            }
            let (groups, experts) = pair(sizes)?;
            let mut config = TierConfig::new(id, groups, experts, 0);
            for part in parts {
                if let Some(routes) = part.strip_prefix('k') {
                    let (k_group, k_expert) = pair(routes)?;
                    (config.k_group, config.k_expert) = (Some(k_group), Some(k_expert));
                } else {
                    let dtype: DType = part.parse().map_err(|e| error(format!("{e}")))?;
                    config.dtype = Some(dtype);
                }
            }
            tiers.push(config);
        }
        Ok(Self { text: text.into(), tiers })
    }
}

impl FromStr for Routes {
    type Err = ImportError;

    fn from_str(text: &str) -> Result<Self, ImportError> {
        let numbers: Result<Vec<u32>, _> = text.split('x').map(|n| n.trim().parse()).collect();
        match numbers.ok().and_then(|n| <[u32; 3]>::try_from(n).ok()) {
            Some(k) if !k.contains(&0) => Ok(Self { text: text.into(), k }),
            _ => Err(ImportError::Cut {
                option: "--routes",
                text: text.into(),
                reason: "expected TIERSxGROUPSxEXPERTS such as 1x1x2, each at least 1".into(),
            }),
        }
    }
}

/// Cuts the experts as asked. Without `routes`, a token goes to one tier and one group, and to
/// as many experts of it as the source chooses, if it has so many.
pub fn cut(
    config: &mut ModelConfig,
    cut: Option<&TierCut>,
    routes: Option<&Routes>,
) -> Result<(), ImportError> {
    if cut.is_none() && routes.is_none() {
        return Ok(());
    }
    let expert_parameters = config.expert_parameters(0);
    let sparse = config.sparse_layers().count();
    let error = |option, text: &str, reason: String| {
        Err(ImportError::Cut { option, text: text.into(), reason })
    };
    let Some(moe) = &mut config.moe else {
        return error("--tiers", "", "the model has no experts".into());
    };
    if let Some(cut) = cut {
        let experts = moe.experts() as u64;
        let asked = cut.tiers.iter().map(|t| u64::from(t.groups) * u64::from(t.experts_per_group));
        let asked = asked.fold(0, u64::saturating_add);
        if asked != experts {
            let reason = format!("{asked} experts, expected the model's {experts}");
            return error("--tiers", &cut.text, reason);
        }
        moe.tiers = cut.tiers.clone();
        for tier in &mut moe.tiers {
            tier.parameters = parameters(tier.experts(), expert_parameters, sparse);
        }
        for (i, tier) in moe.tiers.iter().enumerate() {
            let (k_group, k_expert) = (tier.k_group.unwrap_or(1), tier.k_expert.unwrap_or(1));
            if k_group > tier.groups || k_expert > tier.experts_per_group {
                let (TierConfig { id, groups, experts_per_group, .. }, text) =
                    (&cut.tiers[i], &cut.text);
                let reason =
                    format!("{id} has {groups}x{experts_per_group}, not {k_group}x{k_expert}");
                return error("--tiers", text, reason);
            }
        }
        let smallest = moe.tiers.iter().map(|t| t.experts_per_group).min().unwrap_or(1);
        moe.routing.k_expert = moe.routing.k_expert.min(smallest);
    }
    if let Some(routes) = routes {
        let [k_tier, k_group, k_expert] = routes.k;
        let fits = k_tier as usize <= moe.tiers.len()
            && moe.tiers.iter().all(|t| k_group <= t.groups && k_expert <= t.experts_per_group);
        if !fits {
            let sizes = moe.tiers.iter().map(|t| format!("{}x{}", t.groups, t.experts_per_group));
            let sizes: Vec<_> = sizes.collect();
            let reason = format!(
                "more than there is: {} tiers of {} groups and experts",
                moe.tiers.len(),
                sizes.join(", ")
            );
            return error("--routes", &routes.text, reason);
        }
        (moe.routing.k_tier, moe.routing.k_group, moe.routing.k_expert) =
            (k_tier, k_group, k_expert);
    }
    Ok(())
}

/// The one tier of a model as published, named by its size.
pub fn flat_tier(experts: u32, expert_parameters: u64, sparse_layers: usize) -> TierConfig {
    let parameters = parameters(experts, expert_parameters, sparse_layers);
    TierConfig::new(name_of(parameters), 1, experts, parameters)
}

fn parameters(experts: u32, expert_parameters: u64, sparse_layers: usize) -> u64 {
    expert_parameters.saturating_mul(u64::from(experts)).saturating_mul(sparse_layers as u64)
}

/// The nearest power of ten from one billion up, on a logarithmic scale.
fn name_of(parameters: u64) -> TierId {
    let named = [
        (3_200_000_000, TIER_1B),
        (32_000_000_000, TIER_10B),
        (320_000_000_000, TIER_100B),
        (3_200_000_000_000, TIER_1T),
    ];
    if let Some((_, id)) = named.into_iter().find(|(limit, _)| parameters < *limit) {
        return id;
    }
    let larger = match parameters {
        n if n < 32_000_000_000_000 => "tier_10t",
        n if n < 320_000_000_000_000 => "tier_100t",
        _ => "tier_1000t",
    };
    larger.parse().expect("a literal that can name a tier")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_reads_as_written_and_refuses_the_rest() {
        let cut: TierCut = "tier_1b:2x4,tier_10b:1x8".parse().unwrap();
        assert_eq!(
            cut.tiers,
            [TierConfig::new(TIER_1B, 2, 4, 0), TierConfig::new(TIER_10B, 1, 8, 0)]
        );
        let cut: TierCut = "tier_1b:2x4:bf16,tier_10b:1x8:int4:k1x2".parse().unwrap();
        assert_eq!(cut.tiers[0].dtype, Some(DType::Bf16));
        assert_eq!(
            cut.tiers[1],
            TierConfig {
                dtype: Some(DType::Int4),
                k_group: Some(1),
                k_expert: Some(2),
                ..TierConfig::new(TIER_10B, 1, 8, 0)
            }
        );
        for bad in [
            "",
            "tier_1b",
            "tier_1b:2",
            "tier_1b:0x4",
            "../x:1x1",
            "a:1x1,a:1x1",
            "a:1x-1",
            "a:1x1:int5",
            "a:1x1:k2",
        ] {
            assert!(bad.parse::<TierCut>().is_err(), "{bad:?}");
        }
        for bad in ["", "1x1", "1x1x0", "1x1x1x1", "ax1x1", "99999999999x1x1"] {
            assert!(bad.parse::<Routes>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_flat_tier_is_named_by_its_size() {
        assert_eq!(name_of(6_800_000), TIER_1B);
        assert_eq!(name_of(6_400_000_000), TIER_10B);
        assert_eq!(name_of(1_000_000_000_000_000).as_str(), "tier_1000t");
    }
}
