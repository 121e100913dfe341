//! The HTTP API at its edges: keys, readiness, metrics, bodies that are too much, readers that leave
//! or do not read, and more requests than are let in. Spoken by hand, byte for byte.

mod process;

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use process::{Cluster, PATIENCE, Process, run};
use serde_json::{Value, json};

/// An API and how it is asked.
#[derive(Clone)]
struct Api {
    address: SocketAddr,
    key: Option<String>,
}

/// What came back.
#[derive(Debug)]
struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// It is an error of this status in OpenAI's shape, and its message has these words.
    #[track_caller]
    fn refuses(&self, status: u16, words: &str) {
        assert_eq!(self.status, status, "{self:?}");
        let error = &self.json()["error"];
        assert!(error["message"].as_str().unwrap().contains(words), "{words:?}: {self:?}");
        assert!(error["type"].is_string() && error.get("param").is_some(), "{self:?}");
    }
}

impl Api {
    fn of(process: &mut Process) -> Self {
        process.says("http on ");
        let said = process.out();
        let line = said.lines().find(|line| line.starts_with("http on ")).unwrap();
        let url = line.split([' ', ',']).nth(2).unwrap();
        let address = url.trim_start_matches("http://").trim_end_matches("/v1");
        Self { address: address.parse().unwrap(), key: None }
    }

    fn open(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a head and a body as they are, and reads until the other side closes.
    fn raw(&self, head: &str, body: &[u8]) -> Reply {
        let mut stream = self.open();
        // The other side may refuse before it has read everything.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        let mut bytes = Vec::new();
        match stream.read_to_end(&mut bytes) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset && !bytes.is_empty() => {}
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&bytes)),
        }
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        let (head, body) = (head.to_owned(), body.to_owned());
        Reply { status: status.unwrap_or_else(|| panic!("{text:?}")), head, body }
    }

    fn head(&self, method: &str, path: &str, more: &str) -> String {
        let key = self.key.as_ref().map(|key| format!("Authorization: Bearer {key}\r\n"));
        let key = key.unwrap_or_default();
        format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{key}{more}\r\n"
        )
    }

    fn get(&self, path: &str) -> Reply {
        self.raw(&self.head("GET", path, ""), b"")
    }

    fn post_head(&self, length: usize) -> String {
        let more = format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
        self.head("POST", "/v1/completions", &more)
    }

    fn post_to(&self, path: &str, body: &Value) -> Reply {
        let body = body.to_string();
        let length = body.len();
        let more = format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
        self.raw(&self.head("POST", path, &more), body.as_bytes())
    }

    fn post(&self, body: &Value) -> Reply {
        let body = body.to_string();
        self.raw(&self.post_head(body.len()), body.as_bytes())
    }

    /// The value of a metric.
    fn metric(&self, name: &str) -> f64 {
        let reply = self.get("/metrics");
        assert_eq!(reply.status, 200, "{reply:?}");
        let line = reply.body.lines().find(|line| line.split(' ').next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("{name} is missing: {}", reply.body));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    #[track_caller]
    fn comes_to(&self, name: &str, value: f64) {
        let begun = Instant::now();
        while self.metric(name) != value {
            assert!(begun.elapsed() < PATIENCE, "{name} is {}", self.metric(name));
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn long(stream: bool) -> Value {
    json!({ "prompt": "ls - list", "max_tokens": 900, "ignore_eos": true, "stream": stream })
}

#[test]
fn one_process_serves_and_ends_in_good_order() {
    let mut server = Process::start(&["run", "--http", "127.0.0.1:0", "--http-model", "demo"]);
    let api = Api::of(&mut server);
    // Ready only once a token was generated, by its own job if by nobody's.
    assert_eq!(api.get("/health").status, 200);
    let ready = api.get("/ready");
    assert_eq!((ready.status, &ready.json()["status"]), (200, &json!("ready")));
    assert_eq!(api.get("/v1/models").json()["data"][0]["id"], "demo");

    // Every path of the description is there, and nothing is said to other origins.
    let described = api.get("/openapi.json").json();
    for (path, methods) in described["paths"].as_object().unwrap() {
        let path = path.replace("{model}", "demo").replace("{file}", "x").replace("{batch}", "x");
        if path.starts_with("/v1/files") || path.starts_with("/v1/batches") {
            // One process has no ledger.
            if methods.get("get").is_some() {
                api.get(&path).refuses(404, "");
            }
            continue;
        }
        let reply = match methods.get("get") {
            Some(_) => api.get(&path),
            None => api.raw(&api.head("POST", &path, ""), b""),
        };
        assert!([200, 415].contains(&reply.status), "{path}: {reply:?}");
        assert!(!reply.head.to_lowercase().contains("access-control"), "{reply:?}");
    }

    // The page needs nothing from elsewhere, and what it shows is there.
    let page = api.get("/");
    assert_eq!(page.status, 200);
    assert!(page.head.to_lowercase().contains("content-security-policy: default-src 'none'"));
    assert!(!page.body.contains("http://") && !page.body.contains("https://"));
    let shown = api.get("/cluster").json();
    assert_eq!((&shown["model"], &shown["state"]), (&json!("demo"), &json!("ready")));
    assert_eq!(shown["nodes"][0]["residences"][0]["name"], "memory");

    let answer = api.post(&json!({ "prompt": "ls - list", "max_tokens": 5, "seed": 1 }));
    assert_eq!((answer.status, &answer.json()["usage"]["completion_tokens"]), (200, &json!(5)));
    assert_eq!(api.metric("lite_llm_generation_tokens_total"), 5.0);
    assert_eq!(api.metric("lite_llm_time_to_first_token_seconds_count"), 1.0);
    assert_eq!(api.metric("lite_llm_inter_token_latency_seconds_count"), 4.0);
    assert_eq!(api.metric("lite_llm_request_success_total{finished_reason=\"length\"}"), 1.0);
    assert!(api.metric("lite_llm_residence_bytes{node=\"w1\",residence=\"memory\"}") > 0.0);
    api.comes_to("lite_llm_num_requests_running", 0.0);
    let of_node = |name: &str| api.metric(&format!("{name}{{node=\"w1\"}}"));
    assert!(of_node("lite_llm_kv_cache_pages") > 0.0);
    assert!(of_node("lite_llm_positions_computed_total") >= 5.0);
    for name in ["num_preemptions", "spec_decode_num_accepted_tokens", "prefix_cache_hit_tokens"] {
        assert_eq!(of_node(&format!("lite_llm_{name}_total")), 0.0, "{name}");
    }
    // Nobody goes before others without a right to.
    let urgent =
        |priority: i32| api.post(&json!({ "prompt": "ls", "max_tokens": 1, "priority": priority }));
    urgent(127).refuses(403, "0 is the highest");
    assert_eq!((urgent(0).status, urgent(-128).status), (200, 200));
    forms(&api);
    responses(&api);

    // An answer that flows when the server stops ends early, and does not look whole.
    let mut stream = api.open();
    let mut body = long(true);
    // One of them alone may be over before the signal is there.
    body["n"] = json!(8);
    let body = body.to_string();
    stream.write_all(api.post_head(body.len()).as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut some = [0; 64];
    stream.read_exact(&mut some).unwrap();
    server.signal("INT");
    server.ends_within(Duration::from_secs(10)).expect(0, &[]);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
}

/// A response is the chat that it stands for, in other words.
fn responses(api: &Api) {
    let ask = |body: &Value| api.post_to("/v1/responses", body);
    let messages = json!([{ "role": "user", "content": "ls" }]);
    let chat = json!({ "messages": messages, "max_tokens": 12, "seed": 3, "temperature": 0.9 });
    let chat = api.post_to("/v1/chat/completions", &chat).json();
    let mut body = json!({ "input": "ls", "max_output_tokens": 12, "seed": 3, "temperature": 0.9 });
    let whole = ask(&body).json();
    let text = &chat["choices"][0]["message"]["content"];
    assert_eq!(&whole["output"][0]["content"][0]["text"], text, "{whole}");
    assert_eq!((&whole["status"], &whole["object"]), (&json!("incomplete"), &json!("response")));
    assert_eq!(whole["usage"]["output_tokens"], 12);
    assert_eq!(whole["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);

    body["stream"] = json!(true);
    let streamed = ask(&body);
    let events: Vec<Value> = streamed
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap())
        .collect();
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let said: String = deltas.map(|event| event["delta"].as_str().unwrap()).collect();
    assert_eq!(&json!(said), text);
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number, "{event}");
        let named = format!("event: {}", event["type"].as_str().unwrap());
        assert!(streamed.body.contains(&named), "{named}");
    }
    let last = events.last().unwrap();
    assert_eq!(
        (&events[0]["type"], &last["type"]),
        (&json!("response.created"), &json!("response.incomplete"))
    );
    assert_eq!(last["response"]["output"][0]["content"], whole["output"][0]["content"]);
    assert_eq!(last["response"]["usage"], whole["usage"]);

    body["previous_response_id"] = json!("resp_1");
    ask(&body).refuses(400, "nothing is stored");
    ask(&json!({ "input": "a", "model": "other" })).refuses(404, "there is no model");
    let reply = ask(&json!({ "input": "a", "max_output_tokens": 1, "tiers": "tier_zz" }));
    reply.refuses(400, "no tier tier_zz");
    let long = ask(&json!({ "input": "word ".repeat(3000) }));
    long.refuses(400, "shorten");
    assert_eq!(long.json()["error"]["param"], "input");
}

/// Answers have the form that was asked for, and others have the bits that they had.
fn forms(api: &Api) {
    let text = |more: Value| {
        let mut body =
            json!({ "prompt": "ls - list", "max_tokens": 60, "seed": 3, "temperature": 1.5 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = api.post(&body);
        assert_eq!(answer.status, 200, "{answer:?}");
        let choice = answer.json()["choices"][0].clone();
        (choice["text"].as_str().unwrap().to_owned(), choice["finish_reason"].clone())
    };
    let free = text(json!({}));
    let (digits, finish) = text(json!({ "regex": "[0-9]{3}-[0-9]{2}" }));
    let is_form = digits.len() == 6 && digits.as_bytes()[3] == b'-';
    assert!(is_form && digits.bytes().all(|b| b.is_ascii_digit() || b == b'-'), "{digits:?}");
    assert_eq!(finish, "stop");
    // Guesses change nothing, where there is a form either.
    assert_eq!(text(json!({ "regex": "[0-9]{3}-[0-9]{2}", "speculate": "ngram" })).0, digits);
    let (lark, _) = text(json!({ "grammar": "start: \"ls\" (\" -a\" | \" -l\")+ \"!\"" }));
    assert!(lark.starts_with("ls -"), "{lark:?}");
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["kind", "hidden"],
        "properties": { "kind": { "enum": ["file", "folder"] }, "hidden": { "type": "boolean" } },
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema } });
    let (found, finish) = text(json!({ "response_format": format }));
    let found: Value =
        serde_json::from_str(&found).unwrap_or_else(|error| panic!("{error}: {found}"));
    assert!(found["hidden"].is_boolean() && found["kind"].is_string(), "{found}");
    assert_eq!(finish, "stop");
    assert_eq!(text(json!({})), free, "what has no form is as it was");
    let drafted = json!({ "prompt": "a", "max_tokens": 5, "speculate": "tier:tier_10b" });
    api.post(&drafted).refuses(400, "speculate: the model has no tier tier_10b; it has tier_1b");
    let mut body = json!({ "prompt": "a", "max_tokens": 5, "regex": "(" });
    api.post(&body).refuses(400, "grammar: ");
    body["regex"] = json!("a");
    body["grammar"] = json!("start: \"a\"");
    api.post(&body).refuses(400, "regex and grammar");
    body["grammar"] = Value::Null;
    body["ignore_eos"] = json!(true);
    api.post(&body).refuses(400, "ignore_eos");
}

#[test]
fn what_is_too_much_is_refused_and_costs_nothing() {
    let mut server = Process::start(&["run", "--http", "127.0.0.1:0"]);
    let api = Api::of(&mut server);
    let claims = |length: usize, body: &[u8]| api.raw(&api.post_head(length), body);
    claims(10 << 20, &vec![b' '; 10 << 20]).refuses(413, "bytes");
    claims(1 << 40, b"{}").refuses(413, "bytes");
    let nested = "[".repeat(1 << 20);
    claims(nested.len(), nested.as_bytes()).refuses(400, "nested");
    let many = format!("{{\"prompt\":[{}0]}}", "0,".repeat(3_000_000));
    claims(many.len(), many.as_bytes()).refuses(400, "values");
    let long = json!({ "prompt": vec![0; 1_000_000] });
    api.post(&long).refuses(400, "the prompt has 1000000 tokens");
    api.post(&json!({ "prompt": "word ".repeat(1 << 20) })).refuses(400, "prompt");
    api.post(&json!({ "prompt": "a", "n": 64, "max_tokens": u64::MAX, "deadline_ms": 1 }))
        .refuses(504, "deadline_ms");
    claims(3, b"{}}").refuses(400, "body");
    claims(2, b"\xff\xfe").refuses(400, "body");

    let plain = "Content-Type: text/plain\r\nContent-Length: 2\r\n";
    api.raw(&api.head("POST", "/v1/completions", plain), b"{}").refuses(415, "application/json");
    api.raw(&api.head("DELETE", "/v1/completions", ""), b"").refuses(405, "method");
    api.get("/nothing/here").refuses(404, "nothing at");
    api.get("/v1/models/other").refuses(404, "there is no model");
    api.get("/v1/files/%FF").refuses(400, "UTF-8");
    for list in ["files", "batches"] {
        api.get(&format!("/v1/{list}?limit=-1")).refuses(400, "a whole number up to");
    }
    let bent = "GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    api.raw(bent, b"").refuses(403, "localhost");
    let huge = format!("X: {}\r\n", "y".repeat(1 << 20));
    assert_eq!(api.raw(&api.head("GET", "/health", &huge), b"").status, 431);
    // It serves as before.
    assert_eq!(api.post(&json!({ "prompt": "a", "max_tokens": 1 })).status, 200);
}

#[test]
fn who_leaves_takes_the_jobs_along() {
    let mut server = Process::start(&["run", "--http", "127.0.0.1:0"]);
    let api = Api::of(&mut server);
    // Whole answers and streams alike, left at once and in the middle.
    let mut open = Vec::new();
    for number in 0..60 {
        let body = long(number % 2 == 0).to_string();
        let mut stream = api.open();
        stream.write_all(api.post_head(body.len()).as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        if number % 4 == 0 {
            let mut some = [0; 200];
            stream.read_exact(&mut some).unwrap();
        }
        open.push(stream);
    }
    drop(open);
    api.comes_to("lite_llm_jobs_running", 0.0);
    api.comes_to("lite_llm_num_requests_running", 0.0);
    api.comes_to("lite_llm_num_requests_waiting", 0.0);
    assert_eq!(api.post(&json!({ "prompt": "a", "max_tokens": 1 })).status, 200);
}

#[test]
fn more_than_is_let_in_is_told_when_to_come_again() {
    let mut server = Process::start(&["run", "--http", "127.0.0.1:0"]);
    let api = Api::of(&mut server);
    // Each may come to a whole context of tokens, 64 times: two fill what is admitted.
    let mut full = long(true);
    full["n"] = json!(64);
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = api.open();
        let body = full.to_string();
        stream.write_all(api.post_head(body.len()).as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        let mut some = [0; 15];
        stream.read_exact(&mut some).unwrap();
        assert_eq!(&some, b"HTTP/1.1 200 OK");
        open.push(stream);
    }
    let refused = api.post(&full);
    refused.refuses(429, "tokens");
    assert!(refused.head.to_lowercase().contains("retry-after: 1"), "{refused:?}");
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    // Small ones have room beside them.
    assert_eq!(api.post(&json!({ "prompt": "a", "max_tokens": 1 })).status, 200);
    drop(open);
    api.comes_to("lite_llm_jobs_running", 0.0);
    let answer = api.post(&json!({ "prompt": "a", "max_tokens": 1, "n": 64 }));
    assert_eq!(answer.json()["choices"].as_array().unwrap().len(), 64);
}

#[test]
fn keys_open_the_door_and_bound_what_their_holders_take() {
    let own = ["--http", "127.0.0.1:0"];
    let mut cluster = Cluster::ready_with(&["a"], &[], &own);
    let state = cluster.state.path().to_str().unwrap().to_owned();
    let key = |words: &[&str]| {
        let mut args = vec!["key", "--state", &state, "--json"];
        args.extend(words);
        let ended = run(&args);
        ended.expect(0, &[]);
        serde_json::from_str::<Value>(&ended.out).unwrap()
    };
    let mut api = Api::of(&mut cluster.coordinator);
    assert_eq!(api.get("/v1/models").status, 200, "nobody is asked before there is a key");
    let made = key(&["add", "ci", "--jobs", "2", "--tokens-per-minute", "40"]);
    let text = made["key"].as_str().unwrap().to_owned();
    api.get("/v1/models").refuses(401, "a key is expected");
    api.get("/metrics").refuses(401, "a key is expected");
    api.get("/cluster").refuses(401, "a key is expected");
    assert_eq!(api.get("/").status, 200);
    assert_eq!(api.get("/health").status, 200);
    assert_eq!(api.get("/ready").status, 200);
    api.key = Some(text[..text.len() - 1].to_owned());
    api.get("/v1/models").refuses(401, "not known");
    api.key = Some(text.clone());
    assert_eq!(api.get("/v1/models").status, 200);
    let listed = key(&["list"]);
    assert_eq!((&listed[0]["name"], &listed[0]["jobs"]), (&json!("ci"), &json!(2)));
    assert!(!listed.to_string().contains(&text), "a key is shown once");

    let three = json!({ "prompt": "a", "max_tokens": 1, "n": 3 });
    api.post(&three).refuses(429, "2 at a time");
    let ask = json!({ "prompt": "ls - list", "max_tokens": 60, "ignore_eos": true });
    assert_eq!(api.post(&ask).status, 200, "an answer is paid for when it is there");
    let refused = api.post(&ask);
    refused.refuses(429, "40 tokens per minute");
    let head = refused.head.to_lowercase();
    let wait = head.split("retry-after: ").nth(1).unwrap().lines().next().unwrap();
    assert!((20..120).contains(&wait.parse::<u32>().unwrap()), "{head}");

    let other = key(&["add", "other"])["key"].as_str().unwrap().to_owned();
    let free = Api { key: Some(other.clone()), ..api.clone() };
    assert_eq!(free.post(&ask).status, 200, "a key's limits are its own");
    let keys: BTreeSet<&str> = [text.as_str(), other.as_str()].into();
    let kept = std::fs::read_to_string(cluster.state.path().join("keys")).unwrap();
    assert!(keys.iter().all(|key| !kept.contains(key.trim_start_matches("lite-llm-"))));
    // Whoever has the right goes before others; nobody sees whose the others' requests are.
    let urgent = json!({ "prompt": "a", "max_tokens": 1, "priority": 5 });
    free.post(&urgent).refuses(403, "key other may ask for 0");
    let first = key(&["add", "first", "--priority", "5"])["key"].as_str().unwrap().to_owned();
    let first = Api { key: Some(first), ..api.clone() };
    assert_eq!(first.post(&urgent).status, 200);
    let mut stream = free.open();
    let body = long(true).to_string();
    stream.write_all(free.post_head(body.len()).as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut some = [0; 200];
    stream.read_exact(&mut some).unwrap();
    let (own, others) = (free.get("/cluster").json(), first.get("/cluster").json());
    assert_eq!(own["requests"][0]["key"], "other", "{own}");
    assert!(others["requests"][0]["key"].is_null(), "{others}");
    drop(stream);
    key(&["revoke", "ci"]);
    api.get("/v1/models").refuses(401, "not known");
    run(&["key", "--state", &state, "revoke", "ci"]).expect(2, &["no key is named ci"]);
}

/// A coordinator with an API, and its state.
fn coordinator(state: &std::path::Path) -> (Process, Api) {
    let (model, state) = (process::demo_model(), state.to_str().unwrap());
    let args = ["coordinator", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--model"];
    let args = [&args[..], &[model.to_str().unwrap(), "--state", state]].concat();
    let mut coordinator = Process::start(&args);
    let api = Api::of(&mut coordinator);
    coordinator.says("waiting for workers");
    (coordinator, api)
}

/// A job waits while nobody knows how much the workers' caches hold, and no longer.
#[test]
fn what_fits_in_no_cache_is_told_and_not_tried_again() {
    let state = tempfile::tempdir().unwrap();
    let (mut coordinator, api) = coordinator(state.path());
    let path = |name: &str| state.path().join(name).to_str().unwrap().to_owned();
    let token = path("client.token");
    let submit = ["submit", "--token", &token, "--max-tokens", "900", "ls - list"];
    let submitted = Process::start(&submit);
    let asked = thread::spawn(move || (api.post(&long(false)), api));
    coordinator.says("http on ");
    thread::sleep(Duration::from_millis(500));
    let token = path("worker.token");
    let worker = ["worker", "--token", &token, "--name", "a", "--threads", "1", "--kv", "1MiB"];
    let _worker = Process::start(&worker);
    // Without a word from the coordinator it would be offered for a minute.
    let begun = Instant::now();
    submitted.ends_within(PATIENCE).expect(1, &["may come to", "a larger --kv"]);
    let (reply, api) = asked.join().unwrap();
    reply.refuses(503, "a larger --kv");
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    // What is known before it is asked for is the client's mistake, and is not to be sent again.
    let reply = api.post(&long(false));
    reply.refuses(400, "a larger --kv");
    assert_eq!(reply.json()["error"]["code"], "context_length_exceeded");
    assert_eq!(api.post(&json!({ "prompt": "ls", "max_tokens": 9 })).status, 200);
}

#[test]
fn a_disk_that_fails_is_no_mistake_of_the_client() {
    let state = tempfile::tempdir().unwrap();
    let (_coordinator, api) = coordinator(state.path());
    let upload = || {
        let part = |head: &str, body: &str| {
            format!("--x\r\nContent-Disposition: form-data; name={head}\r\n\r\n{body}\r\n")
        };
        let [purpose, file] =
            [("purpose", "batch"), ("file; filename=a", "{}")].map(|(h, b)| part(h, b));
        let body = format!("{purpose}{file}--x--\r\n");
        let more = format!(
            "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {}\r\n",
            body.len()
        );
        api.raw(&api.head("POST", "/v1/files", &more), body.as_bytes())
    };
    let kept = upload();
    assert_eq!(kept.status, 200, "{kept:?}");
    let content = format!("/v1/files/{}/content", kept.json()["id"].as_str().unwrap());
    assert!(api.get(&content).body.contains("{}"));
    std::fs::remove_dir_all(state.path().join("files")).unwrap();
    for reply in [upload(), api.get(&content)] {
        reply.refuses(500, "the server's disk fails");
        assert_eq!(reply.json()["error"]["type"], "server_error");
        assert!(!reply.body.contains(state.path().to_str().unwrap()), "{reply:?}");
    }
}

/// Bodies are bounded by what they become, not by their bytes alone.
#[test]
fn bodies_of_a_million_values_take_little_memory() {
    let mut server = Process::start(&["run", "--http", "127.0.0.1:0"]);
    let api = Api::of(&mut server);
    let peak = || -> u64 {
        let path = format!("/proc/{}/status", server.pid());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    };
    assert_eq!(api.post(&json!({ "prompt": [1, 2], "max_tokens": 1 })).status, 200);
    let before = peak();
    let (ids, texts) = (vec![1; 1_000_000], vec!["a"; 1_000_000]);
    let bodies = [
        (json!({ "prompt": ids }), "shorten the prompt"),
        (json!({ "prompt": texts }), "at most 64"),
        (json!({ "prompt": "a", "stop": texts }), "values"),
        (
            json!({ "prompt": "a", "response_format": { "type": "json_schema", "a": ids } }),
            "values",
        ),
        (json!({ "prompt": "a", "seed": ids }), "values"),
        (json!({ "prompt": "a", "metadata": { "prompt": ids } }), "values"),
    ];
    thread::scope(|scope| {
        for (body, words) in &bodies {
            scope.spawn(|| (0..3).for_each(|_| api.post(body).refuses(400, words)));
        }
    });
    // Six bodies of 4 MB are held at a time; a tree of one takes sixteen times as much.
    let grown = peak().saturating_sub(before);
    assert!(grown < 100, "{grown} MiB");
}

#[test]
fn a_gpus_memory_is_shown_wherever_memory_is() {
    if !lite_llm_kernels::cuda::driver_present() {
        eprintln!("skipped: there is no NVIDIA driver here");
        return;
    }
    let asked = ["run", "--device", "cuda:0", "--hbm", "64MiB", "--threads", "1"];
    let mut process = Process::start(&[&asked[..], &["--http", "127.0.0.1:0"]].concat());
    let api = Api::of(&mut process);
    let model = api.get("/v1/models").json()["data"][0]["id"].clone();
    let reply = api.post(&json!({ "model": model, "prompt": "ls", "max_tokens": 2 }));
    assert_eq!(reply.status, 200, "{reply:?}");
    let shown = api.get("/cluster").json();
    let hbm = &shown["nodes"][0]["residences"][0];
    assert_eq!((&hbm["name"], &hbm["budget"]), (&json!("hbm"), &json!(64 << 20)));
    let labels = "{node=\"w1\",residence=\"hbm\"}";
    let metric = |name: &str| api.metric(&format!("lite_llm_residence_{name}{labels}"));
    assert_eq!(metric("bytes"), hbm["held"].as_f64().unwrap());
    // Experts that passes on the GPU wanted are counted as they came.
    assert!(metric("misses_total") > 0.0 && metric("read_bytes_total") > 0.0);
    assert_eq!(metric("read_bytes_total"), hbm["bytes"].as_f64().unwrap());
}
