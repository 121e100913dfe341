//! Settings, as a user sees them: defaults < `lite-llm.toml` < environment < flags; completions and the
//! manual page.

mod process;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

/// A folder in which `lite-llm` is run.
struct Place(tempfile::TempDir);

impl Place {
    /// With this `lite-llm.toml`, if any.
    fn with(settings: Option<&str>) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        if let Some(text) = settings {
            fs::write(place.path("lite-llm.toml"), text).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, variables: &[(&str, &str)], args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_lite-llm"))
            .args(args)
            .current_dir(self.0.path())
            .env_clear()
            .env("HOME", self.0.path())
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Value and origin of a setting.
    #[track_caller]
    fn setting(
        &self,
        variables: &[(&str, &str)],
        args: &[&str],
        flag: &str,
    ) -> (Option<String>, String) {
        let output = self.run(variables, args);
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(output.status.success(), "{output:?}");
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let line = lines.into_iter().find(|line| line["setting"] == flag);
        let line = line.unwrap_or_else(|| panic!("{flag} is missing: {text}"));
        (line["value"].as_str().map(str::to_owned), line["from"].as_str().unwrap().to_owned())
    }

    /// It ends with 2 and one sentence that has all of these words.
    #[track_caller]
    fn refuses(&self, variables: &[(&str, &str)], args: &[&str], words: &[&str]) {
        let output = self.run(variables, args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(said.starts_with("error: "), "{said}");
        for word in words {
            assert!(said.contains(word), "{word:?} is missing: {said}");
        }
    }
}

#[test]
fn four_layers_of_a_coordinator_and_a_worker() {
    for (role, flag, default, values) in [
        ("coordinator", "patience", "60s", ["10s", "20s", "30s"]),
        ("worker", "patience", "60s", ["10s", "20s", "30s"]),
        ("coordinator", "workers", "1", ["2", "3", "4"]),
    ] {
        let file = format!("[{role}]\n{flag} = \"{}\"\n", values[0]);
        let name = format!("LITE_LLM_{}_{}", role.to_uppercase(), flag.to_uppercase());
        let variable = [(name.as_str(), values[1])];
        let dashed = format!("--{flag}");
        let shown = ["--json", "config", role];
        let flags = [&shown[..], &[&dashed, values[2]]].concat();
        let (none, some) = (Place::with(None), Place::with(Some(&file)));
        let is = |value: &str, from: &str| (Some(value.to_owned()), from.to_owned());
        assert_eq!(none.setting(&[], &shown, flag), is(default, "default"));
        assert_eq!(some.setting(&[], &shown, flag), is(values[0], "lite-llm.toml"));
        assert_eq!(some.setting(&variable, &shown, flag), is(values[1], &name));
        assert_eq!(some.setting(&variable, &flags, flag), is(values[2], &dashed));
        assert_eq!(none.setting(&[], &flags, flag), is(values[2], &dashed));
    }
}

#[test]
fn what_is_shown_is_what_a_coordinator_and_a_worker_take() {
    let model = process::demo_model();
    let model = model.to_str().unwrap();
    let file = format!(
        "log = \"off\"\n[coordinator]\nmodel = {model:?}\nlisten = \"0.0.0.0:1\"\n\
         [worker]\ndevice = \"tpu\"\ntoken = \"none.token\"\n"
    );
    let place = Place::with(Some(&file));
    // Refused after everything was read: the address, and the device.
    place.refuses(&[], &["coordinator"], &["--listen 0.0.0.0:1", "--advertise"]);
    let variable = [("LITE_LLM_COORDINATOR_LISTEN", "0.0.0.0:2")];
    place.refuses(&variable, &["coordinator"], &["--listen 0.0.0.0:2"]);
    place.refuses(&variable, &["coordinator", "--listen", "0.0.0.0:3"], &["--listen 0.0.0.0:3"]);
    place.refuses(&[], &["worker"], &["'tpu' for '--device"]);
    place.refuses(&[("LITE_LLM_WORKER_DEVICE", "npu")], &["worker"], &["'npu' for '--device"]);
    let flag = ["worker", "--device", "dsp"];
    // What is wrong is named where it stands, also where something else would win.
    place.refuses(&[("LITE_LLM_WORKER_DEVICE", "npu")], &flag, &["LITE_LLM_WORKER_DEVICE", "npu"]);
    // The variable that a flag always had wins over the file, too.
    let state = Place::with(Some("[coordinator]\nstate = \"file\"\n"));
    let shown = ["--json", "config", "coordinator"];
    let set = state.setting(&[("LITE_LLM_STATE", "variable")], &shown, "state");
    assert_eq!(set, (Some("variable".into()), "LITE_LLM_STATE".into()));
    assert_eq!(state.setting(&[], &shown, "state").0.as_deref(), Some("file"));
    // Commands that have no settings do not read them.
    let bad = Place::with(Some("nonsense"));
    assert!(bad.run(&[], &["completions", "bash"]).status.success());
}

#[test]
fn mistakes_name_their_place() {
    let unknown = Place::with(Some("[coordinator]\nlissten = \"x\"\n"));
    let words = ["lite-llm.toml", "coordinator.lissten", "did you mean coordinator.listen?"];
    for args in [&["config"][..], &["coordinator"], &["worker"]] {
        unknown.refuses(&[], args, &words);
    }
    let none = Place::with(None);
    let variable = [("LITE_LLM_WORKER_DRUM", "1GiB")];
    none.refuses(&variable, &["worker"], &["LITE_LLM_WORKER_DRUM", "worker.dram"]);
    none.refuses(&[], &["--config", "no.toml", "worker"], &["no.toml: cannot read"]);
    none.refuses(&[("LITE_LLM_CONFIG", "no.toml")], &["config"], &["no.toml: cannot read"]);
    let wrong = Place::with(Some("[coordinator]\nworkers = \"three\"\nmodel = \"m\"\n"));
    wrong.refuses(&[], &["coordinator"], &["lite-llm.toml: workers: ", "'three'"]);
    let wrong = Place::with(Some("[worker]\nthreads = {}\n"));
    wrong.refuses(&[], &["worker"], &["lite-llm.toml: threads is a text, a number"]);
    let wrong = Place::with(Some("[worker\n"));
    wrong.refuses(&[], &["worker"], &["lite-llm.toml: "]);
    let wrong = Place::with(Some("[worker]\nlog = \"info\"\n"));
    wrong.refuses(&[], &["worker"], &["there is no setting worker.log"]);
    // Required, and nowhere: as clap says it.
    let output = Place::with(Some("[coordinator]\n")).run(&[], &["coordinator"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--model"), "{output:?}");
}

#[test]
fn the_settings_that_are_packed_are_good() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let packed = root.join("packaging/lite-llm.toml");
    let place = Place::with(None);
    let output = place.run(&[], &["--config", packed.to_str().unwrap(), "config"]);
    assert!(output.status.success(), "{output:?}");
    // With every line that is commented out, too.
    let text = fs::read_to_string(packed).unwrap();
    let all: Vec<&str> = text
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(setting) if setting.split(' ').nth(1) == Some("=") => setting,
            _ => line,
        })
        .collect();
    let place = Place::with(Some(&all.join("\n")));
    let shown = ["--json", "config", "worker"];
    assert_eq!(place.setting(&[], &shown, "threads").1, "lite-llm.toml");
    assert_eq!(place.setting(&[], &["--json", "config"], "keep-jobs").1, "lite-llm.toml");
}

#[test]
fn shells_take_their_completions() {
    let place = Place::with(None);
    for shell in ["bash", "zsh", "fish"] {
        let output = place.run(&[], &["completions", shell]);
        assert!(output.status.success(), "{output:?}");
        let script = String::from_utf8(output.stdout).unwrap();
        for words in ["coordinator", "replicas", "http-cert"] {
            assert!(script.contains(words), "{shell}: {words} is missing");
        }
        let file = place.path(shell);
        fs::write(&file, script).unwrap();
        // The shell itself reads it, where it is installed.
        match Command::new(shell).arg("-n").arg(&file).output() {
            Ok(read) => assert!(read.status.success(), "{shell}: {read:?}"),
            Err(_) => println!("skipped: {shell} is not installed"),
        }
    }
    assert_eq!(place.run(&[], &["completions", "csh"]).status.code(), Some(2));
}

#[test]
fn the_manual_page_renders() {
    let place = Place::with(None);
    let pages = place.path("man");
    let output = place.run(&[], &["man", "--out", pages.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    for (page, words) in [
        ("lite-llm.1", ["lite-llm", "coordinator"]),
        ("lite-llm-coordinator.1", ["--replicas", "--http-cert"]),
    ] {
        let page = pages.join(page);
        assert!(page.is_file(), "{}", page.display());
        let rendered = Command::new("man").args(["-l"]).arg(&page).env("MANWIDTH", "100").output();
        // Only where there is none is nothing to be seen: one that fails is a page that is wrong.
        let rendered = match rendered {
            Ok(rendered) => rendered,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                println!("skipped: man is not installed");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let text = String::from_utf8_lossy(&rendered.stdout);
        // What minimal images have in its place.
        if text.contains("has been minimized") {
            println!("skipped: man renders nothing here: {text}");
            continue;
        }
        assert!(rendered.status.success() && rendered.stderr.is_empty(), "{rendered:?}");
        // Hyphens may be typographic.
        let text: String = text.replace('\u{2010}', "-");
        for word in words {
            assert!(text.contains(word), "{word} is missing: {text}");
        }
    }
    let one = place.run(&[], &["man"]);
    assert!(String::from_utf8_lossy(&one.stdout).contains(".TH lite-llm"), "{one:?}");
}
