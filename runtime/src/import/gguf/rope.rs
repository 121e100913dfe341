//! What a file says of rotary positions, as llama.cpp understands it.
//!
//! - A factor without a type is a linear one, and a factor of 0 is none.
//! - YaRN is transformers', under other names; `rope.scaling.attn_factor` multiplies the factor of
//!   attention that it computes.
//! - `rope_freqs.weight` divides each frequency (the converter's form of llama3 scaling), whatever
//!   the type; `rope_factors_short.weight` and `rope_factors_long.weight` are LongRoPE's.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use serde_json::{Value, json};

use super::{
    Metadata,
    config::Translated,
    file::{HEAD_BYTES_MAX, Info},
};
use crate::{import::ImportError, rope::yarn_attention_factor};

const FREQUENCIES: &str = "rope_freqs.weight";
const SHORT: &str = "rope_factors_short.weight";
const LONG: &str = "rope_factors_long.weight";

/// Factors of frequencies that stand among the tensors.
#[derive(Default)]
pub(super) struct Factors {
    frequencies: Option<Vec<f32>>,
    short: Option<Vec<f32>>,
    long: Option<Vec<f32>>,
}

impl Factors {
    /// Reads them, and takes them from the list.
    pub(super) fn take(
        path: &Path,
        file: &File,
        tensors: &mut Vec<Info>,
    ) -> Result<Self, ImportError> {
        let mut read = |name: &str| {
            let Some(at) = tensors.iter().position(|info| info.name == name) else {
                return Ok(None);
            };
            let info = tensors.remove(at);
            let [length] = info.shape[..] else { return Err(wrong(path, &info)) };
            let bytes = 4u64.saturating_mul(length as u64);
            if info.dtype != "F32" || bytes > HEAD_BYTES_MAX {
                return Err(wrong(path, &info));
            }
            let mut values = vec![0; length];
            let bytes = bytemuck::cast_slice_mut::<u32, u8>(&mut values);
            file.read_exact_at(bytes, info.offset).map_err(ImportError::io(path, "read"))?;
            Ok(Some(values.into_iter().map(|word| f32::from_bits(u32::from_le(word))).collect()))
        };
        Ok(Self { frequencies: read(FREQUENCIES)?, short: read(SHORT)?, long: read(LONG)? })
    }
}

fn wrong(path: &Path, info: &Info) -> ImportError {
    ImportError::Tensor {
        path: path.display().to_string(),
        tensor: info.name.clone(),
        found: format!("shape {:?}, format {}", info.shape, info.dtype),
        expected: "a list of factors in F32 is expected: convert the model again".into(),
    }
}

/// Writes them as the keys of a `config.json`.
pub(super) fn translate(
    metadata: &Metadata<'_>,
    found: &mut Translated<'_>,
    factors: Factors,
) -> Result<(), ImportError> {
    let theta = found.of_class("rope.freq_base");
    let base = metadata.get(&theta).cloned().unwrap_or_else(|| json!(10000.0));
    found.set("rope_theta", theta, base);

    let scaling = |rest: &str| format!("rope.scaling.{rest}");
    let key = found.of_class(&scaling("type"));
    let kind = metadata.optional_text(&key)?;
    let factor_keys = ["rope.scaling.factor", "rope.scale_linear"].map(|rest| found.of_class(rest));
    let factor_key = factor_keys.iter().find(|key| metadata.get(key).is_some());
    let factor_key = factor_key.unwrap_or(&factor_keys[0]).clone();
    let factor = metadata.get(&factor_key);
    let factor = factor.filter(|factor| !matches!(factor.as_f64(), Some(0.0 | 1.0)));
    let attention_key = found.of_class(&scaling("attn_factor"));
    let attention = match metadata.get(&attention_key) {
        None => 1.0,
        Some(value) => {
            value.as_f64().ok_or_else(|| metadata.wrong(&attention_key, "a number is expected"))?
        }
    };
    let context_key = found.of_class("context_length");
    let original_key = found.of_class(&scaling("original_context_length"));
    let original_key = match metadata.get(&original_key) {
        Some(_) => original_key,
        None => context_key,
    };
    let original = metadata.need(&original_key)?;

    let mut names = vec![
        ("rope_type", key.clone()),
        ("factor", factor_key.clone()),
        ("attention_factor", attention_key.clone()),
        ("original_max_position_embeddings", original_key),
    ];
    let listed = factors.frequencies.is_some() || factors.long.is_some() || factors.short.is_some();
    let table = match (kind, factors) {
        (None | Some("none" | "linear" | "longrope"), factors) if listed => {
            if factor.is_some() && kind != Some("none") && kind != Some("longrope") {
                let expected = "no factor is expected beside a tensor of factors";
                return Err(metadata.wrong(&factor_key, expected));
            }
            let (short, long, from) = match factors {
                Factors { frequencies: Some(all), short: None, long: None } => {
                    (all.clone(), all, [FREQUENCIES; 2])
                }
                Factors { frequencies: None, short: Some(short), long: Some(long) } => {
                    (short, long, [SHORT, LONG])
                }
                _ => {
                    let expected =
                        format!("either {FREQUENCIES} or both {SHORT} and {LONG} are expected");
                    return Err(metadata.wrong(&key, expected));
                }
            };
            names.extend([("short_factor", from[0].into()), ("long_factor", from[1].into())]);
            json!({
                "rope_type": "longrope", "short_factor": short, "long_factor": long,
                "original_max_position_embeddings": original, "attention_factor": attention,
            })
        }
        (None | Some("linear" | "none"), _) if attention != 1.0 => {
            return Err(metadata.wrong(&attention_key, "only 1 is known without YaRN"));
        }
        (Some("none"), _) => return Ok(()),
        (None | Some("linear"), _) => match factor {
            None => return Ok(()),
            Some(factor) => json!({ "rope_type": "linear", "factor": factor }),
        },
        (Some("yarn"), _) if !listed => {
            // Of DeepSeek's classes, which have a factor of attention of their own.
            for (rest, plain) in [("yarn_log_multiplier", 0.0), ("yarn_ext_factor", 1.0)] {
                let key = found.of_class(&scaling(rest));
                if metadata.get(&key).is_some_and(|n| n.as_f64() != Some(plain)) {
                    return Err(metadata.wrong(&key, format!("only {plain} is known")));
                }
            }
            let Some(value) = factor.and_then(Value::as_f64) else {
                return match metadata.get(&factor_key) {
                    Some(one) if one.as_f64().is_some() => Ok(()),
                    _ => Err(metadata.wrong(&factor_key, "a number is expected by YaRN")),
                };
            };
            let mut table = json!({
                "rope_type": "yarn", "factor": value,
                "original_max_position_embeddings": original,
                "attention_factor": attention * yarn_attention_factor(value, None),
            });
            for rest in ["beta_fast", "beta_slow"] {
                let key = found.of_class(&scaling(&format!("yarn_{rest}")));
                if let Some(beta) = metadata.get(&key) {
                    table[rest] = beta.clone();
                }
                names.push((rest, key));
            }
            table
        }
        (Some("yarn"), _) => {
            return Err(metadata.wrong(&key, "no tensor of factors is expected beside yarn"));
        }
        (Some("longrope"), _) => {
            let expected = format!("{SHORT} and {LONG} are expected beside it");
            return Err(metadata.wrong(&key, expected));
        }
        (Some(_), _) => {
            return Err(metadata.wrong(&key, "only none, linear, yarn and longrope are known"));
        }
    };
    found.set("rope_scaling", key, table);
    for (key, name) in names {
        found.name(&format!("rope_scaling.{key}"), name);
    }
    Ok(())
}
