//! Tokenizers and chat templates agree with what transformers computed, for every reference folder.

mod hf;

use std::{fs, path::Path};

use lite_llm_runtime::{
    chat::{ChatTemplate, Message},
    import::{
        random::{RandomClass, RandomShape, write_random_hf},
        text,
    },
    tokenizer::{OPEN_TOKENS_MAX, Tokenizer},
};
use proptest::prelude::*;
use serde_json::Value;
use tempfile::tempdir;

const ALL: [&str; 10] = [
    "deepseek_v3",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "granitemoe",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_bf16_sharded",
];

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn load(dir: &Path) -> (Tokenizer, ChatTemplate, Value) {
    let text = text::read(dir).unwrap();
    let tokenizer = Tokenizer::from_json(&text.tokenizer_json).unwrap();
    let (bos, eos) = (text.bos_token.as_deref(), text.eos_token.as_deref());
    let template = ChatTemplate::new(text.chat_template.as_ref().unwrap(), bos, eos).unwrap();
    let refs: Value = serde_json::from_slice(&fs::read(dir.join("refs.json")).unwrap()).unwrap();
    (tokenizer, template, refs["tokenizer"].clone())
}

#[test]
fn texts_and_chats_are_those_of_transformers() {
    for name in ALL {
        let Some(dir) = hf::reference(name) else { return };
        let (tokenizer, template, refs) = load(&dir);
        for case in refs["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let with = tokenizer.encode(text, true).unwrap();
            assert_eq!(with, ids(&case["ids"]), "{name} {text:?}");
            let without = tokenizer.encode(text, false).unwrap();
            assert_eq!(without, ids(&case["ids_no_special"]), "{name} {text:?}");
            assert_eq!(tokenizer.decode(&with), case["decoded_skip_special"], "{name} {text:?}");
            let decoded = tokenizer.decode_with_special(&without);
            assert_eq!(decoded, case["decoded"], "{name} {text:?}");

            let mut stream = tokenizer.stream();
            let mut pieces: String = with.iter().map(|id| stream.push(*id)).collect();
            pieces += &stream.finish();
            assert_eq!(pieces, case["decoded_skip_special"], "{name} streamed {text:?}");
        }
        for case in refs["chats"].as_array().unwrap() {
            let turn = |m: &Value| {
                Message::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap())
            };
            let messages: Vec<_> = case["messages"].as_array().unwrap().iter().map(turn).collect();
            let prompt = case["add_generation_prompt"].as_bool().unwrap();
            let rendered = template.render(&messages, prompt).unwrap();
            assert_eq!(rendered, case["rendered"], "{name}");
            assert_eq!(tokenizer.encode(&rendered, false).unwrap(), ids(&case["ids"]), "{name}");
        }
    }
}

fn byte_tokenizer() -> Tokenizer {
    let dir = tempdir().unwrap();
    write_random_hf(dir.path(), &RandomShape::tiny(RandomClass::Olmoe), &mut |_, _| {}).unwrap();
    Tokenizer::from_json(&fs::read(dir.path().join("tokenizer.json")).unwrap()).unwrap()
}

#[test]
fn the_tokenizer_of_random_models_knows_every_byte() {
    let tokenizer = byte_tokenizer();
    let text = "All of it: \0 \u{1f} \u{7f} ÿ Ā 中 🙂";
    let encoded = tokenizer.encode(text, true).unwrap();
    assert_eq!(encoded, text.bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(tokenizer.decode(&encoded), text);
    assert_eq!(tokenizer.vocab_size(), 320);
    assert_eq!(tokenizer.decode(&[300]), "<extra_300>");
    assert_eq!(tokenizer.decode(&[320, u32::MAX]), "", "unknown ids have no text");
}

#[test]
fn a_stream_holds_back_half_characters_and_gives_up_on_broken_ones() {
    let tokenizer = byte_tokenizer();
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = "a🙂b".bytes().map(|b| stream.push(b.into())).collect();
    assert_eq!(pieces, ["a", "", "", "", "🙂", "b"]);
    assert_eq!(stream.push(0xf0), "");
    assert_eq!(stream.finish(), "\u{fffd}");

    let mut stream = tokenizer.stream();
    let broken: String = (0..3 * OPEN_TOKENS_MAX).map(|_| stream.push(0xff)).collect();
    assert!(broken.contains('\u{fffd}'), "broken text flows");
    assert_eq!(stream.push(u32::MAX), "");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the ids, pieces are whole characters and join to the text of valid UTF-8.
    #[test]
    fn streamed_text_is_the_text(text in ".{0,40}", noise in proptest::collection::vec(0u32..400, 0..60)) {
        for name in ["mixtral", "qwen3_moe"] {
            let Some(dir) = hf::reference(name) else { return Ok(()) };
            let (tokenizer, ..) = load(&dir);
            let ids = tokenizer.encode(&text, true).unwrap();
            let mut stream = tokenizer.stream();
            let mut pieces: String = ids.iter().map(|id| stream.push(*id)).collect();
            pieces += &stream.finish();
            prop_assert_eq!(&pieces, &tokenizer.decode(&ids), "{}", name);

            let mut stream = tokenizer.stream();
            noise.iter().for_each(|id| drop(stream.push(*id)));
            stream.finish();
        }
    }
}

fn render(template: &str) -> Result<String, String> {
    let template = ChatTemplate::new(template, Some("<s>"), None).map_err(|e| e.to_string())?;
    template.render(&[Message::new("user", " hi ")], true).map_err(|e| e.to_string())
}

#[test]
fn templates_speak_the_dialect_of_transformers() {
    let blocks = "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'].strip() }}]\n  {% endif %}\n{% endfor %}\n";
    assert_eq!(render(blocks).unwrap(), "[hi]\n");
    assert_eq!(render("{{ bos_token + 'x' }}{{ nothing }}").unwrap(), "<s>x");
    assert_eq!(render("{{ 'a</think>b'.split('</think>')[-1].upper() }}").unwrap(), "B");
    assert_eq!(render("{{ messages[0].get('name', 'none') }}").unwrap(), "none");
    assert_eq!(render("{{ '<&>' }}{{ messages[0].content.startswith(' h') }}").unwrap(), "<&>True");
    assert_eq!(render("{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}").unwrap(), "2");
    assert!(
        render("{{ raise_exception('no system turn') }}").unwrap_err().contains("no system turn")
    );
}

/// The bound on steps grows with the conversation, so that long ones are rendered too.
#[test]
fn long_conversations_are_rendered() {
    let source =
        "{% for m in messages %}{{ m.role ~ ': ' + m.content.strip() + '\n' }}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let messages = vec![Message::new("user", "x".repeat(100_000)); 40];
    let text = template.render(&messages, false).unwrap();
    assert_eq!(text.len(), 40 * (100_000 + "user: \n".len()));
}

/// A template is a stranger's program: it reads nothing, ends, and fills no memory.
#[test]
fn hostile_templates_end_in_errors() {
    let long = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let printing = "{% for a in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}";
    let deep = "{{ (".repeat(5000);
    let hostile = [
        "{% include '/etc/passwd' %}",
        "{% extends 'other' %}",
        "{% import 'os' as os %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(99999999999) }}",
        "{{ 'x' * 99999999999 }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set x = 'x' * 99999 %}{{ x.replace('x', x) | length }}",
        "{% set x = 'x' * 99999 %}{% set y = x.split('x') %}{% for i in range(99) %}{% set z = y | join(x) %}{% endfor %}",
        long,
        printing,
        &deep,
    ];
    for template in hostile {
        let template: String = template.chars().take(200_000).collect();
        let shown: String = template.chars().take(60).collect();
        let error = render(&template).expect_err(&shown);
        println!("{shown}: {error}");
    }
}
