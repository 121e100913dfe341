//! `lite-llm bench`: what it reports, not how fast anything is.

mod process;

use std::time::Duration;

use process::{PATIENCE, Process, demo_model, run};
use serde_json::Value;

fn report(args: &[&str]) -> Value {
    // Several models are loaded and run, beside other tests.
    let ended = Process::start(args).ends_within(3 * PATIENCE);
    ended.expect(0, &[]);
    serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:#?}"))
}

fn positive(value: &Value, keys: &[&str]) {
    for key in keys {
        let at = value.pointer(key).and_then(Value::as_f64);
        assert!(at.is_some_and(|number| number > 0.0), "{key} is {at:?} in {value}");
    }
}

#[test]
fn decode_and_prefill_stand_beside_the_engine_alone() {
    // The command itself fails unless cluster and engine generate the same tokens.
    for workers in ["1", "2"] {
        let sizes = ["--prompt", "9", "--generate", "3", "--runs", "1", "--workers", workers];
        for phase in ["decode", "prefill"] {
            let report = report(&[&["bench", phase, "--json"][..], &sizes].concat());
            positive(
                &report,
                &[
                    "/cluster_tokens_per_second/median",
                    "/engine_tokens_per_second/median",
                    "/ratio",
                    "/load_seconds",
                ],
            );
            assert_eq!(report["prompt_tokens"], 9);
            assert_eq!(report["asked"].is_number(), (workers, phase) == ("1", "decode"));
        }
    }
}

#[test]
fn steps_of_training_are_measured() {
    let report =
        report(&["bench", "train", "--shape", "tiny", "--batch", "2x8", "--steps", "2", "--json"]);
    positive(&report, &["/tokens_per_second/median", "/seconds/forward", "/loss", "/parameters"]);
    assert_eq!((&report["rows"], &report["tokens"]), (&2.into(), &8.into()));
    for (flag, value) in
        [("--shape", "small"), ("--batch", "8"), ("--batch", "0x8"), ("--batch", "1x5000")]
    {
        let ended =
            Process::start(&["bench", "train", flag, value]).ends_within(Duration::from_secs(30));
        ended.one_error(2, &[value, "expected"]);
    }
}

#[test]
fn a_plan_says_how_experts_are_really_fetched() {
    let sizes = ["--tokens", "8", "--prompt-tokens", "8", "--json"];
    let built_in = report(&[&["plan"][..], &sizes].concat());
    assert_eq!(built_in["measured"]["fetched_by"], "the embedded checkpoint");
    let model = demo_model();
    let folder = report(&[&["plan", "--model", model.to_str().unwrap()][..], &sizes].concat());
    let by = folder["measured"]["fetched_by"].as_str().unwrap_or_default();
    assert!(by.contains(" by io_uring") || by.contains(" by pread"), "{by}");
}

#[test]
fn a_plan_says_what_gpus_allow() {
    let sizes = ["plan", "--tokens", "8", "--prompt-tokens", "8", "--kv-dtype", "bf16", "--json"];
    assert!(report(&[&sizes[..], &["--gpus", "0"]].concat())["gpu"].is_null());
    let one = report(&[&sizes[..], &["--gpu", "H100"]].concat());
    let (gpu, dense) = (&one["gpu"], one["dense_bytes"].as_f64().unwrap());
    assert_eq!((&gpu["gpus"], &gpu["context"]), (&1.into(), &16.into()));
    assert_eq!(gpu["experts_in_hbm_bytes"], one["experts_bytes"], "all of a small model");
    let kv = gpu["kv_bytes_per_position"].as_f64().unwrap() * 16.0;
    for step in gpu["decode"].as_array().unwrap() {
        let number = |name: &str| step[name].as_f64().unwrap();
        let (batch, experts) = (number("batch"), number("expert_bytes"));
        let read = dense + experts + batch * kv;
        assert!((number("read_bytes") / read - 1.0).abs() < 1e-9, "{step}");
        let limit = batch * 2.985e12 / read;
        assert!((number("tokens_per_second_at_most") / limit - 1.0).abs() < 1e-9, "{step}");
        assert_eq!((&step["bound"], number("copied_bytes")), (&"hbm".into(), 0.0));
    }
    // Without room for any, every expert that is touched is copied.
    let described = ["--gpu-memory", "1GiB", "--hbm", "0", "--hbm-bandwidth", "1TB/s"];
    let without = [&sizes[..], &described, &["--copy-bandwidth", "1GB/s", "--gpus", "2"]].concat();
    let without = report(&without);
    let step = &without["gpu"]["decode"][2];
    assert_eq!((&without["gpu"]["gpus"], &step["bound"]), (&2.into(), &"copy".into()));
    let experts = step["expert_bytes"].as_f64().unwrap();
    let limit = step["tokens_per_second_at_most"].as_f64().unwrap();
    assert!((limit / (64.0 * 2e9 / experts) - 1.0).abs() < 1e-9, "{step}");
    let small = ["plan", "--gpu", "h200", "--gpu-memory", "1MiB"];
    let ended = Process::start(&small).ends_within(Duration::from_secs(60));
    ended.one_error(2, &["has no room", "dense weights"]);
}

#[test]
fn several_requests_run_on_worker_processes_and_their_time_is_accounted_for() {
    let model = demo_model();
    let model = model.to_str().unwrap();
    let report = report(&[
        "bench",
        "decode",
        "--json",
        "--model",
        model,
        "--prompt",
        "9",
        "--generate",
        "3",
        "--runs",
        "1",
        "--workers",
        "2",
        "--threads",
        "1",
        "--processes",
        "--sequences",
        "2",
        "--profile",
    ]);
    positive(&report, &["/cluster_tokens_per_second/median", "/ratio", "/asked"]);
    assert_eq!((&report["processes"], &report["sequences"]), (&true.into(), &2.into()));
    let whole = report["profile"]["seconds"].as_f64().unwrap();
    let spans = report["profile"]["spans"].as_array().unwrap();
    let sum: f64 = spans.iter().map(|span| span["seconds"].as_f64().unwrap()).sum();
    assert!((sum / whole - 1.0).abs() < 1e-6, "{sum} of {whole} seconds in {spans:?}");
    for name in ["qkv", "attention", "route", "experts", "combine", "logits"] {
        assert!(spans.iter().any(|span| span["span"] == name), "{name} in {spans:?}");
    }
}

#[test]
fn what_worker_processes_cannot_hold_is_said_at_once() {
    let model = demo_model();
    let model = model.to_str().unwrap();
    let args =
        ["bench", "decode", "--model", model, "--processes", "--dram", "1", "--cluster-only"];
    let ended = Process::start(&args).ends_within(Duration::from_secs(30));
    ended.one_error(1, &["raise --dram"]);
}

#[test]
fn transport_measures_three_loops_between_two_processes() {
    let sizes = ["--rows", "5", "--hidden", "48", "--top-k", "3", "--rounds", "4", "--runs", "2"];
    let report = report(&[&["bench", "transport", "--json"][..], &sizes].concat());
    for which in ["experts", "quic", "tcp"] {
        let keys = ["p50_ms", "p99_ms", "gigabytes_per_second/median"];
        positive(&report[which], &keys.map(|key| format!("/{key}")).each_ref().map(|k| &**k));
    }
    assert_eq!((&report["request_bytes"], &report["reply_bytes"]), (&960.into(), &2880.into()));
}

#[test]
fn a_long_measurement_can_be_interrupted() {
    for args in [
        &["bench", "kernels", "--runs", "1000"][..],
        &["bench", "decode", "--runs", "1000"],
        &["bench", "transport", "--rounds", "100000"],
    ] {
        let process = Process::start(args);
        std::thread::sleep(Duration::from_secs(2));
        process.signal("INT");
        process.ends_within(Duration::from_secs(5)).expect(130, &["interrupted"]);
    }
}

#[test]
fn what_cannot_be_measured_is_bad_input() {
    for (args, words) in [
        (&["bench", "decode", "--generate", "1"][..], &["--generate"][..]),
        (&["bench", "decode", "--prompt", "2000"], &["2000 tokens", "this model sees 1024"]),
        (&["bench", "prefill", "--model", "/nowhere"], &["/nowhere"]),
        (&["bench", "decode", "--processes"], &["--processes needs --model"]),
        (&["bench", "kernels", "--runs", "0"], &["--runs"]),
        (&["bench", "kernels", "--simd", "sse9"], &["sse9"]),
        (&["bench", "transport", "--rows", "65536"], &["524288 outputs", "--rows"]),
    ] {
        run(args).one_error(2, words);
    }
}
