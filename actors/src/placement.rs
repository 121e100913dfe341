//! Which node owns which expert.
//!
//! A pure function of the model, the nodes' budgets and the policy. Every expert has exactly one
//! owner. Placement never changes a result, only where work is done.

use lite_llm_runtime::{
    config::ModelConfig,
    random::{Purpose, random_u64},
};

/// How experts are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PlacementPolicy {
    /// Each layer's experts in turn over the nodes, as budgets allow.
    #[default]
    Balanced,
    /// At random, by a seed: for tests of the claim that placement does not matter.
    Random(u64),
}

/// Owners per layer and flat index, as indices of the nodes. Dense layers are empty.
pub type Owners = Vec<Vec<u16>>;

/// The experts do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the experts take {needed} bytes ({experts} of {each} bytes each), the nodes give {budget} \
     ({nodes} nodes); add workers or raise --dram"
)]
pub struct DoesNotFit {
    needed: u64,
    experts: u64,
    each: u64,
    budget: u64,
    nodes: usize,
}

/// Spreads a model's experts, each of `expert_bytes`, over nodes with these budgets in bytes.
pub fn place(
    config: &ModelConfig,
    expert_bytes: u64,
    budgets: &[u64],
    policy: PlacementPolicy,
) -> Result<Owners, DoesNotFit> {
    let nodes = budgets.len();
    let room: Vec<u64> = budgets.iter().map(|budget| budget / expert_bytes.max(1)).collect();
    let experts = config.expert_keys().count() as u64;
    if room.iter().sum::<u64>() < experts || nodes == 0 {
        return Err(DoesNotFit {
            needed: experts * expert_bytes,
            experts,
            each: expert_bytes,
            budget: budgets.iter().sum(),
            nodes,
        });
    }
    let mut held = vec![0u64; nodes];
    let mut owners: Owners = vec![Vec::new(); config.layers.len()];
    for (index, key) in (0u64..).zip(config.expert_keys()) {
        let layer = usize::from(key.layer);
        let first = match policy {
            // Layers start at different nodes, so that few experts still spread evenly.
            PlacementPolicy::Balanced => (owners[layer].len() + layer) % nodes,
            PlacementPolicy::Random(seed) => {
                (random_u64(seed, Purpose::Placement, index) % nodes as u64) as usize
            }
        };
        let owner = (0..nodes)
            .map(|step| (first + step) % nodes)
            .find(|&node| held[node] < room[node])
            .expect("the nodes have room for all experts, checked above");
        held[owner] += 1;
        owners[layer].push(owner as u16);
    }
    Ok(owners)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_model;

    fn counts(owners: &Owners, nodes: usize) -> Vec<usize> {
        let all: Vec<u16> = owners.iter().flatten().copied().collect();
        (0..nodes).map(|n| all.iter().filter(|&&o| usize::from(o) == n).count()).collect()
    }

    #[test]
    fn every_expert_has_one_owner_and_loads_are_even() {
        let config = tiny_model(3, 8);
        let owners = place(&config, 10, &[1000, 1000, 1000], PlacementPolicy::Balanced).unwrap();
        assert_eq!(owners.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8, 8]);
        assert_eq!(counts(&owners, 3), [8, 8, 8]);
    }

    #[test]
    fn budgets_are_kept_whatever_the_policy() {
        let config = tiny_model(3, 8);
        for policy in [PlacementPolicy::Balanced, PlacementPolicy::Random(7)] {
            let owners = place(&config, 10, &[45, 200, 10], policy).unwrap();
            let counts = counts(&owners, 3);
            assert!(counts[0] <= 4 && counts[2] <= 1, "{counts:?}");
            assert_eq!(counts.iter().sum::<usize>(), 24);
        }
        let error = place(&config, 10, &[100, 139], PlacementPolicy::Balanced).unwrap_err();
        assert!(error.to_string().contains("240 bytes (24 of 10 bytes each), the nodes give 239"));
    }

    #[test]
    fn seeds_give_different_placements() {
        let config = tiny_model(3, 8);
        let with = |seed| place(&config, 1, &[99, 99], PlacementPolicy::Random(seed)).unwrap();
        assert_ne!(with(1), with(2));
        assert_eq!(with(1), with(1));
    }
}
