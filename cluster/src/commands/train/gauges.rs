//! What a run says of its steps, for an OTLP receiver.

use anyhow::Result;
use lite_llm_runtime::train::run::{Happened, StepRecord};
use prometheus::{Gauge, GaugeVec, IntCounter, IntGauge, Opts, Registry, proto::MetricFamily};

/// The newest of each number. Cloning shares it.
#[derive(Clone)]
pub(super) struct Gauges {
    registry: Registry,
    step: IntGauge,
    tokens: IntCounter,
    loss: GaugeVec,
    held_out: Gauge,
    lr: Gauge,
    grad_norm: Gauge,
    tokens_per_second: Gauge,
    assignments: GaugeVec,
    starved: GaugeVec,
}

impl Gauges {
    pub(super) fn new() -> Result<Self> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| -> Result<Gauge> {
            let gauge = Gauge::new(format!("lite_llm_training_{name}"), help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let gauges = |name: &str, help: &str, label: &str| -> Result<GaugeVec> {
            let options = Opts::new(format!("lite_llm_training_{name}"), help);
            let gauges = GaugeVec::new(options, &[label])?;
            registry.register(Box::new(gauges.clone()))?;
            Ok(gauges)
        };
        let step = IntGauge::new("lite_llm_training_step", "Steps done.")?;
        registry.register(Box::new(step.clone()))?;
        let tokens = IntCounter::new("lite_llm_training_tokens_total", "Tokens of all steps.")?;
        registry.register(Box::new(tokens.clone()))?;
        Ok(Self {
            step,
            tokens,
            loss: gauges("loss", "Losses of the last step, none times its weight.", "kind")?,
            held_out: gauge("held_out_loss", "Cross-entropy of what is held out, in nats.")?,
            lr: gauge("learning_rate", "Learning rate of the last step.")?,
            grad_norm: gauge("gradient_norm", "Norm of all gradients before clipping.")?,
            tokens_per_second: gauge("tokens_per_second", "Tokens per second since the start.")?,
            assignments: gauges(
                "tier_assignments",
                "Routes to a tier's experts in a step.",
                "tier",
            )?,
            starved: gauges("tier_starved", "Experts without a token in the window.", "tier")?,
            registry,
        })
    }

    pub(super) fn observe(&self, event: &Happened, tokens_per_second: f64) {
        match event {
            Happened::Step(record) => {
                let StepRecord { ce, kl_tier, kl_group, kl_expert, aux, z, pull, total, .. } =
                    **record;
                let losses = [
                    ("cross_entropy", ce),
                    ("kl_tier", kl_tier),
                    ("kl_group", kl_group),
                    ("kl_expert", kl_expert),
                    ("aux", aux),
                    ("z", z),
                    ("pull", pull),
                    ("total", total),
                ];
                for (kind, loss) in losses {
                    self.loss.with_label_values(&[kind]).set(loss);
                }
                self.step.set(record.step as i64);
                self.tokens.inc_by(record.tokens as u64);
                self.lr.set(record.lr);
                self.grad_norm.set(record.grad_norm);
                self.tokens_per_second.set(tokens_per_second);
                for tier in &record.tiers {
                    let of = &[tier.tier.as_str()];
                    self.assignments.with_label_values(of).set(tier.assignments as f64);
                    self.starved.with_label_values(of).set(tier.starved as f64);
                }
            }
            Happened::Evaluated { held_out, .. } => self.held_out.set(*held_out),
            _ => {}
        }
    }

    pub(super) fn families(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }
}
