//! The number format of products.

use std::borrow::Cow;

use lite_llm_kernels::{cpu::Cpu, ops::elementwise::round_to_bf16};
use serde::{Deserialize, Serialize};

/// Number format of products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32 throughout.
    F32,
    /// Weights, activations and their gradients are rounded to bf16 where they are multiplied in linear maps; sums,
    /// gates, attention, norms, the residual stream, masters and the optimizer's states are f32.
    Bf16,
}

impl Precision {
    /// Rounds what is multiplied with weights, if it is to be.
    pub(super) fn round(self, cpu: &Cpu, x: &mut [f32]) {
        if self == Self::Bf16 {
            round_to_bf16(cpu, x);
        }
    }

    /// The same of a copy.
    pub(super) fn rounded<'a>(self, cpu: &Cpu, x: &'a [f32]) -> Cow<'a, [f32]> {
        match self {
            Self::F32 => Cow::Borrowed(x),
            Self::Bf16 => {
                let mut x = x.to_vec();
                self.round(cpu, &mut x);
                Cow::Owned(x)
            }
        }
    }
}
