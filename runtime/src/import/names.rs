//! Which source tensor, or which rows of one, become a tensor of the checkpoint.
//!
//! All known spellings are accepted for every class: experts one by one (`gate_proj`, `up_proj`,
//! `down_proj` or Mixtral's `w1`, `w3`, `w2`), or fused over all experts (`gate_up_proj`
//! [experts, 2 · inner, hidden], gate rows first, and `down_proj` [experts, hidden, inner]),
//! below `mlp` or `block_sparse_moe`. The importer of GGUF files calls a stack of all experts
//! `gate_proj` [experts, inner, hidden], `up_proj` and `down_proj`.
//!
//! Invariant: after [`Names::check_all_used`], every tensor of the source went somewhere, but for
//! those that are known to be derived from others.

use std::{collections::HashSet, ops::Range};

use super::{
    ImportError,
    tensors::{SourceDType, Tensors, View},
};
use crate::{
    checkpoint::layout::{EXPERT_ROUTER, Part, Shape, TIER_ROUTER, TensorSpec},
    config::ModelConfig,
};

/// Where the values of a tensor come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// These rows.
    Rows(View),
    /// Each row is the mean of some rows: the gate of a tier or group, which the source lacks.
    Means(View, Vec<Range<usize>>),
}

impl Origin {
    /// Bytes of the source that go to the tensor. Means are made of rows that go elsewhere, too,
    /// and count there.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Origin::Rows(view) => view.bytes(),
            Origin::Means(..) => 0,
        }
    }

    /// Format of the source's values.
    pub(super) fn dtype(&self) -> SourceDType {
        let (Origin::Rows(view) | Origin::Means(view, _)) = self;
        view.dtype
    }
}

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Whether one table serves as embedding and output projection: as the configuration says,
/// unless the folder holds two that differ. Transformers 5 then uses both, and so must we:
/// weights are not dropped because of a wrong flag.
pub(super) fn tied(source: &Tensors, config: &ModelConfig) -> Result<bool, ImportError> {
    if !config.tied_embeddings || !source.contains(EMBED) || !source.contains(HEAD) {
        return Ok(config.tied_embeddings);
    }
    let shape = [config.vocab, config.hidden];
    source.equal(&source.view(EMBED, &shape)?, &source.view(HEAD, &shape)?)
}

/// Whether a tensor is stored in the model's format: everything but gates, norms and biases.
pub(super) fn follows_model_dtype(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    !name.contains("router") && !last.ends_with("norm") && !last.ends_with("_bias")
}

/// Finds origins, and remembers which source tensors they use.
#[derive(Debug)]
pub(super) struct Names<'a> {
    source: &'a Tensors,
    config: &'a ModelConfig,
    used: HashSet<String>,
}

const BLOCKS: [&str; 2] = ["mlp", "block_sparse_moe"];

impl<'a> Names<'a> {
    /// Names of one folder and model.
    pub(super) fn new(source: &'a Tensors, config: &'a ModelConfig) -> Self {
        Self { source, config, used: HashSet::new() }
    }

    /// The origin of a tensor.
    pub(super) fn origin(&mut self, part: Part, spec: &TensorSpec) -> Result<Origin, ImportError> {
        match part {
            Part::Model => {
                // One table for both ends may be stored under either name.
                let head = self.config.tied_embeddings && spec.name == "embed";
                let head = head.then(|| HEAD.to_owned());
                let name = self.spelled([model_name(&spec.name)].into_iter().chain(head));
                self.whole(&name, spec)
            }
            Part::Layer(layer) => {
                let prefix = format!("layers.{layer}.");
                let rest = spec.name.strip_prefix(&prefix).unwrap_or(&spec.name);
                self.whole(&format!("model.layers.{layer}.{}", layer_name(rest)), spec)
            }
            Part::TierRouter { tier, layer } => {
                let per_group = self.experts_per_group(tier);
                let all = self.tier_experts(tier);
                if spec.name == TIER_ROUTER {
                    return self.means(layer, vec![all]);
                }
                let groups = all.step_by(per_group).map(|first| first..first + per_group);
                self.means(layer, groups.collect())
            }
            Part::Group { tier, layer, group } => {
                let per_group = self.experts_per_group(tier);
                let first = self.tier_experts(tier).start + group as usize * per_group;
                if spec.name == EXPERT_ROUTER {
                    let gate = self.gate(layer)?;
                    return Ok(Origin::Rows(gate.slice(first, per_group)));
                }
                let mut pieces = spec.name.rsplit('.');
                let matrix = pieces.next().unwrap_or_default();
                let expert = pieces.next().and_then(|e| e.parse::<usize>().ok()).unwrap_or(0);
                self.expert(layer, first + expert, matrix, spec)
            }
        }
    }

    /// Says whether the source has tensors that nobody asked for.
    pub(super) fn check_all_used(&self) -> Result<(), ImportError> {
        let tied = self.config.tied_embeddings;
        let derived = |name: &str| name.ends_with(".rotary_emb.inv_freq") || (tied && name == HEAD);
        let names = self.source.names();
        let mut left = names.iter().filter(|name| !self.used.contains(**name) && !derived(name));
        match left.next() {
            None => Ok(()),
            Some(first) => Err(ImportError::Tensor {
                path: self.source.path_of(first),
                tensor: self.source.name_in_file(first),
                found: format!("nothing in the model uses it, nor {} others", left.count()),
                expected: "configuration and weights do not describe the same model, or its \
                           class has a part that is not known here"
                    .into(),
            }),
        }
    }

    fn experts(&self) -> usize {
        self.config.moe.as_ref().map_or(0, |moe| moe.experts())
    }

    fn experts_per_group(&self, tier: usize) -> usize {
        self.config.moe.as_ref().map_or(1, |moe| moe.tiers[tier].experts_per_group as usize)
    }

    /// Experts of a tier, as indices of the source's flat list.
    fn tier_experts(&self, tier: usize) -> Range<usize> {
        let tiers = self.config.moe.as_ref().map_or(&[][..], |moe| &moe.tiers);
        let first = tiers[..tier].iter().map(|t| t.experts() as usize).sum();
        first..first + tiers[tier].experts() as usize
    }

    fn view(&mut self, name: &str, shape: &[usize]) -> Result<View, ImportError> {
        let view = self.source.view(name, shape)?;
        if !self.used.contains(name) {
            self.used.insert(name.into());
        }
        Ok(view)
    }

    fn whole(&mut self, name: &str, spec: &TensorSpec) -> Result<Origin, ImportError> {
        Ok(Origin::Rows(self.view(name, &spec.dims())?))
    }

    /// The first of several spellings that exists, or the first of all.
    fn spelled(&self, spellings: impl IntoIterator<Item = String>) -> String {
        let mut first = None;
        for name in spellings {
            if self.source.contains(&name) {
                return name;
            }
            first.get_or_insert(name);
        }
        first.expect("every tensor has a spelling")
    }

    fn gate(&mut self, layer: usize) -> Result<View, ImportError> {
        let name =
            self.spelled(BLOCKS.map(|block| format!("model.layers.{layer}.{block}.gate.weight")));
        self.view(&name, &[self.experts(), self.config.hidden])
    }

    fn means(&mut self, layer: usize, rows: Vec<Range<usize>>) -> Result<Origin, ImportError> {
        Ok(Origin::Means(self.gate(layer)?, rows))
    }

    fn expert(
        &mut self,
        layer: usize,
        expert: usize,
        matrix: &str,
        spec: &TensorSpec,
    ) -> Result<Origin, ImportError> {
        let Shape::Matrix { n, k } = spec.shape else {
            unreachable!("experts are made of matrices");
        };
        let at = BLOCKS.map(|block| format!("model.layers.{layer}.{block}.experts"));
        for at in &at {
            let fused = match matrix {
                "gate" => (format!("{at}.gate_up_proj"), 2 * n, 0),
                "up" => (format!("{at}.gate_up_proj"), 2 * n, n),
                _ => (format!("{at}.down_proj"), n, 0),
            };
            for (name, rows, from) in [fused, (format!("{at}.{matrix}_proj"), n, 0)] {
                if self.source.contains(&name) {
                    let all = self.view(&name, &[self.experts(), rows, k])?;
                    return Ok(Origin::Rows(all.slice(expert * rows + from, n)));
                }
            }
        }
        let names = match matrix {
            "gate" => ["gate_proj", "w1"],
            "up" => ["up_proj", "w3"],
            _ => ["down_proj", "w2"],
        };
        let mixtral = self.config.architecture == "mixtral";
        let order = if mixtral {
            [(1, 1), (0, 0), (0, 1), (1, 0)]
        } else {
            [(0, 0), (1, 1), (0, 1), (1, 0)]
        };
        let name = self.spelled(
            order.map(|(block, name)| format!("{}.{expert}.{}.weight", at[block], names[name])),
        );
        self.whole(&name, spec)
    }
}

fn model_name(name: &str) -> String {
    match name {
        "embed" => EMBED.into(),
        "head" => HEAD.into(),
        other => format!("model.{other}.weight"),
    }
}

/// Source name of a dense tensor below its layer.
fn layer_name(name: &str) -> String {
    match name {
        "attention_norm" => return "input_layernorm.weight".into(),
        "ffn_norm" => return "post_attention_layernorm.weight".into(),
        "shared.router" => return "mlp.shared_expert_gate.weight".into(),
        _ => {}
    }
    match name.split_once('.') {
        Some(("attention", rest)) => match (rest.strip_suffix("_bias"), rest.ends_with("_norm")) {
            (Some(projection), _) => format!("self_attn.{projection}_proj.bias"),
            (None, true) => format!("self_attn.{rest}.weight"),
            (None, false) => format!("self_attn.{rest}_proj.weight"),
        },
        Some(("ffn", matrix)) => format!("mlp.{matrix}_proj.weight"),
        Some(("shared", matrix)) => format!("mlp.shared_expert.{matrix}_proj.weight"),
        _ => name.into(),
    }
}
