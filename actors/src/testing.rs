//! Small models for this crate's unit tests.

use lite_llm_runtime::{
    config::{
        AttentionConfig, FeedForward, LayerConfig, ModelConfig, MoeConfig, QkNorm, RopeScaling,
        RoutingConfig, Scoring,
    },
    random::{Purpose, random_u64},
    tier::{TIER_1B, TierConfig},
};

/// `layers` sparse layers of `experts` experts.
pub(crate) fn tiny_model(layers: usize, experts: u32) -> ModelConfig {
    ModelConfig {
        architecture: "test".into(),
        vocab: 16,
        hidden: 8,
        context: 64,
        norm_eps: 1e-5,
        tied_embeddings: true,
        attention: AttentionConfig {
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            qk_norm: QkNorm::None,
            qkv_bias: false,
            output_bias: false,
            clip_qkv: None,
        },
        layers: vec![LayerConfig { window: None, feed_forward: FeedForward::Sparse }; layers],
        moe: Some(MoeConfig {
            intermediate: 4,
            tiers: vec![TierConfig::new(TIER_1B, 1, experts, 0)],
            routing: RoutingConfig {
                k_tier: 1,
                k_group: 1,
                k_expert: 2,
                scoring: Scoring::SoftmaxTopK,
                renormalize: true,
                seed: 0,
            },
            shared: None,
        }),
        bos_token: None,
        eos_tokens: vec![],
    }
}

/// Random numbers for campaigns, each made of the one before.
pub(crate) struct Draws(pub(crate) u64);

impl Draws {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = random_u64(self.0, Purpose::Placement, 0);
        self.0
    }

    /// A number below another.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
