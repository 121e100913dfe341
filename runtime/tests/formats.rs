//! Formats of blocks: what is rounded, what is not, and that every way to a checkpoint agrees.

mod hf;

use std::path::{Path, PathBuf};

use hf::{IMPORTED, Raw, imported, reference, rewrite, tensors};
use lite_llm_kernels::{
    dtype::DType,
    matrix::{PackedMatrix, Source},
};
use lite_llm_runtime::{
    checkpoint::{Checkpoint, inspect::Summary, verify::verify},
    expert::ExpertKey,
    import::{ImportError, ImportOptions, import},
};
use tempfile::tempdir;

const BLOCKS: [DType; 3] = [DType::Int8, DType::Int6, DType::Int4];

fn try_import_as(source: &Path, out: &Path, dtype: DType) -> Result<Summary, ImportError> {
    let options = ImportOptions { dtype: Some(dtype), ..hf::options(source, out) };
    import(&options, &mut |_, _, _| {})
}

fn import_as(source: &Path, out: &Path, dtype: DType) -> Checkpoint {
    try_import_as(source, out, dtype).unwrap();
    Checkpoint::open(out).unwrap()
}

fn check(name: &str, found: &PackedMatrix, dtype: DType, source: &Raw) {
    assert_eq!(found.dtype(), dtype, "{name}");
    let (n, k) = (source.shape[0], source.shape[1]);
    let expected = PackedMatrix::pack(dtype, n, k, Source::F32(&source.values()));
    assert!(found.data()[..] == expected.data()[..], "{name} is packed from its source");
}

#[test]
fn weights_are_in_blocks_and_the_rest_is_not() {
    for (name, dtype) in IMPORTED.iter().flat_map(|name| BLOCKS.map(|dtype| (name, dtype))) {
        let Some(dir) = reference(name) else { return };
        let out = tempdir().unwrap();
        let checkpoint = import_as(&dir, out.path(), dtype);
        assert_eq!(checkpoint.dtype(), dtype);
        verify(&checkpoint, &mut |_, _, _| {}).unwrap();
        let (config, source) = (checkpoint.config(), tensors(&dir));
        let dense = |name: &str, dtype, from: &str| {
            check(name, &checkpoint.dense_matrix(name).unwrap(), dtype, &source[from]);
        };
        dense("embed", DType::Bf16, "model.embed_tokens.weight");
        if !config.tied_embeddings {
            let head = if dtype == DType::Int4 { DType::Int6 } else { dtype };
            dense("head", head, "lm_head.weight");
        }
        assert_eq!(checkpoint.dense_vector("norm").unwrap(), source["model.norm.weight"].values());
        let (block, names) = match config.architecture.as_str() {
            "mixtral" => ("block_sparse_moe", ["w1", "w3", "w2"]),
            _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        };
        let moe = config.moe.as_ref().unwrap();
        for layer in config.sparse_layers() {
            let from = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
            let to = |rest: &str| format!("layers.{layer}.{rest}");
            for part in ["q", "k", "v", "o"] {
                let from = from(&format!("self_attn.{part}_proj"));
                dense(&to(&format!("attention.{part}")), dtype, &from);
            }
            let router = checkpoint.expert_router(layer, 0, 0).unwrap();
            check("router", &router, DType::F32, &source[&from(&format!("{block}.gate"))]);
            if moe.shared.is_some() {
                dense(&to("shared.gate"), dtype, &from("mlp.shared_expert.gate_proj"));
                dense(&to("shared.router"), DType::F32, &from("mlp.shared_expert_gate"));
            }
            for flat in 0..moe.experts() {
                let expert =
                    checkpoint.expert(ExpertKey::from_flat(moe, layer, flat).unwrap()).unwrap();
                for (matrix, part) in
                    [&expert.gate, &expert.up, &expert.down].into_iter().zip(names)
                {
                    let from = from(&format!("{block}.experts.{flat}.{part}"));
                    check(&from, matrix, dtype, &source[&from]);
                }
            }
        }
    }
}

/// A class, a folder for checkpoints, and one that holds the same weights without rounding.
fn lossless(name: &str) -> Option<(PathBuf, tempfile::TempDir)> {
    let (dir, out) = (reference(name)?, tempdir().unwrap());
    imported(&dir, &out.path().join("lossless"));
    Some((dir, out))
}

#[test]
fn converting_a_checkpoint_gives_what_importing_its_source_gives() {
    for name in IMPORTED {
        let Some((dir, out)) = lossless(name) else { return };
        let at = |name: &str| out.path().join(name);
        for dtype in [DType::Bf16, DType::Int8, DType::Int6, DType::Int4] {
            if Checkpoint::open(at("lossless")).unwrap().dtype() == dtype {
                continue;
            }
            let direct = import_as(&dir, &at(&format!("direct-{dtype}")), dtype);
            let converted = import_as(&at("lossless"), &at(&format!("converted-{dtype}")), dtype);
            assert_eq!(converted.id(), direct.id(), "{name} in {dtype}");
        }
        // What was rounded once can be written in wider formats as it is.
        let wide = import_as(&at("converted-int4"), &at("wide"), DType::F32);
        let narrow = Checkpoint::open(at("converted-int4")).unwrap();
        let key = ExpertKey { layer: 1, tier: 0, group: 0, expert: 3 };
        let (wide, narrow) = (wide.expert(key).unwrap().down, narrow.expert(key).unwrap().down);
        let (mut left, mut right) = (vec![0.0; wide.k()], vec![0.0; wide.k()]);
        for row in 0..wide.n() {
            wide.row(row, &mut left);
            narrow.row(row, &mut right);
            assert_eq!(left, right, "{name} row {row}");
        }
        assert!(try_import_as(&at("wide"), &at("int8-again"), DType::Int8).is_ok());
    }
}

#[test]
fn a_conversion_keeps_tiers_and_text() {
    let Some(dir) = reference("olmoe") else { return };
    let out = tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    let cut = |out: &Path, dtype| {
        let options = ImportOptions {
            tiers: Some("tier_1b:2x4,tier_10b:1x8".parse().unwrap()),
            routes: Some("2x1x2".parse().unwrap()),
            dtype,
            ..hf::options(&dir, out)
        };
        import(&options, &mut |_, _, _| {}).unwrap().id
    };
    cut(&at("f32"), None);
    let direct = cut(&at("int8"), Some(DType::Int8));
    let mut heard = (0, 0);
    let options =
        ImportOptions { dtype: Some(DType::Int8), ..hf::options(&at("f32"), &at("converted")) };
    let converted = import(&options, &mut |done, total, _| heard = (done, total)).unwrap();
    assert_eq!(converted.id, direct);
    assert!(heard.0 == heard.1 && heard.0 > 0, "progress ends at its end: {heard:?}");
    assert!(converted.chat_template && converted.tiers.len() == 2);

    let options = ImportOptions {
        tiers: Some("tier_1b:1x16".parse().unwrap()),
        dtype: Some(DType::Int4),
        ..hf::options(&at("f32"), &at("cut"))
    };
    let error = import(&options, &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(error.contains("--tiers") && !at("cut").exists(), "{error}");
}

#[test]
fn a_conversion_that_would_change_nothing_is_refused() {
    let Some((_, out)) = lossless("olmoe") else { return };
    let (source, next) = (out.path().join("lossless"), out.path().join("next"));
    for options in [
        hf::options(&source, &next),
        ImportOptions { dtype: Some(DType::F32), ..hf::options(&source, &next) },
    ] {
        let error = import(&options, &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(error.contains("f32 already") && error.contains("--dtype"), "{error}");
        assert!(!next.exists(), "nothing was begun");
    }
    let error = try_import_as(&source, &source, DType::Int8).unwrap_err().to_string();
    assert!(error.contains("already holds a checkpoint"), "{error}");
}

#[test]
fn a_damaged_source_is_not_converted() {
    let Some((_, out)) = lossless("qwen3_moe") else { return };
    let (source, next) = (out.path().join("lossless"), out.path().join("next"));
    let shard = "tiers/tier_1b/l001-g00000.safetensors";
    let mut bytes = std::fs::read(source.join(shard)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(source.join(shard), bytes).unwrap();
    let error = try_import_as(&source, &next, DType::Int8).unwrap_err().to_string();
    assert!(error.contains(shard) && error.contains("damaged"), "{error}");
    assert!(Checkpoint::open(&next).is_err(), "what was written is no checkpoint");
}

#[test]
fn weights_that_are_not_finite_are_named_and_refused() {
    let Some(dir) = reference("qwen3_moe") else { return };
    let out = tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    let bad = "model.layers.1.mlp.experts.2.up_proj.weight";
    for value in [f32::NAN, f32::INFINITY] {
        let source = at(&format!("hf-{value}"));
        rewrite(&dir, &source, |all| {
            let raw = all.get_mut(bad).unwrap();
            let last = raw.bytes.len() - 4;
            raw.bytes[last..].copy_from_slice(&value.to_le_bytes());
        });
        for dtype in DType::ALL {
            let error = try_import_as(&source, &at("refused"), dtype).unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains(&value.to_string()), "{error}");
            assert!(error.contains("row ") && error.contains("column "), "{error}");
        }
    }
}

#[test]
fn a_summary_says_what_a_parameter_takes() {
    let Some(dir) = reference("olmoe") else { return };
    let out = tempdir().unwrap();
    let bits = |dtype: DType| {
        let summary = try_import_as(&dir, &out.path().join(dtype.to_string()), dtype).unwrap();
        assert_eq!(summary.dtype, dtype.name());
        let bytes = summary.parameters as f64 * summary.bits_per_parameter / 8.0;
        assert!((bytes - summary.bytes as f64).abs() < 1.0);
        summary.bits_per_parameter
    };
    let all = DType::ALL.map(bits);
    assert!(all.is_sorted_by(|a, b| a > b), "{all:?}");
}
