//! Rope scaling: every kind, in both spellings of a configuration, gives transformers' table.
//!
//! `rope.json` holds what transformers 5.24's `ROPE_INIT_FUNCTIONS` compute (in f32, so in its last
//! bits they differ from ours), `served` being the sequence length that they were told.

use std::fs;

use lite_llm_runtime::{
    config::{ModelConfig, RopeScaling},
    import::hf_config,
    rope::Rotary,
};
use serde_json::{Map, Value, json};
use tempfile::tempdir;

fn read(change: &Value) -> Result<ModelConfig, String> {
    let mut config = json!({
        "model_type": "mixtral", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    });
    for (key, value) in change.as_object().unwrap() {
        config[key] = value.clone();
    }
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    hf_config::read(dir.path()).map_err(|error| error.to_string())
}

fn is_near(found: f32, expected: f64) -> bool {
    (f64::from(found) - expected).abs() <= 2e-6 * expected.abs()
}

#[test]
fn tables_are_those_of_transformers_in_both_spellings() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("rope.json")).unwrap();
    for case in &cases {
        let mut change = case["beside"].as_object().unwrap().clone();
        change.insert("max_position_embeddings".into(), case["context"].clone());
        change.insert("head_dim".into(), case["head_dim"].clone());
        let spelled = |more: Value| -> Map<String, Value> {
            let more = more.as_object().unwrap().clone();
            change.clone().into_iter().chain(more).collect()
        };
        let mut inside = case["rope"].clone();
        inside["rope_theta"] = case["theta"].clone();
        for change in [
            spelled(json!({ "rope_scaling": case["rope"], "rope_theta": case["theta"] })),
            spelled(json!({ "rope_parameters": inside, "rope_theta": null })),
        ] {
            let name = format!("{} at {}", case["name"], case["served"]);
            let config = read(&change.into()).unwrap_or_else(|error| panic!("{name}: {error}"));
            let served = case["served"].as_u64().unwrap() as usize;
            let found = Rotary::new(&config.attention, served);
            let scale = case["scale"].as_f64().unwrap();
            assert!(is_near(found.scale, scale), "{name}: scale {}, not {scale}", found.scale);
            assert_eq!(found.inv_freq.len(), config.attention.head_dim / 2);
            for pair in case["pairs"].as_array().unwrap() {
                let i = pair[0].as_u64().unwrap() as usize;
                let (found, expected) = (found.inv_freq[i], pair[1].as_f64().unwrap());
                assert!(is_near(found, expected), "{name}, pair {i}: {found}, not {expected}");
            }
            // A manifest keeps it as it is.
            let written = serde_json::to_string(&config).unwrap();
            let again: ModelConfig = serde_json::from_str(&written).unwrap();
            again.check().unwrap();
            assert_eq!(Rotary::new(&again.attention, served), found, "{name}");
        }
    }
    assert!(cases.len() >= 14);
}

#[test]
fn only_what_depends_on_a_length_depends_on_the_served_context() {
    let table = |rope: Value, context| {
        Rotary::new(&read(&json!({ "rope_scaling": rope })).unwrap().attention, context)
    };
    let lists = json!({ "type": "longrope", "short_factor": vec![1; 8], "long_factor": vec![2; 8],
                        "original_max_position_embeddings": 32 });
    for (rope, depends) in [
        (json!({ "type": "linear", "factor": 2.0 }), false),
        (json!({ "type": "yarn", "factor": 2.0 }), false),
        (json!({ "type": "dynamic", "factor": 2.0 }), true),
        (lists, true),
    ] {
        let same = table(rope.clone(), 32) == table(rope.clone(), 100);
        assert_eq!(same, !depends, "{rope}");
    }
}

#[test]
fn a_context_is_served_that_the_model_was_made_for() {
    let served = |rope: Value, context: Option<usize>| {
        let config = read(&json!({ "rope_scaling": rope })).unwrap();
        config.served(context).map(|config| config.context).map_err(|error| error.to_string())
    };
    assert_eq!(served(json!(null), None), Ok(64));
    assert_eq!(served(json!(null), Some(10)), Ok(10));
    for (rope, most) in [
        (json!(null), 64),
        (json!({ "type": "linear", "factor": 2.0 }), 128),
        (json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 }), 128),
        (json!({ "type": "yarn", "factor": 1.5, "original_max_position_embeddings": 32 }), 64),
        (json!({ "type": "dynamic", "factor": 2.0 }), 1 << 24),
    ] {
        assert_eq!(served(rope.clone(), Some(most)), Ok(most), "{rope}");
        for context in [0, most + 1] {
            let error = served(rope.clone(), Some(context)).unwrap_err();
            let found = format!("--context is {context}; 1 to {most} is expected");
            assert!(error.contains(&found), "{error}");
        }
    }
    assert!(served(json!(null), Some(65)).unwrap_err().contains("rope scaling"));
}

#[test]
fn what_is_wrong_is_named_where_it_stands() {
    let yarn = |key: &str, value: Value| {
        let mut rope = json!({ "rope_type": "yarn", "factor": 2.0 });
        rope[key] = value;
        json!({ "rope_parameters": rope })
    };
    let lists = |short: usize, long: usize| {
        json!({ "rope_scaling": { "type": "longrope", "short_factor": vec![1.0; short],
                                  "long_factor": vec![1.0; long] } })
    };
    let llama = |low: f64, high: f64| {
        json!({ "rope_scaling": { "type": "llama3", "factor": 8.0, "low_freq_factor": low,
                                  "high_freq_factor": high } })
    };
    for (change, named) in [
        (yarn("factor", json!(0)), "config.json: rope_parameters.factor is 0;"),
        (yarn("factor", json!("2")), "rope_parameters.factor is \"2\";"),
        (yarn("factor", json!(null)), "rope_parameters.factor is null;"),
        (yarn("attention_factor", json!(-1)), "rope_parameters.attention_factor is -1;"),
        (yarn("beta_fast", json!(0.5)), "rope_parameters.beta_fast is 0.5; at least beta_slow, 1"),
        (yarn("truncate", json!(1)), "rope_parameters.truncate is 1;"),
        (yarn("rope_theta", json!(1)), "rope_parameters.rope_theta is 1;"),
        (
            yarn("original_max_position_embeddings", json!(0)),
            "rope_parameters.original_max_position_embeddings is 0;",
        ),
        (lists(8, 7), "rope_scaling.long_factor is a list of 7; 8 are expected"),
        (lists(0, 8), "rope_scaling.short_factor is a list of 0; 8 are expected"),
        (llama(4.0, 4.0), "rope_scaling.high_freq_factor is 4; more than low_freq_factor, 4"),
        (
            json!({ "rope_scaling": { "type": "su" } }),
            "rope_scaling.type is \"su\"; only \"default\"",
        ),
        (
            json!({ "rope_scaling": { "type": "dynamic", "factor": 0.5 } }),
            "rope_scaling.factor is 0.5; at least 1",
        ),
        (
            json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 }, "head_dim": 2 }),
            "head_dim is 2; at least 4",
        ),
        (json!({ "rope_theta": -1.0 }), "config.json: rope_theta is -1;"),
    ] {
        let error = read(&change).expect_err(named);
        assert!(error.contains(named), "{change}: {error}");
    }
    // As in transformers, a key that a kind does not have changes nothing.
    let config = read(&yarn("finetuned", json!(true))).unwrap();
    assert!(matches!(config.attention.rope_scaling, RopeScaling::Yarn { .. }));
}
