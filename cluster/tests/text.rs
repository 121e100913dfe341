//! Text as a user sees it: what a prompt becomes, where an answer begins and ends, what is refused.

mod process;

use std::{
    fs,
    path::{Path, PathBuf},
};

use lite_llm_transport::token::JoinToken;
use process::{Ended, PATIENCE, Process, run, run_with_input};
use serde_json::{Value, json};

/// A folder beside the repository, if this machine has it.
fn shared(path: &str) -> Option<PathBuf> {
    let given = std::env::var_os("LITE_LLM_SHARED").map(PathBuf::from);
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let found = given.unwrap_or(beside).join(path);
    if !found.exists() {
        eprintln!("skipped: {} is not here; set LITE_LLM_SHARED", found.display());
        return None;
    }
    Some(found)
}

/// A case of the shared folder, imported.
fn imported(case: &str, folder: &tempfile::TempDir) -> Option<String> {
    let source = shared("cases")?.join(case);
    let out = folder.path().join(case.replace('/', "-"));
    let out = out.to_str().unwrap().to_owned();
    run(&["import", source.to_str().unwrap(), &out]).expect(0, &[]);
    Some(out)
}

#[track_caller]
fn line(ended: &Ended) -> Value {
    ended.expect(0, &[]);
    serde_json::from_str(ended.out.lines().last().unwrap()).unwrap()
}

/// A Hugging Face folder of a tiny model.
fn tiny(folder: &tempfile::TempDir) -> PathBuf {
    let dir = folder.path().join("hf");
    run(&["bench", "random-model", "--shape", "tiny", dir.to_str().unwrap()]).expect(0, &[]);
    dir
}

#[test]
fn help_begins_with_what_the_program_is_for() {
    for flag in ["help", "--help", "-h"] {
        let ended = run(&[flag]);
        assert!(ended.out.starts_with("Serve sparse mixture-of-experts models"), "{ended:#?}");
    }
}

#[test]
fn what_users_of_other_tools_type_is_taken_or_answered() {
    let any = ["run", "--seed", "-1", "--top-k", "-1", "--max-tokens", "3", "ls - list"];
    run(&any).expect(0, &["seed ", "[3 tokens"]);
    let all = ["run", "--max-tokens", "-1", "--json", "--temperature", "0", "ls - list"];
    assert!(line(&run(&all))["ids"].as_array().unwrap().len() > 128);
    for (flag, value, words) in [
        ("--seed", "-2", &["--seed", "0 to 18446744073709551615", "-1 for any"][..]),
        ("--seed", "abc", &["--seed", "-1 for any"]),
        ("--top-k", "-2", &["--top-k", "0 to 4294967295", "-1 for no limit"]),
        ("--max-tokens", "-2", &["--max-tokens", "-1 for"]),
        ("--kv", "0", &["--kv", "caches need memory", "2GiB"]),
        ("--system", "Be brief.", &["--chat"]),
    ] {
        run(&["run", flag, value, "hi"]).one_error(2, words);
    }
}

#[test]
fn an_answer_ends_before_a_stop_text() {
    let base = ["run", "--json", "--temperature", "0", "--max-tokens", "24", "ls - list"];
    let whole = line(&run(&base));
    let text = whole["text"].as_str().unwrap();
    let from = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[from..].chars().take(5).collect();
    let before = &text[..text.find(&stop).unwrap()];
    let stopped = line(&run(&[&base[..], &["--stop", "never", "--stop", &stop]].concat()));
    assert_eq!((&stopped["text"], &stopped["end"]), (&json!(before), &json!("Stop")));
    let ids = stopped["ids"].as_array().unwrap();
    assert!(whole["ids"].as_array().unwrap().starts_with(ids), "{stopped} {whole}");
    let shown = run(&["run", "--temperature", "0", "--stop", &stop, "ls - list"]);
    assert_eq!(shown.out, format!("\nls - list{before}\n"));
}

#[test]
fn what_shifts_the_choice_is_taken_as_flags() {
    let base = ["run", "--json", "--temperature", "0", "--max-tokens", "24", "ls - list"];
    let ids = |more: &[&str]| -> Vec<u64> {
        let answer = line(&run(&[&base[..], more].concat()));
        answer["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
    };
    let plain = ids(&[]);
    let forced = ids(&["--logit-bias", "70=100", "--ignore-eos"]);
    assert!(forced.iter().all(|id| *id == 70), "{forced:?}");
    let never = format!("{}=-100", plain[0]);
    assert!(!ids(&["--logit-bias", &never, "--logit-bias", "70=0"]).contains(&plain[0]));
    let penalised = ids(&["--frequency-penalty", "100", "--ignore-eos"]);
    let once: std::collections::BTreeSet<&u64> = penalised.iter().collect();
    assert_eq!(once.len(), penalised.len(), "no token comes twice: {penalised:?}");
    assert_ne!(ids(&["--repetition-penalty", "50", "--presence-penalty", "1"]), plain);
    // So near the best that it is the only one.
    let hot = ["run", "--json", "--temperature", "2", "--min-p", "1", "--max-tokens", "24"];
    let hot = line(&run(&[&hot[..], &["ls - list"]].concat()));
    assert_eq!(hot["ids"], json!(plain));
}

#[test]
fn tokenize_shows_ids_pieces_and_the_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let source = tiny(&folder);
    let config = json!({
        "bos_token": "<extra_300>",
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{{ tools | tojson }}",
    });
    fs::write(source.join("tokenizer_config.json"), config.to_string()).unwrap();
    let model = folder.path().join("model");
    let (source, model) = (source.to_str().unwrap(), model.to_str().unwrap());
    run(&["import", source, model]).expect(0, &[]);

    let plain = line(&run(&["tokenize", "--model", model, "--json", "ab"]));
    assert_eq!(plain, json!({ "ids": [97, 98], "pieces": ["a", "b"] }));
    let input = run_with_input(&["tokenize", "--model", model, "--json", "-"], b"ab");
    assert_eq!(line(&input), plain);
    let chat = ["tokenize", "--model", model, "--chat", "--system", "S", "x"];
    let shown = run(&chat);
    let prompt = "<extra_300>[system]S\n[user]x\nnull";
    assert!(shown.out.starts_with(&format!("{prompt}\n\n     60  \"<\"\n")), "{shown:#?}");
    let json = line(&run(&[&chat[..], &["--json"]].concat()));
    assert_eq!((&json["prompt"], &json["ids"][0]), (&json!(prompt), &json!(60)));

    let conversation = folder.path().join("conversation.json");
    let tools = r#"{"messages": [{"role": "a", "content": "b"}], "tools": [{"z": 1, "a": "é"}]}"#;
    fs::write(&conversation, tools).unwrap();
    let conversation = conversation.to_str().unwrap();
    let args = ["tokenize", "--model", model, "--json", "--conversation", conversation];
    let expected = "<extra_300>[a]b\n[{\"z\": 1, \"a\": \"é\"}]";
    assert_eq!(line(&run(&args))["prompt"], expected);

    let template = folder.path().join("other.jinja");
    fs::write(&template, "{{ strftime_now('%Y') | length }}{{ messages[0].content }}").unwrap();
    let template = template.to_str().unwrap();
    let args = [&args[..], &["--template", template]].concat();
    assert_eq!(line(&run(&args))["prompt"], "4b");
    fs::write(template, "{% if %}").unwrap();
    run(&args).one_error(2, &[template, "syntax error"]);
    fs::write(conversation, "{}").unwrap();
    run(&args[..6]).one_error(2, &[conversation, "messages"]);
    run(&["tokenize", "--model", model]).one_error(2, &["TEXT"]);
}

#[test]
fn a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised() {
    let long = "word ".repeat(4 << 20);
    run_with_input(&["run", "-"], long.as_bytes()).one_error(2, &["bytes", "shorten"]);
    run_with_input(&["submit", "-"], long.as_bytes()).one_error(2, &["4194304", "shorten"]);
    run_with_input(&["tokenize", "-"], long.as_bytes()).one_error(2, &["bytes", "shorten"]);
}

#[test]
fn a_tokenizer_that_makes_the_library_panic_is_one_sentence() {
    let Some(damaged) = shared("breaks/15-tokenizer-panic-text") else { return };
    let folder = tempfile::tempdir().unwrap();
    let source = tiny(&folder);
    for file in ["a.json", "b.json"] {
        fs::copy(damaged.join(file), source.join("tokenizer.json")).unwrap();
        let out = folder.path().join("out");
        let args = ["import", source.to_str().unwrap(), out.to_str().unwrap()];
        run(&args).one_error(2, &["tokenizer.json", "tokenizer:"]);
    }
}

#[test]
fn a_template_that_cannot_be_used_stops_the_chat_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let source = tiny(&folder);
    fs::write(source.join("chat_template.jinja"), "{% if %}").unwrap();
    let model = folder.path().join("model");
    let (source, model) = (source.to_str().unwrap(), model.to_str().unwrap());
    run(&["import", source, model]).expect(0, &["chat_template.jinja", "--chat will not work"]);
    run(&["run", "--model", model, "--max-tokens", "2", "hi"]).expect(0, &["[2 tokens"]);
    run(&["run", "--model", model, "--chat", "hi"])
        .one_error(1, &["--chat: chat template: syntax error"]);
    let (source, none) = (source.to_owned(), folder.path().join("none"));
    fs::remove_file(folder.path().join("hf/chat_template.jinja")).unwrap();
    let none = none.to_str().unwrap();
    run(&["import", &source, none]).expect(0, &[]);
    run(&["run", "--model", none, "--chat", "hi"]).one_error(2, &["no chat template"]);
}

/// The weights of these folders answer with a word that tells what the prompt was.
#[test]
fn prompts_and_answers_are_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let one = &["x", "--chat", "--max-tokens", "1"][..];
    for (case, args, ids, text) in [
        ("spm-first-space/model", &["The program"][..], json!([418, 353, 510, 2]), " is the term"),
        ("chat-special-tokens/model-bos", one, json!([270]), " the"),
        ("chat-tools-none/model", one, json!([332]), " for"),
        ("eos-in-tokenizer-config/model", &["x", "--chat"], json!([270, 5]), " the"),
        ("template-generation-tag/model", one, json!([332]), " for"),
        ("template-strftime/model", one, json!([332]), " for"),
    ] {
        let Some(model) = imported(case, &folder) else { return };
        let base = ["run", "--model", &model, "--temperature", "0"];
        let found = line(&run(&[&base[..], args, &["--json"]].concat()));
        assert_eq!((&found["ids"], &found["text"]), (&ids, &json!(text)), "{case}");
        let between = if args.contains(&"--chat") { "\n\n" } else { "" };
        let shown = run(&[&base[..], args].concat());
        assert_eq!(shown.out, format!("\n{}{between}{text}\n", args[0]), "{case}");
    }
    let Some(cases) = shared("cases") else { return };
    let out = folder.path().join("unclear").to_str().unwrap().to_owned();
    let source = cases.join("unclear-messages/gen-eos");
    run(&["import", source.to_str().unwrap(), &out])
        .expect(0, &["generation_config.json: eos_token_id 600 is left out", "512"]);
}

/// A coordinator has the template; its client says who is asked, and when.
#[test]
fn a_coordinator_renders_what_is_submitted_as_chat() {
    let folder = tempfile::tempdir().unwrap();
    let Some(model) = imported("template-strftime/model", &folder) else { return };
    let state = folder.path().join("state");
    let state = state.to_str().unwrap();
    let args = ["coordinator", "--listen", "127.0.0.1:0", "--model", &model, "--state", state];
    let mut coordinator = Process::start(&args);
    coordinator.says("waiting for workers");
    let token = format!("{state}/client.token");
    let worker_token = format!("{state}/worker.token");
    let address = JoinToken::read(token.as_ref()).unwrap().address().to_owned();
    let port = address.rsplit_once(':').unwrap().1;
    let host = format!("localhost:{port}");
    let args = ["worker", "--token", &worker_token, "--join", &host, "--name", "a", "--kv", "1MiB"];
    let _worker = Process::start(&args);
    coordinator.says("ready: a");

    let submit = |args: &[&str]| {
        let base = ["submit", "--token", &token, "--coordinator", &host, "--temperature", "0"];
        Process::start(&[&base[..], args].concat()).ends_within(PATIENCE)
    };
    let chat = submit(&["--chat", "--max-tokens", "1", "--json", "x"]);
    assert_eq!(line(&chat)["ids"], json!([332]));
    assert_eq!(submit(&["--chat", "--max-tokens", "1", "x"]).out, "\nx\n\n for\n");
    let stopped = submit(&["--chat", "--max-tokens", "9", "--stop", "or", "--json", "x"]);
    assert_eq!((&line(&stopped)["text"], &line(&stopped)["end"]), (&json!(" f"), &json!("Stop")));
    let jobs = folder.path().join("jobs.jsonl");
    let job = json!({ "prompt": "x", "chat": true, "system": "Be brief.", "stop": [" f"], "max_tokens": 3 });
    fs::write(&jobs, job.to_string()).unwrap();
    let found = line(&submit(&["--file", jobs.to_str().unwrap()]));
    assert_eq!(found["end"], "Stop", "{found}");

    let bad = ["submit", "--token", &token, "--coordinator", "no-such-host.invalid:1", "x"];
    run(&bad).one_error(2, &["no-such-host.invalid:1", "no host of this name"]);
    run(&["worker", "--join", "node1"]).one_error(2, &["--join", "HOST:PORT"]);
}
