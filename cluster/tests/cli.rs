//! Bad input, as a user sees it: the exit code, and the sentence on standard error.

mod process;

use std::{fs, path::Path};

use process::{demo_model, run, run_with_input};

fn write(folder: &Path, name: &str, content: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn bad_usage_ends_with_2_and_names_the_flag() {
    for (args, words) in [
        (&["run", "--bogus"][..], &["--bogus"][..]),
        (&["run", "--workers", "0", "hi"], &["--workers", "0 is not in 1..=256"]),
        (&["run", "--threads", "0", "hi"], &["--threads"]),
        (&["run", "--dram", "3 parsecs", "hi"], &["--dram", "3GiB"]),
        (&["coordinator", "--model", "x", "--workers", "0"], &["--workers"]),
        (&["submit"], &["PROMPT"]),
        (&["run", "--math", "fuzzy", "hi"], &["'fuzzy' for '--math", "expected exact or fast"]),
        (&["run", "--math", "fast", "hi"], &["a CPU computes exactly", "--device cuda"]),
        (&["plan", "--gpu", "abacus"], &["--gpu", "h100"]),
        (&["worker", "--device", "tpu"], &["'tpu' for '--device", "expected cpu"]),
        (&["run", "--log", "x=y=z", "hi"], &["--log x=y=z"]),
        (&["nonsense"], &["nonsense"]),
    ] {
        run(args).one_error(2, words);
    }
}

#[test]
fn settings_out_of_range_are_refused_before_anything_is_loaded() {
    for (flag, value, words) in [
        ("--temperature", "-1", &["temperature is -1", "at least 0"][..]),
        ("--temperature", "NaN", &["temperature is NaN"]),
        ("--temperature", "inf", &["temperature is inf"]),
        ("--top-p", "0", &["top-p is 0", "at most 1"]),
        ("--top-p", "1.5", &["top-p is 1.5"]),
        ("--tiers", "tier_zz", &["no tier tier_zz", "tier_1b"]),
        ("--tiers", "TIER", &["cannot name a tier"]),
        ("--min-p", "-1", &["min-p is -1", "at least 0"]),
        ("--repetition-penalty", "0", &["repetition penalty is 0", "above 0"]),
        ("--presence-penalty", "inf", &["presence penalty is inf"]),
        ("--frequency-penalty", "NaN", &["frequency penalty is NaN"]),
        ("--logit-bias", "70", &["ID=BIAS is expected, such as 70=-100"]),
        ("--logit-bias", "ls=1", &["no token id", "tokenize"]),
        ("--logit-bias", "70=-101", &["-100 to 100"]),
        ("--logit-bias", "99999=1", &["the bias of token 99999", "2048 tokens"]),
        ("--speculate", "tea leaves", &["off, ngram or tier:NAME"]),
        ("--speculate", "tier:TIER", &["cannot name a tier"]),
        ("--speculate", "tier:tier_zz", &["speculate: the model has no tier tier_zz", "tier_1b"]),
        ("--speculate", "tier:tier_1b", &["speculate: ", "the request uses no other"]),
    ] {
        run(&["run", flag, value, "hi"]).one_error(2, words);
        // A client has no model, so it leaves unknown names to the cluster.
        if !["tier_zz", "tier:tier_zz", "tier:tier_1b", "99999=1"].contains(&value) {
            run(&["submit", flag, value, "hi"]).one_error(2, words);
        }
    }
}

#[test]
fn prompts_that_are_none_are_refused() {
    run(&["run", ""]).one_error(2, &["the prompt is empty"]);
    let long = "word ".repeat(3000);
    run_with_input(&["run", "-"], long.as_bytes())
        .one_error(2, &["the prompt has 30", "this model sees 1024", "shorten"]);
    for command in ["run", "submit"] {
        run_with_input(&[command, "-"], b"a\xffb")
            .one_error(2, &["standard input is not UTF-8", "byte 1"]);
    }
}

#[test]
fn models_that_are_none_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().to_str().unwrap();
    for command in ["run", "perplexity", "coordinator"] {
        let text = write(folder.path(), "text", "some text");
        let mut args = vec![command, "--model", "/no/such/model"];
        if command == "perplexity" {
            args.extend(["--text", &text]);
        }
        run(&args).one_error(2, &["/no/such/model"]);
    }
    run(&["inspect", empty]).one_error(2, &[empty, "no checkpoint", "manifest.N.json"]);
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    run(&["import", "/no/such/folder", out]).one_error(2, &["/no/such/folder"]);
    run(&["import", empty, out]).one_error(2, &["config.json"]);
}

#[test]
fn a_model_that_does_not_fit_says_what_is_needed_and_what_there_is() {
    run(&["run", "--dram", "100KiB", "--workers", "2", "hi"])
        .one_error(2, &["11796480 bytes", "204800", "2 nodes", "--dram"]);
    run(&["run", "--kv", "1KiB", "hi"]).expect(1, &["--kv"]);
}

#[test]
fn a_model_that_memory_does_not_hold_gives_the_same_text_and_says_where_the_rest_is() {
    let text = |more: &[&str]| {
        let args = ["run", "--max-tokens", "8", "ls - list"];
        let ended = run(&[&args, more].concat());
        ended.expect(0, &["memory: "]);
        (ended.out, ended.err)
    };
    let (whole, _) = text(&[]);
    let (small, said) = text(&["--dram", "1MiB", "--workers", "2"]);
    assert_eq!(whole, small);
    assert!(said.contains("1.0 MiB for experts") && said.contains("when it is needed"), "{said}");
    let folder = tempfile::tempdir().unwrap();
    let disk = format!("{}:4MiB", folder.path().display());
    let (cached, _) = text(&["--dram", "1MiB", "--nvme", &disk]);
    assert_eq!(whole, cached);
    run(&["run", "--nvme", "/fast/cache", "hi"]).one_error(2, &["/fast/cache:100GiB"]);
}

#[test]
fn token_files_of_eval_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (demo_model(), folder.path().join("out"));
    let (model, out) = (model.to_str().unwrap(), out.to_str().unwrap());
    for (content, words) in [
        ("{\"prompts\": [[1, 2]", &["\"prompts\"", "line 1"][..]),
        ("{\"prompts\": [[-1]]}", &["\"prompts\""]),
        ("{\"tokens\": [[1]]}", &["unknown field `tokens`"]),
        ("{\"prompts\": [[1], [2, 99999]]}", &["prompt 1", "token 99999 at position 1", "2048"]),
        ("{\"prompts\": [[]]}", &["prompt 0", "empty"]),
    ] {
        let tokens = write(folder.path(), "tokens.json", content);
        let args = ["eval", "--model", model, "--tokens", &tokens, "--out", out];
        let mut words = words.to_vec();
        words.push(&tokens);
        run(&args).one_error(2, &words);
        assert!(!Path::new(out).exists(), "{content}: something was written");
    }
    let tokens = write(folder.path(), "tokens.json", "{\"prompts\": [[1, 2, 3]]}");
    let nowhere = "/no/such/folder/out";
    run(&["eval", "--model", model, "--tokens", &tokens, "--out", nowhere])
        .one_error(1, &[nowhere]);
}

#[test]
fn a_bad_line_of_a_jobs_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for (line, words) in [
        ("{\"prompt\": 3}", &["line 2", "{\"prompt\": \"…\"}"][..]),
        ("{\"prompt\": \"x\", \"colour\": 1}", &["line 2", "unknown field `colour`"]),
        ("{\"prompt\": \"x\", \"temperature\": -2}", &["line 2", "temperature is -2"]),
        ("{\"prompt\": \"x\", \"min_p\": 2}", &["line 2", "min-p is 2"]),
        ("{\"prompt\": \"x\", \"logit_bias\": {\"7\": 101}}", &["line 2", "-100 to 100"]),
        ("{\"prompt\": \"x\", \"logit_bias\": {\"a\": 1}}", &["line 2", "no token id"]),
        ("not json", &["line 2"]),
    ] {
        let jobs = write(folder.path(), "jobs.jsonl", &format!("{{\"prompt\": \"x\"}}\n{line}\n"));
        run(&["submit", "--file", &jobs]).one_error(2, words).expect(2, &[&jobs]);
    }
    fs::write(folder.path().join("jobs.jsonl"), b"{\"prompt\": \"\xff\"}").unwrap();
    let jobs = folder.path().join("jobs.jsonl");
    run(&["submit", "--file", jobs.to_str().unwrap()]).one_error(2, &["UTF-8"]);
}

#[test]
fn texts_for_perplexity_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let text = write(folder.path(), "text", "");
    run(&["perplexity", "--text", &text]).one_error(2, &[&text, "0 tokens", "at least 2"]);
    run(&["perplexity", "--window", "1", "--text", &text]).one_error(2, &["--window 1", "1024"]);
    fs::write(&text, b"abc\xfe").unwrap();
    run(&["perplexity", "--text", &text]).one_error(2, &[&text, "byte 3"]);
}

#[test]
fn a_clean_run_says_what_it_did_and_nothing_else() {
    let ended = run(&["run", "--max-tokens", "4", "--workers", "2", "ls - list"]);
    ended.expect(0, &["built-in model", "2 workers", "[4 tokens"]);
    ended.expect(0, &["memory: 5.6 MiB for all experts", "(each worker)"]);
    assert_eq!(ended.err.lines().count(), 3, "{ended:#?}");
    assert!(ended.out.starts_with("\nls - list") && ended.out.ends_with('\n'), "{ended:#?}");
    let ended = run(&["run", "--json", "--log", "info", "--max-tokens", "4", "ls - list"]);
    let line: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
    assert_eq!(line["ids"].as_array().unwrap().len(), 4);
    // Logs that go to a file hold no colours and no libraries' spans.
    assert!(ended.err.contains("INFO") && !ended.err.contains('\u{1b}'), "{ended:#?}");
    assert!(!ended.err.contains("Actor{") && !ended.err.contains("WARN"), "{ended:#?}");
}
