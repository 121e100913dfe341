//! Learning rates, as a function of the step of a phase.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after it has been reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Decay {
    /// Not at all.
    #[default]
    Constant,
    /// Half a cosine down to a part of it at the last step.
    Cosine {
        /// The part.
        #[serde(default)]
        floor: f64,
    },
    /// Straight down to a part of it at the last step.
    Linear {
        /// The part.
        #[serde(default)]
        floor: f64,
    },
    /// Warm-up, stable, decay: constant, then straight down over the last steps.
    Wsd {
        /// Steps of the fall.
        steps: u64,
        /// The part at the last step.
        #[serde(default)]
        floor: f64,
    },
}

/// Warm-up from 0, then what [`Decay`] says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The learning rate that warm-up reaches.
    pub lr: f64,
    /// Steps of warm-up: step t of them has lr · t / warmup.
    pub warmup: u64,
    /// Steps in all.
    pub steps: u64,
    /// What follows.
    pub decay: Decay,
}

impl Schedule {
    /// The learning rate of step t, counted from 1. Steps behind the last have the last one's.
    pub fn at(&self, t: u64) -> f64 {
        let t = t.min(self.steps.max(1));
        if t <= self.warmup {
            return self.lr * t as f64 / self.warmup as f64;
        }
        // From 0 where warm-up ends to 1 at the last step.
        let part = |from: u64| (t - from) as f64 / (self.steps - from).max(1) as f64;
        let factor = match self.decay {
            Decay::Constant => 1.0,
            Decay::Cosine { floor } => {
                let half = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * part(self.warmup)));
                floor + (1.0 - floor) * half
            }
            Decay::Linear { floor } => 1.0 - (1.0 - floor) * part(self.warmup),
            Decay::Wsd { steps, floor } => {
                let from = self.steps.saturating_sub(steps).max(self.warmup);
                if t <= from { 1.0 } else { 1.0 - (1.0 - floor) * part(from) }
            }
        };
        self.lr * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(decay: Decay) -> Vec<f64> {
        let schedule = Schedule { lr: 1e-3, warmup: 3, steps: 10, decay };
        (1..=11).map(|t| schedule.at(t) * 1e3).collect()
    }

    #[test]
    fn warm_up_then_what_the_formulas_say() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        let cosine = all(Decay::Cosine { floor: 0.1 });
        for t in 1..=10u32 {
            let t = f64::from(t);
            let after = 0.1 + 0.45 * (1.0 + (std::f64::consts::PI * (t - 3.0) / 7.0).cos());
            close(cosine[t as usize - 1], if t <= 3.0 { t / 3.0 } else { after });
        }
        close(cosine[10], cosine[9]);
        close(all(Decay::Linear { floor: 0.3 })[9], 0.3);
        close(all(Decay::Linear { floor: 0.3 })[3], 0.9);
        let wsd = all(Decay::Wsd { steps: 2, floor: 0.0 });
        assert_eq!((wsd[6], wsd[7], wsd[8], wsd[9]), (1.0, 1.0, 0.5, 0.0));
        assert_eq!(all(Decay::Constant)[9], 1.0);
    }
}
