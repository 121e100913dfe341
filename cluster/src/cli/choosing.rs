//! Flags that shift how tokens are chosen, and what they come to.

use clap::Args;
use lite_llm_runtime::sampler::{Sampling, SamplingError};
use lite_llm_transport::messages::Choosing;

use crate::bias;

/// What shifts the choice of tokens.
#[derive(Debug, Clone, Args)]
pub struct ChoosingArgs {
    /// Choose only among tokens at least this times as probable as the likeliest; 0 is no limit.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Take this from the logits of tokens that the answer has; 0 is off.
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Take this from the logit of a token for each time that the answer has it; 0 is off.
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Divide logits of tokens that prompt or answer have by this if they are positive, else multiply;
    /// 1 is off.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Add this, from -100 to 100, to the logit of a token by its id; -100 excludes it. May be given
    /// several times; `lite-llm tokenize` shows ids.
    #[arg(long, value_name = "ID=BIAS", value_parser = one_bias)]
    pub logit_bias: Vec<(u32, f32)>,
}

fn one_bias(text: &str) -> Result<(u32, f32), String> {
    let wrong = || format!("{text:?}: ID=BIAS is expected, such as 70=-100");
    let (id, value) = text.split_once('=').ok_or_else(wrong)?;
    let one = (bias::token(id)?, value.trim().parse().map_err(|_| wrong())?);
    bias::biases([one]).map(|_| one)
}

impl ChoosingArgs {
    /// These settings beside others.
    pub(crate) fn sampling(&self, base: Sampling) -> Sampling {
        Sampling {
            min_p: self.min_p,
            presence: self.presence_penalty,
            frequency: self.frequency_penalty,
            repetition: self.repetition_penalty,
            ..base
        }
    }

    /// What a job is told of them, or why it cannot be.
    pub(crate) fn choosing(&self) -> Result<Choosing, String> {
        self.sampling(Sampling::GREEDY)
            .check()
            .map_err(|error: SamplingError| error.to_string())?;
        let bias = bias::biases(self.logit_bias.iter().copied());
        Ok(Choosing {
            min_p: self.min_p,
            presence: self.presence_penalty,
            frequency: self.frequency_penalty,
            repetition: self.repetition_penalty,
            bias: bias.map_err(|error| format!("logit bias: {error}"))?,
            ..Choosing::default()
        })
    }
}
