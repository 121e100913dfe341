//! Tokenizers and chat templates agree with what transformers computed, for every reference folder.

mod hf;

use std::{collections::BTreeMap, fs, path::Path};

use lite_llm_runtime::{
    chat::{ChatTemplate, Conversation, Message},
    import::{
        random::{RandomClass, RandomShape, write_random_hf},
        text,
    },
    tokenizer::{OPEN_TOKENS_MAX, Tokenizer},
};
use proptest::prelude::*;
use serde_json::{Value, json};
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
    let template = text.chat_template.as_ref().unwrap();
    let template = ChatTemplate::new(template, &text.special_tokens).unwrap();
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
            let conversation = Conversation::new(&messages).with_generation_prompt(prompt);
            let rendered = template.render(&conversation).unwrap();
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

fn tokens(named: &[(&str, &str)]) -> BTreeMap<String, String> {
    named.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

fn render_with(template: &str, conversation: &Conversation) -> Result<String, String> {
    let template = ChatTemplate::new(template, &tokens(&[("bos_token", "<s>")]));
    let template = template.map_err(|e| e.to_string())?;
    template.render(conversation).map_err(|e| e.to_string())
}

fn render(template: &str) -> Result<String, String> {
    render_with(template, &Conversation::new(&[Message::new("user", " hi ")]))
}

/// The expected texts are those of jinja2 3.1.6 as transformers 5 sets it up.
#[test]
fn the_dialect_is_that_of_transformers() {
    let conversation = r#"{
        "messages": [{"role": "user", "content": " Hi <é> "}, {"role": "assistant", "content": "Yes"}],
        "unix_time": 1764072000, "x": "X"
    }"#;
    let conversation = Conversation::from_json(conversation).unwrap();
    let rows: Vec<(String, String)> =
        serde_json::from_str(include_str!("data/dialect.json")).unwrap();
    for (template, expected) in rows {
        assert_eq!(render_with(&template, &conversation).as_deref(), Ok(&*expected), "{template}");
    }
    for (template, reason) in [
        ("{{ bos_token + nothing }}", "undefined"),
        ("{{ nothing + 'x' }}", "undefined"),
        ("{{ nothing.x }}", "undefined"),
        ("{{ raise_exception('No!') }}", "No!"),
        ("{{ unknown() }}", "unknown is unknown"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ nothing | tojson }}", "undefined"),
        ("{{ '%d' % 'x' }}", "decimal"),
        ("{{ debug() }}", "debug is unknown"),
        ("{{ 'x'.center(100000000) }}", "width"),
        ("{{ '{:>100000000}'.format('x') }}", "width"),
        ("{{ '{} {}'.format(1) }}", "nothing is given"),
        ("{{ strftime_now('%Q') }}", "%Q"),
    ] {
        let error = render_with(template, &conversation).expect_err(template);
        assert!(error.contains(reason), "{template}: {error}");
    }
    assert!(render("{{ strftime_now('%Y') }}").unwrap_err().contains("no time was given"));
}

#[test]
fn conversations_are_given_to_templates_as_transformers_gives_them() {
    let all = "{{ messages | tojson }}{{ tools | tojson }}{{ add_generation_prompt }}{{ more }}";
    for (json, expected) in [
        (r#"{"messages": []}"#, "[]nullTrue"),
        (
            r#"{"messages": [{"role": "a", "content": null, "z": 1, "b": 2}],
                "tools": [{"z": 1, "a": 2}], "add_generation_prompt": false, "more": "M"}"#,
            r#"[{"role": "a", "z": 1, "b": 2}][{"z": 1, "a": 2}]FalseM"#,
        ),
        (
            r#"{"messages": [{"role": "a", "reasoning": "r"}]}"#,
            r#"[{"thinking": "r", "role": "a", "reasoning": "r", "reasoning_content": "r"}]nullTrue"#,
        ),
    ] {
        let conversation = Conversation::from_json(json).unwrap();
        assert_eq!(render_with(all, &conversation).as_deref(), Ok(expected), "{json}");
    }
    for (json, reason) in [
        ("{}", "messages"),
        ("[]", "map"),
        (r#"{"messages": "hi"}"#, "messages"),
        (r#"{"messages": ["hi"]}"#, "messages"),
        (r#"{"messages": [], "unix_time": "now"}"#, "unix_time"),
    ] {
        let error = Conversation::from_json(json).unwrap_err().to_string();
        assert!(error.contains(reason), "{json}: {error}");
    }
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
    let template = ChatTemplate::new(source, &BTreeMap::new()).unwrap();
    let messages = vec![Message::new("user", "x".repeat(100_000)); 40];
    let text = template.render(&Conversation::new(&messages)).unwrap();
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
        "{% set x = 'x' * 99999 %}{% for i in range(99999) %}{% set z = x.strip() %}{% endfor %}",
        "{% set x = 'x' * 99999 %}{% for i in range(99999) %}{% set z = x.count('y') %}{% endfor %}",
        "{% set x = 'x' * 99999 %}{% for i in range(99999) %}{% set z = '{}'.format(x) %}{% endfor %}",
        "{% set x = ['x' * 99] * 9999 %}{% for i in range(9999) %}{% set z = x | tojson %}{% endfor %}",
        "{% set x = ['x' * 99] * 9999 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
        "{% set x = ['x' * 99] * 9999 %}{% for i in range(9999) %}{% set z = x | string %}{% endfor %}",
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

/// A folder with this tokenizer_config.json, and what else is given.
fn folder(config: &Value, more: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempdir().unwrap();
    write_random_hf(dir.path(), &RandomShape::tiny(RandomClass::Olmoe), &mut |_, _| {}).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    for (name, json) in more {
        fs::write(dir.path().join(name), json.to_string()).unwrap();
    }
    dir
}

#[test]
fn special_tokens_are_the_tokenizers_own() {
    let config = json!({
        "bos_token": { "content": "<b>", "lstrip": false }, "eos_token": "<e>", "pad_token": null,
        "add_bos_token": true, "image_token": "<i>", "extra_special_tokens": { "eoi_token": "<eoi>" },
    });
    let map = json!({ "bos_token": "<map>", "unk_token": { "content": "<u>" } });
    let dir = folder(&config, &[("special_tokens_map.json", map.clone())]);
    let own = [("eos_token", "<e>"), ("image_token", "<i>"), ("eoi_token", "<eoi>")];
    let mut expected = tokens(&own);
    expected.extend(tokens(&[("bos_token", "<map>"), ("unk_token", "<u>")]));
    assert_eq!(text::read(dir.path()).unwrap().special_tokens, expected);

    let mut newer = config.clone();
    newer["added_tokens_decoder"] = json!({});
    let dir = folder(&newer, &[("special_tokens_map.json", map)]);
    let mut expected = tokens(&own);
    expected.extend(tokens(&[("bos_token", "<b>")]));
    let read = text::read(dir.path()).unwrap().special_tokens;
    assert_eq!(read, expected, "the older file does not count");

    let dir = folder(&json!({ "eos_token": 3 }), &[]);
    let error = text::read(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("eos_token"), "{error}");
}

#[test]
fn tokens_that_only_added_tokens_decoder_knows_are_known() {
    let decoder = json!({
        "330": { "content": "<|late|>", "special": true },
        "325": { "content": "<|tool|>", "special": false },
        "3": { "content": "<|taken|>", "special": true },
    });
    let dir = folder(&json!({ "added_tokens_decoder": decoder }), &[]);
    let text = text::read(dir.path()).unwrap();
    let tokenizer = Tokenizer::from_json(&text.tokenizer_json).unwrap();
    assert_eq!(tokenizer.encode("a<|late|><|tool|>", false).unwrap(), [97, 330, 325]);
    assert_eq!(tokenizer.decode(&[97, 330, 325]), "a<|tool|>");
    assert_eq!(tokenizer.token_id("<|taken|>"), None, "tokenizer.json counts");
}

#[test]
fn a_folder_without_tokenizer_json_says_what_to_do() {
    let dir = folder(&json!({}), &[]);
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let error = || text::read(dir.path()).unwrap_err().to_string();
    assert!(error().contains("download"), "{}", error());
    fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
    assert!(error().contains("as tokenizer.model only"), "{}", error());
    fs::write(dir.path().join("vocab.json"), "{}").unwrap();
    fs::write(dir.path().join("merges.txt"), "").unwrap();
    assert!(error().contains("vocab.json and merges.txt") && error().contains("save_pretrained"));
}

/// A tokenizer as SentencePiece's: blanks are characters, and one at the start of a text is dropped.
fn sentence_piece() -> Tokenizer {
    let mut vocab =
        json!({ "<s>": 0, "</s>": 1, "\u{2581}": 2, "\u{2581}the": 3, "a": 4, "<end>": 5 });
    for byte in 0..=255 {
        vocab[format!("<0x{byte:02X}>")] = (byte + 6).into();
    }
    let special = |id: u32, content: &str, special: bool| {
        json!({ "id": id, "content": content, "special": special, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false })
    };
    let json = json!({
        "version": "1.0",
        "added_tokens": [special(0, "<s>", true), special(1, "</s>", true), special(5, "<end>", false)],
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "\u{2581}" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } },
        },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] },
        "model": { "type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true },
    });
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}

#[test]
fn a_stream_goes_on_where_the_prompt_ends() {
    let tokenizer = sentence_piece();
    let pieces = |prompt: &[u32], ids: &[u32]| {
        let mut stream = tokenizer.stream_after(prompt);
        let mut pieces: Vec<_> = ids.iter().map(|id| stream.push(*id)).collect();
        pieces.push(stream.finish());
        pieces
    };
    assert_eq!(pieces(&[], &[3, 4, 3]), ["the", "a", " the", ""]);
    assert_eq!(pieces(&[0], &[3]), ["the", ""], "a text of special tokens has not begun");
    assert_eq!(pieces(&[0, 4], &[3, 3]), [" the", " the", ""]);
    // However far back the text ends.
    let far = [&[4], &[0; 40][..]].concat();
    assert_eq!(pieces(&far, &[3, 4]), [" the", "a", ""]);
    assert_eq!(pieces(&[0, 4, 2], &[2, 3]), [" ", " the", ""]);
    // A character that begins in the prompt ends in the answer.
    let byte = |byte: u8| u32::from(byte) + 6;
    assert_eq!(pieces(&[4, byte(0xc3)], &[byte(0xa9), 4]), ["é", "a", ""]);
    // What the last tokens leave open comes with the end.
    assert_eq!(pieces(&[4], &[3, byte(0xc3)]), [" the", "", "\u{fffd}"]);

    let ending = sentence_piece().with_ends(&[5]);
    let mut stream = ending.stream_after(&[4]);
    assert_eq!([stream.push(3), stream.push(5)], [" the", ""], "special or not");
    assert_eq!(ending.decode(&[4, 5]), "a<end>");
    assert_eq!(tokenizer.prefix().unwrap(), [0]);
    assert_eq!(byte_tokenizer().prefix().unwrap(), [0; 0]);
}

#[test]
fn a_text_that_cannot_fit_is_known_by_its_bytes() {
    let tokenizer = sentence_piece();
    assert_eq!(tokenizer.bytes_max(10), 10 * "\u{2581}the".len() * 3, "the normalizer may shrink");
    assert_eq!(byte_tokenizer().bytes_max(2), 2 * "<extra_300>".len());
}
