//! Import of GGUF files: what llama.cpp's converter makes of a folder imports to what the folder
//! itself imports to, and blocks of integers stay those integers.

mod hf;
mod llama_cpp;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use hf::{imported, reference, tensors, try_import};
use lite_llm_kernels::{dtype::DType, matrix::PackedMatrix};
use lite_llm_runtime::{
    checkpoint::Checkpoint,
    config::RopeScaling,
    expert::ExpertKey,
    import::{
        ImportError,
        random::{RandomClass, RandomShape, write_random_hf},
    },
    tokenizer::Tokenizer,
};
use llama_cpp::{Encode, File, Meta, as_bf16, as_f32, as_q4_0, as_q8_0, converted};
use tempfile::{TempDir, tempdir};

/// Weights of a checkpoint's folder, file by file.
fn weights(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "safetensors") {
                files.insert(path.strip_prefix(dir).unwrap().into(), fs::read(&path).unwrap());
            }
        }
    }
    assert!(files.len() >= 3, "a checkpoint has shards");
    files
}

const TEXTS: [&str; 6] = [
    "The quick brown fox, 12345 times.",
    "  two  spaces\n\n\tand a tab ",
    "don't I'LL we're",
    "na\u{ef}ve \u{4f60}\u{597d} \u{1f600}",
    "<s>marked</s><|im_start|>",
    "",
];

/// `<|im_end|>` in the reference models.
const IM_END: u32 = 5;

/// Both import to the same weights and configuration, and cut texts alike.
fn same_as_folder(name: &str, folder: &Path, encode: Encode) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    converted(folder, encode).write(&path);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let (original, found) = (imported(folder, &a), imported(&path, &b));
    // As llama.cpp does, and unlike the folder, a file stops at what is spelled like an end.
    let mut config = found.config().clone();
    let ends = original.config().eos_tokens.clone();
    assert!(ends.iter().all(|end| config.eos_tokens.contains(end)), "{name}: {ends:?}");
    assert!(config.eos_tokens.contains(&IM_END), "{name}: {:?}", config.eos_tokens);
    config.eos_tokens = ends;
    assert_eq!(config, *original.config(), "{name}");
    assert_eq!(found.dtype(), original.dtype(), "{name}");
    assert!(weights(&b) == weights(&a), "{name}: weights differ");

    let tokenizer = |c: &Checkpoint| Tokenizer::from_json(&c.tokenizer_json().unwrap()).unwrap();
    let (original, found) = (tokenizer(&original), tokenizer(&found));
    assert_eq!(found.vocab_size(), original.vocab_size());
    for text in TEXTS {
        for special in [false, true] {
            let expected = original.encode(text, special).unwrap();
            assert_eq!(found.encode(text, special).unwrap(), expected, "{name}: {text:?}");
            assert_eq!(found.decode(&expected), original.decode(&expected), "{name}: {text:?}");
        }
    }
}

#[test]
fn a_file_of_every_class_imports_as_its_folder_does() {
    for name in ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"] {
        let Some(dir) = reference(name) else { return };
        same_as_folder(name, &dir, as_f32);
    }
    let Some(dir) = reference("qwen3_moe_bf16_sharded") else { return };
    same_as_folder("qwen3_moe_bf16_sharded", &dir, as_bf16);
}

/// A folder whose rows are whole blocks, also of Q6_K.
fn random(class: RandomClass) -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("hf");
    let shape = RandomShape { hidden: 256, intermediate: 96, ..RandomShape::tiny(class) };
    write_random_hf(&folder, &shape, &mut |_, _| {}).unwrap();
    // The writer's vocabulary says less than the model has rows for.
    hf::edit_json(&folder.join("tokenizer.json"), |json| {
        assert_eq!(json["model"]["vocab"].as_object().unwrap().len(), shape.vocab);
    });
    (dir, folder)
}

#[test]
fn a_random_file_of_every_class_imports_as_its_folder_does() {
    use RandomClass::*;
    for class in [Mixtral, Olmoe, Qwen2Moe, Qwen3Moe] {
        let (_dir, folder) = random(class);
        let mut file = converted(&folder, as_f32);
        // A vocabulary of its own: the folder's takes bytes without any cutting.
        file.set("tokenizer.ggml.pre", Meta::Text("olmo".into()));
        let path = folder.with_extension("gguf");
        file.write(&path);
        let (a, b) = (folder.with_extension("a"), folder.with_extension("b"));
        let (original, found) = (imported(&folder, &a), imported(&path, &b));
        assert_eq!(found.config(), original.config(), "{class:?}");
        assert!(weights(&b) == weights(&a), "{class:?}: weights differ");
    }
}

/// The weight of a block that Q8_0 and Q4_0 hold, with its scale in bf16.
fn kept(dtype: u32, bytes: &[u8], i: usize) -> f32 {
    let (block, size) = (i / 32, if dtype == 8 { 34 } else { 18 });
    let block = &bytes[block * size..][..size];
    let scale = bf16::from_f32(f16::from_le_bytes([block[0], block[1]]).to_f32()).to_f32();
    let q = match (dtype, i % 32) {
        (8, l) => i32::from(block[2 + l] as i8),
        (_, l) if l < 16 => i32::from(block[2 + l] & 15) - 8,
        (_, l) => i32::from(block[2 + l - 16] >> 4) - 8,
    };
    scale * q as f32
}

#[test]
fn integers_of_blocks_stay_and_their_scales_become_bf16() {
    for (encode, dtype, number) in [(as_q8_0 as Encode, DType::Int8, 8), (as_q4_0, DType::Int4, 2)]
    {
        let (_dir, folder) = random(RandomClass::Olmoe);
        let file = converted(&folder, encode);
        let path = folder.with_extension("gguf");
        file.write(&path);
        let found = imported(&path, &folder.with_extension("out"));
        assert_eq!(found.dtype(), dtype);
        let bytes = |name: &str| {
            let (_, _, found, bytes) = file.tensors.iter().find(|t| t.0 == name).unwrap();
            assert_eq!(*found, number, "{name}");
            bytes
        };
        let check = |name: &str, matrix: &PackedMatrix, from: usize| {
            assert_eq!(matrix.dtype(), dtype, "{name}");
            let bytes = bytes(name);
            for row in 0..matrix.n() {
                for col in 0..matrix.k() {
                    let expected = kept(number, bytes, (from + row) * matrix.k() + col);
                    assert_eq!(matrix.get(row, col), expected, "{name} {row} {col}");
                }
            }
        };
        for (ours, theirs) in [("q", "attn_q"), ("k", "attn_k"), ("o", "attn_output")] {
            let matrix = found.dense_matrix(&format!("layers.0.attention.{ours}")).unwrap();
            check(&format!("blk.0.{theirs}.weight"), &matrix, 0);
        }
        let moe = found.config().moe.as_ref().unwrap();
        for flat in [0, 3, 7] {
            let expert = found.expert(ExpertKey::from_flat(moe, 0, flat).unwrap()).unwrap();
            check("blk.0.ffn_gate_exps.weight", &expert.gate, flat * expert.gate.n());
            check("blk.0.ffn_up_exps.weight", &expert.up, flat * expert.up.n());
            check("blk.0.ffn_down_exps.weight", &expert.down, flat * expert.down.n());
        }

        // What is stored in another format than the file's is within that format's rounding.
        let source = tensors(&folder);
        for (ours, theirs, steps) in [
            ("embed", "model.embed_tokens.weight", if number == 8 { 127.0 } else { 8.0 }),
            ("head", "lm_head.weight", if number == 8 { 127.0 } else { 16.0 }),
        ] {
            let (matrix, source) = (found.dense_matrix(ours).unwrap(), &source[theirs]);
            let values = source.values();
            for (row, values) in values.chunks(matrix.k()).enumerate() {
                let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                for (col, expected) in values.iter().enumerate() {
                    let off = (matrix.get(row, col) - expected).abs();
                    assert!(off <= largest / steps, "{ours} {row} {col}: {off} of {largest}");
                }
            }
        }
    }
}

#[test]
fn another_format_than_the_files_is_made_from_its_values() {
    let (_dir, folder) = random(RandomClass::Qwen3Moe);
    let file = converted(&folder, as_q8_0);
    let path = folder.with_extension("gguf");
    file.write(&path);
    let out = folder.with_extension("out");
    let options = lite_llm_runtime::import::ImportOptions {
        dtype: Some(DType::F32),
        ..hf::options(&path, &out)
    };
    lite_llm_runtime::import::import(&options, &mut |_, _, _| {}).unwrap();
    let matrix = Checkpoint::open(&out).unwrap().dense_matrix("layers.0.attention.v").unwrap();
    let (.., bytes) = file.tensors.iter().find(|t| t.0 == "blk.0.attn_v.weight").unwrap();
    for row in 0..matrix.n() {
        for col in 0..matrix.k() {
            let at = row * matrix.k() + col;
            let block = &bytes[at / 32 * 34..][..34];
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
            assert_eq!(matrix.get(row, col), scale * f32::from(block[2 + at % 32] as i8));
        }
    }
}

/// The import fails, names the file and `named`, and writes nothing.
fn refused(path: &Path, named: &str) {
    let out = tempdir().unwrap();
    let error = try_import(path, out.path()).expect_err(named).to_string();
    assert!(error.contains("model.gguf") && error.contains(named), "{error:?} names {named:?}");
    assert!(fs::read_dir(out.path()).unwrap().next().is_none(), "nothing was written");
}

fn small() -> (TempDir, PathBuf, File) {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("hf");
    let shape = RandomShape { layers: 1, experts: 2, ..RandomShape::tiny(RandomClass::Mixtral) };
    write_random_hf(&folder, &shape, &mut |_, _| {}).unwrap();
    let file = converted(&folder, as_f32);
    let path = dir.path().join("model.gguf");
    (dir, path, file)
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let (_dir, path, file) = small();
    let with = |key: &str, value: Meta, named: &str| {
        let mut file = file.clone();
        file.set(key, value);
        file.write(&path);
        refused(&path, named);
    };
    let text = |text: &str| Meta::Text(text.into());
    with("general.architecture", text("gemma3"), "\"gemma3\"");
    with("general.architecture", Meta::U32(1), "general.architecture");
    with("llama.expert_count", Meta::U32(0), "\"llama\"");
    with("llama.attention.head_count", text("many"), "llama.attention.head_count is \"many\"");
    with("llama.attention.head_count_kv", Meta::I32s(vec![2, 1]), "llama.attention.head_count_kv");
    with("llama.attention.head_count_kv", Meta::I32s(vec![]), "llama.attention.head_count_kv");
    with("llama.attention.head_count_kv", Meta::U32(3), "llama.attention.head_count_kv is 3;");
    let expected = "llama.expert_used_count is 5; at most llama.expert_count (2) is expected";
    with("llama.expert_used_count", Meta::U32(5), expected);
    with("llama.embedding_length", Meta::U32(0), "llama.embedding_length is 0;");
    with("llama.context_length", Meta::U32(0), "llama.context_length is 0;");
    with("llama.feed_forward_length", Meta::U32(0), "llama.feed_forward_length is 0;");
    with("llama.rope.freq_base", Meta::F32(-1.0), "llama.rope.freq_base is -1;");
    with("llama.rope.scaling.factor", Meta::F32(-2.0), "llama.rope.scaling.factor is -2;");
    with(
        "llama.attention.layer_norm_rms_epsilon",
        Meta::F32(-1.0),
        "layer_norm_rms_epsilon is -1;",
    );
    with("llama.attention.value_length", Meta::U32(8), "llama.attention.value_length");
    with("llama.rope.scaling.type", text("su"), "llama.rope.scaling.type");
    with("llama.rope.scaling.type", text("yarn"), "llama.rope.scaling.factor");
    with("llama.rope.scaling.type", text("longrope"), "rope_factors_short.weight");
    with("split.count", Meta::U32(3), "llama-gguf-split --merge");
    with("tokenizer.ggml.model", text("bert"), "tokenizer.ggml.model");
    with("tokenizer.ggml.pre", text("default"), "tokenizer.ggml.pre");
    with("tokenizer.ggml.tokens", Meta::Texts(vec!["a".into()]), "tokenizer.ggml.token_type");
    let tokens = (0..321).map(|i| format!("t{i}")).collect();
    let mut longer = file.clone();
    longer.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    longer.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; 321]));
    longer.write(&path);
    refused(&path, "no more than 320");
    let mut scored = file.clone();
    scored.set("tokenizer.ggml.model", text("llama"));
    scored.set("tokenizer.ggml.scores", Meta::F32s(vec![-1000.0; 320]));
    scored.write(&path);
    refused(&path, "tokenizer.ggml.scores");
    with("llama.rope.scaling.attn_factor", Meta::F32(0.5), "llama.rope.scaling.attn_factor");
    let mut odd = file.clone();
    odd.set("llama.attention.key_length", Meta::U32(18));
    odd.set("llama.rope.dimension_count", Meta::U32(18));
    odd.write(&path);
    refused(&path, "heads of a multiple of 16");
    with("general.alignment", Meta::U32(3), "general.alignment");

    let mut missing = file.clone();
    missing.metadata.retain(|(key, _)| key != "llama.block_count");
    missing.write(&path);
    refused(&path, "llama.block_count");

    let v = "blk.0.attn_v.weight";
    let at = file.tensors.iter().position(|tensor| tensor.0 == v).unwrap();
    let changed = |named: &str, change: &dyn Fn(&mut File)| {
        let mut file = file.clone();
        change(&mut file);
        file.write(&path);
        refused(&path, named);
    };
    changed("format Q4_K", &|file| file.tensors[at].2 = 12);
    changed("format 99 of ggml", &|file| file.tensors[at].2 = 99);
    changed("tensor blk.0.attn_v.weight: it is missing", &|file| {
        drop(file.tensors.remove(at));
    });
    changed("tensor blk.0.ffn_up_exps.weight: it is missing", &|file| {
        file.tensors.retain(|tensor| tensor.0 != "blk.0.ffn_up_exps.weight");
    });
    changed("tensor rope_freqs.weight", &|file| {
        file.tensors.push(("rope_freqs.weight".into(), vec![8], 1, vec![0; 16]));
    });
    changed("rope_freqs.weight is a list of 3", &|file| {
        file.tensors.push(("rope_freqs.weight".into(), vec![3], 0, vec![63; 12]));
    });
    changed("blk.0.sinks", &|file| {
        let sinks = ("blk.0.sinks".into(), vec![1], 0, vec![0; 4]);
        file.tensors.push(sinks);
    });
    changed(v, &|file| file.tensors.push(file.tensors[at].clone()));
    changed(v, &|file| file.tensors[at].1.reverse());
    let folder = path.with_file_name("nothing");
    let error = try_import(&folder, &path.with_extension("out")).unwrap_err();
    assert!(matches!(error, ImportError::Io { .. }), "{error}");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let (_dir, path, file) = small();
    let (whole, head) = file.bytes();
    let lengths = (0..head).step_by(97).chain([head, head + 33, whole.len() - 1]);
    for length in lengths {
        fs::write(&path, &whole[..length]).unwrap();
        refused(&path, if length < 4 { "" } else { "damaged" });
    }
    fs::write(&path, "just a text").unwrap();
    refused(&path, "does not begin with GGUF");
    fs::write(&path, &whole).unwrap();
    try_import(&path, &path.with_extension("out")).expect("the file is whole again");
}

/// Tokens that are each other's parts would give as many merges as their number squared.
#[test]
fn a_vocabulary_that_would_fill_the_memory_is_refused() {
    let (_dir, path, mut file) = small();
    let count = 3000;
    let tokens = (1..=count).map(|n| "a".repeat(n)).collect();
    file.set("tokenizer.ggml.model", Meta::Text("llama".into()));
    file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    file.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; count]));
    file.set("tokenizer.ggml.scores", Meta::F32s((0..count).map(|n| -(n as f32)).collect()));
    let embed = file.tensors.iter_mut().find(|tensor| tensor.0 == "token_embd.weight").unwrap();
    (embed.1, embed.3) = (vec![count, 64], vec![0; count * 64 * 4]);
    file.write(&path);
    refused(&path, "without end");
}

/// As in llama.cpp, a factor without a type is a linear one.
#[test]
fn ropes_are_scaled_as_llama_cpp_scales_them() {
    let (_dir, path, file) = small();
    for (factor, kind, expected) in [
        (Some(4.0), None, RopeScaling::Linear { factor: 4.0 }),
        (Some(4.0), Some("linear"), RopeScaling::Linear { factor: 4.0 }),
        (Some(4.0), Some("none"), RopeScaling::None),
        (Some(0.0), None, RopeScaling::None),
        (None, Some("linear"), RopeScaling::None),
    ] {
        let mut file = file.clone();
        if let Some(factor) = factor {
            file.set("llama.rope.scaling.factor", Meta::F32(factor));
        }
        if let Some(kind) = kind {
            file.set("llama.rope.scaling.type", Meta::Text(kind.into()));
        }
        file.write(&path);
        let out = tempdir().unwrap();
        let found = imported(&path, out.path()).config().attention.rope_scaling.clone();
        assert_eq!(found, expected, "{factor:?} {kind:?}");
    }
    let scaled = |change: &dyn Fn(&mut File)| {
        let mut file = file.clone();
        change(&mut file);
        file.write(&path);
        let out = tempdir().unwrap();
        imported(&path, out.path()).config().attention.rope_scaling.clone()
    };
    let yarn = scaled(&|file| {
        file.set("llama.rope.scaling.type", Meta::Text("yarn".into()));
        file.set("llama.rope.scaling.factor", Meta::F32(4.0));
        file.set("llama.rope.scaling.original_context_length", Meta::U32(32));
        file.set("llama.rope.scaling.attn_factor", Meta::F32(0.5));
        file.set("llama.rope.scaling.yarn_beta_fast", Meta::F32(16.0));
    });
    let RopeScaling::Yarn { factor, original, attention_factor, beta_fast, beta_slow, truncate } =
        yarn
    else {
        panic!("{yarn:?} is not yarn");
    };
    assert_eq!((factor, original, beta_fast, beta_slow, truncate), (4.0, 32, 16.0, 1.0, true));
    assert!((attention_factor - 0.5 * (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);

    let factors = |from: f32| (0..8).map(|i| from + i as f32).collect::<Vec<_>>();
    let tensor = |name: &str, factors: &[f32]| {
        let bytes = factors.iter().flat_map(|f| f.to_le_bytes()).collect();
        (name.to_owned(), vec![factors.len()], 0, bytes)
    };
    let wide = |list: &[f32]| list.iter().map(|f| f64::from(*f)).collect::<Vec<_>>();
    let found = scaled(&|file| file.tensors.push(tensor("rope_freqs.weight", &factors(1.0))));
    let RopeScaling::LongRope { short, long, attention_factor, .. } = found else {
        panic!("{found:?}");
    };
    assert_eq!((short, long), (wide(&factors(1.0)), wide(&factors(1.0))));
    assert_eq!(attention_factor, 1.0);
    let found = scaled(&|file| {
        file.set("llama.rope.scaling.type", Meta::Text("longrope".into()));
        file.set("llama.rope.scaling.original_context_length", Meta::U32(32));
        file.set("llama.rope.scaling.attn_factor", Meta::F32(1.25));
        file.tensors.push(tensor("rope_factors_short.weight", &factors(1.0)));
        file.tensors.push(tensor("rope_factors_long.weight", &factors(2.0)));
    });
    let (short, long) = (wide(&factors(1.0)), wide(&factors(2.0)));
    let expected = RopeScaling::LongRope { short, long, original: 32, attention_factor: 1.25 };
    assert_eq!(found, expected);
}

/// Converters of before April 2024 wrote a tensor for each expert, and some write lists of what is
/// alike in all layers.
#[test]
fn experts_in_tensors_of_their_own_and_lists_of_equal_numbers_are_read() {
    let (_dir, folder) = random(RandomClass::Mixtral);
    let mut file = converted(&folder, as_q8_0);
    let (a, b) = (folder.with_extension("a"), folder.with_extension("b"));
    let path = folder.with_extension("gguf");
    file.write(&path);
    let stacked = imported(&path, &a);
    for (name, shape, dtype, bytes) in std::mem::take(&mut file.tensors) {
        let Some(stem) = name.strip_suffix("_exps.weight") else {
            file.tensors.push((name, shape, dtype, bytes));
            continue;
        };
        for (expert, bytes) in bytes.chunks(bytes.len() / shape[0]).enumerate() {
            let name = format!("{stem}.{expert}.weight");
            file.tensors.push((name, shape[1..].to_vec(), dtype, bytes.to_vec()));
        }
    }
    let kv_heads = stacked.config().attention.kv_heads as i32;
    let layers = stacked.config().layers.len();
    file.set("llama.attention.head_count_kv", Meta::I32s(vec![kv_heads; layers]));
    file.write(&path);
    assert_eq!(imported(&path, &b).config(), stacked.config());
    assert!(weights(&b) == weights(&a), "weights differ");

    let path = path.with_file_name("model.gguf");
    file.tensors.retain(|tensor| tensor.0 != "blk.1.ffn_down.3.weight");
    file.write(&path);
    refused(&path, "tensor blk.1.ffn_down.3.weight: it is missing");
}

/// k in Q8_0, as llama-quantize has it in Mixtral's Q4_0, does not change the format of the rest.
#[test]
fn the_format_of_most_weights_is_the_checkpoints() {
    let (_dir, folder) = random(RandomClass::Mixtral);
    let path = folder.with_extension("gguf");
    let pairs: [(Encode, Encode, &str, DType); 2] = [
        (as_q4_0, as_q8_0, "blk.0.attn_k.weight", DType::Int4),
        (as_q8_0, as_q4_0, "token_embd.weight", DType::Int8),
    ];
    for (most, one, name, expected) in pairs {
        let mut file = converted(&folder, most);
        let other = converted(&folder, one).tensors.into_iter().find(|t| t.0 == name).unwrap();
        *file.tensors.iter_mut().find(|t| t.0 == name).unwrap() = other;
        file.write(&path);
        let out = tempdir().unwrap();
        assert_eq!(imported(&path, out.path()).dtype(), expected, "{name}");
    }
}

/// Any flipped bit of a head is refused by the file's name, or changes a number or text that is the
/// model's own business: it never panics and never asks for absurd memory.
#[test]
fn a_flipped_head_never_panics() {
    let (_dir, path, file) = small();
    let (whole, head) = file.bytes();
    for at in 0..head {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(&path, &flipped).unwrap();
        let out = tempdir().unwrap();
        if let Err(error) = try_import(&path, out.path()) {
            assert!(error.to_string().contains("model.gguf"), "{at}: {error}");
        }
    }
}

#[test]
fn sizes_that_lie_are_refused_before_memory_is_asked_for() {
    let (_dir, path, file) = small();
    let (whole, _) = file.bytes();
    let key = 24 + 8 + "general.architecture".len();
    for (at, what) in [(8, "tensors"), (16, "keys"), (24, "a key's length"), (key + 4, "a text's")]
    {
        for length in [u64::MAX, 1 << 62, 1 << 40] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&length.to_le_bytes());
            fs::write(&path, bytes).unwrap();
            let out = tempdir().unwrap();
            try_import(&path, out.path()).expect_err(what);
        }
    }
}

/// Older files, and those of some exporters, name no way to cut texts: the class has one.
#[test]
fn files_that_name_no_way_to_cut_have_that_of_their_class() {
    let dir = tempdir().unwrap();
    for (class, own) in [(RandomClass::Olmoe, "olmo"), (RandomClass::Qwen2Moe, "qwen2")] {
        let folder = dir.path().join(own);
        let shape = RandomShape { layers: 1, experts: 2, ..RandomShape::tiny(class) };
        write_random_hf(&folder, &shape, &mut |_, _| {}).unwrap();
        let tokenizer = |pre: Option<&str>, change: &dyn Fn(&mut File)| {
            let mut file = converted(&folder, as_f32);
            file.metadata.retain(|(key, _)| key != "tokenizer.ggml.pre");
            if let Some(pre) = pre {
                file.set("tokenizer.ggml.pre", Meta::Text(pre.into()));
            }
            change(&mut file);
            let path = dir.path().join("model.gguf");
            file.write(&path);
            let out = tempdir().unwrap();
            try_import(&path, out.path()).unwrap();
            let checkpoint = Checkpoint::open(out.path()).unwrap();
            let json = checkpoint.tokenizer_json().unwrap();
            (checkpoint, String::from_utf8(json).unwrap(), out)
        };
        let same = |_: &mut File| {};
        let (_, named, _) = tokenizer(Some(own), &same);
        assert_eq!(tokenizer(None, &same).1, named);
        assert_eq!(tokenizer(Some("default"), &same).1, named);
        let known = [
            "llama-bpe",
            "tekken",
            "gpt-4o",
            "qwen35",
            "deepseek-llm",
            "deepseek-coder",
            "deepseek-v3",
        ];
        for pre in known {
            assert_ne!(tokenizer(Some(pre), &same).1, named, "{pre}");
        }
        // What can never come, or cannot be rendered, stops no import.
        let (checkpoint, _, _out) = tokenizer(None, &|file| {
            file.set("tokenizer.ggml.bos_token_id", Meta::U32(1 << 20));
            file.set("tokenizer.chat_template", Meta::Text("{% if %}".into()));
        });
        assert_eq!(checkpoint.config().bos_token, None);
        assert!(!checkpoint.manifest().text.special_tokens.contains_key("bos_token"));
        assert!(checkpoint.manifest().text.chat_template.is_some());
    }
}
