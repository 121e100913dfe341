//! What a `config.json` says of rotary positions, as transformers 5 understands it.
//!
//! Version 5 has everything in `rope_parameters`; version 4 has theta beside the scaling, which it
//! calls `rope_scaling`. Where a file has both, `rope_scaling` is heeded, and theta inside before
//! outside. Keys that a kind of scaling does not have are ignored with a word, as there.

use serde_json::Value;
use tracing::warn;

use super::{ImportError, keys::Keys};
use crate::{
    config::RopeScaling,
    rope::{long_attention_factor, yarn_attention_factor},
};

/// Keys that every kind may have.
const COMMON: [&str; 4] = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
/// The key of the context of the training before.
pub(super) const ORIGINAL: &str = "original_max_position_embeddings";

/// Kinds, and the keys of each.
const KINDS: [(&str, &[&str]); 6] = [
    ("default", &[]),
    ("linear", &["factor"]),
    ("dynamic", &["factor"]),
    (
        "yarn",
        &[
            "factor",
            ORIGINAL,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
    ),
    ("llama3", &["factor", ORIGINAL, "low_freq_factor", "high_freq_factor"]),
    ("longrope", &["factor", ORIGINAL, "attention_factor", "short_factor", "long_factor"]),
];

/// Rotary positions.
pub(super) struct Rope {
    pub(super) theta: f64,
    pub(super) scaling: RopeScaling,
    /// The keys that say it, if a table of their own does.
    pub(super) table: Option<Keys>,
}

/// Reads them, of a model with this published context.
pub(super) fn read(file: &Keys, default_theta: f64, context: usize) -> Result<Rope, ImportError> {
    let v5 = file.object("rope_parameters")?;
    let v4 = file.object("rope_scaling")?.filter(|keys| !keys.is_empty());
    let table = v4.or(v5);
    let top = file.optional_number("rope_theta")?;
    let inner = match &table {
        Some(keys) => keys.optional_number("rope_theta")?,
        None => None,
    };
    let theta = inner.or(top).unwrap_or(default_theta);
    for keys in [Some(file), table.as_ref()].into_iter().flatten() {
        if keys.optional_number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(keys.wrong("partial_rotary_factor", "only 1 is known"));
        }
    }
    let scaling = match &table {
        Some(keys) => scaling(file, keys, context)?,
        None => RopeScaling::None,
    };
    Ok(Rope { theta, scaling, table })
}

fn scaling(file: &Keys, keys: &Keys, context: usize) -> Result<RopeScaling, ImportError> {
    let Some(key) = ["rope_type", "type"].into_iter().find(|key| keys.value(key).is_some()) else {
        // A table without a type says nothing but theta, or is of a form that is not known here.
        return match keys.keys().find(|key| !COMMON.contains(key)) {
            Some("factor") => Err(keys.wrong("rope_type", "a type is expected beside `factor`")),
            Some(key) => Err(keys.wrong(key, "no such key of rope parameters is known")),
            None => Ok(RopeScaling::None),
        };
    };
    let kind = keys.value(key).and_then(Value::as_str);
    let Some((kind, known)) = KINDS.into_iter().find(|(name, _)| kind == Some(*name)) else {
        let names = KINDS.map(|(name, _)| format!("{name:?}")).join(", ");
        return Err(keys.wrong(key, &format!("only {names} are known")));
    };
    for other in keys.keys().filter(|key| !known.contains(key) && !COMMON.contains(key)) {
        warn!(
            "{}: {} is ignored: rope scaling {kind:?} has no such key",
            keys.path(),
            keys.name(other)
        );
    }
    // Beside the table it comes first, as Phi-3 has it there.
    let original = match file.optional_size(ORIGINAL)? {
        Some(original) => Some(original),
        None => keys.optional_size(ORIGINAL)?,
    };
    // Where no factor stands, the contexts say it.
    let ratio = |factor: Option<f64>| match (factor, original) {
        (Some(factor), _) => Ok(factor),
        (None, Some(original)) => Ok(context as f64 / original as f64),
        (None, None) => keys.number("factor"),
    };
    Ok(match kind {
        "linear" => RopeScaling::Linear { factor: keys.number("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: keys.number("factor")?, original: context },
        "yarn" => {
            let factor = ratio(keys.optional_number("factor")?)?;
            // Zero and null alike mean that nothing is said.
            let said = |key: &str| -> Result<_, ImportError> {
                Ok(keys.optional_number(key)?.filter(|n| *n != 0.0))
            };
            let mscales = said("mscale")?.zip(said("mscale_all_dim")?);
            RopeScaling::Yarn {
                factor,
                original: original.unwrap_or(context),
                attention_factor: match keys.optional_number("attention_factor")? {
                    Some(attention_factor) => attention_factor,
                    None => yarn_attention_factor(factor, mscales),
                },
                beta_fast: said("beta_fast")?.unwrap_or(32.0),
                beta_slow: said("beta_slow")?.unwrap_or(1.0),
                truncate: keys.flag("truncate", true)?,
            }
        }
        "llama3" => RopeScaling::Llama3 {
            factor: keys.number("factor")?,
            low_freq_factor: keys.number("low_freq_factor")?,
            high_freq_factor: keys.number("high_freq_factor")?,
            original: original.unwrap_or(context),
        },
        "longrope" => {
            let original = original.unwrap_or(context);
            let factor = keys.optional_number("factor")?;
            let factor = factor.unwrap_or(context as f64 / original as f64);
            RopeScaling::LongRope {
                short: keys.numbers("short_factor")?,
                long: keys.numbers("long_factor")?,
                original,
                attention_factor: match keys.optional_number("attention_factor")? {
                    Some(attention_factor) => attention_factor,
                    None => long_attention_factor(factor, original),
                },
            }
        }
        _ => RopeScaling::None,
    })
}
